"""`potstill align`: two tokenizers on a text or a file, without weights."""

import re
from itertools import accumulate, pairwise

import polars as pl
import pytest

from configs.models import Scratch
from tasks.models.text import tokenizer_of
from tasks.scratch import train_tokenizer
from tasks.views.texts import VISIBLE

TEXT = "reward  drawer\nstressed desserts, " * 8


def test_a_text_as_two_rows(potstill, models):
    """Both rows spell the text, with unit borders at the same columns, within the width of a log file."""
    ended = potstill("align", models["student"], models["teacher"], "--text", TEXT)
    assert ended.status == 0, ended.err
    lines = {
        role: [ln.split("  ", 1)[1] for ln in ended.out.splitlines() if ln.startswith(role)] for role in ("student", "teacher")
    }
    assert len(lines["student"]) == len(lines["teacher"]) > 1
    for above, below in zip(lines["student"], lines["teacher"], strict=True):
        assert [i for i, c in enumerate(above) if c == "┃"] == [i for i, c in enumerate(below) if c == "┃"]
        assert len(above) <= 140
    for role in lines:
        units = [unit.strip() for line in lines[role] for unit in line.strip("┃").split("┃")]
        assert "".join(units).replace("|", "") == TEXT.translate(VISIBLE)


def test_a_file_of_texts(potstill, models, tmp_path):
    """Every row's ends are the common byte ends of both encodings, computed here with sets."""
    texts = ["abc", "", "stressed desserts", "naïve ☕", "\t\n"]
    pl.DataFrame({"text": texts, "rollout_id": [f"r{i}" for i in range(len(texts))]}).write_parquet(tmp_path / "in.parquet")
    ended = potstill(
        "align", models["student"], models["teacher"], "--file", tmp_path / "in.parquet", "--out", tmp_path / "out.parquet"
    )
    assert ended.status == 0, ended.err
    table = pl.read_parquet(tmp_path / "out.parquet")
    assert table["rollout_id"].to_list() == [f"r{i}" for i in range(len(texts))]
    sides = [tokenizer_of(str(models[role])) for role in ("student", "teacher")]
    for text, ends in zip(texts, table["byte_ends"].to_list(), strict=True):
        common = set.intersection(*(byte_ends(side, text) for side in sides))
        assert ends == sorted(common)
    assert table["supervised_bytes"].sum() + table["dropped_bytes"].sum() == sum(len(text.encode()) for text in texts)


def byte_ends(side, text: str) -> set[int]:
    return set(accumulate(map(len, pieces(side, text))))


def pieces(side, text: str) -> list[bytes]:
    return [side.beta.values[i] for i in side.encoder.encode([text])[0]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[str]:
    """Two folders with a tokenizer alone, that merge other letters."""
    folder = tmp_path_factory.mktemp("pair")
    for role, size, words in (("student", 290, "ab ab cd cd stressed reward"), ("teacher", 320, "bc bc desserts drawer naïve")):
        train_tokenizer(Scratch(vocab_size=size), [words]).save_pretrained(folder / role)
    return [str(folder / "student"), str(folder / "teacher")]


def test_figures_of_a_pair(potstill, pair, tmp_path):
    """Every figure of the summary, from the two sets of byte strings and from the texts' pieces between common ends."""
    texts = ["abcd", "", "stressed desserts", "naïve ☕ reward drawer", "\t\n", TEXT]
    pl.DataFrame({"text": texts}).write_parquet(tmp_path / "in.parquet")
    ended = potstill("align", *pair, "--file", tmp_path / "in.parquet")
    assert ended.status == 0, ended.err
    shown = tables(ended.out)
    sides = [tokenizer_of(path) for path in pair]
    student, teacher = ({value for value in side.beta.values if value is not None} for side in sides)
    shared, jaccard = student & teacher, f"{len(student & teacher) / len(student | teacher):.3f}"
    for role, side, entries in zip(("student", "teacher"), sides, (student, teacher), strict=True):
        emitted = [piece for text in texts for piece in pieces(side, text)]
        matched = sum(piece in shared for piece in emitted)
        told = [len(entries), share(len(shared), len(entries)), jaccard, len(emitted), share(matched, len(emitted))]
        assert shown["Tokens"][role] == [str(value) for value in told]

    units = [unit for text in texts for unit in units_of(text, *sides)]
    kinds = [(1, 1), (2, 1), (1, 2), (2, 2)]
    counts = [sum((min(s, 2), min(t, 2)) == kind for s, t, _ in units) for kind in kinds]
    total = sum(len(text.encode()) for text in texts)
    told = [len(texts), 0, len(units), *(share(count, len(units)) for count in counts), total, 0]
    assert shown["Alignment"]["6"] == [str(value) for value in told[1:]]
    for name, size, weight in (
        ("units by student tokens", 0, None),
        ("units by teacher tokens", 1, None),
        ("units by bytes", 2, None),
        ("bytes by student tokens", 0, 2),
        ("bytes by teacher tokens", 1, 2),
    ):
        parts = [sum(1 if weight is None else u[weight] for u in units if min(u[size], 4) == n) for n in (1, 2, 3, 4)]
        assert shown["Units by length"][name] == [share(part, sum(parts)) for part in parts]
    assert min(counts) > 0  # the premise: all kinds of units


def tables(out: str) -> dict[str, dict[str, list[str]]]:
    """The printed tables by title, their rows by the first cell."""
    found: dict[str, dict[str, list[str]]] = {}
    for above, line in pairwise(out.splitlines()):
        if line.startswith("┏"):
            found[above.strip()] = rows = {}
        elif line.startswith("│"):
            first, *others = (cell.strip() for cell in re.split("│", line)[1:-1])
            rows[first] = others
    return found


def units_of(text: str, student, teacher) -> list[tuple[int, int, int]]:
    """Student tokens, teacher tokens and bytes of each unit of a text."""
    ends = [list(accumulate(map(len, pieces(side, text)))) for side in (student, teacher)]
    common = sorted(set(ends[0]) & set(ends[1]))
    return [(*(sum(start < end <= stop for end in of) for of in ends), stop - start) for start, stop in pairwise([0, *common])]


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


@pytest.mark.parametrize("text", ["", "▁ \n"])
def test_texts_of_nothing(potstill, pair, text):
    """A text without tokens has no shares; it is no mistake."""
    ended = potstill("align", *pair, "--text", text)
    assert ended.status == 0, ended.err
    lengths = tables(ended.out)["Units by length"]["units by bytes"]
    assert (lengths == ["–"] * 4) == (text == "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--file", "none.jsonl"], "no such file"),
        (["--file", "numbers.jsonl"], "row 2 has no `text`"),
        (["--file", "half.jsonl"], "row 1 has no `text`"),
        (["--text", "a\udc80b"], "--text 'a\\udc80b': not UTF-8"),
        (["--out", "out.parquet"], "--file"),
        (["--file", "good.jsonl", "--out", "missing/out.parquet"], "cannot be written"),
    ],
)
def test_mistakes(potstill, models, tmp_path, arguments, says):
    (tmp_path / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "half.jsonl").write_text(r'{"text": "half a pair: \ud800"}')
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    before = sorted(tmp_path.iterdir())
    ended = potstill("align", models["student"], models["teacher"], *arguments, folder=tmp_path)
    assert ended.status == 2
    assert says in ended.err
    assert len(ended.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
