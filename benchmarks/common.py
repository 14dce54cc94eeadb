"""Shared by the benchmarks: common options, and results as JSON lines.

A result is written as soon as it is measured, so that an interrupted script resumes where it stopped.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from saqcli.serialization import json_text, write_text


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options for network and images."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="saq/resnet20")
    made.add_argument("--weights")
    made.add_argument("--data")
    return made


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line and print it; an incomplete last line, left by a crash or a full disk, is removed."""
    text = path.read_text() if path.is_file() else ""
    write_text(path, text[: text.rfind("\n") + 1] + json_text(line) + "\n")
    print(json_text(line), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def spread(values: list[float], digits: int) -> str:
    """``mean +- deviation``."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
