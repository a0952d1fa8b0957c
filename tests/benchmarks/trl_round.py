"""A round through TRL's GOLD trainer, for `round.py --versus trl`. It runs in TRL's own environment (`make versus`).

Reads JSON from stdin: student, teacher, prompts (texts), tokens, batch, micro, learning_rate, threads, cpu_time (whether
seconds are those of all threads). Writes a last line of JSON: seconds from the first prompt to the saved checkpoint, and of
loading, sampled tokens, steps, and MiB at most. All samples are the student's. The loss is GOLD's default one where both
tokenizers are byte-level BPE; for others GOLD pairs positions by index.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.utils import is_byte_level_tokenizer


class Counted(GOLDTrainer):
    """Counts the tokens that the student sampled."""

    sampled = 0

    def compute_loss(self, model, inputs, *args, **named):
        self.sampled += int((inputs["labels"] != -100).sum())
        return super().compute_loss(model, inputs, *args, **named)


def peak() -> float:
    """MiB at most of this process, or of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    given = json.load(sys.stdin)
    torch.set_num_threads(given["threads"])
    gpu = torch.cuda.is_available()
    clock = time.process_time if given["cpu_time"] else time.perf_counter
    started = clock()
    dtype = torch.bfloat16 if gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(given["student"])
    student = AutoModelForCausalLM.from_pretrained(given["student"], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(given["teacher"], dtype=dtype)
    tokenizers = (tokenizer, AutoTokenizer.from_pretrained(given["teacher"]))
    extended = all(is_byte_level_tokenizer(each.backend_tokenizer) for each in tokenizers)
    loading = clock() - started
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "."}]} for text in given["prompts"]
    ]
    steps = len(rows) // given["batch"]
    with tempfile.TemporaryDirectory() as folder:
        config = GOLDConfig(
            output_dir=folder,
            use_cpu=not gpu,
            bf16=gpu,
            seed=0,
            report_to="none",
            disable_tqdm=True,
            max_steps=steps,
            per_device_train_batch_size=given["micro"],
            gradient_accumulation_steps=given["batch"] // given["micro"],
            gradient_checkpointing=False,
            learning_rate=given["learning_rate"],
            save_strategy="steps",
            save_steps=steps,
            lmbda=1.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_completion_length=given["tokens"],
            max_length=None,
            use_uld_loss=True,
            use_extended_uld=extended,
            teacher_tokenizer_name_or_path=given["teacher"],
        )
        trainer = Counted(
            model=student, teacher_model=teacher, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows)
        )
        started = clock()
        trainer.train()
        seconds = clock() - started
    found = {"seconds": seconds, "loading": loading, "tokens": trainer.sampled, "steps": trainer.state.global_step}
    print(json.dumps({**found, "peak_mib": peak()}))


if __name__ == "__main__":
    main()
