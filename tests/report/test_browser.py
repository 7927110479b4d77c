"""MLflow's pages as people see them: `make ui` in a real headless Chromium, with runs that the stages made."""

import csv
import itertools
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
from types import SimpleNamespace

import pytest
from helpers.commands import run_all, write_params
from helpers.project import REPO
from helpers.stores import client_of, free_port, wait_for

from diffusion import config, params_file, paths
from diffusion.pipeline import train
from diffusion.tracking import runs, ui

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
def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """`make ui` at work in `folder`: the address that it prints, and that of the server."""
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
        yield next(word for word in said.split() if word.startswith(server)), server
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def two_trained_runs() -> tuple[list[str], dict[str, float], dict[str, float]]:
    """Ids, and by name the score and the last loss; by the real stages."""
    ids, scores, losses = [], {}, {}
    recipe = {"tracking.enabled": True, "train.lr_schedule": "linear", "diffusion.schedule": "cosine"}
    for lr, name in ((2e-3, "lr2e-3-linear-cosine-v"), (1e-4, "lr1e-4-linear-cosine-v")):
        write_params(**recipe, **{"train.lr": lr})
        run_all(*([] if ids else ["prepare", "reference"]), "train", "sample", "evaluate")
        scores[name] = json.loads(paths.EVALUATE_METRICS.read_text())["fd_lite0_12"]
        ids.append(json.loads(paths.MODEL_CARD.read_text())["run_id"])
        with paths.LOSS_CSV.open() as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)][-1]
    return ids, scores, losses


def ten_runs() -> dict[str, float]:
    """In an experiment of their own, to which params.yaml is set: by name their scores, which all differ."""
    write_params(**{"tracking.enabled": True, "tracking.experiment": "ten"})
    rates = [2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    scores = {}
    for number, (schedule, lr) in enumerate(itertools.product(("cosine", "linear"), rates)):
        params = params_file.load("params.yaml", {"train.lr": lr, "diffusion.schedule": schedule, "seed": number % 2})
        tracker = runs.open_run(params.tracking, name=train.run_name(params), run_folder=paths.RUNS / f"{number}")
        with runs.closing_status(tracker, "train"):
            tracker.params(config.flat(config.trained(params)))
            scores[train.run_name(params)] = 200.0 + 37 * number % 10
            tracker.metrics({"best/val_loss": 0.1, "evaluate/fd_lite0_2k": scores[train.run_name(params)]}, 8)
    return scores


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
def test_runs_are_ranked_and_compared(workspace: Path) -> None:
    """Two that the stages made; then ten, of which one screen shows which is best and why."""
    ids, scores, losses = two_trained_runs()
    experiment = client_of(paths.MLFLOW_DB).get_experiment_by_name(EXPERIMENT).experiment_id
    with pages(workspace) as (address, server):
        table = browse(address, workspace)
        assert table.names == sorted(scores, key=scores.__getitem__)  # the better one first
        ranking = next(key for key in table.cells[0] if "fd_lite0" in key)
        assert [float(text) for text in table.column(ranking)] == [
            pytest.approx(score) for score in sorted(scores.values())
        ]
        assert sorted(table.column("params.`train.lr`")) == ["0.0001", "0.002"]  # the one thing in which they differ
        assert not any(key.startswith("params.") and "train.lr" not in key for key in table.cells[0])

        plot = browse(compared(server, ids, experiment), workspace)
        assert len(plot.curves) == 2  # over each other
        assert all(f"{name} (train/loss)" in plot.text for name in losses)
        latest = {float(text) for text in re.findall(r"(\d\.\d+) \(step=8\)", plot.text)}
        assert latest >= {*losses.values()}

        scores = ten_runs()
        table = browse(ui.page(server), workspace)
    assert table.names == sorted(scores, key=scores.__getitem__)
    assert [float(text) for text in table.column("metrics.`evaluate/fd_lite0_2k`")] == sorted(scores.values())
    for key in ("train.lr", "diffusion.schedule", "seed"):  # all that differs, drawn without scrolling
        assert all(table.column(f"params.`{key}`")), key


def a_run(params: dict[str, str], **metrics: float) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(params=params, metrics=metrics, tags={}))


class TestView:
    def test_it_orders_by_the_score_that_most_runs_have(self) -> None:
        lite = {"evaluate/fd_lite0_2048": 1.0, "evaluate/precision": 0.5, "best/val_loss": 1.0}
        assert ui.scores([a_run({}, **lite), a_run({}, **lite | {"evaluate/fid_2048": 9.0})])[0] == (
            "evaluate/fd_lite0_2048"
        )
        assert ui.scores([a_run({}, **lite | {"evaluate/fid_2048": 9.0})])[0] == "evaluate/fid_2048"
        assert ui.scores([a_run({}, loss=1.0)]) == ["best/val_loss"]

    def test_it_shows_what_differs_the_most_telling_first(self) -> None:
        same = {"train.batch_size": "4", "train.steps": "8"}
        one = {**same, "train.lr": "1", "model.channels": "16", "train.device": "cpu"}
        other = {**same, "train.lr": "2", "model.channels": "32", "train.device": "cuda"}
        assert ui.differing([a_run(one), a_run(other)]) == ["train.lr", "model.channels"]
        assert "train.lr" in ui.differing([a_run(one)])
        trial = a_run({**one, "model.channels": "64", "seed": "3"})
        trial.data.tags["optuna.trial"] = "7"
        assert ui.differing([a_run(one), a_run({**one, "train.lr": "2"}), trial]) == ["train.lr"]

    def test_nothing_to_show_is_the_bare_address(self, workspace: Path, database: Path) -> None:
        write_params()
        assert ui.page("http://x") == "http://x"
