"""dvc.yaml against the code: a dependency that is not declared makes results that look fresh and are stale."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from helpers.project import REPO
from ruamel.yaml import YAML

from diffusion import config, params_file, paths
from diffusion.training.identity import import_closure

DVC = YAML(typ="safe").load(REPO / "dvc.yaml")
STAGES = DVC["stages"]
SECTIONS = {key.split(".")[0] for key in params_file.schema()}


def imports_of(path: Path) -> set[Path]:
    """Project files that `path` names in an import statement anywhere, its packages' __init__ included."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                for root in (REPO, REPO / "src"):
                    base = root.joinpath(*parts[:length])
                    found |= {p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()}
    return found


def closure(script: Path) -> set[Path]:
    seen: set[Path] = set()
    todo = {script, script.parent / "__init__.py"}
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= imports_of(path) - seen
    return {path.relative_to(REPO) for path in seen}


def code_deps(stage: str) -> set[Path]:
    return {Path(d) for d in STAGES[stage]["deps"] if d.endswith(".py")}


def outputs(stage: str) -> set[str]:
    declared = [out for kind in ("outs", "metrics", "plots") for out in STAGES[stage].get(kind, [])]
    return {next(iter(out)) if isinstance(out, dict) else out for out in declared}


def sections_read(files: set[Path]) -> set[str]:
    """Params sections that a stage's own code reads: attributes of a variable called `params`."""
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse((REPO / file).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params":
                found.add(node.attr)
    return found & SECTIONS


def test_the_stages_are_the_published_ones() -> None:
    assert list(STAGES) == ["download", "prepare", "weights", "reference", "train", "sample", "evaluate", "report"]
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert len((REPO / f"stages/{name}.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_exactly_the_import_closure(stage: str) -> None:
    assert code_deps(stage) == closure(REPO / f"stages/{stage}.py")


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_real(stage: str) -> None:
    for key in STAGES[stage].get("params", []):
        assert key in SECTIONS | set(params_file.schema()), key


READS = {  # what each stage's library function reads, besides through the import closure's generic helpers
    "download": {"cifar10", "cifar10_files"},
    "prepare": {"prepare"},
    "weights": {"weights"},
    "reference": {"reference"},
    "train": {"fit"},
    "sample": {"draw"},
    "evaluate": {"evaluation", "judge"},
    "report": {"report"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_params_cover_what_the_stage_reads(stage: str) -> None:
    """The stage script names the section it hands on, or the module with its function reads `params.<section>`."""
    own = {Path(f"stages/{stage}.py")} | {Path(f"src/diffusion/{m}.py") for m in READS[stage]}
    read = sections_read({p for p in own if (REPO / p).is_file()})
    if "trained(params)" in "".join((REPO / p).read_text() for p in own if (REPO / p).is_file()):
        read |= set(config.TrainedConfig.__annotations__)
    declared = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    assert read == declared


def test_editing_figures_retrains_nothing_and_editing_the_network_does() -> None:
    figures, unet = Path("src/diffusion/report/figures.py"), Path("src/diffusion/model/unet.py")
    assert [s for s in STAGES if figures in code_deps(s)] == ["report"]
    assert unet in code_deps("train")
    assert unet in {p.relative_to(REPO) for p in import_closure(REPO / "src/diffusion/training/loop.py")}


def test_the_training_fingerprint_covers_what_training_imports() -> None:
    """provenance.import_closure (modulefinder) against this file's own walk."""
    script = REPO / "src/diffusion/training/loop.py"
    assert {p.relative_to(REPO) for p in import_closure(script)} == closure(script)


@pytest.mark.parametrize("stage", STAGES)
def test_files_between_stages_are_declared(stage: str) -> None:
    """What a stage needs from another is an output of that stage."""
    outs = {
        str(next(iter(o))) if isinstance(o, dict) else str(o)
        for s in STAGES.values()
        for k in ("outs", "metrics", "plots")
        for o in s.get(k, [])
    }
    own = {
        "${data.source}": params_file.load(REPO / "params.yaml").data.source
    }  # a file of the user's is nobody's output
    for dep in STAGES[stage]["deps"]:
        if not dep.endswith(".py"):
            assert own.get(dep, dep) in outs, dep


def test_declared_paths_are_the_codes() -> None:
    known = {str(v) for v in vars(paths).values() if isinstance(v, Path)}
    for name in STAGES:
        assert outputs(name) <= known


def test_mlproject_runs_the_same_stages() -> None:
    entry_points = YAML(typ="safe").load(REPO / "MLproject")["entry_points"]
    assert set(entry_points) == {"main", "tune", *STAGES}
    for name, entry_point in entry_points.items():
        assert entry_point["command"] == f"PYTHONPATH=src python -m stages.{name} --params {{params}}"
        assert entry_point["parameters"]["params"]["default"] == str(paths.PARAMS)


def test_mlflows_environment_is_the_locked_one() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=]", dependency)[0].replace(".", "-") for dependency in project["dependencies"]}
    lock = (REPO / "requirements.lock").read_text()
    listed = YAML(typ="safe").load(REPO / "python_env.yaml")["dependencies"]
    assert {pin.split("==")[0] for pin in listed} == wanted
    for pin in listed:
        assert re.search(rf"^{re.escape(pin)}\b", lock, re.M), pin


def test_the_imports_point_down() -> None:
    """Each service has one room, so that the rest of the library imports without it."""
    rooms = {
        "mlflow": ["mlflow_store.py", "mlflow_writer.py", "registry.py", "pyfunc.py", "serving.py"],
        "optuna": [path.name for path in (REPO / "src/diffusion").glob("tuning*.py")],
        "matplotlib": ["figures.py", "diagrams.py"],
        "diffusers": [],
        "dvc": [],
    }
    for path in [*(REPO / "src/diffusion").rglob("*.py"), *(REPO / "stages").glob("*.py")]:
        for package, names in rooms.items():
            if re.search(rf"^\s*(import|from) {package}\b", path.read_text(), re.M):
                assert path.name in names, f"{path.name} imports {package}"
