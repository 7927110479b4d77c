"""Where a result comes from: the source files that decide it, and the commit."""

import subprocess
from functools import cache
from hashlib import sha256
from modulefinder import ModuleFinder
from pathlib import Path

LIBRARY = Path(__file__).parent


@cache
def import_closure(script: Path, root: Path = LIBRARY.parent) -> frozenset[Path]:
    """The files below `root` that running `script` can import, the script included; nothing is executed."""
    finder = ModuleFinder(path=[str(root)])
    finder.run_script(str(script))
    files = (getattr(module, "__file__", None) for module in finder.modules.values())
    return frozenset(Path(file) for file in files if file)


def code_digest(script: Path) -> str:
    """sha256 over the import closure of `script`: changes whenever code that it depends on does."""
    sha = sha256()
    for path in sorted(import_closure(script)):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def git_tags() -> dict[str, str]:
    """`git.commit` and `git.dirty` ("true" if a tracked file differs) of the working folder; empty outside git."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"git.commit": commit, "git.dirty": "true" if changes else "false"}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
