"""MLflow's pages as people see them: `make ui` in a real headless Chromium, with runs that the stages made."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.commands import run_all, write_params
from helpers.project import REPO
from helpers.stores import client_of, free_port, wait_for

from diffusion import paths

pytest.importorskip("mlflow")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EXPERIMENT = "cifar10-diffusion"
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]


class Table(HTMLParser):
    """Text of each cell of a grid, by row number and column; lines of a plot; all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: dict[int, dict[str, str]] = {}
        self.text, self.curves = "", set[str]()  # a curve lies twice in the page: raw and smoothed
        self._row, self._column = -1, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("role") == "row":
            self._row, self._column = int(given.get("row-index") or -1), ""
        if given.get("col-id"):
            self._column = given["col-id"] or ""
        if given.get("class") == "js-line":
            self.curves.add(given.get("d") or "")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._row >= 0 and self._column:
            row = self.cells.setdefault(self._row, {})
            row[self._column] = row.get(self._column, "") + data

    @property
    def names(self) -> list[str]:
        """Of the runs; the cell also holds their colour."""
        return [re.sub("^#[0-9a-f]{6}", "", text) for text in self.column("attributes.`Run Name`")]

    def column(self, name: str) -> list[str]:
        """From the first row down, as far as the grid has drawn them."""
        return [cells.get(name, "") for _, cells in sorted(self.cells.items())]


def browse(address: str, folder: Path) -> Table:
    """What Chromium shows there once the page has come to rest."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", *QUIET, "--disable-component-update", "--window-size=1800,1000"]
    command += [f"--user-data-dir={folder / 'chromium'}", "--virtual-time-budget=60000"]
    done = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=300)
    return Table(done.stdout)


@contextmanager
def pages(folder: Path) -> Iterator[str]:
    """`make ui` at work in `folder`: the address that it prints."""
    server = f"http://127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": f"{REPO}/src", "DVC_ROOT": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "diffusion", "ui", "--port", server.rsplit(":", 1)[1]]
    log = (folder / "ui.log").open("wb")
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def healthy() -> bool:
        assert process.poll() is None, Path(log.name).read_text()
        try:
            return bool(urllib.request.urlopen(f"{server}/health", timeout=5).read() == b"OK")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    try:
        wait_for(healthy)
        said = Path(log.name).read_text()
        assert server in said.split()
        yield server
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def two_trained_runs() -> tuple[list[str], dict[str, float]]:
    """Ids, and by name the last loss; by the real stages."""
    ids, losses = [], {}
    recipe = {"tracking.enabled": True, "train.lr_schedule": "linear", "diffusion.schedule": "cosine"}
    for lr, name in ((2e-3, "lr2e-3-linear-cosine-v"), (1e-4, "lr1e-4-linear-cosine-v")):
        write_params(**recipe, **{"train.lr": lr})
        run_all(*([] if ids else ["prepare"]), "train")
        ids.append(json.loads(paths.MODEL_CARD.read_text())["run_id"])
        with paths.LOSS_CSV.open() as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)][-1]
    return ids, losses


def compared(server: str, ids: list[str], experiment: str) -> str:
    """Address of the page that shows the loss of these runs in one plot."""
    query = {
        "runs": json.dumps(ids),
        "metric": '"train/loss"',
        "experiments": f'["{experiment}"]',
        "plot_metric_keys": '["train/loss"]',
        "plot_layout": "{}",
        "x_axis": "step",
        "y_axis_scale": "linear",
        "line_smoothness": 1,
        "show_point": "false",
        "deselected_curves": "[]",
        "last_linear_y_axis_range": "[]",
    }
    return f"{server}/#/metric?{urllib.parse.urlencode(query)}"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
def test_runs_are_listed_and_compared(workspace: Path) -> None:
    """Two that the stages made."""
    ids, losses = two_trained_runs()
    experiment = client_of(paths.MLFLOW_DB).get_experiment_by_name(EXPERIMENT).experiment_id
    with pages(workspace) as server:
        table = browse(f"{server}/#/experiments/{experiment}/runs", workspace)
        assert sorted(table.names) == sorted(losses)

        plot = browse(compared(server, ids, experiment), workspace)
    assert len(plot.curves) == 2  # over each other
    assert all(f"{name} (train/loss)" in plot.text for name in losses)
    latest = {float(text) for text in re.findall(r"(\d\.\d+) \(step=8\)", plot.text)}
    assert latest >= {*losses.values()}
