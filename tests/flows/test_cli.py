"""The `potstill` command as people meet it: help, tables, plain lines in a log, bars on a terminal."""

import logging
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from helpers import CHECKOUT, POTSTILL, TINY, files

from flows.commands import app
from flows.ending import end
from flows.terminal import Plain, print_line, print_table
from storage.read import scan
from tasks.views.escapes import CONTROLS, escape_controls
from tasks.views.inspect import show_round

ANSI = "\x1b"


@pytest.fixture(scope="module")
def environment(server) -> dict[str, str]:
    """What a shell has, and the session's server so that the command need not start one."""
    return {**os.environ, "PREFECT_API_URL": server, "COLUMNS": "160", "TERM": "xterm-256color"}


def cells(text: str, title: str) -> list[list[str]]:
    """The rows of a printed table, without the one that names its columns."""
    lines = text.split(title, 1)[1].splitlines()[1:]
    rows = []
    for line in lines:
        if line.startswith("└"):
            break
        if line.startswith("│"):
            rows.append([cell.strip() for cell in line.strip("│").split("│")])
    return rows


def test_help(potstill):
    for arguments in ((), ("--help",), ("run", "--help"), ("inspect", "--help")):
        ended = potstill(*arguments)
        assert ended.status == 0
        assert ended.err == ""
    text = potstill("--help").out
    assert "run" in text
    assert "inspect" in text
    assert "On-policy distillation" in text
    for option in ("--rounds", "--set", "CONFIG"):
        assert option in potstill("run", "--help").out
    for option in ("--round", "--rollout", "RUN"):
        assert option in potstill("inspect", "--help").out


def test_every_command_of_the_design_that_exists_says_what_it_does(potstill):
    names = [name for name in app if not name.startswith("-")]
    assert {"run", "inspect"} <= set(names)
    text = potstill("--help").out
    assert all(re.search(rf"{name}\s+\S+", text) for name in names)


def test_run_of_what_is_done(tiny, environment, tmp_path):
    """The real command, not on a terminal: plain text, no bars, nothing made, the table and where things lie.

    It starts a Prefect server of its own, as on a machine that has none.
    """
    before = files(tiny.parent)
    arguments = [POTSTILL, "run", str(TINY), "--set", f"root={tiny.parent}"]
    alone = {**environment, "PREFECT_HOME": str(tmp_path)}
    del alone["PREFECT_API_URL"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=alone, check=False)
    assert done.returncode == 0, done.stderr
    assert files(tiny.parent) == before
    assert " rows, " not in done.stderr
    assert ANSI not in done.stdout + done.stderr
    rows = cells(done.stdout, "Rounds")
    assert [row[0] for row in rows] == ["teacher", "student, round 0", "student, round 1", "student, round 2"]
    last = done.stdout.splitlines()[-1]
    assert last == f"The run is in {tiny}, its last student in {tiny / 'round=0002' / 'student'}"


def test_a_run_on_a_terminal_and_its_log(tiny, models, environment, tmp_path):
    """A new run under a pty: bars for the stages on standard error, lines for what was committed; then `--rounds`."""
    root = tmp_path / "runs"
    recipe = tmp_path / "pty.toml"
    text = TINY.read_text().replace('recipe = "student.toml"', f'model = "{models["student"]}"')
    recipe.write_text(text.replace('recipe = "teacher.toml"', f'model = "{models["teacher"]}"'))
    main, side = pty.openpty()
    arguments = [POTSTILL, "run", str(recipe), "--rounds", "1", "--set", f"root={root}", "--set", "rollout.prompts=16"]
    process = subprocess.Popen(arguments, stdin=side, stdout=subprocess.PIPE, stderr=side, env=environment)
    os.close(side)
    seen = b""
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    os.close(main)
    assert process.wait(60) == 0, seen.decode()
    out = process.stdout.read().decode()
    process.stdout.close()
    written = seen.decode()
    assert ANSI in written
    for stage in ("round 1 rollouts", "round 1 scores", "round 1 train", "round 1 evaluate student"):
        assert stage in written
    assert re.search(r"16/16", written)  # rows of rows
    assert "━" in written
    assert re.search(r"\d\d:\d\d:\d\d round=0001/rollouts/part-00000: 16 rows", written)
    assert ANSI not in out  # standard output is no terminal here
    assert [row[0] for row in cells(out, "Rounds")] == ["teacher", "student, round 0", "student, round 1"]
    assert (root / "tiny" / "round=0001" / "student" / "model.safetensors").exists()
    assert not (root / "tiny" / "round=0002").exists()


