"""Interrupts: Ctrl-C, SIGTERM, and SIGHUP when the terminal closes."""

import errno
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import typer

from saqcli.cli import console
from saqcli.pipelines import evaluate
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.runs.directory import RunDirectory
from saqcli.runs.interrupts import Stopped, deferred_interrupts, exit_code_of, raised_signals
from tests.support.command_line import last_line, saq
from tests.support.digits import MODEL, float_options

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restores signal handlers after the test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM,), 143),
        ((signal.SIGHUP,), 129),
        ((signal.SIGHUP, signal.SIGHUP), 129),  # from the shell and from the system
        ((signal.SIGHUP, signal.SIGTERM), 129),  # a session that is ended
        ((signal.SIGTERM, signal.SIGHUP), 143),
    ],
)
def test_first_signal_is_deferred(numbers: tuple[int, ...], code: int) -> None:
    with deferred_interrupts() as stop:
        assert not stop.signal
        for number in numbers:
            signal.raise_signal(number)
        assert stop.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_stops_immediately(number: int) -> None:
    with deferred_interrupts():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(number)
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(number)
    assert exit_code_of(stopped.value) == 128 + number


@pytest.mark.parametrize("context", [deferred_interrupts, raised_signals])
def test_ignored_hangup_stays_ignored(context: Callable[[], "deferred_interrupts"]) -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with context():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_hangup_raises_once_and_is_restored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with raised_signals():
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # a second signal does not interrupt the shutdown
        assert exit_code_of(stopped.value) == 129
    assert signal.getsignal(signal.SIGHUP) is before
    assert exit_code_of(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_eval_prints_no_error(
    digits: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setattr(evaluate, "score", lambda *_: signal.raise_signal(number))

    result = saq("eval", MODEL, *float_options(digits, digits / "few"))

    assert result.exit_code == code
    assert last_line(result) == "Interrupted"
    assert "error" not in result.stderr


def test_progress_survives_a_closed_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(typer, "echo", gone)
    monkeypatch.setattr(console, "_discard_stderr", lambda: None)
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    progress = console.progress_for(json_output=False, quiet=False)
    with progress.task("working", 2) as task:
        task.advance()
        progress.note("half of it")
    live = console._Stderr()
    monkeypatch.setattr(sys, "stderr", type("Gone", (), {"write": gone, "flush": gone})())
    assert live.write("text") == 4
    live.flush()


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("options", [("--quiet",), ()])
def test_closed_terminal_saves_a_checkpoint(digits: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The kernel sends SIGHUP, and writing to the terminal fails."""
    run = tmp_path / "run"
    given = ("--bits", 4, "--epochs", 30, "--batch-size", 32, "--workers", 2, "--run-dir", run, *options)
    command = ["quantize", MODEL, *float_options(digits, digits / "few"), *given]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(console.__file__).parents[2])}
        os.execv(sys.executable, [sys.executable, "-m", "saqcli", *map(str, command)])
    os.set_blocking(terminal, False)
    path = run / "checkpoints" / "last.ckpt"
    for _ in range(3000):
        with suppress(BlockingIOError):  # nothing is printed
            os.read(terminal, 100_000)
        if path.exists() and "position" in (CheckpointFile(path).load() or {}):
            break
        time.sleep(0.1)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(status) == 129
    assert RunDirectory.open(run).manifest().status == "interrupted"
    assert not (run / ".lock").exists()
    assert (CheckpointFile(path).load() or {})["position"]["epoch"] < 30
