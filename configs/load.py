"""Read a recipe from TOML, apply `--set a.b=c`, and report each mistake in one line."""

import os
import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from configs.errors import BadInput
from configs.mistakes import describe_mistake
from configs.schema import Recipe

# Fields that say where and on how many devices a run is computed, or how its figures are read. They are not in its keys: a
# server may move during a run.
MACHINERY = {"train.processes", "train.sharding", "train.gradient_checkpointing", "train.micro_batch_size"}
MACHINERY |= {"train.micro_batch_tokens", "train.chunk_positions", "rollout.batch_size", "score.batch_tokens", "evaluate.best"}
MACHINERY |= {f"{role}.{key}" for role in ("student", "teacher") for key in ("device", "urls", "vllm_python", "vllm_memory")}

PATHS = {"model", "recipe", "chat_template", "path", "cache", "dataset"}  # keys of fields that may hold one
FREE = {"root", "gates", "keep", "compute", "track"}  # no part of what a run is, either

# Fields that came later: no part of a key while they have their default, so that runs from before go on.
LATER = {"train.dropout", "train.param_dtype", "prompts.unusable", "prompts.turns"}

# Fields that the key of one later stage holds: what they choose from is the same whatever they say.
OF_A_LATER_STAGE = {"rollout.keep"}


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Load the recipe at `path` and apply `overrides` (each `a.b=value`, the value in TOML's notation).

    `recipe`, `chat_template` and `path` fields are relative to the recipe's file. They are returned relative to the working
    directory where they lie in it, else absolute. Models are hub ids or paths from the working directory, and stay as they are.
    Raises BadInput with the field, what was found and what would be right.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such recipe; give the path of a TOML file, such as configs/quickstart.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: not valid TOML: {error}") from None
    for override in overrides:
        _apply(data, override)
    _resolve_paths(data, path.parent)
    return validate_recipe(data, str(path))


def validate_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Turn `data` into a Recipe. Raises BadInput with `where` and every wrong field if it is not one."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        wrong = [item for item in error.errors() if item["type"] != "default_factory_not_called"]  # for want of another field
        raise BadInput("\n".join(f"{where}: {describe_mistake(item)}" for item in wrong)) from None


def inherit_overrides(recipe: Recipe, path: str) -> tuple[str, ...]:
    """Overrides for the recipe at `path`, which makes a model for `recipe`: both share the root and the seed."""
    name = load_recipe(path).name
    return (f"name={name}-seed{recipe.seed}", tomli_w.dumps({"root": recipe.root}).strip(), f"seed={recipe.seed}")


def dump_recipe(recipe: Recipe) -> str:
    """Format the resolved recipe as TOML, with every default written out."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def dump_content(recipe: Recipe) -> str:
    """As `dump_recipe`, for others to read: without what changes no result, and without folders of this machine."""

    def shorten(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {key: shorten(entry, key) for key, entry in value.items()}
        if isinstance(value, list):
            return [shorten(entry) for entry in value]
        return Path(value).name if key in PATHS and Path(value).is_absolute() else value

    nested: dict[str, Any] = {"root": True, "keep": True, "compute": True, "track": True}
    for field in MACHINERY:
        table, key = field.split(".")
        nested.setdefault(table, {})[key] = True
    nested["teachers"] = {"__all__": {**nested["teacher"], "score": nested["score"]}}
    return tomli_w.dumps(shorten(recipe.model_dump(mode="json", exclude_none=True, exclude=nested)))


def select_content(recipe: Recipe, name: str) -> dict[str, Any]:
    """The fields of one table of the recipe that go into keys: those that can change a result beyond its rounding."""
    table = getattr(recipe, name)
    others = {field.removeprefix(f"{name}.") for field in MACHINERY | OF_A_LATER_STAGE if field.startswith(f"{name}.")}
    fields: dict[str, Any] = table.model_dump(mode="json", exclude=others)
    defaults = {key: type(table).model_fields[key].default for key in fields if f"{name}.{key}" in LATER}
    return {key: value for key, value in fields.items() if key not in defaults or value != defaults[key]}


def list_differences(old: Recipe, new: Recipe) -> list[str]:
    """One line for each field that differs: `train.batch_size is 64 in the run, 128 in this recipe`.

    Gates, trackers, what is kept, fields that change a result by rounding at most (`MACHINERY`, `compute`) and where the run
    lies (`root`) are left out: they may change while a run goes on.
    """
    left, right = (flatten(recipe.model_dump(mode="json", exclude=FREE)) for recipe in (old, new))
    return [
        f"{key} is {left.get(key, 'absent')!r} in the run, {right.get(key, 'absent')!r} in this recipe"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key) and not may_change(key)
    ]


def may_change(field: str) -> bool:
    """Whether a run goes on where this field of its recipe has another value."""
    table, _, key = field.partition(".")
    if table == "teachers":  # one of several, whose name comes first: a field of [teacher], or of [score]
        key = key.partition(".")[2]
        return bool({f"teacher.{key}", key} & MACHINERY)
    return field in MACHINERY or table in FREE


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise BadInput(f"--set {override}: expected field=value, such as --set train.learning_rate=1e-4")
    table = data
    for at, part in enumerate(parts[:-1]):
        table = table.setdefault(part, {})
        if isinstance(table, list):
            table = {entry["name"]: entry for entry in table if isinstance(entry, dict) and "name" in entry}
            if part == "teachers" and parts[at + 1] not in table:
                known = ", ".join(table) or "none"
                raise BadInput(f"--set {override}: no teacher is called '{parts[at + 1]}'; known: {known}")
        if not isinstance(table, dict):
            raise BadInput(f"--set {override}: {part} is a value in this recipe, not a table; set {part} itself")
    table[parts[-1]] = _parse_value(value.strip())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text  # a bare word is a string: a shell strips quotes


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    """Make paths that are relative to the recipe's folder relative to the working directory.

    They are not absolute, so that a checkout can move together with its runs.
    """

    def resolve(path: str) -> str:
        if "://" in path:
            return path
        full, here = Path(os.path.realpath(folder / path)), Path.cwd().resolve()  # which lets a loop of links be
        return str(full.relative_to(here) if full.is_relative_to(here) else full)

    several = data.get("teachers")
    for model in (data.get("student"), data.get("teacher"), *(several if isinstance(several, list) else [])):
        for key in ("recipe", "chat_template"):
            if isinstance(model, dict) and model.get(key) and isinstance(model[key], str):
                model[key] = resolve(model[key])
    prompts = data.get("prompts")
    if isinstance(prompts, dict):
        several = prompts.get("paths")
        for entry in (prompts, *(several if isinstance(several, list) else [])):
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                entry["path"] = resolve(entry["path"])


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested tables by their dotted names; of a list's tables behind the name of each, if they have one."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) and "name" in entry for entry in value):
            flat[prefix + key] = [entry["name"] for entry in value]
            value = {entry["name"]: entry for entry in value}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