def test_a_run_in_a_log_file(tiny, environment, tmp_path):
    """What a cron job's mail holds: one plain line for each thing committed, then the headline of the round."""
    arguments = [POTSTILL, "run", str(TINY), "--rounds", "1", "--set", f"root={tiny.parent}", "--set", "name=logged"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert ANSI not in done.stderr + done.stdout
    assert "━" not in done.stderr
    assert "%" not in done.stderr.split("tokens shared")[0]
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in lines)
    assert any(re.search(r"round=0001/rollouts/part-00001: 24 rows, taken over from \S+$", line) for line in lines)
    assert re.search(r"round 1: sampled \d\.\d{3} \[.*\], greedy", lines[-1])
    assert "DEBUG" not in done.stderr
    assert "INFO" not in done.stderr


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_a_run(potstill, tiny):
    ended = potstill("inspect", tiny)
    assert (ended.status, ended.err) == (0, "")
    assert ANSI not in ended.out
    assert [row[0] for row in cells(ended.out, "Rounds")] == [
        "teacher", "student, round 0", "student, round 1", "student, round 2",
    ]  # fmt: skip
    tables = {row[0]: row for row in cells(ended.out, "Tables")}
    assert tables["round=0001/rollouts"][1:3] == ["2", "64"]
    assert tables["round=0002/aligned"][1:3] == ["2", "64"]
    assert tables["vocab/student"][1:3] == ["1", "330"]
    steps = scan(str(tiny), "steps").filter(pl.col("round") == 1).collect()
    assert tables["round=0001/steps"][1:3] == ["1", str(len(steps))]


def test_inspect_where_a_run_is_given_as_people_give_it(potstill, tiny):
    """With a slash at its end, or relative to where one stands."""
    expected = potstill("inspect", tiny).out
    assert potstill("inspect", f"{tiny}/").out == expected
    assert potstill("inspect", "tiny", folder=tiny.parent).out == expected
    assert potstill("inspect", ".", folder=tiny).out == expected


def test_inspect_a_round(potstill, tiny):
    ended = potstill("inspect", tiny, "--round", "2")
    assert (ended.status, ended.err) == (0, "")
    aligned = scan(str(tiny), "aligned").filter(pl.col("round") == 2).collect()
    accounts = {row[0]: row for row in cells(ended.out, "Bytes of the completions")}
    for (status,), rows in aligned.group_by(["status"]):
        sums = [str(rows[f"{name}_bytes"].sum()) for name in ("supervised", "unmatched", "dropped", "tail")]
        assert accounts[status][1:] == [str(len(rows)), *sums]
    units = {row[0]: int(row[1]) for row in cells(ended.out, "Units")}
    assert set(units) <= {"stop", "one_to_one", "many_to_one", "one_to_many", "many_to_many"}
    assert sum(units.values()) == aligned["kind"].list.len().sum()
    rows = cells(ended.out, "The first 10 of 64 rollouts")
    assert len(rows) == 10
    assert all(row[0].startswith("0002-") for row in rows)
    assert all(re.fullmatch(r"-?\d+\.\d{1,3}|", row[-1]) for row in rows), "log ratios have three digits"


def test_inspect_what_both_vocabularies_know(tiny):
    """Shares of tokens and of mass whose id has a match, and of ids that are not canonical, by loops over the tables."""
    shown = show_round(str(tiny), 1)
    vocab = scan(str(tiny), "vocab").collect().to_dicts()
    known = {(row["side"], row["token_id"]) for row in vocab if row["match_id"] >= 0}
    tables = {name: scan(str(tiny), name).filter(pl.col("round") == 1).collect().to_dicts() for name in ("rollouts", "scores")}
    wanted = []
    for side, table in (("student", "rollouts"), ("teacher", "scores")):
        ids = [i for row in tables[table] for i in row["token_ids"] or []]
        wanted.append(sum((side, i) in known for i in ids) / len(ids))
    top = [pair for row in tables["scores"] for pair in zip(row["top_ids"] or [], row["top_logprobs"] or [], strict=True)]
    masses = [math.exp(logprob) for _, logprob in top]
    wanted.append(sum(m for (i, _), m in zip(top, masses, strict=True) if ("teacher", i) in known) / sum(masses))
    got = [float(row["share"].rstrip("%")) / 100 for row in shown["Tokens that match a token of the other side"]]
    assert got == pytest.approx(wanted, abs=1e-3)
    ids = {row["rollout_id"]: row["source"] for row in tables["rollouts"]}
    differ = {source: [] for source in dict.fromkeys(ids.values())}
    for row in scan(str(tiny), "aligned").filter(pl.col("round") == 1).collect().to_dicts():
        differ[ids[row["rollout_id"]]].append(not row["canonical"])
    assert len(differ) == 2
    assert shown["Retokenisation drift"] == [
        {"source": name, "rollouts": len(row), "share whose ids differ from the text's encoding": f"{sum(row) / len(row):.1%}"}
        for name, row in differ.items()
    ]


