"""Models from GGUF files: a tiny one that is written here by the `gguf` package, quantised as real ones are."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import BadInput
from configs.models import Model, Scratch
from tasks.models.reference import make_reference
from tasks.models.text import Side, tokenizer_of
from tasks.models.weights import load_weights
from tasks.scratch import SPECIAL, init_model, train_tokenizer

SHAPE = Scratch(vocab_size=300, layers=2, width=64, heads=2, feed_forward=96, context=64)
QUANTISED = gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def rotated(weight: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the rows of query and key weights."""
    rows, columns = weight.shape
    return weight.reshape(SHAPE.heads, 2, rows // SHAPE.heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model.gguf`, with its matrices in Q8_0, and the folder `plain` with the same model before that."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(SHAPE, ["some words and other words"] * 3)
    model = init_model(SHAPE, tokenizer, seed=0)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(SHAPE.layers)
    writer.add_embedding_length(SHAPE.width)
    writer.add_feed_forward_length(SHAPE.feed_forward)
    writer.add_context_length(SHAPE.context)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    control = len(SPECIAL)
    writer.add_token_types([gguf.TokenType.CONTROL] * control + [gguf.TokenType.NORMAL] * (len(tokenizer) - control))

    learned = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in learned])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    state = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name == "lm_head.weight":
                continue
            data, place = value.numpy(), name.removesuffix(".weight").removeprefix("model.")
            if place.startswith("layers."):
                _, layer, inner = place.split(".", 2)
                place = f"blk.{layer}.{NAMES[inner]}"
            else:
                place = {"embed_tokens": "token_embd", "norm": "output_norm"}[place]
            if data.ndim == 1:
                writer.add_tensor(f"{place}.weight", data)
                continue
            half = gguf.quants.quantize(data, QUANTISED)
            value.copy_(torch.from_numpy(gguf.quants.dequantize(half, QUANTISED)))  # what is left of it
            turned = rotated(data) if "attn_q" in place or "attn_k" in place else data
            writer.add_tensor(f"{place}.weight", gguf.quants.quantize(turned, QUANTISED), raw_dtype=QUANTISED)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


def test_the_model_is_the_dequantised_one(folder):
    file = str(folder / "model.gguf")
    ref = make_reference(Model(model=file), file)
    ids = torch.tensor([[1, 40, 50, 60, 70]])
    with torch.no_grad():
        got = load_weights(ref)(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(folder / "plain")(ids).logits
    assert torch.allclose(got, wanted, atol=1e-5)
    assert got.std() > 1e-3


def test_the_tokenizer_is_the_same(folder):
    file = str(folder / "model.gguf")
    messages = [{"role": "user", "content": "some words, and Ünïcode 👩"}]
    plain = AutoTokenizer.from_pretrained(folder / "plain")
    got = Side(make_reference(Model(model=file), file))
    wanted = plain(plain.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), add_special_tokens=False)
    assert got.render(messages) == wanted["input_ids"]
    assert got.stop_ids == [plain.eos_token_id]
    assert tokenizer_of(file).beta.values == got.beta.values


def test_a_file_is_converted_once(folder, cache):
    file = str(folder / "model.gguf")
    first = make_reference(Model(model=file), file)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert make_reference(Model(model=file), file) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times
    assert {path.suffix for path in Path(first.path).iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_what_is_refused(folder, tmp_path, cache, monkeypatch):
    for name in ("missing.gguf", "broken.gguf"):
        (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(BadInput, match=rf"{name}: (no such file|transformers cannot load this model)"):
            make_reference(Model(model=name), str(tmp_path / name))
    monkeypatch.setattr("tasks.models.gguf.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"needs one more package: pip install -e '\.\[gguf\]'"):
        make_reference(Model(model="x"), str(folder / "model.gguf"))
    assert not list(cache.rglob("*.safetensors"))
