"""``saq rerun``: repeat a finished run from its directory and compare the two.

    read       the run directory; missing files are reported first
    restore    working directory, device, threads and loader workers
    run        the same command with the same settings, in a new directory
    compare    policy, search, metrics, weights, ONNX, figures; likely causes of differences

The original run is never written to.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saqcli import distributed
from saqcli.api.sources import find_source
from saqcli.config import RunConfig
from saqcli.data.loaders import MAX_WORKERS, default_workers
from saqcli.errors import ConfigError, Interrupted, RunDirectoryError
from saqcli.machine import cores, resolve_device
from saqcli.models.own import check_named, own_network
from saqcli.pipelines.quantize import quantize
from saqcli.pipelines.search import search
from saqcli.pipelines.setup import load_float
from saqcli.progress import SILENT, Progress
from saqcli.random_state import random_state, set_random_state, torch_threads
from saqcli.report.comparison import Difference, Record, compare, explain_diff, versions_differ
from saqcli.runs.directory import RunDirectory
from saqcli.runs.images import check_still_there, is_named_set
from saqcli.runs.manifest import Circumstances, RunManifest, computed
from saqcli.runs.resume import first_difference
from saqcli.serialization import parse_object, printable
from saqcli.units import counted

VERBS: dict[str, Callable[..., Any]] = {"quantize": quantize, "search": search}
MAY_DIFFER = (
    *("data.path", "data.calibration", "data.workers", "model.weights", "quantization.policy", "run.device"),
    "run.track",
    *("training.compile", "training.memory_format", "training.precision"),
)


@dataclass(frozen=True)
class Overrides:
    """Settings that a rerun may change; None keeps those of the run.

    Attributes:
        data: path of the images.
        calibration: path of the images for calibration.
        weights: path of the float weights.
        device: device.
        workers: number of loader workers.
    """

    data: str | None = None
    calibration: str | None = None
    weights: Path | None = None
    device: str | None = None
    workers: int | None = None

    def absolute(self) -> "Overrides":
        """The same with absolute paths."""
        data, weights = self.data, self.weights
        if data is not None and not is_named_set(data):
            data = str(Path(data).expanduser().absolute())
        calibration = self.calibration and str(Path(self.calibration).expanduser().absolute())
        weights = weights and weights.expanduser().absolute()
        return replace(self, data=data, calibration=calibration, weights=weights)

    def applied(self, config: RunConfig) -> RunConfig:
        """``config`` with these settings."""
        weights = self.weights and str(self.weights)
        given = {
            "data.path": self.data,
            "data.calibration": self.calibration,
            "data.workers": self.workers,
            "model.weights": weights,
        }
        given["run.device"] = self.device
        return _with(config, {key: value for key, value in given.items() if value is not None})


NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class Rerun:
    """The comparison of a rerun with the original run.

    Attributes:
        run_dir: directory of the new run.
        reran: directory of the original run.
        compared: the compared parts.
        differences: the parts that differ; empty if all are bit-identical.
        reasons: likely causes of differences, one line each.
        versions: changed versions: name to old and new.
    """

    run_dir: Path
    reran: Path
    compared: list[str]
    differences: list[Difference]
    reasons: list[str]
    versions: dict[str, list[str | None]]

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        return {
            "run_dir": str(self.run_dir),
            "reran": str(self.reran),
            "identical": self.identical,
            "compared": self.compared,
            "differences": [difference._asdict() for difference in self.differences],
            "reasons": self.reasons,
            "versions_differ": self.versions,
        }


def rerun(
    run_dir: Path,
    new_dir: Path | None = None,
    changes: Overrides = NO_OVERRIDES,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
    builder: str | None = None,
) -> Rerun:
    """Repeat the run in ``run_dir`` in ``new_dir`` and compare the two.

    Args:
        run_dir: a finished run of ``saq quantize`` or ``saq search``; not changed.
        new_dir: created if missing; None is ``run_dir`` with ``-rerun`` appended to its name.
        changes: settings to change.
        resume: resume the run in ``new_dir``; a finished one is only compared.
        overwrite: replace the run in ``new_dir``.
        progress: reports all long steps.
        builder: name of the user's own network that was quantized, if it was one; imported from the current folder.

    Raises:
        SaqError: anything the user can act on.
    """
    run_dir = find_source(str(run_dir), ("run",), "RUN").path or run_dir
    old = RunDirectory.open(run_dir.resolve())
    manifest = old.manifest()
    _check_finished(RunDirectory.open(run_dir), manifest)
    # Imported here, since the recorded working directory of the run must not choose the code.
    own = None if builder is None else own_network(builder)
    check_named(old.config().model.name, own, str(run_dir))
    beside = run_dir if run_dir.name == old.path.name else old.path
    new_dir = new_dir or beside.with_name(f"{beside.name}-rerun")
    new = RunDirectory(new_dir.resolve(), manifest.verb)
    _check_apart(old.path, new.path)
    before = Record.read(old)
    there = new.check_usable(resume=resume, overwrite=overwrite)
    if resume and there:
        _check_is_rerun(old.config(), new.config(), new.path, run_dir)
    if not resume or not there or new.manifest().status != "finished":
        changes = changes.absolute()
        then = manifest.circumstances[0] if manifest.circumstances else None
        with _as_then(then, manifest.verb, run_dir, new_dir, progress):
            config = new.config() if resume and there else _restored(old, then)
            config = changes.applied(config)
            _check_there(config, run_dir)
            try:
                VERBS[manifest.verb](config, new.path, resume=resume, overwrite=overwrite, progress=progress)
            except Interrupted as error:
                command = f"`rerun({str(run_dir)!r}, run_dir={str(new_dir)!r}, resume=True)`"
                raise Interrupted(command, error.exit_code, saved=error.saved) from None
    after = Record.read(new)
    compared, differences = compare(before, after)
    return Rerun(
        new_dir,
        run_dir,
        compared,
        differences,
        explain_diff(before, after) if differences else [],
        versions_differ(before.manifest, after.manifest),
    )


def _check_finished(run: RunDirectory, manifest: RunManifest) -> None:
    if manifest.verb not in VERBS:
        accepted = " or ".join(f"`saq {verb}`" for verb in VERBS)
        raise RunDirectoryError(f"{run.path} is a run of `saq {manifest.verb}`: give a run of {accepted}")
    if manifest.status != "finished":
        raise RunDirectoryError(
            f"{run.path} {run.status_text()}, so there is nothing to compare with: {run.next_step()} first"
        )


def _check_apart(old: Path, new: Path) -> None:
    """Check that neither directory contains the other."""
    if old == new or old in new.parents or new in old.parents:
        raise RunDirectoryError(
            f"{new} and {old} are the same or nested, and the original run must not change: use another `run_dir`"
        )


def _check_is_rerun(old: RunConfig, new: RunConfig, new_dir: Path, run_dir: Path) -> None:
    """Check that a resumed rerun has the settings of the original, except those that a rerun may change."""
    difference = first_difference(_with(old, {key: _get(new, key) for key in MAY_DIFFER}), new)
    if difference:
        raise ConfigError(
            f"{new_dir} is not a rerun of {run_dir} ({difference}): use another `run_dir`, or `overwrite=True`"
        )


def _check_there(config: RunConfig, run_dir: Path) -> None:
    """Check that images and weights exist; the error names the setting for their new place."""
    data, weights = config.data.path, config.model.weights
    if data is not None and not is_named_set(data):
        check_still_there("path", Path(data).expanduser(), str(run_dir))
    calibration = config.data.calibration
    if calibration is not None:
        check_still_there("calibration", Path(calibration).expanduser(), str(run_dir))
    if weights is not None and not Path(weights).is_file():
        raise ConfigError(
            f"the weights of {run_dir} are no longer in {Path(weights).absolute()}: give their new place as "
            "`model.weights=FILE`"
        )


def _restored(run: RunDirectory, then: Circumstances | None) -> RunConfig:
    """The settings of ``run`` without trackers, with the choices that its machine made for automatic ones."""
    config, changes = run.config(), dict[str, Any]()
    changes["run.track"] = ()
    if config.quantization.policy is not None:
        changes["quantization.policy"] = str(run.policy_path)
    way = computed(run.manifest().circumstances)
    chosen = {
        "compile": "on" if way.compiled else "kernels" if way.kernels == "fused" else "off",
        "memory_format": way.memory_format,
        "precision": way.precision,
    }
    changes |= {
        f"training.{name}": value
        for name, value in chosen.items()
        if getattr(config.training, name) == "auto"
    }
    if then is None:
        return _with(config, changes)
    device = then.device.partition(" ")[0]
    if config.run.device == "auto" and device == "cpu" != resolve_device("auto"):
        changes["run.device"] = "cpu"
    if config.data.workers is None and then.cores != cores():
        changes["data.workers"] = _default_workers(config, then.cores)
    return _with(config, changes)


def _default_workers(config: RunConfig, cores_then: int) -> int:
    """The default number of loader workers on a machine with ``cores_then`` cores."""
    section = config.model.model_copy(update={"weights": None, "weights_key": None, "pretrained": False})
    if config.search.proxy is not None and config.search.proxy.input_size is not None:
        section = section.model_copy(update={"input_size": config.search.proxy.input_size})
    before = random_state()
    here = default_workers(load_float(section, SILENT).preprocessing)
    set_random_state(before)
    return min(MAX_WORKERS, cores_then) if here else 0


@contextmanager
def _as_then(
    then: Circumstances | None, verb: str, run_dir: Path, new_dir: Path, progress: Progress
) -> Iterator[None]:
    """Within the context, work in the directory and with the number of threads of the run."""
    if then is None:
        progress.note(
            "the run recorded neither its number of threads nor its working directory: using the current ones"
        )
        yield
        return
    if then.threads != torch.get_num_threads():
        progress.note(
            f"computing with {counted(then.threads, 'thread')} as in the run: another number changes bits"
        )
    if then.processes != distributed.count():
        config, other = str(run_dir / "config.json"), f"{new_dir}-{then.processes}"
        progress.note(
            f"the run used {counted(then.processes, 'process')} and this rerun uses 1, which changes bits: for "
            f"identical bits use `{verb}(nproc_per_node={then.processes}, config={config!r}, run_dir={other!r})`, "
            f"and compare with `rerun({str(run_dir)!r}, run_dir={other!r}, resume=True)`"
        )
    there = Path(then.directory).is_dir() and os.access(then.directory, os.X_OK)
    if not there:
        progress.note(
            f"{printable(then.directory)} is not accessible: relative paths refer to the current directory"
        )
    with torch_threads(then.threads), chdir(then.directory) if there else nullcontext():
        yield


def _with(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """``config`` with ``changes``, by ``section.key``."""
    tree = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return parse_object(RunConfig, tree, "the settings of the rerun")


def _get(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
