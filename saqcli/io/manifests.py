"""``manifest.json``, which makes a folder a run directory: a file of its own, replaced as one act at every change."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class RunManifest(BaseModel):
    """Who made this run directory, from what, and how it ended. This is ``manifest.json``.

    Attributes:
        command: as typed.
        verb: the command of saq.
        status: ``running`` also after a crash.
        started: UTC.
        versions: of saq and of what its numbers depend on.
        artifacts: relative path to SHA-256.
        results: the figures that ``saq quantize`` printed.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    command: list[str]
    verb: str = "quantize"
    status: Literal["running", "interrupted", "failed", "finished"]
    started: str
    versions: dict[str, str]
    artifacts: dict[str, str] = {}
    results: dict[str, Any] = {}

    @property
    def as_found(self) -> str:
        """The status as seen by who is not at work in it, with its article."""
        return {"running": "an unfinished", "interrupted": "an interrupted"}.get(
            self.status, f"a {self.status}"
        )
