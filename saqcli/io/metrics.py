"""``metrics.jsonl``: one object a line, appended as a run goes, taken back to the last checkpoint on resuming."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from saqcli.io.files import cannot_write, write_text
from saqcli.strict import json_text


class Metrics:
    """The file at ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, values: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            CannotWrite: the disk is full, or not to be written to.
        """
        there = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text(values) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, there)  # no half of a line
            raise cannot_write(self.path, error) from None

    def text(self) -> str:
        """What it says, to go with a checkpoint; nothing where it is not there or cannot be read."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return ""

    def restore(self, text: str) -> None:
        """Let it say what it said at the checkpoint: what came after is done again."""
        write_text(self.path, text)
