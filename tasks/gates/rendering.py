"""Gates on how prompts are rendered, which need no weights: of every prompt of a run, and for each side."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import AutoConfig

from configs.errors import BadInput
from configs.prompts import GymPrompts, TablePrompts
from configs.schema import Recipe
from configs.teachers import choose_teacher, role_of
from storage.lineage import digest_json
from tasks.gates.gate import Gate
from tasks.models.reference import ModelRef
from tasks.models.template import Message
from tasks.models.text import Side, side
from tasks.rows.messages import Prompt, load_prompts
from tasks.rows.sources import digest_source, split_prompts
from tasks.rows.split import BARRED, CLOSED, LOST, TOO_LONG, UNTAKEN, Judge, Refusal, SourceRow, accept_all, record_of
from tasks.rows.teachers import explain_untaken

SECONDS = 10.0  # for a side; of more prompts than that the others are left to the stages
LONG = 16  # characters that a text does not hold by chance
MARK = " ⟨potstill⟩"

Row = dict[str, Any]  # of prompts: messages, split, and maybe tools
_passed: set[str] = set()  # what this process has looked at already: a command checks a recipe before its flow does


def refuse_rendering(recipe: Recipe, sides: dict[str, ModelRef]) -> None:
    """Raise BadInput where a side cannot read the prompts of a recipe as they are meant. Of a task two items are made.

    Where the recipe leaves out what cannot be used, it does so where nothing is left.
    """
    config, most, rows = recipe.prompts, recipe.rollout.max_new_tokens, None
    files = digest_source(config)
    for role, ref in sides.items():
        whose = [[teacher.name, teacher.where] for teacher in recipe.teachers]
        key = digest_json([role, ref.path, ref.identity, config.model_dump(mode="json"), files, recipe.seed, most, whose])
        if key in _passed:
            continue
        rows = list_prompts(recipe, sides) if rows is None else rows
        for gate in rendering_gates(role, ref, rows_of_role(recipe, role, rows), most):
            if gate.ok is False:
                raise BadInput(gate.complaint())
        _passed.add(key)


def list_prompts(recipe: Recipe, sides: dict[str, ModelRef]) -> list[Row]:
    """The prompts of a recipe as rows of both tables; of a procedural task one for each."""
    config = recipe.prompts
    if isinstance(config, GymPrompts) and not recipe.teachers:  # whose items are all alike, and take long to make
        config = config.model_copy(update={"train": 1, "eval": 1})
    tables = split_prompts(config, recipe.seed, judge_of(recipe, sides))
    return [row for table in tables.values() for row in table.to_pylist()]


def rows_of_role(recipe: Recipe, role: str, rows: Sequence[Row]) -> Sequence[Row]:
    """The prompts that a side reads: one of several teachers reads those of its rows alone."""
    owners = {role_of(teacher): at for at, teacher in enumerate(recipe.teachers)}
    if role not in owners:
        return rows
    fields = [prompt.fields for prompt in load_prompts(rows)]
    return [row for row, known in zip(rows, fields, strict=True) if choose_teacher(recipe.teachers, known) == owners[role]]


def judge_of(recipe: Recipe, sides: Mapping[str, ModelRef]) -> Judge:
    """What the sides of a recipe cannot use of its rows, where `prompts.unusable` leaves that out."""
    if not leaves_out(recipe):
        return accept_all
    contexts, most = {role: context_of(ref) for role, ref in sides.items()}, recipe.rollout.max_new_tokens

    def find_refusal(text_side: Side, prompt: Prompt, context: int | None) -> tuple[str, str] | None:
        try:
            ids = text_side.render(*prompt)
        except BadInput as error:
            return BARRED, str(error)
        if lost := find_lost_of(text_side, prompt):
            return LOST, lost
        if is_closed(text_side, ids):
            return CLOSED, "the prompt ends in a token that ends answers"
        if context and len(ids) + most > context:
            return TOO_LONG, f"{len(ids)} tokens and rollout.max_new_tokens = {most} are more than the {context} of its context"
        return None

    def judge(row: SourceRow) -> Refusal | None:
        (prompt,) = load_prompts([record_of(row, "")])
        at = choose_teacher(recipe.teachers, row.fields)
        if recipe.teachers and at is None:
            return Refusal(UNTAKEN, explain_untaken(recipe.teachers, row.fields, row.place))
        own = role_of(None if at is None else recipe.teachers[at])
        for role, ref in sides.items():
            if role in ("student", own) and (found := find_refusal(side(ref), prompt, contexts[role])):
                return Refusal(found[0], f"{row.place}: {role}: {found[1]}")
        return None

    return judge


def leaves_out(recipe: Recipe) -> bool:
    """Whether rows that cannot be used are left out; a task makes none."""
    return isinstance(recipe.prompts, TablePrompts) and recipe.prompts.unusable == "leave_out"


def rendering_gates(role: str, ref: ModelRef, rows: Sequence[Row], max_new_tokens: int) -> Iterator[Gate]:
    """Whether all of each prompt is rendered, is left open for an answer, and leaves room for it.

    Raises BadInput, with the row, where a chat template refuses one.
    """
    text_side, lengths, closed, lost, first = side(ref), [], 0, 0, ""
    started = time.monotonic()
    for number, prompt in enumerate(load_prompts(rows)):
        if time.monotonic() - started > SECONDS:
            break
        try:
            ids = text_side.render(*prompt)
        except BadInput as error:
            raise BadInput(f"{role}, {name_row(rows, number)}: {error}") from None
        lengths.append(len(ids))
        closed += is_closed(text_side, ids)
        if what := find_lost_of(text_side, prompt):
            lost, first = lost + 1, first or f"; {name_row(rows, number)}: {what}"
    if not lengths:
        return
    of = f"of {len(lengths)} prompts" + (f" that were looked at (there are {len(rows)})" if len(lengths) < len(rows) else "")
    yield Gate(f"{role}: kept", lost, 0, detail=of + first)
    yield Gate(f"{role}: closed", closed, 0, detail=of)
    if gate := room_gate(role, ref, lengths, max_new_tokens, of):
        yield gate


def room_gate(role: str, ref: ModelRef, lengths: Sequence[int], max_new_tokens: int, of: str = "") -> Gate | None:
    """Whether prompts of these lengths, in tokens, leave room for an answer; None where the model sets no limit."""
    if not lengths or not (context := context_of(ref)):
        return None
    over, longest = sum(n + max_new_tokens > context for n in lengths), max(lengths)
    of = of or f"of {len(lengths)} prompts"
    detail = f"longest prompt {longest} tokens, and rollout.max_new_tokens = {max_new_tokens}; too long: {over} {of}"
    return Gate(f"{role}: room", longest + max_new_tokens, context, detail=detail)


def expect_room(role: str, ref: ModelRef, rendered: Sequence[list[int]], max_new_tokens: int) -> None:
    """Raise BadInput where prompts of a shard leave no room: `refuse_rendering` looks at as many as it has time for."""
    gate = room_gate(role, ref, [len(ids) for ids in rendered], max_new_tokens)
    if gate is not None and gate.ok is False:
        raise BadInput(gate.complaint())


def name_row(rows: Sequence[Row], number: int) -> str:
    """`training prompt 3 ('What is …')`: counted from 1 within its split, in the order of the run's tables."""
    split = rows[number]["split"]
    place = sum(row["split"] == split for row in rows[: number + 1])
    shown = " ".join(str(rows[number]["messages"][-1]["content"]).split())
    return f"{'training' if split == 'train' else 'eval'} prompt {place} ('{shown[:40]}{'…' * (len(shown) > 40)}')"


