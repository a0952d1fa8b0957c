"""vLLM in a process of its own: `PYTHON -I vllm_child.py OPTIONS`, where PYTHON has vLLM and pyarrow, and no Potstill.

Standard input has one JSON request per line, standard output one JSON reply per line. Tables pass as Arrow IPC files. The
process ends when its standard input ends.
"""

import itertools
import json
import os
import queue
import sys
import threading
from importlib.metadata import packages_distributions, version
from typing import Any

ENTRIES = 4_000_000  # log-probs in memory at once, before they are written
STEP_TOKENS = 2048  # per step of vLLM
RUNNING = 256  # most sequences to which a step on a CPU adds a token


def main(options: dict[str, Any]) -> None:
    """Load the model with `options` of vLLM's LLM and answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that what vLLM prints is not read as a reply
    requests = _queue_requests()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its end releases everything
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    from vllm import LLM
    from vllm.platforms import current_platform

    llm = LLM(
        **options,
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",  # of the distribution that tokens are drawn from
        max_logprobs=-1,
        max_model_len=-1,  # the model's own, or less where the cache is too small for it
        max_num_batched_tokens=STEP_TOKENS,  # when prompts are scored: rows of logits over the whole vocabulary
        max_num_seqs=RUNNING if current_platform.is_cpu() else None,
        enforce_eager=current_platform.is_cpu(),
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=replies)
    while True:
        request = requests.get()
        try:
            WORK[request["do"]](llm, request)
            reply: dict[str, Any] = {"done": True}
        except ValueError as error:  # vLLM's way of refusing a request
            reply = {"refused": str(error)}
        print(json.dumps(reply), file=replies)


def _queue_requests() -> queue.Queue[dict[str, Any]]:
    """A queue that a thread fills from standard input. When the input ends, nobody waits for replies, and the process ends."""
    requests: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def generate(llm: Any, request: dict[str, Any]) -> None:
    """Sample: a table (prompt, seed) to a table (ids, logprobs).

    If a step has room for a part of a prompt only, vLLM rewinds its random generator, which generators of CPUs cannot do. So
    on a CPU vLLM gets no more prompts at once than one step has room for.
    """
    import pyarrow as pa
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    rows = _read(request)
    prompts, sampled = _prompts_of(rows["prompt"]), request["sampling"]["temperature"] > 0
    lengths = [len(prompt["prompt_token_ids"]) for prompt in prompts]
    together = [slice(None)]
    if sampled and current_platform.is_cpu():
        if (longest := max(lengths)) > STEP_TOKENS:
            raise ValueError(f"a prompt has {longest} tokens; on a CPU vLLM can sample from prompts of at most {STEP_TOKENS}")
        together = _split_rows(lengths, STEP_TOKENS - RUNNING)
    bias = dict.fromkeys(range(*request["padding"]), -100.0) or None
    shared = {**request["sampling"], "stop_token_ids": request["stops"], "ignore_eos": True, "logit_bias": bias}
    plain = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
    params = [SamplingParams(**shared, **plain, seed=seed) for seed in rows["seed"].to_pylist()]
    outputs = [output.outputs[0] for part in together for output in llm.generate(prompts[part], params[part], use_tqdm=False)]
    ids = pa.array([list(output.token_ids) for output in outputs], pa.list_(pa.int32()))
    logprobs = pa.array([output.logprobs.logprobs for output in outputs], pa.list_(pa.float32()))
    _write(request, [pa.record_batch({"ids": ids, "logprobs": logprobs})])


def tops(llm: Any, request: dict[str, Any]) -> None:
    """Score: a table (prompt, completion) to a table (actual, ids, logprobs).

    `actual` has the log-probs of the completion's tokens; `ids` and `logprobs` are flat: the k likeliest of each token, best
    first.
    """
    import numpy as np
    import pyarrow as pa
    from vllm import SamplingParams

    rows, k = _read(request), request["k"]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=k, flat_logprobs=True, detokenize=False)
    prompts, completions = rows["prompt"].to_pylist(), rows["completion"].to_pylist()

    def score(part: slice) -> Any:
        sequences = [prompt + completion for prompt, completion in zip(prompts[part], completions[part], strict=True)]
        columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], params, use_tqdm=False)
        for output, completion in zip(outputs, completions[part], strict=True):
            flat, n = output.prompt_logprobs, len(completion)
            ids = np.array(flat.token_ids[-n * (k + 1) :], np.int32).reshape(n, k + 1)
            logprobs = np.array(flat.logprobs[-n * (k + 1) :], np.float32).reshape(n, k + 1)
            assert ids[:, 0].tolist() == completion, "vLLM scored other tokens than those of the request"
            for column, values in zip(columns, (logprobs[:, 0], ids[:, 1:], logprobs[:, 1:]), strict=True):
                column.append(values.reshape(-1))
        kinds = {"actual": pa.float32(), "ids": pa.int32(), "logprobs": pa.float32()}
        return pa.record_batch({n: pa.array(c, pa.list_(t)) for (n, t), c in zip(kinds.items(), columns, strict=True)})

    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    _write(request, (score(part) for part in _split_rows(lengths, ENTRIES // (k + 1))))


def stops(llm: Any, request: dict[str, Any]) -> None:
    """Score the stop: a table (prompt) to a table (logprobs), of each stop id as the next token."""
    import pyarrow as pa
    from vllm import SamplingParams

    ids = request["stops"]
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=len(ids), logprob_token_ids=ids, detokenize=False)
    outputs = llm.generate(_prompts_of(_read(request)["prompt"]), params, use_tqdm=False)
    logprobs = [[output.outputs[0].logprobs[0][i].logprob for i in ids] for output in outputs]
    _write(request, [pa.record_batch({"logprobs": pa.array(logprobs, pa.list_(pa.float32()))})])


def _prompts_of(column: Any) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in column.to_pylist()]


def _split_rows(lengths: list[int], most: int) -> list[slice]:
    """Split rows, in order, so that each part has at most `most` tokens, or is one row."""
    cuts, total = [0], 0
    for row, length in enumerate(lengths):
        if total and total + length > most:
            cuts.append(row)
            total = 0
        total += length
    return [slice(low, high) for low, high in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def _read(request: dict[str, Any]) -> Any:
    import pyarrow as pa

    with pa.memory_map(request["in"]) as source:
        return pa.ipc.open_file(source).read_all()


def _write(request: dict[str, Any], batches: Any) -> None:
    import pyarrow as pa

    batches = iter(batches)
    first = next(batches)
    with pa.ipc.new_file(request["out"], first.schema) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


WORK = {"generate": generate, "tops": tops, "stops": stops}

if __name__ == "__main__":
    if sys.argv[1] == "version":
        print(version(packages_distributions()["vllm"][0]))
    else:
        main(json.loads(sys.argv[1]))
