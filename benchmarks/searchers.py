"""Top-1 after the same fine-tuning under every searcher's policy.

    python benchmarks/searchers.py --model saq/resnet20 --weights FILE --data DIR --out results --seeds 3

`--searchers untied` stands for the same widths in all layers, one for weights and one for inputs: every pair within the
budget that no other exceeds is a row of its own, and `untied w4a3` one of them. With `--epochs 0` policies are
calibrated only; with `--set reconstruction.enabled=true` they are reconstructed before they are trained.

Every search and every fine-tuning is one line of ``results/results.jsonl``; existing lines are not run again, so the
script can be interrupted and restarted. Equal policies are trained once. The cost of a search is given in epochs of
plain QAT on all training images, timed by ``--time``; on a CPU both are processor time, which depends little on other
work on the machine. ``--table`` prints the existing results as Markdown, and ``--json`` as JSON. ``--quick``
compares two searchers at one budget, with one fine-tuning each.
"""

import argparse
import copy
import itertools
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import add_json, append, known, origin, parser, read, show, spread
from torch import nn

from saqcli.config import RunConfig, resolve
from saqcli.data.splits import Images, open_named
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.find_bits import bind_search, find_bits, request_search
from saqcli.pipelines.proxy import fit_proxy
from saqcli.pipelines.quantize import load_teacher
from saqcli.pipelines.setup import Network, classes_of, load_float, wrap_and_trace
from saqcli.pipelines.stages import float_network, tensors_before, wanted_stages
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.quant.bits import BitConfig, parse_bits
from saqcli.quant.calibration import InputStatistics
from saqcli.searchers.uniforms import untied_uniforms
from saqcli.serialization import make_folder, write_text
from saqcli.tasks.classification import Meter
from saqcli.training.loop import NO_MEMORY, score, train_epoch
from saqcli.training.minimizers.qat import QAT
from saqcli.training.optimizer import make_objective, make_optimizer
from saqcli.training.step import Recovery, Stepper
from saqcli.training.trainer import Trainer

# Of a policy that is trained or reconstructed, configurations are compared with half the error of weights by default.
WHOLE = ", whole error"
# The compared searchers with their options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "error": ("error", {}),
    "random": ("random", {}),
    "sensitivity": ("sensitivity", {}),
    "hawq": ("hawq", {}),
    "fisher": ("fisher", {}),
    f"fisher{WHOLE}": ("fisher", {}),
    "swaps": ("swaps", {}),
    f"swaps{WHOLE}": ("swaps", {}),
    "samq": ("samq", {}),
    "samq without sharpness": ("samq", {"sharpness": False}),
    "asga": ("asga", {}),
    "asga without pass 2": ("asga", {"align": "none"}),
}


