"""Accuracy after every stage without labels: calibrated, compensated, reconstructed; by bits and seed.

    python benchmarks/reconstruction.py --model saq/resnet20 --weights FILE --data DIR --bits w4a4,w3a3 --seeds 3 \\
        --out results [OPTIONS OF saq quantize]

Every row is one ``saq quantize --recipe minutes``, as a user runs it, without ONNX files; options that this script does
not know are passed on. Each (network, bits, options, seed) is one line of ``results/results.jsonl``; existing lines are
not run again, and a run that was interrupted is resumed. ``--table`` only prints the existing results as Markdown.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import add_json, append, facts, parser, read, show, spread

STAGES = ("calibrated", "compensated", "reconstructed", "fine-tuned")


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """The result of ``saq quantize``; progress and errors go to a log beside the run."""
    if (folder / "config.json").is_file():
        command = [*command[:4], "--run-dir", str(folder), "--resume", "--json"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {folder.with_suffix('.log')}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def cpu_seconds() -> float:
    """Processor time of all commands so far: unlike wall time, it does not depend on what else runs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def measure(wanted: Any, options: list[str]) -> None:
    """Run what is missing."""
    found = wanted.out / "results.jsonl"
    known = [[line[name] for name in ("model", "bits", "options", "seed")] for line in read(found)]
    for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
        for bits in wanted.bits.split(","):
            kept = [word for word in options if not word.startswith("/")]
            key = [wanted.model, bits, kept, seed]
            if key in known:
                continue
            name = re.sub(r"[^\w.=-]+", "-", "-".join(map(str, [wanted.model, bits, seed, *kept])))[:150]
            folder = wanted.out / "runs" / name
            command = [
                *(
                    sys.executable,
                    "-m",
                    "saqcli",
                    "quantize",
                    wanted.model,
                    "--bits",
                    bits,
                    "--seed",
                    str(seed),
                ),
                *("--recipe", "minutes", "--set", "export.styles=[]", "--run-dir", str(folder), "--json"),
                *(("--weights", wanted.weights) if wanted.weights else ()),
                *(("--data", wanted.data) if wanted.data else ()),
                *options,
            ]
            before = cpu_seconds()
            result = run(command, folder)
            spent = cpu_seconds() - before
            kept_facts = {
                name: facts("reconstruction")[name] for name in ("date", "commit", "cpu", "threads")
            }
            line = dict(zip(("model", "bits", "options", "seed"), key, strict=True))
            line |= {name: result[name] for name in ("float_top1", "bops", "size_bytes", "stages")}
            append(found, line | {"cpu_seconds": spent} | kept_facts)
            if not wanted.keep:
                shutil.rmtree(folder)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row for each network, bits and options; mean and deviation over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["model"], line["bits"], line["options"]]), []).append(line)
    rows = [
        "| network | bits | options | " + " | ".join(STAGES) + " | float | agreement | CPU seconds | seeds |",
        "|" + "--|" * (len(STAGES) + 7),
    ]
    for members in groups.values():
        first = members[0]
        cells = [f"`{first['model']}`", first["bits"], " ".join(first["options"])]
        for stage in STAGES:
            values = [row["top1"] for one in members for row in one["stages"] if row["stage"] == stage]
            cells.append(spread(values, 2) if len(values) > 1 else f"{values[0]:.2f}" if values else "")
        last = [one["stages"][-1] for one in members]
        seconds = [one["cpu_seconds"] for one in members]
        cells += [
            f"{first['float_top1']:.2f}",
            f"{sum(row['agreement'] for row in last) / len(last):.2f}",
            f"{sum(seconds) / len(seconds):.0f}",
            str(len(members)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Parse the options, measure, print the table."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--bits", default="w4a4,w3a3,w2a4,w2a2")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--first-seed", type=int, default=0)
    options.add_argument("--keep", action="store_true", help="keep the run directories")
    options.add_argument("--table", action="store_true")
    options.add_argument("--quick", action="store_true", help="one seed, 4 bits, 20 iterations a block")
    add_json(options)
    wanted, rest = options.parse_known_args()
    if wanted.quick:
        wanted.bits, wanted.seeds, rest = "w4a4", 1, [*rest, "--iterations", "20"]
    if not wanted.table:
        measure(wanted, rest)
    lines = read(wanted.out / "results.jsonl")
    show(wanted, {"results": lines}, table(lines))


if __name__ == "__main__":
    main()
