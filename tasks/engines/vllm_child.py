"""vLLM in a process of its own: `PYTHON -I vllm_child.py WORK OPTIONS`, where PYTHON has vLLM and pyarrow, and no Potstill.

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

STEP_TOKENS = 2048  # per step of vLLM, when it samples
READ_TOKENS = 8192  # per step, when it reads alone
PART = 16_384  # tokens whose states are in memory at once, before they are written
RUNNING = 256  # most sequences to which a step on a CPU adds a token


def main(work: str, options: dict[str, Any]) -> None:
    """Load the model with `options` of vLLM's LLM and answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that what vLLM prints is not read as a reply
    requests = _queue_requests()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: its end releases everything
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.platforms import current_platform

    own: dict[str, dict[str, Any]] = {
        "generate": {
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are drawn from
            "max_logprobs": -1,
            "max_num_batched_tokens": STEP_TOKENS,
        },
        "states": {
            "runner": "pooling",
            "convert": "embed",
            "pooler_config": PoolerConfig(task="token_embed", use_activation=False),  # as they are, not normalised
            "enable_prefix_caching": False,  # all states are wanted, and the same in any order
            "max_num_batched_tokens": READ_TOKENS,
        },
    }
    llm = LLM(
        **options,
        **own[work],
        generation_config="vllm",
        max_model_len=-1,  # the model's own, or less where the cache is too small for it
        max_num_seqs=RUNNING if current_platform.is_cpu() else None,
        enforce_eager=current_platform.is_cpu(),
        enable_sleep_mode=not current_platform.is_cpu(),
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
        together = split_rows(lengths, STEP_TOKENS - RUNNING)
    bias = dict.fromkeys(range(*request["padding"]), -100.0) or None
    shared = {**request["sampling"], "stop_token_ids": request["stops"], "ignore_eos": True, "logit_bias": bias}
    plain = {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
    params = [SamplingParams(**shared, **plain, seed=seed) for seed in rows["seed"].to_pylist()]
    outputs = [output.outputs[0] for part in together for output in llm.generate(prompts[part], params[part], use_tqdm=False)]
    ids = pa.array([list(output.token_ids) for output in outputs], pa.list_(pa.int32()))
    logprobs = pa.array([output.logprobs.logprobs for output in outputs], pa.list_(pa.float32()))
    _write(request, [pa.record_batch({"ids": ids, "logprobs": logprobs})])


def states(llm: Any, request: dict[str, Any]) -> None:
    """Read: a table (prompt, completion) to a table (states).

    `states` are flat: the last hidden state, after the model's last norm, before each token of the completion.
    """
    import numpy as np
    import pyarrow as pa
    from vllm import PoolingParams

    rows, params = _read(request), PoolingParams(use_activation=False)
    prompts, completions = rows["prompt"].to_pylist(), rows["completion"].to_pylist()

    def read(part: slice) -> Any:
        both = zip(prompts[part], completions[part], strict=True)
        sequences = [{"prompt_token_ids": prompt + completion[:-1]} for prompt, completion in both]  # nothing follows the last
        outputs = llm.encode(sequences, params, pooling_task="token_embed", use_tqdm=False)
        found = []
        for output, sequence, completion in zip(outputs, sequences, completions[part], strict=True):
            data = output.outputs.data
            assert list(output.prompt_token_ids) == sequence["prompt_token_ids"], "vLLM read other tokens than the request's"
            assert len(data) == len(sequence["prompt_token_ids"]), "vLLM gives other states than one a token"
            found.append(data[-len(completion) :].float().numpy())
        bounds = np.cumsum([0, *(each.size for each in found)])
        values = pa.array(np.concatenate(found).reshape(-1), pa.float32())
        column = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), values)
        return pa.record_batch({"states": column})

    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    _write(request, (read(part) for part in split_rows(lengths, PART)))


def renew(llm: Any, request: dict[str, Any]) -> None:
    """Go on with the weights in another folder; what was computed with the old ones is forgotten."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": request["model"]})
    llm.reset_prefix_cache()


def sleep(llm: Any, request: dict[str, Any]) -> None:
    """Free the device's memory: the weights go to the host's, the cache is forgotten."""
    llm.sleep(level=1)


def wake(llm: Any, request: dict[str, Any]) -> None:
    """Take the device's memory again."""
    llm.wake_up()


def _prompts_of(column: Any) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in column.to_pylist()]


def split_rows(lengths: list[int], most: int) -> list[slice]:
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


WORK = {"generate": generate, "states": states, "renew": renew, "sleep": sleep, "wake": wake}

if __name__ == "__main__":
    if sys.argv[1] == "version":
        print(version(packages_distributions()["vllm"][0]))
    else:
        main(sys.argv[1], json.loads(sys.argv[2]))
