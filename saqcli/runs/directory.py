"""The run directory: everything needed to read, resume and repeat a run.

manifest.json     command, versions, status, results, and the SHA-256 of every artifact
config.json       the resolved configuration
policy.json       the bits of every layer
scores.json       what a search measured, if it can be solved again from that
search.json       the results of a search; its plots are policy.png, policy.svg and pareto.*
metrics.jsonl     one object per line, appended during the run, restored from the checkpoint on resume
checkpoints/      last.ckpt: model, optimizer, random state, position in the epoch; search.ckpt: an unfinished search,
                  proxy.ckpt: training of the proxy network; accuracy.ckpt: unfinished measurements of accuracy;
                  reconstruction.ckpt: an unfinished reconstruction; *.previous.ckpt: the last valid one before each;
                  best.safetensors: the best state, if it was clearly better than the exported one
cache/            decoded images with ``data.cache=disk``; may be removed at any time
artifacts/        model.safetensors, model.onnx, model-STYLE.onnx of further styles, their verdicts
network.json      the layers as calibrated: costs, and how well their grids fit
answers.json      answers of the quantized network beside those of the float one: by class, and images that changed
report.md         summary of the results
report.html       the same as a page with pictures, made from the other files
trackers.json     the runs of trackers that follow this run; tensorboard/: what TensorBoard reads
.lock             the process that is using the directory
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.errors import CannotWrite, Interrupted, RunDirectoryError, SaqError
from saqcli.machine import versions
from saqcli.models.weights import sha256_of
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.runs.interrupts import StopRequest, blocked_signals, exit_code_of
from saqcli.runs.locks import Lock, Owner
from saqcli.runs.manifest import Circumstances, Computed, RunManifest, circumstances
from saqcli.runs.tracking import Tracking
from saqcli.serialization import (
    cannot_write,
    json_text,
    make_folder,
    parse_json,
    read_text,
    remove_unfinished,
    write_text,
)


class Metrics:
    """The metrics file at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            CannotWrite: the disk is full or read-only.
        """
        there = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(values) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, there)  # drop the partial line
            raise cannot_write(self.path, error) from None

    def text(self) -> str:
        """The content, to be saved in a checkpoint; empty if the file is missing or unreadable."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def restore(self, text: str) -> None:
        """Restore the content at the checkpoint; later lines are produced again."""
        write_text(self.path, text)


# Training the proxy network; searching; keeping accuracy; fitting blocks.
Stage = Literal["proxy", "search", "accuracy", "reconstruction"]
_FILES = [  # other than manifest.json
    *("config.json", "policy.json", "metrics.jsonl", "report.md", "search.json", "scores.json"),
    *("network.json", "answers.json", "report.html"),
    *("policy.png", "policy.svg", "pareto.json", "pareto.csv", "pareto.png", "pareto.svg"),
    "trackers.json",
]


_FOLDERS = ("checkpoints", "artifacts", "cache", "tensorboard", "analysis")  # with all that is in them


