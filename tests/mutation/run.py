"""Small faults, one at a time, in a copy of the library: do the quick tests of their room see them? docs/mutation.md.

The faults are cosmic-ray's. One clean run under coverage tells which tests execute a line. For a fault in it those are
run, in a process forked from this one, which has the large packages loaded: a mutant costs its tests alone.
"""

import argparse
import ast
import compileall
import difflib
import importlib
import itertools
import json
import math
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPO = Path(__file__).parents[2]
LARGE = "torch._dynamo torchvision torchmetrics.image.fid torch_fidelity scipy.linalg diffusers mlflow optuna.storages"
BITS = ("Bit", "Shift", "NoOp")  # faults that nobody makes: a + b to a >> b raises in any test
ONLY_FORBID = ("frozen", "strict")  # options of dataclass and zip
ONLY_SAVE = ("cache", "torch.no_grad()", "torch.inference_mode()")  # decorators: time and memory
PYTEST = ["-q", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp=../temporary"]  # beside the copy


class Execution:
    """A pytest plugin: which tests execute a statement, and how long they take."""

    def __init__(self, source: Path) -> None:
        self.coverage = coverage.Coverage(data_file=None, source=[str(source)], config_file=False)
        self.coverage.start()  # before anything of the library is imported
        self.seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def found(self) -> dict:
        """{"seconds": by test, "tests": by file and a statement's first line; "" is one of them if it is imported}."""
        self.coverage.stop()
        data, tests = self.coverage.get_data(), {}
        for file in data.measured_files():
            contexts = data.contexts_by_lineno(file)
            tests[file] = {
                first: sorted({test for line in range(first, following) for test in contexts.get(line, ())})
                for first, following in itertools.pairwise([*self.coverage.analysis2(file)[1], max(contexts) + 1])
            }
        return {"seconds": self.seconds, "tests": tests}


def clean_run(copy: Path, room: str) -> dict:
    """What Execution found about the tests of the room, which have to pass."""
    kept = copy.parent / "execution.json"

    def work() -> int:
        execution = Execution(copy / "src/diffusion" / room)
        status = pytest.main([*PYTEST, f"tests/{room}"], [execution])
        kept.write_text(json.dumps(execution.found()))
        return status

    if forked(copy, 900, work):
        sys.exit(f"{room}: the tests fail without any fault: run pytest tests/{room}")
    return json.loads(kept.read_text())


def forked(copy: Path, seconds: float, work: Callable[[], int]) -> int:
    """The exit status of `work` in a process of its own, which is ended after `seconds`."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    signal.alarm(math.ceil(seconds))
    os.chdir(copy)
    sys.path[:0] = [str(copy / part) for part in ("src", "tests", ".")]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os._exit(int(work()))


def tests_of(execution: dict, path: Path, line: int) -> list[str]:
    """The tests that execute the statement at `line`, those of its module and the quick ones first.

    A statement that is executed by importing the module is for all files whose tests execute something of it.
    """
    statements = {int(first): names for first, names in execution["tests"].get(str(path), {}).items()}
    tests = statements.get(max((first for first in statements if first <= line), default=0), [])
    if tests == [""]:
        files = {name.split("::")[0] for names in statements.values() for name in names}
        tests = [test for test in execution["seconds"] if test.split("::")[0] in files]
    own, seconds = f"/test_{path.stem}.py", execution["seconds"]
    return sorted({*tests} - {""}, key=lambda test: (own not in test, seconds[test]))


def places(path: Path) -> Iterator[tuple[Path, str, int, tuple[int, int]]]:
    """(file, operator, its how-manieth mutation, line and column) of every fault that cosmic-ray knows to make."""
    tree = get_ast(path.read_text())
    for name in operator_names():
        operator = get_operator(name)
        if not operator.arguments() and not any(bits in name for bits in BITS):
            found = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
            yield from ((path, name, k, start) for k, start in enumerate(found))


def sample(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, str]]:
    """(file, line, source with a fault) at `count` places, one a place, without those that have the same meaning."""
    everything = [place for path in sorted(folder.rglob("*.py")) for place in places(path)]
    random.Random(seed).shuffle(everything)
    taken: set[tuple[Path, tuple[int, int]]] = set()
    for path, name, k, start in everything:
        if len(taken) == count:
            return
        mutant = mutate_code(path.read_text(), get_operator(name)(), k)
        if (path, start) not in taken and meaning(mutant) not in ("", meaning(path.read_text())):
            taken.add((path, start))
            yield path, start[0], mutant


def meaning(source: str) -> str:
    """The syntax tree without what docs/mutation.md says is left out; empty if there is none (f(*, x) made f(%, x))."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        match node:
            case ast.arg() | ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.FunctionDef():
                node.returns = None
                node.decorator_list = [one for one in node.decorator_list if ast.unparse(one) not in ONLY_SAVE]
            case ast.JoinedStr():
                node.values = []
            case ast.Call():
                node.keywords = [keyword for keyword in node.keywords if keyword.arg not in ONLY_FORBID]
            case ast.Compare():
                same = {ast.Is: ast.Eq(), ast.IsNot: ast.NotEq()}
                node.ops = [same.get(type(one), one) for one in node.ops]
    return ast.dump(tree)


def judge(copy: Path, room: str, count: int, seed: int) -> None:
    """Print what no test saw, and how many were seen."""
    execution = clean_run(copy, room)
    tried = killed = 0
    for path, line, mutant in sample(copy / "src/diffusion" / room, count, seed):
        tests = tests_of(execution, path, line)
        original = path.read_text()
        path.write_text(mutant)
        limit = 20 + 4 * sum(execution["seconds"][test] for test in tests)
        seen = bool(tests) and forked(copy, limit, partial(pytest.main, [*PYTEST, "-x", *tests])) != 0
        path.write_text(original)
        tried, killed = tried + 1, killed + seen
        if not seen:
            lines, about = (original.split("\n"), mutant.split("\n")), f"{path.relative_to(copy)}, {len(tests)} tests"
            print(*difflib.unified_diff(*lines, tofile=about, lineterm="", n=0), sep="\n")
        print(f"{room}: {killed} of {tried}", end="\r", file=sys.stderr, flush=True)
    print(f"{room}: {killed} of {tried} mutants seen", flush=True)


def main() -> None:
    """Print the mutants that no test saw, and a line for each room."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", default=["data", "model", "sampling", "metrics", "training"])
    parser.add_argument("--mutants", type=int, default=40, help="of each room")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name in LARGE.split():
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        for name in ("src", "tests", "stages", "benchmarks", "params"):
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [p for p in REPO.iterdir() if p.is_file()]:
            shutil.copy(path, copy)
        # bytecode that is known by its source's content: two mutants of one second and one length are two
        compileall.compile_dir(copy / "src", quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        for room in options.rooms:
            judge(copy, room, options.mutants, options.seed)


if __name__ == "__main__":
    main()
