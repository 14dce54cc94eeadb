"""The Pareto front of a search: dominance, budgets and files."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from pydantic import ValidationError
from torch import nn

import tests.support.strategies  # noqa: F401  (the profile)
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.cost import Budget, Cost, cost_model
from saqcli.quant.search_space import Candidates, SearchSpace, search_space
from saqcli.quant.tracer import trace
from saqcli.report.canvas import style
from saqcli.report.front import draw_front, paint_front
from saqcli.report.pareto import (
    COLUMNS,
    Front,
    budgets,
    dominates,
    find_front,
    pareto_optimal,
    to_csv,
    to_table,
    uniform_names,
    write_front,
)
from saqcli.searchers.problem import Scored, SearchImages, SearchProblem, SearchResult
from saqcli.serialization import parse_json
from tests.support.tiny import build

WIDTHS = (2, 3, 4, 8)
BOTH = (0, 1)


def space_of(name: str = "residual", widths: tuple[int, ...] = WIDTHS) -> SearchSpace:
    net, x = build(name)
    convert.wrap(net)
    return search_space("tiny", cost_model(trace(net, x[:1])), Candidates(widths))


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_of()


class RecordingProgress:
    """A progress that records what a search reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = self.done = 0

    @contextmanager
    def task(self, title: str, total: int) -> Iterator["RecordingProgress"]:
        assert title == "scoring the front"
        self.total = total
        yield self

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        self.notes.append(text)


def problem_of(space: SearchSpace, budget: Budget, progress: Any = SILENT) -> SearchProblem:
    batches: Any = [(torch.zeros(4, 3, 8, 8), torch.zeros(4)), (torch.zeros(3, 3, 8, 8), torch.zeros(3))]
    return SearchProblem(
        model=nn.Linear(1, 1),
        space=space,
        budget=budget,
        scheme=convert.Scheme(),
        statistics={},
        images=SearchImages(batches, batches, batches, batches),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1),
        progress=progress,
    )


