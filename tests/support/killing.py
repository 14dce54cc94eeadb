"""Real processes of the command line, killed where and when a test says.

``python -m tests.support.killing`` imports everything once and then forks a process for every command that is
requested, so that a process that is killed costs a tenth of a second and not five. A process records its visible
tasks and every file operation in the watched folder. At the act that the test names it fills the disk, removes its
folder, or is killed by SIGKILL, in a write with half of it done.

    {"start": ARGUMENTS, "watch": FOLDER, "journal": FILE, "output": FILE, ...}     answers with the process
    {"wait": PROCESS}                                                               answers with its exit status
    {"run": COMMAND}                                                                answers with its exit status
"""

import builtins
import contextlib
import functools
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.operators import read_once

ROOT = Path(__file__).parents[2]
POLL = 0.002  # seconds


class Mark(NamedTuple):
    """One act of a process.

    Attributes:
        at: seconds, of a clock that only goes forward.
        what: ``begin evaluating``, ``end evaluating``, or an act: ``replace checkpoints/last.ckpt``.
    """

    at: float
    what: str


class Job:
    """A running process."""

    def __init__(self, zygote: "Zygote", pid: int, journal: Path, output: Path) -> None:
        self.zygote, self.pid, self.journal, self._output = zygote, pid, journal, output

    def wait(self) -> int:
        """Wait and return its exit code, or minus the signal that ended it."""
        return int(self.zygote.ask(wait=self.pid))

    def kill(self) -> int:
        """Kill it now and return its exit code, in case it ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def alive(self) -> bool:
        """Whether it is running."""
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"

    def reach(self, *acts: str) -> bool:
        """Wait until it has done one of ``acts``; False if it ended before."""
        while not any(mark.what in acts for mark in self.marks()):
            if not self.alive():
                return False
            time.sleep(POLL)
        return True

    def marks(self) -> list[Mark]:
        """Its acts so far."""
        text = self.journal.read_text() if self.journal.exists() else ""
        pairs = (line.split(" ", 1) for line in text.splitlines(keepends=True) if line.endswith("\n"))
        return [Mark(float(at), what.rstrip("\n")) for at, what in pairs]

    def said(self) -> str:
        """Its standard output and error."""
        return self._output.read_text()


class Zygote:
    """The process that others are forked from.

    Args:
        folder: for journals and outputs.
        prefix: a command to run it under, such as ``unshare -rm``.
    """

    def __init__(self, folder: Path, *prefix: str) -> None:
        self.folder, self._count = folder, 0
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.support.killing"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def ask(self, **question: Any) -> Any:
        """Send one request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(
        self, watch: Path, *arguments: object, fault: dict[str, Any] | None = None, **environment: str
    ) -> Job:
        """Start a command whose journal watches ``watch``."""
        self._count += 1
        journal, output = (self.folder / f"{self._count}.{name}" for name in ("journal", "output"))
        pid = self.ask(
            start=[str(argument) for argument in arguments],
            watch=str(watch),
            journal=str(journal),
            output=str(output),
            fault=fault or {},
            environment=environment,
        )
        return Job(self, pid, journal, output)

    def run(self, *command: object) -> int:
        """Run a command in the zygote's mounts and return its exit code."""
        return int(self.ask(run=[str(word) for word in command]))

    def seen(self, path: Path) -> Path:
        """``path`` as seen from the zygote's mounts, for this process."""
        return Path(f"/proc/{self.process.pid}/root") / path.relative_to("/")

    def close(self) -> None:
        """Stop it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that others are forked from has ended"
        return json.loads(line)


@contextmanager
def zygote(folder: Path, *prefix: str) -> Iterator[Zygote]:
    """A zygote that stops with the context."""
    made = Zygote(folder, *prefix)
    try:
        yield made
    finally:
        made.close()


# Within the processes ----------------------------------------------------------------------------------------


class Journal:
    """Records the acts of this process, and injects the fault.

    Args:
        path: of the journal.
        watch: acts on files below it count.
        fault: ``act``: number of the act, from 1, or ``on``: its name, and ``count``: at which of those; ``do``: what
            then, ``kill`` unless told otherwise. ``keep``: a folder that gets every checkpoint.
    """

    def __init__(self, path: Path, watch: Path, fault: dict[str, Any]) -> None:
        self.file = path.open("a", buffering=1)
        self.watch, self.fault = os.fspath(watch), fault
        self.acts, self.same = 0, 0

    def mark(self, what: str) -> None:
        self.file.write(f"{time.monotonic()} {what}\n")

    def act(self, name: str, path: Any) -> bool:
        """Record the next act; returns whether this process is to be killed in it."""
        try:
            place = os.path.abspath(os.fspath(path))
        except TypeError:
            return False
        if isinstance(place, bytes) or not (place + "/").startswith(self.watch + "/"):
            return False
        head, tail = os.path.split(os.path.relpath(place, self.watch))
        if tail.startswith(".unfinished-"):  # without the random part
            stem, suffix = os.path.splitext(tail)
            tail = f"new {stem.removeprefix('.unfinished-').rpartition('.')[0]}{suffix}"
        what = f"{name} {os.path.join(head, tail)}"
        self.mark(what)
        self.acts += 1
        self.same += what == self.fault.get("on")
        here = self.acts == self.fault.get("act") or (
            what == self.fault.get("on") and self.same == self.fault.get("count", 1)
        )
        if not here:
            return False
        harm = self.fault.get("do", "kill")
        if harm != "kill":
            self.fault = {}
            HARMS[harm](Path(self.watch))
            return False
        return True

    def killed(self) -> None:
        self.mark("killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def task(self, title: str, total: int) -> Any:
        return self._task(title)

    @contextmanager
    def _task(self, title: str) -> Iterator["Journal"]:
        self.mark(f"begin {title}")
        yield self
        self.mark(f"end {title}")

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def watched(self, name: str, function: Any) -> Any:
        """``function`` with its last path argument recorded."""

        @functools.wraps(function)
        def acting(*arguments: Any, **options: Any) -> Any:
            path = arguments[1] if name == "replace" else arguments[0]
            if name == "flush":
                path = os.readlink(f"/proc/self/fd/{path}")
            made = name != "make" or arguments[1] & os.O_CREAT
            if "dir_fd" not in options and made and self.act(name, path):
                self.killed()
            found = function(*arguments, **options)
            if name == "replace" and "keep" in self.fault and os.fspath(path).endswith(".ckpt"):
                os.link(path, os.path.join(self.fault["keep"], f"{self.acts}.ckpt"))
            return found

        return acting

    def opening(self, function: Any) -> Any:
        """``open`` whose files record writes."""

        @functools.wraps(function)
        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = function(file, mode, *arguments, **options)
            inside = isinstance(file, str | os.PathLike) and self.watch in os.path.abspath(os.fspath(file))
            return Half(found, self, file) if inside and set(mode) & set("wax") else found

        return opened

    def install(self) -> None:
        """Watch this process from now on."""
        for name, attribute in (
            *(("make", "open"), ("replace", "replace"), ("flush", "fsync"), ("remove", "unlink")),
            *(("folder", "mkdir"), ("remove", "rmdir")),
        ):
            setattr(os, attribute, self.watched(name, getattr(os, attribute)))
        io.open = builtins.open = self.opening(open)
        for name, module in list(sys.modules.items()):
            if name.startswith("saqcli.cli.") and hasattr(module, "progress_for"):
                module.progress_for = lambda **_: self


class Half:
    """A file whose write can be killed with half of the bytes on disk."""

    def __init__(self, file: Any, journal: Journal, path: Any) -> None:
        self._file, self._journal, self._path = file, journal, path
        self._fresh = True

    def write(self, data: Any) -> Any:
        fresh, self._fresh = self._fresh, False  # of many small writes only the first counts
        if fresh and self._journal.act("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._journal.killed()
        return self._file.write(data)

    def __enter__(self) -> "Half":
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fill(folder: Path) -> None:
    """Fill the disk of ``folder`` with the file ``filler``."""
    with (folder.parent / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def empty(folder: Path) -> None:
    """Remove what is in ``folder``, as a person would."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def forbid(folder: Path) -> None:
    """Make ``checkpoints`` unwritable."""
    for options in (["--bind", folder / "checkpoints"], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, folder / "checkpoints"], check=True)


