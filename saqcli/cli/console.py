"""Console output: progress and one-line errors on stderr, results on stdout.

On a terminal, progress is a live bar with figures, images per second and the time left; elsewhere it is a plain line
every few seconds; with ``--json`` and ``--quiet`` there is none. Under torchrun only the first rank prints, except for
errors that occur on another rank alone.
"""

import functools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from io import StringIO
from typing import Any, ParamSpec

import typer

from saqcli.cli.flags import as_flags, flags_in
from saqcli.errors import (
    BuilderError,
    ConfigError,
    Interrupted,
    PluginError,
    PluginWarning,
    SaqError,
    StoppedElsewhere,
    out_of_memory,
)
from saqcli.progress import SILENT, Progress, Task
from saqcli.runs.interrupts import exit_code_of, raised_signals
from saqcli.serialization import json_text
from saqcli.units import format_duration, format_figure

SECONDS_BETWEEN_LINES = 10.0  # of plain progress
WIDE = 100  # columns from which the bar is long
MULTI_PROCESS = {"quantize_command", "search_command", "eval_command"}  # commands that run under torchrun

P = ParamSpec("P")


def progress_for(*, json_output: bool, quiet: bool) -> Progress:
    """The progress display of a command."""
    if json_output or quiet or _rank():
        return SILENT
    return _Live() if sys.stderr.isatty() else _Plain()


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json_text(flags_in(value)))


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Report errors of ``command`` as one line on stderr and an exit code; wraps every command."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            _check_started(command.__name__)
            with (
                raised_signals(),
                _plugin_warnings(),
                redirect_stdout(StringIO()) if _rank() else nullcontext(),
            ):
                command(*args, **kwargs)
        except StoppedElsewhere as error:
            if not _rank():
                _print_error(as_flags(str(error)))
            raise typer.Exit(error.exit_code) from None
        except Interrupted as interrupt:
            _print_line(as_flags(str(interrupt)))
            raise typer.Exit(interrupt.exit_code) from None
        except SaqError as error:
            if kwargs.get("verbose"):
                _print_tracebacks(error)
            _print_error(as_flags(str(error)))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            _print_line("Interrupted")
            raise typer.Exit(exit_code_of(interrupt)) from None
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            # File-system errors about a given path: name too long, no permission, disk full.
            if kwargs.get("verbose"):
                raise
            _print_error(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}")
            raise typer.Exit(1) from None
        except Exception as error:
            if kwargs.get("verbose"):
                raise
            if out_of_memory(error):
                _print_error("out of memory: use a smaller --batch-size, --input-size or network")
                raise typer.Exit(1) from None
            _print_error(
                f"unexpected {type(error).__name__}: {error}. Please report it with the output of --verbose"
            )
            raise typer.Exit(1) from None

    return run


@contextmanager
def _plugin_warnings() -> Iterator[None]:
    """Within the context a warning about a broken plugin is one line on stderr."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, PluginWarning):
            _print_line(f"warning: {message}")
        else:
            before(message, category, *args, **kwargs)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _print_error(message: str) -> None:
    who = f"process {_rank()}: " if _rank() else ""
    _print_line(f"error: {who}{' '.join(message.splitlines())}")


def _print_tracebacks(error: SaqError) -> None:
    """Print where the code of the user's own network or of another package failed."""
    for part in error.parts:
        if isinstance(part, BuilderError | PluginError) and part.__cause__ is not None:
            _print_line("".join(traceback.format_exception(part.__cause__)).rstrip())


def _print_line(line: str) -> None:
    """Print one line on stderr."""
    try:
        typer.echo(line, err=True)
    except OSError:
        _discard_stderr()


def _discard_stderr() -> None:
    """Redirect stderr to the null device after a failed write, as to a closed terminal, so that work continues."""
    null = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # stderr may not be a system file
        os.dup2(null, sys.stderr.fileno())
    os.close(null)


