"""Write the tables of docs/reproduction.md and README.md that come from result files in ``results/``.

    python benchmarks/tables.py

A table stands between two comments, ``<!-- table NAME -->`` and ``<!-- end -->``; what is between them is replaced. A
test compares.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import read
from scipy.stats import spearmanr

from saqcli.units import format_quantity

FOLDER = Path(__file__).parent
PAGES = FOLDER.parent / "docs" / "reproduction.md", FOLDER.parent / "README.md"
IMAGES = {"cifar10": "CIFAR-10", "imagenette": "Imagenette, of 1,000 classes"}
Line = dict[str, Any]
PLAIN = {"--calibration"}  # where images come from is said in the text


def reconstruction() -> str:
    """Accuracy after every stage of ``--recipe minutes`` with its defaults."""
    lines = [
        line for line in read(FOLDER / "results" / "reconstruction.jsonl") if not _variation(line["options"])
    ]
    rows = [
        "| network | float | bits | calibrated | reconstructed | best class of float | CPU seconds | seeds |",
        "|--|--|--|--|--|--|--|--|",
    ]
    before = ""
    for members in _groups(lines, "model", "bits"):
        first = members[0]
        new = first["model"] != before
        before = first["model"]
        rows.append(
            f"| {f'`{before}`' if new else ''} | {first['float_top1']:.2f} | {first['bits']} | {_stages(members)} |"
        )
    return "\n".join(rows)


def variations() -> str:
    """The same with other numbers of images and iterations."""
    lines = read(FOLDER / "results" / "reconstruction.jsonl")
    varied = {(line["model"], line["bits"]) for line in lines if _variation(line["options"])}
    chosen = [line for line in lines if (line["model"], line["bits"]) in varied]
    rows = [
        "| network | bits | options | calibrated | reconstructed | best class of float | CPU seconds | seeds |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for members in sorted(_groups(chosen, "model", "bits", "options"), key=_order):
        first = members[0]
        rows.append(
            f"| `{first['model']}` | {first['bits']} | {_variation(first['options']) or 'defaults'} | "
            f"{_stages(members)} |"
        )
    return "\n".join(rows)


def searches() -> str:
    """Top-1 after calibration alone at every searcher's policy, from ``searchers.py --epochs 0``."""
    rows = [
        "| network, budget | MBOPs | uniform | best untied uniform | error | fisher | swaps | gain | "
        "seconds of error, fisher, swaps |",
        "|--|--|--|--|--|--|--|--|--|",
    ]
    lines = read(FOLDER / "results" / "searches.jsonl")
    for members in _groups(lines, "model", "budget"):
        found = {line["name"]: line for line in members}
        untied = [line for line in members if line["name"].startswith("untied")]
        best = max(untied, key=lambda line: line["calibrated"])
        highest = max(found[name]["calibrated"] for name in ("uniform", best["name"], *SEARCHED))
        shown = found["uniform"], best, *(found[name] for name in SEARCHED)
        texts = [f"{line['calibrated']:.2f}" for line in shown]
        cells = [f"**{text}**" if text == f"{highest:.2f}" else text for text in texts]
        cells[1] += f" ({best['name'].removeprefix('untied ')})"
        seconds = ", ".join(f"{found[name]['cpu_seconds']:.0f}" for name in SEARCHED)
        first, gain = members[0], found["swaps"]["calibrated"] - best["calibrated"]
        rows.append(
            f"| `{first['model']}`, {first['budget']} | {first['budget_bops'] / 1e6:.0f} | {' | '.join(cells)} | "
            f"{gain:+.2f} | {seconds} |"
        )
    return "\n".join(rows)


