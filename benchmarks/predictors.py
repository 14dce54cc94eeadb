"""Which score of a configuration predicts its accuracy after fine-tuning: rank correlations over random configurations.

    python benchmarks/predictors.py --model saq/resnet20 --weights FILE --data DIR --out results --configurations 30

Random configurations that use the budget, and those that searchers find, are scored, calibrated and fine-tuned in the
same way. Scores are sums of losses of single operands (``error``, ``fisher``, ``hawq``, ``sensitivity``, and
``fitted``: ``fisher`` with the factors that ``swaps`` fits to its starts) and figures of the calibrated network on
held-out training images (``divergence``, ``loss``, ``top-1``); *half the error* are the same with half the quantization
error of weights, as searches compare configurations that are to be trained. They are compared with top-1 and loss on
the test images, before and after fine-tuning, by Spearman's rank correlation; 1 is a perfect prediction. Every
configuration is one line of ``results/results.jsonl``; existing lines are not run again. With ``--trained FILE``
the accuracy of configurations that are in that file is taken from there, and only scores are measured.
"""

import argparse
import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from common import add_json, append, origin, parser, read, show
from scipy.stats import spearmanr
from searchers import Bench

from saqcli.pipelines.bits import TO_BE_TRAINED
from saqcli.pipelines.find_bits import bind_search, request_search
from saqcli.progress import SILENT
from saqcli.searchers.divergences import add_divergences, divergences
from saqcli.searchers.fit import fitted
from saqcli.searchers.hawq import HAWQ
from saqcli.searchers.knapsack import Sampler, best_choice
from saqcli.searchers.problem import SearchProblem
from saqcli.searchers.sensitivity import Sensitivity
from saqcli.searchers.separable import Losses, relative_noise
from saqcli.searchers.supernet import Comparison, Scorer
from saqcli.searchers.swaps import simple_choices
from saqcli.searchers.uniforms import untied_uniforms

# Higher is worse in all of them.
HALF = ", half the error"
SUMS = ("error", "fisher", f"fisher{HALF}", "fitted", f"fitted{HALF}", "hawq", "sensitivity")
MEASURED = ("divergence", f"divergence{HALF}", "held-out loss", "held-out top-1")
FIGURES = ("calibrated", "top1", "loss", "train_seconds")


def sums(problem: SearchProblem, scorer: Scorer) -> dict[str, Losses]:
    """The losses of every option by score."""
    hawq = HAWQ()
    return {
        "error": relative_noise(problem),
        **from_divergences(problem, scorer),
        "hawq": hawq.losses(problem, hawq.traces(problem)),
        "sensitivity": Sensitivity().losses(fresh(problem)),
    }


def from_divergences(problem: SearchProblem, scorer: Scorer, suffix: str = "") -> dict[str, Losses]:
    """The sums of ``fisher``, and those fitted to the starts of ``swaps``."""
    space, alone = problem.space, divergences(problem, 64)
    fisher = add_divergences(space, alone)
    starts = simple_choices(space, problem.budget, fisher, relative_noise(problem))
    return {
        f"fisher{suffix}": fisher,
        f"fitted{suffix}": fitted(space, alone, [scorer(choice) for choice in starts]),
    }


def fresh(problem: SearchProblem) -> SearchProblem:
    """With a network of its own: some searchers install quantizers in it."""
    return dataclasses.replace(problem, model=copy.deepcopy(problem.model))


def measure(wanted: argparse.Namespace) -> None:
    """Score and train what is missing."""
    bench, results = Bench(wanted), wanted.out / "results.jsonl"
    config = bench.config(wanted.budget, "swaps", 0)
    request = request_search(config, bench.network, bench.images(config), SILENT)
    problem = bind_search(config, request, bench.statistics, SILENT).problem
    problem = dataclasses.replace(problem, weight_error=1.0)
    space, budget = problem.space, problem.budget
    half = dataclasses.replace(problem, weight_error=TO_BE_TRAINED)
    scorer, of_half = Scorer(problem), Comparison(half)
    losses = sums(problem, scorer) | from_divergences(half, of_half, HALF)
    drawn = Sampler(space, budget, torch.Generator().manual_seed(0)).draw_distinct(wanted.configurations)
    kinds = [("random", choice) for choice in drawn]
    kinds += [(name, best_choice(space, budget, each)) for name, each in losses.items()]
    kinds += [("untied", choice) for choice in untied_uniforms(space, budget)]
    asked = {"budget": wanted.budget, "epochs": wanted.epochs, "lr": wanted.lr}
    known = read(wanted.trained) if wanted.trained else []
    same = {**asked, "model": wanted.model}
    trained = {tuple(line["choice"]): line for line in known if same.items() <= line.items()}
    done = {tuple(line["choice"]) for line in read(results) if asked.items() <= line.items()}
    for kind, choice in kinds:
        if tuple(choice) in done:
            continue
        done.add(tuple(choice))
        scored, before = scorer(choice), trained.get(tuple(choice))
        line = {
            **origin(wanted),
            "kind": kind,
            **asked,
            "choice": list(choice),
            "bops": space.cost(choice).bops,
            **{
                name: sum(row[option] for row, option in zip(each, choice, strict=True))
                for name, each in losses.items()
            },
            "divergence": scored.divergence,
            f"divergence{HALF}": of_half(choice).divergence,
            "held-out loss": scored.loss,
            "held-out top-1": scored.top1,
            **({name: before[name] for name in FIGURES} if before else bench.train(space.config(choice), 0)),
        }
        append(results, line)


def correlations(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Rank correlation of every score with what it should predict, among random configurations and among all."""
    found = {}
    for name in (*SUMS, *MEASURED):
        sign = -1 if name == "held-out top-1" else 1
        row = {}
        for among, rows in (("random", [r for r in lines if r["kind"] == "random"]), ("all", lines)):
            values = [sign * r[name] for r in rows]
            for of, better in (("calibrated", -1), ("top1", -1), ("loss", 1)):
                row[f"{among} {of}"] = float(spearmanr(values, [better * r[of] for r in rows]).statistic)
        found[name] = row
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """As Markdown."""
    random = sum(line["kind"] == "random" for line in lines)
    heads = [f"{of} ({among})" for among in ("random", "all") for of in ("calibrated top-1", "top-1", "loss")]
    rows = [
        f"{random} random configurations, {len(lines)} in all",
        "",
        f"| score | {' | '.join(heads)} |",
        "|--|" + "--|" * len(heads),
    ]
    for name, row in correlations(lines).items():
        rows.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    return "\n".join(rows)


def main() -> None:
    """Measure, or print the table."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--budget", default="w3a3")
    options.add_argument("--configurations", type=int, default=30)
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--lr", type=float, default=0.01)
    options.add_argument("--method", default="qat")
    options.add_argument("--set", dest="assign", action="append", help="any setting")
    options.add_argument(
        "--trained", type=Path, help="results with the accuracy of configurations after training"
    )
    options.add_argument("--table", action="store_true")
    options.add_argument("--quick", action="store_true", help="4 configurations, not trained")
    add_json(options)
    wanted = options.parse_args()
    wanted.proxy = None
    if wanted.quick:
        wanted.configurations, wanted.epochs = 4, 0
    if not wanted.table:
        wanted.out.mkdir(parents=True, exist_ok=True)
        measure(wanted)
    lines = read(wanted.out / "results.jsonl")
    show(wanted, {"results": lines, "correlations": correlations(lines)}, table(lines))


if __name__ == "__main__":
    main()
