"""Plugins of other packages in the library: their settings, and failures, which name them and change no model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saqcli as saq
from saqcli.analysis import INSTRUMENTS, AnalysisInput, Instrument, Reading, Session, Settings
from saqcli.errors import ConfigError, InfeasibleBudget, PluginError
from saqcli.export import STYLES, OnnxStyle
from saqcli.searchers import SEARCHERS, SearcherEntry, SearchProblem, SearchResult
from saqcli.training.minimizers import MINIMIZERS, SAM
from tests.support.modules import HandWritten, inputs_of, labels_of
from tests.support.plugins import plugin_folder, run_python

SPARSITY = """
import saqcli as saq
from saqcli.errors import ConfigError
from tests.support.modules import HandWritten, inputs_of, labels_of

batches = [(*inputs_of("hand_written"), labels_of())]
model = saq.quantize_model(HandWritten().eval(), 3, calibration=batches)
for settings in ({}, {"rho": 0.1, "sparsity": {"threshold": 0.2}}):
    print(saq.analyze(model, batches, ["sparsity", "flips"], settings=settings)["sparsity"].threshold)
for wrong in ({"sparsity": {"x": 1}}, {"flips": {"x": 1}}, {"sparsity": {"threshold": 2}}):
    try:
        saq.analyze(model, batches, ["sparsity"], settings=wrong)
    except ConfigError as error:
        print(error)
"""


class Norm(Reading):
    """A figure."""

    value: float = 0.0


def fails(analyzed: AnalysisInput, settings: Settings, session: Session) -> Reading:
    """Change the model, then fail."""
    changes(analyzed, settings, session)
    raise ValueError("boom")


def changes(analyzed: AnalysisInput, settings: Settings, session: Session) -> Reading:
    """Change a weight and the mode of a layer."""
    layer = next(iter(analyzed.layers.values()))
    layer.train()
    next(layer.parameters()).data.mul_(2)
    return Norm()


def returns_a_dictionary(analyzed: AnalysisInput, settings: Settings, session: Session) -> Any:
    """Return no reading."""
    return {"value": 1.0}


def batches() -> list[tuple[Tensor, ...]]:
    return [(*inputs_of("hand_written"), labels_of())]


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    return saq.quantize_model(HandWritten().eval(), 3, calibration=batches())


@pytest.fixture
def instrument() -> Iterator[Callable[[Any], None]]:
    """Adds an instrument named ``mine``."""

    def add(measure: Any) -> None:
        INSTRUMENTS["mine"] = Instrument(measure, Norm)

    yield add
    del INSTRUMENTS["mine"]


def test_analyze_takes_settings_of_an_instrument() -> None:
    done = run_python(SPARSITY, folders=(plugin_folder("saq-sparsity"),))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["0.0", "0.2"]
    assert lines[2] == "`settings=sparsity.x=1`: sparsity has no x: its settings are threshold"
    assert "`settings=flips`: no such instrument is measured" in lines[3]
    assert "settings of sparsity" in lines[4]


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (fails, r"instrument mine failed \(ValueError: boom\): mend it, or choose another"),
        (changes, r"instrument mine failed \(it changed .* of the model, which was restored\)"),
        (returns_a_dictionary, r"instrument mine failed \(it returned a dict, not a Norm\)"),
    ],
)
def test_failing_instruments_are_named(
    measure: Any, says: str, quantized: nn.Module, instrument: Callable[[Any], None]
) -> None:
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    instrument(measure)
    with pytest.raises(PluginError, match=says):
        saq.analyze(quantized, batches(), ["mine"])
    after = quantized.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_settings_of_other_instruments_are_refused(quantized: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"`settings=magic`: no such instrument is measured"):
        saq.analyze(quantized, batches(), ["flips"], settings={"magic": {"x": 1}})


def raises(problem: SearchProblem) -> Any:
    """Fail."""
    raise ValueError("boom")


def exceeds(problem: SearchProblem) -> SearchResult:
    """The most bits everywhere, whatever the budget."""
    return SearchResult([len(each.options) - 1 for each in problem.space.decisions], lambda budget: [])


def proposes_nothing(problem: SearchProblem) -> SearchResult:
    """The fewest bits everywhere, and proposals that fail."""
    return SearchResult([0] * len(problem.space.decisions), raises)  # type: ignore[arg-type]


def refuses(problem: SearchProblem) -> Any:
    """Refuse, as documented."""
    raise InfeasibleBudget("too little")


def search_with(search: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result of a searcher named ``mine``."""
    searcher = type("Mine", (), {"search": staticmethod(search)})
    monkeypatch.setitem(SEARCHERS, "mine", SearcherEntry(searcher, "a test", uses_images=False))
    return saq.search(HandWritten().eval(), "w4a4", batches(), searcher="mine")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (raises, r"searcher mine failed \(ValueError: boom\): mend it, or choose another"),
        (lambda problem: None, r"searcher mine failed \(it returned a NoneType, not a SearchResult\)"),
        (exceeds, r"searcher mine failed \(it returned a configuration that costs .* of the budget"),
        (lambda problem: SearchResult([99], list), r"it returned no configuration of .*HandWritten"),
    ],
)
def test_failing_searchers_are_named(search: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=says):
        search_with(search, monkeypatch)


def test_proposals_of_searchers_are_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search_with(proposes_nothing, monkeypatch)
    with pytest.raises(PluginError, match=r"searcher mine failed \(ValueError: boom\)"):
        found.result.propose(found.budget)


def test_errors_with_a_message_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfeasibleBudget, match="too little"):
        search_with(refuses, monkeypatch)


def test_our_own_plugins_keep_their_errors() -> None:
    with pytest.raises(ValueError, match="boom"), SEARCHERS.blamed("error"):
        raise ValueError("boom")


class Mine(OnnxStyle):
    """A style."""

    name, description = "mine", "a test"


def test_names_of_added_plugins_are_checked() -> None:
    with pytest.raises(ConfigError, match="its name is not made of letters, digits, - and _"):
        MINIMIZERS["bad name/.."] = SAM
    with pytest.raises(ConfigError, match="its name is 'mine', not 'other'"):
        STYLES["other"] = Mine


def test_programs_may_replace_our_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MINIMIZERS, "saq", SAM)
    assert not MINIMIZERS.is_ours("saq")
    monkeypatch.setitem(STYLES, "mine", Mine)
    assert "mine" in STYLES
