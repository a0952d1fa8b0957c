"""The vLLM engine: a child process with an interpreter of its own, shard in, shard out (see vllm_child.py)."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import BadInput, Unavailable
from tasks.engines.base import Advance, Completion, Sampling, ignore_progress
from tasks.engines.remote import RemoteEngine
from tasks.models.reference import ModelRef, dtype_of
from tasks.running.progress import logger
from tasks.signals.base import Top

CHILD = Path(__file__).with_name("vllm_child.py")
LAST_WORDS = 15  # lines of what a child wrote before it ended
IDS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


@lru_cache(maxsize=4)
def vllm_version(python: str) -> str:
    """The version of vLLM that this interpreter has."""
    try:
        ended = subprocess.run([python, "-I", CHILD, "version"], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise BadInput(
            f"vllm_python: {python} is no Python that has vLLM ({words[-1] if words else error}); run `make vllm`, "
            "or give the path of one"
        ) from None
    return ended.stdout.strip()


class VllmEngine(RemoteEngine):
    """Completions repeat by their seeds (on one kind of machine), whatever their batch.

    The child starts with the first request, and again with the first one after it died.
    """

    def __init__(self, ref: ModelRef):
        super().__init__(ref)
        self.child: Child | None = None

    def generate(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, advance: Advance = ignore_progress
    ) -> list[Completion]:
        wanted = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature:
            wanted |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
        table = pa.table({"prompt": pa.array(prompts, IDS), "seed": pa.array(seeds, pa.int64())})
        stops, padding = self.side.stop_ids, [self.size, self.rows]
        made = self._ask("generate", table, sampling=wanted, stops=stops, padding=padding)
        completions = [Completion(row["ids"], row["logprobs"]) for batch in made for row in batch.to_pylist()]
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
        made = self._ask("stops", table, stops=self.side.stop_ids)
        return np.array([row for batch in made for row in batch["logprobs"].to_pylist()])

    def close(self) -> None:
        if self.child is not None:
            self.child.end()
            self.child = None

    def _ask(self, do: str, table: pa.Table, **options: Any) -> Iterator[pa.RecordBatch]:
        """What the child makes of the rows of a table, batch by batch, in order."""
        if not table.num_rows:
            return
        try:
            if self.child is None:
                self.child = Child(self.ref)
            yield from self.child.ask(do, table, options)
        except (BadInput, GeneratorExit):  # the reply is read, or nobody wants the rest of it
            raise
        except BaseException:  # a child that broke, or that somebody no longer waits for: its next reply would be the wrong one
            self.close()
            raise


def environment(device: str) -> dict[str, str]:
    """What a child is told of the machine: vLLM takes the first GPU that it sees, and so sees no other than `device`."""
    kind, _, index = device.partition(":")
    variables = dict(os.environ)
    if kind == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif index:
        seen = variables.get("CUDA_VISIBLE_DEVICES")  # of which torch counts its own
        variables["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(index)] if seen else index
    return variables


class Child:
    """The process and the folder that tables pass through."""

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
            )
        try:
            self._reply()
        except BaseException:  # also a time-out while it loads
            self.end()
            raise

    def ask(self, do: str, table: pa.Table, options: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        given, made = (f"{self.folder.name}/{name}.arrow" for name in ("in", "out"))
        with pa.ipc.new_file(given, table.schema) as writer:
            writer.write_table(table)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the reply says how
            print(json.dumps({"do": do, "in": given, "out": made, **options}), file=self.process.stdin, flush=True)
        self._reply()
        with pa.memory_map(made) as source:
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)

    def _reply(self) -> None:
        """Waits for a reply. Raises BadInput where vLLM refused the request, Unavailable where the child broke."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            how = f"was killed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
            raise Unavailable(f"the vLLM process for {self.path} {how}; its last words:\n{self._last_words()}")
        try:
            reply = json.loads(line)
            refused = reply.get("refused")
        except (json.JSONDecodeError, AttributeError):
            raise Unavailable(f"the vLLM process for {self.path} answered {line.strip()[:200]!r}, which is no reply") from None
        if refused is not None:
            raise BadInput(f"{self.path}: vLLM refuses a request: {refused}")

    def _last_words(self) -> str:
        lines = (Path(self.folder.name) / "log").read_text(errors="replace").rstrip().splitlines()
        return "\n".join(f"  {line}" for line in lines[-LAST_WORDS:]) or "  (none)"

    def end(self) -> None:
        """Ends the process, and with it everything that it holds."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.folder.cleanup()
