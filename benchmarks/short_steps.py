"""Short steps: what they cost in accuracy, whether files are bit-equal, and how fast these are.

    OMP_NUM_THREADS=1 python benchmarks/short_steps.py --model saq/resnet20 --weights FILE --data DIR [--json]
    ... --bits w2a2 --steps off,3,8 --reconstruct 400

One network is quantized without (``off``) and with steps of N significant bits, on the same images, and optionally
reconstructed. Of each: top-1, agreement with the float network, and a file of style ``qdq``, verified; ``exact`` is
the file of that style without short steps. All files take turns on one thread: medians and minima of the rounds,
relative to ``qdq`` without short steps.
"""

import logging
import statistics
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from common import add_json, facts, in_turns, parser, show
from torch import nn

import saqcli as saq
from saqcli.cli.options import parse_assignments, parse_numbers
from saqcli.errors import SaqError

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def logits_of(model: nn.Module, batches: Batches) -> torch.Tensor:
    """Class scores of all images."""
    model.eval()
    return torch.cat([model(images) for images, _ in batches])


def session(path: Path) -> Any:
    """A session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def export(model: nn.Module, path: Path, style: str, batches: Batches, images: int) -> dict[str, Any]:
    """What the verdict says of a file; of a refused one, why."""
    try:
        verdict = saq.export_onnx(model, path, style, verify=batches, verify_images=images).figures()
    except SaqError as error:
        return {"refused": " ".join(str(error).split())[:300]}
    kept = ("images", "argmax_agreement", "max_abs_diff", "exact_by_construction", "inexact")
    return {name: verdict[name] for name in kept if name in verdict}


def milliseconds(paths: dict[str, Path], size: tuple[int, ...], batch: int, rounds: int) -> dict[str, Any]:
    """Times of all files, in turns."""
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).numpy()
    steps = {name: partial(session(path).run, None, {"images": images}) for name, path in paths.items()}
    for step in steps.values():
        step()
    times = in_turns(steps, rounds)
    base = times.get("off") or next(iter(times.values()))
    return {
        name: {
            "median_ms": round(1e3 * statistics.median(seconds), 3),
            "least_ms": round(1e3 * min(seconds), 3),
            "of_off": round(statistics.median(seconds) / statistics.median(base), 3),
            "of_off_least": round(min(seconds) / min(base), 3),
        }
        for name, seconds in times.items()
    }


def table(found: dict[str, Any]) -> str:
    """Rows of Markdown."""
    rows = [
        "| steps | top-1 | agrees with float | file: best class as PyTorch | largest difference "
        "| exact by construction | ms | times off |",
        "|--" * 8 + "|",
    ]
    for name, row in found["variants"].items():
        file, times = row["file"], row.get("times")
        cells = [name, *(f"{row[key]:.2f}" if key in row else "" for key in ("top1", "agreement"))]
        if "refused" in file:
            cells += ["refused", "", ""]
        else:
            proved = file.get("exact_by_construction")
            cells += [f"{100 * file['argmax_agreement']:.2f}", f"{file['max_abs_diff']:.3g}"]
            cells += ["" if proved is None else "yes" if proved else f"{len(file['inexact'])} places not"]
        cells += [f"{times['median_ms']:.2f}", f"{times['of_off']:.2f}"] if times else ["", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"float {found['float_top1']:.2f}, {found['images']} images", "", *rows])


def main() -> None:
    """Measure one network."""
    options = parser(__doc__)
    options.add_argument("--model-kwargs")
    options.add_argument("--mean")
    options.add_argument("--std")
    options.add_argument("--bits", default="w4a4")
    options.add_argument("--target", help="whose junctions are quantized")
    options.add_argument("--steps", default="off,3", help="significant bits, with commas; off for all")
    options.add_argument("--calibrate", type=int, default=512, help="training images")
    options.add_argument("--images", type=int, default=8000, help="validation images")
    options.add_argument("--verify-images", type=int, default=64)
    options.add_argument("--reconstruct", type=int, default=0, help="iterations a block; 0 for none")
    options.add_argument("--batch-size", type=int, default=1, help="of the times")
    options.add_argument("--rounds", type=int, default=15)
    add_json(options)
    wanted = options.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    more = parse_assignments(wanted.model_kwargs, "--model-kwargs") if wanted.model_kwargs else {}
    net = saq.load_model(
        wanted.model,
        weights=wanted.weights,
        mean=parse_numbers(wanted.mean, "--mean") if wanted.mean else None,
        std=parse_numbers(wanted.std, "--std") if wanted.std else None,
        **more,
    )
    preprocessing = saq.info(net).preprocessing
    assert preprocessing is not None  # of networks by name
    load = partial(saq.load_images, net, wanted.data, batch_size=50, workers=0)
    calibration, labelled = (
        list(load(split, images=count))
        for split, count in (("train", wanted.calibrate), ("val", wanted.images))
    )
    labels = torch.cat([each for _, each in labelled])
    truth = logits_of(net, labelled).argmax(1)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        paths = {}
        for name in wanted.steps.split(","):
            model = saq.quantize_model(
                net,
                wanted.bits,
                calibration=calibration,
                target=wanted.target,
                short_steps=None if name == "off" else int(name),
            )
            if wanted.reconstruct:
                saq.reconstruct(model, calibration, iterations=wanted.reconstruct)
            best = logits_of(model, labelled).argmax(1)
            for row, style in ((name, "qdq"), ("exact", "exact")):
                if row == "exact" and name != "off":
                    continue
                path = Path(folder) / f"{row}.onnx"
                file = export(model, path, style, labelled, wanted.verify_images)
                rows[row] = {"file": file}
                if path.exists():
                    paths[row] = path
            rows[name] |= {
                "top1": 100 * float((best == labels).float().mean()),
                "agreement": 100 * float((best == truth).float().mean()),
            }
        for name, times in milliseconds(
            paths, tuple(preprocessing.input_size), wanted.batch_size, wanted.rounds
        ).items():
            rows[name]["times"] = times
    found = facts("short_steps") | {
        "model": wanted.model,
        "bits": wanted.bits,
        "reconstruct": wanted.reconstruct,
        "images": len(labels),
        "float_top1": 100 * float((truth == labels).float().mean()),
        "variants": rows,
    }
    show(wanted, found, table(found))


if __name__ == "__main__":
    main()
