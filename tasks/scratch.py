"""The scratch stage: a byte-level BPE tokenizer trained on the run's prompts, and a Llama-shaped model with new weights."""

from pathlib import Path

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.errors import BadInput
from configs.models import Scratch
from configs.schema import Recipe
from storage.artifacts import Artifact, read_table
from storage.store import Run, round_slot
from tasks.running.progress import logger
from tasks.running.seeds import derive_seed

CODE = 1
SPECIAL = ["<pad>", "<s>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@task(name="new-model", cache_policy=NO_CACHE)
def make_scratch(recipe: Recipe, prompts: Artifact) -> Artifact:
    """Make `round=0000/student`: the untrained model of a recipe with `student.scratch`."""
    config = recipe.student.scratch
    assert config is not None
    run = Run(recipe.root, recipe.name)
    inputs = {"stage": "scratch", "code": CODE, "recipe": config.model_dump(), "prompts": prompts.digest, "seed": recipe.seed}

    def make(folder: Path) -> dict[str, int]:
        table = read_table(prompts, ["messages", "reference"])
        texts = [text for text in table["reference"].to_pylist() if text]
        if config.tokenizer_text == "all":
            texts += [m["content"] for messages in table["messages"].to_pylist() for m in messages]
        tokenizer = train_tokenizer(config, texts)
        tokenizer.save_pretrained(folder / "student")
        init_model(config, tokenizer, derive_seed(recipe.seed, "scratch")).save_pretrained(folder / "student")
        return {"student": len(texts)}

    return run.build_files({"student": round_slot(0, "student")}, inputs, make, logger.info)["student"]


def train_tokenizer(config: Scratch, texts: list[str]) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`. It has all 256 bytes, so that it can spell every text."""
    if not texts:
        raise BadInput(
            "student.scratch: no prompt has a reference, so there is no text to train a tokenizer on; "
            "give prompts with references"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<end>")
    fast.chat_template = TEMPLATE
    return fast


def init_model(config: Scratch, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of the shape of `config` with random float32 weights that depend on `seed` only."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(shape)
