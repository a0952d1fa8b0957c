"""Report and Prefect's UI in a real Chromium, as wide as a desk's screen and as a telephone's (`make browser`)."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from storage.store import Run
from tasks.views.report import write_report
from tasks.views.summary import summarise_run

CHECKOUT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = [1400, 500]
CHARTS = 7
EVIL = '<img src="http://example.invalid/x.png" onerror="document.title=1"><script>document.title=2</script> `|` [x](http://e.invalid)'


@dataclass
class Seen:
    """A page that was opened, and what it asked for and complained of."""

    page: Page
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail("no Chromium here: apt-get install chromium, or make browser CHROMIUM=path")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("prefect")
    address = f"http://127.0.0.1:{port}"
    quiet = {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(home / "log", "w") as log:
        running = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=log)
    end = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/health", timeout=5)
            break
        except OSError:
            assert time.monotonic() < end, (home / "log").read_text()
            time.sleep(0.5)
    yield address
    running.terminate()
    running.wait(60)


@pytest.fixture(scope="session")
def run(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command made on that server."""
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "flows.cli", "run", "tests/recipes/tiny.toml", "--set", f"root={root}"]
    environment = {**os.environ, "PREFECT_API_URL": f"{server}/api", "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root / "tiny"


@pytest.fixture(params=WIDTHS)
def look(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens an address in a window of this width."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})

    def look_at(address: str) -> Seen:
        seen = Seen(context.new_page())

        def listen(message: ConsoleMessage) -> None:
            of_prefect = "favicon" in message.location["url"] or "/ico/" in message.location["url"]
            if message.type in ("error", "warning") and not of_prefect:
                seen.said.append(message.text)

        seen.page.on("request", lambda asked: seen.asked.append(asked.url))
        seen.page.on("console", listen)
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.goto(address)
        return seen

    yield look_at
    context.close()


def ask(server: str, path: str) -> list[dict[str, Any]]:
    """What Prefect's API has at a path."""
    request = urllib.request.Request(f"{server}/api/{path}", b"{}", {"Content-Type": "application/json"})
    found: list[dict[str, Any]] = json.load(urllib.request.urlopen(request))
    return found


def stays_here(asked: list[str], *origins: str) -> None:
    assert [url for url in asked if not url.startswith((*origins, "data:", "blob:"))] == []


def check_report(seen: Seen, address: str) -> None:
    """Charts are drawn and lie inside the window, and nothing is fetched or complained of."""
    page = seen.page
    page.wait_for_function(f"document.querySelectorAll('.charts svg').length == {CHARTS}", timeout=30_000)
    width = page.viewport_size["width"] if page.viewport_size else 0
    for chart in page.query_selector_all(".charts svg"):
        box = chart.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["width"] > 200
        assert box["x"] + box["width"] <= width
        assert len(chart.query_selector_all("path, rect, circle, line")) > 10
        labels = [text.inner_html() for text in chart.query_selector_all(".role-axis-label text")]
        assert len(labels) > 3
        assert "NaN" not in "".join(labels)
    axes = page.query_selector_all(".charts svg")[0].query_selector_all(".role-axis-label")
    assert ["0", "1", "2"] in [[text.inner_html() for text in axis.query_selector_all("text")] for axis in axes]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.query_selector_all("table")
    assert seen.asked == [address]
    assert seen.said == []


def test_report(look, run):
    address = (run / "report.html").as_uri()
    check_report(look(address), address)


def test_a_report_of_text_that_attacks(look, run, tmp_path):
    """The same, and the text is there as text: nothing of it runs."""
    shutil.copytree(run, tmp_path / "evil")
    for table in ("evals", "rollouts"):
        for path in (tmp_path / "evil").glob(f"round=*/{table}/*.parquet"):
            pl.read_parquet(path).with_columns(text=pl.lit(EVIL)).write_parquet(path)
    write_report(Run(str(tmp_path), "evil"))
    address = (tmp_path / "evil" / "report.html").as_uri()
    seen = look(address)
    check_report(seen, address)
    assert EVIL in seen.page.inner_text("body")
    assert seen.page.title() == "tiny · Potstill"


def test_the_model_card_as_a_page(look, run, tmp_path):
    """As the Hub shows it: its metadata are read, tables are tables, and what others wrote is text."""
    card = ModelCard.load(run / "round=0002" / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers"
    page = tmp_path / "card.html"
    style = "table, pre { display: block; max-width: 100%; overflow: auto }"
    page.write_text(f"<meta charset=utf-8><style>{style}</style>{MarkdownIt().enable('table').render(card.text)}")
    seen = look(page.as_uri())
    heads = [[cell.inner_text() for cell in table.query_selector_all("th")] for table in seen.page.query_selector_all("table")]
    assert [head[0] for head in heads] == ["model", "what"]
    assert [title.inner_text() for title in seen.page.query_selector_all("h1, h2")] == [
        "tiny", "Figures", "How to load", "What it was made from", "Data and licences", "Recipe"
    ]  # fmt: skip
    assert len(seen.page.query_selector_all("pre")) == 2
    texts = [text.inner_text() for text in seen.page.query_selector_all("p, li, td, th")]
    assert not re.search(r"\||`|\*\*", "".join(texts)), "markup that is shown as it is"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= seen.page.viewport_size["width"]
    assert seen.asked == [page.as_uri()]


def test_a_flow_run_is_named_by_its_rounds(look, server, run):
    (found,) = [row for row in ask(server, "flow_runs/filter") if row["name"].startswith("tiny")]
    assert found["name"] == "tiny · rounds 1–2"
    tasks = {row["name"] for row in ask(server, "task_runs/filter")}
    assert {
        "round 1 · rollouts · shard 0",
        "round 2 · rollouts · shard 1",
        "round 2 · train",
        "round 2 · evaluate student",
    } <= tasks
    seen = look(f"{server}/runs/flow-run/{found['id']}")
    seen.page.wait_for_selector("text=tiny · rounds 1–2", timeout=30_000)
    seen.page.wait_for_selector("text=prompts/train: 128 rows", timeout=30_000)
    stays_here(seen.asked, server, server.replace("http", "ws"))


def test_artifacts_show_rounds_charts_and_answers(look, server, run):
    artifacts = {row["key"]: row for row in ask(server, "artifacts/latest/filter") if row["key"].startswith("tiny-")}
    assert artifacts.keys() == {"tiny-progress", "tiny-rounds", "tiny-summary", "tiny-report"}
    assert all(row["description"] for row in artifacts.values())

    seen = look(f"{server}/artifacts/artifact/{artifacts['tiny-summary']['latest_id']}")
    seen.page.wait_for_selector("text=The same prompts, before and after", timeout=30_000)
    drawn = seen.page.evaluate("[...document.images].filter(i => i.src.startsWith('data:')).map(i => [i.complete, i.width])")
    assert [complete for complete, _ in drawn] == [True] * CHARTS
    assert all(200 < width <= seen.page.viewport_size["width"] for _, width in drawn)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= seen.page.viewport_size["width"]
    assert len(seen.page.query_selector_all("table")) == 2
    stays_here(seen.asked, server, server.replace("http", "ws"))
    assert seen.said == []

    seen = look(f"{server}/artifacts/artifact/{artifacts['tiny-rounds']['latest_id']}")
    seen.page.wait_for_selector("text=student, round 2", timeout=30_000)
    assert seen.said == []

    seen = look(f"{server}/artifacts/artifact/{artifacts['tiny-report']['latest_id']}")
    link = seen.page.wait_for_selector(f"a:has-text('{run}/report.html')", timeout=30_000)
    assert link.get_attribute("href") == (run / "report.html").as_uri()


def test_a_summary_of_text_that_attacks(look, server, run, tmp_path):
    """Prefect shows a model's markup as text."""
    shutil.copytree(run, tmp_path / "evil")
    for path in (tmp_path / "evil").glob("round=*/evals/*.parquet"):
        pl.read_parquet(path).with_columns(text=pl.lit(EVIL)).write_parquet(path)
    evil = Run(str(tmp_path), "evil")
    recipe = evil.frozen_recipe()
    assert recipe is not None
    body = {"key": "evil", "type": "markdown", "data": summarise_run(evil, recipe)}
    request = urllib.request.Request(
        f"{server}/api/artifacts/", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    made = json.load(urllib.request.urlopen(request))
    seen = look(f"{server}/artifacts/artifact/{made['id']}")
    seen.page.wait_for_selector("text=The same prompts, before and after", timeout=30_000)
    assert re.sub(r"\s+", " ", EVIL) in seen.page.inner_text("body")
    assert seen.page.query_selector_all("a[href*='e.invalid']") == []
    stays_here(seen.asked, server, server.replace("http", "ws"))
