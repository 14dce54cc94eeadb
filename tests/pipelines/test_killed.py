"""Commands killed by SIGKILL at any moment, or with a full, read-only or missing disk.

Nothing becomes unreadable, and the final result is bit-identical to an undisturbed run.
"""

import json
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from saqcli.export.safetensors import read_content
from saqcli.runs.checkpoints import CheckpointFile
from tests.support.killing import Job, Mark, Zygote, zygote
from tests.support.processes import figures
from tests.support.sweeps import sweep

MOMENTS = 25  # in every phase
TRIES = 4 * MOMENTS  # to hit one
SAVE_ALWAYS = ("--set", "run.checkpoint_minutes=1e-6")
NETWORK = (
    *("saq/resnet8s", "--no-pretrained", "--num-classes", 10, "--in-chans", 1, "--input-size", 32),
    *("--mean", 0.3, "--std", 0.4, "--batch-size", 16, "--workers", 0, "--quiet"),
)
TRAINING = (  # everything that has state
    *("--epochs", 2, "--ema", 0.9, "--mixup", 0.2),
    *("--method", "saq", "--sam-interval", 2, "--sam-reuse", 0.7),
    *("--set", "training.sharpness_batch=16"),
)
SEARCHES = {
    "samq": ("epochs=1", "options.samq.warmup=0", "options.samq.draws=2"),
    "asga": ("epochs=1",),
    "sensitivity": (),
    "random": ("options.random.draws=6",),
    "random by proxy": ("options.random.draws=6",),
}


def search_options(name: str, budget: str) -> list[str]:
    given = [f"search.{setting}" for setting in (*SEARCHES[name], "scoring_images=16")]
    searcher, _, proxy = name.partition(" ")
    by = ["--proxy", "epochs=2"] if proxy else []
    return [
        "--searcher",
        searcher,
        budget,
        "w4a4",
        *by,
        *(word for text in given for word in ("--set", text)),
    ]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    alone = ("unshare", "-rm")  # with their own mounts
    allowed = not subprocess.run([*alone, "true"], check=False, capture_output=True).returncode
    with zygote(tmp_path_factory.mktemp("processes"), *alone[: 2 * allowed]) as made:
        yield made


@pytest.fixture
def disk(processes: Zygote, tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    path = tmp_path / "disk"
    path.mkdir()
    if processes.process.args[0] != "unshare":  # type: ignore[index]
        pytest.skip("needs `unshare -rm`, for mounts of its own")
    if processes.run("mount", "-t", "tmpfs", "-o", "size=16m", "none", path):
        pytest.skip("needs tmpfs")
    yield path
    processes.run("umount", "-R", path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few digits: five steps are an epoch."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("few") / "digits", load_digits()
    for index in range(110):
        place = folder / ("val" if index < 30 else "train") / str(digits.target[index])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15).astype("uint8")).save(place / f"{index}.png")
    return folder


class Chain:
    """A command on one directory, restarted until it ends.

    Args:
        processes: that it is forked from.
        run: the directory.
        start: the whole command.
        resume: the one that goes on.
    """

    def __init__(self, processes: Zygote, run: Path, start: list[object], resume: list[object]) -> None:
        self.processes, self.run = processes, run
        self.commands = (start, resume)
        self.kills: list[str] = []
        self.pids: list[int] = []

    def begin(self, fault: dict[str, Any] | None = None) -> Job:
        """Start the next process."""
        sign = "[!.]*.json" if self.commands[0][0] == "analyze" else "manifest.json"
        return self.processes.start(self.run, *self.commands[any(self.run.glob(sign))], fault=fault)

    def killed_at(self, fault: dict[str, Any]) -> bool:
        """Run until the fault kills it; False if it finished."""
        job = self.begin(fault)
        code = job.wait()
        assert code in (0, -9), job.said()
        if code:
            self.after_kill(job)
        return code != 0

    def killed_after(self, what: str, seconds: float, later: list[str]) -> bool:
        """Run until ``seconds`` after ``what``, then kill; False on one of ``later`` or at the end."""
        job = self.begin()
        job.reach(what, *later)
        met = any(mark.what == what for mark in job.marks())
        time.sleep(seconds if met else 0)
        code = job.kill()
        assert code in (0, -9), job.said()
        if code:
            self.after_kill(job)
        return met and code != 0

    def after_kill(self, job: Job) -> None:
        marks = job.marks()
        self.pids.append(job.pid)
        self.kills.append(marks[-2].what if marks[-1].what == "killed" else marks[-1].what)
        check_readable(self.run)

    def finish(self) -> None:
        """Run to the end and check that nothing unfinished is left."""
        job = self.begin()
        assert job.wait() == 0, job.said()
        check_readable(self.run)
        assert not list(self.run.rglob(".*"))


