"""Which source files a module needs, and digests of them that comments, docstrings and layout do not change."""

import ast
from collections.abc import Collection
from functools import cache
from hashlib import sha256
from modulefinder import ModuleFinder
from pathlib import Path

LIBRARY = Path(__file__).parent

# What decides no bit of a model or an image: tests/pipeline/test_dvc_yaml.py proves it of the rooms, and a stage's deps
# leave out the same. Paths below the library; a folder stands for all in it.
HARMLESS = (
    "config.py",
    "params_file.py",
    "rules.py",
    "errors.py",
    "paths.py",
    "locks.py",
    "atomic.py",
)
HARMLESS_ROOMS = ("tracking", "serving")


@cache
def import_closure(script: Path, root: Path = LIBRARY.parent) -> frozenset[Path]:
    """The files below `root` that running `script` can import, the script included; nothing is executed."""
    finder = ModuleFinder(path=[str(root)])
    finder.run_script(str(script))
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    return frozenset(Path(file) for file in files if file)


def code_digests(*scripts: str, without: Collection[str] = (), library: Path = LIBRARY) -> dict[str, str]:
    """Path below the library -> 16 hex digits, for the import closures of `scripts` (paths below the library).

    HARMLESS files are left out, and those named by `without`.
    """
    closure = set().union(*(import_closure(library / script, library.parent) for script in scripts))
    paths = sorted(path.relative_to(library).as_posix() for path in closure)
    left_out = {*HARMLESS, *without}
    return {p: file_digest(library / p) for p in paths if p not in left_out and p.split("/")[0] not in HARMLESS_ROOMS}


@cache
def file_digest(path: Path) -> str:
    """16 hex digits of a Python file's meaning."""
    return sha256(repr(_plain(ast.parse(path.read_bytes()))).encode()).hexdigest()[:16]


def _plain(node: object) -> object:
    """A syntax tree as nested tuples, without texts that stand alone (docstrings) and without empty fields.

    ast.dump would name fields that only some Python versions have.
    """
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return type(node).__name__, *fields
    if isinstance(node, list):
        return tuple(_plain(item) for item in node if not _is_text(item))
    return repr(node)


def _is_text(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
