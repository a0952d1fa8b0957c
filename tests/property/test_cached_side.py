"""A teacher's side read from its vocabulary table alone is the side that its tokenizer gives, for six real tokenizers."""

import fetch
import numpy as np
import pytest

from storage.caches import CacheWriter
from storage.schemas import CACHED_TEXTS, prompts_schema
from tasks.models.reference import refer_to_cache
from tasks.models.text import side, tokenizer_of
from tasks.tokens.token_bytes import BYTE_TOKEN
from tasks.tokens.vocabulary import match
from tasks.vocab import make_vocab_table


@pytest.mark.parametrize("name", fetch.TOKENIZERS)
def test_a_side_comes_back_from_its_vocabulary(name, tmp_path):
    own = tokenizer_of(str(fetch.MODELS / name))
    prompts = prompts_schema().empty_table().drop_columns(["split"])
    writer = CacheWriter(tmp_path)
    writer.add_texts(CACHED_TEXTS.empty_table())
    writer.finish(prompts, make_vocab_table(own.vocabulary, own.vocabulary), {"teacher": {"digest": ""}}, "")
    read = side(refer_to_cache(str(tmp_path)))
    assert read.stop_ids == sorted(own.stop_ids)
    assert read.vocabulary.same_as(own.vocabulary)
    # Which id stands for a class follows from the pieces, and they are not stored: byte tokens come last.
    pieces = own.tokenizer.convert_ids_to_tokens(list(range(own.vocabulary.size)))
    assert (sum(BYTE_TOKEN.fullmatch(piece or "") is not None for piece in pieces) == 256) == (name in ("gemma3", "llama2"))
    assert np.array_equal(read.vocabulary.representative, own.vocabulary.representative)
    assert read.vocabulary.by_bytes == own.vocabulary.by_bytes
    student = tokenizer_of(str(fetch.MODELS / "qwen3"))
    found, wanted = (match(student.vocabulary, teacher.vocabulary) for teacher in (read, own))
    assert np.array_equal(found.ids, wanted.ids)
    assert np.array_equal(found.prefix, wanted.prefix)
