"""The flow of a run: its rounds. Each round samples from the student that the round before has trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, runtime
from pydantic import Field

from configs.compute import Compute
from configs.load import inherit_overrides, load_recipe
from configs.models import Model
from configs.schema import Recipe
from configs.signals import SIGNALS
from configs.teachers import role_of, suffix_of
from flows.compute import hold_accelerators, keep_loaded, run_in_time, shard_runner
from flows.ending import starting, stoppable
from flows.keep import clear_rounds, stays
from flows.publish import Publication, name_rounds, named
from flows.refuse import check_pairs, check_recipe, check_weights_unchanged
from flows.start import count_settled, settle
from flows.track import Trackers, follow
from storage.artifacts import Artifact
from storage.damage import mend
from storage.lineage import watch, watching
from storage.store import Run, round_slot
from tasks.align import align_shard
from tasks.check import check_lead, check_round
from tasks.completions import complete_shard
from tasks.evaluate import evaluate_model
from tasks.gates.rendering import refuse_rendering
from tasks.held_out import compare_cached
from tasks.models.reference import ModelRef, make_reference, refer_as_used, refer_to_cache
from tasks.prompts import make_prompts
from tasks.rewards import reward_rows
from tasks.rollout import roll_out
from tasks.rows.plan import count_shards, teacher_writes
from tasks.rows.round import Pair, Round, Shard, Teachers, Trained, sides_of, teachers_of
from tasks.running.progress import logger
from tasks.score import keep_head, score_shard
from tasks.scratch import make_scratch
from tasks.train import train_round
from tasks.vocab import match_vocabularies


def _describe_flow_run(recipe: Recipe, told: dict[str, Any]) -> str:
    done, target = plan_rounds(recipe, told["rounds"], told["at_most"])
    return name_rounds(recipe.name, done=done, target=target)


@flow(name="distill", flow_run_name=named(_describe_flow_run), validate_parameters=True)
def distill(
    config: Annotated[str, Field(description="recipe: path of a TOML file")],
    rounds: Annotated[int | None, Field(ge=0, description="rounds the run shall have in all; default: the recipe's")] = None,
    at_most: Annotated[int | None, Field(ge=1, description="rounds to add now at most; for a schedule")] = None,
    overrides: Annotated[tuple[str, ...], Field(description="recipe fields to set, each as a.b=c")] = (),
) -> dict[str, Any]:
    """Run a recipe, or continue its run. Committed work is not done again; a complete run is left as it is."""
    recipe = load_recipe(config, overrides)
    check_recipe(recipe)
    target = recipe.rounds if rounds is None else rounds
    nested = runtime.flow_run.parent_flow_run_id is not None  # then wait: two runs may need the model that this one makes
    run = Run(recipe.root, recipe.name)
    with (
        stoppable(recipe, target),
        hold_accelerators(recipe),
        keep_loaded(),
        run.lock(logger.info, wait=nested),
        watching(),
        follow(run, recipe) as trackers,
    ):
        return mend(lambda: run_rounds(recipe, target, at_most, trackers))


def run_rounds(recipe: Recipe, rounds: int, at_most: int | None, trackers: Trackers) -> dict[str, Any]:
    """Make prompts, models and vocabularies, evaluate before any training, then run the rounds one after another."""
    run = Run(recipe.root, recipe.name)
    existing, teachers = make_models(recipe)
    check_pairs(recipe, student=existing, teachers=teachers)
    check_weights_unchanged(run, student=existing, teachers=teachers)
    sides = sides_of(recipe, existing, teachers)
    for ref in sides.values():
        if not ref.committed and Path(ref.path).is_dir():
            watch(ref.path, ref.digest)
    refuse_rendering(recipe, sides)
    run.freeze(recipe)

    done, target = plan_rounds(recipe, rounds, at_most)
    prompts = make_prompts(recipe, sides)
    start = existing or refer_to(recipe.student, make_scratch(recipe, prompts.train))
    student = replace(start, moves="student")
    pairs = tuple(
        make_pair(name, view, start=start, teacher=teachers.get(name) or teacher_of(view, start))
        for name, view in recipe.by_teacher().items()
    )
    evaluate_start(recipe, prompts.eval, student=student, teachers=teachers_of(pairs))

    trackers.send(done)
    settled = min(count_settled(recipe) or 0, target)  # rounds that need not be looked up again
    if not done:
        settle(recipe, 0)
    published, trainer = Publication(run, recipe, done=done, target=target), run.find(round_slot(settled, "trainer"))
    if checkpoint := run.find(round_slot(settled, "student")):
        student = replace(refer_to(recipe.student, checkpoint), moves="student")
        pairs = renew_teachers(pairs, student=student)
    for number in range(settled + 1, target + 1):
        compute = recipe.compute if number > done else Compute()  # a committed round is only looked up
        trained = run_round(
            Round(
                recipe=recipe,
                number=number,
                student=student,
                pairs=pairs,
                start=start,
                prompts=prompts.train,
                trainer=trainer,
            ),
            compute,
        )
        student = replace(refer_to(recipe.student, trained.student), moves="student")
        trainer = trained.trainer
        pairs = renew_teachers(pairs, student=student)
        if not stays(run, round_slot(number, "evals", "student"), round_slot(number, "student")):
            evaluate_student(recipe, number, prompts.eval, student=student, teachers=teachers_of(pairs), compute=compute)
        if number > done:
            published.add_round(number)
            trackers.send(number)
        elif number == done:
            published.complete_round(number)
        if number >= min(done, target):
            clear_rounds(run, recipe)
            # the last thing: a round that is settled is not looked at again
            settle(recipe, number)
    return published.finish(run.find(round_slot(target, "student")) or Artifact(student.path, student.digest))


def plan_rounds(recipe: Recipe, rounds: int | None, at_most: int | None) -> tuple[int, int]:
    """How many rounds the run has, and how many it shall have."""
    done = Run(recipe.root, recipe.name).rounds_done()
    target = recipe.rounds if rounds is None else rounds
    return done, target if at_most is None else min(target, done + at_most)


def run_round(round: Round, compute: Compute) -> Trained:
    """Run one round: rollouts, rewards (if asked for), scores, alignment, training. One model works at a time on all shards."""
    recipe = round.recipe
    shards = tuple(Shard(number) for number in range(count_shards(recipe.rollout)))
    with shard_runner(compute) as run_shards:
        if round.teachers and teacher_writes(recipe.rollout):
            for one in round.by_teacher():
                shards = run_shards(complete_shard, one, shards)
        shards = run_shards(roll_out, round, shards)
        if recipe.graded:
            round = replace(round, rewards=reward_rows(round, shards))
        if round.teachers and recipe.objective.needs_teacher:
            pairs = []
            for one in round.by_teacher():
                shards = run_shards(score_shard, one, shards)
                pairs.append(add_head(one))
            round = replace(round, pairs=tuple(pairs))
        shards = run_shards(align_shard, round, shards)
    if not stays(
        round.run, round.slot("gates", shards[0]), round_slot(round.number - 1, "student"), round.slot("rollouts", shards[0])
    ):
        check_round(round, shards)
    return run_in_time(compute, train_round, round, shards)


def make_pair(name: str, view: Recipe, *, start: ModelRef, teacher: ModelRef | None) -> Pair:
    """The student and a teacher, whose only teacher `view` has, with their vocabularies matched."""
    vocabularies = match_vocabularies(view, name, student=start, teacher=teacher)
    return Pair(name=name, recipe=view, teacher=teacher, vocabularies=vocabularies)


def add_head(round: Round) -> Pair:
    """The only pair of a round, with its teacher's head where the signal needs it."""
    pair, config = round.pair, round.pair.recipe.teacher
    if pair.teacher is None or not SIGNALS[pair.recipe.score.signal].needs_head:
        return pair
    slot = "teacher" + suffix_of(pair.name)
    moves = config is not None and config.weights == "round"
    return replace(pair, head=keep_head(pair.recipe, pair.teacher, round.slot(slot) if moves else slot))


