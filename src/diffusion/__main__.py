"""`python -m diffusion COMMAND`: all commands that are no stages."""

import importlib

import click

COMMANDS = {  # imported only when asked for
    "interchange": "model.diffusers_format:main",
    "lineage": "pipeline.commands:lineage",
    "metrics": "metrics.__main__:main",
    "promote": "serving.registry:main",
    "runs": "pipeline.run_folders:main",
    "serve": "serving.server:main",
    "sync": "pipeline.commands:sync",
    "tune-apply": "tuning.apply:main",
    "ui": "tracking.ui:main",
}


class Lazy(click.Group):
    """As click's documentation shows it ("Lazily Loading Subcommands")."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"diffusion.{module}"), attribute)
        return command


@click.command(cls=Lazy)
def main() -> None:
    """Commands beside the pipeline's stages, which are `python -m stages.NAME`."""


if __name__ == "__main__":
    main(prog_name="python -m diffusion")
