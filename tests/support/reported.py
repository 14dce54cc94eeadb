"""Runs with everything that a page can show, made once for the tests of pages."""

from pathlib import Path

from tests.support.command_line import answer
from tests.support.digits import MODEL, float_options

STYLES = ("--style", "qdq", "--style", "exact", "--style", "trt", "--style", "qonnx", "--verify-images", "12")


def make_runs(digits: Path, folder: Path) -> None:
    """A quantization with a front and an analysis as ``folder/run``, a search as ``folder/search``."""
    options = [MODEL, *float_options(digits, digits / "few"), "--workers", "0"]
    front = ("--set", "search.pareto=2", "--set", "search.scoring_images=20")
    answer("search", *options, "--budget", "w3a3", *front, "--run-dir", folder / "search")
    training = (
        "--searcher",
        "error",
        "--epochs",
        "2",
        "--set",
        "data.augmentation=none",
        "--set",
        "data.calibration_images=64",
    )
    answer("quantize", *options, "--bops", "60M", *training, *front, *STYLES, "--run-dir", folder / "run")
    measured = ("--grid", "3", "--images", "20", "--samples", "2", "--iterations", "2", "--candidates", "2,4")
    answer("analyze", folder / "run", "--all", *measured, "--data", digits / "few", "--workers", "0")
