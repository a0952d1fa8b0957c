"""A model's chat template: prompts as text, what it cannot render, and the token that ends an assistant's turn."""

from itertools import pairwise
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

from configs.errors import BadInput

Message = dict[str, Any]  # role, content, and what else a template reads, such as tool_calls

FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
ANSWER = "Potstill answers"  # a text that no template writes by itself
TURN = ({"role": "user", "content": "Who answers?"}, {"role": "assistant", "content": ANSWER})


def write_chat(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], tools: list[Any] | None = None, *, open_turn: bool = True
) -> str:
    """The text of a conversation, up to where the answer begins (`open_turn`) or as it stands.

    Raises BadInput with what the template said and what would be right.
    """
    given = [{key: value for key, value in message.items() if value is not None or key == "content"} for message in messages]
    try:
        text = tokenizer.apply_chat_template(given, tools, add_generation_prompt=open_turn, tokenize=False)
    except FAILURES as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"its chat template says '{said}'; {_advice(error, messages)}") from None
    return str(text)


def _advice(error: Exception, messages: list[Message]) -> str:
    """What mends a template's refusal, where a family is known for it."""
    said, roles = str(error).lower(), [message["role"] for message in messages]
    if isinstance(error, jinja2.exceptions.SecurityError | jinja2.TemplateSyntaxError):
        return "correct chat_template.jinja (or chat_template in tokenizer_config.json) in its folder"
    plain = "or set rendering = 'plain' for this model"
    if "system" in said and "system" in roles:
        return f"this family has no system role: put the text into the first user message, {plain}"
    if "tool" in said or "tool" in roles:
        return f"this family has no role for tools: leave such rows out, {plain}"
    if "alternat" in said or any(a == b for a, b in pairwise(roles)):
        return f"this family wants user and assistant in turn: merge messages of one role that follow one another, {plain}"
    return f"give messages that it takes, {plain}"


def find_turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of the token that the template writes behind an assistant's text; None where its turn never ends."""
    try:
        text = write_chat(tokenizer, list(TURN), open_turn=False)
    except BadInput:  # a row's own refusal says more
        return None
    _, found, behind = text.rpartition(ANSWER)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in added and added[i].content.strip()), None)
