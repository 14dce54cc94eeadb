"""Arguments of the public functions: the same everywhere, and what is refused in the words of Python."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import saqcli as saq
from saqcli.api import models, searching
from saqcli.api.messages import PARAMETERS, as_parameters
from saqcli.errors import ConfigError, SaqError
from saqcli.quant.convert import Scheme
from saqcli.training.minimizers.base import RUN_ADVICE
from tests.support.modules import build, inputs_of, labels_of

NAME = "hand_written"


def batches() -> list[Any]:
    return [(*inputs_of(NAME, seed=seed), labels_of(seed=seed)) for seed in range(2)]


def quantize(**options: Any) -> nn.Module:
    return saq.quantize_model(build(NAME), calibration=batches(), **options)


def search(budget: Any = "w4a4", **options: Any) -> Any:
    return saq.search(build(NAME), budget, batches(), **options)


def message(call: Callable[[], Any], kind: type[SaqError] = ConfigError) -> str:
    """The one line of the error that ``call`` raises."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


QUANTIZERS = (
    *("quantizer", "weight_quantizer", "activation_quantizer"),
    *("weight_grid", "granularity", "weight_normalization", "short_steps", "target", "junctions"),
)


@pytest.mark.parametrize("function", [saq.search, saq.check_export])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_have_the_same_keywords(function: Any, name: str) -> None:
    expected = inspect.signature(saq.quantize_model).parameters[name]
    assert inspect.signature(function).parameters[name] == expected


def test_search_uses_the_named_quantizers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Scheme] = []
    monkeypatch.setattr(searching, "find_bits", lambda *given, **_: seen.append(given[4]))
    search(quantizer="lsq", granularity="tensor")
    assert seen == [Scheme(quantizer="lsq", granularity="tensor")]


@pytest.mark.parametrize("function", [quantize, search, lambda **o: saq.check_export(build(NAME), **o)])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("granularity", "row", "'channel' or 'tensor'"),
        ("weight_grid", "x", "'auto', 'paper' or 'zero'"),
        ("quantizer", "x", "there is no quantizer 'x'"),
        ("quantizer", 3, "string"),
    ],
)
def test_invalid_quantizers_are_refused(function: Any, name: str, value: Any, expected: str) -> None:
    bits = {"bits": 4} if function is quantize else {}
    assert expected in message(lambda: function(**bits, **{name: value}))


@pytest.mark.parametrize("name", ["samples", "searcher", "pins", "epochs"])
def test_foreign_keys_of_search_are_refused(name: str) -> None:
    text = message(lambda: quantize(budget="w4a4", search={name: 3}))
    assert f"takes no '{name}'" in text
    assert "options, activation_candidates, cost, lr" in text


def test_further_keys_of_search_are_used() -> None:
    q = quantize(budget="w4a4", search={"activation_candidates": [8], "options": {}, "cost": "bops"})
    assert {bits.activation for bits in saq.bits(q).layers.values()} == {8}


def test_pins_with_a_policy_are_refused() -> None:
    policy = saq.bits(quantize(bits=4))
    assert "remove `pins`" in message(lambda: quantize(policy=policy, pins={"left": "8"}))


def test_costs_take_bits_or_a_policy() -> None:
    policy = saq.bits(quantize(bits=4))
    assert "`policy`" in message(lambda: saq.profile(build(NAME), 4, policy=policy, example=inputs_of(NAME)))


def test_public_names_are_listed() -> None:
    assert set(saq.__all__) <= set(dir(saq))


@pytest.mark.parametrize(
    "budget", [1.5, math.nan, math.inf, True, None, [1], saq.Budget(), saq.Budget(size="5MB")]  # type: ignore[arg-type]
)  # fmt: skip
def test_budgets_of_other_types_are_refused(budget: Any) -> None:
    assert "`budget" in message(lambda: search(budget))


def test_budgets_may_be_whole_floats() -> None:
    bops = saq.bops(build(NAME), "w5a5", example=inputs_of(NAME))
    assert search(float(bops)).budget == search(bops).budget == saq.Budget(bops)
    assert search(saq.Budget(size=1e6)).budget.size == 1_000_000  # type: ignore[arg-type]


@pytest.mark.parametrize("candidates", [(), (1, 4), (4, 9), ("4",), (4.0,)])
def test_invalid_candidates_are_refused(candidates: Any) -> None:
    for name in ("candidates", "activation_candidates"):
        assert message(lambda name=name: search(**{name: candidates})).startswith(f"`{name}=")  # type: ignore[misc]
    assert message(lambda: search(activation_candidates="wide")).startswith("`activation_candidates='wide'`")
    assert message(lambda: saq.profile(build(NAME), example=inputs_of(NAME), candidates=candidates))


@pytest.mark.parametrize("runtimes", ["nope", ("nope",), ["openvino", "nope"]])
def test_unknown_runtimes_are_refused(runtimes: Any, tmp_path: Path) -> None:
    q = quantize(bits=4)
    text = message(lambda: saq.export_onnx(q, tmp_path / "net.onnx", runtimes=runtimes))
    assert "`runtimes=nope` is not a known runtime: choose openvino" in text
    assert not list(tmp_path.iterdir())


TAKING_MODULES: dict[str, Callable[[Any], Any]] = {
    "quantize_model": lambda net: saq.quantize_model(net, 4),
    "calibrate": lambda net: saq.calibrate(net, batches()),
    "search": lambda net: saq.search(net, "34G"),
    "check_export": saq.check_export,
    "finetune": lambda net: saq.finetune(net, batches()),
    "reconstruct": lambda net: saq.reconstruct(net, batches()),
    "compensate": lambda net: saq.compensate(net, batches()),
    "profile": saq.profile,
    "bops": saq.bops,
    "summary": saq.summary,
    "info": saq.info,
    "bits": saq.bits,
    "save": lambda net: saq.save(net, "net.safetensors"),
}


