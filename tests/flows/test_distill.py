"""The rounds, on small real models: what a run leaves, what a second call makes, and what going on means."""

import gc
import json
import math
import os
import shutil
import tomllib
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import TINY, files
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tasks.rollout
from configs.errors import BadInput
from configs.load import dump_recipe, load_recipe
from flows.distill import distill
from storage.lineage import digest_file, digest_folder
from storage.read import scan
from storage.schemas import COMPLETIONS, REWARDS, SCHEMAS, TURNS
from storage.store import Run
from tasks.training.student import Student


def manifests(run: Path) -> dict[str, dict]:
    return dict(Run(str(run.parent), run.name).manifests())


def digests(run: Path) -> dict[str, str]:
    """The digest of everything committed but the steps, which hold the seconds that a step took."""
    return {slot: manifest["digest"] for slot, manifest in manifests(run).items() if "/steps/" not in slot}


def steps(run: Path) -> pl.DataFrame:
    return scan(str(run), "steps").drop("seconds").sort("step").collect()


# -- one run -----------------------------------------------------------------------------------------------------------


def test_nothing_of_training_stays_in_memory(recipe, monkeypatch):
    """What samples next may be a vLLM beside this process, which needs the device's memory."""
    alive, real = [], Run.build_table

    def watched(self, slot, *arguments):
        if slot.endswith("evals/student") and slot.startswith("round=0001"):
            alive.extend(thing for thing in gc.get_objects() if type(thing) is Student)
        return real(self, slot, *arguments)

    monkeypatch.setattr(Run, "build_table", watched)
    assert distill(str(recipe(name="memory")), rounds=1)["rounds"] == 1
    assert alive == []


def test_recipes_of_two_dtypes_in_one_process(recipe, models):
    """The one that makes a model trains in float32, the one that asks for it in bfloat16."""
    assert distill(str(recipe(name="float32")), rounds=1)["rounds"] == 1
    half = {"model": str(models["student"]), "dtype": "bfloat16"}
    path = recipe(name="bfloat16", student=half, gates__engine_mean=0.5, gates__engine_max=9.0)
    assert distill(str(path), rounds=1)["rounds"] == 1


def test_a_run_goes_on_on_a_smaller_machine(recipe, tmp_path):
    """After an out-of-memory error: smaller batches make nothing again, and the next round is made with them."""
    distill(str(recipe(rounds=1)))
    before = files(tmp_path / "runs")
    small = recipe(
        rounds=1, train__micro_batch_size=2, train__chunk_positions=16, rollout__batch_size=8, score__batch_tokens=256
    )
    assert distill(str(small))["rounds"] == 1
    after = files(tmp_path / "runs")
    assert {name for name in after if after[name] != before[name]} == {"tiny/run.toml", "tiny/_receipt.json"}
    assert distill(str(small), rounds=2)["rounds"] == 2


def test_every_table_has_its_schema(tiny):
    """Of those that every run has: completions and rewards are made where a recipe asks for them."""
    for name, schema in SCHEMAS.items():
        if schema in (COMPLETIONS, REWARDS):
            continue
        found = sorted(tiny.glob(f"**/{name}/*.parquet"))
        assert found, name
        # Of samples at another temperature than 1, of several teachers, of conversations that are read turn by turn.
        rare = ("model_logprobs", "teacher_name", *TURNS)
        kept = [field for field in schema if field.name not in rare]
        assert all(pq.read_schema(path).equals(pa.schema(kept)) for path in found), name


def test_the_folder_is_as_designed(tiny):
    """Names of DESIGN.md §4, and nothing half-made among them."""
    assert {path.name for path in tiny.iterdir()} == {
        "run.toml", "report.html", "vocab", "prompts", "accounts", "_manifests", "_receipt.json",
        "round=0000", "round=0001", "round=0002",
    }  # fmt: skip
    assert {path.name for path in (tiny / "round=0000").iterdir()} == {"evals"}
    for number in (1, 2):
        names = {path.name for path in (tiny / f"round=000{number}").iterdir()}
        trainer = {"trainer"} if number == 2 else set()  # the newest round's alone is kept
        assert names == {"rollouts", "scores", "aligned", "gates", "steps", "evals", "student", "README.md"} | trainer
        for name in ("rollouts", "scores", "aligned"):
            shards = {path.name for path in (tiny / f"round=000{number}" / name).iterdir()}
            assert shards == {"part-00000.parquet", "part-00001.parquet"}


