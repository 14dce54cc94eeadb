"""Everything worth running on a GPU, in two calls, without a network.

    python benchmarks/gpu.py --prepare DATA --shards shards                     # anywhere, once
    python benchmarks/gpu.py --part checks times --seconds 290 --out gpu.json
    python benchmarks/gpu.py --part training --seconds 530 --shards shards --out gpu.json
    python benchmarks/gpu.py --device cpu --quick --part checks --out cpu.json

``checks`` compares the device with the CPU (``gpu_checks.py``), ``times`` measures kernels and steps
(``gpu_times.py``), ``training`` trains rows of the SAQ paper (``gpu_training.py``). Items run in other processes: one
that fails, hangs or breaks the device is recorded with its error, and the others go on. A finished item is written
immediately and not run again; ``--again`` repeats those that failed. None is begun that does not fit in what is left.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

NEEDED = """
    torch torchvision timm typer rich pydantic pydantic_core annotated_types typing_inspection numpy scipy PIL
    safetensors onnx onnxscript onnx_ir onnxruntime ml_dtypes sklearn matplotlib
""".split()
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if MISSING and __name__ == "__main__":
    sys.exit(f"missing packages: {' '.join(MISSING)}: take their wheels along and put them on PYTHONPATH")

sys.path.insert(0, str(Path(__file__).parents[1]))  # saq need not be installed

PARTS = ("checks", "times", "training")
WORKERS = {"checks": 6, "times": 1, "training": 8}  # on a GPU; one on a CPU
SLOW = {
    "compile": 60.0,
    "graphs": 60.0,
    "kernels": 60.0,
    "torchrun": 25.0,
    "memory": 25.0,
    "quantizer": 10.0,
}  # seconds; others: 15
Item = tuple[Any, float]  # the work of a place, and its seconds on a GPU


def items(part: str, wanted: argparse.Namespace) -> list[dict[str, Item]]:
    """The items of a part by name, in groups that follow each other."""
    from gpu_checks import Place, checks
    from gpu_times import times
    from gpu_training import Rows, training

    place = Place(device_of(wanted), wanted.quick)
    if part == "checks":
        return [{name: (check, SLOW.get(name.split()[0], 15.0)) for name, check in checks(place).items()}]
    if part == "times":
        return [times(place)]
    return training(Rows(wanted.shards, wanted.out.parent), place)


def device_of(wanted: argparse.Namespace) -> Any:
    """The device that is asked for, a GPU with its index."""
    import torch

    from saqcli.process_group import pick_device

    device = pick_device(wanted.device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


# The processes that work.


def serve(requests: Any, wanted: argparse.Namespace) -> None:
    """Answer the requests of a pipe: ``("plan", parts)``, ``("run", name)``, or ``("end", None)``."""
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # deterministic kernels need it from the start
    import torch
    from gpu_checks import Place

    warnings.simplefilter("ignore")
    place = Place(device_of(wanted), wanted.quick)
    torch.set_num_threads(2 if place.cuda else 1)
    known: dict[str, Item] = {}
    while True:
        kind, what = requests.recv()
        if kind == "end":
            return
        if kind == "plan":
            groups = [group for part in what for group in items(part, wanted)]
            plan = [{name: seconds for name, (_, seconds) in group.items()} for group in groups]
            requests.send((plan, machine(place.device)))
            continue
        if what not in known:
            known = {
                name: item for part in PARTS for group in items(part, wanted) for name, item in group.items()
            }
        requests.send(outcome(known[what][0], place))


def outcome(work: Any, place: Any) -> dict[str, Any]:
    """What came of an item."""
    start = time.perf_counter()
    try:
        found = {"status": "passed", "figures": work(place)}
    except Exception as error:  # of whatever kind: the others go on
        last = traceback.format_exc().strip().splitlines()[-8:]
        found = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000], "trace": last}
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


def machine(device: Any) -> dict[str, Any]:
    """What the results depend on."""
    import torch

    from saqcli.machine import cores, cpu_name, library_versions

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": str(device), "name": name, "cores": cores(), **library_versions()}


CONTEXT = multiprocessing.get_context("forkserver")  # it imports once, and never touches the device


class Worker:
    """A process that runs items; it ends after one that fails, since the device may be broken."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self._wanted = wanted
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, kind: str, what: Any, limit: float) -> Any:
        """The answer to a request.

        Raises:
            TimeoutError: there was none within ``limit`` seconds.
            EOFError: the process ended.
        """
        if self._process is None:
            self._pipe, other = CONTEXT.Pipe()
            self._process = CONTEXT.Process(target=serve, args=(other, self._wanted))
            self._process.start()
            other.close()
        self._pipe.send((kind, what))
        if not self._pipe.poll(limit):
            raise TimeoutError(f"not finished after {limit:.0f} s")
        return self._pipe.recv()

    def run(self, name: str, limit: float) -> dict[str, Any]:
        """The outcome of an item, which is killed after ``limit`` seconds."""
        start = time.perf_counter()
        try:
            found: dict[str, Any] = self.ask("run", name, limit)
        except TimeoutError as error:
            found = {"status": "cut off", "error": str(error)}
        except (EOFError, OSError):
            self._process.join()
            found = {"status": "failed", "error": f"the process ended with {self._process.exitcode}"}
        if found["status"] != "passed":
            self.close(hangs=found["status"] == "cut off")
        return {"seconds": round(time.perf_counter() - start, 2), **found}

    def close(self, *, hangs: bool = False) -> None:
        """End the process, at once if it ``hangs``."""
        if self._process is not None:
            with suppress(OSError):
                self._pipe.send(("end", None))
            self._process.join(0 if hangs else 10)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and what it started
            self._process.join()
            self._process = None


