"""The text side of a model folder."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import GenerationConfig

from configs.errors import BadInput
from configs.models import Scratch
from tasks.engines.base import Sampling
from tasks.engines.choose import get_engine, release
from tasks.engines.transformers import TransformersEngine
from tasks.models.reference import ModelRef
from tasks.models.stops import configured_stops, name_stops
from tasks.models.text import Side
from tasks.models.weights import load_weights
from tasks.scratch import init_model, train_tokenizer
from tasks.signals import make_signal

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


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_stops_of_config_json_count_where_no_generation_config_names_any(folder):
    changed(folder / "config.json", eos_token_id=[5, 2, 4])
    (folder / "generation_config.json").unlink()
    assert Side(ref(folder)).stop_ids == [2, 5, 4]
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text('{"model_type": "gemma3", "text_config": {"eos_token_id": 5}}')
    assert configured_stops(str(folder / "text")) == [5]
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert Side(ref(folder)).stop_ids == [2, 3]


def test_a_familys_default_is_no_stop(folder):
    """Llama's config class says 2 where the file says nothing."""
    (folder / "generation_config.json").unlink()
    changed(folder / "config.json", eos_token_id=None)
    side = Side(ref(folder))
    side.tokenizer.eos_token, side.tokenizer.chat_template = "<pad>", None
    side.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert Side(ref(folder, "plain")).stop_ids == [0]


def test_a_stop_that_the_head_lacks_is_none(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2, 270, -1, 100000]}')
    assert Side(ref(folder)).stop_ids == [2, 5]


def test_the_end_of_a_turn_is_a_stop(folder):
    """A base model's end token ends texts; its template ends turns with another."""
    template = folder / "chat_template.jinja"
    for written, found in (("<user>", [2, 4]), ("  <pad> ", [2, 0]), ("</a><user>", [2, 4]), ("<end>", [2])):
        template.write_text(TURNS.replace("<end>", written))
        side = Side(ref(folder))
        assert (side.stop_ids, side.turn_end) == (found, found[-1])
        assert side.beta.roles[found[-1]] == "stop"
        assert Side(ref(folder, "plain")).stop_ids == [2]  # whose turns it does not write
    template.write_text(TURNS.replace("<end>", "\n"))
    side = Side(ref(folder))
    assert (side.stop_ids, side.turn_end) == ([2], None)
    template.write_text("{{ raise_exception('no') }}")
    assert Side(ref(folder)).stop_ids == [2]


TURNS = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


def test_a_recipe_adds_stops(folder):
    def stops(*texts: str) -> list[int]:
        side = Side(replace(ref(folder), stop=texts))
        side.check()
        return side.stop_ids

    new_line = Side(ref(folder)).encoder.encode(["\n"])[0]
    assert stops("<user>", "\n") == [2, 4, *new_line]
    assert stops("<end>") == [2]
    with pytest.raises(BadInput, match=r"stop: 'words!' is \d tokens \(.*\) in its tokenizer; give a token, or a string"):
        stops("words!")
    assert ref(folder).identity.keys() == {"digest", "rendering", "dtype", "attention"}
    assert replace(ref(folder), stop=("\n",)).identity["stop"] == ("\n",)


def test_a_saved_model_names_all_stops(folder):
    side = Side(replace(ref(folder), stop=("<user>",)))
    model = load_weights(side.ref)
    name_stops(model, side.stop_ids)
    model.save_pretrained(folder / "saved")
    assert GenerationConfig.from_pretrained(folder / "saved").eos_token_id == [2, 4]
    model.generation_config.eos_token_id = [4, 2]
    name_stops(model, side.stop_ids)
    assert model.generation_config.eos_token_id == [4, 2]  # which names them already


def test_a_plain_prompt_has_what_the_tokenizer_puts_in_front_alone(folder):
    """`add_eos_token`: its post-processor ends every text."""
    side = Side(ref(folder, "plain"))
    messages = [{"role": "user", "content": "some words"}]
    bare = side.render(messages)
    for single, wanted in (
        ("<s> $A <end>", [1, *bare]),
        ("$A <end>", bare),
        ("<s> $A", [1, *bare]),
        ("<s> <s> $A", [1, 1, *bare]),
    ):
        special = [("<s>", 1), ("<end>", 2)]
        side.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        side.tokenizer.save_pretrained(folder / "saved")
        assert Side(ref(folder / "saved", "plain")).render(messages) == wanted


def test_a_pad_token_that_the_head_lacks_is_not_used(folder):
    side = Side(ref(folder))
    assert side.pad_id == 0
    side.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    side.tokenizer.save_pretrained(folder)
    side = Side(ref(folder))
    assert side.tokenizer.pad_token_id == side.rows
    assert side.pad_id == 2
    generator = TransformersEngine(ref(folder))
    assert len(generator.generate([[1, 2, 3], [5]], [0, 1], Sampling(4))) == 2
    assert len(generator.score([[1, 2, 3], [5]], [[7], [8, 9]], make_signal("sampled"))) == 2


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


def test_a_model_stays_loaded_and_is_given_back(folder):
    """Batch sizes do not load a model again, and its memory is free after its release."""
    held = get_engine(ref(folder), batch_size=4)
    assert get_engine(ref(folder), batch_tokens=100) is held
    assert (held.batch_size, held.batch_tokens) == (256, 100)
    gone = weakref.ref(held.model)
    del held
    release()
    assert gone() is None
