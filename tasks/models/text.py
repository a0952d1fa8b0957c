"""A model's text side, without its weights: tokenizer, token bytes, stop ids, rendering of prompts."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from configs.errors import BadInput
from tasks.models.reference import ModelRef, explain_load_errors, local_name
from tasks.tokens.token_bytes import Encoder, TokenBytes, token_bytes
from tasks.tokens.vocabulary import Vocabulary


class Side:
    """A model's text side, without its weights: tokenizer, bytes, stop ids, rendering of prompts."""

    def __init__(self, ref: ModelRef):
        self.ref = ref
        with explain_load_errors(ref.path):
            tokenizer = AutoTokenizer.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise BadInput(f"{ref.path}: its tokenizer has no tokenizer.json; choose a model that has one (a fast tokenizer)")
        self.tokenizer = tokenizer
        if ref.rendering == "chat" and not self.tokenizer.chat_template:
            raise BadInput(
                f"{ref.path}: its tokenizer has no chat template, and the prompts are chats; "
                "set rendering = 'plain' for this model, or choose one with a template"
            )

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a completion, the tokenizer's own end token first."""
        try:
            configured = GenerationConfig.from_pretrained(self.ref.local).eos_token_id
        except OSError:
            configured = None
        ids = [self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
        stops = list(dict.fromkeys(i for i in ids if i is not None))
        if not stops:
            raise BadInput(f"{self.ref.path}: no end token in its tokenizer or generation config; set eos_token there")
        return stops

    @cached_property
    def beta(self) -> TokenBytes:
        """Bytes of the ids that the model can emit: a tokenizer may know more ids than the head has rows."""
        beta = token_bytes(self.tokenizer, self.stop_ids, self.ref.path)
        return TokenBytes(beta.values[: self.rows], beta.roles[: self.rows])

    @cached_property
    def rows(self) -> int | None:
        """Rows of the model's head, padding included; None for a tokenizer alone."""
        try:
            config = AutoConfig.from_pretrained(self.ref.local, trust_remote_code=self.ref.trust_remote_code)
        except (OSError, ValueError):
            return None
        rows: int | None = config.get_text_config().vocab_size
        return rows

    @cached_property
    def vocabulary(self) -> Vocabulary:
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(len(self.beta.values))))
        return Vocabulary(self.beta, self.stop_ids, [piece or "" for piece in pieces])

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.beta)

    @property
    def pad_id(self) -> int:
        return self.stop_ids[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a prompt, up to where the completion starts."""
        ids: list[int]
        if self.ref.rendering == "plain":
            ids = self.tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
        else:  # the template writes BOS itself
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


@lru_cache(maxsize=8)
def side(ref: ModelRef) -> Side:
    """The text side of a model, loaded once a process."""
    return Side(ref)


def tokenizer_of(name: str) -> Side:
    """The text side of a hub id, folder or GGUF file whose weights and template are not needed."""
    text_side = side(ModelRef(local_name(name), "", rendering="plain"))
    text_side.encoder.check(name)
    return text_side


def teacher_ids(rows: Sequence[dict[str, Any]], teacher: Side, as_sampled: bool) -> list[list[int] | None]:
    """Each completion in the teacher's ids, its stop included; None where its tokenizer cannot spell the text.

    `rows` have `token_ids`, `text` and `finish_reason`. With one vocabulary on both sides (`as_sampled`) the sampled ids
    themselves are used: a student may split a text in other ways than `encode` does.
    """
    if as_sampled:
        return [row["token_ids"] or None for row in rows]
    encoded = teacher.encoder.encode([row["text"] or "" for row in rows])
    stop = teacher.stop_ids[:1]
    return [
        None if ids is None else ids + stop * (row["finish_reason"] == "stop") for ids, row in zip(encoded, rows, strict=True)
    ]
