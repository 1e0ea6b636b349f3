"""``micro``: the commands, their exit status, and errors of one line.

Exit status: 0 done, 1 a run failed, 2 bad usage or bad input, 130 interrupted. Nothing here loads torch, so that
``micro --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated

import typer

# One line per command: micro/cli/<name>.py with a function <name>, or with `app` where it has sub-commands.
COMMANDS = (
    "doctor",
    "upcycle",
    "convert",
    "collapse",
    "data",
    "train",
    "generate",
    "route",
    "ablate",
    "localize",
    "circuits",
    "steer",
    "deltas",
    "align",
    "evaluate",
    "estimate",
    "report",
    "demo",
)

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Typer carries its own copy of click in some versions: its error classes are reached through the one it exports.
_ClickError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _version(show: bool) -> None:
    if show:
        import micro

        typer.echo(micro.__version__)
        raise typer.Exit


def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print a traceback with an error (with any command).")] = False,
) -> None:
    """Mixtures of cognitive reasoners: upcycle, train, route, steer and ablate."""


def build_app() -> typer.Typer:
    """The application with every command of :data:`COMMANDS`."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_common)
    for name in COMMANDS:
        module = importlib.import_module(f"micro.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, name))
    return app


def status_of(error: BaseException) -> int:
    """The exit status that an error stands for."""
    from micro.errors import MissingExtraError

    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    bad_input = (_ClickError, ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    if isinstance(error, (*bad_input, PermissionError, FileExistsError, MissingExtraError)):
        return BAD_INPUT
    return FAILED


def describe(error: BaseException) -> str:
    """One line: what, where, what to do."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted"
    if isinstance(error, _ClickError):
        text = str(error.format_message())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        return f"{text} (see `{context.command_path} --help`)" if context else text
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    expected = isinstance(error, ValueError | OSError | ImportError) or type(error).__module__.startswith("micro.")
    return text if expected and text else f"{type(error).__name__}: {text}"


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status; an error is one line on stderr, or a traceback with --debug."""
    debug = "--debug" in arguments
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars are for terminals; ours print plain lines
    arguments = [a for a in arguments if a != "--debug"]
    try:
        # Not command.main(): it would turn Ctrl-C into an exit without a word.
        command = typer.main.get_command(build_app())
        with command.make_context("micro", arguments or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as end:
        return end.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`micro ... | head`); Python would complain again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        print(f"micro: {describe(error)}", file=sys.stderr)
        return status_of(error)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
