"""Models with random weights in the shapes that the GPU's figures are of: `python tests/benchmarks/shapes.py FOLDER [--small]`.

`student` is Qwen3-0.6B's shape with its tokenizer, `teacher` a Llama of 1.1B weights with Llama 3's. `--small` makes tiny ones.
They write ASCII, at random, and never end: what is to be aligned has to be text.
"""

import argparse
from pathlib import Path

import torch
from generation import fetch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from tasks.models.text import tokenizer_of

CONTEXT = 8192


def shapes(small: bool) -> dict[str, tuple[str, int, type[PretrainedConfig], dict[str, int]]]:
    """The tokenizer, the rows of the head, and the shape of each model."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")
    tiny = (64, 2, 2, 1, 128, 32)
    student = dict(zip(names, tiny if small else (1024, 28, 16, 8, 3072, 128), strict=True))
    teacher = dict(zip(names, tiny if small else (2048, 16, 32, 8, 8192, 64), strict=True))
    return {"student": ("qwen3", 151_936, Qwen3Config, student), "teacher": ("llama3", 128_256, LlamaConfig, teacher)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    for name, (tokenizer, size, config, shape) in shapes(given.small).items():
        if (given.folder / name / "config.json").exists():
            continue
        side = tokenizer_of(str(fetch.MODELS / tokenizer))
        whole = config(
            vocab_size=size, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=side.stop_ids[0], **shape,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32 if given.small else torch.bfloat16)
        text = [i for i, value in enumerate(side.beta.values) if value and value.isascii()]
        with torch.no_grad():  # one feature says of a token that it is ASCII; the head, tied to it, goes on in kind
            weight = model.get_input_embeddings().weight
            weight[:, 0] = -2.0
            weight[text, 0] = 2.0
        model.cpu().save_pretrained(given.folder / name)
        side.tokenizer.save_pretrained(given.folder / name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights", flush=True)


if __name__ == "__main__":
    main()
