"""A model's chat template: prompts as text, what it cannot render, and the token that ends an assistant's turn."""

import re
from itertools import pairwise
from typing import Any

import jinja2
from jinja2 import meta, nodes
from transformers import PreTrainedTokenizerFast

from configs.errors import BadInput
from tasks.models.template import Message

FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
ANSWER = "Potstill answers"  # a text that no template writes by itself
GENERATION = r"\{%-?\s*(end)?generation\s*-?%\}"  # a tag of transformers' own
GIVEN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"}
TURN = ({"role": "user", "content": "Who answers?"}, {"role": "assistant", "content": ANSWER})


def write_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    tools: list[Any] | None = None,
    *,
    told: dict[str, Any],
    open_turn: bool = True,
) -> str:
    """The text of a conversation, up to where the answer begins (`open_turn`) or as it stands.

    `told` are the template's own arguments. Raises BadInput with what the template said and what would be right.
    """
    given = [{key: value for key, value in message.items() if value is not None or key == "content"} for message in messages]
    try:
        text = tokenizer.apply_chat_template(given, tools, add_generation_prompt=open_turn, tokenize=False, **told)
    except FAILURES as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"its chat template says '{said}'; {_advice(error, messages)}") from None
    return str(text)


def _advice(error: Exception, messages: list[Message]) -> str:
    """What mends a template's refusal, where a family is known for it."""
    said, roles = str(error).lower(), [message["role"] for message in messages]
    if isinstance(error, jinja2.exceptions.SecurityError | jinja2.TemplateSyntaxError):
        return (
            "correct that template: the recipe's chat_template, else chat_template.jinja or tokenizer_config.json in its folder"
        )
    others = "set chat_template to one that takes them, or rendering = 'plain' for this model"
    if "system" in said and "system" in roles:
        return "this family has no system role: set system = '' and put the text into the first user message, " + others
    if "tool" in said or "tool" in roles:
        return "this family has no role for tools: leave such rows out, " + others
    if "alternat" in said or any(a == b for a, b in pairwise(roles)):
        return "this family wants user and assistant in turn: merge messages of one role that follow one another, " + others
    return "give messages that it takes, " + others


def check_arguments(tokenizer: PreTrainedTokenizerFast, told: dict[str, Any]) -> None:
    """Refuse arguments that the chat template never reads."""
    templates = tokenizer.chat_template
    source = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
    if unknown := [name for name in told if name in GIVEN or not re.search(rf"\b{re.escape(name)}\b", source)]:
        raise BadInput(f"chat_template_kwargs: its chat template takes no {', '.join(unknown)}; {_known(source)}")


def parse_chat_template(source: str) -> nodes.Template:
    """A chat template as jinja2 reads it. Raises jinja2's TemplateSyntaxError."""
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(re.sub(GENERATION, "", source))


def _known(source: str) -> str:
    try:
        parsed = parse_chat_template(source)
    except jinja2.TemplateError:
        return "give names that it reads"
    names = meta.find_undeclared_variables(parsed) - GIVEN
    return f"it reads {', '.join(sorted(names))}" if names else "it reads none"


def find_turn_end(tokenizer: PreTrainedTokenizerFast, told: dict[str, Any]) -> int | None:
    """The id of the token that the template writes behind an assistant's text; None where its turn never ends."""
    try:
        text = write_chat(tokenizer, list(TURN), told=told, open_turn=False)
    except BadInput:  # a row's own refusal says more
        return None
    _, found, behind = text.rpartition(ANSWER)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in added and added[i].content.strip()), None)