@pytest.mark.parametrize("function", TAKING_MODULES)
def test_names_do_not_pass_for_modules(function: str) -> None:
    text = message(lambda: TAKING_MODULES[function]("resnet18"))
    assert "`model` is a str, not a module" in text


def test_unknown_splits_are_refused(tmp_path: Path) -> None:
    net = saq.load_model("saq/resnet8s", num_classes=4, pretrained=False)
    split: Any = "x"
    assert "give train or val" in message(lambda: saq.load_images(net, tmp_path, split))


def test_learning_rate_of_search_is_checked() -> None:
    assert "lr" in message(lambda: search(lr=-1))


def test_no_epochs_of_training_are_refused() -> None:
    assert "`epochs=0`" in message(lambda: saq.finetune(quantize(bits=4), batches(), epochs=0))


# Messages.


def test_notes_name_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = SimpleNamespace(notes=["give others with `model.weights=FILE`"], model=nn.Identity())
    monkeypatch.setattr(models, "open_float", lambda _: loaded)
    notes: list[str] = []
    progress: Any = SimpleNamespace(note=notes.append)
    saq.load_model("saq/resnet8s", progress=progress)
    assert notes == ["give others with `weights=FILE`"]


def test_parameters_of_messages_exist() -> None:
    for function, name in PARAMETERS.values():
        assert name in inspect.signature(getattr(saq, function)).parameters


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: search("5MB"), "use `budget=saqcli.Budget(size=5000000)`"),
        (lambda: search("34 x"), "`budget`: '34 x' is a ratio"),
        (lambda: search("134%"), "`budget`: '134%' is a share of what uniform 8 bits cost"),
        (lambda: search(pins={"left": "x"}), '`pins={"left": "x"}` is not a bit-width'),
        (lambda: search(pins={"nope": "4"}), '`pins={"nope": "4"}` matches no layer'),
        (lambda: search(pins={"nope": "4"}), "saqcli.summary lists them"),
        (lambda: search(cost="x"), '`cost="x"`'),
        (lambda: quantize(budget="w4a4", search={"cost": "x"}), '`saqcli.search(cost="x")`'),
        (lambda: quantize(bits="w9a9"), "Omit `bits`"),
        (lambda: quantize(quantizer="lsq", bits=4, weight_normalization=True), "`weight_normalization=False`"),
        (lambda: saq.load_model("resnet18", weights_key="x", pretrained=False), "use `weights=FILE`"),
        (lambda: saq.load_model("resnet18", nope=1, pretrained=False), "`kwargs`"),
    ],
)  # fmt: skip
def test_messages_name_parameters(call: Callable[[], Any], expected: str) -> None:
    text = message(call)
    assert expected in text
    assert "quantization." not in text
    assert "model." not in text


def test_trial_export_names_functions() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for each in self.convolutions:
                x = each(x)
            return x.mean((2, 3)) if float(x.detach().sum()) < 1e9 else x[0]

    images = torch.rand(4, 3, 8, 8)
    text = message(lambda: saq.quantize_model(Odd(), 4, calibration=[images], export="qdq"), SaqError)
    assert "use `saqcli.save`" in text
    assert "export.styles" not in text


def test_advice_of_runs_is_left_out() -> None:
    assert as_parameters(RUN_ADVICE, {"lr", "rho", "settings"}) == "start again with a lower `lr`, or `rho`"
    assert as_parameters(RUN_ADVICE, {"lr", "options"}).endswith('or `options={"rho": ...}`')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("remove `training.ascent_fraction`", 'remove `settings={"ascent_fraction": ...}`'),
        ("method saq takes no `training.minimizer.x`", 'method saq takes no `settings={"minimizer": {"x": ...}}`'),
        ("or `training.optimizer=sgd`", 'or `settings={"optimizer": "sgd"}`'),
        ("a smaller `data.batch_size`", "a smaller batch size"),
        ("use `data.bad_images=skip`", "use `data.bad_images=skip` of the command line"),
        ("resume with `quantize(run_dir='x', resume=True)`", "resume with `saq quantize` (run_dir='x', resume=True)"),
        ("return `lambda: criterion(model(x), y)`", "return `lambda: criterion(model(x), y)`"),
        ("use `overwrite=True`", "use `overwrite=True`"),
        (
            "check the weights, `model.mean`, `model.std` and `model.input_size`",
            "check the weights and the range of its inputs",
        ),
    ],
)  # fmt: skip
def test_settings_become_parameters(text: str, expected: str) -> None:
    assert as_parameters(text, {"epochs", "settings"}) == expected


def test_kind_of_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(saq.SaqError) as caught:
        saq.search(build(NAME), 10, batches(), candidates=(4, 8))
    assert caught.value.exit_code == 4
    assert "with `candidates`" in str(caught.value)
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("searcher", ["fisher", "swaps"])
def test_search_without_labels_compares_with_float(searcher: str) -> None:
    unlabelled = [images for images, _ in batches()]
    found = saq.search(build(NAME), "w4a4", unlabelled, searcher=searcher, candidates=(2, 4, 6))
    assert found.budget.admits(found.cost)
    assert all(math.isnan(score.top1) for score in found.result.scored)
    assert "needs labelled images" in message(
        lambda: saq.search(build(NAME), "w4a4", unlabelled, searcher="hawq"), SaqError
    )
