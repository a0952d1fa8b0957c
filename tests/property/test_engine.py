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

from configs.gates import Gates
from configs.models import Scratch
from tasks.engines import decoding
from tasks.engines.base import Completion, Sampling, TokenScores
from tasks.engines.sampling import Sampler, uniforms, warpers
from tasks.engines.transformers import TransformersEngine
from tasks.gates import agreement
from tasks.gates.agreement import EDGE, may_keep
from tasks.gates.round import engine_gates
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.scratch import train_tokenizer
from tasks.signals import make_signal
from tasks.signals.base import keep_likeliest
from tasks.tokens.ragged import length_batches

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


def split_mix(state: int) -> int:
    """SplitMix64's next number, in Python's integers (Steele, Lea, Flood, OOPSLA 2014, figure 17)."""
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=4), st.integers(1, 40))
def test_uniforms_are_a_function_of_seed_and_position(seeds: list[int], positions: int) -> None:
    """Those of SplitMix64 in Python's integers, whatever the other rows and however many positions."""
    assert split_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first number of the published generator from state 0
    drawn = uniforms(seeds, positions)
    for row, seed in enumerate(seeds):
        for position in range(positions):
            bits = split_mix((split_mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 12
            assert drawn[row, position] == (2 * bits + 1) / 2**53
    assert np.array_equal(uniforms(seeds, positions + 3)[:, :positions], drawn)


def test_uniforms_are_uniform_and_independent() -> None:
    """Over positions, over neighbouring seeds and over far ones: 64 × 64 cells of neighbours, ends of the interval, moments."""
    tables = [
        uniforms([5], 80_000),
        uniforms(range(80_000), 1).T,
        uniforms([7919 * i + 2**61 for i in range(80_000)], 3)[:, 2:].T,
        uniforms([i << 40 for i in range(80_000)], 1).T,
        uniforms(range(400), 200).reshape(1, -1),
        uniforms(range(400), 200).T.reshape(1, -1),
    ]
    for (u,) in tables:
        assert 0 < u.min() < 1e-4
        assert 1 - 1e-4 < u.max() < 1
        assert abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max() < 2.0 / math.sqrt(len(u))  # Kolmogorov-Smirnov
        for gap in (1, 2, 200):
            cells = (u[gap:] * 64).astype(int) * 64 + (u[:-gap] * 64).astype(int)
            assert abs(chi_square(np.bincount(cells, minlength=4096), np.full(4096, 1 / 4096))) < 4.5
        low = ((u * 2**52).astype(np.int64) & 255).astype(int)  # the last bits, too
        assert abs(chi_square(np.bincount(low, minlength=256), np.full(256, 1 / 256))) < 4.5


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic in standard deviations above its mean, over events expected at least five times."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    counts, expected = np.append(counts[often], counts[~often].sum()), np.append(expected[often], expected[~often].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def exact_law(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """softmax(logits / temperature), cut as top_k and then top_p say, in float64."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p < 1:
        p[order[int((np.cumsum(p[order]) < sampling.top_p).sum()) + 1 :]] = 0
    return p / p.sum()


def draw(logits: np.ndarray, seeds: list[int] | range, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """One id per seed, all from the same logits, and its log-prob."""
    drawn = []
    for start in range(0, len(seeds), 100):
        part = seeds[start : start + 100]
        drawn.append(Sampler(part, sampling, torch.device("cpu")).draw(torch.from_numpy(logits).repeat(len(part), 1), 0))
    ids, logprobs = (torch.cat(column).numpy() for column in zip(*drawn, strict=True))
    return ids, logprobs


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1), Sampling(1, temperature=0.5), Sampling(1, temperature=2.0), Sampling(1, top_k=5), Sampling(1, top_p=0.7),
        Sampling(1, temperature=0.8, top_k=20, top_p=0.9),
    ],
    ids=["plain", "cold", "hot", "top-k", "top-p", "all"],
)  # fmt: skip
def test_samples_have_the_right_frequencies(sampling: Sampling) -> None:
    """Over many seeds the chosen ids follow the law, and their log-probs are its."""
    logits = np.random.default_rng(0).normal(size=700).astype(np.float32) * 1.5
    p = exact_law(logits.astype(np.float64), sampling)
    ids, logprobs = draw(logits, [i * 1_000_003 + 17 for i in range(20_000)], sampling)
    assert abs(chi_square(np.bincount(ids, minlength=700), p)) < 4.5
    assert logprobs == pytest.approx(np.log(p[ids]), abs=1e-5)