def searchers() -> str:
    """As ``searches``, of searchers that were run on some networks only, with their processor seconds."""
    rows = [f"| network, budget | {' | '.join((*OTHERS, 'swaps'))} |", "|--|" + "--|" * (len(OTHERS) + 1)]
    for members in _groups(read(FOLDER / "results" / "searches.jsonl"), "model", "budget"):
        found = {line["name"]: line for line in members}
        if found.keys().isdisjoint(OTHERS):
            continue
        cells = [
            f"{found[name]['calibrated']:.2f} ({found[name]['cpu_seconds']:.0f} s)" if name in found else ""
            for name in (*OTHERS, "swaps")
        ]
        rows.append(f"| `{members[0]['model']}`, {members[0]['budget']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def trained() -> str:
    """Top-1 after reconstruction or fine-tuning at every searcher's policy, from ``searchers.py``."""
    rows = [
        "| network, budget | then | best uniform, calibrated | swaps, calibrated | best uniform | "
        f"{' | '.join(TRAINED)} | gain of swaps | seeds |",
        "|--|--|--|--|--|" + "--|" * (len(TRAINED) + 2),
    ]
    for members in _groups(read(FOLDER / "results" / "trained.jsonl"), "model", "budget", "stages", "epochs"):
        first = members[0]
        found: dict[str, list[Line]] = {}
        for line in members:
            found.setdefault(line["name"], []).append(line)
        plain = [name for name in found if name.startswith(("uniform", "untied"))]
        if not plain or "swaps" not in found:
            continue
        best = {
            figure: max(plain, key=lambda name: statistics.mean(line[figure] for line in found[name]))
            for figure in ("calibrated", "top1")
        }
        cells = [
            _mean([line[figure] for line in found[name]]) if name in found else ""
            for figure, names in (
                ("calibrated", (best["calibrated"], "swaps")),
                ("top1", (best["top1"], *TRAINED)),
            )
            for name in names
        ]
        cells[2] += f" ({best['top1'].removeprefix('untied ')})"
        base = {line["seed"]: line["top1"] for line in found[best["top1"]]}
        gains = [line["top1"] - base[line["seed"]] for line in found["swaps"] if line["seed"] in base]
        then = ", ".join([*first["stages"], *([f"{first['epochs']} epochs"] if first["epochs"] else [])])
        cells += [_mean(gains), str(len(gains))]
        rows.append(f"| `{first['model']}`, {first['budget']} | {then} | {' | '.join(cells)} |")
    return "\n".join(rows)


def methods() -> str:
    """Top-1 and loss after fine-tuning with every method, from ``minimizers.py``."""
    rows = [
        "| network | bits | method | seeds | top-1 | loss | top-1 above qat of the same seed | time of qat | "
        "largest eigenvalue |",
        "|--|--|--|--|--|--|--|--|--|",
    ]
    lines, before = read(FOLDER / "results" / "minimizers.jsonl"), ("", "")
    eigenvalues = read(FOLDER / "results" / "eigenvalues.jsonl")
    sharp = {_state(line): line["eigenvalue"] for line in eigenvalues}
    for group in _groups(lines, "model", "bits", "precision"):
        plain = {line["seed"]: line for line in group if line["name"] == "qat"}
        for members in _groups(group, "name"):
            first = members[0]
            key = first["model"], _start(first)
            names = [f"`{key[0]}`" if key[0] != before[0] else "", key[1] if key != before else ""]
            before = key
            longer = re.search(r", \d+ epochs$", first["name"])
            as_long = {
                line["seed"]: line for line in group if longer and line["name"] == f"qat{longer[0]}"
            } or plain
            pairs = [(line, as_long[line["seed"]]) for line in members if line["seed"] in as_long]
            gains = [line["top1"] - base["top1"] for line, base in pairs]
            ratios = [
                line["seconds"] / base["seconds"]
                for line, base in pairs
                if line["seconds"] and base["seconds"]
            ]
            cells = [
                *names,
                first["name"],
                str(len(members)),
                _mean([line["top1"] for line in members]),
                _mean([line["loss"] for line in members], 3),
                _mean(gains) if gains and pairs[0][0] is not pairs[0][1] else "",
                f"{statistics.median(ratios):.2f}" if ratios else "",
                _mean([sharp[_state(line)] for line in members if _state(line) in sharp], 0),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def predictors() -> str:
    """How scores of configurations rank their accuracy, from ``predictors.py``."""
    lines = [line for line in read(FOLDER / "results" / "predictors.jsonl") if line["kind"] == "random"]
    rows = [
        f"| score; {len(lines)} configurations | top-1, calibrated | top-1, fine-tuned | loss, fine-tuned |",
        "|--|--|--|--|",
    ]
    for name in (
        "error",
        "fisher",
        "fisher, half the error",
        "fitted",
        "fitted, half the error",
        "hawq",
        "sensitivity",
        "divergence",
        "divergence, half the error",
        "held-out loss",
        "held-out top-1",
    ):
        sign = -1 if name == "held-out top-1" else 1
        values = [sign * line[name] for line in lines]
        found = [
            spearmanr(values, [better * line[of] for line in lines]).statistic
            for of, better in (("calibrated", -1), ("top1", -1), ("loss", 1))
        ]
        rows.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in found)} |")
    return "\n".join(rows)


