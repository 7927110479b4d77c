"""`make tune-apply`: what the search found goes into params.yaml, where `dvc repro` trains with it."""

import difflib
import io
import sys
from pathlib import Path

import click
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from diffusion import paths
from diffusion.config import load
from diffusion.errors import UserError


class _Representer(RoundTripRepresenter):
    """Writes null as params.yaml does; ruamel leaves it out."""


_Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))


@click.command()
@click.option(
    "--params", type=click.Path(dir_okay=False, path_type=Path), default=paths.PARAMS, help="File to write into."
)
def main(params: Path) -> None:
    """Write the best values of the search into params.yaml and show the difference."""
    try:
        click.echo(apply(paths.BEST_YAML, params) or f"{params} has the best values already", nl=False)
    except UserError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def apply(best: Path, params: Path) -> str:
    """Write the values of `best` into `params`, whose comments and order stay; the difference, empty if there is none.

    Raises:
        UserError: there are no best values, or `params` would not be valid with them; it is left as it was.
    """
    yaml = YAML()  # keeps comments, spelling of numbers, flow style
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.Representer = _Representer
    try:
        found = YAML(typ="safe", pure=True).load(best)
        before = params.read_text()
        tree = yaml.load(before)
    except (OSError, YAMLError) as error:
        raise UserError(f"{getattr(error, 'filename', best)} cannot be read: run `make tune` first") from None
    if not found:
        raise UserError(f"{best} holds no values yet: no trial of the study is complete; run `make tune`")
    for section, values in found.items():
        tree[section].update(values)
    text = io.StringIO()
    yaml.dump(tree, text)
    new = params.with_name(f"{params.name}.new")
    new.write_text(text.getvalue())
    try:
        load(new)
        new.replace(params)
    except UserError as error:
        raise UserError(str(error).replace(str(new), str(params))) from None
    finally:
        new.unlink(missing_ok=True)
    old, now = before.splitlines(keepends=True), params.read_text().splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, now, f"{params} before", f"{params} now"))


if __name__ == "__main__":
    main()
