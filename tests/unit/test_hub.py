"""Prompts from data sets of the hub: their rows are in the key, whatever their name; what cannot be loaded is one message."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from configs.errors import BadInput
from configs.prompts import HubPrompts
from configs.schema import Recipe
from storage.artifacts import read_table
from tasks.prompts import make_prompts
from tasks.rows.sources import check_prompts, deal_prompts, digest_source


class Loaded(list):
    """What the package's Dataset is to us: rows, and Arrow tables of some of them at once."""

    def with_format(self, kind: str) -> "Loaded":
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for start in range(0, len(self), batch_size):
            yield pa.Table.from_pylist(self[start : start + batch_size])


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """Stands for the package, so that no test needs it or a network: data sets by name, or the error that loading raises."""
    found: dict[str, Any] = {}

    class DatasetsError(Exception):
        pass

    def load_dataset(name: str, subset: str | None, split: str) -> Loaded:
        if isinstance(found[name], Exception):
            raise found[name]
        return Loaded(found[name])

    package, exceptions = ModuleType("datasets"), ModuleType("datasets.exceptions")
    package.load_dataset, exceptions.DatasetsError = load_dataset, DatasetsError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)
    return found


def rows_of(answer: str) -> list[dict[str, str]]:
    return [{"question": f"q{number}", "answer": answer} for number in range(8)]


def test_the_same_name_with_other_rows_is_another_source(hub):
    config = HubPrompts(source="hub", dataset="a/b", eval=2)
    hub["a/b"] = rows_of("old")
    before = digest_source(config)
    assert before == digest_source(config)
    hub["a/b"] = rows_of("new")
    assert digest_source(config) != before
    assert {row.reference for row in deal_prompts(config, 0).train} == {"new"}


def test_rows_of_every_batch_count(hub, monkeypatch):
    monkeypatch.setattr("tasks.rows.hub.BATCH", 3)
    config, digests = HubPrompts(source="hub", dataset="a/b"), set()
    for changed in (None, 0, 4, 7):
        hub["a/b"] = rows_of("old")
        if changed is not None:
            hub["a/b"][changed]["answer"] = "new"
        digests.update(digest_source(config))
    assert len(digests) == 4


def test_another_name_with_the_same_rows_has_the_same_digest(hub):
    hub["a/b"] = hub["c/d"] = rows_of("a")
    one, two = (digest_source(HubPrompts(source="hub", dataset=name)) for name in ("a/b", "c/d"))
    assert one == two


def test_rows_that_changed_are_checked_again(hub):
    config = HubPrompts(source="hub", dataset="a/b", eval=2)
    hub["a/b"] = rows_of("right")
    check_prompts(config, 0)
    hub["a/b"] = [*rows_of("right"), {"question": "", "answer": "b"}]
    with pytest.raises(BadInput, match="a/b: row 9: `question` is empty"):
        check_prompts(config, 0)


@pytest.mark.parametrize("kind", ["DatasetsError", "OSError", "ValueError"])
def test_what_cannot_be_loaded(hub, kind):
    own = sys.modules["datasets.exceptions"].DatasetsError  # type: ignore[attr-defined]
    error = {"DatasetsError": own, "OSError": OSError, "ValueError": ValueError}[kind]("no\nsuch split")
    hub["a/b"] = error
    with pytest.raises(BadInput) as caught:
        check_prompts(HubPrompts(source="hub", dataset="a/b"), 0)
    assert str(caught.value).startswith("prompts.dataset: a/b cannot be loaded: no such split; give a data set of the hub")
    assert "\n" not in str(caught.value)


def test_the_package_itself(tmp_path: Path, monkeypatch):
    """A folder as the hub holds them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    config = HubPrompts(source="hub", dataset=str(tmp_path / "set"), eval=2)
    (tmp_path / "set").mkdir()
    digests = []
    for answer in ("old", "new", "old"):
        (tmp_path / "set" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(answer)))
        digests.append(digest_source(config))
        assert {row.reference for row in deal_prompts(config, 0).train} == {answer}
    assert digests[0] == digests[2] != digests[1]
    (tmp_path / "set" / "data.jsonl").write_text('{"question": ')
    with pytest.raises(BadInput, match=r"cannot be loaded: .*give a data set"):
        check_prompts(config, 0)


def test_other_rows_under_one_name_take_over_no_old_work(hub, tmp_path):
    """The stage makes its tables anew in the same run, and takes none over from another."""
    recipe = Recipe.model_validate(
        {
            "name": "one",
            "root": str(tmp_path),
            "student": {"model": "m"},
            "prompts": {"source": "hub", "dataset": "a/b", "eval": 2},
            "rollout": {"on_policy": 0.0},
            "objective": {"name": "sft"},
        }
    )
    hub["a/b"] = rows_of("old")
    before = make_prompts.fn(recipe).train
    assert make_prompts.fn(recipe).train == before
    hub["a/b"] = rows_of("new")
    for name in ("one", "two"):
        after = make_prompts.fn(recipe.model_copy(update={"name": name})).train
        assert set(read_table(after)["reference"].to_pylist()) == {"new"}