# The process that hands out.


class Results:
    """The JSON file of all results, written after every item."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path, self._lock = path, threading.Lock()
        self.content: dict[str, Any] = {"items": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())
        done = ("passed",) if again else ("passed", "failed")
        self.done = {name for name, each in self.content["items"].items() if each["status"] in done}

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Keep and show an outcome."""
        with self._lock:
            self.content["items"][name] = found
            self.write()
            text = found.get("error") or json.dumps(found.get("figures"), default=str)
            print(f"{found['status']:8s} {found.get('seconds', 0):7.1f} s  {name}: {text[:160]}", flush=True)

    def write(self) -> None:
        """To the file, atomically."""
        from saqcli.serialization import write_text

        write_text(self.path, json.dumps(self.content, indent=1, default=str) + "\n")


class Schedule:
    """Hands items to workers as long as they fit in the time.

    Args:
        group: items that may run side by side, with their seconds.
        results: where outcomes go.
        end: ``time.monotonic`` at which all must have ended.
        estimated: whether the seconds say something about this device.
    """

    def __init__(self, group: dict[str, float], results: Results, end: float, estimated: bool) -> None:
        self._waiting = {
            name: seconds if estimated else 1.0 for name, seconds in group.items() if name not in results.done
        }
        self._results, self._end, self._estimated = results, end, estimated
        self._lock, self._ratios = threading.Lock(), list[float]()

    def take(self) -> tuple[str, float] | None:
        """The first item that fits, and its seconds; None if there is none."""
        with self._lock:
            left = self._end - time.monotonic()
            ratio = max(1.0, statistics.median(self._ratios or [1.0])) if self._estimated else 1.0
            fitting = next(((n, s) for n, s in self._waiting.items() if ratio * s <= left), None)
            if fitting is not None:
                del self._waiting[fitting[0]]
            return fitting

    def work(self, worker: Worker) -> None:
        """Run items until none fits."""
        while (item := self.take()) is not None:
            name, seconds = item
            limit = min(self._end - time.monotonic(), max(120.0, 4 * seconds) if self._estimated else 600.0)
            found = worker.run(name, limit)
            with self._lock:
                self._ratios.append(found["seconds"] / seconds)
            self._results.put(name, found)

    def run(self, workers: list[Worker]) -> None:
        """Run all that fit; the first worker stays."""
        threads = [threading.Thread(target=self.work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers[1:]:
            worker.close()
        for name in self._waiting:
            print(f"not begun: {name}", flush=True)


def arguments() -> argparse.Namespace:
    """The options."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--part", nargs="+", choices=PARTS, default=["checks"])
    options.add_argument("--device", default="auto")
    options.add_argument("--quick", action="store_true", help="sizes for a CPU")
    options.add_argument("--seconds", type=float, default=280.0, help="all that may be taken")
    options.add_argument("--out", type=Path, default=Path("gpu.json"))
    options.add_argument("--only", nargs="+", default=[], help="items whose names contain one of these")
    options.add_argument("--again", action="store_true", help="repeat items that failed")
    options.add_argument("--workers", type=int, help="processes side by side")
    options.add_argument(
        "--shards", type=Path, nargs="+", default=[], help="folders of shards; of --prepare: the first"
    )
    options.add_argument(
        "--prepare", type=Path, metavar="DATA", help="folder of train/CLASS/ and test/CLASS/"
    )
    return options.parse_args()


def main() -> None:
    """Run what fits; the exit code is 1 if an item failed."""
    begun, wanted = time.monotonic(), arguments()
    if wanted.prepare is not None:
        from gpu_training import prepare

        for path in prepare(wanted.prepare, wanted.shards[0] if wanted.shards else Path("shards")):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
        return
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(wanted.out, wanted.again)
    CONTEXT.set_forkserver_preload(["gpu_checks", "gpu_times", "gpu_training"])
    first = Worker(wanted)
    for part in PARTS:
        if part not in wanted.part:
            continue
        groups, results.content["machine"] = first.ask("plan", [part], 300)
        gpu = results.content["machine"]["device"].startswith("cuda")
        for group in groups:
            chosen = {n: s for n, s in group.items() if not wanted.only or any(o in n for o in wanted.only)}
            count = wanted.workers or (WORKERS[part] if gpu else 1)
            workers = [first, *(Worker(wanted) for _ in range(min(count, len(chosen)) - 1))]
            Schedule(chosen, results, begun + wanted.seconds, gpu and not wanted.quick).run(workers)
    first.close()
    results.content.setdefault("calls", []).append(
        {"parts": wanted.part, "seconds": round(time.monotonic() - begun, 1)}
    )
    results.write()
    failed = [name for name, each in results.content["items"].items() if each["status"] != "passed"]
    print(f"{len(results.content['items'])} items in {wanted.out}, {len(failed)} failed: {', '.join(failed)}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