class RunDirectory:
    """A run directory, existing or to be created.

    Args:
        path: of the directory.
        verb: the command that creates it.
    """

    def __init__(self, path: Path, verb: str = "quantize") -> None:
        self.path, self.verb = path, verb
        self.policy_path = path / "policy.json"
        self.checkpoint_path = path / "checkpoints" / "last.ckpt"
        self.safetensors_path = path / "artifacts" / "model.safetensors"
        self.best_path = path / "checkpoints" / "best.safetensors"
        self.onnx_path = path / "artifacts" / "model.onnx"
        self.report_path = path / "report.md"
        self.page_path = path / "report.html"
        self.network_path = path / "network.json"
        self.answers_path = path / "answers.json"
        self.search_path = path / "search.json"
        self.metrics_path = path / "metrics.jsonl"
        self._metrics = Metrics(self.metrics_path)
        self._checkpoint = CheckpointFile(self.checkpoint_path)
        self.search_states = {
            stage: CheckpointFile(path / "checkpoints" / f"{stage}.ckpt") for stage in get_args(Stage)
        }
        self._lock = Lock(path)
        self._tracking = Tracking(path)
        self.killed: Owner | None = None  # the last process in this directory, if it was killed

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run directory.

        Raises:
            RunDirectoryError: ``path`` is not a run directory.
        """
        if not (path / "manifest.json").is_file():
            raise RunDirectoryError(f"{path} is not a run directory: it has no manifest.json")
        run = cls(path)
        with suppress(SaqError):  # a damaged manifest is reported by its readers
            run.verb = run.manifest().verb
        return run

    @classmethod
    def start(
        cls,
        path: Path,
        config: RunConfig,
        *,
        resume: bool,
        overwrite: bool,
        verb: str = "quantize",
    ) -> "RunDirectory":
        """Create a run directory for ``config`` at ``path``, or resume the existing one; lock it.

        Raises:
            RunDirectoryError: it holds a run and neither ``resume`` nor ``overwrite`` was given, it holds
                other files, another process is using it, or it cannot be written.
        """
        run = cls(path, verb)

        def start() -> None:
            run._check_usable(resume=resume, overwrite=overwrite)
            make_folder(path)
            run.killed = run._lock.take()
            try:
                run._open(config, resume=resume, overwrite=overwrite)
            except BaseException:
                run._lock.release()
                raise

        distributed.from_first(start)
        return run

    def _open(self, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
        """The part of ``start`` that needs the lock."""
        there, now = self._check_usable(resume=resume, overwrite=overwrite), circumstances(config.run.device)
        for folder in ("", "checkpoints", "artifacts", "cache", "cache/proxy"):
            remove_unfinished(self.path / folder)
        if not (there and resume):
            if (self.path / "manifest.json").is_file():
                self._write_manifest(now, "clearing")  # an interrupted clearing must not look like a run
            self._clear()
        if not (self.path / "config.json").is_file():
            write_text(self.path / "config.json", config.to_json())
        if not (there and resume):
            self._write_manifest(now, "running")
        else:
            before = self.manifest().circumstances
            same = bool(before) and before[-1].model_copy(update={"training": None}) == now
            self._update(status="running", circumstances=before + [now] * (not same))
        for name in ("checkpoints", "artifacts")[: 1 if self.verb == "search" else 2]:
            make_folder(self.path / name)

    def _write_manifest(self, now: Circumstances, status: Literal["clearing", "running"]) -> None:
        """Write the manifest of a new run."""
        manifest = RunManifest(
            command=sys.argv,
            verb=self.verb,
            status=status,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            circumstances=[now],
        )
        write_text(self.path / "manifest.json", manifest.model_dump_json(indent=2) + "\n")

    def check_usable(self, *, resume: bool, overwrite: bool) -> bool:
        """Whether the directory holds a run that this command may use; called before any long step.

        Raises:
            RunDirectoryError: as in ``start``.
        """
        return distributed.from_first(lambda: self._check_usable(resume=resume, overwrite=overwrite))

    def _check_usable(self, *, resume: bool, overwrite: bool) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file: use another `run_dir`")
        entries = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if all(name == "config.json" or name.startswith(".") for name in entries):
            return False  # empty, or a crash before the first manifest
        if not (self.path / "manifest.json").is_file():
            raise RunDirectoryError(f"{self.path} holds other files and no run: use another `run_dir`")
        manifest = self.manifest()
        if manifest.status == "clearing":
            return False  # overwriting was interrupted: the next run removes the rest
        if resume and manifest.verb != self.verb:
            there = RunDirectory.open(self.path)
            raise RunDirectoryError(
                f"{self.path} holds a run of `saq {manifest.verb}`, which `saq {self.verb}` cannot resume: "
                f"{there.next_step()}, or use another `run_dir`"
            )
        if not resume and not overwrite and self._holds_work():
            owner, working = self._lock.holder()
            if working and owner and owner.pid != os.getpid():
                raise RunDirectoryError(self._lock.refusal(owner))
            article = {"finished": "a finished", "failed": "a failed"}.get(manifest.status, "an interrupted")
            raise RunDirectoryError(
                f"{self.path} already holds {article} run: use `resume=True` to continue it, `overwrite=True` to "
                "replace it, or another `run_dir`"
            )
        return True

    def _holds_work(self) -> bool:
        """Whether overwriting would lose work."""
        return self.search_path.exists() or self.saved() or self.manifest().status in ("finished", "running")

    def manifest(self) -> RunManifest:
        """The content of ``manifest.json``."""
        return parse_json(
            RunManifest, self._read("manifest.json"), f"{self.path}/manifest.json", RunDirectoryError
        )

    def config(self) -> RunConfig:
        """The content of ``config.json``."""
        return parse_json(RunConfig, self._read("config.json"), f"{self.path}/config.json", RunDirectoryError)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the context the run is ``running``; at its end the status is written and the lock released."""
        try:
            yield
        except Interrupted:
            self._note_end("interrupted")
            raise
        except KeyboardInterrupt as interrupt:
            self._note_end("interrupted")
            raise self.interrupted(exit_code_of(interrupt)) from None
        except CannotWrite as error:
            self._check_exists()
            self._note_end("failed")
            raise CannotWrite(f"{error}, then {self.how_to_resume()}") from None
        except BaseException:
            self._note_end("failed")
            raise
        finally:
            self._lock.release()

    def _note_end(self, status: Literal["interrupted", "failed"]) -> None:
        """Write the final status; errors are suppressed, since the cause is reported."""
        with suppress(SaqError), blocked_signals():
            self._update(status=status)
        self._tracking.end(status)

    def interrupted(self, exit_code: int) -> Interrupted:
        """The error to raise after signal ``exit_code - 128``."""
        export = ""
        if self.verb == "quantize" and self._checkpoint.exists():
            export = f"`export({str(self.path)!r}, path='model.onnx')`"
        return Interrupted(self._resume_command(), exit_code, saved=self.saved(), export=export)

    def saved(self) -> bool:
        """Whether there is a checkpoint or a search state to resume from."""
        return any(state.exists() for state in (self._checkpoint, *self.search_states.values()))

    def how_to_resume(self) -> str:
        """The command that resumes this run."""
        return f"resume with {self._resume_command()}"

    def _resume_command(self) -> str:
        return f"`{self.verb}(run_dir={str(self.path)!r}, resume=True)`"

    def status_text(self) -> str:
        """The status as a clause: ``was interrupted (process 24054 was killed)``."""
        status, (owner, working) = self.manifest().status, self._lock.holder()
        if working:
            return f"is still running ({owner or 'in another process'})"
        if status == "interrupted":
            return "was interrupted"
        if status in ("running", "clearing"):
            return f"was interrupted ({f'process {owner.pid}' if owner else 'its process'} was killed)"
        return "is finished" if status == "finished" else "failed"

    def state(self) -> str:
        """``finished``, ``running``, ``interrupted`` or ``failed``."""
        status = self.manifest().status
        if self._lock.holder()[1]:
            return "running"
        return "interrupted" if status in ("running", "clearing") else status

    def next_step(self) -> str:
        """The advice for the run: wait, resume, or quantize to the bits of a finished search."""
        if self._lock.holder()[1]:
            return "wait for it"
        found = self.verb == "search" and self.policy_path.is_file() and self.manifest().status == "finished"
        return self.how_to_quantize() if found else self.how_to_resume()

    def how_to_quantize(self) -> str:
        """The command that quantizes to the bits of this run."""
        model = "MODEL"
        with suppress(SaqError):
            model = self.config().model.name
        return f"quantize to its bits with `quantize({model!r}, policy={str(self.path)!r})`"

    def check_removable(self) -> None:
        """Check that ``remove`` may be called.

        Raises:
            RunDirectoryError: a process is using the directory, or it is a link.
        """
        if self.path.is_symlink():
            raise RunDirectoryError(
                f"{self.path} is a link: give the directory itself, {self.path.resolve()}"
            )
        owner, working = self._lock.holder()
        if working:
            raise RunDirectoryError(self._lock.refusal(owner))

    def remove(self) -> list[str]:
        """Remove the files of the run, and its folder unless it holds others; names of these are returned.

        An interrupted removal leaves no run that looks whole.

        Raises:
            RunDirectoryError: as in ``check_removable``.
        """
        self.check_removable()
        self._lock.take()
        try:
            with suppress(SaqError):  # a damaged manifest says nothing anyway
                self._update(status="clearing")
            self._clear()
            left = [name for name in _FOLDERS if (self.path / name).exists()]
            if left:  # the manifest stays, so that it is still a run to remove
                raise CannotWrite(f"{self.path / left[0]} cannot be removed: check who owns its files")
            (self.path / "manifest.json").unlink(missing_ok=True)
        finally:
            self._lock.release()
        kept = sorted(entry.name for entry in self.path.iterdir())
        if not kept:
            self.path.rmdir()
        return kept

    def keep_config(self, config: RunConfig) -> None:
        """Update ``config.json`` of a resumed run, which may change a few (see ``resume``)."""
        if distributed.first() and self.config() != config:
            write_text(self.path / "config.json", config.to_json())

    def keep_policy(self, policy: str) -> None:
        """Write ``policy.json``."""
        if distributed.first():
            write_text(self.policy_path, policy)

    def note_images(self, fingerprints: dict[str, str], **more: str) -> None:
        """Record the fingerprints of the images, and ``more`` manifest fields about them."""
        self._update(images=fingerprints, **more)

    def note_training(self, **computed: Any) -> None:
        """Record how training is computed; the fields of ``Computed``."""
        if distributed.first():
            *earlier, now = self.manifest().circumstances
            now = now.model_copy(update={"training": Computed(**computed)})
            self._update(circumstances=[*earlier, now])

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage; errors are suppressed, since an interruption may be on its way."""
        with suppress(SaqError):
            if distributed.first():
                known = self.manifest().seconds
                self._update(seconds=known | {stage: known.get(stage, 0.0) + seconds})

    def finish(self, results: dict[str, Any]) -> None:
        """Record the results, the hashes of all artifacts, and the status ``finished``."""
        if not distributed.first():
            return
        paths = sorted(path for path in (self.path / "artifacts").glob("*") if not path.name.startswith("."))
        hashes = {path.relative_to(self.path).as_posix(): sha256_of(path) for path in paths}
        self._update(status="finished", results=results, artifacts=hashes)
        self._tracking.end("finished", results)

    @contextmanager
    def adding(self, *paths: Path) -> Iterator[None]:
        """Lock the run, and at the end record the hashes of these files that were added to its artifacts.

        Raises:
            RunDirectoryError: another process is using the directory.
        """
        self._lock.take()
        try:
            yield
            added = {
                path.resolve().relative_to(self.path.resolve()).as_posix(): sha256_of(path) for path in paths
            }
            self._update(artifacts=self.manifest().artifacts | added)
        finally:
            self._lock.release()

    def log(self, **values: Any) -> None:
        """Append one object to ``metrics.jsonl``.

        Raises:
            RunDirectoryError: the directory was removed.
            CannotWrite: the disk is full or read-only.
        """
        if distributed.first():
            self._check_exists()
            self._metrics.append(values)
            self._tracking.log(values)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by ``state`` and the metrics so far, and keep the previous one.

        ``state`` holds tensors and plain values only.

        Raises:
            RunDirectoryError: the directory was removed.
            CannotWrite: it cannot be written; existing checkpoints stay valid.
        """
        if distributed.first():
            self.save(self._checkpoint, {**state, "metrics": self._metrics.text()})

    def load_checkpoint(self, note: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The last valid checkpoint, on the CPU, or None if there is none.

        Args:
            note: receives a line if the newest is damaged.

        Raises:
            RunDirectoryError: there are checkpoints, but none is valid.
        """
        return distributed.from_first(lambda: self._checkpoint.load(note))

    def load_saved(self) -> dict[str, Any]:
        """The checkpoint that this process has just saved.

        Raises:
            RunDirectoryError: it is missing.
        """
        state = self.load_checkpoint()
        if state is None:
            raise RunDirectoryError(f"{self.path} holds no checkpoint: start again with `overwrite=True`")
        return state

    def restore_metrics(self, state: dict[str, Any] | None) -> None:
        """Restore ``metrics.jsonl`` as of ``state``; later lines are produced again."""
        if distributed.first():
            self._metrics.restore((state or {}).get("metrics", ""))

    def track(self, config: RunConfig, note: Callable[[str], None] = lambda _: None) -> None:
        """From now on pass metrics, results and status to the trackers of ``run.track``; call it in ``recorded``.

        Args:
            config: resolved.
            note: receives a line if a tracker fails later, and is dropped.

        Raises:
            ConfigError: one that this run does not have yet cannot be started.
            RunDirectoryError: ``trackers.json`` is damaged.
        """
        self._tracking = Tracking(self.path, note)
        distributed.from_first(lambda: self._tracking.start(config, self.verb, self._metrics.text()))

    def end_search(self) -> None:
        """Delete the states of a finished search."""
        self._end("proxy", "search")

    def end_reconstruction(self) -> None:
        """Delete the state of a finished reconstruction."""
        self._end("reconstruction")

    def _end(self, *stages: Stage) -> None:
        if distributed.first():
            for stage in stages:
                self.search_states[stage].remove()

    def save(self, file: CheckpointFile, state: dict[str, Any]) -> None:
        """Replace one of the ``search_states``; called by the first rank, raises as ``save_checkpoint``."""
        self._check_exists()
        file.save(state)

    def _check_exists(self) -> None:
        """Refuse to recreate a directory that was removed during the run."""
        if not (self.path / "manifest.json").is_file():
            raise RunDirectoryError(
                f"{self.path} was removed or emptied during the run: restore it, or start again"
            )

    def _read(self, name: str) -> str:
        return read_text(self.path / name, f"{self.path / name}", RunDirectoryError)

    def _update(self, **changes: Any) -> None:
        if not distributed.first():
            return
        manifest = self.manifest().model_copy(update=changes)
        write_text(self.path / "manifest.json", manifest.model_dump_json(indent=2) + "\n")

    def _clear(self) -> None:
        """Remove the files of a run, and nothing else."""
        for name in _FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)


def stop_if_asked(stop: StopRequest, run: RunDirectory) -> None:
    """Stop on all ranks if one of them received a signal. All ranks call this, after saving.

    Raises:
        Interrupted: a signal asked to stop.
    """
    if distributed.any_of(bool(stop.signal)):
        raise stopped(run, max(distributed.gathered(stop.exit_code)))


def stopped(run: RunDirectory, exit_code: int) -> SaqError:
    """The error that a rank raises when it stops on a signal, after saving; reported once."""
    return distributed.reported_once(run.interrupted(exit_code))
