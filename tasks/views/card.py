"""The model card of a round's student: figures, lineage, recipe, how to load it, and what is known of licences.

It lies beside the checkpoint and not in it. A checkpoint's digest is the model's identity, and its figures come later.
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from configs.load import dump_content
from configs.models import STUDENT, Model, describe_teacher
from configs.prompts import CachePrompts, FilePrompts, GymPrompts, HubPrompts, Prompts
from configs.schema import Recipe
from configs.teachers import suffix_of
from storage.store import Run, round_slot
from tasks.views.markdown import MEANING, fence, format_table, quote
from tasks.views.rounds import find_best, summarise_rounds, tabulate_rounds

FILE = "README.md"

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"quote": quote, "fence": fence}


def write_card(run: Run, number: int) -> str:
    """Write `round=…/README.md` beside the round's `student` and return its address."""
    place = round_slot(number, FILE)
    run.write_text(place, render_card(run, number, where="student"))
    return f"{run.address}/{place}"


def render_card(run: Run, number: int, *, where: str) -> str:
    """The card as Markdown with metadata for the Hub. `where` is what a user loads: a folder or a repository."""
    recipe, manifest = run.frozen_recipe(), run.manifest(round_slot(number, "student"))
    assert recipe is not None
    assert manifest is not None
    table = summarise_rounds(run.address)
    told = "".join(
        f", {key}={value!r}" if key.isidentifier() else f", **{ {key: value}!r}"
        for key, value in recipe.student.chat_template_kwargs.items()
    )
    body = TEMPLATES.get_template("card.md").render(
        name=recipe.name,
        number=number,
        recipe=recipe,
        student=Source(recipe.student),
        teachers=[Source(teacher) for teacher in teachers_of(recipe).values()],
        version=version("potstill"),
        rounds=format_table(tabulate_rounds(run.address)) if len(table) else "",
        meaning=MEANING,
        best=find_best(table, recipe.evaluate.best),
        where=where,
        told=told,
        lineage=format_table(_list_lineage(run, recipe, number, manifest)),
        versions=", ".join(f"{name} {found}" for name, found in manifest["versions"].items()),
        notes=list(_list_notes(recipe)),
        toml=dump_content(recipe),
    )
    return f"---\n{_describe(recipe).to_yaml()}\n---\n\n{body}\n"


def teachers_of(recipe: Recipe) -> dict[str, Model]:
    """The teachers of a recipe by name."""
    return {name: view.teacher for name, view in recipe.by_teacher().items() if view.teacher is not None}


class Source:
    """Where a model came from, as far as others may know: no path of this machine."""

    def __init__(self, config: Model):
        self.model = config.model
        self.hub_id = config.model if config.model and config.model != STUDENT and _is_hub_id(config.model) else None
        if config.model == STUDENT:
            self.about = "itself"
        elif self.hub_id:
            self.about = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})"
        elif config.model:
            self.about = quote(Path(config.model).name)
        elif config.cache:
            self.about = f"what a teacher left in the cache {quote(Path(config.cache).name)}"
        elif config.recipe:
            self.about = f"the model that the recipe {quote(Path(config.recipe).name)} makes"
        else:
            self.about = "a new model"

    @property
    def card(self) -> ModelCardData | None:
        """The metadata of its own model card, where it has one on this machine."""
        if self.hub_id:
            cached = try_to_load_from_cache(self.hub_id, FILE)
            file = Path(cached) if isinstance(cached, str) else None
        else:
            file = Path(self.model) / FILE if self.model else None
        if file is None or not file.is_file():
            return None
        try:
            described = ModelCard.load(file, ignore_metadata_errors=True).data
        except (OSError, ValueError):
            return None
        return described if isinstance(described, ModelCardData) else None


