"""The preflight stage: a small round in memory, on a few prompts. It finds what would make a run fail or waste its time."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.models import describe_teacher
from configs.schema import Recipe
from configs.signals import SIGNALS
from tasks import objectives
from tasks.align import align_rollouts
from tasks.caches.recall import recall_completions, recall_scores
from tasks.completions import make_completions
from tasks.engines.base import Sampling
from tasks.engines.choose import get_head, release
from tasks.engines.names import Use
from tasks.evaluate import evaluate_prompts
from tasks.gates.cost import cost_gates
from tasks.gates.expected import expect, expected_gate
from tasks.gates.gate import Gate, prefix_name
from tasks.gates.rendering import judge_of, rendering_gates
from tasks.gates.round import engine_gates, lead_gate, truncation_gate
from tasks.gates.sample import Sample
from tasks.gates.signal import chance_gate, noise_gate, objective_gates, teacher_engine_gate
from tasks.gates.texts import text_gates
from tasks.models.reference import ModelRef
from tasks.models.text import side
from tasks.rollout import make_rollouts, translate_completions
from tasks.rows.accounts import describe_account
from tasks.rows.plan import Row, draw_source
from tasks.rows.round import Teachers, sides_of
from tasks.rows.sources import deal_prompts, field_of
from tasks.rows.teachers import find_rows
from tasks.running.progress import logger
from tasks.running.seeds import derive_seed
from tasks.score import score_rows
from tasks.signals import make_signal
from tasks.training.student import mean_loss

SHOWN = 2  # prompts, as each side reads them


@task(name="preflight", cache_policy=NO_CACHE)
def try_recipe(recipe: Recipe, count: int, *, student: ModelRef | None, teachers: Teachers) -> list[dict[str, Any]]:
    """The gates of a recipe on `count` of its prompts, as rows for people. Nothing is written into the run's folder."""
    return [gate.record() for gate in examine(recipe, count, student=student, teachers=teachers)]


def examine(recipe: Recipe, count: int, *, student: ModelRef | None, teachers: Teachers) -> list[Gate]:
    """The gates of a recipe on `count` of its prompts. A new student (None) is not made yet and has no gates.

    Each of several teachers is tried on its own of these prompts: its gates, and the student's beside it, have its name.
    """
    split = deal_prompts(recipe.prompts, recipe.seed, judge_of(recipe, sides_of(recipe, student, teachers)))
    prompts = split.tables()
    gates = [Gate("prompts", len(prompts["train"]), detail=f"to train on, and {len(prompts['eval']):,} to evaluate on")]
    if student is None:
        return gates
    samples = {}
    for name, view in recipe.by_teacher().items():
        own = {split: table.filter(find_rows(recipe.teachers, table, name)) for split, table in prompts.items()}
        some = max(1, round(count * len(own["train"]) / len(prompts["train"])))
        sample = Sample(view, own["train"].slice(0, some), student, teachers.get(name))
        every = [row for table in own.values() for row in table.to_pylist()]
        for role, ref in sample.sides().items():
            gates += name_gates(name, rendering_gates(role, ref, every, recipe.rollout.max_new_tokens))
        samples[name] = sample, own["eval"].slice(0, count)
    for line in describe_account(field_of(recipe.prompts), split.account().to_pylist()):
        logger.info(line)
    roomy = not any(gate.ok is False for gate in gates if gate.name.endswith("room"))
    trials = []
    for name, (sample, held_out) in samples.items():
        trial = try_pair(sample, held_out, roomy=roomy)
        gates += name_gates(name, trial.gates)
        trials.append(trial)
    if all(trial.tables for trial in trials):
        gates += cost_gates(recipe, [(trial.sample, trial.tables) for trial in trials], sum(trial.seconds for trial in trials))
    return gates


@dataclass(frozen=True)
class Trial:
    """What was tried with the student and one teacher."""

    sample: Sample
    gates: list[Gate]
    tables: list[pa.Table]  # rollouts, scores, aligned; none where the models cannot be run on such prompts
    seconds: float  # that these took


def name_gates(teacher: str, gates: Iterable[Gate]) -> list[Gate]:
    """Gates by the name of the one of several teachers whose rows they concern."""
    return [replace(gate, name=prefix_name(teacher, gate.name)) for gate in gates]


