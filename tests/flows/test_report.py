"""`potstill report`: one file that needs nothing else, whose figures are the tables'."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import vl_convert
from helpers import refused

from storage.read import scan
from storage.store import Run
from tasks.views.report import FULL, LONGEST, render_report, split_units, write_report


class Page(HTMLParser):
    """What a browser would show and fetch."""

    def __init__(self, html: str):
        super().__init__()
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self.tags: list[str] = []
        self.inside = self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside == "h3":
            self.titles.append(data)
        self.text += data if self.inside not in ("script", "style") else ""

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        line = next(line for line in self.scripts[-1].splitlines() if "const charts = " in line)
        found = json.loads(line.split(" = ", 1)[1].rstrip(";"))
        return dict(zip(self.titles, found))


@pytest.fixture(scope="module")
def page(potstill, tiny) -> Page:
    ended = potstill("report", tiny)
    assert ended.status == 0, ended.err
    assert ended.out == f"{tiny}/report.html\n"
    return Page((tiny / "report.html").read_text())


def points(chart: dict[str, Any]) -> pl.DataFrame:
    """The data of all of a chart's layers."""
    return pl.concat((pl.DataFrame(rows) for rows in chart["datasets"].values()), how="diagonal_relaxed").unique()


def test_nothing_is_fetched(page):
    assert page.fetched == []
    assert not {"link", "img", "iframe"} & set(page.tags)


def test_a_run_writes_its_report_by_itself(tiny):
    for run in (tiny, *tiny.parent.glob("test-*")):
        assert (run / "report.html").stat().st_size > 100_000


def test_charts_are_ones_that_vega_draws(page):
    assert len(page.charts) == 7
    for title, chart in page.charts.items():
        drawing = vl_convert.vegalite_to_svg(chart)
        assert drawing.count("aria-roledescription=") > 3, title
        assert "NaN" not in drawing, title


def test_charts_show_what_the_tables_say(page, tiny):
    evals = scan(str(tiny), "evals").collect()
    found = points(page.charts["Accuracy on held-out prompts"])
    for (model, number, decoding), rows in evals.group_by("model", "round", "decoding"):
        (row,) = found.filter(model=model, round=number, decoding=decoding).to_dicts()
        assert row["accuracy"] == pytest.approx(rows["correct"].mean())
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert len(found) == evals.n_unique(["model", "round", "decoding"])

    found = points(page.charts["Length of answers"])
    sampled = evals.filter(decoding="sampled").group_by("model", "round").agg(pl.col("tokens").mean())
    assert {(m, r): t for m, r, t in found.select("model", "round", "tokens").iter_rows()} == pytest.approx(
        {(m, r): t for m, r, t in sampled.iter_rows()}
    )

    found = points(page.charts["Completion bytes covered by the loss"]).group_by("round").agg(pl.col("share").sum())
    assert found["share"].to_list() == pytest.approx([1, 1])
    steps = scan(str(tiny), "steps").collect()
    assert points(page.charts["Loss"]).sort("step")["loss"].to_list() == pytest.approx(steps.sort("step")["loss"].to_list())


def test_time_is_counted_once(page, tiny):
    """Steps, student and trainer's state are one piece of work; what was taken over from another run is none of this one's."""
    manifests = [json.loads(path.read_text()) for path in tiny.glob("_manifests/round=*/**/*.json")]
    whole = sum(m["seconds"] for m in manifests if "taken_from" not in m and not m["path"].endswith(("/student", "/trainer")))
    once = sum(m["seconds"] for m in manifests if "/evals/student" in m["path"])
    shown = points(page.charts["Time by stage"])
    assert shown["seconds"].sum() == pytest.approx(whole)
    assert shown.filter(stage="evals")["seconds"].sum() >= once


def test_samples_and_answers_are_there(page, tiny):
    rollouts = scan(str(tiny), "rollouts").filter(round=2, source="student").collect()
    aligned = scan(str(tiny), "aligned").filter(round=2, status="ok").drop_nulls("student_logprobs").collect()
    apart = {
        row["rollout_id"]: (sum(row["student_logprobs"]) - sum(row["teacher_logprobs"])) / (row["byte_ends"][-1] + 1)
        for row in aligned.iter_rows(named=True)
    }
    for name in sorted(apart, key=apart.__getitem__)[-8:]:
        assert name in page.text
    assert len(rollouts)
    for row in scan(str(tiny), "prompts").filter(split="eval").head(8).collect().iter_rows(named=True):
        assert row["reference"] in page.text
        assert row["messages"][0]["content"] in page.text


