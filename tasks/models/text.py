"""A model's text side, without its weights: tokenizer, token bytes, stop ids, rendering of prompts."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from configs.errors import BadInput
from storage.caches import VOCAB_FILE, open_cache
from tasks.models.chat import check_arguments, find_turn_end, write_chat
from tasks.models.reference import ModelRef, explain_load_errors, local_name
from tasks.models.stops import chosen_stops, configured_stops
from tasks.models.template import Message, Unfilled, write_last
from tasks.tokens.token_bytes import Encoder, TokenBytes, name_byte_tokens, read_token_bytes, token_bytes
from tasks.tokens.vocabulary import Vocabulary

NOTHING: Mapping[str, Any] = {}


class Side:
    """A model's text side, without its weights: tokenizer, bytes, stop ids, rendering of prompts."""

    def __init__(self, ref: ModelRef):
        self.ref = ref
        with explain_load_errors(ref.path):
            tokenizer = AutoTokenizer.from_pretrained(ref.local, trust_remote_code=ref.trust_remote_code)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise BadInput(f"{ref.path}: its tokenizer has no tokenizer.json; choose a model that has one (a fast tokenizer)")
        self.tokenizer, self.told = tokenizer, json.loads(ref.chat_template_kwargs)
        tokenizer.chat_template = ref.chat_template or tokenizer.chat_template
        if ref.rendering == "chat" and not self.tokenizer.chat_template:
            raise BadInput(
                f"{ref.path}: its tokenizer has no chat template, and the prompts are chats; "
                "set rendering = 'plain' for this model, or choose one with a template"
            )

    @cached_property
    def turn_end(self) -> int | None:
        """The id that ends an assistant's turn in the chat template; None without one, and where a turn never ends."""
        return find_turn_end(self.tokenizer, self.told) if self.ref.rendering == "chat" else None

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end a completion, the tokenizer's own end token first."""
        ids = [self.tokenizer.eos_token_id, *configured_stops(self.ref.local), self.turn_end]
        ids += chosen_stops(self.tokenizer, self.ref.stop, self.ref.path)
        stops = [i for i in dict.fromkeys(ids) if i is not None and self._has(i)]
        if not stops:
            raise BadInput(f"{self.ref.path}: no end token in its tokenizer or generation config; set eos_token there")
        return stops

    @property
    def spelling(self) -> str:
        """What the ids of a text follow from, for keys."""
        return self.tokenizer.backend_tokenizer.to_str()

    def _has(self, i: int) -> bool:
        """Whether the model's head has a row for an id."""
        return i >= 0 and (self.rows is None or i < self.rows)

    @cached_property
    def beta(self) -> TokenBytes:
        """Bytes of the ids that the model can emit: a tokenizer may know more ids than the head has rows."""
        beta = token_bytes(self.tokenizer, self.stop_ids, self.ref.path)
        if self.rows is not None and self.rows < len(beta.values):
            own = self.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
            if lost := sum(i >= self.rows and beta.roles[i] == "text" for i in own):
                raise BadInput(
                    f"{self.ref.path}: {lost} tokens of text in tokenizer.json lie beyond vocab_size = {self.rows} of "
                    "config.json, so the model has no row for them; give the tokenizer that belongs to these weights"
                )
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

    def check(self) -> None:
        """Refuse a tokenizer that changes texts, and what of the recipe it or its chat template does not know."""
        own = side(replace(self.ref, stop=())) if self.ref.stop else self  # a stop has no bytes any more
        own.encoder.check(self.ref.path)
        self.vocabulary  # noqa: B018  (which needs all stops)
        self.prefix_ids  # noqa: B018
        try:
            check_arguments(self.tokenizer, self.told)
        except BadInput as error:
            raise BadInput(f"{self.ref.path}: {error}") from None

    @property
    def pad_id(self) -> int:
        """An id that the head has: a pad token may have been added to the tokenizer alone."""
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None or not self._has(pad) else pad

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids of what each answer begins with."""
        ids = self.encoder.encode([self.ref.prefix])[0]
        if ids is None:
            raise BadInput(f"{self.ref.path}: prefix: its tokenizer cannot spell {self.ref.prefix!r}; give other characters")
        return ids

    def frame(self, messages: list[Message], fields: Mapping[str, Any] = NOTHING) -> list[Message]:
        """A row's messages as this side is to read them; `fields` are what its template may name. Raises BadInput."""
        if self.ref.template is not None:
            try:
                messages = write_last(messages, self.ref.template, fields)
            except Unfilled as error:
                raise BadInput(f"template: {self.ref.template!r} cannot be filled ({error})") from None
        system = self.ref.system
        if system is None:
            return messages
        others = [message for message in messages if message["role"] != "system"]
        return [{"role": "system", "content": system}, *others] if system else others

    def write(self, framed: list[Message], tools: list[Any] | None = None) -> str:
        """The text of framed messages, up to where the completion starts. Raises BadInput where the template refuses them."""
        if self.ref.rendering == "plain":
            return "\n".join(message["content"] or "" for message in framed) + "\n"
        try:
            return write_chat(self.tokenizer, framed, tools, told=self.told)
        except BadInput as error:
            raise BadInput(f"{self.ref.path}: {error}") from None

    def render(self, messages: list[Message], tools: list[Any] | None = None, fields: Mapping[str, Any] = NOTHING) -> list[int]:
        """The ids of a prompt, up to where what is sampled starts."""
        text = self.write(self.frame(messages, fields), tools)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # a template writes BOS itself
        if self.ref.rendering == "plain":  # what the tokenizer puts in front, not the end that it may put behind
            whole, length = self.tokenizer(text)["input_ids"], len(ids)
            starts = range(len(whole) - length + 1)
            ids = next((whole[: at + length] for at in starts if whole[at : at + length] == ids), whole)
        return ids + self.prefix_ids if self.ref.prefix else ids

    def render_answer(
        self, messages: list[Message], tools: list[Any] | None, fields: Mapping[str, Any], answer: Message
    ) -> list[int] | None:
        """The ids of an assistant's answer that has more than its content, as its chat template writes it, without the stop.

        None where the template leaves its `reasoning_content` out, or writes the turn in another way than the prompt opens it.
        """
        if self.ref.rendering == "plain":
            return None
        framed = self.frame(messages, fields)
        opened = self.write(framed, tools) + self.ref.prefix
        try:
            text = write_chat(self.tokenizer, [*framed, answer], tools, told=self.told, open_turn=False)
        except BadInput:
            return None
        before, found, _ = text.rpartition(str(answer["content"]))
        if not found or not before.startswith(opened) or answer["reasoning_content"].strip() not in before[len(opened) :]:
            return None
        ids: list[int] = self.tokenizer(before[len(opened) :] + found, add_special_tokens=False)["input_ids"]
        return ids

    def show(self, messages: list[Message], tools: list[Any] | None = None, fields: Mapping[str, Any] = NOTHING) -> str:
        """The very text of a rendered prompt."""
        return self.spell(self.render(messages, tools, fields))

    def spell(self, ids: list[int]) -> str:
        """The text of ids, special tokens included; what a terminal would act on is escaped."""
        text = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class CachedSide(Side):
    """The text side of a teacher that a cache stands for: the bytes and stops of its ids. There is no tokenizer."""

    def __init__(self, ref: ModelRef):
        self.ref, self.cache = ref, open_cache(ref.path)
        self.beta = read_token_bytes(self.cache.vocab())

    @cached_property
    def stop_ids(self) -> list[int]:
        return [i for i, role in enumerate(self.beta.roles) if role == "stop"]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.beta, self.stop_ids, name_byte_tokens(self.beta))

    @property
    def spelling(self) -> str:
        return str(self.cache.told["files"][VOCAB_FILE])

    def check(self) -> None:
        """Refuse a table that is no vocabulary."""
        if not self.stop_ids or self.cache.vocab()["token_id"].to_pylist() != list(range(len(self.beta.values))):
            raise BadInput(f"{self.ref.path}: its vocabulary has no stop, or ids that are not in order; export the cache anew")


@lru_cache(maxsize=8)
def side(ref: ModelRef) -> Side:
    """The text side of a model, loaded once per process."""
    return CachedSide(ref) if ref.cached else Side(ref)


def tokenizer_of(name: str) -> Side:
    """The text side of a hub id, folder or GGUF file whose weights and template are not needed."""
    text_side = side(ModelRef(local_name(name), "", rendering="plain"))
    text_side.check()
    return text_side
