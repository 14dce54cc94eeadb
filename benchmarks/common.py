"""What the scripts of this folder share: options that name network and images, and results as lines of JSON.

A result is on disk as soon as it is known, so that a script that was stopped or killed goes on where it was.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from saqcli.serialization import json_text, write_text


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that name network and images."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="saq/resnet20")
    made.add_argument("--weights")
    made.add_argument("--data")
    return made


def append(path: Path, line: dict[str, Any]) -> None:
    """One more line, on the screen too; half a line, which a full disk or a crash left at the end, goes."""
    text = path.read_text() if path.is_file() else ""
    write_text(path, text[: text.rfind("\n") + 1] + json_text(line) + "\n")
    print(json_text(line), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines measured so far, whole ones."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def spread(values: list[float], digits: int) -> str:
    """``mean +- deviation``."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
