"""The check stage: a round's figures against their limits before it is trained on; the teacher's lead before any training."""

from collections.abc import Mapping
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.compute as pc
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.gates import Gates
from configs.models import describe_teacher
from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.schemas import GATES, TEACHER
from storage.store import Run, part, round_slot
from tasks.engines.base import Sampling
from tasks.engines.pool import make_room
from tasks.gates.gate import Gate, limit_figure, prefix_name, require
from tasks.gates.round import draw_samples, engine_gates, lead_gate, round_gates
from tasks.models.reference import device_of
from tasks.models.text import side
from tasks.models.weights import count_weights
from tasks.rows.round import Round, Shard
from tasks.running.progress import logger

CODE = 3
CPU = torch.device("cpu")


@task(name="gates", task_run_name="round {round.number} · gates", cache_policy=NO_CACHE)
def check_round(round: Round, shards: tuple[Shard, ...]) -> Artifact:
    """Make `round=…/gates/part-00000`: the figures of a round's rollouts. Raises Stopped where a limit is breached."""
    recipe, limits = round.recipe, round.recipe.gates
    rollouts = [shard.rollouts for shard in shards if shard.rollouts]
    aligned = [shard.aligned for shard in shards if shard.aligned]
    first = round.run.find(round_slot(1, "gates", part(0))) if round.number > 1 else None
    inputs = {
        "stage": "gates",
        "code": CODE,
        "policy": round.student.identity,
        "rollouts": [artifact.digest for artifact in rollouts],
        "aligned": [artifact.digest for artifact in aligned],
        "sampling": recipe.rollout.model_dump(include={"temperature", "top_p", "top_k"}),
        "first": first.digest if first else None,
    }

    def make() -> pa.Table:
        before = dict(zip(*(read_table(first, ["gate", "value"]).to_pydict().values()), strict=True)) if first else {}
        names = [teacher.name for teacher in recipe.teachers]
        gates = round_gates(rollouts, aligned, side(round.student).vocabulary.size, limits, before.get("tokens"), names)
        for device in {CPU, device_of(round.student)}:
            make_room(device, 4 * count_weights(round.student))  # for the trainer's model, in float32
        gates += engine_gates(round.student, draw_samples(rollouts), Sampling.of(recipe.rollout), limits)
        return pa.Table.from_pylist([{**asdict(gate), "gate": gate.name, "round": round.number} for gate in gates], GATES)

    artifact = round.run.build_table(round.slot("gates", shards[0]), inputs, make, logger.info)
    require(read_gates(read_table(artifact), limits), f"{round.run.path}, round {round.number}")
    return artifact


def check_lead(recipe: Recipe, *, teachers: Mapping[str, Artifact], student: Artifact) -> None:
    """Raise Stopped where, by the evaluations before any training, a teacher is surely below the lead that is required.

    Each of several `teachers` is held against the student on its own rows.
    """
    gates, students = [], read_table(student)
    for name, view in recipe.by_teacher().items():
        own = students.filter(pc.equal(students[TEACHER], name)) if name else students
        about = describe_teacher(recipe.student, view.teacher)
        gate = lead_gate(recipe.gates, teacher=read_table(teachers[name]), student=own, about=about)
        gates.append(replace(gate, name=prefix_name(name, gate.name)))
    require(gates, f"{Run(recipe.root, recipe.name).path}, round 0")


def read_gates(table: pa.Table, limits: Gates) -> list[Gate]:
    """The figures of a `gates` table with today's limits, which may have changed since the table was made."""
    rows = table.select(["gate", "value", "detail"]).to_pylist()
    return [limit_figure(row["gate"], row["value"], limits, row["detail"]) for row in rows]
