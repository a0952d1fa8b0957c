"""A recipe to start from: what two models and some prompts ask for."""

import os
import re
from glob import has_magic
from pathlib import Path
from statistics import median
from typing import Any

from configs import describe
from configs.comments import write_commented
from configs.errors import BadInput
from configs.load import validate_recipe
from tasks.gates.rendering import list_prompts, rendering_gates
from tasks.models.reference import local_name, refer_as_used
from tasks.models.text import tokenizer_of
from tasks.rows.files import READERS, UNPACK
from tasks.running.progress import logger

MOST_TOKENS = 256
LONG = 40  # characters of a reference that no answer equals by chance
MANY = 512  # prompts a round, of which the default batch makes eight steps or more


def write_recipe(out: Path, *, student: str, teacher: str, prompts: str) -> None:
    """Write a recipe for these models and prompts. Both sides' tokenizers and all prompts are read, to choose what fits.

    Raises BadInput for a model or file of this machine that cannot be used. What lies elsewhere and is not reached is said.
    """
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("._-") or "recipe",
        "rounds": 10,
        "student": {"model": student},
        "teacher": {"model": teacher},
        "prompts": name_prompts(prompts),
        "objective": {"name": "bytes"},
        "score": {"signal": "bytes", "top_p": 0.9985},
        "rollout": {},
        "train": {"micro_batch_size": 8},
    }
    why = fit_models(data)
    why |= fit_prompts(data, str(out))
    if "path" in data["prompts"] and not os.path.isabs(prompts):
        data["prompts"]["path"] = os.path.relpath(prompts, out.parent)
    schema = os.path.relpath(Path(describe.__file__).with_name(describe.FILE), out.parent)
    text = write_commented(data, schema=schema, why=why)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror}); give another name") from None


def name_prompts(prompts: str) -> dict[str, Any]:
    """The table `prompts` for an answer: a file, a data set of the hub, or a task."""
    if Path(prompts).exists() or has_magic(prompts) or {*Path(prompts).suffixes} & {*READERS, *UNPACK}:
        return {"source": "file", "path": prompts, "eval": 128}
    if "/" in prompts:
        return {"source": "hub", "dataset": prompts, "eval": 128}
    return {"source": "reasoning-gym", "task": prompts, "train": 4096, "eval": 128}


def fit_models(data: dict[str, Any]) -> dict[str, str]:
    """Set how prompts are rendered and what is compared; the reasons, by field."""
    why, sides = {}, []
    for role in ("student", "teacher"):
        name = data[role]["model"]
        try:
            sides.append(tokenizer_of(name))
        except BadInput as error:
            if Path(name).exists() or name.endswith(".gguf"):
                raise
            logger.warning("%s: not looked at: %s", role, error)
            continue
        if not sides[-1].tokenizer.chat_template:
            data[role]["rendering"] = "plain"
            why[f"{role}.rendering"] = "it has no chat template"
            if role == "student":
                data["gates"] = {"truncated": 1.0}
                why["gates.truncated"] = "most share of samples that are cut; a base model goes on until it is stopped"
    if len(sides) == 2 and sides[0].vocabulary.same_as(sides[1].vocabulary):
        data["objective"], data["score"] = {"name": "gkd"}, {"signal": "topk"}
        why["objective.name"] = "both sides have one tokenizer"
    return why


def fit_prompts(data: dict[str, Any], where: str) -> dict[str, str]:
    """Set how many prompts are held out and sampled from, how long an answer may be, and what the best round is by.

    Returns the reasons, by field.
    """
    recipe = validate_recipe(data, where)
    try:
        rows = list_prompts(recipe, {})
    except BadInput as error:
        if data["prompts"]["source"] != "hub":
            raise
        logger.warning("prompts: not looked at: %s", error)
        return {}
    if data["prompts"]["source"] != "reasoning-gym":
        data["prompts"]["eval"] = min(128, max(1, len(rows) // 10))
        data["rollout"]["prompts"] = few = min(1024, len(rows) - data["prompts"]["eval"])
        if few < MANY:
            data["train"]["batch_size"] = max(8, few // 8)  # several steps a round
    rooms = [MOST_TOKENS]
    for role in ("student", "teacher"):
        try:
            ref = refer_as_used(getattr(recipe, role), local_name(data[role]["model"]), "-")  # its weights are not read
            gates = list(rendering_gates(role, ref, rows, 0))
        except BadInput as error:
            logger.warning("%s", error)
            continue
        rooms += [int(gate.limit - gate.value) for gate in gates if gate.name.endswith("room") and gate.limit and gate.value]
    data["rollout"]["max_new_tokens"] = max(1, min(rooms))
    references = [row["reference"] for row in rows if row["reference"] is not None]
    if data["prompts"]["source"] == "reasoning-gym" or (references and median(map(len, references)) < LONG):
        return {}
    data["evaluate"] = {"best": "divergence"}
    return {
        "evaluate.best": "the least divergence; " + ("no answer equals free text" if references else "there are no references")
    }