def test_a_vocabulary_of_262k_is_sampled_without_bias() -> None:
    """The inverse at chosen points of (0, 1) against float64: within 1e-9 of its own interval, in the farthest tail too.

    Float32 sums of 262,144 masses are wrong by more than 1e-3 of the smallest masses' own size.
    """
    size, rng = 262_144, np.random.default_rng(1)
    logits = (rng.normal(size=size) * 2.5).astype(np.float32)
    logits[rng.integers(0, size, 20)] += 12
    p = exact_law(logits.astype(np.float64), Sampling(1))
    ends = np.cumsum(p)
    points = np.concatenate([rng.random(300), 1 - 10.0 ** -np.arange(1, 12), 10.0 ** -np.arange(1, 12)])
    sampler = Sampler(range(len(points)), Sampling(1), torch.device("cpu"))
    sampler.uniforms = torch.from_numpy(points)[:, None]
    ids, logprobs = (drawn.numpy() for drawn in sampler.draw(torch.from_numpy(logits).repeat(len(points), 1), 0))
    slack = 1e-6 * p[ids] + 3e-8 * np.minimum(points, 1 - points)  # the masses themselves are float32
    assert (points <= ends[ids] + slack).all()
    assert (points >= ends[ids] - p[ids] - slack).all()
    assert logprobs == pytest.approx(np.log(p[ids]), abs=1e-5)


