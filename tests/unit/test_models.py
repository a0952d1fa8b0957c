"""The text side of a model folder."""

import weakref
from pathlib import Path

import pytest

from configs.errors import BadInput
from configs.models import Scratch
from tasks.engines.base import Sampling
from tasks.engines.choose import get_engine, release
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.models.text import Side
from tasks.scratch import init_model, train_tokenizer

SMALL = Scratch(vocab_size=270, layers=1, width=16, heads=2, feed_forward=16, context=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(SMALL, ["some words and other words"])
    tokenizer.save_pretrained(tmp_path)
    init_model(SMALL, tokenizer, seed=0).save_pretrained(tmp_path)
    return tmp_path


def ref(folder: Path, rendering: str = "chat") -> ModelRef:
    return ModelRef(str(folder), str(folder), rendering=rendering, device="cpu")


def test_ids_without_a_row_of_the_head_are_not_ids(folder):
    """As with Gemma 3, whose tokenizer knows one id more than its model."""
    side = Side(ref(folder))
    before = len(side.beta.values)
    side.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side.tokenizer.save_pretrained(folder)

    assert len(Side(ref(folder)).tokenizer) == before + 1
    assert len(Side(ref(folder)).beta.values) == Side(ref(folder)).vocabulary.size == before
    generator = TransformersEngine(ref(folder))
    completion = generator.generate([[1, 2, 3]], [0], Sampling(4))[0]
    assert all(0 <= i < before for i in completion.ids)


def test_stops_are_all_end_tokens_the_tokenizers_own_first(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2, 4]}')
    side = Side(ref(folder))
    assert side.tokenizer.eos_token_id == 2
    assert side.stop_ids == [2, 5, 4]


def test_renderings(folder):
    messages = [{"role": "user", "content": "some words"}]
    chat, plain = Side(ref(folder)), Side(ref(folder, "plain"))
    assert chat.tokenizer.decode(chat.render(messages)) == "<s><user>some words<end><assistant>"
    assert plain.tokenizer.decode(plain.render(messages)) == "some words\n"


def test_a_chat_needs_a_template(folder):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, match=r"no chat template.*rendering = 'plain'"):
        Side(ref(folder))
    assert Side(ref(folder, "plain")).stop_ids == [2]


def test_one_model_at_a_time_stays_loaded_and_is_given_back(folder):
    """Batch sizes do not load a model again, and training starts with the memory of the last stage's model."""
    held = get_engine(ref(folder), batch_size=4)
    assert get_engine(ref(folder), batch_tokens=100) is held
    assert (held.batch_size, held.batch_tokens) == (256, 100)
    gone = weakref.ref(held.model)
    del held
    release()
    assert gone() is None