def check_readable(run: Path) -> None:
    """Check that every file under its final name is complete."""
    for path in run.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".ckpt":
            assert CheckpointFile(path).load(pytest.fail) is not None
        elif path.suffix == ".safetensors":
            read_content(path)
        elif path.suffix == ".onnx":
            onnx.load(path)


def check_same(run: Path, whole: Path) -> None:
    """Check that all results are bit-identical."""
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert names == {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (run, whole)]
    assert manifests[0]["status"] == "finished"
    assert manifests[0]["artifacts"] == manifests[1]["artifacts"]
    if "search.json" in names:
        assert figures(run) == figures(whole)
    for name in sorted(names - {"manifest.json", "search.json"}):
        if name.endswith(("previous.ckpt", "report.html")):  # differ in a resumed run; the page has times
            continue
        if name.endswith(".ckpt"):
            assert not difference(CheckpointFile(run / name).load(), CheckpointFile(whole / name).load())
        else:
            texts = [(path / name).read_bytes() for path in (run, whole)]
            if name == "report.md":  # says where it is
                texts = [
                    text.replace(str(path).encode(), b"RUN")
                    for text, path in zip(texts, (run, whole), strict=True)
                ]
            assert texts[0] == texts[1], name


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two trees of tensors and values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{place}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if one.dtype == other.dtype and torch.equal(one, other) else place
    else:
        return None if one == other else f"{place}: {one}, {other}"
    return next((found for at, a, b in pairs if (found := difference(a, b, at))), None)


def quantization(processes: Zygote, images: Path, run: Path, *more: object) -> Chain:
    given = [*NETWORK, "--data", images, "--run-dir", run, *SAVE_ALWAYS, *TRAINING, *more]
    return Chain(processes, run, ["quantize", *given], ["quantize", "--run-dir", run, "--resume", "--quiet"])


def search(processes: Zygote, images: Path, run: Path, name: str) -> Chain:
    given = [*NETWORK, "--data", images, "--run-dir", run, *SAVE_ALWAYS, *search_options(name, "--budget")]
    return Chain(processes, run, ["search", *given], ["search", "--run-dir", run, "--resume", "--quiet"])


def landscape(processes: Zygote, images: Path, run: Path, target: Path) -> Chain:
    given = ["analyze", target, "--data", images, "--images", 40, "--landscape", "--trace", "--grid", 5]
    given += ["--samples", 4, "--out", run, "--quiet"]
    return Chain(processes, run, given, [*given, "--resume"])


