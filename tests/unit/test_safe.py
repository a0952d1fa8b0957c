"""Safe by default: names stay under the root, no secret reaches the disk, no pickle and no foreign code is run."""

import ast
import json
from pathlib import Path

import pytest
import torch

from configs.errors import BadInput
from configs.load import load_recipe
from configs.models import Model, Scratch
from tasks.models.reference import make_reference
from tasks.models.text import Side
from tasks.models.weights import check_weights, load_weights
from tasks.scratch import init_model, train_tokenizer

CHECKOUT = Path(__file__).parents[2]
TINY = CHECKOUT / "tests" / "recipes" / "tiny.toml"
FILES = sorted(path for package in ("configs", "storage", "tasks", "flows") for path in (CHECKOUT / package).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", "", "a\\nb", "-x", "_tmp", ".x", "a" * 101, "a\x00", "~"])
def test_names_cannot_leave_the_root(name):
    with pytest.raises(BadInput, match="name"):
        load_recipe(TINY, [f"name={name!r}"])


@pytest.mark.parametrize("root", ["s3://AKIA:s3cr3t@bucket/runs", "https://user:s3cr3t@host/runs", "ftp://s3cr3t@host/x"])
def test_secrets_in_a_uri_are_refused_and_not_repeated(root):
    with pytest.raises(BadInput, match="root: a user or key in the URI") as caught:
        load_recipe(TINY, [f"root={root!r}"])
    assert "s3cr3t" not in str(caught.value)
    assert load_recipe(TINY, ["root=s3://bucket/runs"]).root == "s3://bucket/runs"


@pytest.mark.parametrize(
    "url", ["http://user:s3cr3t@host:8000", "https://s3cr3t@host", "http://host:8000/?key=s3cr3t", "http://h/v1?token=s3cr3t"]
)
def test_secrets_in_a_servers_address_are_refused_and_not_repeated(url):
    with pytest.raises(BadInput, match=r"teacher\.urls\.0: a user or key .* set VLLM_API_KEY") as caught:
        load_recipe(TINY, ["teacher.engine=server", f"teacher.urls=[{url!r}]"])
    assert "s3cr3t" not in str(caught.value)


def test_a_secret_in_the_query_of_a_root_is_refused_and_not_repeated():
    with pytest.raises(BadInput, match="root: a user or key in the URI") as caught:
        load_recipe(TINY, ["root=s3://bucket/runs?key=s3cr3t"])
    assert "s3cr3t" not in str(caught.value)


# -- pickles and foreign code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_pickle_is_written_or_read(path):
    """Nor anything that would be one inside: torch.save, numpy's object arrays; weights are safetensors."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & PICKLING
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in PICKLING
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            given = {word.arg: word.value for word in node.keywords}
            assert (owner, node.func.attr) not in {("torch", "load"), ("torch", "save")}
            assert "allow_pickle" not in given
            if (owner, node.func.attr) == ("AutoModelForCausalLM", "from_pretrained"):
                assert "gguf_file" in given or ast.unparse(given["use_safetensors"]) == "True"


@pytest.fixture
def model(tmp_path) -> Path:
    shape = Scratch(vocab_size=300, layers=1, width=16, heads=2, feed_forward=16, context=64)
    tokenizer = train_tokenizer(shape, ["some words"])
    tokenizer.save_pretrained(tmp_path / "model")
    init_model(shape, tokenizer, 0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_pickled_weights_are_not_opened(model, tmp_path):
    (model / "model.safetensors").unlink()
    torch.save({"x": Trap(tmp_path / "sprung")}, model / "pytorch_model.bin")
    ref = make_reference(Model(model=str(model)), str(model))
    with pytest.raises(BadInput, match=r"no \*\.safetensors in it"):
        check_weights(ref)
    with pytest.raises(BadInput, match="safetensors"):
        load_weights(ref)
    assert not (tmp_path / "sprung").exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()  # the premise


@pytest.fixture
def foreign(model, tmp_path, monkeypatch) -> Path:
    """The model with code of its own, which makes a file when it is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()\n"
    (model / "own.py").write_text(
        trap + "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'foreign'\n"
    )
    return model


def test_foreign_code_is_not_run(foreign, tmp_path):
    ref = make_reference(Model(model=str(foreign)), str(foreign))
    for load_it in (check_weights, load_weights):  # before anything is written, and whatever was checked
        with pytest.raises(BadInput, match=f"{foreign}: the model needs code of its own; set trust_remote_code = true"):
            load_it(ref)
    Side(ref)  # the tokenizer is an ordinary one
    assert not (tmp_path / "sprung").exists()


def test_foreign_code_is_run_where_the_recipe_says_so(foreign, tmp_path):
    """The premise of the test above."""
    assert Side(make_reference(Model(model=str(foreign), trust_remote_code=True), str(foreign))).rows
    assert (tmp_path / "sprung").exists()
