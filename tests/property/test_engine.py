"""The transformers engine (DESIGN.md §6): samples from seeds, and scores that a naive forward pass gives too."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SEEDS, full_logprobs, student_ref, teacher_ref, topk_scores, twin_ref
from transformers import AutoModelForCausalLM, FalconH1Config, Lfm2Config

from configs.models import Scratch
from configs.schema import Gates
from tasks.engines.base import Completion, Sampling, TokenScores
from tasks.engines.sampling import SeededSampler, gumbel
from tasks.engines.transformers import TransformersEngine, length_batches
from tasks.gates.round import engine_gates
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.scratch import train_tokenizer
from tasks.signals import make_signal
from tasks.signals.base import keep_likeliest

REFS = [student_ref, teacher_ref, twin_ref]
NAMES = ["plain", "several-stops", "padded-head"]
_engines: dict[str, TransformersEngine] = {}


def engine(ref: ModelRef, **options: int) -> TransformersEngine:
    """An engine for the toy model; one without options is kept."""
    if options:
        return TransformersEngine(ref, **options)
    return _engines.setdefault(ref.path, TransformersEngine(ref))


def random_ids(rng: np.random.Generator, rows: int, low: int, high: int) -> list[list[int]]:
    return [rng.integers(6, 280, rng.integers(low, high)).tolist() for _ in range(rows)]


# -- noise and sampling ----------------------------------------------------------------------------------------------------


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)), over ids, over positions and over seeds; mean γ, variance π²/6."""
    for noise in (
        gumbel(torch.tensor([3]), 5, 20_000)[0],
        torch.cat([gumbel(torch.tensor([3]), position, 2)[0, 1:] for position in range(4000)]),
        gumbel(torch.arange(20_000) * 7919 + 2**61, 0, 2)[:, 1],
    ):
        x = np.sort(noise.double().numpy())
        distance = abs(np.exp(-np.exp(-x)) - (np.arange(len(x)) + 0.5) / len(x)).max()
        assert distance < 2.0 / math.sqrt(len(x))  # p ≈ 0.0007
        assert abs(x.mean() - 0.5772) < 5 * 1.2825 / math.sqrt(len(x))
        assert x.var() == pytest.approx(math.pi**2 / 6, rel=0.1)


def test_gumbel_noise_is_independent_across_neighbours() -> None:
    """Neighbouring ids, positions and seeds (also those that differ in their upper half alone) are uncorrelated."""
    base = gumbel(torch.tensor([11]), 4, 20_001)[0]
    pairs = [
        (base[1:], base[:-1]),
        (base, gumbel(torch.tensor([11]), 5, 20_001)[0]),
        (base, gumbel(torch.tensor([12]), 4, 20_001)[0]),
        (base, gumbel(torch.tensor([11 + 2**40]), 4, 20_001)[0]),
    ]
    for a, b in pairs:
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(len(a))


