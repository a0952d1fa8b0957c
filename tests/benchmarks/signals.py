"""What each signal of SmolLM2 costs on disk, and how much of a divergence it loses: `python tests/benchmarks/signals.py`.

The student is the teacher with noise on its weights, so that the full divergence between the two is known at every token.
Texts are the teacher's own samples. Error: mean over tokens of |divergence from the signal - divergence from everything|.
"""

import argparse
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests")]

import fetch  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from configs.score import Score  # noqa: E402
from storage.schemas import SCORES  # noqa: E402
from storage.store import write_parquet  # noqa: E402
from tasks.engines.base import Sampling  # noqa: E402
from tasks.engines.transformers import TransformersEngine  # noqa: E402
from tasks.models.reference import ModelRef  # noqa: E402
from tasks.models.weights import hidden_states, logit_scale_of  # noqa: E402
from tasks.objectives.divergences import bucketed_jsd  # noqa: E402
from tasks.score import score_rows  # noqa: E402
from tasks.signals import make_signal  # noqa: E402
from tasks.signals.base import keep_likeliest  # noqa: E402
from tasks.signals.head import Head  # noqa: E402
from tasks.tokens.byte_laws import (  # noqa: E402
    REST,
    ByteLaws,
    boundary_laws,
)
from tasks.tokens.markers import ONE_TOKENIZER  # noqa: E402

TOPICS = (
    "the tides", "a lost key", "sorting a list in Python", "bread", "prime numbers", "the French Revolution", "bees", "a haiku",
    "how a bill becomes law", "photosynthesis", "regular expressions", "moving to another city", "the moon", "fractions",
    "a polite refusal by e-mail", "volcanoes",
)  # fmt: skip
NOISE = 0.06  # of each matrix's standard deviation
CASES = [
    *(Score(signal="topk", k=k) for k in (16, 64, 256)),
    *(Score(signal="topk", k=k, top_p=p) for k, p in ((64, 0.99), (256, 0.99), (256, 0.995), (1024, 0.995))),
    *(
        Score(signal="bytes", k=k, top_p=p)
        for k, p in ((257, 1.0), (64, 0.9999), (64, 0.999), (64, 0.9985), (32, 0.998), (32, 0.99))
    ),
    Score(signal="hidden", k=49_152),
    Score(signal="sampled"),
]


@torch.inference_mode()
def main(samples: int, tokens: int, temperature: float) -> None:
    fetch.main(["smollm2"])
    engine = TransformersEngine(ModelRef(str(fetch.MODELS / "smollm2"), "smollm2"), batch_size=64)
    prompts = [engine.side.render([{"role": "user", "content": f"Write about {topic}."}]) for topic in TOPICS] * samples
    sampled = engine.generate(prompts, list(range(len(prompts))), Sampling(tokens, temperature))
    completions = [completion.ids for completion in sampled]
    rows = [
        {"rollout_id": f"r{i}", "prompt_id": "p", "token_ids": ids, "text": "", "finish_reason": ""}
        for i, ids in enumerate(completions)
    ]
    total = sum(map(len, completions))
    # The full distributions, once: float32 logits from float32 hidden states, sequence by sequence.
    t_hidden = flat_hidden(engine, prompts, completions)
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.model.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn(parameter.shape, generator=generator) * parameter.std() * NOISE
    s_hidden = flat_hidden(engine, prompts, completions)
    student_head = engine.model.get_output_embeddings().weight.clone()
    engine = TransformersEngine(ModelRef(str(fetch.MODELS / "smollm2"), "smollm2"), batch_size=64)
    head = Head(engine.model.get_output_embeddings().weight.detach(), None, logit_scale_of(engine.model))
    noisy = Head(student_head, None, head.scale)

    table = Table(
        "signal",
        "k",
        "top_p",
        "events a token",
        "bytes a token",
        "of it the actual token",
        *(f"error, β = {b}" for b in (1, 0)),
    )
    prompts = {"p": ([{"role": "user", "content": "-"}], None)}
    actual = torch.tensor([i for ids in completions for i in ids])
    first = torch.tensor([j == 0 for ids in completions for j in range(len(ids))])
    base = None
    for case in CASES[::-1]:  # `sampled` first: what every file holds
        signal = make_signal(case.signal, case.k, case.top_p)
        size, events = stored_size(
            score_rows(rows, prompts, engine, signal, ONE_TOKENIZER, student=engine.side, teacher=engine.side), total
        )
        base = size if base is None else base
        error = errors(case, head, noisy, t_hidden, s_hidden, actual, first, ByteLaws(engine.side.vocabulary))
        cells = [case.signal, str(case.k), str(case.top_p), f"{events:.1f}", f"{size:.1f}", f"{base:.1f}"]
        table.add_row(*cells, *(f"{e:.5f} of {d:.3f}" for e, d in error))
    Console(width=140).print(f"{total} tokens of {len(prompts)} completions", table)