class Bench:
    """A network with its images, calibrated once, for many searches and trainings."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        self.wanted, self.device = wanted, pick_device("auto")
        config = self.config("w4a4", "uniform", 0)
        loaded = load_float(config.model, SILENT)
        train, val = (open_named(config.data, split, classes_of(loaded)) for split in ("train", "val"))
        self._images = (train, val, loaded.preprocessing)
        self.network: Network = wrap_and_trace(loaded)
        self.network.model.to(self.device)
        self.statistics: dict[str, InputStatistics] = calibrate(
            self.network, self.images(config), config, SILENT
        )

    def config(self, budget: str, name: str, seed: int) -> RunConfig:
        """The settings of one run."""
        searcher, options = VARIANTS[name]
        given = {
            "model.name": self.wanted.model,
            "model.weights": self.wanted.weights,
            "data.path": self.wanted.data,
            "quantization.bops": budget,
            "quantization.searcher": searcher,
            "search.options": {searcher: options},
            "search.weight_error": 1.0 if name.endswith(WHOLE) else None,
            "search.proxy": json.loads(self.wanted.proxy) if self.wanted.proxy else None,
            "training.method": self.wanted.method,
            "training.epochs": self.wanted.epochs,
            "training.lr": self.wanted.lr,
            "run.seed": seed,
        }
        assigned = dict(text.split("=", 1) for text in self.wanted.assign or [])
        assignments = {"training.distill": "false"} | assigned
        return resolve(options=given, assignments=assignments)

    def images(self, config: RunConfig) -> Images:
        """The images with the data settings of ``config``."""
        return Images(*self._images, config.data, self.device, config.run.seed)

    def search(self, budget: str, name: str, seed: int) -> dict[str, Any]:
        """Search once; returns the policy and the cost of the search."""
        config, busy = self.config(budget, name, seed), time.process_time()
        statistics_ = None if self.wanted.proxy else self.statistics
        request = request_search(config, self.network, self.images(config), SILENT)
        if self.wanted.proxy:
            fit_proxy(request.search_network, request.images, config, SILENT)
        bound = bind_search(config, request, statistics_, SILENT)
        found = find_bits(config, bound, NO_MEMORY)
        bits = [bits.model_dump() for bits in found.policy.layers.values()]
        return {
            "policy": found.policy.model_dump(),
            "bits": " ".join(_pair(b["weight"], b["activation"]) for b in bits),
            "bops": found.cost.bops,
            "budget_bops": found.budget.bops,
            "seconds": found.seconds,
            "cpu_seconds": time.process_time() - busy,
        }

    def untied(self, budget: str) -> list[tuple[str, dict[str, Any]]]:
        """The same widths everywhere, by name, in the form of ``search``."""
        config = self.config(budget, "uniform", 0)
        request = request_search(config, self.network, self.images(config), SILENT)
        space, found = request.space, []
        for choice in untied_uniforms(space, request.budget):
            policy, cost = space.config(choice), space.cost(choice)
            bits = list(policy.layers.values())
            first = space.config(choice).layers[space.decisions[0].name]
            about = {
                "policy": policy.model_dump(),
                "bits": " ".join(_pair(b.weight, b.activation) for b in bits),
                "bops": cost.bops,
                "budget_bops": request.budget.bops,
                "seconds": 0.0,
                "cpu_seconds": 0.0,
            }
            found.append((f"untied w{first.weight}a{first.activation}", about))
        return found

    def quantized(self, config: RunConfig, policy: BitConfig) -> tuple[nn.Module, Images]:
        """A new model, calibrated at ``policy``, and its images."""
        network, images = replace(self.network, model=copy.deepcopy(self.network.model)), self.images(config)
        return install_quantizers(config, network, policy, self.statistics, images, SILENT), images

    def train(self, policy: BitConfig, seed: int) -> dict[str, float]:
        """Calibrate, take the stages without labels, and train; the accuracy before and after, in percent."""
        config = self.config("w4a4", "uniform", seed)
        weights = tensors_before(config, self.network.model)
        model, images = self.quantized(config, policy)
        before = score(model, images.validation(), "", self.device, SILENT)
        start = time.perf_counter()
        for stage in wanted_stages(config).values():
            stage(config, model, float_network(model, weights["float"]), images, NO_MEMORY, SILENT)
        if config.training.epochs:
            self.trainer(model, images, config).fit()
        seconds = time.perf_counter() - start
        changed = config.training.epochs or wanted_stages(config)
        after = score(model, images.validation(), "", self.device, SILENT) if changed else before
        return {
            "calibrated": before.top1,
            "top1": after.top1,
            "loss": after.loss,
            "train_seconds": seconds,
        }

    def trainer(self, model: nn.Module, images: Images, config: RunConfig) -> Trainer:
        """A trainer of ``model`` without validation."""
        return Trainer(
            model,
            images.training(),
            config.training,
            num_classes=self.network.loaded.num_classes,
            image_size=max(images.preprocessing.input_size[1:]),
            teacher=load_teacher(config, self.device, SILENT),
        )

    def epoch_seconds(self, steps: int = 12) -> float:
        """Seconds of one epoch of plain QAT at uniform 4 bits, from the median of ``steps`` steps."""
        config = self.config("w4a4", "uniform", 0)
        policy = self.network.costs.uniform(self.network.name, parse_bits("4"))
        model, images = self.quantized(config, policy)
        loader, minimizer = images.training(), QAT(model, make_optimizer(model, config.training))
        objective = make_objective(config.training, self.device, self.network.loaded.num_classes)
        marks: list[float] = []

        def mark(step: int) -> None:
            marks.append(time.process_time() if self.device.type == "cpu" else time.perf_counter())
            if step == steps:
                raise StopIteration

        stepper = Stepper(model, minimizer, objective, 128, Recovery())
        loader.set_epoch(0)
        try:
            with SILENT.task("", 0) as task:
                train_epoch(stepper, loader, task, Meter(), after_step=mark)
        except StopIteration:
            pass
        each = [b - a for a, b in itertools.pairwise(marks)]  # without the first step, which warms up
        return statistics.median(each) * len(loader)


def _pair(weight: int | None, activation: int | None) -> str:
    return f"{weight}" if weight == activation else f"{weight}/{activation}"


def measure(wanted: argparse.Namespace) -> None:
    """Run the missing searches and trainings."""
    bench = Bench(wanted)
    results = wanted.out / "results.jsonl"
    if wanted.time:
        seconds = bench.epoch_seconds()
        append(results, {"kind": "epoch", "seconds": seconds, "threads": torch.get_num_threads()})
        return
    suffix = f" {wanted.suffix}" if wanted.suffix else ""
    chosen = wanted.searchers.split(";") if wanted.searchers else list(VARIANTS)
    for budget in wanted.budgets.split(","):
        for name in chosen:
            if name.startswith("untied"):
                for title, about in bench.untied(budget):
                    if name not in ("untied", title):
                        continue
                    key = _search_key(bench, budget, title, 0)
                    if not known(results, key):
                        append(results, {**origin(wanted), **key, **about})
                    _train(bench, results, budget, title, 0, about)
                continue
            for seed in range(wanted.search_seeds):
                found = _search(bench, results, budget, name, name + suffix, seed)
                if found is not None and not wanted.search_only:
                    _train(bench, results, budget, name + suffix, seed, found)


def _search_key(bench: Bench, budget: str, title: str, seed: int) -> dict[str, Any]:
    return {"kind": "search", "model": bench.wanted.model, "budget": budget, "name": title, "seed": seed}


def _search(
    bench: Bench, results: Path, budget: str, name: str, title: str, seed: int
) -> dict[str, Any] | None:
    key = _search_key(bench, budget, title, seed)
    if before := known(results, key):
        return before
    line = {**origin(bench.wanted), **key, **bench.search(budget, name, seed)}
    folder = results.parent / "policies"
    make_folder(folder)
    write_text(
        folder / f"{budget}-{title.replace(' ', '_')}-{seed}.json",
        BitConfig.model_validate(line["policy"]).to_json(),
    )
    append(results, line)
    return line


def _train(
    bench: Bench, results: Path, budget: str, title: str, search_seed: int, found: dict[str, Any]
) -> None:
    for seed in range(bench.wanted.seeds):
        key = {
            "kind": "train",
            "model": bench.wanted.model,
            "bits": found["bits"],
            "seed": seed,
            "method": bench.wanted.method,
            "epochs": bench.wanted.epochs,
            "stages": list(wanted_stages(bench.config("w4a4", "uniform", seed))),
        }
        if known(results, key):
            continue
        figures = bench.train(BitConfig.model_validate(found["policy"]), seed)
        about = {"budget": budget, "name": title, "search_seed": search_seed}
        append(results, {**origin(bench.wanted), **key, **about, **figures})


def table(lines: list[dict[str, Any]]) -> str:
    """Top-1 over seeds, BOPs and cost of the search, as Markdown."""
    epoch = statistics.median([r["seconds"] for r in lines if r["kind"] == "epoch"] or [float("nan")])
    rows = []
    for method in sorted({r["method"] for r in lines if r["kind"] == "train"}):
        trained: dict[str, list[dict[str, Any]]] = {}
        for r in lines:
            if r["kind"] == "train" and r["method"] == method:
                trained.setdefault(r["bits"], []).append(r)
        for budget in sorted({r["budget"] for r in lines if r["kind"] == "search"}):
            rows += [
                f"\n{budget}, fine-tuned with {method}\n",
                "| searcher | searches | % of the budget | search cost | calibrated top-1 | top-1 | loss | runs |",
                "|--|--|--|--|--|--|--|--|",
            ]
            found = [r for r in lines if r["kind"] == "search" and r["budget"] == budget]
            for name in dict.fromkeys(r["name"] for r in found):
                mine = [r for r in found if r["name"] == name]
                runs = [run for r in mine for run in trained.get(r["bits"], [])]
                if not runs:
                    continue
                used = [100 * r["bops"] / r["budget_bops"] for r in mine]
                cost = statistics.median([r.get("cpu_seconds", r["seconds"]) for r in mine]) / epoch
                rows.append(
                    f"| {name} | {len(mine)} | {min(used):.2f} | {cost:.2f} | "
                    f"{spread([r['calibrated'] for r in runs], 2)} | {spread([r['top1'] for r in runs], 2)} | "
                    f"{spread([r['loss'] for r in runs], 4)} | {len(runs)} |"
                )
    return "\n".join(rows)


def main() -> None:
    """Parse the options, measure, print the table."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budgets", default="w3a3,w4a4")
    options.add_argument("--searchers", help="separated by ;")
    options.add_argument("--search-seeds", type=int, default=1, help="searches of each kind")
    options.add_argument("--seeds", type=int, default=3, help="fine-tunings of each policy")
    options.add_argument("--method", default="qat")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--lr", type=float, default=0.01)
    options.add_argument("--proxy", help="JSON of the search.proxy settings")
    options.add_argument("--suffix", default="", help="suffix of the searchers' names in the results")
    options.add_argument("--set", dest="assign", action="append", help="any setting")
    options.add_argument("--search-only", action="store_true")
    options.add_argument("--time", action="store_true", help="only time an epoch of plain QAT")
    options.add_argument("--table", action="store_true")
    options.add_argument("--quick", action="store_true")
    add_json(options)
    wanted = options.parse_args()
    if wanted.quick:
        wanted.budgets, wanted.searchers, wanted.seeds = "w4a4", "uniform;error", 1
    if not wanted.table:
        wanted.out.mkdir(parents=True, exist_ok=True)
        measure(wanted)
    if wanted.table or wanted.json:
        lines = read(wanted.out / "results.jsonl")
        show(wanted, {"results": lines}, table(lines))


if __name__ == "__main__":
    main()