def test_gumbel_noise_is_finite() -> None:
    """However often it is drawn: a single infinite value would be chosen whatever the model says."""
    for seed in (6, 39, *range(2)):  # 6 and 39 draw 24 one-bits
        noise = gumbel(torch.tensor([seed]), 0, 2**20)
        assert torch.isfinite(noise).all()
        assert noise.max() < 20


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=5), st.integers(0, 1000), st.integers(1, 50))
def test_gumbel_noise_is_a_function_of_its_arguments(seeds: list[int], position: int, size: int) -> None:
    """A row's noise does not depend on the other rows, nor an id's on the size of the vocabulary."""
    together = gumbel(torch.tensor(seeds), position, size + 7)
    for row, seed in enumerate(seeds):
        assert torch.equal(gumbel(torch.tensor([seed]), position, size)[0], together[row, :size])


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations above its mean, over events expected at least five times."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    counts, expected = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, temperature=0.5), Sampling(1, temperature=2.0), Sampling(1, top_k=5), Sampling(1, top_p=0.7)],
    ids=["plain", "cold", "hot", "top-k", "top-p"],
)
def test_samples_have_the_right_frequencies(sampling: Sampling) -> None:
    """Over many seeds the chosen ids follow softmax(logits / temperature), cut as top_k and top_p say."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=40) * 1.5).float()
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = len(p)
    if sampling.top_k:
        kept = sampling.top_k
    if sampling.top_p < 1:
        kept = int((p[order].cumsum(0) < sampling.top_p).sum()) + 1
    p[order[kept:]] = 0
    p /= p.sum()
    rows, size = 20_000, 40
    sampler = SeededSampler(torch.arange(rows) * 1_000_003 + 17, sampling, size)
    padded = torch.cat([logits, torch.full((3,), 50.0)])  # rows of the head that are no ids
    chosen = sampler(torch.zeros(rows, 1, dtype=torch.long), padded.repeat(rows, 1)).argmax(-1)
    assert abs(chi_square(np.bincount(chosen, minlength=size), p.numpy())) < 4.5
    assert torch.allclose(sampler.logprobs[0].double(), p.log()[chosen], atol=1e-5)


def test_greedy_is_the_argmax() -> None:
    """Temperature 0 takes the most likely token at every step; its log-probs are those at temperature 1."""
    grader, text_side = engine(teacher_ref()), side(teacher_ref())
    prompts = random_ids(np.random.default_rng(1), 6, 2, 9)
    for prompt, completion in zip(prompts, grader.generate(prompts, [0] * 6, Sampling(8, temperature=0)), strict=True):
        ids: list[int] = []
        while len(ids) < 8 and not (ids and ids[-1] in text_side.stop_ids):
            logprobs = full_logprobs(grader.model, prompt + ids, grader.size)[-1]
            ids.append(int(logprobs.argmax()))
            assert completion.logprobs[len(ids) - 1] == pytest.approx(float(logprobs.max()), abs=1e-4)
        assert completion.ids == ids


def test_a_completion_does_not_depend_on_its_batch() -> None:
    """The same ids alone, among others, in another order, and with other batch sizes."""
    rng = np.random.default_rng(2)
    prompts, seeds = random_ids(rng, 9, 1, 12), [int(seed) for seed in rng.integers(0, 2**62, 9)]
    sampling = Sampling(10)
    together = engine(student_ref()).generate(prompts, seeds, sampling)
    order = rng.permutation(9)
    shuffled = engine(student_ref(), batch_size=4).generate([prompts[i] for i in order], [seeds[i] for i in order], sampling)
    alone = [engine(student_ref()).generate([prompts[i]], [seeds[i]], sampling)[0] for i in range(9)]
    for i in range(9):
        same = [together[i], shuffled[list(order).index(i)], alone[i]]
        assert len({tuple(completion.ids) for completion in same}) == 1
        assert same[0].logprobs == pytest.approx(same[1].logprobs, abs=1e-4)
        assert same[0].logprobs == pytest.approx(same[2].logprobs, abs=1e-4)
    other = engine(student_ref()).generate(prompts, [seed + 1 for seed in seeds], sampling)
    assert [c.ids for c in other] != [c.ids for c in together]  # the seed does count


@pytest.mark.parametrize("sampling", [Sampling(32, 1, 0.9), Sampling(32, 1, 1, 20), Sampling(32, 0.7, 0.9, 20)], ids=str)
def test_an_engine_in_half_precision_is_not_taken_for_another(sampling: Sampling) -> None:
    """bfloat16 rounds some tokens into what top_p and top_k keep; at another cut, or none, the gate still says so."""
    half = TransformersEngine(replace(student_ref(), dtype="bfloat16"))
    prompts = random_ids(np.random.default_rng(6), 32, 2, 9)

    def gates(drawn: Sampling) -> dict[str, bool | None]:
        made = half.generate(prompts, list(range(32)), drawn)
        columns = {"prompt_token_ids": prompts, "token_ids": [c.ids for c in made]}
        table = pa.table(columns | {"logprobs": pa.array([c.logprobs for c in made], pa.list_(pa.float32()))})
        return {gate.name: gate.ok for gate in engine_gates(student_ref(), table, sampling, Gates())}

    assert gates(sampling) == {"engine, mean": True, "engine, largest": True}
    assert gates(Sampling(32))["engine, mean"] is False


def test_progress_is_told_of_every_completion_and_batches_are_of_like_lengths(monkeypatch) -> None:
    """A shard of short and long prompts is padded by next to nothing, whatever its order."""
    loaded, told, widths = engine(student_ref(), batch_size=4), [], []
    real = loaded.model.generate

    def seen(ids, **options):
        widths.append(ids.shape[1])
        return real(ids, **options)

    monkeypatch.setattr(loaded.model, "generate", seen)
    loaded.generate([[9] * (2 + 10 * (i % 2)) for i in range(10)], list(range(10)), Sampling(2), told.append)
    assert told == [4, 4, 2]
    assert widths == [2, 12, 12]


def sampled(ref: ModelRef, rows: int = 150, new_tokens: int = 12) -> tuple[list[list[int]], list[Completion]]:
    prompts = random_ids(np.random.default_rng(3), rows, 1, 8)
    return prompts, engine(ref).generate(prompts, list(range(rows)), Sampling(new_tokens))


@pytest.mark.parametrize("ref", REFS, ids=NAMES)
def test_behaviour_logprobs_are_a_plain_forward_pass(ref) -> None:
    """Of every sampled token; ids that are no ids are never sampled; a completion ends with its first stop or the limit."""
    grader, text_side = engine(ref()), side(ref())
    stopped = 0
    for prompt, completion in zip(*sampled(ref()), strict=True):
        full = full_logprobs(grader.model, prompt + completion.ids, grader.size)
        wanted = [float(full[len(prompt) + t - 1, i]) for t, i in enumerate(completion.ids)]
        assert completion.logprobs == pytest.approx(wanted, abs=2e-4)
        assert max(completion.ids) < len(text_side.beta.values)
        assert not set(completion.ids[:-1]) & set(text_side.stop_ids)
        assert completion.ids[-1] in text_side.stop_ids or len(completion.ids) == 12
        stopped += completion.ids[-1] in text_side.stop_ids
    assert stopped > 0


def test_sampled_tokens_follow_the_model() -> None:
    """First tokens of many seeds against the model's own probabilities, through `generate`."""
    grader = engine(student_ref(), batch_size=4000)
    prompt = [1, 4, 50, 60, 2, 5]
    completions = grader.generate([prompt] * 4000, [seed * 1_000_003 for seed in range(4000)], Sampling(1))
    p = full_logprobs(grader.model, prompt, grader.size)[-1].exp().numpy()
    counts = np.bincount([completion.ids[0] for completion in completions], minlength=grader.size)
    assert abs(chi_square(counts, p)) < 4.5


