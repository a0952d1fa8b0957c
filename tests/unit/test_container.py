"""The Dockerfile against the pages and the Makefile: its commands are those that the README has."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from flows.commands import app

CHECKOUT = Path(__file__).parents[2]
DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()
IGNORED = (CHECKOUT / ".dockerignore").read_text().split()
MAKEFILE = (CHECKOUT / "Makefile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, the rest) of each line, comments left out and continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


STEPS = instructions(DOCKERFILE)


def of(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def first_command(page: str) -> list[str]:
    """The first line of the first bash block of a page."""
    block = re.search(r"```bash\n(.*?)```", (CHECKOUT / page).read_text(), re.DOTALL)
    assert block
    return shlex.split(block[1].splitlines()[0], comments=True)


def runs(page: str) -> list[list[str]]:
    """The words behind the image's name of each `docker run` of a page."""
    lines = [
        shlex.split(line, comments=True)
        for line in (CHECKOUT / page).read_text().splitlines()
        if line.startswith("docker run ")
    ]
    images = [next(i for i, word in enumerate(line) if word == "potstill" and line[i - 1] != "-v") for line in lines]
    return [line[at + 1 :] for line, at in zip(lines, images, strict=True)]


def test_what_it_runs_is_the_quickstart():
    (command,) = of("CMD")
    assert first_command("README.md") == ["make", "demo"] == eval(command)
    assert re.search(r"^demo:", MAKEFILE, re.MULTILINE)


def test_the_other_command_is_one_of_the_readme():
    default, given = runs("flows/README.md")
    assert default == []
    assert f"{shlex.join(given)}  " in (CHECKOUT / "README.md").read_text()
    assert given[0] == "potstill"
    app.parse_args(given[1:], print_error=False, exit_on_error=False)
    assert any("/potstill/.venv/bin" in rest for rest in of("ENV"))


def test_arguments_are_those_of_the_page():
    page = (CHECKOUT / "flows" / "README.md").read_text().split("| build argument |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([A-Z_]+)`", page))
    arguments = dict([*rest.split("=", 1), ""][:2] for rest in of("ARG"))
    assert named == arguments.keys() - {"PIP_NO_CACHE_DIR"}
    for name in ("EXTRAS", "BASE"):
        assert f"| `{name}` | `{arguments[name]}` |" in page
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(arguments["EXTRAS"].split(",")) <= extras.keys()


def test_targets_are_those_of_the_makefile():
    for rest in of("RUN"):
        for target in re.findall(r"\bmake (\S+)", rest):
            if target != "&&":
                assert re.search(rf"^{re.escape(target)}:", MAKEFILE.replace("$(VENV)", ".venv"), re.MULTILINE), target


def test_packages_that_come_as_source_can_be_built():
    """pycosat has no wheel for Linux: a slim image lacks the compiler."""
    assert "pycosat==" in (CHECKOUT / "constraints.txt").read_text()
    assert {"gcc", "libc6-dev"} <= set(of("RUN")[0].split())


def test_what_is_copied_is_there():
    """Everything that an install needs, and nothing that git ignores or that a run leaves."""
    kept = {pattern[1:] for pattern in IGNORED if pattern.startswith("!")}
    assert IGNORED[0] == "*"
    assert all((CHECKOUT / name).exists() for name in kept)
    for rest in of("COPY"):
        for source in rest.split()[:-1]:
            assert source == "." or source in kept, source
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*packages, project["project"]["readme"], *project["project"]["license-files"]} <= kept
    made = next(rest for rest in of("RUN") if "mkdir configs" in rest)
    assert all(f" {name}/__init__.py" in made for name in packages)  # an editable install leaves out empty folders


def test_nothing_secret_or_heavy_is_sent():
    tracked = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("no git checkout")
    kept = [pattern[1:] for pattern in IGNORED if pattern.startswith("!")]
    assert not [name for name in kept if not any(fnmatch.fnmatch(path.split("/")[0], name) for path in tracked)]


def test_it_is_nobody_in_particular_and_names_no_host():
    assert of("USER")[-1].isdigit()
    assert int(of("USER")[-1]) > 0
    assert "://" not in DOCKERFILE
    assert not re.search(r"\b[\w-]+\.(org|com|io|net)\b", DOCKERFILE)
    layers = [name for name, _ in STEPS if name in ("RUN", "COPY")]
    assert layers.index("COPY") < layers.index("RUN", 1) < len(layers) - 1 - layers[::-1].index("COPY")  # packages, then code


def test_the_parser_of_this_file():
    assert instructions("# a\nRUN x \\\n  && y\n\nCMD z\n") == [("RUN", "x    && y"), ("CMD", "z")]
