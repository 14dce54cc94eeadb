"""The front of accuracy over cost: which of a search's configurations are Pareto-optimal.

One configuration dominates another if it costs no more and is no worse, and is better in one of the two. Cost is what
the search had a budget for: BOPs, bytes, or both, in which case both count. Better means a higher top-1, or an equal
top-1 and a lower loss. The front contains all configurations that no other dominates; equal ones are all in it.

All figures are those of the network that fine-tuning starts from, on the scoring images of the search: they compare
configurations, and are not the accuracy after training.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import nn

from saqcli._version import __version__
from saqcli.progress import SILENT
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.quant.cost import Budget, Cost
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.problem import Scored, ScoreOf, SearchProblem, SearchResult
from saqcli.searchers.supernet import Scorer
from saqcli.serialization import write_text
from saqcli.training.loop import evaluate

Result = tuple[Cost, float, float]  # cost, top-1, loss
Choice = tuple[int, ...]  # one option index per decision
Kind = Literal["sampled", "uniform", "proposed", "chosen"]
FLOOR_MARGIN = 0.01  # relative distance of the smallest budget from the floor, where only one choice fits
COLUMNS = (
    "kind", "budget_bops", "budget_bytes", "bops", "size_bytes", "top1", "loss", "on_front",
    "mean_weight_bits", "mean_activation_bits",
)  # fmt: skip


class Point(BaseModel):
    """A configuration, its cost and its score.

    Attributes:
        kind: origin: ``sampled`` during the search, ``uniform`` bits, ``proposed`` by the searcher for a budget, or
            ``chosen`` as the policy; independent of ``on_front``.
        budget_bops: BOPs of the budget that it was proposed or chosen for, the smallest of several; None without such a
            bound.
        budget_bytes: bytes of that budget; None without such a bound.
        bops: bit-operations for one image.
        size_bytes: of the model.
        top1: percent, on the scoring images of the search.
        loss: mean cross-entropy on the same images.
        on_front: whether no other point dominates it.
        layers: bits by name, in execution order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Annotated[Kind, BeforeValidator(lambda kind: "proposed" if kind == "front" else kind)]
    budget_bops: int | None = None
    budget_bytes: int | None = None
    bops: int
    size_bytes: int
    top1: float
    loss: float
    on_front: bool
    layers: dict[str, LayerBits]

    @property
    def cost(self) -> Cost:
        """BOPs and bytes."""
        return Cost(self.bops, self.size_bytes)