@pytest.mark.parametrize("source", ["student", "reference"])
def test_inspect_a_rollout(potstill, tiny, source):
    """Token by token: both sides spell the text, log-probs where the student sampled."""
    aligned = scan(str(tiny), "aligned").filter(pl.col("status") == "ok").select("round", "rollout_id")
    rollouts = scan(str(tiny), "rollouts").join(aligned, on=["round", "rollout_id"])
    plain = pl.col("text").str.contains(r"^[A-Za-z0-9 ]{2,}$")  # what `repr` shows as it is
    row = rollouts.filter(pl.col("source") == source, plain).sort("rollout_id").collect().to_dicts()[0]
    ended = potstill("inspect", tiny, "--rollout", row["rollout_id"])
    assert (ended.status, ended.err) == (0, "")
    about = cells(ended.out, "Rollout")[0]
    assert about[:2] == [row["rollout_id"], source]
    lines = cells(ended.out, "Tokens")
    for side in (2, 4):
        pieces = [line[side] for line in lines if line[side].startswith(("'", '"'))]
        assert "".join(piece[1:-1] for piece in pieces).startswith(row["text"])
    assert len([line for line in lines if line[2]]) == len(row["token_ids"])
    assert all((line[3] != "") == (source == "student") for line in lines if line[2])
    assert all(float(line[5]) <= 0 for line in lines if line[5])
    assert [line[0] for line in lines if line[0].isdigit()] == [
        str(i) for i in range(len({line[0] for line in lines} - {"", "-"}))
    ]


def test_texts_are_shown_as_they_are(capsys):
    """Square brackets in a completion are no markup; what a terminal would obey is shown and not sent."""
    print_table("Texts", [{"text": "[/INST] [red]x[/red] [b]"}, {"text": "\x1b[2J\x1b]0;title\x07\x9b31m bell\r"}])
    shown = capsys.readouterr().out
    assert "[/INST] [red]x[/red] [b]" in shown
    assert r"\x1b[2J\x1b]0;title\x07\x9b31m bell\x0d" in shown


def test_a_text_of_any_length_is_shown_as_far_as_it_can_be_read(capsys):
    print_table("Texts", [{"text": "a" * 1_000_000}])
    shown = capsys.readouterr().out
    assert 20_000 <= shown.count("a") < 20_100
    assert "980,000 more characters" in shown
    assert not set(shown) & set(map(chr, CONTROLS))


@pytest.mark.parametrize("text", ["[/red]", "[bold]x", "\x1b[2J", "\x9b31m", "a\u202eb"])
def test_names_are_shown_as_they_are(capsys, text):
    """In titles, columns, lines, the log and a command's last line: a folder, a field and a model may be called anything."""
    record = logging.LogRecord("potstill", logging.INFO, "", 0, "%s", (text,), None)
    print_table(text, [{text: 1}])
    print_table(text, [])
    print_line(text)
    print(Plain().format(record))
    with pytest.raises(SystemExit):
        end(text, 2)
    shown = capsys.readouterr()
    assert shown.out.count(escape_controls(text)) == 5
    assert shown.err == f"potstill: {escape_controls(text)}\n"
    assert not set(shown.out + shown.err) & set(map(chr, CONTROLS))


def test_the_commands_entry_point():
    """`potstill` and `python -m flows.cli` are one command."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    command = subprocess.run([POTSTILL, "--help"], capture_output=True, text=True, check=True)
    assert Path(POTSTILL).exists()
    assert [line for line in done.stdout.splitlines() if "Usage" not in line] == [
        line for line in command.stdout.splitlines() if "Usage" not in line
    ]
