"""The search of a run, solved again for another budget from the scores that it kept: a part of ``saq search``."""

import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from saqcli.config import RunConfig
from saqcli.errors import ConfigError, Problems
from saqcli.pipelines.bits import check_bits, scheme_of, search_budget, space_of
from saqcli.pipelines.find_bits import BoundSearch, FoundBits, explain_weight_error
from saqcli.pipelines.search import save_search
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.progress import SILENT, Progress
from saqcli.report.search_scores import read_scores
from saqcli.runs.directory import RunDirectory
from saqcli.runs.tracking import check_trackers
from saqcli.searchers import SearchProblem, SearchResult, best_choice
from saqcli.searchers.problem import NO_IMAGES


def check_again(config: RunConfig) -> None:
    """Check the settings of a search that is solved again.

    Raises:
        SaqError: all problems in one message: no budget of cost, or something that needs images.
    """
    section, problems = config.quantization, Problems()
    if section.bops is None and section.size is None:
        problems.add(
            ConfigError("no budget was given: use `quantization.bops=34G`, `quantization.size=5MB`, or both")
        )
    if section.max_drop is not None or section.min_top1 is not None:
        problems.add(
            ConfigError(
                "a budget of accuracy is measured on images, which a search from kept scores does not read: remove "
                "`quantization.max_drop` and `quantization.min_top1`, or search again"
            )
        )
    if config.search.pareto:
        problems.add(
            ConfigError(
                f"`search.pareto={config.search.pareto}` scores configurations on images, which a search from kept "
                "scores does not read: remove it, or search again"
            )
        )
    problems.attempt(check_bits, section, files=False)
    problems.attempt(check_trackers, config.run.track)
    problems.check()


FREE = (
    "bops",
    "size",
    "max_drop",
    "min_top1",
    "bits",
    "policy",
    "cost",
    "candidates",
    "activation_candidates",
    "pins",
    "contents",  # that of the target is compared
)


def check_same_scores(config: RunConfig, source: Path, before: RunConfig) -> None:
    """Check that the kept scores are those of ``config``: what they depend on is as in ``before``, of ``source``.

    Raises:
        ConfigError: names every setting that differs.
    """
    changed = [
        f"{section}.{key}"
        for section in ("model", "data", "quantization")
        for key, value in getattr(before, section)
        if not (section == "quantization" and key in FREE) and getattr(getattr(config, section), key) != value
    ]
    recorded = before.quantization.contents.get("target")
    if config.quantization.contents.get("target") != recorded and "quantization.target" not in changed:
        changed.append("quantization.target")
    changed += ["run.seed"] if config.run.seed != before.run.seed else []
    if changed:
        names = ", ".join(f"`{name}`" for name in changed)
        raise ConfigError(
            f"{source} measured its scores with other {names}: remove {'it' if len(changed) == 1 else 'them'}, or "
            "search again"
        )


def search_again(
    source: Path, config: RunConfig, run_dir: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """Solve the search of the run ``source`` for the budget of ``config``; no data and no weights are read.

    Args:
        source: a run that searched.
        config: that of ``source``, with another budget.
        run_dir: created if missing; gets policy, results and plots as those of a search.
        overwrite: replace the search in ``run_dir``.
        progress: receives notes.

    Returns:
        Plain values, as in JSON.

    Raises:
        SaqError: ``source`` keeps no scores, or the budget is below the smallest reachable cost.
    """
    check_again(config)
    scores = read_scores(RunDirectory.open(source))
    if config.search.weight_error not in (None, scores.weight_error):
        raise ConfigError(
            f"{source} measured its scores with `search.weight_error={scores.weight_error:g}`: remove "
            f"`search.weight_error={config.search.weight_error:g}`, or search again"
        )
    kept = {"weight_error": scores.weight_error}  # by which a new search, as of `saq rerun`, finds the same
    config = config.model_copy(update={"search": config.search.model_copy(update=kept)})
    section = config.model.model_copy(update={"pretrained": False, "weights": None})
    network = wrap_and_trace(load_float(section, SILENT), config.quantization)
    start = time.perf_counter()
    space = space_of(config.quantization, network)
    losses = scores.of(space, str(source))
    asked, budget = search_budget(config.quantization, network, space)
    for line in (*space.outlook(asked), *explain_weight_error(scores.weight_error)):
        progress.note(line)
    space.check_reachable(asked)
    choice = best_choice(space, budget, losses)
    result = SearchResult(choice, lambda other: [best_choice(space, other, losses)], losses=losses)
    problem = SearchProblem(
        network.model,
        space,
        budget,
        scheme_of(config.quantization),
        {},
        NO_IMAGES,
        _no_optimizer,
        weight_error=scores.weight_error,
    )
    found = FoundBits(
        scores.searcher,
        time.perf_counter() - start,
        result,
        BoundSearch(problem, asked, network, network),
    )
    run = RunDirectory.start(run_dir, config, resume=False, overwrite=overwrite, verb="search")
    with run.recorded():
        run.track(config, progress.note)
        results = save_search(found, config, run)
        run.finish(results)
        run.end_search()
    return results


def _no_optimizer(model: nn.Module) -> Optimizer:
    raise AssertionError("nothing is trained")
