"""The teacher's stored signal as objectives read it, and the head that hidden states need for that."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

from configs.schema import Recipe, Score
from storage.artifacts import Artifact, local_folder
from storage.store import Run
from tasks.engines.base import Engine, Signal
from tasks.engines.choose import engine
from tasks.engines.events import Sparse, boundary_laws, likeliest
from tasks.engines.transformers import SCORE_CHUNK, TransformersEngine
from tasks.models import ModelRef, device_of, finish_of, finished
from tasks.progress import logger
from tasks.ragged import add_up, expand, flat, offsets_of, within
from tasks.score import COLUMNS
from tasks.tokens.byte_laws import REST, ByteLaws
from tasks.tokens.vocabulary import Vocabulary

CODE = 1
FILE = "head.safetensors"


@dataclass(frozen=True)
class Head:
    weight: torch.Tensor  # [V, width], without padded rows
    bias: torch.Tensor | None
    finish: tuple[float, float]  # see `finish_of`

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `[positions, V]` of float16 hidden states `[positions, width]`."""
        logits = functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias)
        return finished(logits.float(), self.finish).log_softmax(-1)


@task(name="head", cache_policy=NO_CACHE)
def keep_head(recipe: Recipe, teacher: ModelRef) -> Artifact:
    """`teacher/`: the head's weights as safetensors, for `score.signal = "hidden"`."""
    run = Run(recipe.root, recipe.name)
    inputs = {"stage": "head", "code": CODE, "teacher": teacher.identity}

    def make(folder: Path) -> dict[str, int]:
        head = head_of(engine(teacher, recipe.rollout.batch_size, recipe.score.batch_tokens))
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        (folder / "teacher").mkdir()
        contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "teacher" / FILE, {"finish": json.dumps(head.finish)})
        return {"teacher": len(head.weight)}

    return run.build_files({"teacher": "teacher"}, inputs, make, logger.info)["teacher"]


def head_of(loaded: Engine) -> Head:
    """The head of a model that is loaded in this process."""
    assert isinstance(loaded, TransformersEngine), "the recipe is refused before"
    layer = loaded.model.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return Head(
        layer.weight[: loaded.size].detach(), None if bias is None else bias[: loaded.size].detach(), finish_of(loaded.model)
    )


def read_head(artifact: Artifact, teacher: ModelRef) -> Head:
    """The head that `keep_head` kept, on the teacher's device."""
    with safe_open(Path(local_folder(artifact)) / FILE, "pt", device=str(device_of(teacher))) as file:
        bias = file.get_tensor("bias") if "bias" in file.keys() else None  # noqa: SIM118 (not a dict)
        factor, cap = json.loads(file.metadata()["finish"])
        return Head(file.get_tensor("weight"), bias, (factor, cap))


def read_signal(
    scores: pa.Table,
    offsets: np.ndarray,
    keep: np.ndarray,
    config: Score,
    laws: bool,
    vocabulary: Vocabulary,
    head: Head | None,
) -> dict[str, Any]:
    """The signal fields of a Pairing at the teacher tokens to `keep`, bool.

    `offsets` are the rows' bounds in the kept tokens. With `laws` the laws of bytes are given where the signal has them
    by itself (`bytes`, `hidden`), else the likeliest ids.
    """
    tokens = np.flatnonzero(keep)
    fields: dict[str, Any] = nothing(len(tokens))
    fields["teacher_logprobs"] = flat(scores["logprobs"])[0].astype(np.float64)[tokens]
    if config.signal == "hidden":
        assert head is not None
        width = head.weight.shape[1]
        hidden = torch.from_numpy(flat(scores["hidden"])[0].reshape(-1, width)[tokens])
        ids, logprobs, counts, rest = _of_hidden(
            hidden, offsets, flat(scores["token_ids"])[0][tokens], config, laws, vocabulary, head
        )
    elif config.signal in COLUMNS:
        ids, logprobs, counts, rest = _of_columns(scores, tokens, config.signal)
    else:
        return fields
    # Half-precision log-probs do not quite sum to 1: what is missing is spread in proportion.
    owner = np.repeat(np.arange(len(tokens)), counts)
    total = np.log(np.bincount(owner, np.exp(logprobs), len(tokens)) + np.exp(rest))
    logprobs, rest = logprobs - total[owner], rest - total
    if config.signal == "bytes" or (laws and config.signal == "hidden"):
        everything = np.concatenate([owner, np.arange(len(tokens))])
        classes = np.concatenate([ids, np.full(len(tokens), REST)])
        fields["laws"] = add_up(everything, classes, np.exp(np.concatenate([logprobs, rest])), len(tokens))
        return fields
    return fields | {"top_ids": ids, "top_logprobs": logprobs, "top_offsets": offsets_of(counts), "rest": rest}


def nothing(tokens: int) -> dict[str, Any]:
    """The signal fields of a Pairing for tokens of which nothing is known."""
    return {
        "teacher_logprobs": np.full(tokens, np.nan),
        "top_ids": np.zeros(0, np.int64),
        "top_logprobs": np.zeros(0),
        "top_offsets": np.zeros(tokens + 1, np.int64),
        "rest": np.zeros(tokens),
    }


def _of_columns(scores: pa.Table, tokens: np.ndarray, signal: str) -> tuple[np.ndarray, ...]:
    ids, logprobs, counts = (flat(scores[name])[0] for name in COLUMNS[signal])
    bounds = offsets_of(counts.astype(np.int64))
    entries, _ = expand(bounds[tokens], bounds[tokens + 1])
    rest = flat(scores["rest"])[0].astype(np.float64)[tokens]
    return ids[entries].astype(np.int64), logprobs[entries].astype(np.float64), np.diff(bounds)[tokens], rest


@torch.inference_mode()
def _of_hidden(
    hidden: torch.Tensor,
    offsets: np.ndarray,
    actual: np.ndarray,
    config: Score,
    laws: bool,
    vocabulary: Vocabulary,
    head: Head,
) -> tuple[np.ndarray, ...]:
    """From the full distributions, as `topk` (or, with `laws`, `bytes`) would have stored it, but unrounded."""
    signal, device = Signal("bytes" if laws else "topk", config.k, config.top_p), head.weight.device
    first = torch.from_numpy(within(offsets) == 0).to(device)
    ids = torch.from_numpy(actual.astype(np.int64)).to(device)
    module = ByteLaws(vocabulary).to(device) if laws else None
    chunks: list[Sparse] = []
    for start in range(0, len(ids), SCORE_CHUNK):
        before = min(start, 1)  # a law also reads the distribution before the one that chose the token
        window = slice(start - before, start + SCORE_CHUNK)
        logprobs = head.logprobs(hidden[window])
        if module is not None:
            law = boundary_laws(module, logprobs, ids[window], first[window]).log()
            chunks.append(likeliest(law[before:], signal, events=REST))
        else:
            chunks.append(likeliest(logprobs[before:], signal))
    if not chunks:
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64), np.zeros(0)
    columns = [torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True)]
    return columns[0], columns[1].astype(np.float64), columns[2], columns[3].astype(np.float64)
