"""Milliseconds as a budget: are the files that a search by a table of costs finds faster, and how exact is the table?

    OMP_NUM_THREADS=1 python benchmarks/latency.py --model saq/resnet20 --weights FILE --data cifar10
    OMP_NUM_THREADS=1 python benchmarks/latency.py --model saq/resnet20 --random --style ort-vnni

`saq profile --measure --target ort-cpu` measures every layer. Then bits are searched under budgets between the cheapest
bits of the table and 8 bits everywhere, and these files are exported, proved and timed in turns, beside float and
8 bits. The column `table` is what the table says of a file; `file` is the median of the rounds, `least` their minimum,
both of processor time on one thread, on which other work on the machine has little influence.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from common import facts, in_turns, show
from targets import Files, export_float, file_options, opened, session, top1

import saqcli as saq
from saqcli.api.arguments import space_for, widths_of
from saqcli.api.budgets import priced
from saqcli.cli.options import parse_assignments
from saqcli.config import ModelSection, QuantizationSection
from saqcli.pipelines.latency.measure import LatencySettings, measure_latency
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.quant.convert import Scheme
from saqcli.target import find_deployment

TARGET = "ort-cpu"
WEIGHTS, INPUTS = (4, 5, 6, 7, 8), (4, 8)  # candidates
PS = 1e9  # picoseconds of a millisecond, the unit in which tables of times are counted


def main() -> None:
    """Measure one network."""
    options = file_options(__doc__, rounds=50)
    options.add_argument("--style", default="ort")
    options.add_argument("--widths", default="w8a8,w7a8,w4a8,w8a4,w4a4", help="of the table")
    options.add_argument("--shares", default="0,0.25,0.5,0.75", help="budgets, from the cheapest to w8a8")
    wanted = options.parse_args()
    net, size, calibration, labelled = opened(wanted)
    more = parse_assignments(wanted.model_kwargs, "--model-kwargs") if wanted.model_kwargs else {}
    place = find_deployment(TARGET)
    section = ModelSection(
        name=wanted.model, weights=wanted.weights, pretrained=not wanted.random, kwargs=more
    )
    network = wrap_and_trace(load_float(section, SILENT), QuantizationSection(target=TARGET))
    settings = LatencySettings(tuple(wanted.widths.split(",")), wanted.style, repeats=wanted.rounds)
    latency = measure_latency(network, settings, SILENT, Scheme(weight_grid="zero", target=TARGET), place)
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        root, files, rows = Path(folder), Files(), dict[str, dict[str, Any]]()
        table = root / "cpu.json"
        latency.write(table)
        costs = priced(network.costs, str(table))
        candidates = widths_of(WEIGHTS, INPUTS, place)
        space = space_for(network.name, costs, candidates, {}, place)
        eight = costs.cost(space_for(network.name, costs, widths_of((8,)), {}, place).config([])).bops
        files.add("float", root / "float.onnx", lambda path: export_float(net, wanted.model, size, path))
        rows["float"] = {"table_ms": latency.sums["float"]}
        budgets: dict[str, int | None] = {"w8a8": None}
        budgets |= {
            f"budget {float(share):.0%}": int(space.floor.bops + float(share) * (eight - space.floor.bops))
            for share in wanted.shares.split(",")
        }
        for name, budget in budgets.items():
            bits: Any = {"bits": "w8a8"}
            if budget is not None:
                found = saq.search(
                    net,
                    saq.Budget(bops=budget),
                    list(calibration.split(16)),
                    candidates=WEIGHTS,
                    activation_candidates=INPUTS,
                    cost=str(table),
                    target=TARGET,
                    weight_grid="zero",
                )
                bits = {"policy": found.policy}
            quantized = saq.quantize_model(
                net, **bits, calibration=list(calibration.split(16)), target=TARGET, weight_grid="zero"
            )
            policy = saq.bits(quantized)
            path = root / f"{len(rows)}.onnx"
            files.add(
                name,
                path,
                partial(saq.export_onnx, quantized, style=wanted.style, verify=[calibration[:16]]),
            )
            counts: dict[str, int] = {}
            for each in policy.layers.values():
                counts[str(each)] = counts.get(str(each), 0) + 1
            rows[name] = {
                "budget_ms": None if budget is None else budget / PS,
                "table_ms": costs.cost(policy).bops / PS,
                "layers": counts,
            }
        image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).numpy()
        steps = {
            name: partial(session(path).run, None, {"images": image}) for name, path in files.paths.items()
        }
        in_turns(steps, 3)
        times = in_turns(steps, wanted.rounds, "processor")
        for name, path in files.paths.items():
            rows[name] |= {
                "median_ms": round(1e3 * statistics.median(times[name]), 3),
                "least_ms": round(1e3 * min(times[name]), 3),
                "size_bytes": path.stat().st_size,
                "top1": top1(path, labelled) if labelled else None,
            }
    result = facts("latency") | {
        "model": wanted.model,
        "style": wanted.style,
        "rounds": wanted.rounds,
        "images": sum(len(labels) for _, labels in labelled),
        "onnxruntime": ort.__version__,
        "measured": latency.to_dict(),
        "files": rows,
        "errors": files.errors,
    }
    show(wanted, result, table_of(result))


def table_of(found: dict[str, Any]) -> str:
    """Rows of Markdown."""
    lines = ["| file | layers | budget | table | file | least | size | top-1 |", "|--" * 8 + "|"]
    for name, row in found["files"].items():
        if name in found["errors"]:
            continue
        layers = ", ".join(f"{count} {bits}" for bits, count in row.get("layers", {}).items())
        budget = row.get("budget_ms")
        cells = [f"{row[key]:.3f}" for key in ("table_ms", "median_ms", "least_ms")]
        score = "" if row["top1"] is None else f"{row['top1']:.2f}"
        lines.append(
            f"| {name} | {layers} | {'' if budget is None else f'{budget:.3f}'} | {' | '.join(cells)} | "
            f"{row['size_bytes'] / 1e6:.2f} MB | {score} |"
        )
    return "\n".join([*lines, *(f"no {name}: {reason}" for name, reason in found["errors"].items())])


if __name__ == "__main__":
    main()
