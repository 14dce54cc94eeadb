"""Commands in several processes: what they write, print, and resume."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli import distributed
from saqcli.data.batches import EvaluationSampler, TrainingSampler, order_of
from saqcli.data.datasets import open_split
from saqcli.data.loaders import make_loader
from saqcli.models.preprocessing import Preprocessing
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.searchers.samq import AlternatingSearch
from saqcli.training import trainer
from tests.support.command_line import answer
from tests.support.digits import MODEL, float_options
from tests.support.joined import ranks_run, ranks_saq
from tests.support.processes import STOPPED
from tests.support.sweeps import sweep

FOUND = ("policy", "scoring_top1", "scoring_loss", "scored")
SETTLED = (
    *("--weight-norm", "--set", "quantization.recalibrate_bn=false"),
    *("--set", "data.augmentation=cifar"),
)
RUNS = (
    *("--bits", "w4a4", "--set", "data.augmentation=none", "--batch-size", 64, "--workers", 0),
    *("--set", "data.verify_images=20"),
)
SHORT = ("--set", "search.epochs=1", "--set", "run.checkpoint_minutes=10")
NO_FILES = ("--no-export",)  # where none is read: tracing takes most of the time


@pytest.fixture(scope="module")
def few(digits: Path) -> list[object]:
    """Options for the network and a few of the digits."""
    return [MODEL, *float_options(digits, digits / "few")]


def state_of(run: Path) -> dict[str, Any]:
    state = CheckpointFile(run / "checkpoints" / "last.ckpt").load()
    assert state is not None
    return state


def same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def pair(
    few: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run of two processes and their output."""
    run = tmp_path_factory.mktemp("pair") / "run"
    return run, ranks_saq(2, "quantize", *few, *RUNS, "--epochs", 2, "--run-dir", run, "--json")


def test_only_rank_zero_prints_and_writes(pair: tuple[Path, list[tuple[int, str, str]]]) -> None:
    run, ((code, stdout, stderr), silent) = pair

    assert (code, stderr) == (0, "")
    assert silent == (0, "", "")
    said = json.loads(stdout)
    assert said["run_dir"] == str(run)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert len(manifest["artifacts"]) == 3
    assert not (run / ".lock").exists()


def test_two_ranks_equal_two_chunks(
    pair: tuple[Path, list[tuple[int, str, str]]], few: list[object], tmp_path: Path
) -> None:
    """Halves are summed exactly, so no bit differs; running statistics are averaged, not updated twice."""
    alone = tmp_path / "alone"
    answer("quantize", *few, *RUNS, "--epochs", 2, *NO_FILES, "--sharpness-batch", 32, "--run-dir", alone)
    one, other = state_of(alone), state_of(pair[0])

    assert {len(state["ranks"]) for state in (one, other)} == {1, 2}
    assert same(one["optimizer"], other["optimizer"])
    weights = [name for name in one["model"] if not name.endswith(("running_mean", "running_var", "tracked"))]
    assert len(weights) > 50
    assert [name for name in weights if not torch.equal(one["model"][name], other["model"][name])] == []
    lines = [[json.loads(line) for line in state["metrics"].splitlines()] for state in (one, other)]
    for before, now in zip(*lines, strict=True):
        assert before["images"] == now["images"]
        if before["phase"] in ("float", "calibrated"):
            assert before == now
        if before["phase"] == "train":
            assert now["loss"] == pytest.approx(before["loss"], rel=1e-12)


def raise_signal_in(step: int, rank: int, number: int = signal.SIGTERM) -> Callable[[int], None]:
    """Raise a signal in a training step of the process with that rank."""
    return partial(_signal_in, step, rank, number)