def test_rare_ids_of_a_large_vocabulary_are_drawn_as_often_as_they_should() -> None:
    """A flat tail holds a quarter of the mass in 150,000 ids of 2e-6 each: how often it is hit, and where."""
    size, draws = 150_000, 1500
    logits = np.full(size, math.log(0.25 / (size - 1)), np.float32)
    logits[70_000] = math.log(0.75)
    p = exact_law(logits.astype(np.float64), Sampling(1))
    ids, _ = draw(logits, range(draws), Sampling(1))
    tail = ids[ids != 70_000]
    assert len(tail) == pytest.approx(draws / 4, abs=4.5 * math.sqrt(draws * 0.25 * 0.75))
    sixteenths = np.bincount(tail * 16 // size, minlength=16)
    assert abs(chi_square(sixteenths, np.bincount(np.arange(size) * 16 // size, p * (p < 0.5) / (1 - p.max())))) < 4.5


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 1500), st.integers(1, 6))
def test_a_draw_is_the_same_bits_whatever_the_batch(seed: int, size: int, rows: int) -> None:
    """Alone, with others, in another order, and after other rows have ended."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(rows, size)) * 4).float()
    seeds, sampling = [int(s) for s in rng.integers(0, 2**62, rows)], Sampling(3)
    sampler = Sampler(seeds, sampling, torch.device("cpu"))
    together = [sampler.draw(logits.clone(), position) for position in range(2)]
    order = torch.from_numpy(rng.permutation(rows))
    sampler.keep(order)
    shuffled = sampler.draw(logits[order], 1)
    for row in range(rows):
        alone = Sampler([seeds[row]], sampling, torch.device("cpu"))
        for position in range(2):
            one = alone.draw(logits[row : row + 1].clone(), position)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(one, together[position], strict=True))
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, together[1], strict=True))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 1200))
def test_impossible_ids_are_never_drawn(seed: int, size: int) -> None:
    """At the ends of (0, 1) neither, where rounding could step off the first or the last id of any mass."""
    rng = np.random.default_rng(seed)
    possible = rng.random(size) < rng.choice([0.01, 0.3, 0.9])
    possible[rng.integers(size)] = True
    logits = np.where(possible, rng.normal(size=size) * rng.choice([0.1, 30]), -np.inf).astype(np.float32)
    least = np.flatnonzero(np.exp(logits - logits.max()) * 2.0**44 >= 1)
    sampler = Sampler([0] * 4, Sampling(1), torch.device("cpu"))
    sampler.uniforms = torch.tensor([[2.0**-53], [1 - 2.0**-53], [0.5], [float(rng.random())]], dtype=torch.float64)
    ids, logprobs = sampler.draw(torch.from_numpy(logits).repeat(4, 1), 0)
    assert possible[ids.numpy()].all()
    assert torch.isfinite(logprobs).all()
    assert (int(ids[0]), int(ids[1])) == (least[0], least[-1])


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
    prompts = random_ids(np.random.default_rng(0), 32, 2, 9)

    def gates(drawn: Sampling) -> dict[str, bool | None]:
        made = half.generate(prompts, list(range(32)), drawn)
        columns = {"prompt_token_ids": prompts, "token_ids": [c.ids for c in made]}
        table = pa.table(columns | {"logprobs": pa.array([c.logprobs for c in made], pa.list_(pa.float32()))})
        return {gate.name: gate.ok for gate in engine_gates(student_ref(), table, sampling, Gates())}

    assert gates(sampling) == {"engine, mean": True, "engine, largest": True}
    assert gates(Sampling(32))["engine, mean"] is False


@pytest.mark.parametrize("sampling", [Sampling(5), Sampling(5, 0.7), Sampling(5, 0.7, 0.9, 20), Sampling(5, 0.0)], ids=str)
def test_the_trainers_logprobs_are_those_of_each_row_alone(sampling: Sampling, monkeypatch) -> None:
    """Rows of other lengths beside it, a split of positions, and an empty row change nothing."""
    monkeypatch.setattr(agreement, "POSITIONS", 7)
    monkeypatch.setattr(agreement, "TOKENS", 40)
    rng, model = np.random.default_rng(3), load_weights(student_ref()).eval()
    size = side(student_ref()).vocabulary.size
    prompts, completions = random_ids(rng, 12, 1, 12), [*random_ids(rng, 11, 1, 60), []]
    wanted: list[float] = []
    for prompt, ids in zip(prompts, completions, strict=True):
        laws = full_logprobs(model, prompt + ids, size)[len(prompt) - 1 : -1]
        chosen = torch.tensor(ids, dtype=torch.long)[:, None]
        if sampling.top_k:  # of what a cut leaves out, the id itself counts as kept
            laws = warpers(sampling)(None, laws.clone()).scatter(1, chosen, laws.gather(1, chosen) / sampling.temperature)  # type: ignore[arg-type]
        elif sampling.temperature:
            laws = laws / sampling.temperature
        wanted += laws.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    table = pa.table({"prompt_token_ids": prompts, "token_ids": pa.array(completions, pa.list_(pa.int32()))})
    monkeypatch.setattr(agreement, "EDGE", 100.0)
    with torch.inference_mode():
        assert agreement.trainer_logprobs(student_ref(), model, table, sampling) == pytest.approx(wanted, abs=1e-4)


def test_whatever_half_precision_may_keep_is_kept() -> None:
    """Ids that cuts of rounded logits keep, and none that a cut without rounding leaves far behind."""
    rng = torch.Generator().manual_seed(0)
    flipped = 0
    for top_p, top_k in ((0.9, 0), (0.5, 0), (0.97, 20), (1.0, 5)):
        sampling = Sampling(1, 1, top_p, top_k)
        logits = torch.randn(2000, 40, generator=rng) * 3
        rounded = logits + (torch.rand(logits.shape, generator=rng) - 0.5) * EDGE  # of odds that is EDGE at most
        kept, elsewhere = (warpers(sampling)(None, each.clone()) > -torch.inf for each in (logits, rounded))  # type: ignore[arg-type]
        likeliest = warpers(replace(sampling, top_p=1.0))(None, logits.clone())  # type: ignore[arg-type]
        found = torch.cat([may_keep(likeliest, logits[:, i : i + 1], top_p) for i in range(logits.shape[1])], 1)
        assert found[kept | elsewhere].all()
        flipped += int((elsewhere & ~kept).sum())
        law = likeliest.double().softmax(-1)
        above = torch.stack([(law * (logits > logits[:, i : i + 1])).sum(-1) for i in range(logits.shape[1])], 1)
        assert not found[(likeliest > -torch.inf) & (above > 1 - (1 - top_p) / 20 + 1e-9)].any()  # deep in what is cut
    assert flipped > 100


def test_progress_is_told_of_every_completion_and_batches_are_of_like_lengths() -> None:
    """A shard of short and long prompts is padded by next to nothing, whatever its order."""
    loaded, told, widths = engine(student_ref(), batch_size=4), [], []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    loaded.generate([[9] * (2 + 10 * (i % 2)) for i in range(10)], list(range(10)), Sampling(1), told.append)
    hook.remove()
    assert told == [4, 4, 2]
    assert widths == [2, 12, 12]


def sampled(ref: ModelRef, rows: int = 150, new_tokens: int = 24) -> tuple[list[list[int]], list[Completion]]:
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
        assert completion.ids[-1] in text_side.stop_ids or len(completion.ids) == 24
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
def test_samples_of_one_prompt_share_its_computation(make) -> None:
    """Each prompt runs once, whatever its padding; completions are those of its samples drawn one by one."""
    loaded, rng = engine(make()), np.random.default_rng(3)
    prompts = [prompt for prompt in random_ids(rng, 4, 5, 20) for _ in range(3)]
    seeds, sampling = list(range(len(prompts))), Sampling(8)
    alone = [loaded.generate([prompt], [seed], sampling)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    computed = []
    hook = loaded.model.get_input_embeddings().register_forward_hook(lambda _, given, __: computed.append(given[0].shape))
    together = loaded.generate(prompts, seeds, sampling)
    hook.remove()
    assert computed[0] == (4, max(map(len, prompts)))
    assert {shape[1] for shape in computed[1:]} == {1}
    assert computed[1][0] == 12
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_buffers_grow_and_ended_rows_leave_the_batch(monkeypatch) -> None:
    """What is drawn does not change by it, with padded prompts and without."""
    loaded, sampling = engine(student_ref()), Sampling(12)
    monkeypatch.setattr(loaded.side, "stop_ids", list(range(6, 60)))  # most rows end soon
    for prompts in (random_ids(np.random.default_rng(3), 12, 2, 9), [[7, 8, 9]] * 12):
        alone = [loaded.generate([prompt], [seed], sampling)[0] for seed, prompt in enumerate(prompts)]
        rows = []
        hook = loaded.model.get_input_embeddings().register_forward_hook(
            lambda _, given, __, rows=rows: rows.append(len(given[0]))
        )
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "ROOM", 2)
            together = loaded.generate(prompts, list(range(12)), sampling)
        hook.remove()
        assert [completion.ids for completion in together] == [completion.ids for completion in alone]
        assert len({len(completion.ids) for completion in together}) > 2
        assert rows[-1] <= 6


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
        position = np.repeat(np.arange(len(ids)), got.columns["top_counts"])
        law = full_logprobs(grader.model, prompt + ids, grader.size).numpy()[len(prompt) - 1 :]
        chosen = law[position, got.columns["top_ids"]]  # where two ids are as likely, either may come first
        assert chosen == pytest.approx(wanted.columns["top_logprobs"], abs=1e-5)
        assert len(set(zip(position, got.columns["top_ids"], strict=True))) == len(position)
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
