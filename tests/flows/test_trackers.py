"""`[track]`: what trackers have after a run is what its tables say, each figure once."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from helpers import files, refused

from configs.errors import BadInput
from configs.load import list_differences, load_recipe
from configs.schema import Recipe
from flows.track import FILE, Trackers, check_trackers, follow
from storage.read import scan
from storage.store import Run

# The trackers' own folders are where the environment says, as they read it when they are imported.
COMMAND = """
import os, sys
os.environ |= {"TRACKIO_DIR": sys.argv[1], "WANDB_DIR": sys.argv[1], "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
sys.argv = ["potstill", "run", *sys.argv[2:]]
from flows.cli import main
main()
"""


def tensorboard_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a wandb file: LevelDB's log behind seven bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def wandb_of(folder: Path) -> tuple[list[Any], dict[str, list[tuple[int, float]]]]:
    """The runs' records, and (step, value) by name, of all offline runs of a folder."""
    from wandb.proto import wandb_internal_pb2

    runs, figures = [], {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records_of(file):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    value = json.loads(item.value_json)
                    figures.setdefault(item.key or "/".join(item.nested_key), []).append((record.history.step.num, value))
    return runs, figures


def expected(run: Path, rounds: int) -> dict[str, list[tuple[int, float]]]:
    """Some figures, each computed from the tables here."""
    steps = scan(str(run), "steps").filter(pl.col("round") <= rounds).sort("step").collect()
    last = {0: 0, **dict(steps.group_by("round").agg(pl.col("step").max()).iter_rows())}
    evals = scan(str(run), "evals").filter(pl.col("round") <= rounds, decoding="greedy").collect()
    right = evals.group_by("model", "round").agg(pl.col("correct").mean()).sort("round")
    gates = scan(str(run), "gates").filter(pl.col("round") <= rounds, gate="engine, mean").sort("round").collect()
    return {
        "train/loss": list(steps.select("step", "loss").iter_rows()),
        "train/tokens": list(steps.select("step", "tokens").iter_rows()),
        "student/greedy": [
            (last[n], value) for n, value in right.filter(model="student").select("round", "correct").iter_rows()
        ],
        "teacher/greedy": [(0, right.filter(model="teacher")["correct"][0])],
        "gates/engine_mean": [(last[n], value) for n, value in gates.select("round", "value").iter_rows()],
        "round": [(last[n], n) for n in range(rounds + 1)],
    }


def same(found: dict[str, list[tuple[int, float]]], run: Path, rounds: int) -> None:
    for name, wanted in expected(run, rounds).items():
        assert [step for step, _ in found[name]] == [step for step, _ in wanted], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in wanted], rel=1e-6, abs=1e-9), name


def test_a_run_and_the_same_again(potstill, recipe, tmp_path, monkeypatch):
    """Two rounds in two commands, then none: three trackers have each figure once, and are not touched by the third."""
    home = tmp_path / "home"
    home.mkdir()
    path = recipe(track={"with": ["tensorboard", "trackio", "wandb"], "project": "our-students"}, name="followed")
    run = tmp_path / "runs" / "followed"
    for rounds in (1, 2):
        ended = potstill("-c", COMMAND, home, path, "--rounds", rounds)
        assert ended.status == 0, ended.err
        assert "track.with" not in ended.err
    board = tensorboard_of(run / "tensorboard")
    same(board, run, 2)
    assert len(list(run.glob("tensorboard/*/hparams.yml"))) == 1

    runs, figures = wandb_of(home)
    same(figures, run, 2)
    assert {(r.run_id, r.display_name, r.project) for r in runs} == {(runs[0].run_id, "followed", "our-students")}

    monkeypatch.setenv("TRACKIO_DIR", str(home))
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", home)
    logs = sqlite_storage.SQLiteStorage.get_logs("our-students", "followed")
    found: dict[str, list[tuple[int, float]]] = {}
    for log in logs:
        for name in log.keys() - {"step", "timestamp"}:
            found.setdefault(name, []).append((log["step"], log[name]))
    same(found, run, 2)
    assert sqlite_storage.SQLiteStorage.get_run_config("our-students", "followed")["train.batch_size"] == 16

    before = files(run) | files(home)
    ended = potstill("-c", COMMAND, home, path)
    assert ended.status == 0, ended.err
    after = files(run) | files(home)
    assert {name for name in after if after[name] != before.get(name)} <= {"_tmp/lock"}


