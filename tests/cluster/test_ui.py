"""MLflow's pages in a real browser, at the address that `fastray ui` prints: a sweep, trials in order, schedule, picture."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks import DataBlock
from cluster.places import places
from cluster.spool import ORDER, SPOOL, append, append_epoch
from cluster.tracking import Tracker, start_run
from cluster.train import record_data, tags_of
from cluster.ui import newest_run, page_of, server_of

from .servers import PATIENCE, free_port

CHROMIUM = Path("/usr/bin/chromium")
QUIET = [
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]
SCORES = {"one_cycle(2)": 0.5, "fine_tune(1)": 0.9, "flat(2)": 0.7}


@pytest.fixture
def sweep(store: str, own_places: Path, few_digits: Path, digits_block: DataBlock) -> Path:
    """The records of a sweep of three schedules, as one makes them; its folder."""
    folder = own_places / "runs" / "digits-sweep-1"
    folder.mkdir(parents=True)
    spool, run, dls = folder / SPOOL, folder.name, digits_block.dataloaders(few_digits)
    with Tracker(spool, store, "digits") as tracker:
        start_run(
            spool,
            run,
            run,
            {"schedule": "choice(...)"},
            tags=tags_of(dls) | {"fastray.sweep": run, ORDER: "valid/accuracy max"},
        )
        record_data(spool, run, folder, dls)
        for number, (schedule, score) in enumerate(SCORES.items()):
            trial = f"{run}-{number:04d}"
            start_run(spool, trial, trial, {"schedule": schedule}, parent=run)
            append_epoch(spool, trial, {"epoch": 0, "valid/accuracy": score})
            append(spool, "end", trial, status="FINISHED")
        append(spool, "end", run, status="FINISHED")
    assert tracker.trouble is None
    return folder


@pytest.fixture
def printed_page(sweep: Path) -> Iterator[str]:
    """What `fastray ui` prints, while it serves."""
    words = [sys.executable, "-m", "pipelines", "ui", "--port", str(free_port())]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process.stdout.readline().removeprefix("MLflow: ").partition("  (records")[0]
    process.terminate()  # answered as Ctrl-C is, which a process that was started in the background may not hear
    assert process.wait(timeout=PATIENCE) == 130
    process.stdout.close()


@pytest.fixture
def browser_page(tmp_path: Path) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed (apt.txt)")
    flags = [f"--{flag}" for flag in QUIET] + ["--no-sandbox"] * (os.geteuid() == 0)
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=str(CHROMIUM),
            headless=True,
            args=flags,
            viewport={"width": 1600, "height": 1000},
        )
        context.set_default_timeout(PATIENCE * 1000)
        yield context.new_page()
        context.close()


def test_a_sweep_in_the_browser(browser_page: Any, printed_page: str, sweep: Path) -> None:
    browser_page.goto(printed_page)
    browser_page.get_by_text("4 matching runs").wait_for()
    named = browser_page.get_by_role("link", name="digits-sweep-1")
    assert named.all_inner_texts() == [f"digits-sweep-1{n}" for n in ("-0001", "-0002", "-0000", "")]  # best first
    named.first.click()
    browser_page.get_by_text("fine_tune(1)").first.wait_for()
    browser_page.goto(printed_page)
    browser_page.get_by_role("link", name="digits-sweep-1", exact=True).click()
    browser_page.get_by_text("The data, stage by stage:").wait_for()
    browser_page.get_by_text("Artifacts", exact=True).click()
    browser_page.get_by_text("pictures", exact=True).click()
    browser_page.get_by_text("batch.png").click()
    browser_page.wait_for_function("[...document.images].some(image => image.naturalWidth > 100)")


def test_the_address_of_a_run(sweep: Path, own_places: Path) -> None:
    """A sweep's has its trials in their order, a training's is its own page; without records, the pages themselves."""
    folder = own_places / "runs" / "later"
    folder.mkdir()
    assert page_of(folder, "http://s") == "http://s"
    with Tracker(folder / SPOOL, places().tracking, "digits") as tracker:
        start_run(folder / SPOOL, "later", "later", {})
        append(folder / SPOOL, "end", "later", status="FINISHED")
    assert page_of(folder, "http://s") == f"http://s/#/experiments/1/runs/{tracker.run_id('later')}"
    assert page_of(sweep, "http://s") == (
        "http://s/#/experiments/1/runs?workflowType=machine_learning&searchFilter=tags.%60fastray.sweep%60%20%3D%20%27digits-sweep-1"
        "%27&orderByKey=metrics.%60valid%2Faccuracy%60&orderByAsc=false"
    )
    assert newest_run(own_places / "runs") == folder
    assert server_of("http://me:secret@host:80") == "http://host:80"
    assert server_of("sqlite:///a.db") == "http://127.0.0.1:5000"
