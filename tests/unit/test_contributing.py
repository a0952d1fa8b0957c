"""What CONTRIBUTING.md says about adding an objective: three pieces of text in a copy of the checkout, and it runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
GUIDE = (CHECKOUT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's packages and property tests with the guide's objective added as it says."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("flows", "tasks", "storage", "configs", "tests"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "kept"))
    config, module, test = re.findall(r"```python\n(.*?)```", GUIDE.split("## To add an objective")[1], re.DOTALL)
    place = folder / "configs/objectives.py"
    text = place.read_text()
    before, after = text.split("if TYPE_CHECKING:\n", 1)
    place.write_text(f"{before}{config}\n\nif TYPE_CHECKING:\n{after}")
    (folder / "tasks/objectives/mse.py").write_text(module)
    (folder / "tests/property/test_objective_mse.py").write_text(test)
    return folder


def python(copy: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_guides_objective_passes_its_own_test(copy: Path) -> None:
    python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/property/test_objective_mse.py")


def test_a_recipe_can_name_it_and_is_told_of_its_signals(copy: Path) -> None:
    code = """
from configs.load import load_recipe
from configs.errors import BadInput
tiny = "tests/recipes/tiny.toml"
print(load_recipe(tiny, ['objective={name="mse"}', "score.signal=sampled"]).objective.scale)
try:
    load_recipe(tiny, ['objective={name="mse", beta=1.0}'])
except BadInput as error:
    print(error)
"""
    found = python(copy, "-c", code).splitlines()
    assert found[0] == "1.0"
    assert "objective.beta: unknown key; known here: name, scale" in found[1]


def test_stages_need_no_other_change(copy: Path) -> None:
    """Rollouts are aligned and trained on under the new objective; nothing outside its three places names it."""
    code = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests/golden")
import cases
cases.KEPT = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as root:
    table = cases.align_rollouts("mse", "topk")(Path(root))
    assert sum(table["units"].to_pylist()) > 0
    cases.pq.write_table(table, Path(root) / "aligned-mse-topk.parquet")
    kept = cases.kept
    cases.kept = lambda name: cases.Artifact(f"{root}/{name}.parquet", "", len(table)) if "mse" in name else kept(name)
    trained = cases.train_round("mse")(Path(root) / "runs")
    print(trained["values"][0].as_py())
"""
    losses = python(copy, "-c", code, str(CHECKOUT / "tests/golden/kept"))
    assert all(float(loss) > 0 for loss in losses.strip()[1:-1].split(","))
    added = {"configs/objectives.py", "tasks/objectives/mse.py", "tests/property/test_objective_mse.py"}
    files = [path for kind in ("*.py", "*.toml") for path in copy.rglob(kind)]
    assert {str(path.relative_to(copy)) for path in files if re.search(r"\bmse\b", path.read_text())} - added <= {
        "tests/unit/test_contributing.py"
    }