def _signal_in(step: int, rank: int, number: int, here: int) -> None:
    if here != rank:
        return
    make, calls = trainer.make_minimizer, 0

    def made(*arguments: Any) -> Any:
        minimizer = make(*arguments)
        update = minimizer.update

        def counted(passes: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                signal.raise_signal(number)
            return update(passes)

        minimizer.update = counted  # type: ignore[method-assign]
        return minimizer

    trainer.make_minimizer = made


@pytest.fixture(scope="module")
def stopped(
    few: list[object], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run of two processes of which the second was interrupted, and their output."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    options = ("quantize", *few, *RUNS, *NO_FILES, "--epochs", 2, "--run-dir", run, "--quiet")
    return run, ranks_saq(2, *options, before=raise_signal_in(step=2, rank=1))


def test_interrupted_ranks_resume_bit_identically(
    pair: tuple[Path, list[tuple[int, str, str]]],
    stopped: tuple[Path, list[tuple[int, str, str]]],
    few: list[object],
    tmp_path: Path,
) -> None:
    run, said = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]

    assert [code for code, _, _ in said] == [143, 143]
    assert "--resume" in said[0][2]
    assert said[1][2] == ""
    assert said[0][2].startswith("Interrupted; progress saved. Resume with `saq quantize --run-dir")
    assert state_of(run)["position"] == {"epoch": 0, "step": 2}

    # torchrun restarts the same command after a failure: it resumes without --resume
    options = ("quantize", *few, *RUNS, *NO_FILES, "--epochs", 2, "--run-dir", run, "--quiet")
    again = ranks_saq(2, *options, TORCHELASTIC_RESTART_COUNT="1")
    assert [code for code, _, _ in again] == [0, 0], again[0][2]
    assert same(state_of(run), state_of(pair[0]))
    assert (run / "metrics.jsonl").read_text() == (pair[0] / "metrics.jsonl").read_text()


def test_resume_with_another_world_size(
    stopped: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    run = shutil.copytree(stopped[0], tmp_path / "run")

    finished = answer("quantize", "--run-dir", run, "--resume")

    assert finished["top1"] > 80
    trained = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2]
    assert (trained["phase"], trained["images"]) == ("train", 192)  # none is lost, none counted twice


def test_error_of_one_rank_stops_all(few: list[object], tmp_path: Path) -> None:
    start = time.monotonic()
    ended = ranks_saq(
        2,
        "quantize",
        *few,
        *RUNS,
        *NO_FILES,
        "--epochs",
        2,
        "--run-dir",
        tmp_path / "run",
        "--quiet",
        before=raise_signal_in(step=2, rank=1, number=signal.SIGKILL),
    )

    assert ended[1][0] == -1
    assert ended[0][0] == 1
    assert ended[0][2].splitlines() == [
        "error: another process of this run has failed: its own message says why, "
        "or torchrun's report if it was killed"
    ]
    assert time.monotonic() - start < 60
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_unreadable_image_is_named_by_its_rank(few: list[object], digits: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(few[few.index("--data") + 1], images)  # type: ignore[arg-type]
    split = open_split(str(images), "train", num_classes=10)
    place = order_of(split.images, 0, 0)[40]  # of the second half of the first batch
    Path(split.dataset.source[place][0]).write_bytes(b"no image")  # type: ignore[index,arg-type]
    options = [MODEL, *float_options(digits, images), *RUNS, *NO_FILES, "--set", "data.calibration_images=1"]

    ended = ranks_saq(2, "quantize", *options, "--epochs", 1, "--run-dir", tmp_path / "run", "--quiet")

    assert [code for code, _, _ in ended] == [1, 1]
    assert ended[1][2].startswith(f"error: process 1: cannot read {split.dataset.source[place][0]}")  # type: ignore[index]
    assert "another process" in ended[0][2]


def test_common_errors_are_printed_once(few: list[object], tmp_path: Path) -> None:
    missing = [str(option).replace("float.safetensors", "nothing.safetensors") for option in few]
    for options, reason in (
        ((*few, *RUNS, "--batch-size", 63), "--batch-size 63 is the total of 2 processes"),
        ((*missing, *RUNS), "nothing.safetensors"),
        ((*few, *RUNS, "--batch-size", 62, "--mixup", 0.2), "give a multiple of 4"),
        ((*few, *RUNS, "--method", "nope"), "there is no method"),
    ):
        ended = ranks_saq(2, "quantize", *options, "--run-dir", tmp_path / "run", "--quiet")

        assert [code for code, _, _ in ended] == [1, 1]
        assert reason in ended[0][2]
        assert ended[1][2] in ("", ended[0][2].replace("error: ", "error: process 1: "))
    assert not (tmp_path / "run").exists()


def test_unreachable_budget_is_reported_once(few: list[object], tmp_path: Path) -> None:
    ended = ranks_saq(
        2, "search", *few, "--batch-size", 32, "--budget", "1M", "--run-dir", tmp_path / "run", "--quiet"
    )

    assert [code for code, _, _ in ended] == [4, 4]
    assert "error: " in ended[0][2]
    assert ended[1][2] == ""


def test_single_process_features_are_refused(few: list[object]) -> None:
    for options, reason in (
        (("profile", "resnet18", "--no-pretrained"), "`saq profile` runs in one process"),
        (("eval", *few, "--bench"), "--bench runs in one process"),
    ):
        assert reason in ranks_saq(2, *options)[0][2]


def test_evaluation_counts_every_image_once(few: list[object], pair: tuple[Path, Any]) -> None:
    data = few[few.index("--data") + 1]
    for target in (pair[0], pair[0] / "artifacts" / "model.onnx"):
        options = ("eval", target, "--data", data, "--batch-size", 7)
        together = ranks_saq(3, *options, "--json")
        alone = answer(*options)

        found = json.loads(together[0][1])
        assert {key: found[key] for key in ("images", "top1", "loss")} == {
            key: alone[key] for key in ("images", "top1", "loss")
        }
        assert [out for _, out, _ in together[1:]] == ["", ""]


def check_same_draws(rank: int) -> None:
    """Check that every random draw is the same on all ranks."""
    draw = AlternatingSearch._draw

    def compared(self: AlternatingSearch) -> list[int]:
        choice = draw(self)
        assert distributed.gathered(choice) == [choice] * distributed.count()
        return choice

    AlternatingSearch._draw = compared  # type: ignore[method-assign]


def test_search_bits_agree_on_all_ranks(few: list[object], tmp_path: Path) -> None:
    options = (
        "search",
        *few,
        "--batch-size",
        32,
        "--workers",
        0,
        *STOPPED,
        *SHORT,
        "--run-dir",
        tmp_path / "run",
    )
    ended = ranks_saq(2, *options, before=check_same_draws)

    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "searcher samq: " in ended[0][1]
    assert ended[1][1:] == ("", "")
    found = json.loads((tmp_path / "run" / "search.json").read_text())
    assert 0.985 * found["budget_bops"] <= found["bops"] <= found["budget_bops"]
    assert json.loads((tmp_path / "run" / "policy.json").read_text())["layers"] == found["policy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "searcher", ["swaps", "fisher", "asga", "hawq", "sensitivity", "random", "error", "uniform"]
)
def test_every_searcher_works_on_two_ranks(searcher: str, few: list[object], tmp_path: Path) -> None:
    options = ("search", *few, "--batch-size", 32, "--workers", 0, "--budget", "w4a4", "--searcher", searcher)
    ended = ranks_saq(2, *options, "--search-images", 128, "--run-dir", tmp_path / "run", "--json")

    assert [code for code, _, _ in ended] == [0, 0], ended
    assert json.loads(ended[0][1])["bops"] <= json.loads(ended[0][1])["budget_bops"]


@pytest.mark.parametrize("settled", sweep([False, True], lambda settled: not settled))
def test_two_ranks_score_like_one(settled: bool, few: list[object], tmp_path: Path) -> None:
    """Corrections are measured on every rank; recalibrated statistics, with images drawn by rank, on the first."""
    command = ("search", *few, "--batch-size", 32, "--workers", 0, "--budget", "w3a3", "--searcher", "random")
    settings = ("--set", "search.options.random.draws=2", "--set", "data.calibration_images=48")
    settings += ("--weight-error", 1)  # all that was compared is reported
    settings += SETTLED if settled else ()
    ended = ranks_saq(2, *command, *settings, "--run-dir", tmp_path / "two", "--json")
    one = answer(*command, *settings, "--run-dir", tmp_path / "one")

    assert [code for code, _, _ in ended] == [0, 0], ended
    two = json.loads(ended[0][1])
    assert {key: two[key] for key in FOUND} == {key: one[key] for key in FOUND}
    kept = [json.loads((tmp_path / run / "search.json").read_text()) for run in ("one", "two")]
    assert kept[0]["configurations"] == kept[1]["configurations"]


def labels_read(images: str) -> list[list[list[int]]]:
    """The labels this rank reads, in every batch of two epochs."""
    loader = make_loader(
        open_split(images, "train", num_classes=10),
        Preprocessing((1, 16, 16), (0.3,), (0.4,), "bilinear", 1.0),
        batch_size=48,
        training=True,
        workers=0,
        device=torch.device("cpu"),
        seed=5,
        drop_last=True,
    )
    found = []
    for epoch in (0, 3):
        loader.set_epoch(epoch)
        found.append([batch.tolist() for _, batch in loader])
    return found


def test_rank_slices_form_the_whole_batch(few: list[object]) -> None:
    images = str(few[few.index("--data") + 1])
    whole, shares = labels_read(images), ranks_run(3, labels_read, images)

    assert [len(batches) for batches in whole] == [
        open_split(images, "train", num_classes=10).images // 48
    ] * 2
    for epoch in range(2):
        for number, batch in enumerate(whole[epoch]):
            assert [label for share in shares for label in share[epoch][number]] == batch


@pytest.mark.parametrize(("images", "batch", "count"), [(100, 12, 3), (100, 100, 4), (7, 6, 2), (5, 6, 2)])
def test_training_covers_every_image_once(images: int, batch: int, count: int) -> None:
    shares = [TrainingSampler(images, batch, rank, count, seed=1) for rank in range(count)]

    read = [image for share in shares for image in share]
    assert len(read) == len(set(read)) == sum(map(len, shares)) == images // batch * batch


@pytest.mark.parametrize(("images", "batch", "count"), [(100, 12, 3), (10, 3, 4), (3, 8, 2)])
def test_evaluation_covers_every_image_once(images: int, batch: int, count: int) -> None:
    read = [list(EvaluationSampler(range(images), batch, rank, count)) for rank in range(count)]

    assert sorted(image for share in read for image in share) == list(range(images))
