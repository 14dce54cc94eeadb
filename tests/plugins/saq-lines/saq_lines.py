"""A tracker that writes lines of text beside the run directory."""

from collections.abc import Mapping

from saqcli.runs.trackers import End, Start, Tracker


class Lines(Tracker):
    """One line for every call."""

    package, install = "json", "nothing"  # it needs the standard library only

    def start(self, run: Start, known: str | None) -> str:
        """The file is the identifier."""
        self.path = run.folder.with_name(f"{run.folder.name}.lines")
        self._write("resumed" if known else f"started {run.settings['model.name']}")
        return known or self.path.name

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Step and names."""
        self._write(f"{step} {' '.join(figures)}")

    def end(self, end: End) -> None:
        """The status."""
        self._write(end.status)

    def _write(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
