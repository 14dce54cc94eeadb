"""What the scripts of this folder share: options that name network and images, and results as lines of JSON."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


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
    """One more line, on the screen too."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def spread(values: list[float], digits: int) -> str:
    """``mean +- deviation``."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
