"""The ``svdprune`` group: its commands are imported when they are called for, and its errors are one sentence."""

from __future__ import annotations

import importlib
import warnings
from typing import IO, Any

import click

from svdprune.runtime.errors import SvdpruneError

# each a module beside this one, with a `command`
COMMANDS = (
    *("export", "build", "run", "verify", "profile", "estimate", "calibrate", "evaluate", "report", "inspect"),
    *("targets", "models"),
)
INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


class Command(click.Command):
    """A command whose errors, Ctrl-C and warnings come out as one line each; other exceptions are bugs and pass."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command's function."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SvdpruneError as error:
                click.echo(f"svdprune: {error}", err=True)
                ctx.exit(error.exit_code)
            except KeyboardInterrupt:
                click.echo("\nsvdprune: stopped", err=True)
                ctx.exit(INTERRUPTED)


class Group(click.Group):
    """A group that imports a command's module when the command is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which a newcomer meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for a name that is not one."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None


def load_command(name: str) -> click.Command:
    """Import the module of a command and return the command."""
    command: click.Command = importlib.import_module(f"svdprune.runtime.cli.{name}").command
    return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="svdprune", prog_name="svdprune")
def group() -> None:
    """Vision-language models with their vision tokens pruned inside the ONNX graph."""


def main() -> None:
    """The ``svdprune`` script."""
    group(prog_name="svdprune")


def main_export() -> None:
    """The ``svdprune-export`` script: the same as ``svdprune export``."""
    load_command("export")(prog_name="svdprune-export")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: IO[str] | None = None,
    line: str | None = None,
) -> None:
    """A warning as a line for the user: without the place in the code, which would mean nothing to them."""
    click.echo(f"svdprune: note: {message}", err=True)
