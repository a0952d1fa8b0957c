"""DESIGN.md §2: what each folder may know. Read from the source, so that a wrong import is found before it runs."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from configs.objectives import OBJECTIVES
from configs.signals import SIGNALS
from storage.schemas import SCORES
from tasks.objectives.base import ObjectiveModule
from tasks.signals import make_signal
from tasks.signals.base import Signal

CHECKOUT = Path(__file__).parents[2]
PACKAGES = ("configs", "storage", "tasks", "flows")
FILES = sorted(path for package in PACKAGES for path in (CHECKOUT / package).rglob("*.py"))
NAMES = {path: str(path.relative_to(CHECKOUT)) for path in FILES}

MAY_IMPORT = {
    "configs": set(),
    "storage": {"configs"},
    "tasks": {"configs", "storage"},
    "flows": {"configs", "storage", "tasks"},
}

OPENERS = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "cat_file", "url_to_fs"}
OPENERS |= {"read_parquet", "scan_parquet", "write_parquet", "sink_parquet", "read_table", "write_table", "ParquetFile"}
OPENERS |= {"memory_map", "new_file", "open_file"}
OPENERS |= {"read_ndjson", "scan_ndjson", "read_csv", "load_file", "save_file", "safe_open", "memmap", "mkdir", "makedirs"}
# (module, function) -> what it opens: recipes and prompt files, which are not a run's, and the inside of folders
# that storage hands out and commits (Run.build_files, storage.artifacts.local_folder), in model libraries' own formats,
# and what passes between this process and vLLM's.
MAY_OPEN = {
    ("configs/load.py", "load_recipe"),
    ("flows/starter.py", "write_recipe"),
    ("flows/__init__.py", "_has_place"),  # Prefect's own
    ("flows/ending.py", "_say"),  # the null device
    *(("tasks/engines/vllm.py", function) for function in ("__init__", "ask", "_last_words")),
    *(("tasks/engines/vllm_child.py", function) for function in ("_read", "_write")),
    ("tasks/rows/files.py", "_read_parquet"),
    ("tasks/rows/files.py", "_read_text"),
    ("tasks/models/reference.py", "read_template"),
    ("tasks/models/weights.py", "check_weights"),
    ("tasks/signals/head.py", "save_head"),
    ("tasks/signals/head.py", "read_head"),
    ("tasks/training/processes.py", "launch"),
    ("tasks/training/processes.py", "main"),
    ("tasks/training/state.py", "write"),
    ("tasks/training/state.py", "restore"),
}
FROM_STORAGE = {"read_table", "write_parquet"}  # functions of storage.artifacts that carry a library's name
THROUGH_A_RUN = {
    ("tasks/views/report.py", "write_report"),
    ("tasks/views/card.py", "write_card"),
    *(("flows/track.py", function) for function in ("__init__", "_send")),
}  # which asks storage's Run for it


def imported(tree: ast.AST) -> set[str]:
    """The dotted names of all modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def modules_of(path: Path) -> set[str]:
    """The project's modules that a file imports; of `from package import module` the module alone."""
    names = imported(ast.parse(path.read_text())) & MODULES.keys()
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def room(module: str) -> str:
    """The folder that a module lies in."""
    return module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that follow one another in a circle, the first one again at the end; empty where there is none."""
    done: set[str] = set()

    def follow(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(graph.get(name, ())) if (c := follow(other, [*trail, name]))), [])
        done.add(name)
        return found

    return next((found for name in sorted(graph) if (found := follow(name, []))), [])


def opened(tree: ast.Module) -> list[tuple[str, str]]:
    """(enclosing function, call) of every call that opens or makes a file."""
    own = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "storage.artifacts"
        for alias in node.names
    }
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            through_storage = isinstance(node.func, ast.Name) and name in own & FROM_STORAGE
            if name in OPENERS and not through_storage:
                found.append((function, name))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(tree, "")
    return found


def test_the_walk_sees_what_it_looks_for():
    """The helpers themselves: nested imports, aliases, calls by attribute and by name."""
    tree = ast.parse("import a.b as c\ndef f():\n    from d.e import g\n    with open(x) as h:\n        p.read_text()\n")
    assert imported(tree) == {"a.b", "d.e", "d.e.g"}
    assert opened(tree) == [("f", "open"), ("f", "read_text")]
    mine = "from storage.artifacts import read_table\nread_table(x)\npq.read_table(x)\n"
    assert opened(ast.parse(mine)) == [("", "read_table")]
    assert {path.parent.name for path in FILES} >= {"flows", "tasks", "storage", "configs", "engines", "tokens", "objectives"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_imports_run_one_way(path):
    package = path.relative_to(CHECKOUT).parts[0]
    others = tops(path) & set(PACKAGES) - {package}
    assert others <= MAY_IMPORT[package]


def test_no_module_is_in_a_circle():
    """Imports inside functions count: a circle that is not seen when modules load is one for the reader all the same."""
    assert circle({module: modules_of(path) - {module} for module, path in MODULES.items()}) == []


def test_no_folder_is_in_a_circle():
    """The stages at the door of `tasks` are one room, each folder is another."""
    rooms: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        rooms.setdefault(room(module), set()).update(map(room, modules_of(path)))
    assert circle({name: others - {name} for name, others in rooms.items()}) == []


def test_the_search_for_circles_finds_them():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert room("tasks.align") == room("tasks") == "tasks"
    assert room("tasks.views.report") == "tasks.views"


@pytest.mark.parametrize("path", sorted((CHECKOUT / "tasks").rglob("*.py")), ids=NAMES.get)
def test_nothing_in_tasks_imports_a_stage(path):
    """A stage is called by a flow, by nothing below it; those that are a round in small call the cores of others."""
    stages = {module for module in modules_of(path) if room(module) == "tasks" and module != "tasks"}
    small = {"held_out.py": {"tasks.align", "tasks.rollout"}}
    small["preflight.py"] = small["held_out.py"] | {"tasks.completions", "tasks.evaluate", "tasks.score"}
    assert stages == small.get(path.name, set())


@pytest.mark.parametrize("path", sorted((CHECKOUT / "tasks").glob("[a-z]*.py")), ids=NAMES.get)
def test_a_file_at_the_door_of_tasks_is_a_stage(path):
    decorated = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef) and n.decorator_list]
    assert any(getattr(d, "func", d).id == "task" for n in decorated for d in n.decorator_list if isinstance(d, ast.Call))


@pytest.mark.parametrize("path", sorted((CHECKOUT / "tasks/views").rglob("*.py")), ids=NAMES.get)
def test_views_know_no_engine_objective_or_training(path):
    assert not {room(module) for module in modules_of(path)} & {"tasks.engines", "tasks.objectives", "tasks.training"}


def test_an_objective_is_a_file_a_config_class_and_a_test():
    """Nothing else enumerates them: `tasks.objectives.build` finds the file by the name, the class by the config's."""
    shared = {"__init__", "base", "classes", "divergences", "pairing", "sampled"}
    files = {path.stem for path in (CHECKOUT / "tasks/objectives").glob("*.py")} - shared
    assert files == set(OBJECTIVES)
    for name, config in OBJECTIVES.items():
        module = importlib.import_module(f"tasks.objectives.{name}")
        assert issubclass(getattr(module, f"{config.__name__}Objective"), ObjectiveModule)
        assert (CHECKOUT / f"tests/property/test_objective_{name}.py").exists()