def evaluate_start(recipe: Recipe, prompts: Artifact, *, student: ModelRef, teachers: Teachers) -> None:
    """Round 0: evaluate the student before any training, and the teachers. Raises Stopped where a teacher is no better."""
    limit, evals = recipe.compute, dict[str, Artifact]()
    student_evals = evaluate_student(recipe, 0, prompts, student=student, teachers=teachers, compute=limit)
    for name, teacher in teachers.items():
        if not teacher.cached:
            own = {name: teacher}
            evals[name] = run_in_time(limit, evaluate_model, recipe, 0, "teacher", prompts, name, model=teacher, teachers=own)
    if evals:
        check_lead(recipe, teachers=evals, student=student_evals)


def evaluate_student(
    recipe: Recipe, number: int, prompts: Artifact, *, student: ModelRef, teachers: Teachers, compute: Compute
) -> Artifact:
    """Evaluate the student after a round, the last thing of it. A cache cannot score its answers: it has texts of its own."""
    for teacher in teachers.values():
        if teacher.cached:
            run_in_time(compute, compare_cached, recipe, number, prompts, student=student, teacher=teacher)
    others = {name: teacher for name, teacher in teachers.items() if not teacher.cached}
    return run_in_time(compute, evaluate_model, recipe, number, "student", prompts, model=student, teachers=others)


