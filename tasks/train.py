"""The training stage: one round's optimizer steps, from the last round's student to this round's."""

from dataclasses import replace
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.load import select_content
from storage.artifacts import Artifact, local_folder, read_table
from tasks.engines.pool import collect
from tasks.rows.round import Round, Shard, Trained
from tasks.running.memory import Halved, Room
from tasks.running.progress import logger
from tasks.training.processes import launch
from tasks.training.room import make_room_to_train
from tasks.training.student import training_room
from tasks.training.trainer import JOB, Job, count_steps, train

CODE = 4


@task(name="train", task_run_name="round {round.number} · train", cache_policy=NO_CACHE)
def train_round(round: Round, shards: tuple[Shard, ...]) -> Trained:
    """Make `round=…/student`, `…/trainer` and `…/steps/part-00000` in one piece of work.

    Training continues from the last round's student. Adapters are trained on the weights that the run started from.
    """
    recipe, lora = round.recipe, round.recipe.student.lora
    pairs = tuple((shard.rollouts, shard.aligned) for shard in shards if shard.rollouts and shard.aligned)
    assert len(pairs) == len(shards)
    inputs = {
        "stage": "train",
        "code": CODE,
        "student": round.student.identity,
        "trainer": round.trainer.digest if round.trainer else None,
        "rollouts": [rollouts.digest for rollouts, _ in pairs],
        "aligned": [aligned.digest for _, aligned in pairs],
        "recipe": select_content(recipe, "train"),
        "objective": recipe.objective.model_dump(),
        "horizon": count_steps(recipe),
        "seed": recipe.seed,
        "round": round.number,
    }
    rewards = round.rewards if recipe.reward.weight else None
    if rewards is not None:
        inputs |= {"reward": recipe.reward.model_dump(), "rewards": rewards.digest}
    if lora is not None:
        inputs |= {"lora": lora.model_dump(), "base": round.start.identity}
    slots = {
        "student": round.slot("student"),
        "trainer": round.slot("trainer"),
        "steps.parquet": round.slot("steps", shards[0]),
    }

    def make(folder: Path) -> dict[str, int]:
        make_room_to_train(recipe.train, round.student, lora=lora is not None)
        room = training_room(recipe)
        job = Job(
            recipe=recipe,
            number=round.number,
            student=round.student if lora is None else round.start,
            teachers=round.teachers,
            shards=pairs,
            rewards=rewards,
            state=local_folder(round.trainer) if round.trainer else None,
            most_tokens=room.limit,
        )
        if recipe.train.processes > 1:
            launch_until_it_fits(job, folder, room)
        else:
            train(job, folder)
            collect()
        return dict.fromkeys(slots, read_table(Artifact(str(folder / "steps.parquet"), "")).num_rows)

    artifacts = round.run.build_files(slots, inputs, make, logger.info)
    return Trained(student=artifacts["student"], trainer=artifacts["trainer"])


def launch_until_it_fits(job: Job, folder: Path, room: Room) -> None:
    """Train in several processes, and begin anew with less at once where one of them has no memory for its part."""
    while True:
        try:
            return launch(JOB.dump_json(job).decode(), folder, job.recipe.train.processes)
        except Halved as halved:
            room.shrink(halved.limit)
            job = replace(job, most_tokens=halved.limit)