def test_the_frozen_recipe(tiny):
    assert (tiny / "run.toml").read_text() == dump_recipe(load_recipe(TINY, [f"root={tiny.parent}"]))
    assert tomllib.loads((tiny / "run.toml").read_text())["rollout"]["on_policy"] == 0.75


def test_every_manifest_tells_the_truth(tiny):
    """Digest and rows are those of what lies there; every data file has a manifest; what is cleared is gone."""
    covered = set()
    for slot, manifest in manifests(tiny).items():
        path = tiny / manifest["path"]
        if "cleared" in manifest:
            assert not path.exists(), slot
            continue
        assert manifest["digest"] == (digest_folder(path) if path.is_dir() else digest_file(path)), slot
        if path.suffix == ".parquet":
            assert manifest["rows"] == pq.read_metadata(path).num_rows, slot
        covered |= {str(path.relative_to(tiny))} if path.is_file() else {f"{path.relative_to(tiny)}/{n}" for n in files(path)}
    others = {"run.toml", "report.html", "_receipt.json", "round=0001/README.md", "round=0002/README.md"}
    data = {name for name in files(tiny) if not name.startswith("_manifests/")} - others
    assert data == covered


def test_rows_fit_together(tiny):
    """64 rollouts a round, each scored and aligned once, each of a training prompt."""
    rollouts, scores, aligned = (scan(str(tiny), name).collect() for name in ("rollouts", "scores", "aligned"))
    assert sorted(rollouts["round"].to_list()) == [1] * 64 + [2] * 64
    assert rollouts["rollout_id"].n_unique() == 128
    for other in (scores, aligned):
        assert other.select("round", "rollout_id").sort(pl.all()).equals(
            rollouts.select("round", "rollout_id").sort(pl.all())
        )  # fmt: skip
    prompts = scan(str(tiny), "prompts").collect()
    train = prompts.filter(pl.col("split") == "train")["prompt_id"]
    assert (len(train), len(prompts) - len(train)) == (128, 16)
    assert rollouts["prompt_id"].is_in(train.implode()).all()
    assert rollouts["prompt_id"].n_unique() == 128  # two rounds of 64: one epoch
    assert set(rollouts["source"]) == {"student", "reference"}


def test_rollouts_hold_what_was_sampled(tiny):
    rollouts = scan(str(tiny), "rollouts").collect()
    own, given = (rollouts.filter(pl.col("source") == source) for source in ("student", "reference"))
    assert own["logprobs"].null_count() == 0
    assert given["logprobs"].null_count() == len(given)
    assert (own["logprobs"].list.len() == own["token_ids"].list.len()).all()
    assert own["token_ids"].list.len().max() <= 12
    references = dict(scan(str(tiny), "prompts").select("prompt_id", "reference").collect().iter_rows())
    stopped = given.filter(pl.col("finish_reason") == "stop")
    assert len(stopped) > 0
    assert all(text == references[prompt] for prompt, text in stopped.select("prompt_id", "text").iter_rows())


def test_a_round_samples_from_the_student_before_it(tiny, models):
    """`policy` is the digest of the model that wrote a row: round 2's is what round 1 trained."""
    own = scan(str(tiny), "rollouts").filter(pl.col("source") == "student")
    policies = dict(own.group_by("round").agg(pl.col("policy").unique()).collect().iter_rows())
    assert policies[1] == [digest_folder(models["student"])]
    assert policies[2] == [digest_folder(tiny / "round=0001" / "student")]
    assert scan(str(tiny), "scores").collect()["teacher"].unique().to_list() == [digest_folder(models["teacher"])]
    given = scan(str(tiny), "rollouts").filter(pl.col("source") == "reference").collect()
    assert given["policy"].unique().to_list() == [""]


