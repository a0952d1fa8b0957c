"""What a recipe may say, as JSON Schema: for editors, for `potstill recipe --explain`, and for messages about mistakes."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from configs.schema import Recipe

Node = dict[str, Any]  # a part of the schema
FILE = "recipe.schema.json"  # in this folder, made by `make schema`
DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest that TOML editors read


class _Schema(GenerateJsonSchema):
    """TOML has no null: a field that may be left out has the schema of what it may be."""

    def nullable_schema(self, schema: Any) -> Node:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> Node:
        node = super().default_schema(schema)
        if node.get("default") is None or isinstance(node["default"], dict):
            node.pop("default", None)  # a table's fields have their own
        return node

    def tuple_schema(self, schema: Any) -> Node:
        node = super().tuple_schema(schema)
        if parts := node.pop("prefixItems", None):  # all of one kind, as TOML's lists are
            node["items"] = parts[0]
        return node

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@lru_cache(maxsize=1)
def recipe_schema() -> Node:
    """The JSON Schema of a recipe. What several fields must be together is not in it: `configs.load` checks that."""
    return {"$schema": DRAFT, **Recipe.model_json_schema(schema_generator=_Schema)}


def tables_at(location: Sequence[str]) -> dict[str, Node]:
    """The tables that can stand at a place, by their variant (`file`, `bytes`; empty where there is one kind).

    A part of `location` is a field, a number in a list, or a variant's name. Empty where there is no table.
    """
    tables = _tables_of(recipe_schema())
    for part in location:
        if part in tables:
            tables = {part: tables[part]}
        elif not part.isdigit():
            fields = [(variant, table["properties"].get(part, {})) for variant, table in tables.items()]
            outer = len(tables) > 1  # nothing has chosen among them so far
            tables = {inner or variant * outer: found for variant, node in fields for inner, found in _tables_of(node).items()}
    return tables


def field_of(location: Sequence[str]) -> str:
    """`prompts.path` for the place prompts, file, path: a variant's name is no part of what a recipe says."""
    kept: list[str] = []
    for at, part in enumerate(location):
        if not part or part not in tables_at(location[:at]):
            kept.append(part)
    return ".".join(kept)


def fields_at(location: Sequence[str]) -> dict[str, list[tuple[list[str], Node]]]:
    """The fields of the tables at a place; of each what it may be, with the variants that say so (`""` for a plain table)."""
    found: dict[str, list[tuple[list[str], Node]]] = {}
    for variant, table in tables_at(location).items():
        for name, node in table["properties"].items():
            node = _resolve(node)
            for variants, same in found.setdefault(name, []):
                if same == node:
                    variants.append(variant)
                    break
            else:
                found[name].append(([variant], node))
    return found


def variants_at(location: Sequence[str]) -> list[str]:
    """The names of the tables among which a field chooses; empty where there is no choice."""
    return [variant for variant in tables_at(location) if variant]


def list_places(location: tuple[str, ...] = ()) -> Iterator[str]:
    """Every field of a recipe, as `train.batch_size`."""
    for name in fields_at(location):
        yield ".".join([*location, name])
        yield from list_places((*location, name))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` was probably meant to be, if any."""
    return next(iter(get_close_matches(word, list(known), n=1)), None)


def suggest_field(location: Sequence[str]) -> str | None:
    """The field that was probably meant by one that does not exist: a like name in its table, or else in another one."""
    *table, name = location
    if near := nearest(name, fields_at(table)):
        return field_of([*table, near])
    if not tables_at(table):
        return nearest(".".join(location), list_places())
    names = {place: place.rpartition(".")[2] for place in list_places()}
    near = nearest(name, names.values())
    mine = field_of(location)  # which another variant of its table may have
    places = [place for place, other in names.items() if other == near and place != mine]
    plain = [place for place in places if not place.startswith("teachers.")]  # whose fields are [teacher]'s and [score]'s
    return " or ".join(plain or places) or None


def meaning_of(table: Node, name: str) -> str:
    """What a field means; what a variant's own name stands for, its table says."""
    node = _resolve(table["properties"][name])
    text: str = table["description"] if "const" in node else node["description"]
    return text


def word_type(node: Node) -> str:
    """A field's type and limits in words: `integer, 1 or more`."""
    if options := node.get("anyOf"):
        return " or ".join(word_type(option) for option in options)
    if "const" in node:
        return repr(node["const"])
    if "enum" in node:
        return " or ".join(map(repr, node["enum"]))
    if node.get("type") == "array":
        inner = _resolve(node["items"])
        count = f" of {node['minItems']}" if node.get("minItems") == node.get("maxItems", 0) else ""
        return f"list{count}: {word_type(inner)}"
    kind = "table" if node.get("type", "object") == "object" else str(node["type"])
    return ", ".join([kind, *_word_limits(node)])


def _word_limits(node: Node) -> Iterator[str]:
    words = {"minimum": "{} or more", "exclusiveMinimum": "more than {}", "maximum": "{} or less"}
    words |= {"exclusiveMaximum": "less than {}", "pattern": "as {}"}
    if "minimum" in node and "maximum" in node:
        yield f"{node['minimum']} to {node['maximum']}"
        words = {key: word for key, word in words.items() if not key.endswith("imum") or key.startswith("exclusive")}
    yield from (word.format(node[key]) for key, word in words.items() if key in node)


def _resolve(node: Node) -> Node:
    """What a reference to a definition stands for, with what is said beside it."""
    if "$ref" not in node:
        return node
    return {**recipe_schema()["$defs"][node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}


def _tables_of(node: Node) -> dict[str, Node]:
    node = _resolve(node)
    if node.get("type") == "array":
        return _tables_of(node["items"])
    if "discriminator" in node:
        variants = {ref: variant for variant, ref in node["discriminator"]["mapping"].items()}
        return {variants[option["$ref"]]: _resolve(option) for option in node["oneOf"]}
    return {"": node} if "properties" in node else {}
