"""dvc.yaml against the code: a dependency that is not declared makes results that look fresh and are stale."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
from helpers.project import REPO
from ruamel.yaml import YAML

from diffusion import config, params_file, paths
from diffusion.code_digest import HARMLESS, HARMLESS_ROOMS, LIBRARY, import_closure

DVC = YAML(typ="safe").load(REPO / "dvc.yaml")
STAGES = DVC["stages"]
SECTIONS = {key.split(".")[0] for key in params_file.schema()}


def imports_of(path: Path) -> set[Path]:
    """Project files that `path` names in an import statement anywhere; a package's __init__ if a name is its own."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {file for name in names if (file := file_of(name))}
    return found


def file_of(name: str) -> Path | None:
    """The project file of a module, or of the module that has the attribute `name`."""
    for dotted in (name, name.rpartition(".")[0]):
        for root in (REPO, REPO / "src"):
            base = root.joinpath(*dotted.split("."))
            for path in (base.with_suffix(".py"), base / "__init__.py"):
                if path.is_file():
                    return path
    return None


def is_harmless(path: Path) -> bool:
    """What decides no output: the stages' command line, and what code_digest.HARMLESS names."""
    if path == REPO / "stages/__init__.py" or path == LIBRARY / "__init__.py":
        return True
    inside = path.relative_to(LIBRARY).as_posix() if path.is_relative_to(LIBRARY) else ""
    return inside in HARMLESS or inside.split("/")[0] in HARMLESS_ROOMS


def closure(script: Path) -> set[Path]:
    """What `script` imports, and what that imports; what is harmless is left out, with all that it alone needs."""
    seen: set[Path] = set()
    todo = {script}
    while todo:
        path = todo.pop()
        seen.add(path)
        todo |= {file for file in imports_of(path) if not is_harmless(file)} - seen
    return {path.relative_to(REPO) for path in seen}


def code_deps(stage: str) -> set[Path]:
    return {Path(d) for d in STAGES[stage]["deps"] if str(d).startswith(("src/", "stages/"))}


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
        assert stage["cmd"] == f"PYTHONPATH=src python -m stages.{name}"
        assert len((REPO / f"stages/{name}.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_import_closure(stage: str) -> None:
    """Every file that decides an output lies in a dep, and every dep holds such a file."""
    files, deps = closure(REPO / f"stages/{stage}.py"), code_deps(stage)
    assert [file for file in sorted(files) if not any(file.is_relative_to(dep) for dep in deps)] == []
    assert [dep for dep in sorted(deps) if not any(file.is_relative_to(dep) for file in files)] == []
    assert len(deps) <= 10


def test_the_file_stays_readable() -> None:
    assert len((REPO / "dvc.yaml").read_text().splitlines()) <= 150


@pytest.mark.parametrize("package", sorted(p.parent.name for p in LIBRARY.glob("*/**/__init__.py")))
def test_packages_do_nothing_when_they_are_imported(package: str) -> None:
    """So that a dep on one of their modules is enough: only names are imported, and functions defined."""
    (init,) = LIBRARY.glob(f"**/{package}/__init__.py")
    for node in ast.parse(init.read_text()).body:
        assert isinstance(node, ast.Expr | ast.ImportFrom | ast.FunctionDef) or ast.unparse(node).startswith("__all__")


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_real(stage: str) -> None:
    for key in STAGES[stage].get("params", []):
        assert key in SECTIONS | set(params_file.schema()), key


READS = {"download": "data/download/cifar10"}  # where a stage's section is read, if not in pipeline/


@pytest.mark.parametrize("stage", STAGES)
def test_params_cover_what_the_stage_reads(stage: str) -> None:
    """The stage script names the section it hands on, or the module with its function reads `params.<section>`."""
    own = {Path(f"stages/{stage}.py"), Path(f"src/diffusion/{READS.get(stage, f'pipeline/{stage}')}.py")}
    if stage == "evaluate":
        own.add(Path("src/diffusion/metrics/scores.py"))
    read = sections_read(own)
    if "trained(params)" in "".join((REPO / p).read_text() for p in own):
        read |= set(config.TrainedConfig.__annotations__)
    declared = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    assert read == declared


def test_the_training_fingerprint_covers_what_training_imports() -> None:
    """code_digest.import_closure (modulefinder) against this file's own walk."""
    script = LIBRARY / "training/loop.py"
    ours = {path for path in import_closure(script) if not is_harmless(path) and path.name != "__init__.py"}
    assert {p.relative_to(REPO) for p in ours} == closure(script)


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
        if Path(dep) not in code_deps(stage) and dep != "requirements.lock":
            assert own.get(dep, dep) in outs, dep


def test_plots_are_of_files_that_every_run_makes() -> None:
    """`dvc plots show` complains of what is absent, such as the tables of a search."""
    drawn = set()
    for plot in DVC["plots"]:
        about = next(iter(plot.values())) if isinstance(plot, dict) else {"y": [plot]}
        drawn |= {*about["y"]}
    assert drawn <= set().union(*map(outputs, STAGES))


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