def make_models(recipe: Recipe) -> tuple[ModelRef | None, dict[str, ModelRef]]:
    """The student and its teachers by name. A new student is None, and has no teacher that is itself yet."""
    views = recipe.by_teacher()
    teachers = {name: make_model(view, view.teacher) for name, view in views.items() if view.teacher and not view.self_taught}
    student = None if recipe.student.scratch else make_model(recipe, recipe.student)
    own = {name: ref for name, view in views.items() if student and (ref := teacher_of(view, student)) is not None}
    return student, {name: (teachers | own)[name] for name in views if name in teachers | own}


def teacher_of(recipe: Recipe, student: ModelRef) -> ModelRef | None:
    """The student as its own teacher, in the teacher's context; None where the recipe has another teacher, or none."""
    if recipe.teacher is None or not recipe.self_taught:
        return None
    moves = role_of(recipe.teacher) if recipe.teacher.weights == "round" else ""
    return replace(refer_as_used(recipe.teacher, student.path, student.digest, committed=student.committed), moves=moves)


def make_model(recipe: Recipe, config: Model) -> ModelRef:
    """The model that `config` names. A model that another recipe makes is made first, by the same flow."""
    if config.cache is not None:
        return refer_to_cache(config.cache)
    if config.recipe is None:
        assert config.model is not None
        return make_reference(config, config.model)
    overrides = inherit_overrides(recipe, config.recipe)
    maker = load_recipe(config.recipe, overrides)
    if (count_settled(maker) or 0) < maker.rounds:
        with starting():
            distill(config.recipe, overrides=overrides)
    checkpoint = Run(maker.root, maker.name).find(round_slot(maker.rounds, "student"))
    assert checkpoint is not None
    return refer_to(config, checkpoint)


def refer_to(config: Model, checkpoint: Artifact) -> ModelRef:
    """The reference to a committed checkpoint, used as `config` says."""
    return refer_as_used(config, checkpoint.path, checkpoint.digest, committed=True)


def renew_teachers(pairs: Sequence[Pair], *, student: ModelRef) -> tuple[Pair, ...]:
    """The next round's pairs: a teacher is the student as it is now where its `weights` say so, else the same as before."""
    moves = [pair.recipe.teacher is not None and pair.recipe.teacher.weights == "round" for pair in pairs]
    return tuple(
        replace(pair, teacher=teacher_of(pair.recipe, student)) if moved else pair
        for pair, moved in zip(pairs, moves, strict=True)
    )