class Front(BaseModel):
    """Content of ``pareto.json``: all points of a search in ascending order of cost.

    Attributes:
        schema_version: of the file format.
        saq_version: of the saq that wrote it.
        model: canonical name of the network.
        searcher: name in ``SEARCHERS``.
        budget_bops: of the search; None without such a bound.
        budget_bytes: of the search; None without such a bound.
        images: number of scoring images.
        float_top1: percent, of the float model; None if unknown.
        macs: multiply-accumulates of every layer for one image; mean bits are weighted by them.
        points: the distinct configurations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    saq_version: str
    model: str
    searcher: str
    budget_bops: int | None
    budget_bytes: int | None
    images: int
    float_top1: float | None
    macs: dict[str, int]
    points: list[Point]

    def to_json(self) -> str:
        """The text of ``pareto.json``, one line per point."""
        head = self.model_dump_json(exclude={"points"}).removesuffix("}")
        points = ",\n".join(f"    {point.model_dump_json()}" for point in self.points)
        return f'{head},\n  "points": [\n{points}\n  ]\n}}\n'


def front_of(
    problem: SearchProblem,
    found: SearchResult,
    count: int,
    searcher: str,
    model: nn.Module,
    widths: Sequence[int],
) -> Front:
    """The front of a search, all its points calibrated.

    Args:
        problem: as for ``find_front``.
        found: as in ``find_front``.
        count: as in ``find_front``.
        searcher: as in ``find_front``.
        model: the network that was searched, in floating point.
        widths: as for ``find_front``.
    """
    score = found.score
    if score is None:
        score = Scorer(replace(problem, model=model))
    with SILENT.task("", 0) as task:
        in_float = evaluate(model.eval(), problem.images.scoring, task, device=problem.device)
    return find_front(problem, found, count, searcher, score, widths, in_float.top1)


def find_front(
    problem: SearchProblem,
    found: SearchResult,
    count: int,
    searcher: str,
    score: ScoreOf,
    widths: Sequence[int],
    float_top1: float | None = None,
) -> Front:
    """Proposals of the search over its whole range, with all configurations it scored and uniform bits.

    A configuration whose loss is NaN or infinite is omitted, and a note reports it.

    Args:
        problem: of the search.
        found: result of the search.
        count: number of budgets in addition to that of the problem.
        searcher: name in ``SEARCHERS``.
        score: scores a configuration; the same function that ``found.scored`` comes from.
        widths: bits of the uniform configurations.
        float_top1: percent, on the scoring images.
    """
    space = problem.space
    kinds, requested = _landmarks(problem, found, count, widths)
    scored = {one.choice: one for one in found.scored}
    images = sum(len(labels) for _, labels in problem.images.scoring)
    with problem.progress.task("scoring the front", len(kinds)) as task:
        for choice in kinds:
            scored[choice] = score(choice)
            task.advance(images=images, top1=scored[choice].top1)
    known = [one for one in scored.values() if math.isfinite(one.loss) and math.isfinite(one.top1)]
    if len(known) < len(scored):
        problem.progress.note(f"not on the front: {len(scored) - len(known)} whose loss is NaN or infinite")
    return Front(
        saq_version=__version__,
        model=space.model,
        searcher=searcher,
        budget_bops=problem.budget.bops,
        budget_bytes=problem.budget.size,
        images=images,
        float_top1=float_top1,
        macs={layer.name: layer.macs for layer in space.costs.layers},
        points=_points(space, known, kinds, requested, problem.budget),
    )


def _landmarks(
    problem: SearchProblem, found: SearchResult, count: int, widths: Sequence[int]
) -> tuple[dict[Choice, Kind], dict[Choice, Budget]]:
    """Configurations to score in addition, with their kind (the more specific of two), and their budgets."""
    space = problem.space
    kinds: dict[Choice, Kind] = {}
    requested: dict[Choice, Budget] = {}
    for bits in widths:
        kinds[tuple(space.nearest(LayerBits(weight=bits, activation=bits)))] = "uniform"
    for budget in [*budgets(space, problem.budget, count), problem.budget]:
        for choice in found.propose(budget):
            kinds[tuple(choice)] = "proposed"
            requested.setdefault(tuple(choice), budget)
    kinds[tuple(found.choice)], requested[tuple(found.choice)] = "chosen", problem.budget
    return kinds, requested


def budgets(space: SearchSpace, budget: Budget, count: int) -> list[Budget]:
    """Budgets from just above the floor to the ceiling, evenly spaced in their logarithm, ascending.

    They bound the same units as ``budget``; BOPs if that bounds none. If it bounds both, each budget is at the same
    fraction of the logarithmic range from floor to ceiling in BOPs and in bytes. The ratio of the problem's own two
    bounds is not kept: it could leave the range of one immediately. Duplicates are removed.
    """
    units = _units(budget)
    found: list[Budget] = []
    for step in range(count):
        way = step / (count - 1) if count > 1 else 1.0
        bounds = {unit: _between(space.floor[unit], space.ceiling[unit], way) for unit in units}
        found.append(Budget(bops=bounds.get(0), size=bounds.get(1)))
    return list(dict.fromkeys(found))


def _between(floor: int, ceiling: int, way: float) -> int:
    """Geometric interpolation from slightly above ``floor`` to ``ceiling``, never outside."""
    least = min(math.ceil(floor * (1 + FLOOR_MARGIN)), ceiling)
    return min(max(round(least ** (1 - way) * ceiling**way), floor), ceiling) if way < 1 else ceiling


def _units(budget: Budget) -> tuple[int, ...]:
    """Indices of the bounded units in a cost."""
    return tuple(index for index, _ in budget.bounds()) or (0,)


def _points(
    space: SearchSpace,
    known: Sequence[Scored],
    kinds: dict[Choice, Kind],
    requested: dict[Choice, Budget],
    budget: Budget,
) -> list[Point]:
    """Points in ascending order of cost; of equal costs the best first."""
    order = sorted(known, key=lambda one: (*one.cost, -one.top1, one.loss, one.choice))
    results = [(one.cost, one.top1, one.loss) for one in order]
    front = pareto_optimal(results, _units(budget))
    return [
        Point(
            kind=kinds.get(one.choice, "sampled"),
            budget_bops=requested.get(one.choice, Budget()).bops,
            budget_bytes=requested.get(one.choice, Budget()).size,
            bops=one.cost.bops,
            size_bytes=one.cost.size,
            top1=one.top1,
            loss=one.loss,
            on_front=index in front,
            layers=space.config(one.choice).layers,
        )
        for index, one in enumerate(order)
    ]


def pareto_optimal(results: Sequence[Result], units: Sequence[int]) -> set[int]:
    """Indices of the results that no other dominates.

    Args:
        results: of configurations.
        units: indices of the cost units to consider.
    """

    def order(index: int) -> tuple[float, ...]:
        cost, top1, loss = results[index]
        return (*(cost[unit] for unit in units), -top1, loss)

    front: list[int] = []
    for index in sorted(range(len(results)), key=order):
        # A dominating result comes earlier, and is on the front or dominated by a result on the front.
        if not any(dominates(results[other], results[index], units) for other in front):
            front.append(index)
    return set(front)


def dominates(one: Result, other: Result, units: Iterable[int]) -> bool:
    """Whether ``one`` costs no more in any unit and is no worse, and is better in at least one respect."""
    costs = [(one[0][unit], other[0][unit]) for unit in units]
    mine, theirs = (one[1], -one[2]), (other[1], -other[2])
    no_worse = mine >= theirs and all(a <= b for a, b in costs)
    return no_worse and (mine > theirs or any(a < b for a, b in costs))


def to_csv(front: Front) -> str:
    """The text of ``pareto.csv``: one line per point, in ascending order of BOPs; mean bits are weighted by MACs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in sorted(front.points, key=lambda point: point.bops):
        means = (f"{mean:.4f}" for mean in mean_bits(point.layers, front.macs))
        on_front = str(point.on_front).lower()
        costs = (point.budget_bops, point.budget_bytes, point.bops, point.size_bytes)
        writer.writerow((point.kind, *costs, repr(point.top1), repr(point.loss), on_front, *means))
    return text.getvalue()


