"""What the tests of flows share beside fixtures."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.models import Scratch
from tasks.scratch import init_model, train_tokenizer

CHECKOUT = Path(__file__).parents[2]
TINY = CHECKOUT / "tests" / "recipes" / "tiny.toml"
POTSTILL = Path(sys.executable).parent / "potstill"


@dataclass(frozen=True)
class Ended:
    """A command that ran: its exit status and what it wrote."""

    status: int
    out: str
    err: str


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder with its time of change."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def made(folder: Path, size: int, *texts: str, context: int = 64) -> Path:
    """A model folder, made in this process in a tenth of a second."""
    shape = Scratch(vocab_size=size, layers=1, width=16, heads=2, feed_forward=16, context=context)
    tokenizer = train_tokenizer(shape, list(texts))
    tokenizer.save_pretrained(folder)
    init_model(shape, tokenizer, 0).save_pretrained(folder)
    return folder


def refused(ended: Ended, *parts: str) -> None:
    """One message on standard error, with all of `parts` in it, and exit status 2; at most a line about the run before it."""
    assert ended.status == 2, ended.err
    *log, message = ended.err.strip().splitlines()
    assert message.startswith("potstill: ")
    assert ended.err.count("potstill: ") == 1
    assert len(log) <= 1, ended.err
    assert all(re.match(r"\d\d:\d\d:\d\d \S+: (a new run of \d+|\d+|looking at|reading its) ", line) for line in log), ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.out == ""
    for part in parts:
        assert part in ended.err