@pytest.fixture
def followed(tiny, tmp_path) -> tuple[Run, Recipe]:
    """A copy of a finished run that no tracker has followed, and its recipe with TensorBoard."""
    shutil.copytree(tiny, tmp_path / "tiny")
    recipe = load_recipe(tiny / "run.toml", [f"root={tmp_path}", 'track.with=["tensorboard"]'])
    return Run(str(tmp_path), "tiny"), recipe


def test_a_tracker_that_comes_later_gets_what_was_before(followed):
    run, recipe = followed
    with follow(run, recipe) as trackers:
        trackers.send(1)
    same(tensorboard_of(Path(run.path) / "tensorboard"), Path(run.path), 1)
    with follow(run, recipe) as trackers:
        trackers.send(2)
        assert list(trackers.started) == ["tensorboard"]
    same(tensorboard_of(Path(run.path) / "tensorboard"), Path(run.path), 2)
    with follow(run, recipe) as trackers:
        trackers.send(2)
        assert trackers.started == {}


class Failing(GeneralTracker):
    """Takes one figure and then fails, until it is told to work."""

    name, requires_logging_directory, works, had = "wandb", False, False, []
    tracker = None

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert all(isinstance(value, str | int | float) for value in values.values())

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if not Failing.works and step:
            raise ConnectionError("no route to host")
        Failing.had.append(step)


def test_a_tracker_that_fails_does_not_end_the_run(followed, monkeypatch, caplog):
    """It is said in a line, and what it does not have is sent when the run goes on."""
    run, recipe = followed
    recipe = recipe.model_copy(update={"track": type(recipe.track)(**{"with": ("wandb",)})})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr("tasks.running.progress.logger.propagate", True)
    with follow(run, recipe) as trackers:
        trackers.send(2)
    assert "track.with: wandb: ConnectionError: no route to host" in caplog.text
    assert Trackers(run, recipe).sent == {"wandb": 0}
    assert not Trackers(run, recipe).have(2)  # so that a complete run asked for again is looked at
    Failing.works, Failing.had = True, []
    with follow(run, recipe) as trackers:
        trackers.send(2)
    steps = scan(run.address, "steps").sort("step").collect()
    wanted = [step for _, some in steps.group_by("round", maintain_order=True) for step in [*some["step"], some["step"].max()]]
    assert Failing.had == wanted


def test_what_was_sent_is_not_known(followed):
    run, recipe = followed
    run.write_text("track.json", "{")
    with pytest.raises(Exception, match=r"track.json: not what was written there; remove it"):
        Trackers(run, recipe)


@pytest.mark.parametrize("text", ["[]", "null", "{", "\x00", '{"sent": []}', '{"sent": {"tensorboard": "x"}}', '{"id": 5}'])
def test_a_note_that_lies(recipe, tmp_path, text):
    run = Run(str(tmp_path), "a")
    run.write_text(FILE, text)
    with pytest.raises(BadInput, match=r"track\.json: not what was written there; remove it"):
        Trackers(run, load_recipe(recipe()))


def test_a_tracker_that_is_not_installed_is_refused_by_name(potstill, recipe, monkeypatch):
    path = recipe(track={"with": ["tensorboard", "clearml", "comet_ml"]})
    refused(potstill("run", path), "track.with: clearml, comet_ml: not installed: pip install clearml comet-ml")
    refused(potstill("run", path, "--set", 'track.with=["tensorbord"]'), "track.with.0", "'tensorboard'")
    assert not (path.parent / "runs").exists()
    monkeypatch.setattr("flows.track.find_spec", lambda _: None)
    with pytest.raises(Exception, match=r"pip install -e '.\[trackers\]' clearml comet-ml"):
        check_trackers(load_recipe(path))


def test_tensorboard_needs_a_disk(recipe):
    path = recipe(track={"with": ["tensorboard"]}, root="memory://runs")
    with pytest.raises(Exception, match="tensorboard writes to a local disk, and root is memory://runs"):
        check_trackers(load_recipe(path))


def test_trackers_may_change_while_a_run_goes_on(recipe):
    path = recipe()
    assert list_differences(load_recipe(path), load_recipe(path, ['track.with=["wandb"]', "track.project=x"])) == []
    assert load_recipe(path, ['track.with=["wandb"]']).track.names == ("wandb",)