def _is_hub_id(model: str) -> bool:
    """Whether a recipe's model names a repository. A folder that is gone is told from one by its name alone."""
    if Path(model).exists() or model.endswith(".gguf"):
        return False
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _describe(recipe: Recipe) -> ModelCardData:
    """The metadata that the Hub reads. The licence is the student's base's, where that names one."""
    base = Source(recipe.student)
    theirs = base.card or ModelCardData()
    return ModelCardData(
        base_model=base.hub_id,
        datasets=[recipe.prompts.dataset] if isinstance(recipe.prompts, HubPrompts) and "/" in recipe.prompts.dataset else None,
        library_name="transformers",
        license=theirs.license,
        license_name=theirs.license_name,
        license_link=theirs.license_link,
        pipeline_tag="text-generation",
        tags=["potstill", "distillation", "on-policy-distillation", recipe.objective.name],
    )


def _list_lineage(run: Run, recipe: Recipe, number: int, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Digests of the checkpoint whose manifest this is, and of what it was made from."""
    rows = [
        ("this checkpoint", manifest["digest"], None),
        (_name_before(number), manifest["inputs"]["student"]["digest"], None),
    ]
    for name, config in teachers_of(recipe).items():
        role = " ".join(filter(None, ("teacher", name)))
        if config.weights == "round":
            rows.append((role, manifest["inputs"]["student"]["digest"], None))
        elif teacher := run.manifest(round_slot(0, "evals", "teacher") + suffix_of(name)):
            rows.append((role, teacher["inputs"]["model"]["digest"], None))
        elif cache := run.manifest(round_slot(0, "evals", "cached")):
            rows.append(("the teacher's cache", cache["inputs"]["teacher"]["digest"], None))
    for name, slot in (("prompts", "prompts/train"), ("held-out prompts", "prompts/eval")):
        if prompts := run.manifest(slot):
            rows.append((name, prompts["digest"], prompts["rows"]))
    return [{"what": what, "SHA-256": quote(digest), "rows": count} for what, digest, count in rows]


def _name_before(number: int) -> str:
    return "the student before any training" if number == 1 else f"the student of round {number - 1}"


def list_sources(prompts: Prompts) -> str:
    """Where prompts come from, without folders of this machine."""
    match prompts:
        case HubPrompts():
            return f"the data set {quote(prompts.dataset)}, split {quote(prompts.hub_split)}"
        case FilePrompts():
            return "the files " + ", ".join(quote(Path(entry.path).name) for entry in prompts.entries)
        case CachePrompts():
            return f"those of the cache {quote(Path(prompts.dataset).name)}"
        case GymPrompts():
            return f"generated by reasoning-gym, task {quote(prompts.task)}"


def _list_notes(recipe: Recipe) -> Iterator[str]:
    """What is known of the data and of both models' licences."""
    yield f"Prompts: {list_sources(recipe.prompts)}. Their licence is their source's."
    share = recipe.rollout.on_policy
    given = "the teacher's own completions" if recipe.rollout.off_policy == "teacher" else "the references of the prompts"
    yield f"Trained on: {share:.0%} the student's own samples" + (f", {1 - share:.0%} {given}." if share < 1 else ".")
    teachers = teachers_of(recipe)
    for teacher in teachers.values():
        if about := describe_teacher(recipe.student, teacher):
            yield f"{about[0].upper()}{about[1:]}."
    roles = {"Student": recipe.student} | {f"Teacher {name}".strip(): config for name, config in teachers.items()}
    for role, config in roles.items():
        if config.model == STUDENT:
            continue
        source_of = Source(config)
        card = source_of.card
        licence = card and (card.license_name or card.license)
        if config.model is None:
            yield f"{role}: {source_of.about}."
        elif licence:
            yield f"{role}: {source_of.about}, licence {quote(str(licence))} by its model card."
        else:
            yield f"{role}: {source_of.about}; no licence of it is known here: look at where it came from."
    if any(teacher.cache or teacher.model not in (None, STUDENT) for teacher in teachers.values()):
        yield "A teacher's licence may reach a model that was trained on its judgement: read it before you hand this one on."
