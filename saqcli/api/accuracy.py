"""Accuracy as a budget, for the library: bounds as they are given, and a search's result under them."""

import warnings
from dataclasses import replace

from saqcli.errors import AccuracyWarning, ConfigError
from saqcli.progress import SILENT
from saqcli.quant.cost import Budget
from saqcli.report.accuracy import missed_line
from saqcli.searchers import Scorer, SearchProblem, SearchResult
from saqcli.searchers.accuracy import Accuracy, AccuracyBound, keep_accuracy, middle
from saqcli.training.loop import evaluate

__all__ = ["Accuracy", "AccuracyBound", "keep", "middle", "wanted_accuracy", "warn_if_missed"]


def wanted_accuracy(
    budget: int | str | Budget | None, max_drop: float | None, min_top1: float | None
) -> AccuracyBound | None:
    """The bound of accuracy, or None.

    Raises:
        ConfigError: neither it nor a budget, two bounds, or one out of range.
    """
    if max_drop is not None and min_top1 is not None:
        raise ConfigError("`max_drop` and `min_top1` bound the same accuracy: give one of them")
    for name, value in (("max_drop", max_drop), ("min_top1", min_top1)):
        if value is not None and not 0 <= value <= 100:
            raise ConfigError(f"`{name}={value}` is no number of percent: give one from 0 to 100")
    if max_drop is None and min_top1 is None:
        if budget is None:
            raise ConfigError("there is nothing to meet: give `budget`, `max_drop` or `min_top1`")
        return None
    return AccuracyBound(max_drop, min_top1)


def keep(
    bound: AccuracyBound, asked: Budget, problem: SearchProblem, result: SearchResult
) -> tuple[SearchResult, Accuracy]:
    """The result under a bound of accuracy; ``problem`` holds the float network."""
    scorer = Scorer(problem)
    scorer.scored.update({one.choice: one for one in result.scored})
    with SILENT.task("", 0) as task:
        in_float = evaluate(
            problem.model.eval(), problem.images.scoring, task, device=problem.device, shared=True
        )
    drop = bound.drop(in_float.top1)
    met = keep_accuracy(
        problem.space,
        asked,
        result.choice,
        result.propose,
        scorer,
        in_float.top1 - drop,
        result.scored,
        problem.progress,
    )
    kept = Accuracy(bound, drop, in_float.top1, in_float.images, "calibrated", asked, met)
    choice, scored = list(met.kept.choice), list(scorer.scored.values())
    return replace(result, choice=choice, score=scorer, scored=scored), kept


def warn_if_missed(accuracy: Accuracy | None) -> None:
    """Warn the caller of the public function that calls this, with a sentence, if the bound was not met."""
    missed = None if accuracy is None else missed_line(accuracy.to_dict())
    if missed is not None:
        warnings.warn(missed, AccuracyWarning, stacklevel=4)  # this, the function, its wrapper, the caller
