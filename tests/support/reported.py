"""Runs with everything that a page can show, made once for the tests of pages."""

from pathlib import Path

from tests.support.command_line import answer
from tests.support.digits import MODEL, float_options

STYLES = ("--style", "qdq", "--style", "exact", "--style", "trt", "--style", "qonnx")


def make_runs(digits: Path, folder: Path) -> None:
    """A quantization with a front and an analysis as ``folder/run``, a search as ``folder/search``."""
    options = [MODEL, *float_options(digits, digits / "few"), "--workers", "0"]
    small = ("--set", "search.pareto=3", "--search-images", 40, "--scoring-images", 40)
    answer("search", *options, "--budget", "w3a3", *small, "--run-dir", folder / "search")
    training = (
        "--epochs",
        2,
        "--set",
        "data.augmentation=none",
        "--set",
        "search.pareto=3",
        *STYLES,
    )
    answer("quantize", *options, "--bops", "60M", *training, "--run-dir", folder / "run")
    measured = (
        "--all",
        "--grid",
        5,
        "--images",
        40,
        "--samples",
        2,
        "--iterations",
        2,
        "--candidates",
        "2,4",
    )
    answer("analyze", folder / "run", "--data", digits / "few", *measured, "--workers", "0")
