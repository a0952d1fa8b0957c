"""`potstill recipe`: write a recipe to start from, or tell what one may say."""

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from configs import describe
from configs.errors import BadInput
from configs.load import may_change
from flows.terminal import log_plainly, print_line, print_table
from tasks.running.progress import logger

QUESTIONS = {
    "student": "Student (hub id, folder or .gguf file)",
    "teacher": "Teacher (hub id, folder or .gguf file)",
    "prompts": "Prompts (file, folder, pattern, data set of the hub, or task of reasoning-gym)",
}


def recipe(
    *,
    student: str | None = None,
    teacher: str | None = None,
    prompts: str | None = None,
    out: Path = Path("recipe.toml"),
    explain: str | None = None,
    schema: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write a commented recipe to start from. What is not given is asked for.

    Parameters
    ----------
    student
        Hub id, folder or .gguf file of the model to train.
    teacher
        Hub id, folder or .gguf file of the model to learn from.
    prompts
        A file, a folder or a pattern; a data set of the hub (`owner/name`); or a task of reasoning-gym.
    out
        The file to write. The run is named after it.
    explain
        Tell of a field or a table instead, such as `train.batch_size` or `train`: type, default, limits, meaning.
    schema
        Print the JSON Schema of recipes instead, with which editors complete and check them.
    """
    if schema:
        print(json.dumps(describe.recipe_schema(), indent=2, ensure_ascii=False))
    elif explain is not None:
        explain_place(explain)
    else:
        if out.exists() or not out.parent.is_dir():
            fault = "is there already" if out.exists() else f"there is no folder {out.parent}"
            raise BadInput(f"--out {out}: {fault}; give another name")
        given = {"student": student, "teacher": teacher, "prompts": prompts}
        answers = {name: answer or ask(name) for name, answer in given.items()}
        log_plainly()
        logger.info("%s: looking at both models and the prompts", out)
        from flows.starter import write_recipe

        write_recipe(out, **answers)
        print_line(f"{out} is written. Next: potstill preflight {out}")


def ask(name: str) -> str:
    """The answer to a question, on a terminal."""
    if not sys.stdin.isatty():
        raise BadInput(f"--{name}: missing; give it, or answer on a terminal")
    try:
        while not (answer := input(f"{QUESTIONS[name]}: ").strip()):
            pass
    except EOFError:
        raise BadInput(f"--{name}: missing; nothing was written") from None
    return answer


def explain_place(place: str) -> None:
    """Print what a field may be and what it means, or a table's fields. Raises BadInput, with the nearest name, for neither."""
    location = place.split(".")
    tables = describe.tables_at(location)
    if tables:
        for variant, table in tables.items():
            print_line(f"{f'{place} ({variant})' if len(tables) > 1 else place}: {table['description']}")
        print_table(f"Fields of {place}", list_fields(location))
        return
    *above, name = location
    known = list_fields(above)
    found = [field for field in known if field["field"] == name]
    if not found:
        meant = describe.suggest_field(location)
        raise BadInput(
            f"--explain {place}: no such field; {f'did you mean {meant}? ' if meant else ''}"
            f"known here: {', '.join(describe.fields_at(above if known else []))}"
        )
    for field in found:
        print_line(f"{place}{f' ({kinds})' if (kinds := field.get('of')) else ''}: {field['type']}")
        print_line(f"  {field['meaning']}")
        print_line(f"  default: {field['default']}")
    goes_on = "goes on with another value" if may_change(place) else "keeps it: another value needs another name"
    print_line(f"  A run that has begun {goes_on}.")


def list_fields(location: list[str]) -> list[dict[str, str]]:
    """The fields of the tables at a place, in words; `of` names the kinds of the table that have it, where there are some."""
    tables = describe.tables_at(location)
    return [
        {
            "field": name,
            **({"of": ", ".join(kinds)} if len(tables) > 1 else {}),
            "type": describe.word_type(node),
            "default": word_default(node, required=name in tables[kinds[0]].get("required", ())),
            "meaning": describe.meaning_of(tables[kinds[0]], name),
        }
        for name, forms in describe.fields_at(location).items()
        for kinds, node in forms
    ]


def word_default(node: describe.Node, *, required: bool) -> str:
    """A field's default in TOML's notation, which JSON's is for these."""
    if required:
        return "none: it has to be set"
    return json.dumps(node["default"], ensure_ascii=False) if "default" in node else "left out"