def test_a_signal_is_a_file_an_entry_and_columns():
    shared = {"__init__", "base", "head"}
    assert {path.stem for path in (CHECKOUT / "tasks/signals").glob("*.py")} - shared == set(SIGNALS)
    for name, kind in SIGNALS.items():
        signal = make_signal(name)
        assert {*signal.events, *([signal.counts] if signal.counts else [])} <= set(SCORES.names)
        assert kind.gives & {"path"}, "every signal has the log-probs of the tokens that are there"
        assert kind.whole or type(signal).store_top is not Signal.store_top or not signal.events


def test_sections_that_are_cited_exist():
    """A `§` in code, tests or pages names a section of MATHS.md or DESIGN.md."""
    pages = {"MATHS.md": CHECKOUT / "tasks/MATHS.md", "DESIGN.md": CHECKOUT / "flows/DESIGN.md"}
    sections = {name: set(re.findall(r"^## (\d+)\.", page.read_text(), re.MULTILINE)) for name, page in pages.items()}
    folders = [CHECKOUT / name for name in (*PACKAGES, "tests")]
    files = [path for folder in folders for kind in ("*.py", "*.md", "*.toml") for path in folder.rglob(kind)]
    cited = 0
    for path in [*files, *CHECKOUT.glob("*.md")]:
        text = path.read_text()
        for name, number in re.findall(r"(MATHS\.md|DESIGN\.md)\W{0,40}?§ ?(\d+)", text):
            assert number in sections[name], f"{path}: {name} §{number}"
            cited += 1
        if path.suffix == ".py":  # without a page's name it is of MATHS.md
            assert set(re.findall(r"§(\d+)", text)) <= sections["MATHS.md"] | sections["DESIGN.md"], path
    assert cited > 20


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_nothing_imports_the_tests(path):
    assert "tests" not in tops(path)


