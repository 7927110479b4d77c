"""`make tune-apply`: what the search found goes into params.yaml, where `dvc repro` trains with it."""

import difflib
import json
import re
import sys
from pathlib import Path

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from diffusion import paths
from diffusion.errors import UserError
from diffusion.params_file import load, schema
from diffusion.tuning.space import RECIPE, Value, recipe_digest

SCALAR = re.compile(r"""'[^']*'|"[^"]*"|[^\s,#}\]]+""")


@click.command()
@click.option(
    "--params", type=click.Path(dir_okay=False, path_type=Path), default=paths.PARAMS, help="File to write into."
)
def main(params: Path) -> None:
    """Write the best values of the search into params.yaml and show the difference."""
    click.echo(apply(paths.BEST_YAML, params) or f"{params} has the best values already\n", nl=False)


def apply(best: Path, params: Path) -> str:
    """Write the values of `best` into `params`, all else in it stays; the difference, empty if there is none.

    Raises:
        UserError: there are no best values, or `params` would not be valid with them; it is left as it was.
    """
    values, found_for = read_best(best)
    if not values:
        raise UserError(f"{best} holds no values yet: no trial of the study is complete; run `make tune`")
    now = load(params)
    if found_for not in (None, recipe_digest(now)):
        print(f"tune: {best} was found for another recipe, or another tune.space, than {params} has", file=sys.stderr)
    file = params.resolve()  # a link stays one
    before = file.read_bytes().decode()  # with its line endings
    after = _edited(before, values)
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(after.encode())
    try:
        if load(new) != load(params, values):
            raise UserError(f"{params} writes these keys in a way that cannot be edited: set {values} by hand")
        new.replace(file)
    except UserError as error:
        raise UserError(str(error).replace(str(new), str(params))) from None
    finally:
        new.unlink(missing_ok=True)
    old, edited = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, edited, f"{params} before", f"{params} now"))


def read_best(best: Path) -> tuple[dict[str, Value], str | None]:
    """Dotted keys and values of tuning/best.yaml, and the digest of the recipe that they were found for.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    try:
        text = best.read_text()
        tree = YAML(typ="safe", pure=True).load(text) or {}
        values = {f"{section}.{name}": value for section, keys in tree.items() for name, value in keys.items()}
    except FileNotFoundError:
        raise UserError(f"{best} is missing: run `make tune` first") from None
    except (OSError, UnicodeDecodeError, YAMLError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{best} cannot be read ({reason}): run `make tune` first") from None
    if wrong := sorted(set(values) - set(schema())):
        raise UserError(f"{best} has {wrong[0]}, which is no key of params.yaml: run `make tune` again")
    first = text.partition("\n")[0]
    return values, first.removeprefix(RECIPE) if first.startswith(RECIPE) else None


def _edited(text: str, values: dict[str, Value]) -> str:
    """A params file's text with other values; comments, order and spelling of all others stay."""
    tree, lines = YAML().load(text), text.splitlines(keepends=True)
    for key, value in values.items():
        section, _, name = key.partition(".")
        line, column = tree[section].lc.value(name)
        if tree[section][name] != value:
            written = value if isinstance(value, str) else json.dumps(value)
            lines[line] = lines[line][:column] + SCALAR.sub(written, lines[line][column:], count=1)
    return "".join(lines)