def test_scores_are_complete_distributions(tiny):
    """k is the whole vocabulary: top entries and the rest sum to one, the actual token's log-prob is among them."""
    scores = scan(str(tiny), "scores").filter(pl.col("status") == "ok").collect()
    assert len(scores) > 20
    for row in scores.head(20).to_dicts():
        at = 0
        for token, logprob, count, rest in zip(row["token_ids"], row["logprobs"], row["top_counts"], row["rest"], strict=True):
            entries = dict(zip(row["top_ids"][at : at + count], row["top_logprobs"][at : at + count], strict=True))
            at += count
            assert sum(math.exp(value) for value in entries.values()) + math.exp(rest) == pytest.approx(1, abs=0.01)
            assert entries[token] == pytest.approx(logprob, abs=0.01)
        assert at == len(row["top_ids"])


def test_bytes_add_up(tiny):
    """Supervised, unmatched, dropped and tail bytes are all of the completion's bytes."""
    aligned = scan(str(tiny), "aligned").collect()
    rollouts = scan(str(tiny), "rollouts").select("round", "rollout_id", "token_ids", "text").collect()
    sizes = {
        i: len(value or b"") for i, value in pl.read_parquet(tiny / "vocab/student.parquet")["token_id", "bytes"].iter_rows()
    }
    joined = aligned.join(rollouts, on=["round", "rollout_id"])
    parts = ("supervised_bytes", "unmatched_bytes", "dropped_bytes", "tail_bytes")
    assert len(joined) == 128
    for row in joined.to_dicts():
        assert sum(row[name] for name in parts) == sum(sizes[i] for i in row["token_ids"])
        assert all(row[name] >= 0 for name in parts)
    assert aligned["supervised_bytes"].sum() > 0


def test_steps(tiny):
    """Counted over the run; rows are those of the aligned table; the learning rate falls over both rounds."""
    table = scan(str(tiny), "steps").sort("step").collect()
    assert table["step"].to_list() == list(range(1, len(table) + 1))
    assert table["round"].to_list() == sorted(table["round"].to_list())
    assert set(table["round"]) == {1, 2}
    for name in ("loss", "grad_norm", "learning_rate", "seconds"):
        assert table[name].is_finite().all(), name
    assert (table["loss"] > 0).all()
    assert (table["grad_norm"] > 0).all()
    assert (table["units"] > 0).all()
    assert (table["tokens"] > table["rows"]).all()
    assert table["learning_rate"].is_sorted(descending=True)
    assert table["learning_rate"][0] == pytest.approx(1e-3)
    good = scan(str(tiny), "aligned").filter(pl.col("status") == "ok", pl.col("units") > 0)
    expected = good.group_by("round").agg(pl.len(), pl.col("units").sum()).sort("round").collect()
    trained = table.group_by("round").agg(pl.col("rows").sum(), pl.col("units").sum()).sort("round")
    assert trained.rows() == expected.rows()


def test_evals(tiny):
    """Each model on each eval prompt, greedy and sampled; the figures agree with the texts."""
    table = scan(str(tiny), "evals").collect()
    groups = table.group_by("model", "round", "decoding").agg(pl.len(), pl.col("prompt_id").n_unique().alias("prompts"))
    expected = {(model, number, decoding, 16, 16) for model, number in (("teacher", 0), ("student", 0), ("student", 1),
                ("student", 2)) for decoding in ("greedy", "sampled")}  # fmt: skip
    assert set(groups.iter_rows()) == expected
    held_out = scan(str(tiny), "prompts").filter(pl.col("split") == "eval").collect()["prompt_id"]
    assert set(table["prompt_id"]) == set(held_out)
    assert (table["correct"] == (table["score"] >= 1)).all()
    assert all(row["bytes"] == len(row["text"].encode()) for row in table.to_dicts())
    assert (table["logprob"] < 0).all()
    assert table["tokens"].is_between(1, 12).all()
    assert table.filter(pl.col("finish_reason") == "length")["tokens"].unique().to_list() == [12]


