"""What the tests of flows share beside fixtures."""

import sys
from dataclasses import dataclass
from pathlib import Path

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