def try_pair(sample: Sample, held_out: pa.Table, *, roomy: bool) -> Trial:
    """Make a small round of a sample, and measure the teacher's lead on `held_out` prompts.

    Without room (`roomy`) the models cannot be run on such prompts, and their texts alone are looked at.
    """
    recipe, student, teacher = sample.recipe, sample.student, sample.teacher
    gates: list[Gate] = []
    for prompt in sample.asked[:SHOWN]:
        for role, ref in sample.sides().items():
            logger.info("what the %s reads:\n%s", role, side(ref).show(*prompt))
    gates += text_gates(sample)
    if not roomy:
        return Trial(sample, gates, [], 0.0)
    most = recipe.rollout.max_new_tokens
    logger.info("one answer each to %d prompts, of at most %d tokens", len(sample.prompts), most)
    rollouts, seconds = _timed(sample, student, lambda: roll_out_sample(sample), use="sample")
    ends = rollouts.filter(pc.equal(rollouts["source"], "student"))["finish_reason"].to_pylist()
    gates.append(truncation_gate(ends.count("length"), len(ends), recipe.gates))
    tables, scores = [rollouts], None
    if teacher is not None and recipe.objective.needs_teacher and not teacher.cached:
        logger.info("the teacher scores them")
        scores, more = _timed(sample, teacher, lambda: score_sample(sample, rollouts, teacher))
        seconds += more
    elif teacher is not None and recipe.objective.needs_teacher:
        scores = recall_scores(recall_completions(plan_sample(sample), sample.prompts, teacher), teacher)
    expected = {}
    for role, ref in sample.sides().items():
        gates.append(chance_gate(sample, role, ref))
        expected[role] = expect(sample, role, ref)
    if "teacher" in expected:
        gates.append(expected_gate(sample, student=expected["student"], teacher=expected["teacher"]))
    release()
    logger.info("the engine against the trainer")
    gates += engine_gates(student, rollouts, Sampling.of(recipe.rollout), recipe.gates)
    if teacher is not None and scores is not None:
        logger.info("the scores again: one by one, and by the student")
        same = replace(student, engine="transformers", urls=())  # the engine that can store every signal
        own = score_sample(sample, rollouts, same)
        if not teacher.cached:
            gates.append(teacher_engine_gate(sample, teacher))
            alone = score_sample(sample, rollouts, teacher, batch_tokens=1)
            gates.append(noise_gate(sample, scores, alone=alone, own=own))
        _, loss = align_sample(sample, rollouts, own, same)
        gates.append(Gate("own teacher", loss, recipe.gates.own_teacher, detail="the student scored by itself"))
        aligned, loss = align_sample(sample, rollouts, scores, teacher)
        tables += [scores, aligned]
        gates += objective_gates(sample, rollouts, aligned, loss, teacher)
    if teacher is not None and not teacher.cached:
        logger.info("both models answer %d held-out prompts", len(held_out))
        gates.append(measure_lead(sample, held_out, teacher))
    release()
    return Trial(sample, gates, tables, seconds)


def _timed(sample: Sample, ref: ModelRef, make: Callable[[], pa.Table], use: Use = "score") -> tuple[pa.Table, float]:
    """What `make` makes with a model, and the seconds that it takes once the model is loaded."""
    sample.engine(ref, use=use)
    started = time.monotonic()
    return make(), time.monotonic() - started


def plan_sample(sample: Sample) -> list[Row]:
    """A row of each prompt, from the source that round 1 would take it from."""
    config, seed, rows = sample.recipe.rollout, sample.recipe.seed, list[Row]()
    for number in range(len(sample.prompts)):
        source = draw_source(config, seed, "preflight", number)
        rows.append(Row(number, 0, source, derive_seed(seed, "preflight", number), f"preflight-{number:05d}"))
    return rows


def roll_out_sample(sample: Sample) -> pa.Table:
    """Make one completion per prompt."""
    config, rows, completions = sample.recipe.rollout, plan_sample(sample), []
    if sample.teacher is not None and any(row.source == "teacher" for row in rows):
        written = make_completions(rows, sample.prompts, config, sample.teacher).to_pylist()
        sides = {"student": side(sample.student), "teacher": side(sample.teacher)}
        completions = translate_completions(written, **sides, markers=sample.markers(sample.teacher))
    return make_rollouts(rows, sample.prompts, config, 1, sample.student, completions)


def score_sample(sample: Sample, rollouts: pa.Table, teacher: ModelRef, batch_tokens: int | None = None) -> pa.Table:
    """A teacher's scores of the rollouts, in batches of `batch_tokens` (default: the recipe's)."""
    rows = rollouts.select(["rollout_id", "prompt_id", "text", "finish_reason", "token_ids"]).to_pylist()
    prompts = dict(zip(sample.prompts["prompt_id"].to_pylist(), sample.asked, strict=True))
    student, markers = side(sample.student), sample.markers(teacher)
    config = sample.recipe.score
    signal = make_signal(config.signal, config.k, config.top_p)
    engine = sample.engine(teacher, batch_tokens)
    return score_rows(rows, prompts, engine, signal, markers, student=student, teacher=side(teacher))


def align_sample(sample: Sample, rollouts: pa.Table, scores: pa.Table, teacher: ModelRef) -> tuple[pa.Table, float]:
    """The rollouts aligned with a teacher's scores, and the loss per unit at the start of training, in nats."""
    recipe, config, s_side, t_side = sample.recipe, sample.recipe.score, side(sample.student), side(teacher)
    head = None
    if SIGNALS[config.signal].needs_head:
        head = get_head(teacher)
    objective = objectives.build(recipe.objective, student=s_side.vocabulary, teacher=t_side.vocabulary)
    signal = make_signal(config.signal, config.k, config.top_p)
    markers = sample.markers(teacher)
    aligned = align_rollouts(rollouts, scores, objective, signal, head, markers, student=s_side, teacher=t_side)
    return aligned, mean_loss(recipe, rollouts, aligned, student=sample.student, teacher=teacher)


def measure_lead(sample: Sample, prompts: pa.Table, teacher: ModelRef) -> Gate:
    """The teacher's lead in accuracy on these prompts, as round 0 would measure it."""
    rows = prompts.to_pylist()
    tables = {
        role: pa.Table.from_pylist(evaluate_prompts(sample.recipe, 0, role, ref, rows))
        for role, ref in (("teacher", teacher), ("student", sample.student))
    }
    about = describe_teacher(sample.recipe.student, sample.recipe.teacher)
    return lead_gate(sample.recipe.gates, **tables, about=about)
