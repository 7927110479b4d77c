"""`mlflow run` itself on the committed MLproject: parameters, and which MLflow run holds what."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.dvc_project import Project
from helpers.project import REPO
from helpers.stores import CONFIG, client_of, open_run

from diffusion import config, params_file, paths
from diffusion.pipeline import experiment
from diffusion.tracking import mlproject_run, runs
from stages import stage

pytest.importorskip("mlflow")
EXPERIMENT = "cifar10-diffusion"  # of params.yaml


class TestOptions:
    """Every key of params.yaml is an option of every stage, read as YAML and checked as the file is."""

    def run(self, *arguments: str) -> tuple[int, str, list[config.Params]]:
        seen: list[config.Params] = []
        result = CliRunner().invoke(stage(seen.append), ["--params", str(REPO / "params.yaml"), *arguments])
        return result.exit_code, result.output, seen

    def test_they_replace_what_the_file_says(self) -> None:
        given = {
            "seed": "3",
            "train.lr": "3e-4",
            "train.flip": "false",
            "model.multipliers": "[1, 1, 2]",
            "model.num_classes": "null",
            "diffusion.prediction": "eps",
        }
        _, _, (params,) = self.run(*(text for key, value in given.items() for text in (f"--{key}", value)))
        expected = {key: json.loads(value) if key != "diffusion.prediction" else value for key, value in given.items()}
        assert config.flat(params) == config.flat(params_file.load(REPO / "params.yaml")) | expected

    def test_there_is_one_for_every_key(self) -> None:
        file = params_file.load(REPO / "params.yaml")
        every = [text for key, value in config.flat(file).items() for text in (f"--{key}", json.dumps(value))]
        assert self.run(*every)[2] == [file]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--train.lr", "fast"], "train.lr = 'fast' is not allowed: it must be a number from 1e-08 to 1"),
            (["--train.steps", "1.5"], "train.steps = 1.5 is not allowed: it must be a whole number"),
            (["--model.multipliers", "[1"], "model.multipliers = '[1' is not readable as YAML"),
            (["--sample.guidance", "2"], "set model.num_classes"),
            (["--train.stepz", "3"], "--train.steps"),
        ],
    )
    def test_a_wrong_one_is_said_and_nothing_runs(self, arguments: list[str], said: str) -> None:
        status, output, seen = self.run(*arguments)
        assert (status, seen) == (2, [])
        assert said in output


def opened_run(database: Path, monkeypatch: pytest.MonkeyPatch, name: str = "bold-fish-7") -> str:
    client = client_of(database)
    known = client.get_experiment_by_name(CONFIG.experiment)
    experiment = known.experiment_id if known else client.create_experiment(CONFIG.experiment)
    run_id: str = client.create_run(experiment, run_name=name, tags={"mlflow.project.entryPoint": "main"}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    return run_id


class TestRun:
    """The run that `mlflow run` opened, made here as it makes it."""

    def test_a_new_training_takes_it_and_names_it(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_id = opened_run(database, monkeypatch)
        tracker = open_run(tmp_path / "a")
        tracker.close("FINISHED")
        assert tracker.run_id == run_id
        run = client_of(database).get_run(run_id)
        assert (run.info.run_name, run.info.status) == ("lr1-test", "FINISHED")

    def test_the_users_own_name_stays(self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_id = opened_run(database, monkeypatch, "my best idea")
        open_run(tmp_path / "a").close("FINISHED")
        assert client_of(database).get_run(run_id).info.run_name == "my best idea"

    def test_two_trainings_do_not_mix(self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_id = opened_run(database, monkeypatch)
        first, second = open_run(tmp_path / "a"), open_run(tmp_path / "b")
        first.close("FINISHED")
        second.close("FINISHED")
        third = open_run(tmp_path / "c")  # a shell that still names a run that is over
        third.close("FINISHED")
        assert first.run_id == run_id
        assert len({first.run_id, second.run_id, third.run_id}) == 3

    def test_what_goes_on_with_an_older_run_leaves_a_link(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = client_of(database)
        older = open_run(tmp_path / "a")
        older.close("KILLED")
        for write in (
            lambda: runs.attach(CONFIG, older.run_id, stage="sample", journal=tmp_path / "a/journal.jsonl"),
            lambda: open_run(tmp_path / "a"),  # resumed
        ):
            opened = opened_run(database, monkeypatch)
            tracker = write()
            tracker.close("FINISHED")
            assert tracker.run_id == older.run_id
            run = client.get_run(opened)
            assert run.data.tags["pipeline.run_id"] == older.run_id
            assert f"/runs/{older.run_id})" in run.data.tags["mlflow.note.content"]
            assert run.info.status == "RUNNING"  # `mlflow run` ends it
            client.set_terminated(opened)

    def test_a_run_of_another_store_is_none(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for run_id in ("0" * 32, "no id at all '"):
            monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
            assert mlproject_run.adopt(client_of(database), CONFIG.experiment, "n") is None
            tracker = open_run(tmp_path / run_id[:2])
            tracker.close("FINISHED")
            assert tracker.run_id not in (None, run_id)

    def test_another_experiment_is_said_in_one_line(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = client_of(database).create_run("0", run_name="bold-fish-7", tags={"mlflow.project.entryPoint": "train"})
        monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
        tracker = open_run(tmp_path / "a")
        tracker.close("FINISHED")
        assert tracker.run_id == run.info.run_id
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--experiment-name {CONFIG.experiment}" in line


class TestReproduce:
    """What DVC is asked for."""

    def asked(self, monkeypatch: pytest.MonkeyPatch, params: config.Params) -> list[str]:
        seen: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            seen.append(command)
            return subprocess.CompletedProcess(command, 7)

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(paths, "PARAMS", REPO / "params.yaml")
        assert experiment.reproduce(params) == 7
        return seen[0][1:]

    def test_the_file_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.asked(monkeypatch, params_file.load(REPO / "params.yaml")) == ["-m", "dvc", "repro"]

    def test_the_run_of_mlflow_run_names_the_pipelines_run(
        self, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where no stage had to run."""
        params = params_file.load(REPO / "params.yaml", {"tracking.experiment": CONFIG.experiment})
        older = open_run(tmp_path / "a")
        older.close("FINISHED")
        opened = opened_run(database, monkeypatch)
        paths.MODEL_CARD.parent.mkdir()
        monkeypatch.setattr(experiment, "read_card", lambda _: {"run_id": older.run_id})
        paths.MODEL_CARD.touch()
        monkeypatch.setattr(experiment, "load", lambda _: params)
        monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
        assert experiment.reproduce(params) == 0
        assert client_of(database).get_run(opened).data.tags["pipeline.run_id"] == older.run_id

    def test_other_values_and_other_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever differs, spelt so that YAML reads it back."""
        params = params_file.load(
            REPO / "params/conditional.yaml", {"model.multipliers": [1, 1, 2], "data.path": "a b"}
        )
        command = self.asked(monkeypatch, params)
        assert command[:5] == ["-m", "dvc", "exp", "run", "--temp"]
        given = dict(text.split("=", 1) for text in command[6::2])
        read = {key: params_file.read_value(key, text) for key, text in given.items()}
        assert params_file.load(REPO / "params.yaml", read) == params
        assert set(command[5::2]) == {"-S"}

    @pytest.mark.parametrize(
        ("source", "given"), [("../photos", "{}/photos"), ("photos", "photos"), ("/a/photos", "/a/photos")]
    )
    def test_images_outside_are_given_by_their_whole_path(
        self, monkeypatch: pytest.MonkeyPatch, source: str, given: str
    ) -> None:
        """The experiment's copy of the repository has other neighbours."""
        command = self.asked(monkeypatch, params_file.load(REPO / "params.yaml", {"data.source": source}))
        assert f'data.source="{given.format(Path.cwd().parent)}"' in command

    @pytest.mark.parametrize("recipe", sorted((REPO / "params").glob("*.yaml")), ids=lambda path: path.stem)
    def test_dvc_can_read_what_it_is_asked_for(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By its own parser, which takes no keys in quotation marks, and no escapes."""
        from dvc.utils.hydra import to_hydra_overrides

        params = params_file.load(recipe, {"data.source": "bilder/größe"})
        texts = self.asked(monkeypatch, params)[6::2]
        found = {str(o.key_or_group): o.value() for o in to_hydra_overrides(texts)}
        assert found["data.source"] == "bilder/größe"
        assert not [key for key in found if key.startswith("tune")]
        assert {key: value for key, value in config.flat(params).items() if key in found} == found


def mlflow_run(folder: Path, *arguments: str, env_manager: str = "local") -> str:
    """`mlflow run .` as users call it, on the store of the project's folder; what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PYTHONPATH"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENV_ROOT": str(folder.parent / "environments"),
    }
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", env_manager, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def tracked(project: Project, empty_database: Path) -> Project:
    shutil.copyfile(empty_database, project.folder / "mlflow.db")
    project.set(**{"tracking.enabled": True})
    text = (project.folder / "params.yaml").read_text()
    (project.folder / "params/other.yaml").write_text(text.replace("batch_size: 4\n", "batch_size: 3\n", 1))
    project.commit()
    return project


