"""Real processes under torchrun: killed, failing, and on two hosts.

Slow, since every process imports everything; their cooperation is tested in tests/pipelines/test_joined_runs.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from saqcli.runs.checkpoints import CheckpointFile
from tests.support.digits import MODEL, float_options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OPTIONS = ("--bits", "w4a4", "--set", "data.verify_images=16", "--epochs", "2", "--quiet")
EVERY_STEP = ("--set", "run.checkpoint_minutes=1e-6")


def command(digits: Path, run: Path, *more: str, images: Path | None = None) -> list[str]:
    return ["quantize", MODEL, *float_options(digits, images), *OPTIONS, *more, "--run-dir", str(run)]


def torchrun(count: int, *arguments: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", str(count), *options, "-m", "saqcli", *arguments],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(run: Path) -> list[int]:
    """The worker processes of a run, without torchrun's own."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if str(run).encode() in words and b"torch.distributed.run" not in words and b"netns" not in words:
                found.append(int(entry.name))
    return sorted(found)


def model_of(run: Path) -> dict[str, torch.Tensor]:
    state = CheckpointFile(run / "checkpoints" / "last.ckpt").load()
    assert state is not None
    tensors: dict[str, torch.Tensor] = state["model"]
    return tensors


def assert_same(one: Path, other: Path) -> None:
    tensors = model_of(other)
    assert [name for name, value in model_of(one).items() if not torch.equal(value, tensors[name])] == []
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(2, *command(digits, run))
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_restarts_and_resumes(rank: int, digits: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(2, *command(digits, run, *EVERY_STEP), options=("--max-restarts", "2"))
    for _ in range(3000):
        if (run / "checkpoints" / "last.previous.ckpt").exists():
            break
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.1)
    os.kill(workers(run)[rank], signal.SIGKILL)
    _, stderr = process.communicate(timeout=600)

    assert process.returncode == 0, stderr
    assert_same(run, whole)


def test_failing_worker_stops_all(digits: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number, path in enumerate(sorted((digits / "images").rglob("*.png"))):
        copy = images / path.relative_to(digits / "images")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"" if "train" in path.parts and number % 9 == 0 else path.read_bytes())
    process = torchrun(
        4, *command(digits, tmp_path / "run", "--set", "data.calibration_images=1", images=images)
    )
    start = time.monotonic()
    _, stderr = process.communicate(timeout=600)

    assert process.returncode == 1
    told = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert any("cannot read" in line for line in told)
    assert not workers(tmp_path / "run")
    assert time.monotonic() - start < 200


def test_signal_interrupts_all_and_run_resumes(digits: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun(2, *command(digits, run, *EVERY_STEP))
    while not (run / "checkpoints" / "last.previous.ckpt").exists():
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    again = torchrun(2, *command(digits, run, *EVERY_STEP, "--resume"))
    _, stderr = again.communicate(timeout=600)

    assert again.returncode == 0, stderr
    assert_same(run, whole)


HOSTS = {"saq-test-a": "10.77.0.1", "saq-test-b": "10.77.0.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that see only each other."""
    names = list(HOSTS)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "saqa", "type", "veth", "peer", "name", "saqb")
        for link, (name, address) in zip(("saqa", "saqb"), HOSTS.items(), strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def on_host(
    name: str, link: str, digits: Path, run: Path, *more: str, restarts: int = 0
) -> "subprocess.Popen[str]":
    """A torchrun agent with one process in its own network namespace; the first host is the rendezvous."""
    first, address = next(iter(HOSTS.items()))
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:29511")
    host = ("--rdzv-conf", f"is_host={int(name == first)}", "--local-addr", HOSTS[name])
    agent = (*TORCHRUN, "--nproc-per-node", "1", "--max-restarts", str(restarts), *meet, *host)
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *agent, "-m", "saqcli", *command(digits, run, *more)],
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": link},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_hosts_equal_one(hosts: list[str], digits: Path, whole: Path, tmp_path: Path) -> None:
    """Two torchrun agents, each in its own network namespace; only one run directory is written to."""
    runs = [tmp_path / name for name in hosts]
    processes = [
        on_host(name, link, digits, run)
        for name, run, link in zip(hosts, runs, ("saqa", "saqb"), strict=True)
    ]
    ends = [process.communicate(timeout=600)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], ends
    written = [run for run in runs if run.exists()]
    assert len(written) == 1
    assert_same(written[0], whole)


def test_killed_worker_restarts_on_both_hosts(
    hosts: list[str], digits: Path, whole: Path, tmp_path: Path
) -> None:
    """The other host's agent is not told of the failure: nothing in its environment shows it."""
    run = tmp_path / "run"  # on a disk that both hosts see
    processes = [
        on_host(name, link, digits, run, *EVERY_STEP, restarts=3)
        for name, link in zip(hosts, ("saqa", "saqb"), strict=True)
    ]
    for _ in range(3000):
        if (run / "checkpoints" / "last.previous.ckpt").exists():
            break
        assert processes[0].poll() is None, processes[0].stderr.read()  # type: ignore[union-attr]
        time.sleep(0.1)
    os.kill(workers(run)[1], signal.SIGKILL)
    ends = [process.communicate(timeout=600)[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0], ends
    assert_same(run, whole)
