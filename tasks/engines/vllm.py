"""The vLLM engine: a child process with an interpreter of its own, shard in, shard out (see vllm_child.py)."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import BadInput, Unavailable
from tasks.engines.base import Advance, Completion, Sampling, ignore_progress
from tasks.engines.names import CHILD
from tasks.engines.remote import RemoteEngine
from tasks.models.reference import ModelRef, dtype_of
from tasks.running.progress import logger
from tasks.signals.base import Top

LAST_WORDS = 15  # lines of a child's output that an error quotes
IDS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


class VllmEngine(RemoteEngine):
    """vLLM in a child process. On one kind of machine, equal seeds give equal completions in any batch.

    The child starts with the first request, and starts again with the first request after it died.
    """

    def __init__(self, ref: ModelRef):
        super().__init__(ref)
        self.child: Child | None = None

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

    def tops(self, prompts: list[list[int]], completions: list[list[int]], k: int) -> Iterator[Top]:
        table = pa.table({"prompt": pa.array(prompts, IDS), "completion": pa.array(completions, IDS)})
        for batch in self._ask("tops", table, k=k):
            for row in range(len(batch)):
                actual, ids, logprobs = (batch[name][row].values.to_numpy() for name in ("actual", "ids", "logprobs"))
                yield Top(actual, ids.reshape(len(actual), k), logprobs.reshape(len(actual), k))

    def stops(self, contexts: list[list[int]]) -> np.ndarray:
        table = pa.table({"prompt": pa.array(contexts, IDS)})
        batches = self._ask("stops", table, stops=self.side.stop_ids)
        return np.array([row for batch in batches for row in batch["logprobs"].to_pylist()])

    def close(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None

    def _ask(self, do: str, table: pa.Table, **options: Any) -> Iterator[pa.RecordBatch]:
        """Send the rows of a table to the child, and yield the batches of its reply in order."""
        if not table.num_rows:
            return
        try:
            if self.child is None:
                self.child = Child(self.ref)
            yield from self.child.ask(do, table, options)
        except (BadInput, GeneratorExit):  # the reply was read, or the caller needs no more of it
            raise
        except BaseException:  # the child broke, or its reply is not waited for: the next reply would belong to this request
            self.close()
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
    """The child process, and the folder through which tables pass to and from it."""

    def __init__(self, ref: ModelRef):
        self.path = ref.path
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
                [ref.vllm_python, "-I", CHILD, json.dumps(options)],
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

    def ask(self, do: str, table: pa.Table, options: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        """Send one request and yield the batches of the reply. Raises what `_read_reply` raises."""
        request, reply = (f"{self.folder.name}/{name}.arrow" for name in ("in", "out"))
        with pa.ipc.new_file(request, table.schema) as writer:
            writer.write_table(table)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the child died: `_read_reply` says how
            print(json.dumps({"do": do, "in": request, "out": reply, **options}), file=self.process.stdin, flush=True)
        self._read_reply()
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
            raise Unavailable(f"the vLLM process for {self.path} {how}; its last output:\n{self._last_words()}")
        try:
            reply = json.loads(line)
            refused = reply.get("refused")
        except (json.JSONDecodeError, AttributeError):
            raise Unavailable(
                f"the vLLM process for {self.path} answered {line.strip()[:200]!r}, which is not a reply"
            ) from None
        if refused is not None:
            raise BadInput(f"{self.path}: vLLM refuses a request: {refused}; change the recipe")

    def _last_words(self) -> str:
        lines = (Path(self.folder.name) / "log").read_text(errors="replace").rstrip().splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_WORDS:]) or "  (none)"

    def end(self) -> None:
        """End the process, which releases its memory."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.folder.cleanup()