def runs_of(project: Project, experiment: str = EXPERIMENT) -> list[Any]:
    """Newest first."""
    client = client_of(project.folder / "mlflow.db")
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "models/model.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.xdist_group("dvc")
def test_a_pipeline_is_one_run_and_parameters_leave_nothing_behind(tracked: Project) -> None:
    """One test, because each step starts from the state that the one before left."""
    before = sorted(path for path in tracked.folder.iterdir() if not path.name.startswith(("mlflow", "mlruns")))
    text = (tracked.folder / "params.yaml").read_text()
    in_experiment = ("--experiment-name", EXPERIMENT)
    said = mlflow_run(
        tracked.folder, *in_experiment, "-P", "params=params/other.yaml", "-P", "train.steps=5", "-P", "train.lr=1.2e-3"
    )
    assert "train.batch_size = 3, train.lr = 0.0012" in said
    assert "train.steps = 5" in said
    (run,) = runs_of(tracked)
    default = params_file.load(REPO / "params.yaml")
    words = f"{default.train.lr_schedule}-{default.diffusion.schedule}-{default.diffusion.prediction}"
    assert (run.info.status, run.info.run_name) == ("FINISHED", f"lr1.2e-3-{words}")
    assert (run.data.params["train.steps"], run.data.params["train.batch_size"]) == ("5", "3")
    assert run.data.metrics.keys() >= {"final/val_loss", "evaluate/fd_lite0_12"}
    assert (tracked.folder / "params.yaml").read_text() == text
    made = {path for path in tracked.folder.iterdir() if not path.name.startswith(("mlflow", "mlruns"))} - {*before}
    assert {path.name for path in made} <= {"runs", "mlartifacts"}

    experiment = re.search(r"Ran experiment\(s\): (\S+)", said)
    assert experiment
    tracked.dvc("exp", "apply", experiment[1])
    assert card_of(tracked.folder)["run_id"] == run.info.run_id
    assert tracked.stale() == set()


@pytest.mark.network
@pytest.mark.xdist_group("dvc")
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_a_fresh_environment(tracked: Project) -> None:
    shutil.rmtree(tracked.folder / "models")
    mlflow_run(tracked.folder, "-e", "prepare", env_manager="uv")
    mlflow_run(tracked.folder, "-e", "train", env_manager="uv")
    assert card_of(tracked.folder)["config"]["train"]["steps"] == 4