@pytest.fixture(scope="module")
def whole(processes: Zygote, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    chain = quantization(processes, images, tmp_path_factory.mktemp("whole") / "run", "--bits", 4)
    chain.finish()
    return chain.run


def test_result_survives_kills_at_critical_writes(
    processes: Zygote, images: Path, whole: Path, tmp_path: Path
) -> None:
    chain = quantization(processes, images, tmp_path / "run", "--bits", 4)
    for act, count in (
        ("make .lock", 1),  # only the directory exists
        ("replace config.json", 1),
        ("write new manifest.json", 1),
        ("write checkpoints/new last.ckpt", 1),
        ("replace checkpoints/last.ckpt", 3),  # in the first epoch: only the previous one exists
        ("write metrics.jsonl", 1),  # of its end
        ("flush checkpoints/new last.ckpt", 1),  # metrics are written, the checkpoint is not
        ("write checkpoints/new last.ckpt", 4),  # in the second epoch
        ("make artifacts/new model.onnx", 1),
    ):
        assert chain.killed_at({"on": act, "count": count}), f"there is no {act}, number {count}"
        assert chain.kills[-1] == act
        if act == "flush checkpoints/new last.ckpt":
            damage(chain.run / "checkpoints" / "last.ckpt")
    jobs = [chain.begin(), chain.begin()]

    codes = [job.wait() for job in jobs]
    assert sorted(codes) == [0, 1], [job.said() for job in jobs]
    winner, loser = (jobs[codes.index(code)] for code in (0, 1))
    assert f"error: {chain.run} is in use by process {winner.pid} on " in loser.said()
    assert f"resuming after epoch 2 (process {chain.pids[-1]} was killed)" in winner.said()
    assert not list(chain.run.rglob(".*"))
    check_same(chain.run, whole)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.slow
def test_killed_overwrite_is_never_the_old_run(
    processes: Zygote, images: Path, whole: Path, tmp_path: Path
) -> None:
    """Manifest, configuration and checkpoints stay consistent whenever ``--overwrite`` is killed."""
    run = tmp_path / "run"
    command = quantization(processes, images, run, "--bits", 3, "--epochs", 0).commands[0]
    for act in (
        *("write new manifest.json", "remove policy.json", "make new config.json", "replace metrics.jsonl"),
        "make checkpoints/new last.ckpt",
    ):
        shutil.copytree(whole, run)
        assert processes.start(run, *command, "--overwrite", fault={"on": act}).wait() == -9

        check_readable(run)
        status = json.loads((run / "manifest.json").read_text())["status"]
        assert (status == "finished") == (act == "write new manifest.json")
        again = processes.start(run, *command)
        if status == "clearing":  # parts of the previous run are already deleted: the new one starts
            assert again.wait() == 0, again.said()
            assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
        else:
            assert again.wait() == 1
            assert "--resume to continue it, --overwrite to replace it" in again.said()
        shutil.rmtree(run)


# Disks that fail ---------------------------------------------------------------------------------------------


def failed(job: Job, *texts: str) -> None:
    """Check that it ended with one line that contains ``texts``."""
    assert job.wait() == 1, job.said()
    (line,) = [line for line in job.said().splitlines() if line.startswith("error: ")]
    for text in texts:
        assert text in line
    for wrong in ("Traceback", "unexpected", "report it", "Exception ignored"):
        assert wrong not in job.said()


@pytest.mark.slow
def test_full_disk_pauses_a_run(processes: Zygote, images: Path, whole: Path, disk: Path) -> None:
    run = disk / "run"
    chain = quantization(processes, images, run, "--bits", 4)
    for act, count, file in (
        ("make new manifest.json", 1, "manifest.json"),
        ("make new policy.json", 1, "policy.json"),
        ("make checkpoints/new last.ckpt", 1, "last.ckpt"),
        ("make checkpoints/new last.ckpt", 3, "last.ckpt"),
        ("write metrics.jsonl", 1, ""),  # there may be room for a line
        ("make artifacts/new model.safetensors", 1, "model.safetensors"),
        ("make artifacts/new model.onnx", 1, "model.onnx"),
    ):
        there = processes.seen(run / "manifest.json").exists()
        job = processes.start(run, *chain.commands[there], fault={"on": act, "count": count, "do": "fill"})
        failed(job, f"{run}", f"{file} cannot be written (No space left on device): free disk space")
        assert "--resume" in job.said() or file == "manifest.json"
        check_readable(processes.seen(run))
        processes.run("rm", disk / "filler")
    assert processes.start(run, *chain.commands[1]).wait() == 0

    check_same(processes.seen(run), whole)


@pytest.mark.parametrize("harm", sweep(["remove", "empty"], lambda harm: harm == "remove"))
def test_deleted_run_directory_is_not_recreated(
    harm: str, processes: Zygote, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = quantization(processes, images, run, "--bits", 4).commands[0]

    fault = {"on": "make checkpoints/new last.ckpt", "count": 3, "do": harm}
    failed(processes.start(run, *command, fault=fault), f"{run} was removed or emptied during")

    assert run.exists() == (harm == "empty")
    assert not list(run.rglob("*"))


@pytest.mark.slow
def test_unwritable_files_fail_immediately(processes: Zygote, images: Path, disk: Path) -> None:
    run = disk / "run"
    start, resume = quantization(processes, images, run, "--bits", 4).commands
    fault = {"on": "make checkpoints/new last.ckpt", "count": 2, "do": "forbid"}
    failed(
        processes.start(run, *start, fault=fault),
        *("last.ckpt cannot be written (Read-only file system): make it writable", "--resume"),
    )
    check_readable(processes.seen(run))
    processes.run("umount", run / "checkpoints")
    processes.run("mount", "-o", "remount,ro", disk)

    failed(processes.start(run, *resume), f"{run}/.lock cannot be written (Read-only file system)")
    failed(
        processes.start(run, *quantization(processes, images, disk / "other", "--bits", 4).commands[0]),
        f"{disk}/other cannot be created",
    )


@pytest.mark.slow
def test_full_temp_disk_is_harmless(
    processes: Zygote, images: Path, whole: Path, disk: Path, tmp_path: Path
) -> None:
    processes.run("dd", "if=/dev/zero", f"of={disk}/filler", "bs=4k", "status=none")
    chain = quantization(processes, images, tmp_path / "run", "--bits", 4)
    job = processes.start(chain.run, *chain.commands[0], TMPDIR=str(disk))
    assert job.wait() == 0, job.said()

    check_same(chain.run, whole)


@pytest.mark.slow
def test_full_disk_pauses_search_and_analysis(
    processes: Zygote, images: Path, whole: Path, disk: Path, tmp_path: Path
) -> None:
    for chain, acts in (
        (
            search(processes, images, disk / "run", "samq"),
            ("make checkpoints/new search.ckpt", "make new policy.png", "make new search.json"),
        ),
        (
            landscape(processes, images, disk / "readings", whole),
            ("make new landscape.json", "make new landscape_contour.png"),
        ),
    ):
        for act in acts:
            there = any(processes.seen(chain.run).glob("[!.]*.json"))
            job = processes.start(chain.run, *chain.commands[there], fault={"on": act, "do": "fill"})
            failed(job, act.rpartition("new ")[2], "No space left on device", "free disk space", "--resume")
            check_readable(processes.seen(chain.run))
            processes.run("rm", disk / "filler")
        assert processes.start(chain.run, *chain.commands[1]).wait() == 0
        assert not list(processes.seen(chain.run).rglob(".*"))


# Random moments ----------------------------------------------------------------------------------------------


def phases(marks: list[Mark]) -> list[tuple[str, float]]:
    """The phases of an undisturbed process and their durations: tasks, pictures, exports, end."""
    first: dict[str, float] = {}
    for mark in marks:
        if mark.what.startswith(
            ("begin ", "replace policy", "replace search.json", "make artifacts/new model")
        ):
            first.setdefault(mark.what, mark.at)
    ends = [*list(first.values())[1:], marks[-1].at]
    return [(what, end - at) for (what, at), end in zip(first.items(), ends, strict=True)]


def kill_everywhere(chain: Chain, whole: Chain, moments: int) -> dict[str, int]:
    """Kill ``chain`` at random moments in every phase of ``whole``; returns the number of kills per phase."""
    chance, job = random.Random(0), whole.begin()
    assert job.wait() == 0, job.said()
    known = phases(job.marks())
    got = dict.fromkeys((what for what, _ in known), 0)
    for place, (what, seconds) in enumerate(known):
        before = chain.run.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        if chain.run.exists():
            shutil.copytree(chain.run, before)
        for _ in range(TRIES):
            hit = chain.killed_after(
                what, chance.uniform(0, 1.1 * seconds), [name for name, _ in known[place + 1 :]]
            )
            got[what] += hit
            if got[what] == moments:
                break
            if not hit:  # the phase is over
                if not got[what]:  # and had ended before this loop: start over
                    shutil.rmtree(before, ignore_errors=True)
                shutil.rmtree(chain.run)
                if before.exists():
                    shutil.copytree(before, chain.run)
        print(f"{what}: {got[what]} kills", flush=True)
    return got


def report(chain: Chain, got: dict[str, int]) -> None:
    print(f"{len(chain.kills)} kills of {chain.commands[0][0]}: {got}, last acts {Counter(chain.kills)}")


def check_survives_kills(chain: Chain, whole: Chain) -> None:
    """Killed at ``MOMENTS`` in every phase, it leaves the same as an undisturbed run."""
    got = kill_everywhere(chain, whole, MOMENTS)
    chain.finish()

    report(chain, got)
    check_same(chain.run, whole.run)
    assert min(got.values()) == MOMENTS


@pytest.mark.slow
def test_quantize_survives_random_kills(processes: Zygote, images: Path, tmp_path: Path) -> None:
    whole, chain = (
        quantization(processes, images, tmp_path / name, *search_options("samq", "--bops"))
        for name in ("whole", "run")
    )
    check_survives_kills(chain, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHES)
def test_search_survives_random_kills(name: str, processes: Zygote, images: Path, tmp_path: Path) -> None:
    whole, chain = (search(processes, images, tmp_path / place, name) for place in ("whole", "run"))
    check_survives_kills(chain, whole)


@pytest.mark.slow
def test_run_survives_kills_during_writes(
    processes: Zygote, images: Path, whole: Path, tmp_path: Path
) -> None:
    """Writes are acts too, and are killed with half of the bytes on disk."""
    chance = random.Random(1)
    kills = 0
    while kills < 4 * MOMENTS:
        chain = quantization(processes, images, tmp_path / f"run{kills}", "--bits", 4)
        while chain.killed_at({"act": chance.randint(1, 70)}):
            pass
        report(chain, {})
        kills += len(chain.kills)
        check_same(chain.run, whole)


@pytest.mark.slow
def test_analysis_survives_random_kills(processes: Zygote, images: Path, tmp_path: Path) -> None:
    target = quantization(processes, images, tmp_path / "target", "--bits", 4, "--epochs", 0)
    target.finish()
    whole, chain = (landscape(processes, images, tmp_path / name, target.run) for name in ("whole", "run"))
    got = kill_everywhere(chain, whole, MOMENTS)
    chain.finish()

    report(chain, got)
    for path in whole.run.iterdir():
        assert (chain.run / path.name).read_bytes() == path.read_bytes()
