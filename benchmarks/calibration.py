"""Top-1 after calibration without training: the default and alternatives.

    python benchmarks/calibration.py --model torchvision/squeezenet1_1 --weights FILE --data imagenette --out results
    python benchmarks/calibration.py ... --out results --table

`--data` has train/ for calibration and val/ for evaluation; `--also` adds folders of images to evaluate. Each variant
at each bit-width is a line of `OUT/calibration.jsonl`; existing lines are not measured again. First and last layers are
at 8 bits, as in the tool's default.
"""

from pathlib import Path
from typing import Any

import torch
from common import add_json, append, parser, read, show

from saqcli.cli.options import parse_assignments, parse_numbers
from saqcli.config import RunConfig, resolve
from saqcli.data.loaders import read_all
from saqcli.data.splits import open_named, validation_loader
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.calibration import calibrate, install_quantizers
from saqcli.pipelines.quantize import prepare
from saqcli.pipelines.setup import classes_of
from saqcli.progress import SILENT
from saqcli.quant.calibration import reestimate_batch_norms
from saqcli.training.loop import evaluate

# Changes of the settings; `bn` is a re-estimation of batch norms that the tool does not offer.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lsq": {"quantization.quantizer": "lsq"},
    "lsq_plus": {"quantization.quantizer": "lsq_plus"},
    "tensor": {"quantization.granularity": "tensor"},
    "zero grid": {"quantization.weight_grid": "zero"},
    "bias": {"quantization.correct_bias": True},
    "bn": {"quantization.recalibrate_bn": True},
    "bias, bn": {"quantization.correct_bias": True, "quantization.recalibrate_bn": True},
    "lsq_plus, bias": {"quantization.quantizer": "lsq_plus", "quantization.correct_bias": True},
    "weight norm": {"quantization.weight_normalization": True},
    "weight norm, bn": {"quantization.weight_normalization": True, "quantization.recalibrate_bn": True},
    "bn anew, training view": {"bn": "training"},
    "bn anew, evaluation view": {"bn": "evaluation"},
    "16 images": {"data.calibration_images": 16},
    "64 images": {"data.calibration_images": 64},
    "16 images, bias": {"data.calibration_images": 16, "quantization.correct_bias": True},
    "64 images, bias": {"data.calibration_images": 64, "quantization.correct_bias": True},
}


class Bench:
    """A network with its images, which are read once."""

    def __init__(self, wanted: Any) -> None:
        self.options = {
            "model.name": wanted.model,
            "model.weights": wanted.weights,
            "model.kwargs": wanted.model_kwargs and parse_assignments(wanted.model_kwargs, "--model-kwargs"),
            "model.mean": wanted.mean and parse_numbers(wanted.mean, "--mean"),
            "model.std": wanted.std and parse_numbers(wanted.std, "--std"),
            "data.path": wanted.data,
            "data.workers": 0,
            "quantization.correct_bias": False,
            "quantization.recalibrate_bn": False,
        }
        network, images = prepare(self.config({}, "8"), torch.device("cpu"), SILENT)
        self.sets = {"val": read_all(images.validation(), SILENT, "evaluate")}
        classes, preprocessing = classes_of(network.loaded), network.loaded.preprocessing
        for folder in wanted.also:
            section = images.section.model_copy(update={"path": folder})
            split = open_named(section, "val", classes)
            loader = validation_loader(split, preprocessing, section, torch.device("cpu"))
            self.sets[Path(folder).name] = read_all(loader, SILENT, "evaluate")
        self.in_float = self.score(network.model)

    def config(self, variant: dict[str, Any], bits: str) -> RunConfig:
        """The settings of a variant."""
        own = {key: value for key, value in variant.items() if key != "bn"}
        return resolve(options=self.options | {"quantization.bits": bits} | own)

    def score(self, model: torch.nn.Module) -> dict[str, list[float]]:
        """Number of images, top-1 and loss on every set."""
        model.eval()
        found = {}
        for name, batches in self.sets.items():
            with SILENT.task("", 0) as task:
                score = evaluate(model, batches, task, device=torch.device("cpu"))
            found[name] = [score.images, score.top1, score.loss]
        return found

    def measure(self, variant: dict[str, Any], bits: str) -> dict[str, list[float]]:
        """The scores of a variant, calibrated at ``bits``."""
        config = self.config(variant, bits)
        network, images = prepare(config, torch.device("cpu"), SILENT)
        statistics = calibrate(network, images, config, SILENT)
        policy = given_policy(config.quantization, network)
        assert policy is not None
        model = install_quantizers(config, network, policy, statistics, images, SILENT)
        if "bn" in variant:
            loader = images.calibration()
            if variant["bn"] == "training":
                loader = images.training(limit=config.data.calibration_images)
                loader.set_epoch(0)
            reestimate_batch_norms(model, (batch for batch, _ in loader))
        return self.score(model)


def together(scores: dict[str, list[float]]) -> float:
    """Top-1 over the images of all sets."""
    return sum(images * top1 for images, top1, _ in scores.values()) / sum(s[0] for s in scores.values())


def table(lines: list[dict[str, Any]]) -> str:
    """Top-1 over all images, one row per variant, after the float accuracies."""
    text = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        widths = sorted({line["bits"] for line in own if line["bits"]}, reverse=True)
        in_float = next(line["scores"] for line in own if not line["bits"])
        each = {k: round(v[1], 2) for k, v in in_float.items()}
        text += [f"\n{model}: float {together(in_float):.2f} {each}"]
        text += [
            f"| variant | {' | '.join(f'{width} bits' for width in widths)} |\n|--{'|--' * len(widths)}|"
        ]
        for name in dict.fromkeys(line["variant"] for line in own if line["bits"]):
            found = {line["bits"]: together(line["scores"]) for line in own if line["variant"] == name}
            cells = [f"{found[w]:.2f}" if w in found else "" for w in widths]
            text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    """Measure missing results, or print the table."""
    options = parser(__doc__)
    options.add_argument("--model-kwargs")
    options.add_argument("--mean")
    options.add_argument("--std")
    options.add_argument("--also", action="append", default=[])
    options.add_argument("--bits", default="8,6,4")
    options.add_argument("--variants", help="names, separated by semicolons; all of them by default")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--table", action="store_true")
    options.add_argument("--quick", action="store_true", help="the default and the plain variant at 4 bits")
    add_json(options)
    wanted = options.parse_args()
    if wanted.quick:
        wanted.variants, wanted.bits = "plain;bias, bn", "4"
    wanted.out.mkdir(parents=True, exist_ok=True)
    path = wanted.out / "calibration.jsonl"
    if not wanted.table:
        measure_missing(wanted, path)
    if wanted.table or wanted.json:
        show(wanted, {"results": read(path)}, table(read(path)))


def measure_missing(wanted: Any, path: Path) -> None:
    """Measure what has no line in the file at ``path``."""
    done = {(line["model"], line["variant"], line["bits"]) for line in read(path)}
    bench = Bench(wanted)
    names = wanted.variants.split(";") if wanted.variants else list(VARIANTS)
    if (wanted.model, "float", "") not in done:
        append(path, {"model": wanted.model, "variant": "float", "bits": "", "scores": bench.in_float})
    for name in names:
        for bits in wanted.bits.split(","):
            if (wanted.model, name, bits) not in done:
                scores = bench.measure(VARIANTS[name], bits)
                append(path, {"model": wanted.model, "variant": name, "bits": bits, "scores": scores})


if __name__ == "__main__":
    main()
