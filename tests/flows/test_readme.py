"""What the documentation says holds, as it is written there: queries, tables, links, recipes and command lines."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
from cyclopts import CycloptsError
from helpers import CHECKOUT
from pydantic import BaseModel

from configs.load import load_recipe
from configs.objectives import OBJECTIVES
from configs.schema import Recipe
from configs.signals import SIGNALS
from flows.commands import app

MOST_WORDS = 1400
README = (CHECKOUT / "README.md").read_text()
NOT_OURS = {"runs", "models", "dist", "build"}  # what git ignores, beside hidden folders
TOPS = [top for top in CHECKOUT.iterdir() if top.is_dir() and not top.name.startswith(".") and top.name not in NOT_OURS]
PAGES = sorted([*CHECKOUT.glob("*.md"), *(path for top in TOPS for path in top.rglob("*.md"))])
NAMES = {path: str(path.relative_to(CHECKOUT)) for path in PAGES}
WHOLE = {"name", "student", "prompts", "objective"}  # what a recipe has that is more than a part of one


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    """A page without its code, in blocks and in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE))


def links(page: str) -> list[str]:
    """Where the links and images of a page lead, other sites left out."""
    targets = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> Iterator[list[str]]:
    """The words after `potstill` of each line of a page's bash blocks that calls it."""
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "potstill":
                yield words[1:]


def declared(field: str) -> list[str]:
    """The values that a field of a recipe may have."""
    return list({"Objectives": OBJECTIVES, "Signals": SIGNALS}[field])


def modules(folder: str) -> set[str]:
    """The modules that lie directly in a folder."""
    return {path.stem for path in (CHECKOUT / folder).glob("*.py")} - {"__init__"}


def tables_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from tables_of(part)


def unknown(data: dict[str, Any], models: list[type[BaseModel]], place: str = "") -> list[str]:
    """The keys of a part of a recipe that no model which could stand there has."""
    found = []
    for key, value in data.items():
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        if not fields:
            found.append(place + key)
        inner = [table for field in fields for table in tables_of(field.annotation)]
        if isinstance(value, dict) and inner:
            found += unknown(value, inner, f"{place}{key}.")
    return found


def evaluate(block: str, scope: dict) -> pl.DataFrame:
    """The value of a block's last expression, as a notebook shows it."""
    *statements, last = re.split(r"\n(?=\(\n)", block)
    exec("\n".join(statements), scope)
    return eval(last.strip(), scope)


def test_queries_of_the_readme(tiny, tmp_path, monkeypatch):
    """Both queries run on a finished run, one after the other as in a notebook, and answer what their captions promise."""
    (tmp_path / "runs").symlink_to(tiny.parent)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    by_round, largest = blocks(README, "python")

    frame = evaluate(by_round, scope)
    rounds = frame.filter((pl.col("run") == "tiny") & (pl.col("model") == "student") & (pl.col("decoding") == "greedy"))
    assert rounds["round"].to_list() == [0, 1, 2]
    assert frame["accuracy"].is_between(0, 1).all()

    frame = evaluate(largest.replace("quickstart-seed0", "tiny"), scope)
    assert frame.height == 10
    assert frame["divergence"].is_sorted(descending=True)
    assert frame["reference"].null_count() == 0


def test_the_readme_is_short():
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("section", ["Objectives", "Signals"])
def test_the_tables_of_objectives_and_signals_have_those_there_are(section):
    table = (CHECKOUT / "configs" / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)`[^|]*\|", table, re.MULTILINE)) == sorted(declared(section))


def test_the_design_names_the_flows_stages_and_folders_that_there_are():
    layout = (CHECKOUT / "flows" / "DESIGN.md").read_text().split("\n## 2. ")[1].split("```")[1]
    of_flows, of_tasks = layout.split("\ntasks/")[0], layout.split("\ntasks/")[1].split("\nstorage/")[0]
    stages, folders = of_tasks.split("\n  models/")[0], set(re.findall(r"^  (\w+)/", of_tasks, re.MULTILINE))
    assert set(re.findall(r"(\w+)\.py", of_flows)) == modules("flows")
    assert {name for name in modules("tasks") if not re.search(rf"\b{name}\b", stages)} == set()
    assert folders == {path.parent.name for path in (CHECKOUT / "tasks").glob("*/__init__.py")}


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_links_lead_somewhere(path):
    """Files and folders that are there, and headings that are in them."""
    for link in links(path.read_text()):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_recipes_load(path, tmp_path):
    """A whole recipe is one, its models unseen; a part of one is TOML with keys that a recipe may have."""
    for number, block in enumerate(blocks(path.read_text(), "toml")):
        data = tomllib.loads(block)
        assert unknown(data, [Recipe]) == [], block
        if data.keys() >= WHOLE:
            file = tmp_path / f"{number}.toml"
            file.write_text(block)
            assert load_recipe(file).name == data["name"]


@pytest.mark.parametrize("path", PAGES, ids=NAMES.get)
def test_commands_parse(path):
    """Each command line has a sub-command that there is, with its arguments and options."""
    for words in commands(path.read_text()):
        try:
            app.parse_args(words, print_error=False, exit_on_error=False)
        except CycloptsError as error:
            pytest.fail(f"potstill {shlex.join(words)}: {error}")


def test_what_the_tests_of_pages_look_for():
    """The helpers themselves: they find what is there, and what is wrong with it."""
    page = "# A `b` c\n[x](y.md#a-b-c) ![p](q.svg) [s](https://t) `[no](code)`\n```bash\npotstill run x --set a=b  # why\n```\n"
    assert links(page) == ["y.md#a-b-c", "q.svg"]
    assert anchors(page) == {"a-b-c"}
    assert list(commands(page)) == [["run", "x", "--set", "a=b"]]
    part = {"rounds": 1, "prompts": {"path": "x", "place": "y"}, "train": {"rate": 1}, "other": {}}
    assert unknown(part, [Recipe]) == ["prompts.place", "train.rate", "other"]
    with pytest.raises(CycloptsError):
        app.parse_args(["run", "recipe.toml", "--round", "3"], print_error=False, exit_on_error=False)
    assert [NAMES[path] for path in PAGES if "```toml" in path.read_text()][:2] == ["README.md", "configs/README.md"]
    assert len(list(commands(README))) > 10