def flat_hidden(engine: TransformersEngine, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    parts = []
    for prompt, ids in zip(prompts, completions, strict=True):
        hidden = hidden_states(engine.model, torch.tensor([prompt + ids]))[0]
        parts.append(hidden[len(prompt) - 1 : -1])
    return torch.cat(parts)


def stored_size(scores: pa.Table, tokens: int) -> tuple[float, float]:
    """Bytes a token on disk, ids and strings left out, and events a token."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        kept = [name for name in SCORES.names if name not in ("rollout_id", "teacher", "token_ids", "status")]
        write_parquet(scores.select(kept), path)
        size = path.stat().st_size
    events = sum(len(column.combine_chunks().flatten()) for column in (scores["top_ids"], scores["law_classes"]))
    return size / tokens, events / tokens


def errors(
    case: Score, head: Head, noisy: Head, t_hidden, s_hidden, actual, first, laws: ByteLaws
) -> list[tuple[float, float]]:
    """(error, full divergence) for reverse and forward KL, in nats a token."""
    if case.signal == "sampled":
        return []
    found: dict[float, list[tuple[torch.Tensor, torch.Tensor]]] = {1.0: [], 0.0: []}
    for start in range(0, len(actual), 512):
        before = min(start, 1)
        window = slice(start - before, start + 512)
        t, s = (side.logits(hidden[window]).log_softmax(-1) for side, hidden in ((head, t_hidden), (noisy, s_hidden)))
        if case.signal == "hidden":
            stored = head.logits(t_hidden[window].half()).log_softmax(-1)[before:]
        if case.signal == "bytes":
            t, s = (boundary_laws(laws, side.exp(), actual[window], first[window]).clamp(min=1e-30).log() for side in (t, s))
        t, s = t[before:], s[before:]
        if case.signal == "hidden":
            ids, top, rest = None, stored, torch.full((len(t),), -torch.inf)
        else:
            ids, top, rest = padded(keep_likeliest(t, case.k, case.top_p, REST if case.signal == "bytes" else None))
        for beta, parts in found.items():
            nowhere = torch.full((len(t),), -torch.inf)
            full = bucketed_jsd(t, nowhere, s, beta)
            mine = s if ids is None else s.gather(1, ids).masked_fill(top.isneginf(), -torch.inf)
            parts.append((bucketed_jsd(top, rest, mine, beta) - full, full))
    return [tuple(float(torch.cat(column).abs().mean()) for column in zip(*parts, strict=True)) for parts in found.values()]


def padded(sparse: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`[positions, k]` ids and half-precision log-probs that sum to 1 with the rest, as alignment reads them back."""
    ids, top, counts, rest = sparse
    kept = top.half().float().masked_fill(torch.arange(top.shape[1]) >= counts[:, None], -torch.inf)
    total = torch.logaddexp(kept.logsumexp(-1), rest)
    return ids, kept - total[:, None], rest - total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=4, help="completions of each of 16 prompts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples that are scored")
    main(**vars(parser.parse_args()))
