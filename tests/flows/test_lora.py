"""A student with low-rank adapters: what is trained, what a round leaves, and going on exactly."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.errors import BadInput
from configs.load import load_recipe
from flows.distill import distill
from flows.refuse import check_recipe
from storage.read import scan
from storage.store import Run
from tasks.models.reference import make_reference
from tasks.training.trainer import Trainer

LORA = {"rank": 4, "alpha": 12.0, "targets": ["q_proj", "down_proj"]}


@pytest.fixture
def changes(models) -> dict:
    return {"student": {"model": str(models["student"]), "lora": LORA}, "evaluate__samples": 0, "train__learning_rate": 1e-2}


def digests(run: Path) -> dict[str, str]:
    return {slot: m["digest"] for slot, m in Run(str(run.parent), run.name).manifests() if "/steps/" not in slot}


def test_rounds_of_a_student_with_adapters(recipe, changes, models, tmp_path):
    """Each checkpoint is the first student plus alpha / rank · B A, as a plain folder; two calls are one."""
    config, run = str(recipe(**changes, keep__trainers="all")), tmp_path / "runs" / "tiny"
    assert distill(config, rounds=1)["rounds"] == 1
    assert distill(config)["rounds"] == 2
    distill(config, overrides=(f"root={tmp_path / 'at_once'}",))
    assert digests(run) == digests(tmp_path / "at_once" / "tiny")

    before = load_file(models["student"] / "model.safetensors")
    for number in (1, 2):
        folder = run / f"round=000{number}"
        after, adapters = (
            load_file(folder / "student" / "model.safetensors"),
            load_file(folder / "trainer/adapters.safetensors"),
        )
        assert {path.suffix for path in (folder / "student").iterdir()} == {".json", ".safetensors", ".jinja"}
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "q_proj" in name or "down_proj" in name}
        for name in changed:
            a, b = (
                next(v for key, v in adapters.items() if name.removesuffix(".weight") in key and f"lora_{side}" in key)
                for side in "AB"
            )
            assert a.shape[0] == b.shape[1] == 4
            assert torch.allclose(after[name], before[name] + 3.0 * b @ a, atol=1e-6)
        model = AutoModelForCausalLM.from_pretrained(folder / "student")
        assert not any("lora" in name for name, _ in model.named_parameters())
    moments = load_file(run / "round=0002/trainer/optimizer.safetensors")
    assert {name.rsplit("/", 1)[0].split("lora_")[0].rsplit(".", 2)[1] for name in moments} == {"q_proj", "down_proj"}


def test_adapters_on_weights_in_bfloat16(recipe, changes, models, tmp_path):
    """What is added to is in half precision, adapters and their steps are in float32; two calls are one."""
    config = str(recipe(**changes, train__param_dtype="bfloat16", keep__trainers="all"))
    distill(config, rounds=1)
    distill(config)
    distill(config, overrides=(f"root={tmp_path / 'at_once'}",))
    run = tmp_path / "runs" / "tiny"
    assert digests(run) == digests(tmp_path / "at_once" / "tiny")
    before = load_file(models["student"] / "model.safetensors")
    for number in (1, 2):
        after, adapters = (
            load_file(run / f"round=000{number}" / name)
            for name in ("student/model.safetensors", "trainer/adapters.safetensors")
        )
        assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
        assert {weight.dtype for weight in adapters.values()} == {torch.float32}
        for name, weight in after.items():
            own = {side: v for side in "AB" for key, v in adapters.items() if f"{name[:-7]}.lora_{side}" in key}
            wanted = before[name].bfloat16().float() + (3.0 * own["B"] @ own["A"] if own else 0)
            assert torch.allclose(weight.float(), wanted, rtol=2**-7, atol=1e-5), name
        assert max(v.abs().max() for key, v in adapters.items() if "lora_B" in key) > 1e-3
    assert not (run / "round=0002/trainer/weights.safetensors").exists()


def test_going_on_is_exact(recipe, changes, models, tmp_path):
    """A second round from what the first left is the same as steps without a stop between them."""
    distill(str(recipe(**changes)))
    run = Run(str(tmp_path / "runs"), "tiny")
    made = load_recipe(tmp_path / "tiny.toml")
    base = make_reference(made.student, str(models["student"]))
    teacher = make_reference(made.teacher, str(models["teacher"]))
    shards = [
        [tuple(run.find(f"round=000{n}/{table}/part-0000{part}") for table in ("rollouts", "aligned")) for part in (0, 1)]
        for n in (1, 2)
    ]
    trainer = Trainer(made, 1, student=base, teachers={"": teacher}, state=None)
    saved, trainer._save = trainer._save, lambda folder: None
    first = trainer.run(shards[0], tmp_path)
    trainer.number, trainer._save = 2, saved
    (tmp_path / "unbroken").mkdir()
    second = trainer.run(shards[1], tmp_path / "unbroken")
    steps = scan(run.path, "steps").sort("step").collect()["loss"].to_list()
    assert [step["loss"] for step in first + second] == steps
    weights = (load_file(path / "student/model.safetensors") for path in (tmp_path / "unbroken", Path(run.path) / "round=0002"))
    one, two = weights
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_all_linear_layers_by_default(models, recipe, tmp_path):
    made = load_recipe(recipe(student={"model": str(models["student"]), "lora": {}}))
    module = Trainer(made, 1, student=make_reference(made.student, str(models["student"])), state=None).module
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_what_is_refused(recipe, models, monkeypatch):
    bad = {"model": str(models["student"]), "lora": {"targets": ["query"]}}
    with pytest.raises(BadInput, match=r"student\.lora\.targets = \['query'\]: the model has no such layers.*down_proj, "):
        check_recipe(load_recipe(recipe(student=bad)))
    with pytest.raises(BadInput, match=r"a teacher is not trained; give student\.lora"):
        load_recipe(recipe(teacher={"model": str(models["teacher"]), "lora": LORA}))
    with pytest.raises(BadInput, match=r"set train\.sharding = 'none'"):
        load_recipe(recipe(student={**bad, "lora": LORA}, train__processes=2, train__sharding="full"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInput, match=r"needs one more package: pip install -e '\.\[lora\]'"):
        check_recipe(load_recipe(recipe(student={**bad, "lora": LORA})))