class Search:
    """Raises the bits of one decision after another within the budget; more bits score better."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.asked: list[Budget] = []
        self.scored: list[tuple[int, ...]] = []

    def propose(self, budget: Budget) -> list[list[int]]:
        self.asked.append(budget)
        choice = [0] * len(self.space.decisions)
        for k, decision in enumerate(self.space.decisions):
            for index in range(len(decision.options)):
                raised = [*choice[:k], index, *choice[k + 1 :]]
                choice = raised if budget.admits(self.space.cost(raised)) else choice
        return [choice]

    def score(self, choice: Sequence[int]) -> Scored:
        self.scored.append(tuple(choice))
        loss = sum((k + 1) * 0.5**index for k, index in enumerate(choice))
        return Scored(tuple(choice), self.space.cost(choice), round(100 - 3 * loss, 1), loss)

    def found(self, budget: Budget) -> SearchResult:
        every = [[index] * len(self.space.decisions) for index in range(4)]
        samples = [self.score([*choice[1:], 2]) for choice in every]
        return SearchResult(self.propose(budget)[0], self.propose, self.score, samples)


def middle(space: SearchSpace, bops: bool = True, size: bool = False) -> Budget:
    bound = [(a + b) // 2 for a, b in zip(space.floor, space.ceiling, strict=True)]
    return Budget(bound[0] if bops else None, bound[1] if size else None)


def front_of(space: SearchSpace, budget: Budget, count: int = 6, progress: Any = SILENT) -> Front:
    search = Search(space)
    problem = problem_of(space, budget, progress)
    return find_front(problem, search.found(budget), count, "fake", search.score, WIDTHS, 97.5)


results = st.lists(
    st.tuples(
        st.builds(Cost, st.integers(1, 6), st.integers(1, 6)),
        st.integers(0, 5).map(float),
        st.integers(0, 3).map(float),
    ),
    max_size=30,
)
units = st.sampled_from([(0,), (1,), BOTH])


class TestDominance:
    @given(results, units)
    def test_front_is_exactly_the_non_dominated_set(self, found: list[Any], counted: tuple[int, ...]) -> None:
        front = pareto_optimal(found, counted)

        for index, one in enumerate(found):
            beaten = any(dominates(other, one, counted) for other in found)
            assert beaten == (index not in front)
        assert front or not found

    @given(results, units)
    def test_dominance_is_a_strict_order(self, found: list[Any], counted: tuple[int, ...]) -> None:
        for one in found[:8]:
            assert not dominates(one, one, counted)
            for other in found[:8]:
                assert not (dominates(one, other, counted) and dominates(other, one, counted))

    @pytest.mark.parametrize(
        ("one", "other", "counted", "expected"),
        [
            ((Cost(1, 9), 70.0, 1.0), (Cost(2, 1), 70.0, 1.0), (0,), True),  # cheaper
            ((Cost(1, 9), 70.0, 1.0), (Cost(2, 1), 70.0, 1.0), BOTH, False),  # in one unit only
            ((Cost(1, 1), 70.1, 9.0), (Cost(1, 1), 70.0, 1.0), (0,), True),  # top-1 before loss
            ((Cost(1, 1), 70.0, 1.0), (Cost(1, 1), 70.0, 1.1), (0,), True),  # loss at equal top-1
            ((Cost(1, 1), 70.0, 1.1), (Cost(2, 2), 70.0, 1.0), (0,), False),  # more costly, lower loss
            ((Cost(2, 2), 90.0, 0.1), (Cost(1, 1), 10.0, 9.0), (0,), False),  # dearer
        ],
    )
    def test_dominance_examples(self, one: Any, other: Any, counted: tuple[int, ...], expected: bool) -> None:
        assert dominates(one, other, counted) is expected


class TestBudgets:
    @pytest.mark.parametrize("count", [1, 2, 7])
    @pytest.mark.parametrize(("bops", "size"), [(True, False), (False, True), (True, True)])
    def test_budgets_span_range_up_to_ceiling(
        self, space: SearchSpace, bops: bool, size: bool, count: int
    ) -> None:
        asked = budgets(space, middle(space, bops, size), count)

        assert len(asked) == count
        for budget in asked:
            assert (budget.bops is not None, budget.size is not None) == (bops, size)
            assert budget.admits(space.floor)
            assert all(bound <= space.ceiling[unit] for unit, bound in budget.bounds())
        assert asked[-1].admits(space.ceiling)
        if count > 1:
            assert all(bound > space.floor[unit] for unit, bound in asked[0].bounds())

    def test_budgets_are_log_spaced(self, space: SearchSpace) -> None:
        asked = budgets(space, middle(space, size=True), 5)

        for unit in BOTH:
            logs = [math.log(dict(budget.bounds())[unit]) for budget in asked]
            steps = [b - a for a, b in pairwise(logs)]
            assert steps == pytest.approx([steps[0]] * 4, rel=0.01)

    def test_fixed_space_has_one_budget(self) -> None:
        fixed = space_of("mlp", (4,))

        assert budgets(fixed, Budget(10**9), 5) == [Budget(fixed.ceiling.bops)]

    @pytest.mark.parametrize(("bops", "size"), [(True, False), (False, True), (True, True)])
    def test_proposals_meet_their_budgets(self, space: SearchSpace, bops: bool, size: bool) -> None:
        budget = middle(space, bops, size)
        search = Search(space)
        found = search.found(budget)
        search.asked.clear()

        front = find_front(problem_of(space, budget), found, 6, "fake", search.score, WIDTHS)

        assert search.asked == [*budgets(space, budget, 6), budget]
        points = {space_choice(space, point): point for point in front.points}
        for asked in list(search.asked):
            point = points[tuple(search.propose(asked)[0])]
            assert point.kind in ("proposed", "chosen")
            assert Budget(point.budget_bops, point.budget_bytes).admits(point.cost)
            assert asked.admits(point.cost)


def space_choice(space: SearchSpace, point: Any) -> tuple[int, ...]:
    from saqcli.quant.bits import BitConfig

    return tuple(space.choice(BitConfig(model="tiny", layers=point.layers)))


class TestFront:
    def test_configurations_are_unique(self, space: SearchSpace) -> None:
        budget = middle(space)
        search, telling = Search(space), RecordingProgress()
        found = search.found(budget)
        search.scored.clear()

        front = find_front(problem_of(space, budget, telling), found, 6, "fake", search.score, WIDTHS)

        kinds = {space_choice(space, point): point.kind for point in front.points}
        assert len(kinds) == len(front.points)
        assert [choice for choice, kind in kinds.items() if kind == "chosen"] == [tuple(found.choice)]
        assert kinds.keys() >= {one.choice for one in found.scored}
        assert set(kinds.values()) == {"sampled", "uniform", "proposed", "chosen"}
        assert len(search.scored) == len(set(search.scored)) == telling.total == telling.done
        assert set(search.scored) == {choice for choice, kind in kinds.items() if kind != "sampled"}
        assert front.images == 7
        assert (front.model, front.searcher, front.float_top1) == ("tiny", "fake", None)

    @pytest.mark.parametrize(("bops", "size"), [(True, False), (False, True), (True, True)])
    def test_marks_pareto_optimal_points(self, space: SearchSpace, bops: bool, size: bool) -> None:
        front = front_of(space, middle(space, bops, size))
        counted = [unit for unit, given in enumerate((bops, size)) if given]

        found = [(point.cost, point.top1, point.loss) for point in front.points]
        for point, one in zip(front.points, found, strict=True):
            assert point.on_front != any(dominates(other, one, counted) for other in found)
        assert found == sorted(found, key=lambda one: (*one[0], -one[1], one[2]))

    def test_leaves_out_nan_scores(self, space: SearchSpace) -> None:
        budget = middle(space)
        search, telling = Search(space), RecordingProgress()
        found = search.found(budget)

        def score(choice: Sequence[int]) -> Scored:
            scored = search.score(choice)
            return scored._replace(loss=math.nan) if set(choice) == {0} else scored

        front = find_front(problem_of(space, budget, telling), found, 6, "fake", score, WIDTHS)

        assert (0,) * len(space.decisions) not in [space_choice(space, point) for point in front.points]
        assert telling.notes == ["not on the front: 1 whose loss is NaN or infinite"]

    def test_names_uniform_points(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space))

        assert sorted(uniform_names(front).values()) == [f"w{bits}a{bits}" for bits in WIDTHS]


class TestTable:
    @pytest.mark.parametrize(("bops", "size"), [(True, False), (False, True), (True, True)])
    def test_has_every_budget_and_uniform_bits(self, space: SearchSpace, bops: bool, size: bool) -> None:
        budget = middle(space, bops, size)
        front = front_of(space, budget)
        rows = to_table(front)["points"]

        asked = {Budget(row["budget_bops"], row["budget_bytes"]) for row in rows}
        assert asked >= {*budgets(space, budget, 6), budget}
        assert sorted(filter(None, (row["uniform"] for row in rows))) == [
            f"w{bits}a{bits}" for bits in WIDTHS
        ]
        (chosen,) = (row for row in rows if row["chosen"])
        assert (chosen["budget_bops"], chosen["budget_bytes"]) == (budget.bops, budget.size)
        assert [row["bops"] for row in rows] == sorted(row["bops"] for row in rows)
        shown = {(row["bops"], row["size_bytes"], row["top1"], row["on_front"]) for row in rows}
        assert shown >= {(p.bops, p.size_bytes, p.top1, True) for p in front.points if p.on_front}

    def test_shows_the_best_point_per_budget(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space))
        named = uniform_names(front)
        some = next(p for index, p in enumerate(front.points) if p.kind == "proposed" and index not in named)
        worse = some.model_copy(update={"top1": some.top1 - 1, "on_front": False, "size_bytes": 1})
        rows = to_table(front.model_copy(update={"points": [worse, *front.points]}))["points"]

        assert some.top1 in [row["top1"] for row in rows]
        assert 1 not in [row["size_bytes"] for row in rows]


def axes_and_legend(front: Front) -> tuple[Any, Any]:
    """The axes of the picture after layout, and its legend."""
    with style():
        figure = paint_front(front)
        figure.draw_without_rendering()
    return figure.axes[0], figure.legends[0]


def crowd(front: Front) -> Front:
    """Surround every point with others where its label would be."""
    (one, *_) = (point for point in front.points if point.kind == "sampled")
    added = [
        one.model_copy(update={"bops": round(p.bops * (1 + k / 100)), "top1": p.top1 - 0.3 * (k % 7)})
        for p in front.points
        for k in range(20)
    ]
    return front.model_copy(update={"points": [*front.points, *added]})


class TestPicture:
    @pytest.mark.parametrize("crowded", [False, True])
    @pytest.mark.parametrize(("bops", "size"), [(True, False), (False, True), (True, True)])
    def test_labels_do_not_hide_points(
        self, space: SearchSpace, crowded: bool, bops: bool, size: bool
    ) -> None:
        front = front_of(space, middle(space, bops, size))
        front = crowd(front) if crowded else front
        ax, _ = axes_and_legend(front)

        unit = 0 if bops else 1
        places = ax.transData.transform([(point.cost[unit], point.top1) for point in front.points])
        labels = {text.get_text(): Text.get_window_extent(text) for text in ax.texts}
        assert {f"w{bits}a{bits}" for bits in WIDTHS} < set(labels)
        for text, box in labels.items():
            assert not [place for place in places if box.contains(*place)], text
            assert not [other for name, other in labels.items() if name != text and box.overlaps(other)], text
            assert ax.bbox.contains(box.x0 + 1, box.y0 + 1)
            assert ax.bbox.contains(box.x1 - 1, box.y1 - 1)

    def test_legend_entries_have_marks(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space))
        alone = front.model_copy(update={"points": [p for p in front.points if p.kind == "chosen"]})
        for shown in (front, alone):
            ax, legend = axes_and_legend(shown)
            marks = {each.get_label(): each for each in ax.collections}
            for text in legend.get_texts():
                assert len(marks[text.get_text()].get_offsets())
            assert ("front" in marks) == any(point.on_front for point in shown.points)
        ax, legend = axes_and_legend(front)
        assert legend.get_texts()[0].get_text() == "front"
        marks = {each.get_label(): each for each in ax.collections}
        assert marks["front"].get_zorder() == max(each.get_zorder() for each in ax.collections)

    def test_distant_float_point_keeps_the_scale(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space))
        low = [p.model_copy(update={"top1": p.top1 / 20}) for p in front.points]
        ax, _ = axes_and_legend(front.model_copy(update={"points": low}))

        assert ax.get_ylim()[1] < 6
        assert "float 97.50 %, above the plot" in [text.get_text() for text in ax.texts]

    def test_accuracy_axis_ends_at_100(self, space: SearchSpace) -> None:
        (one,) = (p for p in front_of(space, middle(space)).points if p.kind == "chosen")
        perfect = one.model_copy(update={"top1": 100.0})
        ax, _ = axes_and_legend(
            front_of(space, middle(space)).model_copy(update={"points": [perfect], "float_top1": 100.0})
        )

        assert all(tick <= 100 for tick in ax.get_yticks() if tick <= ax.get_ylim()[1])


class TestFiles:
    def test_json_survives_a_round_trip(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space))
        text = front.to_json()

        assert parse_json(Front, text, "pareto.json") == front
        assert parse_json(Front, text, "pareto.json").to_json() == text
        assert sum('"kind"' in line for line in text.splitlines()) == len(front.points)
        old = text.replace('"kind":"proposed"', '"kind":"front"').replace(
            '"budget_bops":null,"budget_bytes":null,', ""
        )
        assert parse_json(Front, old, "pareto.json") == front  # as earlier versions wrote it
        for wrong in (text.replace('"kind"', '"sort"', 1), text.replace('version":1', 'version":2', 1)):
            with pytest.raises(ValidationError):
                Front.model_validate_json(wrong)
        with pytest.raises(ValidationError):
            Front.model_validate_json(text.replace('"images":7', '"images":"7"'))

    def test_csv_equals_json(self, space: SearchSpace) -> None:
        front = front_of(space, middle(space, bops=False, size=True))
        rows = list(csv.DictReader(io.StringIO(to_csv(front))))

        assert tuple(rows[0]) == COLUMNS
        assert [int(row["bops"]) for row in rows] == sorted(point.bops for point in front.points)
        parsed = {
            (
                r["kind"],
                int(r["budget_bytes"]) if r["budget_bytes"] else None,
                int(r["bops"]),
                int(r["size_bytes"]),
                float(r["top1"]),
                float(r["loss"]),
                r["on_front"],
            )
            for r in rows
        }
        assert parsed == {
            (p.kind, p.budget_bytes, p.bops, p.size_bytes, p.top1, p.loss, "true" if p.on_front else "false")
            for p in front.points
        }
        assert all(2 <= float(row[name]) <= 8 for row in rows for name in COLUMNS[-2:])

    def test_files_are_deterministic(self, space: SearchSpace, tmp_path: Path) -> None:
        front = front_of(space, middle(space))

        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        first = write_front(front, tmp_path / "a") + draw_front(front, tmp_path / "a" / "pareto")
        again = parse_json(Front, front.to_json(), "text")
        second = write_front(again, tmp_path / "b") + draw_front(again, tmp_path / "b" / "pareto")

        assert [path.name for path in first] == ["pareto.json", "pareto.csv", "pareto.png", "pareto.svg"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        assert first[2].read_bytes()[:4] == b"\x89PNG"

    @pytest.mark.parametrize("kept", [0, 1])
    @pytest.mark.parametrize("bound", [Budget(10), Budget(None, 10), Budget(10**12, 10**12)])
    def test_every_front_can_be_plotted(self, space: SearchSpace, kept: int, bound: Budget) -> None:
        front = front_of(space, middle(space))
        bounds = {"budget_bops": bound.bops, "budget_bytes": bound.size, "float_top1": None}

        assert paint_front(front.model_copy(update={"points": front.points[:kept], **bounds}))