# Modules that commands import. A name that does not exist fails.
MODULES = (
    *(f"saqcli.pipelines.{name}" for name in ("quantize", "search", "analyze", "evaluate", "demo")),
    *(f"saqcli.report.{name}" for name in ("canvas", "front", "landscape", "pareto", "policy", "readings")),
    *("saqcli.verify.proof", "saqcli.verify.publish", "saqcli.verify.runtime"),
    *(
        f"saqcli.cli.{name}" for name in ("quantize", "search", "analyze", "evaluate", "demo")
    ),  # for the journal
    *("timm.utils", "onnxruntime", "onnxscript", "torch.onnx._internal.exporter._registration"),
    *(f"matplotlib.{name}" for name in ("figure", "backends.backend_agg", "backends.backend_svg")),
)

HARMS = {"fill": fill, "remove": shutil.rmtree, "empty": empty, "forbid": forbid}


def _command(question: dict[str, Any]) -> int:
    """Run a command of saq in this process, a fresh fork, and return its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(question["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= question["environment"]
    tempfile.tempdir = None
    sys.argv = ["saq", *question["start"]]
    Journal(Path(question["journal"]), Path(question["watch"]), question["fault"]).install()
    from saqcli.cli import main

    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _serve() -> None:
    import importlib

    import torch

    from saqcli.pipelines import calibration

    assert calibration._try_export
    calibration._try_export = lambda *_: None  # type: ignore[assignment]  # before there is a run to be killed
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name in MODULES:
        importlib.import_module(name)
    read_once()
    torch.onnx.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),), dynamo=True, verbose=False)  # imports more
    print('"ready"', flush=True)
    running: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    code = _command(question)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            running.add(child)
            print(child, flush=True)
        elif "wait" in question:
            _, status = os.waitpid(question["wait"], 0)
            running.discard(question["wait"])
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            done = subprocess.run(question["run"], check=False, stdout=subprocess.DEVNULL)
            print(done.returncode, flush=True)
    for child in running:
        os.kill(child, signal.SIGKILL)
    os._exit(0)  # cleanup takes seconds


if __name__ == "__main__":
    _serve()