def to_table(front: Front) -> dict[str, Any]:
    """The table of a front that ``saq search`` prints.

    It contains the best proposal for each budget, uniform bits, and all other points of the front, in ascending order
    of cost.
    """
    names = uniform_names(front)
    best: dict[Budget, int] = {}
    for index, point in enumerate(front.points):
        if point.kind in ("proposed", "chosen"):
            budget = Budget(point.budget_bops, point.budget_bytes)
            best[budget] = max(best.get(budget, index), index, key=lambda i: _rank(front.points[i]))
    shown = {*best.values(), *names}
    rows = [
        {
            "budget_bops": point.budget_bops,
            "budget_bytes": point.budget_bytes,
            "bops": point.bops,
            "size_bytes": point.size_bytes,
            "top1": point.top1,
            "on_front": point.on_front,
            "searcher": "uniform" if point.kind == "uniform" else front.searcher,
            "uniform": names.get(index),
            "chosen": point.kind == "chosen",
        }
        for index, point in enumerate(front.points)
        if point.on_front or index in shown
    ]
    return {"images": front.images, "float_top1": front.float_top1, "points": rows}


def _rank(point: Point) -> tuple[bool, float, float]:
    """Higher is better; the chosen point ranks above all proposals."""
    return point.kind == "chosen", point.top1, -point.loss


def write_front(front: Front, folder: Path) -> list[Path]:
    """Write ``pareto.json`` and ``pareto.csv``; returns their paths."""
    written = [folder / "pareto.json", folder / "pareto.csv"]
    for path, text in zip(written, (front.to_json(), to_csv(front)), strict=True):
        write_text(path, text)
    return written


def uniform_names(front: "Front") -> dict[int, str]:
    """Names such as ``w4a4`` by index of the point: the common bits of all layers whose bits vary among the points."""
    layers = [name for name in front.macs if len({point.layers[name] for point in front.points}) > 1]
    names = {}
    for index, point in enumerate(front.points):
        bits = Counter(str(point.layers[name]) for name in layers)
        if bits and (point.kind == "uniform" or len(bits) == 1):
            names[index] = bits.most_common(1)[0][0]
    return names
