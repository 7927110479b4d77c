"""Small faults, one at a time, in a copy of the library: do the quick tests of their room see them? docs/mutation.md.

The faults are cosmic-ray's. Each mutant's tests run in a process forked from this one, which has the large packages
loaded, so that a mutant costs its tests and not the imports.
"""

import argparse
import ast
import difflib
import importlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

REPO = Path(__file__).parents[2]
ROOMS = ("data", "model", "sampling", "metrics", "training")
LARGE = (
    "torch._dynamo",
    "torchvision",
    "torchmetrics.image.fid",
    "torch_fidelity",
    "scipy.linalg",
    "diffusers",
    "mlflow",
)
COPIED = ("src", "tests", "stages", "benchmarks", "params")
BITS = ("Bit", "Shift", "NoOp")  # faults that nobody makes: a + b to a >> b raises in any test
SECONDS = 600  # of a room's tests


def places(path: Path) -> Iterator[tuple[Path, str, int, tuple[int, int]]]:
    """(file, operator, its how-manieth mutation, line and column) of every fault that cosmic-ray knows to make."""
    tree = get_ast(path.read_text())
    for name in operator_names():
        operator = get_operator(name)
        if not operator.arguments() and not any(bits in name for bits in BITS):
            found = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
            yield from ((path, name, k, start) for k, start in enumerate(found))


def sample(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, str]]:
    """(file, its source with a fault) at `count` places, one a place, without those that change only types."""
    everything = [place for path in sorted(folder.rglob("*.py")) for place in places(path)]
    random.Random(seed).shuffle(everything)
    taken: set[tuple[Path, tuple[int, int]]] = set()
    for path, name, k, start in everything:
        if len(taken) == count:
            return
        mutant = mutate_code(path.read_text(), get_operator(name)(), k)
        if (path, start) not in taken and meaning(mutant) not in ("", meaning(path.read_text())):
            taken.add((path, start))
            yield path, mutant


def meaning(source: str) -> str:
    """The syntax tree without the types of arguments and results; empty where there is none (f(*, x) made f(%, x))."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
    return ast.dump(tree)


def passes(copy: Path, room: str, first: str, seconds: float) -> bool:
    """Whether the room's quick tests pass, those of the module `first` before the others; in a forked process."""
    tests = sorted(
        (copy / "tests" / room).glob("test_*.py"), key=lambda p: (p.stem != f"test_{first}", p.stat().st_size)
    )
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    signal.alarm(math.ceil(seconds))
    os.chdir(copy)
    sys.path[:0] = [str(copy / part) for part in ("src", "tests", ".")]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    import pytest

    options = [
        "-x",
        "-q",
        "-n",
        "0",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        f"--basetemp={copy.parent / 'temporary'}",
    ]
    os._exit(int(pytest.main([*options, *map(str, tests)])))


def main() -> None:
    """Print the mutants that no test saw, and a line for each room."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", default=ROOMS)
    parser.add_argument("--mutants", type=int, default=40, help="of each room")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    sys.dont_write_bytecode = True  # two mutants of one second and one length would share it
    for name in LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in COPIED:
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in [p for p in REPO.iterdir() if p.is_file()]:
            shutil.copy(path, copy)
        for room in options.rooms:
            judge(copy, room, options.mutants, options.seed)


def judge(copy: Path, room: str, count: int, seed: int) -> None:
    begin = time.monotonic()
    if not passes(copy, room, "", SECONDS):
        sys.exit(f"{room}: the tests fail without any fault: run pytest tests/{room}")
    limit = 20 + 4 * (time.monotonic() - begin)  # a mutant that takes longer hangs, which is seen
    tried = killed = 0
    for path, mutant in sample(copy / "src/diffusion" / room, count, seed):
        original = path.read_text()
        path.write_text(mutant)
        seen = not passes(copy, room, path.stem, limit)
        path.write_text(original)
        tried, killed = tried + 1, killed + seen
        if not seen:
            name, lines = str(path.relative_to(copy)), (original.split("\n"), mutant.split("\n"))
            print(*difflib.unified_diff(*lines, name, name, lineterm="", n=0), sep="\n", flush=True)
        print(f"{room}: {killed} of {tried}", end="\r", file=sys.stderr, flush=True)
    print(f"{room}: {killed} of {tried} mutants seen", flush=True)


if __name__ == "__main__":
    main()
