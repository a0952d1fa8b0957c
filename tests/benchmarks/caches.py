"""What a cache of SmolLM2's texts takes on disk, and how much of a divergence it loses: `python tests/benchmarks/caches.py`.

Texts, teacher and student are those of signals.py. Sizes are of the files of texts, with everything in them. Error: mean over
tokens of |divergence from the cache - divergence from everything|.
"""

import argparse
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from signals import NOISE, TOPICS, flat_hidden  # noqa: E402

from storage.caches import CacheWriter  # noqa: E402
from storage.schemas import CACHED_TEXTS  # noqa: E402
from tasks.caches.compact import compact, cut  # noqa: E402
from tasks.engines.base import Sampling  # noqa: E402
from tasks.engines.transformers import TransformersEngine  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.models.weights import logit_scale_of  # noqa: E402
from tasks.objectives.divergences import bucketed_jsd  # noqa: E402
from tasks.score import score_rows  # noqa: E402
from tasks.signals import make_signal  # noqa: E402
from tasks.signals.head import Head  # noqa: E402
from tasks.tokens.byte_laws import ByteLaws, boundary_laws  # noqa: E402
from tasks.tokens.markers import ONE_TOKENIZER  # noqa: E402
from tasks.tokens.ragged import flat  # noqa: E402
from tasks.tokens.token_bytes import split_completion  # noqa: E402

CASES = [(top_p, error) for top_p in (0.998, 0.9985, 0.999) for error in (0.0, 0.001)]
BETAS = (1.0, 0.0)


@torch.inference_mode()
def main(samples: int, tokens: int) -> None:
    fetch.main(["smollm2"])
    ref = ModelRef(str(fetch.MODELS / "smollm2"), "smollm2")
    engine = TransformersEngine(ref, batch_size=64)
    side = engine.side
    prompts = [side.render([{"role": "user", "content": f"Write about {topic}."}]) for topic in TOPICS] * samples
    completions = [c.ids for c in engine.generate(prompts, list(range(len(prompts))), Sampling(tokens))]
    texts = [split_completion(side.beta, ids, set(side.stop_ids))[0] for ids in completions]
    rows = [
        {"rollout_id": f"r{i}", "prompt_id": f"{i % len(TOPICS):016x}", "token_ids": ids, "text": "", "finish_reason": ""}
        for i, ids in enumerate(completions)
    ]
    asked = {f"{i:016x}": ([{"role": "user", "content": f"Write about {topic}."}], None) for i, topic in enumerate(TOPICS)}
    whole = score_rows(rows, asked, engine, make_signal("bytes", 257, 1.0), ONE_TOKENIZER, student=side, teacher=side)
    table = pa.table(
        {
            "prompt_id": [row["prompt_id"] for row in rows],
            "source": ["teacher"] * len(rows),
            "text": texts,
            "finish_reason": ["stop" if ids[-1] in side.stop_ids else "length" for ids in completions],
            **{name: whole[name] for name in CACHED_TEXTS.names if name in whole.column_names},
        }
    )
    laws = full_laws(engine, prompts, completions)
    shown = Table("top_p", "rounding", "events a token", "bytes a token", *(f"error, β = {beta:.0f}" for beta in BETAS))
    for top_p, error in CASES:
        stored, _ = compact(cut(table, top_p), error)
        with tempfile.TemporaryDirectory() as folder:
            writer = CacheWriter(Path(folder))
            writer.add_texts(stored)
        counts, (ids, kept, rest) = flat(stored["law_counts"])[0], padded(stored)
        errors = [errors_of(*laws, ids, kept, rest, beta) for beta in BETAS]
        cells = (f"{top_p}", f"{error}", f"{counts.mean():.1f}", f"{writer.texts_bytes / len(counts):.1f}")
        shown.add_row(*cells, *(f"{gap:.5f} of {full:.3f}" for gap, full in errors))
    Console(width=120).print(f"{len(laws[0])} tokens of {len(rows)} completions", shown)


def full_laws(engine: TransformersEngine, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """Log-probs of the teacher's next bytes and of its noisy twin's, `[tokens, 258]`."""
    actual = torch.tensor([i for ids in completions for i in ids])
    first = torch.tensor([j == 0 for ids in completions for j in range(len(ids))])
    byte_laws, generator, found = ByteLaws(engine.side.vocabulary), torch.Generator().manual_seed(0), []
    for noise in (0.0, NOISE):
        for parameter in engine.model.parameters() if noise else ():
            if parameter.ndim > 1:
                parameter.data += torch.randn(parameter.shape, generator=generator) * parameter.std() * noise
        head = Head(engine.model.get_output_embeddings().weight.detach(), None, logit_scale_of(engine.model))
        hidden, parts = flat_hidden(engine, prompts, completions), []
        for start in range(0, len(actual), 512):
            before = min(start, 1)
            window = slice(start - before, start + 512)
            mass = head.logits(hidden[window]).softmax(-1)
            parts.append(boundary_laws(byte_laws, mass, actual[window], first[window])[before:].clamp(min=1e-30).log())
        found.append(torch.cat(parts))
    return found


def padded(stored: pa.Table) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[tokens, k]` classes and log-probs that sum to 1 with the rest, as alignment reads them."""
    counts, classes, logprobs = (flat(stored[f"law_{name}"])[0] for name in ("counts", "classes", "logprobs"))
    rest = torch.tensor(flat(stored["rest"])[0])
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = len(counts), int(counts.max())
    ids, kept = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -torch.inf)
    ids[owner, place], kept[owner, place] = torch.tensor(classes.astype(np.int64)), torch.tensor(logprobs.astype(np.float32))
    total = torch.logaddexp(kept.logsumexp(-1), rest)
    return ids, kept - total[:, None], rest - total


def errors_of(
    t: torch.Tensor, s: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor, beta: float
) -> tuple[float, float]:
    full = bucketed_jsd(t, torch.full((len(t),), -torch.inf), s, beta)
    mine = bucketed_jsd(kept, rest, s.gather(1, ids).masked_fill(kept.isneginf(), -torch.inf), beta)
    return float((mine - full).abs().mean()), float(full.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4, help="completions of each of 16 prompts")
    parser.add_argument("--tokens", type=int, default=96)
    main(**vars(parser.parse_args()))