def readme() -> str:
    """Whole runs, from ``readme.py``; cells that repeat the row above are empty."""
    rows = [
        "| network, images | options | top-1 | float | BOPs | weights | measured |",
        "|--|--|--|--|--|--|--|",
    ]
    above: list[str] = []
    for line in read(FOLDER / "results" / "readme.jsonl"):
        weights = (format_quantity(line[name], "B") for name in ("size_bytes", "float_size_bytes"))
        costs = (format_quantity(line[name]) for name in ("bops", "float_bops"))
        cells = [
            f"`{line['model']}`, {IMAGES.get(line['data'], line['data'])} ({line['images']:,})",
            f"`{line['options']}`: {line['stage']}"
            + (", no labels" if line["stage"] == "reconstructed" else ""),
            f"{line['top1']:.2f}",
            f"{line['float_top1']:.2f}",
            " of ".join(costs),
            " of ".join(weights),
            line["date"],
        ]
        same = bool(above) and cells[0] == above[0]
        shown = [
            "" if same and k in (0, 3, 4, 5) and cell == above[k] else cell for k, cell in enumerate(cells)
        ]
        rows.append(f"| {' | '.join(shown)} |")
        above = cells
    return "\n".join(rows)


SEARCHED = ("error", "fisher", "swaps")
TRAINED = ("fisher, whole error", "fisher", "swaps, whole error", "swaps")
OTHERS = ("hawq", "random", "samq", "asga")
TABLES: dict[str, Callable[[], str]] = {
    "reconstruction": reconstruction,
    "variations": variations,
    "searches": searches,
    "methods": methods,
    "trained": trained,
    "predictors": predictors,
    "searchers": searchers,
    "readme": readme,
}


def _state(line: Line) -> str:
    """What makes a trained state."""
    return str([line[name] for name in ("model", "bits", "precision", "name", "seed")])


def _start(line: Line) -> str:
    """Bits, and what differs from the usual conditions."""
    return line["bits"] + ("" if line["precision"] == "bfloat16" else f", {line['precision']}")


def _variation(options: list[str]) -> str:
    """Options that change the method, not the network or its images."""
    words, found = iter(options), []
    for word in words:
        if word in PLAIN:
            continue
        value = next(words, "")
        if word == "--iterations":
            found.append(f"{value} iterations")
        elif word == "--set" and value.startswith("data.calibration_images="):
            found.append(f"{value.partition('=')[2]} images")
        elif word not in ("--model-kwargs", "--mean", "--std"):
            found.append(f"{word} {value}".strip())
    return ", ".join(found)


def _order(members: list[Line]) -> tuple[str, str, str, int]:
    first = members[0]
    text = _variation(first["options"])
    number, _, unit = text.partition(" ")
    return first["model"], first["bits"], unit, int(number) if number.isdigit() else 0


def _groups(lines: list[Line], *by: str) -> list[list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(str([line[name] for name in by]), []).append(line)
    return list(found.values())


def _stages(members: list[Line]) -> str:
    """Top-1 when calibrated and reconstructed, agreement, seconds, seeds."""
    stages = {name: [_stage(line, name) for line in members] for name in ("calibrated", "reconstructed")}
    cells = [_mean([stage["top1"] for stage in rows]) for rows in stages.values()]
    agreement = statistics.mean(stage["agreement"] for stage in stages["reconstructed"])
    seconds = statistics.mean(line["cpu_seconds"] for line in members)
    return " | ".join([*cells, f"{agreement:.1f}", f"{seconds:.0f}", str(len(members))])


def _stage(line: Line, name: str) -> Line:
    found: Line = next(stage for stage in line["stages"] if stage["stage"] == name)
    return found


def _mean(values: list[float], digits: int = 2) -> str:
    """With the standard deviation where there are several, or nothing."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def page(text: str) -> str:
    """``text`` with all of its tables written anew."""

    def written(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise SystemExit(f"there is no table {found[1]}: name one of {', '.join(TABLES)}")
        return f"<!-- table {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?\n<!-- end -->", written, text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