def test_a_prompt_that_begins_with_padding_is_not_one_that_is_padded() -> None:
    """The same ids in a batch, and other prompts: one starts with the id that the other is padded with."""
    loaded, rng = engine(student_ref()), np.random.default_rng(5)
    (short,) = random_ids(rng, 1, 8, 9)
    prompts, sampling = [[loaded.side.pad_id, *short], short], Sampling(6)
    together = loaded.generate(prompts, [1, 2], sampling)
    for prompt, seed, other in zip(prompts, [1, 2], together, strict=True):
        (alone,) = loaded.generate([prompt], [seed], sampling)
        assert alone.ids == other.ids
        assert alone.logprobs == pytest.approx(other.logprobs, abs=1e-4)


HYBRIDS = {
    "LFM2": lambda **shape: Lfm2Config(**shape, num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "Falcon-H1": lambda **shape: FalconH1Config(
        **shape, num_hidden_layers=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_samples_of_one_prompt_where_layers_keep_a_state(tmp_path, family: str) -> None:
    """Models of attention and recurrent layers: what a sample is drawn from is that of the sample alone."""
    tokenizer = train_tokenizer(Scratch(vocab_size=300), ["hello world spelled backward olleh dlrow"] * 5)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HYBRIDS[family](**shape, num_key_value_heads=2, eos_token_id=2, bos_token_id=1))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = TransformersEngine(ModelRef(str(tmp_path), family, device="cpu"))
    prompts, seeds = [[1, 4, 50, 60, 70, 5]] * 3 + [[1, 4, 50, 80, 5]] * 2, [1, 2, 3, 4, 5]
    alone = [loaded.generate([prompt], [seed], Sampling(8))[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    together = loaded.generate(prompts, seeds, Sampling(8))
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]
    for ours, other in zip(together, alone, strict=True):
        assert ours.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("make", REFS, ids=NAMES)
def test_samples_of_one_prompt_share_its_computation(make, monkeypatch) -> None:
    """Each prompt runs once, whatever its padding; completions are those of its samples drawn one by one."""
    loaded, rng = engine(make()), np.random.default_rng(3)
    prompts = [prompt for prompt in random_ids(rng, 4, 5, 20) for _ in range(3)]
    seeds, sampling = list(range(len(prompts))), Sampling(8)
    alone = [loaded.generate([prompt], [seed], sampling)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    computed = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, given, __: computed.append(given[0].shape))
    together = loaded.generate(prompts, seeds, sampling)
    hook.remove()
    assert computed[0] == (4, max(map(len, prompts)) - 1)
    assert set(computed[1:]) == {(12, 1)}
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# -- scores ----------------------------------------------------------------------------------------------------------------


def naive_scores(model, prompt: list[int], ids: list[int], stops: list[int], size: int, k: int, top_p: float) -> TokenScores:
    full = full_logprobs(model, prompt + ids, size).numpy()
    logprobs, top_ids, top, counts, rest = [], [], [], [], []
    for t, i in enumerate(ids):
        row = full[len(prompt) + t - 1]
        logprobs.append(np.logaddexp.reduce(row[stops]) if i in stops else row[i])
        best = sorted(range(size), key=lambda j: -row[j])[:k]
        mass, kept = 0.0, 0
        while kept < len(best) and (kept == 0 or mass < top_p):
            mass += np.exp(row[best[kept]])
            kept += 1
        top_ids += best[:kept]
        top += [row[j] for j in best[:kept]]
        counts.append(kept)
        outside = [row[j] for j in range(size) if j not in set(best[:kept])]
        rest.append(np.logaddexp.reduce(outside) if outside else -np.inf)
    return topk_scores(*(np.array(column) for column in (logprobs, top_ids, top, counts, rest)))


@pytest.mark.parametrize("ref", REFS, ids=NAMES)
@pytest.mark.parametrize(("k", "top_p"), [(1, 1.0), (8, 1.0), (20, 0.6), (1000, 2.0)], ids=["1", "8", "adaptive", "all"])
def test_scores_are_a_naive_log_softmax(ref, k: int, top_p: float) -> None:
    """Actual tokens, top ids, adaptive counts and rest mass; a stop is the event, summed over all stop ids.

    (top_p above 1 is never reached, so the last case keeps the whole vocabulary, and nothing is left for the rest.)"""
    text_side = side(ref())
    rng = np.random.default_rng(4)
    prompts = random_ids(rng, 7, 1, 10)
    completions = [
        [*ids, int(rng.choice(text_side.stop_ids))] if r % 2 else ids for r, ids in enumerate(random_ids(rng, 7, 1, 9))
    ]
    grader = engine(ref(), batch_tokens=40)
    scored = grader.score(prompts, completions, make_signal(k=k, top_p=top_p))
    for prompt, ids, got in zip(prompts, completions, scored, strict=True):
        wanted = naive_scores(grader.model, prompt, ids, text_side.stop_ids, grader.size, k, top_p)
        assert got.columns["top_counts"].tolist() == wanted.columns["top_counts"].tolist()
        assert got.columns["top_ids"].tolist() == wanted.columns["top_ids"].tolist()
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert got.columns["top_logprobs"].astype(float) == pytest.approx(
            wanted.columns["top_logprobs"], abs=1e-4, rel=2**-11 * 1.01
        )
        if k == 1000:
            assert set(got.columns["top_counts"]) == {grader.size}
            assert np.isneginf(got.columns["rest"]).all()
        else:
            assert got.columns["rest"] == pytest.approx(wanted.columns["rest"], abs=1e-3)
        assert (got.columns["top_logprobs"].dtype, got.columns["rest"].dtype) == (np.float16, np.float32)


def test_a_small_rest_does_not_drown() -> None:
    """The rest is summed itself: mass of 1e-9 outside the top ids is seen although 1 - (1 - 1e-9) is 0 in float32."""
    logits = torch.full((1, 300), -25.0)
    logits[0, 3] = 0.0
    _, _, counts, rest = keep_likeliest(logits.log_softmax(-1), k=1, top_p=1.0)
    assert counts.tolist() == [1]
    assert float(rest[0]) == pytest.approx(math.log(299) - 25, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.integers(1, 200))
def test_scores_do_not_depend_on_the_batch(seed: int, budget: int) -> None:
    """Each row's are those of the row alone, in the caller's order, whatever the padding."""
    rng = np.random.default_rng(seed)
    prompts, completions = random_ids(rng, 5, 1, 20), random_ids(rng, 5, 1, 20)
    grader = engine(teacher_ref())
    grader.batch_tokens = budget
    together = grader.score(prompts, completions, make_signal(k=4))
    for prompt, ids, got in zip(prompts, completions, together, strict=True):
        (alone,) = grader.score([prompt], [ids], make_signal(k=4))
        assert got.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert got.columns["rest"] == pytest.approx(alone.columns["rest"], abs=1e-3)
        assert got.columns["top_ids"].tolist() == alone.columns["top_ids"].tolist()


def test_a_constant_on_all_logits_changes_no_score() -> None:
    """Adding the same vector to all rows of the head adds a constant at each position (property 4)."""
    prompts, completions = random_ids(np.random.default_rng(5), 4, 2, 9), random_ids(np.random.default_rng(6), 4, 2, 9)
    grader = TransformersEngine(teacher_ref())
    before = grader.score(prompts, completions, make_signal(k=6))
    head = grader.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(
        head.weight + torch.randn(head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    )
    for old, new in zip(before, grader.score(prompts, completions, make_signal(k=6)), strict=True):
        assert new.logprobs == pytest.approx(old.logprobs, abs=1e-3)
        assert new.columns["top_ids"].tolist() == old.columns["top_ids"].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_by_length(lengths: list[int], budget: int) -> None:
    """Every row once; no batch is larger than the budget with its padding, but for a row that is so alone."""
    batches = length_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
