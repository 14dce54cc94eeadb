"""The scores that a search kept, in ``scores.json``: enough to solve it again for another budget, without data.

Searchers whose losses are sums over decisions solve a knapsack. Measuring these losses takes the time, solving does
not, and the losses do not depend on the budget, nor on what costs are counted.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from saqcli._version import __version__
from saqcli.errors import ConfigError, RunDirectoryError
from saqcli.quant.search_space import SearchSpace
from saqcli.runs.directory import RunDirectory
from saqcli.searchers import SEARCHERS, SearchResult
from saqcli.serialization import json_text, parse_json, read_text, write_text

FILE = "scores.json"
Loss = Annotated[float, Field(allow_inf_nan=False)]


class SearchScores(BaseModel):
    """The content of ``scores.json``.

    Attributes:
        schema_version: version of the file format.
        saq_version: version that wrote the file.
        model: canonical name of the network.
        searcher: that measured the losses.
        weight_error: share of the quantization error of weights that they count.
        losses: of every decision, named by its first layer, at every bits, such as ``w4a4``; sums of them are compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    model: str
    searcher: str
    weight_error: float = 1.0
    losses: dict[str, dict[str, Loss]]

    def of(self, space: SearchSpace, source: str) -> list[list[float]]:
        """The losses of every option of ``space``, by decision.

        Raises:
            ConfigError: the search did not measure an option.
        """
        for decision in space.decisions:
            measured: Mapping[str, float] = self.losses.get(decision.name, {})
            for bits in decision.options:
                if str(bits) not in measured:
                    raise ConfigError(
                        f"the search of {source} did not measure layer {decision.name} at {bits}, it has "
                        f"{', '.join(measured) or 'nothing of it'}: use its `quantization.candidates`, "
                        "`quantization.activation_candidates` and pins, or search again"
                    )
        return [
            [self.losses[decision.name][str(bits)] for bits in decision.options]
            for decision in space.decisions
        ]


def write_scores(
    run: RunDirectory, searcher: str, space: SearchSpace, found: SearchResult, weight_error: float
) -> str | None:
    """Write the losses of ``found`` to the run; returns the path, or None if the searcher has none to keep."""
    path = run.path / FILE
    if found.losses is None:
        path.unlink(missing_ok=True)  # of an earlier search
        return None
    losses = {
        decision.name: {str(bits): float(loss) for bits, loss in zip(decision.options, row, strict=True)}
        for decision, row in zip(space.decisions, found.losses, strict=True)
    }
    kept = SearchScores(
        saq_version=__version__,
        model=space.model,
        searcher=searcher,
        weight_error=weight_error,
        losses=losses,
    )
    write_text(path, json_text(kept.model_dump(), indent=1) + "\n")
    return str(path)


def read_scores(run: RunDirectory) -> SearchScores:
    """The scores that the search of ``run`` kept.

    Raises:
        RunDirectoryError: it kept none, or the file is damaged.
    """
    path = run.path / FILE
    if not path.is_file():
        searcher = run.config().quantization.searcher
        able = [name for name, entry in SEARCHERS.items() if entry.keeps_scores]
        raise RunDirectoryError(
            f"{run.path} keeps no scores to search again from: searcher {searcher} may have none, or the run did not "
            f"search to its end: search with one that keeps them, {', '.join(able)}"
        )
    return parse_json(
        SearchScores, read_text(path, str(path), RunDirectoryError), str(path), RunDirectoryError
    )
