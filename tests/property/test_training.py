"""Training (MATHS.md §8; properties 1, 4, 13 and 15): what the loss of a step may depend on, and what it may not."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import named
from toys import SEEDS, TEXTS, Rows, full_logprobs, pairing, student_ref, teacher_ref, training_table, twin_ref
from training import (
    CPU,
    OBJECTIVES,
    completions_of,
    loss_and_gradient,
    plain_rows,
    student_module,
    teacher_engine,
    trainable_rows,
)

from configs.models import Model
from configs.objectives import Alm, Bpm, Bytes, Gkd, Gold, Objective, Opd, Sft, Strict
from configs.prompts import GymPrompts
from configs.rollout import Rollout
from configs.schema import Recipe
from configs.train import Train
from tasks.models.text import side
from tasks.models.weights import load_weights
from tasks.objectives.sft import corrupt_tokens
from tasks.training.batches import collate
from tasks.training.steps import Shape, ahead, behind, make_step
from tasks.training.trainer import Trainer

CUT = ["a naïve 👩", "мир 世界", "ok"]


def same(first: tuple[float, torch.Tensor], second: tuple[float, torch.Tensor]) -> bool:
    assert first[1].abs().max() > 1e-3
    return abs(first[0] - second[0]) < 1e-4 * max(1, abs(first[0])) and torch.allclose(
        first[1], second[1], atol=2e-3, rtol=1e-3
    )


# -- property 13: what a step may not depend on ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_padding(objective: Objective) -> None:
    """More padding, and other ids in it, change neither loss nor gradient."""
    module, batch = student_module(objective), collate(plain_rows(objective), 0, CPU)
    wanted = loss_and_gradient(module, batch)
    wider = torch.nn.functional.pad(batch.ids, (0, 17), value=3)
    assert same(wanted, loss_and_gradient(module, batch, wider))
    assert same(wanted, loss_and_gradient(module, collate(plain_rows(objective), 77, CPU)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_batch_order_and_split(objective: Objective) -> None:
    """A batch's loss is the sum over its rows, in any order and however they are packed."""
    module, table = student_module(objective), plain_rows(objective)
    wanted = loss_and_gradient(module, collate(table, 0, CPU))
    assert same(
        wanted, loss_and_gradient(module, collate(table.take(np.random.default_rng(3).permutation(len(table))), 0, CPU))
    )
    alone = [loss_and_gradient(module, collate(table.slice(row, 1), 0, CPU)) for row in range(len(table))]
    assert same(wanted, (sum(loss for loss, _ in alone), torch.stack([gradient for _, gradient in alone]).sum(0)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
@pytest.mark.parametrize("positions", [1, 7, 40])
def test_chunks(objective: Objective, positions: int) -> None:
    """How many positions' logits exist at once changes neither loss nor gradient."""
    batch = collate(plain_rows(objective), 0, CPU)
    wanted = loss_and_gradient(student_module(objective), batch)
    assert same(wanted, loss_and_gradient(student_module(objective, chunk_positions=positions), batch))
    chunks = list(batch.chunks(positions))
    assert len(chunks) > 1
    assert sum(len(chunk.terms.start) for chunk in chunks) == len(batch.starts)
    assert all(chunk.at.stop - chunk.at.start <= positions or len(chunk.terms.start) == 1 for chunk in chunks)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_rows_with_a_tail(objective: Objective) -> None:
    """Rows whose last tokens are in no unit (a cut character, what stands behind a sampled control token) train as they
    would alone."""
    own = side(student_ref())
    cut = [ids[: len(ids) - 3] for ids in completions_of(CUT)]
    control = own.tokenizer.convert_tokens_to_ids("<user>")
    rows = [
        cut[0],
        *completions_of(["the dog"]),
        [*completions_of(["log"])[0][:-1], control, 50, 51],
        *completions_of(["on"]),
        cut[1],
    ]
    table = trainable_rows(objective, teacher_ref(), rows)
    assert len(table) == len(rows)
    module = student_module(objective)
    alone = [loss_and_gradient(module, collate(table.slice(row, 1), 0, CPU)) for row in range(len(table))]
    wanted = (sum(loss for loss, _ in alone), torch.stack([gradient for _, gradient in alone]).sum(0))
    assert same(wanted, loss_and_gradient(module, collate(table, 0, CPU)))
    assert same(wanted, loss_and_gradient(student_module(objective, chunk_positions=9), collate(table, 0, CPU)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_no_gradient_to_prompt_and_padding(objective: Objective) -> None:
    """The loss reads hidden states from the last prompt token to the last but one of the completion, and no others."""
    module, table = student_module(objective), plain_rows(objective)
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    handle = module.model.base_model.register_forward_hook(keep)
    batch = collate(table, 0, CPU)
    module(batch.ids, batch).backward()
    handle.remove()
    reached = kept[0].grad.abs().sum(-1) > 0
    for row, record in enumerate(table.to_pylist()):
        first, end = len(record["prompt_token_ids"]) - 1, len(record["prompt_token_ids"]) + len(record["token_ids"]) - 1
        assert not reached[row, :first].any()
        assert not reached[row, end:].any()
        read = {i for a, b in zip(record["term_starts"], record["term_ends"], strict=True) for i in range(a, b)}
        got = set(reached[row, first:end].nonzero()[:, 0].tolist())
        assert got <= read
        # (What chose a token that no other token begins with has no influence on a `bytes` term: it cancels.)
        # (A `strict` term has no event where the top 24 of the teacher and the top 16 of the student have none in common.)
        assert got == read or objective.name in ("bytes", "strict")
        assert got


# -- whole steps of the trainer ----------------------------------------------------------------------------------------------


def trainer(objective: Objective, **options: Any) -> Trainer:
    recipe = Recipe(
        name="toy",
        student=Model(model=student_ref().path),
        teacher=Model(model=teacher_ref().path),
        prompts=GymPrompts(source="reasoning-gym", task="spell_backward"),
        rollout=Rollout(on_policy=0.0 if objective.name == "sft" else 1.0),
        objective=objective,
        train=Train(**{"batch_size": 16, "micro_batch_size": 16, "schedule": "constant", **options}),
    )
    return Trainer(recipe, 1, student=student_ref(), teachers={"": teacher_ref()}, state=None)


def optimize(made: Trainer, table: pa.Table) -> dict[str, Any]:
    """One optimizer step over these rows, and its record."""
    return made._look(made._optimize(made._make_step(table, made.step)))


def step(objective: Objective, table: pa.Table, **options: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """One optimizer step's record, and the (clipped) gradient that the optimizer saw."""
    made, seen = trainer(objective, **options), []
    go = made.optimizer.step

    def look_and_step() -> None:
        seen.append(torch.cat([p.grad.flatten() for p in made.module.parameters()]))
        go()

    made.optimizer.step = look_and_step
    return optimize(made, table), seen[0]


@pytest.mark.parametrize("objective", [*OBJECTIVES, Sft(name="sft", corrupt_rows=0.7)], ids=named)
def test_accumulation(objective: Objective) -> None:
    """One step's loss and gradient do not depend on the accumulation split, the chunks or the rows' order (§8)."""
    table = plain_rows(objective)
    record, gradient = step(objective, table)
    assert record["units"] == sum(table["units"].to_pylist())
    corrupts = isinstance(objective, Sft) and objective.corrupt_rows > 0  # which rows, goes by their order
    reordered = table if corrupts else table.take(np.arange(len(table))[::-1])
    for rows, options in (
        (table, {"micro_batch_size": 1}),
        (table, {"micro_batch_size": 4, "chunk_positions": 13, "gradient_checkpointing": True}),
        (reordered, {"micro_batch_size": 3}),
    ):
        other, other_gradient = step(objective, rows, **options)
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-3)
        assert torch.allclose(other_gradient, gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6)
        assert (other["tokens"], other["units"]) == (record["tokens"], record["units"])


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 8), tokens=st.integers(1, 200), processes=st.integers(1, 3))
def test_micro_batches(rows: int, tokens: int, processes: int) -> None:
    """However a step is split by rows, tokens and processes: each row once, limits held, as many passes everywhere, and the
    gradients of all passes add up to that of one batch."""
    objective = Bytes(name="bytes")
    table, module = plain_rows(objective), student_module(objective)
    wanted = loss_and_gradient(module, collate(table, 0, CPU))
    shape = Shape(rows=rows, tokens=tokens, process=0, processes=processes, pad_id=0, positions=40, pinned=False)
    steps = [make_step(table, replace(shape, process=process)) for process in range(processes)]
    assert len({len(made.passes) for made in steps}) == 1
    passes = [batch for made in steps for batch, counts in made.passes if counts]
    assert sum(len(batch.ids) for batch in passes) == len(table)
    assert sum(batch.tokens for batch in passes) == steps[0].tokens
    assert all(len(batch.ids) <= rows and (batch.ids.numel() <= tokens or len(batch.ids) == 1) for batch in passes)
    parts = [loss_and_gradient(module, batch) for batch in passes]
    assert same(wanted, (sum(loss for loss, _ in parts), torch.stack([gradient for _, gradient in parts]).sum(0)))


def test_master_weights_keep_what_bfloat16_rounds_away() -> None:
    """Many small updates, against a loop by hand: bfloat16 gradients, added in float32, AdamW on float32 weights."""
    objective = Sft(name="sft")
    table = plain_rows(objective)
    options = {"param_dtype": "bfloat16", "learning_rate": 1e-6, "micro_batch_size": 5}
    made = trainer(objective, **options)
    module = student_module(objective)
    masters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    start = [p.detach().clone() for p in masters]
    groups = [[p for p in masters if p.ndim >= 2], [p for p in masters if p.ndim < 2]]
    optimizer = torch.optim.AdamW([{"params": group, "weight_decay": 0.0} for group in groups], lr=1e-6)
    for p in module.parameters():
        p.data = p.data.bfloat16()
    for _ in range(10):
        for batch, _ in made._make_step(table, 0).passes:
            module.zero_grad()
            (module(batch.ids, batch) / sum(table["units"].to_pylist())).backward()
            for master, p in zip(masters, module.parameters(), strict=True):
                master.grad = p.grad.float() + (0 if master.grad is None else master.grad)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for master, p in zip(masters, module.parameters(), strict=True):
            p.data.copy_(master.data)
        optimize(made, table)
    got = [p.detach() for p in made.held.parameters()]
    moved = torch.cat([(a.detach() - b).flatten() for a, b in zip(masters, start, strict=True)])
    assert float(moved.abs().max()) < 2e-5  # far less than bfloat16 tells apart
    assert float(moved.abs().mean()) > 1e-6
    assert torch.allclose(torch.cat([(a - b).flatten() for a, b in zip(got, start, strict=True)]), moved, atol=1e-6)
    assert all(p.dtype == torch.bfloat16 for p in made.module.parameters())
    assert all(torch.equal(p, m.bfloat16()) for p, m in zip(made.module.parameters(), got, strict=True))


@pytest.mark.parametrize("options", [{}, {"param_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_a_restored_trainer_goes_on_as_if_it_had_not_stopped(options: dict[str, Any], tmp_path) -> None:
    """Bit for bit: weights, masters, moments, rates."""
    objective = Sft(name="sft")
    table = plain_rows(objective)
    through = trainer(objective, learning_rate=1e-3, **options)
    optimize(through, table)
    through._save(tmp_path)
    student = replace(student_ref(), path=str(tmp_path / "student"), digest="other")
    again = Trainer(through.recipe, 1, student=student, teachers={"": teacher_ref()}, state=str(tmp_path / "trainer"))
    assert (tmp_path / "trainer/weights.safetensors").exists() == bool(options)
    for made in (through, again):
        made.last = [optimize(made, table) for _ in range(2)]
    for a, b in zip(through.last, again.last, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert all(torch.equal(a, b) for a, b in zip(through.held.parameters(), again.held.parameters(), strict=True))


def test_what_a_thread_makes_ahead() -> None:
    """The same items in order, an error where it stood, and no thread left behind."""
    assert list(ahead(iter(range(20)))) == list(behind(range(20), 1)) == list(range(20))

    def broken() -> Any:
        yield 1
        raise KeyError("gone")

    items = ahead(broken())
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
    endless = ahead(iter(int, 1))
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


@pytest.mark.parametrize(("on", "times"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_layers_again(on: bool, times: int) -> None:
    made, calls = trainer(Bytes(name="bytes"), gradient_checkpointing=on), []
    made.module.model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    optimize(made, plain_rows(Bytes(name="bytes")))
    assert len(calls) == times


def test_the_loss_is_a_mean_over_units() -> None:
    """For sft: torch's cross-entropy over all completion tokens of a plain forward pass; a small step lowers it."""
    table = plain_rows(Sft(name="sft"))
    made = trainer(Sft(name="sft"), learning_rate=1e-3, micro_batch_size=3)
    model = load_weights(student_ref(), torch.float32)
    logits, labels = [], []
    for record in table.to_pylist():
        prompt, ids = record["prompt_token_ids"], record["token_ids"]
        logits.append(full_logprobs(model, prompt + ids, len(side(student_ref()).beta.values))[len(prompt) - 1 : -1])
        labels += ids
    wanted = float(torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor(labels)))
    steps = [optimize(made, table)["loss"] for _ in range(4)]
    assert steps[0] == pytest.approx(wanted, rel=1e-4)
    assert steps == sorted(steps, reverse=True)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, rows_share=st.floats(0, 1), tokens_share=st.floats(0, 1))
def test_corruption(seed: int, rows_share: float, tokens_share: float) -> None:
    """Only completion tokens of the input are replaced, by completion tokens of the batch; labels stay; seeded."""
    table = plain_rows(Sft(name="sft"))
    before, shown = collate(table, 0, CPU), corrupt_tokens(table, rows_share, tokens_share, seed)
    batch = collate(shown, 0, CPU)
    assert shown.equals(corrupt_tokens(table, rows_share, tokens_share, seed))
    completion = torch.zeros_like(batch.ids, dtype=torch.bool)
    completion[batch.row, batch.time] = True
    assert torch.equal(batch.ids[~completion], before.ids[~completion])
    assert set(batch.ids[completion].tolist()) <= set(before.actual.tolist())
    assert torch.equal(batch.actual, before.actual)
    assert torch.equal(collate(corrupt_tokens(table, 0.0, 1.0, seed), 0, CPU).ids, before.ids)
    assert not torch.equal(collate(corrupt_tokens(table, 1.0, 1.0, seed), 0, CPU).ids, before.ids)


# -- properties 1 and 4, through real models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [Gkd(name="gkd", beta=b) for b in (0.0, 0.5, 1.0)] + [Gold(name="gold", beta=1.0)], ids=named
)
def test_one_tokenizer_through_real_models(objective: Gkd | Gold) -> None:
    """Sampled (non-canonical) ids, a teacher whose head is padded with seven rows that would have mass: the step's sum is
    JSD_β(t_i, s_i) of two plain forward passes over the ids that exist, within half precision (property 1)."""
    own = side(student_ref())
    size = len(own.beta.values)
    completions = completions_of(TEXTS[:3])
    table = trainable_rows(objective, twin_ref(), completions, k=1000)
    module = student_module(objective, twin_ref())
    got, _ = loss_and_gradient(module, collate(table, 0, CPU))
    wanted = 0.0
    for r, (record, ids) in enumerate(zip(table.to_pylist(), completions, strict=True)):
        prompt, seen = record["prompt_token_ids"], [1, 40, 50, 60][: 1 + r % 4]
        s = full_logprobs(module.model, prompt + ids, size)[len(prompt) - 1 : -1]
        t = full_logprobs(teacher_engine(twin_ref()).model, seen + ids, size)[len(seen) - 1 : -1]
        kl = lambda p, q: torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")  # noqa: E731
        if objective.beta in (0, 1):
            wanted += float(kl(t, s) if objective.beta == 0 else kl(s, t))
        else:
            m = torch.logaddexp(t, s) + np.log(0.5)
            wanted += float(0.5 * kl(t, m) + 0.5 * kl(s, m))
    assert got == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_a_constant_on_all_logits_changes_no_loss(objective: Objective) -> None:
    """Adding one vector to every row of the student's head adds a constant at each position (property 4)."""
    module, batch = student_module(objective), collate(plain_rows(objective), 0, CPU)
    before = float(module(batch.ids, batch).detach())
    head = module.model.get_output_embeddings()
    shift = torch.randn(head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = []
    handle = head.register_forward_hook(lambda _, inputs, __: hidden.append((inputs[0] @ shift).abs().max().item()))
    head.weight = torch.nn.Parameter(head.weight.detach() + shift)
    assert float(module(batch.ids, batch).detach()) == pytest.approx(before, rel=1e-4)
    handle.remove()
    assert max(hidden) > 1  # the constants were not small


# -- property 15 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "teacher"),
    [(Gkd(name="gkd", beta=b), twin_ref) for b in (0.0, 1.0)]
    + [(kind, teacher_ref) for kind in (Gold(name="gold", beta=0.0), Gold(name="gold", beta=1.0), Gold(name="gold", beta=0.5))]
    + [(Bytes(name="bytes", beta=b), teacher_ref) for b in (0.0, 0.5, 1.0)]
    + [(Strict(name="strict"), teacher_ref), (Alm(name="alm"), teacher_ref), (Alm(name="alm", beta=1.0), teacher_ref)]
    + [(Bpm(name="bpm", beta=b), teacher_ref) for b in (0.0, 0.5, 1.0)]
    + [(Opd(name="opd"), teacher_ref)],
    ids=lambda x: named(x) if hasattr(x, "model_dump") else "",
)
def test_the_teachers_stop_reaches_the_student(objective: Objective, teacher) -> None:
    """Raising the teacher's stop probability raises the student's after one step, with other (and more) stop ids."""
    own, other = side(student_ref()), side(teacher())
    ids, t_ids = completions_of(["the cat"], canonical=True)[0], other.encoder.encode(["the cat"])[0]
    assert t_ids is not None
    t_ids = [*t_ids, other.stop_ids[0]]
    table = full_logprobs(teacher_engine(teacher()).model, [0, *t_ids], len(other.beta.values)).numpy()[:-1]
    raised = np.exp(table)
    raised[-1] *= 0.4
    raised[-1, other.stop_ids[-1]] += 0.6

    def stop_after_a_step(t: np.ndarray) -> tuple[float, float]:
        rows = Rows(own.vocabulary, other.vocabulary, [ids], [t_ids], [True], [], [t], [np.full(len(ids), np.log(0.2))])
        module = student_module(objective, teacher())
        head = module.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # the step moves the head alone
        stop, inputs = own.stop_ids[0], torch.tensor([[0, *ids]])

        def stop_probability() -> float:
            return float(full_logprobs(module.model, inputs[0].tolist(), module.size)[-2, stop].exp())

        hidden = module.model.base_model(input_ids=inputs).last_hidden_state[0, -2].detach()
        lift = np.log(0.25) - np.log(stop_probability())  # a student that stops here one time in five
        with torch.no_grad():
            head.weight[stop] += hidden * lift / hidden.square().sum()
        before = stop_probability()
        batch = collate(training_table(module.objectives[0], pairing(rows), rows), 0, CPU)
        module(batch.ids, batch).backward()
        with torch.no_grad():
            head.weight -= 1e-3 * head.weight.grad
        return before, stop_probability()

    (before, low), (_, high) = stop_after_a_step(table), stop_after_a_step(np.log(raised))
    assert before == pytest.approx(0.2, abs=0.01)
    assert high > low + 1e-5
    assert high > before + 1e-5
