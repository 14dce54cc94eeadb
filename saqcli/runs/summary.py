"""Runs at a glance: what each is of, how far it came, and its figures."""

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saqcli.config import QuantizationSection
from saqcli.errors import SaqError
from saqcli.runs.directory import RunDirectory

SHOWN = ("top1", "top5", "float_top1", "agreement", "bops", "budget_bops", "bops_reduction", "size_bytes")
DAMAGED = "damaged"


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        path: its directory.
        verb: the command that made it.
        model: name of the network; None if the settings cannot be read.
        bits: the bits or the budget that were asked for; None likewise.
        state: ``finished``, ``running``, ``interrupted``, ``failed`` or ``damaged``.
        top1: top-1 accuracy in percent; of a search, on its scoring images; None if it was not measured.
        bops: bit-operations for one image; None before the bits are known.
        modified: when its manifest was written last, UTC.
    """

    path: Path
    verb: str
    model: str | None
    bits: str | None
    state: str
    top1: float | None
    bops: int | None
    modified: datetime

    @property
    def age(self) -> float:
        """Seconds since ``modified``."""
        return max(0.0, time.time() - self.modified.timestamp())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        return {
            "run_dir": str(self.path),
            "verb": self.verb,
            "model": self.model,
            "bits": self.bits,
            "state": self.state,
            "top1": self.top1,
            "bops": self.bops,
            "modified": self.modified.isoformat(timespec="seconds"),
        }


def summarize(path: Path) -> RunSummary:
    """The summary of the run directory ``path``; damaged files are summarized as such."""
    run = RunDirectory(path)
    modified = datetime.fromtimestamp((path / "manifest.json").stat().st_mtime, UTC)
    model = bits = None
    with suppress(SaqError):
        config = run.config()
        model, bits = config.model.name, asked_bits(config.quantization)
    try:
        manifest = run.manifest()
    except SaqError:
        return RunSummary(path, "", model, bits, DAMAGED, None, None, modified)
    results = manifest.results
    top1, bops = results.get("top1", results.get("scoring_top1")), results.get("bops")
    return RunSummary(
        path,
        manifest.verb,
        model,
        bits,
        run.state(),
        top1 if isinstance(top1, int | float) else None,
        bops if isinstance(bops, int) else None,
        modified,
    )


def details(path: Path) -> dict[str, Any]:
    """The summary of a run, and what its manifest says, as in JSON.

    Raises:
        RunDirectoryError: ``path`` is no run directory, or its manifest is damaged.
    """
    run = RunDirectory.open(path)
    manifest = run.manifest()
    return {
        **summarize(path).to_dict(),
        "status": run.status_text(),
        "next": run.next_step() if manifest.status != "finished" or run.verb == "search" else None,
        "command": manifest.command,
        "started": manifest.started,
        "versions": manifest.versions,
        "seconds": manifest.seconds,
        "figures": {key: manifest.results[key] for key in SHOWN if manifest.results.get(key) is not None},
        "artifacts": sorted(str(path / name) for name in manifest.artifacts),
    }


def asked_bits(section: QuantizationSection) -> str:
    """The budgets that were asked for, joined by dashes; else the bits, or the name of the policy."""
    given = [section.bops or section.size]
    given += [
        f"{name}{value:g}"
        for name, value in (("drop", section.max_drop), ("top", section.min_top1))
        if value is not None
    ]
    policy = Path(section.policy or "float").name.removesuffix(".json")
    return "-".join(filter(None, given)) or section.bits or policy