def test_divergence_compares_the_same_bytes(tiny):
    """Nats a byte between both models' log-probs; null where the text says only part of what was sampled."""
    table = scan(str(tiny), "evals").collect()
    compared = table.filter(pl.col("divergence").is_not_null())
    for row in compared.to_dicts():
        assert row["divergence"] == pytest.approx((row["logprob"] - row["teacher_logprob"]) / max(row["bytes"], 1))
    teacher = compared.filter(pl.col("model") == "teacher")
    assert len(teacher) > 0
    assert teacher["divergence"].abs().max() < 1e-3  # it is at no distance from itself
    assert len(compared) > len(teacher)
    partial = table.filter(pl.col("text") == "", pl.col("finish_reason") == "length", pl.col("model") == "student")
    assert len(partial) > 0  # twelve tokens, and bytes that are no text from the first on
    assert partial["teacher_logprob"].null_count() == partial["divergence"].null_count() == len(partial)


def test_the_checkpoint_is_a_hugging_face_model(tiny, models):
    folder = tiny / "round=0002" / "student"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}  # no pickle
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")  # fmt: skip
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert prompt["input_ids"].shape[1] < output.shape[1] <= prompt["input_ids"].shape[1] + 4
    before = AutoModelForCausalLM.from_pretrained(models["student"]).state_dict()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_the_same_call_again_makes_nothing(tiny):
    """No file of the run, or of the runs that made its models, is touched."""
    before = files(tiny.parent)
    result = distill(str(TINY), overrides=(f"root={tiny.parent}",))
    assert files(tiny.parent) == before
    assert result["rounds"] == 2
    assert result["student"] == str(tiny / "round=0002" / "student")
    assert [row["model"] for row in result["table"]] == ["teacher", *(f"student, round {n}" for n in range(3))]


# -- going on ----------------------------------------------------------------------------------------------------------


def test_three_rounds_in_two_calls_are_three_rounds_in_one(recipe, tmp_path):
    config = str(recipe(rounds=3))
    in_two, at_once = tmp_path / "in_two" / "tiny", tmp_path / "at_once" / "tiny"
    first = distill(config, rounds=2, overrides=(f"root={in_two.parent}",))
    assert first["rounds"] == 2
    early = files(in_two)
    assert distill(config, overrides=(f"root={in_two.parent}",))["rounds"] == 3
    assert distill(config, overrides=(f"root={at_once.parent}",))["rounds"] == 3
    assert digests(in_two) == digests(at_once)
    assert steps(in_two).equals(steps(at_once))
    assert not any("taken_from" in manifest for manifest in manifests(at_once).values())
    later = files(in_two)
    del early["report.html"], early["_receipt.json"]  # which speak of all rounds
    last = ("round=0002/trainer/", "_manifests/round=0002/trainer.json")  # which round 3 made needless
    early = {name: time for name, time in early.items() if not name.startswith(last)}
    assert {name: later[name] for name in early} == early  # what was there was not made again

    # A deleted shard is made again, with the same digest, and nothing else is.
    for name in ("round=0002/rollouts/part-00001", "round=0002/scores/part-00000", "round=0001/aligned/part-00001"):
        before = digests(at_once)
        (at_once / f"{name}.parquet").unlink()
        times = files(at_once)
        assert distill(config, overrides=(f"root={at_once.parent}",))["rounds"] == 3
        assert digests(at_once) == before
        assert digest_file(at_once / f"{name}.parquet") == before[name]
        changed = {path for path, time in files(at_once).items() if times.get(path) != time}
        assert changed == {f"{name}.parquet", f"_manifests/{name}.json", "_receipt.json"}


def test_a_schedule_adds_round_by_round_until_the_recipe_is_done(recipe, tmp_path):
    config, run = str(recipe()), tmp_path / "runs" / "tiny"
    assert [distill(config, at_most=1)["rounds"] for _ in range(2)] == [1, 2]
    before = files(run)
    assert distill(config, at_most=1)["rounds"] == 2
    assert files(run) == before
    assert not (run / "round=0003").exists()


def test_no_rounds_evaluate_only(recipe, tmp_path):
    result = distill(str(recipe()), rounds=0)
    assert result["rounds"] == 0
    assert {path.name for path in (tmp_path / "runs" / "tiny").glob("round=*")} == {"round=0000"}
    assert [row["model"] for row in result["table"]] == ["teacher", "student, round 0"]