def outside(*folders: str) -> list[Path]:
    """The modules that are in none of `folders` (those in a folder below one of them are outside)."""
    return [path for path in FILES if str(path.parent.relative_to(CHECKOUT)) not in folders]


@pytest.mark.parametrize("path", outside("flows", "tasks"), ids=NAMES.get)
def test_prefect_is_known_to_flows_and_thin_entries_only(path):
    assert "prefect" not in tops(path)


def test_in_tasks_prefect_is_the_task_decorator_alone():
    """A stage's core is called without Prefect: its modules import the decorator and the cache policy, no client."""
    for path in FILES:
        if path.relative_to(CHECKOUT).parts[0] == "tasks":
            names = {name for name in imported(ast.parse(path.read_text())) if name.startswith("prefect")}
            allowed = {"prefect", "prefect.task", "prefect.cache_policies", "prefect.cache_policies.NO_CACHE"}
            assert names <= allowed, NAMES[path]


@pytest.mark.parametrize("path", outside("tasks/engines"), ids=NAMES.get)
def test_vllm_is_known_to_engines_only(path):
    assert "vllm" not in tops(path)


@pytest.mark.parametrize("path", sorted((CHECKOUT / "flows").rglob("*.py")), ids=NAMES.get)
def test_flows_know_no_tensor_and_no_file_format(path):
    assert not tops(path) & {"torch", "numpy", "pyarrow", "polars", "safetensors", "transformers", "tokenizers"}


@pytest.mark.parametrize("path", outside("storage"), ids=NAMES.get)
def test_only_storage_opens_files(path):
    found = opened(ast.parse(path.read_text()))
    assert [(function, call) for function, call in found if (NAMES[path], function) not in MAY_OPEN | THROUGH_A_RUN] == []


def test_the_exceptions_are_there():
    """An exception whose function is gone is taken off the list."""
    used = {(NAMES[path], function) for path in FILES for function, _ in opened(ast.parse(path.read_text()))}
    assert used >= MAY_OPEN


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_modules_import(path):
    assert importlib.import_module(module_of(path)).__doc__, "a module says what it is for"


def test_every_package_is_installed():
    """A folder that pyproject.toml does not name is missing from an installed copy."""
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["packages"]) == {path.relative_to(CHECKOUT).parts[0] for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_modules_are_short(path):
    """A module past 300 lines has two jobs."""
    assert len(path.read_text().splitlines()) <= 300
