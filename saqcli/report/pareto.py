"""What accuracy costs: the configurations that a search knows of, and which of them are Pareto-optimal.

One configuration beats another, *dominates* it, if it costs no more and does no worse, and is better in one of the
two. Cost is what the search had a budget for: BOPs, bytes, or both, and then both count. To do better is to have a
higher top-1, and at equal top-1 a lower loss. The front is what nothing dominates; of equals all are on it.

All figures are those of the network that fine-tuning starts from, on the scoring images of the search: they tell
configurations apart, and are not the accuracy after training.
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
from saqcli.search.problem import Found, Scored, ScoreOf, SearchProblem
from saqcli.search.supernet import Scorer
from saqcli.serialization import write_text
from saqcli.training.loop import evaluate

Result = tuple[Cost, float, float]  # cost, top-1, loss
Choice = tuple[int, ...]  # an option's index a decision
Kind = Literal["sampled", "uniform", "proposed", "chosen"]
LITTLE = (
    0.01  # by how much the tightest budget lies above the floor, where one configuration alone would be left
)
COLUMNS = (
    "kind", "budget_bops", "budget_bytes", "bops", "size_bytes", "top1", "loss", "on_front",
    "mean_weight_bits", "mean_activation_bits",
)  # fmt: skip


class Point(BaseModel):
    """A configuration, what it costs and how it did.

    Attributes:
        kind: how it came here: ``sampled`` on the way, ``uniform`` bits, ``proposed`` by the searcher for a budget, or
            ``chosen`` as the policy. Whether it is on the front is another matter.
        budget_bops: that it was proposed or chosen for, the tightest of several; None without such a bound.
        budget_bytes: likewise.
        bops: bit-operations for one image.
        size_bytes: of the model.
        top1: percent, on the scoring images of the search.
        loss: mean cross-entropy there.
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
        """Both parts."""
        return Cost(self.bops, self.size_bytes)


class Front(BaseModel):
    """``pareto.json``: all points of a search, from the cheapest to the dearest.

    Attributes:
        schema_version: of the file format.
        saq_version: that wrote it.
        model: canonical name of the network.
        searcher: name in ``SEARCHERS``.
        budget_bops: of the search, None where there was none.
        budget_bytes: likewise.
        images: that configurations were scored on.
        float_top1: percent, of the float model, None where it is not known.
        macs: multiply-accumulates of every layer for one image; mean bits are weighted by them.
        points: the configurations, each once.
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
        """The text of ``pareto.json``: a line a point."""
        head = self.model_dump_json(exclude={"points"}).removesuffix("}")
        points = ",\n".join(f"    {point.model_dump_json()}" for point in self.points)
        return f'{head},\n  "points": [\n{points}\n  ]\n}}\n'


def front_of(
    problem: SearchProblem, found: Found, count: int, searcher: str, model: nn.Module, widths: Sequence[int]
) -> Front:
    """The front of a search, all its points calibrated.

    Args:
        problem: as for ``find_front``.
        found: likewise.
        count: likewise.
        searcher: likewise.
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
    found: Found,
    count: int,
    searcher: str,
    score: ScoreOf,
    widths: Sequence[int],
    float_top1: float | None = None,
) -> Front:
    """What the search proposes over its whole range, beside all that it scored and beside uniform bits.

    A configuration whose loss is NaN or infinite is left out, and a note says so.

    Args:
        problem: that was solved.
        found: its solution.
        count: budgets to ask for, beside that of the problem.
        searcher: name in ``SEARCHERS``.
        score: how a configuration does; the same as the one that ``found.scored`` comes from.
        widths: bits of the uniform configurations.
        float_top1: percent, on the scoring images.
    """
    space = problem.space
    kinds, asked = _landmarks(problem, found, count, widths)
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
        points=_points(space, known, kinds, asked, problem.budget),
    )


def _landmarks(
    problem: SearchProblem, found: Found, count: int, widths: Sequence[int]
) -> tuple[dict[Choice, Kind], dict[Choice, Budget]]:
    """What is to be scored beside what was, and how it came here, of two ways the more telling one; and the budgets."""
    space = problem.space
    kinds: dict[Choice, Kind] = {}
    asked: dict[Choice, Budget] = {}
    for bits in widths:
        kinds[tuple(space.nearest(LayerBits(weight=bits, activation=bits)))] = "uniform"
    for budget in [*budgets(space, problem.budget, count), problem.budget]:
        for choice in found.propose(budget):
            kinds[tuple(choice)] = "proposed"
            asked.setdefault(tuple(choice), budget)
    kinds[tuple(found.choice)], asked[tuple(found.choice)] = "chosen", problem.budget
    return kinds, asked