def test_another_objective_takes_over_rollouts_and_scores(tiny):
    """Score once, train many times: round 1 starts at align, with the files of the first run linked."""
    overrides = (f"root={tiny.parent}", "name=other", "objective.name=gold")
    before = files(tiny)
    result = distill(str(TINY), rounds=1, overrides=overrides)
    assert result["rounds"] == 1
    other = tiny.parent / "other"
    sources = {slot: manifest["taken_from"] for slot, manifest in manifests(other).items() if "taken_from" in manifest}
    taken = set(sources)
    shards = {f"round=0001/{name}/part-0000{part}" for name in ("rollouts", "scores") for part in (0, 1)}
    evals = {f"round=0000/evals/{role}" for role in ("student", "teacher")}
    assert taken == shards | evals | {"prompts/train", "prompts/eval", "accounts/prompts", "vocab/student", "vocab/teacher"}
    assert all((other / f"{slot}.parquet").samefile(tiny / f"{slot}.parquet") for slot in taken)
    assert all((tiny.parent / name / "run.toml").exists() and name != "other" for name in sources.values())
    assert digests(other)["round=0001/student"] != digests(tiny)["round=0001/student"]
    assert files(tiny) == before


# -- objectives --------------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "uld": {"name": "uld"},
    "uld with cross-entropy": {"name": "uld", "cross_entropy": 0.5},
    "gold chain": {"name": "gold"},
    "gold sum": {"name": "gold", "merge": "sum", "beta": 0.5},
    "gold observed": {"name": "gold", "merge": "observed", "beta": 0.0},
    "bytes": {"name": "bytes", "beta": 0.5},
    "strict": {"name": "strict", "top": 8},
    "alm": {"name": "alm", "temperature": 20.0},
    "bpm": {"name": "bpm", "beta": 0.5},
    "opd": {"name": "opd"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One root for all objectives: the first makes rollouts and scores, the others take them over."""
    return tmp_path_factory.mktemp("objectives")


def trained(run: Path) -> pl.DataFrame:
    """The steps of a run's first round, after a look at them and at the model they left."""
    table = scan(str(run), "steps").collect()
    assert len(table) > 0
    assert table["loss"].is_finite().all()
    assert table["grad_norm"].is_finite().all()
    assert (table["grad_norm"] > 0).all()
    assert AutoModelForCausalLM.from_pretrained(run / "round=0001" / "student").num_parameters() > 0
    return table


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_train(name, recipe, root):
    run = root / name.replace(" ", "-")
    distill(str(recipe(root=root, name=run.name, objective=OBJECTIVES[name])), rounds=1)
    table = trained(run)
    if name == "opd":  # samples of a KL, of the student's own rows alone: positive on average
        sampled = scan(str(run), "rollouts").filter(pl.col("source") == "student").collect()
        assert 0 < table["rows"].sum() <= len(sampled)
        assert table["loss"].mean() > 0
    else:
        assert (table["loss"] > 0).all()


def test_gkd_trains_with_one_tokenizer(recipe, models, tmp_path):
    """The student learns from itself as it was before its training: another model, the same tokenizer."""
    distill(str(recipe(teacher__model=models["untrained"], objective={"name": "gkd"})), rounds=1)
    table = trained(tmp_path / "runs" / "tiny")
    assert (table["loss"] > 0).all()
    aligned = scan(str(tmp_path / "runs" / "tiny"), "aligned").filter(pl.col("status") == "ok").collect()
    assert set(aligned["kind"].explode()) <= {0, 1}  # stops and one-to-one units


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(recipe, models, tmp_path):
    """Preflight's check, on the real path: a loss of about zero."""
    distill(str(recipe(teacher__model=models["student"], objective={"name": "gkd"}, train__learning_rate=1e-9)), rounds=1)
    run = tmp_path / "runs" / "tiny"
    assert scan(str(run), "steps").collect()["loss"].abs().max() < 1e-3
    evals = scan(str(run), "evals").filter(pl.col("round") == 0).collect()
    assert evals["divergence"].count() > 0
    assert evals["divergence"].abs().max() < 1e-3


def test_sft_trains_without_a_teacher(recipe, tmp_path):
    changes = {"teacher": None, "objective": {"name": "sft"}, "rollout__on_policy": 0.0}
    result = distill(str(recipe(**changes)), rounds=1)
    run = tmp_path / "runs" / "tiny"
    table = trained(run)
    assert (table["loss"] > 0).all()
    assert not (run / "round=0001" / "scores").exists()
    assert [row["model"] for row in result["table"]] == ["student, round 0", "student, round 1"]
    assert set(scan(str(run), "rollouts").collect()["source"]) == {"reference"}


def test_the_teachers_text_can_be_off_policy(recipe, tmp_path):
    changes = {"rollout__on_policy": 0.5, "rollout__off_policy": "teacher", "rollout__prompts": 32, "prompts__eval": 4}
    distill(str(recipe(**changes)), rounds=1)
    assert set(scan(str(tmp_path / "runs" / "tiny"), "rollouts").collect()["source"]) == {"student", "teacher"}


# -- what a flow refuses -----------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_are_refused_once_they_are_made(tiny):
    """gkd with two tokenizers: nothing of the run itself is written, the models stay."""
    before = files(tiny.parent)
    with pytest.raises(BadInput, match=r"objective\.name = 'gkd' needs one tokenizer on both sides"):
        distill(str(TINY), overrides=(f"root={tiny.parent}", "name=refused", "objective={name='gkd'}"))
    assert files(tiny.parent) == before
    assert not (tiny.parent / "refused").exists()


def test_the_optimizer_goes_on(tiny):
    """Round 2 starts from round 1's optimizer: its step count."""
    state = json.loads((tiny / "round=0002" / "trainer" / "state.json").read_text())
    assert state["step"] == len(scan(str(tiny), "steps").collect())


def test_a_copied_run_goes_on_elsewhere(tiny, tmp_path):
    """A run is its folder: copied to another root, with its models, everything in it is still committed."""
    copied = tmp_path / "copied"
    shutil.copytree(tiny.parent, copied)
    run = Run(str(copied), "tiny")
    assert run.rounds_done() == 2
    assert {slot: m["digest"] for slot, m in run.manifests()} == {slot: m["digest"] for slot, m in manifests(tiny).items()}
    assert run.find("round=0002/student").path == str(copied / "tiny" / "round=0002" / "student")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_whose_models_were_replaced_is_refused(recipe, models, tmp_path, role):
    """Going on would make committed rounds anew over what they are: nothing is written."""
    folder = tmp_path / "model"
    shutil.copytree(models[role], folder)
    path = recipe(rounds=1, **{role: {"model": str(folder)}})
    distill(str(path))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    before = files(tmp_path / "runs")
    with pytest.raises(BadInput, match=f"began with another {role}: the weights of {folder}.*--set name="):
        distill(str(path), rounds=2)
    assert files(tmp_path / "runs") == before


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_models_that_change_under_a_run_are_refused(recipe, models, tmp_path, monkeypatch, role, file):
    """Written over in place, so that weights that are mapped into memory change as well. Put back, the run goes on."""
    folder = tmp_path / "model"
    shutil.copytree(models[role], folder)
    path, run = recipe(rounds=1, **{role: {"model": str(folder)}}), Run(str(tmp_path / "runs"), "tiny")
    content = (folder / file).read_bytes()

    def change(*args: object, **options: object) -> object:
        made = make_rollouts(*args, **options)
        with open(folder / file, "r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(b"\x01")
        return made

    make_rollouts = tasks.rollout.make_rollouts
    monkeypatch.setattr(tasks.rollout, "make_rollouts", change)
    with pytest.raises(BadInput, match=f"^{folder}: its files have changed while the run used them.*--set name="):
        distill(str(path))
    assert "round=0000/evals/teacher" in run.slots()
    assert not any(slot.startswith("round=0001") for slot in run.slots())
    monkeypatch.undo()
    (folder / file).write_bytes(content)
    assert distill(str(path))["rounds"] == 1
