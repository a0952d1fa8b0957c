"""The vLLM engine: a child process with an interpreter of its own, shard in, shard out (see vllm_child.py)."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from configs.errors import BadInput, Unavailable
from tasks.engines.base import Advance, Completion, Sampling, TokenScores, ignore_progress
from tasks.engines.names import CHILD
from tasks.engines.pool import drop, hold, make_room, total_memory
from tasks.engines.states import StateScorer
from tasks.engines.vllm_child import split_rows
from tasks.models.reference import ModelRef, device_of, dtype_of
from tasks.models.text import side
from tasks.models.weights import check_head, count_weights, load_weights
from tasks.running.progress import logger
from tasks.signals.base import Signal
from tasks.signals.head import Head, head_of

LAST_WORDS = 15  # lines of a child's output that an error quotes
CACHE, ITSELF = 4, 2  # GiB on a CPU: vLLM's cache of keys and values, and what it takes without a model
STATES = 2**28  # numbers of hidden states in one reply: 1 GiB
IDS = pa.list_(pa.int32())


class VllmEngine:
    """vLLM in child processes: one that samples, one that gives hidden states, to which the model's head is applied here.

    On one kind of machine, equal seeds give equal completions in any batch. A child starts with the first request that needs
    it, and again with the first request after it died or gave its memory back.
    """

    def __init__(self, ref: ModelRef):
        self.ref, self.side = ref, side(ref)
        self.size = len(self.side.beta.values)
        self.rows = self.side.rows or self.size  # of the head; rows from `size` on are padding
        self.children: dict[str, Child] = {}

    @cached_property
    def head(self) -> Head:
        """The model's last layer, on its device. The whole model is read for it, and held against the head."""
        model = load_weights(self.ref).eval()
        check_head(model, self.ref.path, self.size)
        return head_of(model, self.size).on(device_of(self.ref))

    @cached_property
    def states(self) -> StateScorer:
        """What makes scores of hidden states."""
        return StateScorer(self.side, device_of(self.ref), self.head.logits)

    def renew(self, ref: ModelRef) -> None:
        """Go on with other weights of the same shape: the children take them with their next request."""
        self.ref, self.side = ref, side(ref)
        for name in ("states", "head"):
            self.__dict__.pop(name, None)

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        options = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            options |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        table = pa.table({"prompt": pa.array(prompts, IDS), "seed": pa.array(seeds, pa.int64())})
        stops, padding = self.side.stop_ids, [self.size, self.rows]
        batches = self._ask("generate", table, sampling=options, stops=stops, padding=padding)
        completions = [Completion(row["ids"], row["logprobs"]) for batch in batches for row in batch.to_pylist()]
        advance(len(completions))
        return completions

    def score(self, prompts: list[list[int]], completions: list[list[int]], signal: Signal) -> list[TokenScores]:
        results: list[TokenScores] = []
        if not prompts:  # nothing to read the head for
            return results
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True)]
        for part in split_rows(lengths, STATES // self.head.weight.shape[1]):
            table = pa.table({"prompt": pa.array(prompts[part], IDS), "completion": pa.array(completions[part], IDS)})
            for batch in self._ask("states", table):
                states = batch["states"].flatten().to_numpy().reshape(-1, self.head.weight.shape[1])
                here = completions[len(results) : len(results) + len(batch)]
                hidden = torch.from_numpy(states.copy()).to(self.head.weight.device, self.head.weight.dtype)
                results += self.states.score(hidden, here, signal)
        return results

    def close(self) -> None:
        """End the children, which releases their memory."""
        while self.children:
            self.children.popitem()[1].end()

    def _ask(self, do: str, table: pa.Table, **options: Any) -> Iterator[pa.RecordBatch]:
        """Send the rows of a table to the child that can `do` it, and yield the batches of its reply in order."""
        if not table.num_rows:
            return
        try:
            if (child := self.children.get(do)) is None or child.ended:
                child = self.children[do] = Child(self.ref, do)
            child.use(self.ref)
            yield from child.ask(do, table, options)
        except (BadInput, GeneratorExit):  # the reply was read, or the caller needs no more of it
            raise
        except BaseException:  # the child broke, or its reply is not waited for: the next reply would belong to this request
            if do in self.children:
                self.children.pop(do).end()
            raise


def environment(device: str) -> dict[str, str]:
    """A child's environment variables. vLLM takes the first GPU that it sees, so `device` is the only one that it sees."""
    kind, _, index = device.partition(":")
    variables = dict(os.environ)
    if kind == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        visible = variables.get("CUDA_VISIBLE_DEVICES")  # torch counts devices within this list
        variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
    return variables


class Child:
    """A child process, and the folder through which tables pass to and from it."""

    def __init__(self, ref: ModelRef, do: str):
        """Start a child that can `do` one thing, once there is room for it."""
        self.ref, self.device, self.asleep, self.ended = ref, device_of(ref), False, False
        make_room(self.device, self._need(), spare=0)
        self.folder = tempfile.TemporaryDirectory(prefix="potstill-vllm-")
        options = {
            "model": ref.local,
            "dtype": str(dtype_of(ref)).removeprefix("torch."),
            "gpu_memory_utilization": ref.vllm_memory,
            "trust_remote_code": ref.trust_remote_code,
        }
        logger.info("vLLM starts with %s", ref.path)
        with open(f"{self.folder.name}/log", "w") as log:
            self.process = subprocess.Popen(
                [ref.vllm_python, "-I", CHILD, do, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(ref.device),
                start_new_session=True,  # a signal to the command's group is the command's; the child ends with its input
            )
        try:
            self._read_reply()
        except BaseException:  # also a time-out while it loads
            self.end()
            raise
        hold(self)

    def _need(self) -> float:
        """The bytes that it takes. On a GPU that is a share of the whole; on the CPU weights, its cache, and vLLM itself."""
        if self.device.type == "cpu":
            cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", CACHE)) + ITSELF
            return count_weights(self.ref) * dtype_of(self.ref).itemsize + cache * 2**30
        return self.ref.vllm_memory * total_memory(self.device)

    def use(self, ref: ModelRef) -> None:
        """Wake it, and have it go on with the weights of `ref`, if it has others."""
        if self.asleep:
            make_room(self.device, self._need(), spare=0)
            self._tell("wake")
            self.asleep = False
        if ref != self.ref:
            logger.info("vLLM goes on with %s", ref.path)
            self._tell("renew", model=ref.local)
            self.ref = ref
        hold(self)

    def give_back(self) -> None:
        """Sleep, where vLLM can: on GPUs. Its weights are in the host's memory then."""
        if self.device.type == "cpu" or self.process.poll() is not None:
            self.end()
        else:
            self._tell("sleep")
            self.asleep = True

    def _tell(self, do: str, **options: Any) -> None:
        """Send one request and wait until it is done. Raises what `_read_reply` raises."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the child died: `_read_reply` says how
            print(json.dumps({"do": do, **options}), file=self.process.stdin, flush=True)
        self._read_reply()

    def ask(self, do: str, table: pa.Table, options: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        """Send one request and yield the batches of the reply. Raises what `_read_reply` raises."""
        request, reply = (f"{self.folder.name}/{name}.arrow" for name in ("in", "out"))
        with pa.ipc.new_file(request, table.schema) as writer:
            writer.write_table(table)
        self._tell(do, **options, **{"in": request, "out": reply})
        with pa.memory_map(reply) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def _read_reply(self) -> None:
        """Wait for a reply. Raises BadInput where vLLM refused the request, Unavailable where the child broke."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
            raise Unavailable(f"the vLLM process for {self.ref.path} {how}; its last output:\n{self._last_words()}")
        try:
            reply = json.loads(line)
            refused = reply.get("refused")
        except (json.JSONDecodeError, AttributeError):
            raise Unavailable(
                f"the vLLM process for {self.ref.path} answered {line.strip()[:200]!r}, which is not a reply"
            ) from None
        if refused is not None:
            raise BadInput(f"{self.ref.path}: vLLM refuses a request: {refused}; change the recipe")

    def _last_words(self) -> str:
        lines = (Path(self.folder.name) / "log").read_text(errors="replace").rstrip().splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_WORDS:]) or "  (none)"

    def end(self) -> None:
        """End the process, which releases its memory."""
        drop(self)
        self.ended = True
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.folder.cleanup()
