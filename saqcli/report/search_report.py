"""What ``saq search`` leaves: its results, their file ``search.json``, and pictures of policy and front."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saqcli._version import __version__
from saqcli.errors import RunDirectoryError
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.report.front import draw_front
from saqcli.report.pareto import Front, to_table, write_front
from saqcli.report.policy import draw_policy
from saqcli.report.search_scores import write_scores
from saqcli.runs.directory import RunDirectory
from saqcli.searchers.problem import SearchProblem, SearchResult
from saqcli.serialization import json_text, parse_object, write_text

Count = Annotated[int, Field(ge=0)]


class LayerRow(BaseModel):
    """The figures of a layer that the picture of a policy needs; the file has more."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    macs: Count
    bops: Count
    pinned: bool


class FrontRow(BaseModel):
    """A line of the table of a front."""

    model_config = ConfigDict(extra="allow", frozen=True)

    budget_bops: Count | None
    budget_bytes: Count | None
    bops: Count
    size_bytes: Count
    top1: float
    on_front: bool
    searcher: str
    uniform: str | None
    chosen: bool


class FrontTable(BaseModel):
    """The front of a search."""

    model_config = ConfigDict(extra="allow", frozen=True)

    images: Count
    float_top1: float | None
    points: list[FrontRow]


class PriceRow(BaseModel):
    """The shadow price of an accuracy bound, in one unit of cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    per_point: Count
    per_percent: float


class AccuracyRow(BaseModel):
    """A budget of accuracy and what became of it; see ``saqcli.searchers.accuracy.Accuracy``."""

    model_config = ConfigDict(extra="allow", frozen=True)

    max_drop: float | None
    min_top1: float | None
    allowed_drop: float
    held_out_images: Count
    held_out_float_top1: float
    held_out_top1: float
    held_out_drop: float
    method: str
    met: bool
    measured: Count
    cost_unit: str
    budget_cost: Count | None
    budget_bytes: Count | None
    needed_cost: Count | None
    needed_bytes: Count | None
    shadow_price: list[PriceRow]


class SearchResults(BaseModel):
    """The figures of a search that are shown; the file has more."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    searcher: str
    policy: dict[str, LayerBits]
    layers: list[LayerRow]
    bops: Count
    size_bytes: Count
    budget_bops: Count | None
    budget_bytes: Count | None
    seconds: float
    scoring_top1: float | None
    front: FrontTable | None = None
    accuracy: AccuracyRow | None = None
    artifacts: dict[str, str]

    @model_validator(mode="after")
    def _of_one_network(self) -> Self:
        if {row.name for row in self.layers} != set(self.policy):
            raise ValueError("policy and layers are not of one network")
        return self


def check_results(results: Any, where: str) -> None:
    """Check the results of a finished search, which ``where`` holds.

    Raises:
        RunDirectoryError: they are not as this version writes them.
    """
    parse_object(SearchResults, results, where, RunDirectoryError)


def write_search(
    run: RunDirectory,
    problem: SearchProblem,
    found: SearchResult,
    policy: BitConfig,
    results: dict[str, Any],
    front: Front | None,
) -> dict[str, Any]:
    """Write policy, figures and pictures.

    Args:
        run: whose directory gets them.
        problem: that was solved.
        found: its solution.
        policy: the same, as bits of layers.
        results: the figures so far.
        front: None for none.

    Returns:
        The results with the front and the paths of all files.
    """
    costs, searcher = problem.space.costs, results["searcher"]
    run.keep_policy(policy.to_json())
    title = f"Bits of {policy.model}, found by searcher {searcher}"
    files = draw_policy(policy, costs, run.path / "policy", title)
    if front is not None:
        files += write_front(front, run.path) + draw_front(front, run.path / "pareto")
    results["front"] = None if front is None else to_table(front)
    artifacts = {"policy": str(run.policy_path), "search": str(run.search_path)}
    artifacts |= {"page": str(run.page_path)} if run.verb == "search" else {}
    scores = write_scores(run, searcher, problem.space, found, problem.weight_error)
    artifacts |= {} if scores is None else {"scores": scores}
    results |= {"run_dir": str(run.path), "artifacts": artifacts | {path.name: str(path) for path in files}}
    kept = {"schema_version": 1, "saq_version": __version__, **results}
    kept["configurations"] = [
        {
            "choice": list(s.choice),
            "bops": costs.bops(problem.config(s.choice)),
            "size_bytes": s.cost.size,
            "top1": s.top1,
            "loss": s.loss,
            "divergence": s.divergence,
        }
        for s in found.scored
    ]
    write_text(run.search_path, json_text(kept, indent=2) + "\n")
    return results
