"""A recipe as TOML with comments: what it sets, and the fields that are set most often, each with what it means."""

from textwrap import wrap
from typing import Any

import tomli_w

from configs.describe import meaning_of, tables_at

WIDTH = 128
# Fields that are shown with their defaults where the recipe does not set them.
SHOWN = {
    "": ("seed",),
    "student": ("dtype", "engine"),
    "teacher": ("dtype", "engine"),
    "rollout": ("prompts", "samples", "max_new_tokens", "temperature", "batch_size"),
    "score": ("k", "batch_tokens"),
    "train": ("learning_rate", "batch_size", "epochs", "gradient_checkpointing"),
    "evaluate": ("samples", "scorer"),
}


def write_commented(recipe: dict[str, Any], *, schema: str, why: dict[str, str]) -> str:
    """The TOML of `recipe`, whose tables hold values alone. `why` says of some fields why they are what they are.

    `schema` is where the JSON Schema lies, as seen from the recipe's folder.
    """
    plain = {key: value for key, value in recipe.items() if not isinstance(value, dict)}
    tables = {"": plain, **{key: value for key, value in recipe.items() if isinstance(value, dict)}}
    lines = [
        f"#:schema {schema}",
        "# What else a recipe may say: `potstill recipe --explain train`, or `--explain train.epochs`, of any table or field.",
    ]
    for table in (*tables, *(name for name in SHOWN if name not in tables)):
        lines += ["", f"[{table}]"] if table else []
        lines += _write_fields(table, tables.get(table, {}), why)
    return "\n".join(lines) + "\n"


def _write_fields(table: str, values: dict[str, Any], why: dict[str, str]) -> list[str]:
    chosen = [values[tag] for tag in ("source", "name") if tag in values]  # one of several kinds of this table
    (form,) = tables_at([table, *chosen] if table else []).values()
    defaults = {name: form["properties"][name].get("default") for name in SHOWN.get(table, ()) if name not in values}
    written = [(name, _write_value(name, value)) for name, value in values.items()]
    written += [(name, f"# {_write_value(name, value)}") for name, value in defaults.items() if value is not None]
    width = max((len(text) for _, text in written if len(text) < WIDTH // 3), default=0)
    lines = []
    for name, text in written:
        meaning = why.get(f"{table}.{name}") or meaning_of(form, name)
        line = f"{text:{width}}  # {meaning}"
        lines += [line] if len(line) <= WIDTH else [*wrap(meaning, WIDTH, initial_indent="# ", subsequent_indent="# "), text]
    return lines


def _write_value(name: str, value: Any) -> str:
    return tomli_w.dumps({name: value}).strip()
