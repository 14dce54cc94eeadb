"""What a person sees: progress on stderr, the answer on stdout, one line for an error.

On a terminal progress is a live line with a bar, figures, images per second and the time left; elsewhere it
is a plain line now and then; under ``--json`` and ``--quiet`` it is nothing. Of several processes that torchrun started
the first one alone speaks, but for errors that another has by itself.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from io import StringIO
from typing import Any, ParamSpec

import typer

from saqcli.errors import ConfigError, Interrupted, SaqError, StoppedElsewhere, out_of_memory
from saqcli.io.interrupts import exit_code_of, raised_signals
from saqcli.progress import SILENT, Progress, Task

SECONDS_BETWEEN_LINES = 10.0  # of plain progress
TOGETHER = {"quantize_command", "search_command", "eval_command"}  # several processes work as one

P = ParamSpec("P")


def progress_for(*, json_output: bool, quiet: bool) -> Progress:
    """Where a command's progress goes."""
    if json_output or quiet or _rank():
        return SILENT
    return _Live() if sys.stderr.isatty() else _Plain()


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value))


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors of ``command`` into one line on stderr and an exit code; every command is wrapped in it."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            _check_started(command.__name__)
            with raised_signals(), redirect_stdout(StringIO()) if _rank() else nullcontext():
                command(*args, **kwargs)
        except StoppedElsewhere as error:
            if not _rank():
                _complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except Interrupted as asked:
            _say(str(asked))
            raise typer.Exit(asked.exit_code) from None
        except SaqError as error:
            _complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as asked:
            _say("Interrupted")
            raise typer.Exit(exit_code_of(asked)) from None
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            # Of the file system, about a name that was given: too long, no permission, full.
            if kwargs.get("verbose"):
                raise
            _complain(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}")
            raise typer.Exit(1) from None
        except Exception as error:
            if kwargs.get("verbose"):
                raise
            if out_of_memory(error):
                _complain("out of memory: give a smaller --batch-size, --input-size or network")
                raise typer.Exit(1) from None
            _complain(
                f"unexpected {type(error).__name__}: {error}. Please report it with the output of --verbose"
            )
            raise typer.Exit(1) from None

    return run


def _complain(message: str) -> None:
    who = f"process {_rank()}: " if _rank() else ""
    _say(f"error: {who}{' '.join(message.splitlines())}")


def _say(line: str) -> None:
    """A line on stderr."""
    try:
        typer.echo(line, err=True)
    except OSError:
        _without_terminal()


def _without_terminal() -> None:
    """Let stderr lead nowhere once it cannot be written to, as that of a closed terminal: the work is not to end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # it may be no file of the system
        os.dup2(nowhere, sys.stderr.fileno())
    os.close(nowhere)


class _Stderr:
    """``sys.stderr`` for rich, which writes from a thread too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        """Write, as long as that is possible."""
        try:
            return sys.stderr.write(text)
        except OSError:
            _without_terminal()
            return len(text)

    def flush(self) -> None:
        """Flush, as long as that is possible."""
        try:
            sys.stderr.flush()
        except OSError:
            _without_terminal()


def _check_started(command: str) -> None:
    """Refuse several processes where a command has work for one.

    Raises:
        ConfigError: says what to do.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in TOGETHER:
        verb = command.removesuffix("_command")
        raise ConfigError(f"`saq {verb}` works in one process: start it without torchrun")


def _rank() -> int:
    """Of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


def _figures(figures: dict[str, float]) -> str:
    texts = {"loss": "loss {:.3f}", "top1": "top-1 {:.2f} %"}
    return ", ".join(texts.get(name, name + " {:.3g}").format(value) for name, value in figures.items())


class _PlainTask:
    """Counts, and says a line now and then."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.done = self.images = 0
        self.start = self.said = time.monotonic()

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Count, and speak if it is time."""
        self.done += steps
        self.images += images
        now = time.monotonic()
        if now - self.said >= SECONDS_BETWEEN_LINES:
            self.said = now
            elapsed = now - self.start
            left = elapsed / max(self.done, 1) * (self.total - self.done)
            rate = f", {self.images / elapsed:.0f} images/s" if self.images else ""
            more = f", {_figures(figures)}" if figures else ""
            _say(f"{self.title}: {self.done}/{self.total}{more}{rate}, {left:.0f} s left")


class _Plain:
    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task told in lines."""
        yield _PlainTask(title, total)

    def note(self, text: str) -> None:
        """One line."""
        _say(text)


class _LiveTask:
    """Moves a rich progress bar."""

    def __init__(self, bar: Any, handle: Any) -> None:
        self.bar, self.handle = bar, handle
        self.images = 0
        self.start = time.monotonic()

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Move the bar."""
        self.images += images
        rate = f"{self.images / max(time.monotonic() - self.start, 1e-9):.0f} images/s" if self.images else ""
        self.bar.update(self.handle, advance=steps, figures=_figures(figures), rate=rate)


class _Live:
    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=_Stderr())  # type: ignore[arg-type]

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task drawn as a bar that disappears when it is done."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("[dim]{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield _LiveTask(bar, bar.add_task(title, total=total, figures="", rate=""))

    def note(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, highlight=False, markup=False, emoji=False)