def is_closed(text_side: Side, ids: list[int]) -> bool:
    """Whether a prompt ends in a control token that ends answers; a stop of the recipe's may be text, such as a line break."""
    if not ids or ids[-1] not in text_side.stop_ids:
        return False
    added = text_side.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return ids[-1] in added and added[ids[-1]].special


def find_lost_of(text_side: Side, prompt: Prompt) -> str | None:
    """What of a row's prompt, as a side frames it, does not reach the model."""
    return find_lost(text_side, text_side.frame(prompt.messages, prompt.fields), prompt.tools)


def find_lost(text_side: Side, framed: list[Message], tools: list[Any] | None) -> str | None:
    """What of a conversation does not reach the model: changing it changes nothing of the rendered text."""
    text = text_side.write(framed, tools)

    def matters(others: list[Message], other_tools: list[Any] | None) -> bool:
        try:
            return text_side.write(others, other_tools) != text
        except BadInput:
            return True

    for place, message in enumerate(framed):
        before, behind = framed[:place], framed[place + 1 :]
        content = (message["content"] or "").strip()
        kept = not content or (len(content) >= LONG and content in text)
        if not kept and not matters([*before, {**message, "content": content + MARK}, *behind], tools):
            return f"its {message['role']} message is not in the text ('{content:.40}')"
        if message.get("tool_calls") and not matters([*before, {**message, "tool_calls": None}, *behind], tools):
            return f"the tool calls of its {message['role']} message are not in the text"
    return "its tools are not in the text" if tools and not matters(framed, None) else None


def context_of(ref: ModelRef) -> int | None:
    """The longest sequence that a model's positions allow; None where its config does not say, and without a config."""
    try:
        config = AutoConfig.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
    except (OSError, ValueError):  # a server's model may lie here as a tokenizer alone
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)
