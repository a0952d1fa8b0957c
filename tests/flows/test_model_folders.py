"""Folders of models that are damaged in one place: one message with the folder, the file and what is wrong; nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from helpers import made, refused
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from configs.errors import BadInput
from configs.load import load_recipe
from flows.refuse import check_recipe
from tasks.models.reference import ModelRef
from tasks.models.weights import check_weights, load_weights


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("good") / "model", 300, "olleh dlrow " * 5)


@pytest.fixture
def recipe(good, tmp_path) -> Callable[..., Path]:
    """A recipe that is right, with other models."""

    def write(**models: Any) -> Path:
        data = {
            "name": "folders",
            "root": str(tmp_path / "runs"),
            "student": {"model": str(good)},
            "teacher": {"model": str(good)},
            "prompts": {"source": "reasoning-gym", "task": "spell_backward", "train": 8, "eval": 4},
            "rollout": {"prompts": 4, "max_new_tokens": 4},
            "score": {"k": 8},
            "objective": {"name": "bytes"},
            **models,
        }
        path = tmp_path / "folders.toml"
        path.write_text(tomli_w.dumps(data))
        return path

    return write


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def lose_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))


def lose_many(folder: Path) -> None:
    change_weights(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "mlp" in key or "norm" in key])


def narrow_a_tensor(folder: Path) -> None:
    def narrow(tensors: dict[str, Any]) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key][:, :-1].contiguous()

    change_weights(folder, narrow)


def cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def shrink_head(folder: Path) -> None:
    """In weights and config alike, so that they fit each other and not the tokenizer."""

    def shrink(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].contiguous()

    change_weights(folder, shrink)
    change_json(folder / "config.json", vocab_size=200)


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "missing tensor": (lose_a_tensor, ["*.safetensors lack model.layers.0.mlp.up_proj.weight", "all weights"]),
    "missing tensors": (lose_many, ["*.safetensors lack model.layers.0.", "and 3 more"]),
    "other shape": (narrow_a_tensor, ["up_proj.weight ([16, 15], not [16, 16])", "config.json"]),
    "cut weights": (lambda f: cut(f, "model.safetensors"), ["model.safetensors: cannot be read as safetensors", "whole file"]),
    "smaller config": (
        lambda f: change_json(f / "config.json", vocab_size=50),
        ["model.embed_tokens.weight ([272, 16], not [50, 16])"],
    ),
    "smaller head": (shrink_head, ["tokens of text in tokenizer.json lie beyond vocab_size = 200"]),
    "forbidden template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ["chat template says", "unsafe", "correct that template"],
    ),
    "template that is none": (
        lambda f: (f / "chat_template.jinja").write_text("{% for m in messages %}"),
        ["chat template says", "correct that template"],
    ),
    "cut tokenizer": (lambda f: cut(f, "tokenizer.json"), ["transformers cannot load this model", "tokenizer.json"]),
    "cut config": (lambda f: cut(f, "config.json"), ["config.json"]),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), ["give a folder with config.json"]),
    "no heads": (lambda f: change_json(f / "config.json", num_attention_heads=0), ["give a folder with config.json"]),
    "width of text": (lambda f: change_json(f / "config.json", hidden_size="wide"), ["give a folder with config.json"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder(potstill, recipe, good, tmp_path, what):
    damage, parts = DAMAGE[what]
    folder = tmp_path / "damaged"
    shutil.copytree(good, folder)
    damage(folder)
    for role in ("student", "teacher"):
        refused(potstill("run", recipe(**{role: {"model": str(folder)}})), str(folder), *parts)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_that_lost_a_tensor_is_not_filled_up(good, tmp_path):
    """Where nothing was checked before: loading itself refuses."""
    folder = tmp_path / "damaged"
    shutil.copytree(good, folder)
    lose_a_tensor(folder)
    with pytest.raises(BadInput, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight"):
        load_weights(ModelRef(str(folder), ""))
    load_weights(ModelRef(str(good), ""))  # whose head is tied, and lies in no file
    check_weights(ModelRef(str(folder), "", engine="vllm"))  # which lays weights out in its own way
    check_weights(ModelRef(str(good), "", attention="flash_attention_2"))  # whose package may be on a worker alone


def test_attention_that_a_family_lacks(potstill, recipe, good, tmp_path):
    tokenizer, folder = AutoTokenizer.from_pretrained(good), tmp_path / "gemma2"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, query_pre_attn_scalar=8, **shape)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = recipe(teacher={"model": str(folder)})
    refused(potstill("run", path), str(folder), "does not have this kind of attention", "set attention = 'eager'")
    check_recipe(load_recipe(path, ["teacher.attention=eager"]))


@pytest.mark.parametrize(
    "write", [lambda file: os.truncate(file, 100), lambda file: file.write_bytes(bytes(file.stat().st_size))]
)
def test_loaded_weights_stay_what_they_are(good, tmp_path, write):
    """Where another model is saved into the folder: they are no part of its file any more, which would end the process."""
    shutil.copytree(good, folder := tmp_path / "model")
    model = load_weights(ModelRef(str(folder), "", device="cpu"), torch.float32)
    before = [tensor.clone() for tensor in model.parameters()]
    write(folder / "model.safetensors")
    assert all(map(torch.equal, before, model.parameters()))
    assert [mapped for mapped in Path("/proc/self/maps").read_text().splitlines() if str(folder) in mapped] == []