class _Stderr:
    """``sys.stderr`` for rich, which also writes from a thread."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        """Write; discard stderr if that fails."""
        try:
            return sys.stderr.write(text)
        except OSError:
            _discard_stderr()
            return len(text)

    def flush(self) -> None:
        """Flush; discard stderr if that fails."""
        try:
            sys.stderr.flush()
        except OSError:
            _discard_stderr()


def _check_started(command: str) -> None:
    """Check that a command for one process was not started by torchrun.

    Raises:
        ConfigError: it was.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and command not in MULTI_PROCESS:
        verb = command.removesuffix("_command")
        raise ConfigError(f"`saq {verb}` runs in one process: start it without torchrun")


def _rank() -> int:
    """The rank of this process under torchrun; 0 otherwise."""
    return int(os.environ.get("RANK", "0"))


def _figures(figures: dict[str, float]) -> str:
    known = {"loss": ("loss", ".3f", ""), "top1": ("top-1", ".2f", " %")}
    texts = []
    for name, value in figures.items():
        title, spec, unit = known.get(name, (name, ".3g", ""))
        texts.append(f"{title} {format_figure(value, spec, unit)}")
    return ", ".join(texts)


class Pace:
    """The speed of a task.

    The clock starts when the first step over images is done: it may measure ways to compute, compile the network, or,
    in a resumed task, skip the images of earlier steps. Those are reported first, without images, and count as done.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = self.images = 0
        self._since, self._done_then, self._images_then = time.monotonic(), 0, 0

    def advance(self, steps: int, images: int) -> None:
        """Count ``steps`` over ``images``."""
        first = images > 0 and self.images == 0
        self.done += steps
        self.images += images
        if first:
            self._since, self._done_then, self._images_then = time.monotonic(), self.done, self.images

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left in seconds; None before the first timed step."""
        steps = self.done - self._done_then
        return (time.monotonic() - self._since) / steps * (self.total - self.done) if steps > 0 else None

    @property
    def texts(self) -> list[str]:
        """``412 images/s`` and ``1:20 left``, if known."""
        images, seconds, left = (
            self.images - self._images_then,
            time.monotonic() - self._since,
            self.seconds_left,
        )
        rate = images / seconds if seconds > 0 else 0.0
        shown = [f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"] if rate else []
        return shown + ([] if left is None else [f"{format_duration(left)} left"])


class _PlainTask:
    """Prints a line every ``SECONDS_BETWEEN_LINES``."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.pace = title, Pace(total)
        self._printed_at = time.monotonic()

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Count, and print a line if it is due."""
        self.pace.advance(steps, images)
        if time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            found = [_figures(figures)] if figures else []
            line = ", ".join([f"{self.pace.done}/{self.pace.total}", *found, *self.pace.texts])
            _print_line(f"{self.title}: {line}")


class _Plain:
    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task that prints lines."""
        yield _PlainTask(title, total)

    def note(self, text: str) -> None:
        """Print one line."""
        _print_line(as_flags(text))


class _LiveTask:
    """Moves a rich progress bar."""

    def __init__(self, bar: Any, handle: Any, total: int) -> None:
        self.bar, self.handle = bar, handle
        self.pace = Pace(total)

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Move the bar."""
        self.pace.advance(steps, images)
        self.bar.update(
            self.handle, advance=steps, figures=_figures(figures), pace=", ".join(self.pace.texts)
        )


class _Live:
    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=_Stderr())  # type: ignore[arg-type]

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """A task shown as a bar, removed at its end."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        def text(field: str) -> TextColumn:
            """A column that wraps instead of truncating."""
            return TextColumn(field, table_column=Column(overflow="fold", no_wrap=False))

        columns = (
            text("{task.description}"),
            BarColumn(bar_width=24 if self.console.width >= WIDE else 8),
            MofNCompleteColumn(),
            text("{task.fields[figures]}"),
            text("[dim]{task.fields[pace]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield _LiveTask(bar, bar.add_task(title, total=total, figures="", pace=""), total)

    def note(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(as_flags(text), highlight=False, markup=False, emoji=False)
