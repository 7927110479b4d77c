"""Which source files decide a result."""

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
    return frozenset(Path(m.__file__) for m in finder.modules.values() if m.__file__)


def code_digest(script: Path) -> str:
    """sha256 over the import closure of `script`: changes whenever code that it depends on does."""
    sha = sha256()
    for path in sorted(import_closure(script)):
        sha.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()
