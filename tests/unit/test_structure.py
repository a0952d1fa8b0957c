"""DESIGN.md §2: what each folder may know. Read from the source, so that a wrong import is found before it runs."""

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

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
    ("configs/load.py", "load"),
    *(("tasks/engines/vllm.py", function) for function in ("__init__", "ask", "_last_words")),
    *(("tasks/engines/vllm_child.py", function) for function in ("_read", "_write")),
    ("tasks/processes.py", "launch"),
    ("tasks/processes.py", "main"),
    ("tasks/prompts.py", "read_rows"),
    ("tasks/signals.py", "make"),
    ("tasks/signals.py", "read_head"),
    ("tasks/train.py", "_save"),
    ("tasks/train.py", "_restore"),
}
FROM_STORAGE = {"read_table", "write_parquet"}  # functions of storage.artifacts that carry a library's name
THROUGH_A_RUN = {("tasks/report.py", "write_report")}  # which asks storage's Run for it


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
    name = ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")
    assert importlib.import_module(name).__doc__, "a module says what it is for"


def test_every_package_is_installed():
    """A folder that pyproject.toml does not name is missing from an installed copy."""
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["packages"]) == {path.relative_to(CHECKOUT).parts[0] for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_modules_are_short(path):
    """A module past about 300 lines has two jobs."""
    assert len(path.read_text().splitlines()) <= 320