def budgets(space: SearchSpace, budget: Budget, count: int) -> list[Budget]:
    """Budgets from just above the floor to the ceiling, evenly spaced in their logarithm, ascending.

    They bound what ``budget`` bounds; nothing bounded means BOPs. Where it bounds both, every one of them lies as
    far on the way from floor to ceiling in BOPs as it does in bytes, as a share of the logarithm. The ratio of the
    problem's own two bounds is not kept: it could leave the range of one at once. Equal budgets come once.
    """
    units = _units(budget)
    found: list[Budget] = []
    for step in range(count):
        way = step / (count - 1) if count > 1 else 1.0
        bounds = {unit: _between(space.floor[unit], space.ceiling[unit], way) for unit in units}
        found.append(Budget(bops=bounds.get(0), size=bounds.get(1)))
    return list(dict.fromkeys(found))


def _between(floor: int, ceiling: int, way: float) -> int:
    """Geometrically between a little above ``floor`` and ``ceiling``, never outside."""
    least = min(math.ceil(floor * (1 + LITTLE)), ceiling)
    return min(max(round(least ** (1 - way) * ceiling**way), floor), ceiling) if way < 1 else ceiling


def _units(budget: Budget) -> tuple[int, ...]:
    """Indices into a cost: what is bounded."""
    return tuple(index for index, _ in budget.bounds()) or (0,)


def _points(
    space: SearchSpace,
    known: Sequence[Scored],
    kinds: dict[Choice, Kind],
    asked: dict[Choice, Budget],
    budget: Budget,
) -> list[Point]:
    """From the cheapest to the dearest; of equally cheap ones the best first."""
    order = sorted(known, key=lambda one: (*one.cost, -one.top1, one.loss, one.choice))
    results = [(one.cost, one.top1, one.loss) for one in order]
    front = undominated(results, _units(budget))
    return [
        Point(
            kind=kinds.get(one.choice, "sampled"),
            budget_bops=asked.get(one.choice, Budget()).bops,
            budget_bytes=asked.get(one.choice, Budget()).size,
            bops=one.cost.bops,
            size_bytes=one.cost.size,
            top1=one.top1,
            loss=one.loss,
            on_front=index in front,
            layers=space.config(one.choice).layers,
        )
        for index, one in enumerate(order)
    ]


def undominated(results: Sequence[Result], units: Sequence[int]) -> set[int]:
    """Indices of the results that no other dominates.

    Args:
        results: of configurations.
        units: indices of the parts of the cost that count.
    """

    def order(index: int) -> tuple[float, ...]:
        cost, top1, loss = results[index]
        return (*(cost[unit] for unit in units), -top1, loss)

    front: list[int] = []
    for index in sorted(range(len(results)), key=order):
        # What dominates comes earlier, and is itself on the front or dominated by something that is.
        if not any(dominates(results[other], results[index], units) for other in front):
            front.append(index)
    return set(front)


def dominates(one: Result, other: Result, units: Iterable[int]) -> bool:
    """Whether ``one`` costs no more in any unit and does no worse, and is better in something."""
    costs = [(one[0][unit], other[0][unit]) for unit in units]
    mine, theirs = (one[1], -one[2]), (other[1], -other[2])
    no_worse = mine >= theirs and all(a <= b for a, b in costs)
    return no_worse and (mine > theirs or any(a < b for a, b in costs))


def to_csv(front: Front) -> str:
    """``pareto.csv``: a line a point, the cheapest in BOPs first; mean bits are weighted by MACs."""
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
    """What ``saq search`` prints of a front: for each budget the best that was proposed for it, uniform bits, and all
    else that is on the front; from the cheapest to the dearest."""
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
    """Higher is better; what was chosen is shown whatever else was proposed."""
    return point.kind == "chosen", point.top1, -point.loss


def write_front(front: Front, folder: Path) -> list[Path]:
    """Write ``pareto.json`` and ``pareto.csv``; their paths."""
    written = [folder / "pareto.json", folder / "pareto.csv"]
    for path, text in zip(written, (front.to_json(), to_csv(front)), strict=True):
        write_text(path, text)
    return written


def uniform_names(front: "Front") -> dict[int, str]:
    """``w4a4`` and the like by index of the point: what all layers have whose bits are not the same in all points."""
    layers = [name for name in front.macs if len({point.layers[name] for point in front.points}) > 1]
    names = {}
    for index, point in enumerate(front.points):
        bits = Counter(str(point.layers[name]) for name in layers)
        if bits and (point.kind == "uniform" or len(bits) == 1):
            names[index] = bits.most_common(1)[0][0]
    return names
