"""Top-1 and loss after short fine-tuning with every method, over seeds.

    python benchmarks/minimizers.py --model saq/resnet20 --weights FILE --data DIR --out results --bits 2,4 --seeds 3

All methods start from the same calibrated network. Every (bits, method, seed) is one line of
``results/results.jsonl``; existing lines are not run again, so the script can be interrupted and restarted. The trained
states are saved in the same folder, for ``saq analyze`` and ``eigenvalues.py``. ``--table`` only prints the existing
results as Markdown, ``--json`` prints them as JSON. ``--quick`` runs QAT and SAQ once, at 4 bits.

``--set`` changes any setting of what all methods start from, such as the quantizer or ``reconstruction.enabled=true``,
and ``--suffix`` says so in the names of the results.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import add_json, append, known, origin, parser, read, show, spread

from saqcli.config import RunConfig, resolve
from saqcli.data.splits import Images
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.quantize import load_teacher, prepare
from saqcli.pipelines.stages import float_network, tensors_before, wanted_stages
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.serialization import replacing
from saqcli.training.loop import NO_MEMORY, score
from saqcli.training.trainer import Trainer

# What is compared: settings of the training section. `NAME xN` trains for N times the epochs.
DISTILL = {"distill": True, "distill_weight": 0.9, "distill_temperature": 4.0}
METHODS: dict[str, dict[str, Any]] = {
    "qat": {"method": "qat"},
    "sam": {"method": "sam"},
    "case1": {"method": "case1"},
    "saq": {"method": "saq"},
    "asaq": {"method": "asaq"},
    "saq weights": {"method": "saq", "perturb": "weights"},
    "saq norms": {"method": "saq", "perturb": "norms"},
    "saq clips": {"method": "saq", "minimizer": {"perturb": ["activation_clips", "weight_clips"]}},
    "saq biases": {"method": "saq", "minimizer": {"perturb": ["biases"]}},
    "saq from 0.8": {"method": "saq", "sharpness_from": 0.8},
    "saq norms from 0.8": {"method": "saq", "perturb": "norms", "sharpness_from": 0.8},
    "saq interval 2": {"method": "saq", "sam_interval": 2},
    "saq norms interval 2": {"method": "saq", "perturb": "norms", "sam_interval": 2},
    "saq norms interval 3": {"method": "saq", "perturb": "norms", "sam_interval": 3},
    "saq norms fraction 0.25": {"method": "saq", "perturb": "norms", "ascent_fraction": 0.25},
    "msam": {"method": "msam"},
    "msam norms": {"method": "msam", "perturb": "norms"},
    "qat x2": {"method": "qat"},
    "qat average": {"method": "qat", "ema_decay": 0.99},
    "qat dampened 0.1": {"method": "qat", "dampening": 0.1},
    "qat dampened 1": {"method": "qat", "dampening": 1.0},
    "qat distilled": {"method": "qat", **DISTILL},
    "qat distilled x2": {"method": "qat", **DISTILL},
    "qat distilled average": {"method": "qat", "ema_decay": 0.99, **DISTILL},
    "qat distilled dampened 1": {"method": "qat", "dampening": 1.0, **DISTILL},
    "qat distilled 0.9, T 1": {"method": "qat", **DISTILL, "distill_temperature": 1.0},
    "qat distilled 0.9, T 2": {"method": "qat", **DISTILL, "distill_temperature": 2.0},
    "qat distilled 0.5, T 1": {"method": "qat", **DISTILL, "distill_weight": 0.5, "distill_temperature": 1.0},
    "qat, lr 0.03": {"method": "qat", "lr": 0.03},
    "qat, lr 0.1": {"method": "qat", "lr": 0.1},
    "qat distilled, lr 0.03": {"method": "qat", "lr": 0.03, **DISTILL},
    "qat distilled 1, T 4": {"method": "qat", **DISTILL, "distill_weight": 1.0},
    "saq distilled": {"method": "saq", **DISTILL},
    "saq norms distilled": {"method": "saq", "perturb": "norms", **DISTILL},
    "saq norms from 0.8 distilled": {"method": "saq", "perturb": "norms", "sharpness_from": 0.8, **DISTILL},
    "msam norms distilled": {"method": "msam", "perturb": "norms", **DISTILL},
    "saq interval 5": {"method": "saq", "sam_interval": 5},
    "saq interval 5, reuse 0.7": {"method": "saq", "sam_interval": 5, "sam_reuse": 0.7},
    "saq fraction 0.25": {"method": "saq", "ascent_fraction": 0.25},
    "saq fraction 0.25, bfloat16": {
        "method": "saq",
        "ascent_fraction": 0.25,
        "ascent_precision": "bfloat16",
    },
}


class LastLoss:
    """A training run that keeps nothing but the training loss of its last epoch."""

    loss = 0.0

    def offer(self, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        """Nothing is saved."""

    def log(self, **values: Any) -> None:
        """Keep the loss."""
        if values["phase"] == "train":
            self.loss = values["loss"]

    def check_signal(self) -> None:
        """Signals are raised as usual."""


def run(config: RunConfig, prepared: "Prepared") -> tuple[dict[str, float], dict[str, Any]]:
    """Train from the calibrated state; figures and the state at the end."""
    model, images = prepared.network.model, prepared.images(config)
    model.load_state_dict(prepared.initial)
    start = time.perf_counter()
    trained = LastLoss()
    Trainer(
        model,
        images.training(),
        config.training,
        num_classes=prepared.network.loaded.num_classes,
        image_size=max(images.preprocessing.input_size[1:]),
        run=trained,
        teacher=prepared.teacher if config.training.distill else None,
    ).fit()
    seconds = time.perf_counter() - start
    found = score(model, images.validation(), "", prepared.device, SILENT)
    figures = {"top1": found.top1, "loss": found.loss, "train_loss": trained.loss, "seconds": seconds}
    return figures, {name: value.clone() for name, value in model.state_dict().items()}


class Prepared:
    """A network, calibrated at given bits, and what it is trained with."""

    def __init__(self, wanted: argparse.Namespace, bits: str) -> None:
        self.wanted = wanted
        self.options = {
            "model.name": wanted.model,
            "model.weights": wanted.weights,
            "data.path": wanted.data,
            "quantization.bits": bits,
            "training.epochs": wanted.epochs,
            "training.lr": wanted.lr,
            "training.rho": wanted.rho,
            "training.compile": wanted.compile,
            "training.precision": wanted.precision,
        }
        self.assigned = dict(text.split("=", 1) for text in wanted.assign or [])
        self.device = pick_device(wanted.device)
        base = resolve(options=self.options, assignments=self.assigned)
        self.network, self._images = prepare(base, self.device, SILENT)
        statistics_ = calibrate(self.network, self._images, base, SILENT)
        policy = given_policy(base.quantization, self.network)
        assert policy is not None
        before = tensors_before(base, self.network.model)
        model = install_quantizers(base, self.network, policy, statistics_, self._images, SILENT)
        for stage in wanted_stages(base).values():
            in_float = float_network(model, before["float"])
            stage(base, model, in_float, self._images, NO_MEMORY, SILENT)
        self.initial = {name: value.clone() for name, value in self.network.model.state_dict().items()}
        self.teacher = load_teacher(
            base.model_copy(update={"training": base.training.model_copy(update={"distill": True})}),
            self.device,
            SILENT,
        )

    def config(self, name: str, seed: int) -> RunConfig:
        """The settings of one run."""
        settings = json.loads(name) if name.startswith("{") else METHODS[name]
        changes = {f"training.{key}": value for key, value in settings.items()}
        changes["training.epochs"] = epochs_of(self.wanted, name)
        return resolve(options=self.options | changes | {"run.seed": seed}, assignments=self.assigned)

    def images(self, config: RunConfig) -> Images:
        """Fed as ``config`` says."""
        opened = self._images
        return Images(
            opened.train, opened.val, opened.preprocessing, config.data, self.device, config.run.seed
        )


def epochs_of(wanted: argparse.Namespace, method: str) -> int:
    """Epochs of a method: those of the options, N times for ``NAME xN``."""
    longer = re.search(r" x(\d+)$", method)
    return int(wanted.epochs) * (int(longer[1]) if longer else 1)


def key_of(wanted: argparse.Namespace, bits: str, method: str, seed: int) -> dict[str, Any]:
    """What makes a run, as it stands in its line."""
    return {
        "model": wanted.model,
        "bits": bits,
        "name": method + (f", {wanted.suffix}" if wanted.suffix else ""),
        "seed": seed,
        "epochs": epochs_of(wanted, method),
        "lr": wanted.lr,
        "precision": wanted.precision,
    }


def state_path(wanted: argparse.Namespace, key: dict[str, Any]) -> Path:
    """Where the trained state of a run lies."""
    parts = (re.sub(r"[^\w.]+", "_", str(value)).strip("_") for value in key.values())
    path: Path = wanted.out / f"{'-'.join(parts)}.pt"
    return path


def measure(wanted: argparse.Namespace) -> None:
    """Run what has not been run yet."""
    results = wanted.out / "results.jsonl"
    chosen = wanted.methods.split(";") if wanted.methods else list(METHODS)
    for bits in wanted.bits.split(","):
        prepared = Prepared(wanted, bits)
        for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
            for method in chosen:
                key = key_of(wanted, bits, method, seed)
                if known(results, key):
                    continue
                figures, state = run(prepared.config(method, seed), prepared)
                line = {**origin(wanted), **key, "compile": wanted.compile, **figures}
                with replacing(state_path(wanted, key)) as path:
                    torch.save(state, path)
                append(results, line)


def table(lines: list[dict[str, Any]], eigenvalues: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    rows = [
        "| bits | method | seeds | top-1 | loss | top-1 above qat, seed by seed | largest eigenvalue |",
        "|--|--|--|--|--|--|--|",
    ]
    for bits in sorted({line["bits"] for line in lines}):
        names = dict.fromkeys(line["name"] for line in lines if line["bits"] == bits)
        of = {name: {r["seed"]: r for r in lines if (r["bits"], r["name"]) == (bits, name)} for name in names}
        for name, runs in of.items():
            shared = sorted(set(runs) & set(of.get("qat", {})))
            gains = [runs[seed]["top1"] - of["qat"][seed]["top1"] for seed in shared]
            sharp = [r["eigenvalue"] for r in eigenvalues if (r["bits"], r["name"]) == (bits, name)]
            rows.append(
                f"| {bits} | {name} | {len(runs)} | {spread([r['top1'] for r in runs.values()], 2)} | "
                f"{spread([r['loss'] for r in runs.values()], 4)} | {spread(gains, 2)} | {spread(sharp, 1)} |"
            )
    return "\n".join(rows)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of this script and of ``eigenvalues.py``."""
    made = parser(description)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--bits", default="2,4")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--epochs", type=int, default=1)
    made.add_argument("--lr", type=float, default=0.005)
    made.add_argument("--rho", type=float, help="of all methods; by default the paper's for the bits")
    made.add_argument("--methods", help="names or JSON objects of training settings, with semicolons")
    made.add_argument(
        "--set", dest="assign", action="append", help="any setting of the start, SECTION.KEY=VALUE"
    )
    made.add_argument("--suffix", default="", help="in the names of the results")
    made.add_argument("--device", default="auto")
    made.add_argument("--compile", default="kernels", help="as of saq quantize")
    made.add_argument("--precision", default="float32", help="as of saq quantize")
    return made


def main() -> None:
    """Measure, or print the table."""
    options = arguments(__doc__)
    options.add_argument("--table", action="store_true")
    options.add_argument("--quick", action="store_true")
    add_json(options)
    wanted = options.parse_args()
    if wanted.quick:
        wanted.bits, wanted.seeds, wanted.methods = "4", 1, "qat;saq"
    if not wanted.table:
        wanted.out.mkdir(parents=True, exist_ok=True)
        measure(wanted)
    asked = {"model": wanted.model, "precision": wanted.precision}
    lines, eigenvalues = (
        [line for line in read(wanted.out / name) if asked.items() <= line.items()]
        for name in ("results.jsonl", "eigenvalues.jsonl")
    )
    show(wanted, {"results": lines, "eigenvalues": eigenvalues}, table(lines, eigenvalues))


if __name__ == "__main__":
    main()