def test_units_are_the_text_and_shaded_by_the_models_difference():
    aligned = {
        "byte_ends": [2, 5, 5],
        "kind": [1, 4, 0],
        "student_logprobs": [-1.0, -9.0, -0.5],
        "teacher_logprobs": [-2.0, -1.0, -0.5],
    }
    found = split_units("aé</b>", aligned)  # the é's second byte is in the second unit
    assert [unit["piece"] for unit in found] == ["a\\xc3", "\\xa9</", "■", "b>"]
    assert [unit["shade"] for unit in found] == [1 / FULL, -1, 0, None]
    assert [unit["kind"] for unit in found] == ["one to one", "many to many", "stop", "not aligned"]


def test_text_of_a_model_is_text(tiny, tmp_path):
    """Markup in an answer is shown, not obeyed."""
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for path in run.glob("round=*/evals/*.parquet"):
        pl.read_parquet(path).with_columns(text=pl.lit(evil)).write_parquet(path)
    write_report(Run(str(tmp_path), "run"))  # the command would refuse a run that was altered
    page = Page((run / "report.html").read_text())
    assert evil in page.text
    assert page.fetched == []
    assert len(page.scripts) == 2


@pytest.mark.parametrize(("text", "shown"), [("", "(empty)"), ("long " * 10**6, "… (4,980,000 more characters)")])
def test_texts_of_any_length(tiny, tmp_path, text, shown):
    """An empty answer is more than its mark, and one of megabytes is not the report's size."""
    run = tmp_path / "run"
    shutil.copytree(tiny, run)
    for path in [*run.glob("round=*/evals/*.parquet"), *run.glob("round=*/rollouts/*.parquet")]:
        pl.read_parquet(path).with_columns(text=pl.lit(text)).write_parquet(path)
    before = len((tiny / "report.html").read_text())
    write_report(Run(str(tmp_path), "run"))
    report = (run / "report.html").read_text()
    assert shown in Page(report).text
    assert len(report) < before + 10**6


def test_counts_are_whole(tiny, monkeypatch):
    monkeypatch.setattr("tasks.views.report.show_prompts", lambda _: [{"rows": 15773, "share": 0.123456}])
    text = Page(render_report(Run(str(tiny.parent), tiny.name))).text
    assert "15,773" in text
    assert "0.1235" in text


def test_a_sample_of_many_units_is_cut():
    count = LONGEST + 5
    columns = {"byte_ends": list(range(1, count + 1)), "kind": [1] * count}
    found = split_units("x" * count, {**columns, "student_logprobs": [-1.0] * count, "teacher_logprobs": [-1.0] * count})
    assert len(found) == LONGEST + 1
    assert found[-1]["piece"] == "x" * 5
    assert found[-1]["kind"] == "not shown by unit"


@pytest.mark.parametrize("kept", ["run.toml", "prompts", "round=0000"])
def test_a_run_that_has_only_begun(potstill, tiny, tmp_path, kept):
    run = tmp_path / "run"
    run.mkdir()
    for name in dict.fromkeys(("run.toml", kept)):
        source = tiny / name
        shutil.copytree(source, run / name) if source.is_dir() else shutil.copy(source, run / name)
    ended = potstill("report", run)
    assert ended.status == 0
    assert re.fullmatch(r"\S+ \S+: reading its tables.*\n", ended.err)  # the line that comes at once
    page = Page((run / "report.html").read_text())
    assert ("Nothing has been evaluated yet" in page.text) == (kept != "round=0000")


def test_not_a_run(potstill, tmp_path):
    refused(potstill("report", tmp_path), "not a run", "runs/quickstart")
    assert list(tmp_path.iterdir()) == []
    refused(potstill("report"), "run")


def test_an_old_report_is_replaced(potstill, tiny, tmp_path):
    run = Path(shutil.copytree(tiny, tmp_path / "run"))
    (run / "report.html").write_text("old")
    assert potstill("report", f"{run}/").status == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert not (run / "_tmp").exists()


def test_gates_have_units_and_limits(tiny):
    """As in preflight: `100.0%`, `at most 50.0%`; what has no limit only informs."""
    page = Page((tiny / "report.html").read_text()).text
    table = page[page.index("Gates of round") : page.index("The same prompts, before and after")]
    for word in ("truncated", "at most 100.0%", "nats per token", "at most 0.05 nats per token", "ok"):
        assert word in table
