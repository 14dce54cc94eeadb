"""Quantization of modules of one's own: bits, calibration, training, what stays unchanged, what is refused."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli.errors import ConfigError, DataError, InfeasibleBudget, PolicyMismatch, UnsupportedModel
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import quantizers_of
from tests.support.modules import (
    CLASSES,
    MODULES,
    HandWritten,
    TwoHeads,
    build,
    inputs_of,
    labels_of,
    scores_of,
    small,
)

each_module = pytest.mark.parametrize("name", MODULES)


def loader(name: str, batches: int = 2) -> list[tuple[Tensor, ...]]:
    return [(*inputs_of(name, seed=seed), labels_of(seed=seed)) for seed in range(batches)]


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return scores_of(model(*inputs))


@each_module
def test_own_modules_are_quantized(name: str) -> None:
    net = build(name)
    q = saq.quantize_model(net, "w4a4", calibration=loader(name))

    assert {layer.bits.weight for layer in quantized_layers(q).values()} <= {4, 8}
    assert saq.bops(q) == saq.bops(net, "w4a4", example=inputs_of(name))
    assert saq.bops(q) < saq.bops(net, example=inputs_of(name))
    assert not torch.equal(outputs(q, inputs_of(name)), outputs(build(name).float(), inputs_of(name)))


@each_module
def test_given_module_stays_unchanged(name: str) -> None:
    net, twin = build(name), build(name)
    kinds = [type(module) for module in net.modules()]
    saq.quantize_model(net, 4, calibration=loader(name))

    assert [type(module) for module in net.modules()] == kinds
    for (key, value), (other, expected) in zip(
        net.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(value, expected)
    assert torch.equal(outputs(net.float(), inputs_of(name)), outputs(twin.float(), inputs_of(name)))


def test_inplace_returns_the_module_itself() -> None:
    net = HandWritten()

    assert saq.quantize_model(net, 4, calibration=loader("hand_written"), inplace=True) is net
    assert quantized_layers(net)


@each_module
def test_quantized_modules_train(name: str) -> None:
    q = saq.quantize_model(build(name), "w3a4", calibration=loader(name)).train()
    optimizer = torch.optim.SGD(q.parameters(), 0.05)
    *inputs, labels = loader(name, 1)[0]
    minimizer = saq.SAQ(q, optimizer, rho=0.1)
    before = [p.detach().clone() for p in q.parameters()]

    losses = [float(minimizer.step(lambda: F.cross_entropy(scores_of(q(*inputs)), labels))) for _ in range(8)]

    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, value) for p, value in zip(q.parameters(), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_that_of_the_module(training: bool) -> None:
    net = HandWritten().train(training)
    q = saq.quantize_model(net, 4, calibration=loader("hand_written"))

    assert q.training == training
    assert net.training == training


BATCHES = {
    "tensor": lambda image, labels: image,
    "tuple": lambda image, labels: (image,),
    "labelled": lambda image, labels: (image, labels),
    "list": lambda image, labels: [image, labels],
    "dictionary by name": lambda image, labels: {"x": image, "labels": labels},
    "dictionary of images": lambda image, labels: {"pixel_values": image, "labels": labels},
    "nested": lambda image, labels: ((image,), labels),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_form_give_the_same_model(kind: str) -> None:
    (image,), labels = inputs_of("hand_written"), labels_of()
    expected = saq.quantize_model(build("hand_written"), 4, calibration=[image])
    found = saq.quantize_model(build("hand_written"), 4, calibration=[BATCHES[kind](image, labels)])

    assert torch.equal(outputs(found, (image,)), outputs(expected, (image,)))


@pytest.mark.parametrize("form", ["tuple", "dictionary", "nested"])
def test_two_inputs_come_in_any_form(form: str) -> None:
    image, numbers = inputs_of("two_inputs")
    forms: dict[str, Any] = {
        "tuple": (image, numbers, labels_of()),
        "dictionary": {"numbers": numbers, "image": image, "labels": labels_of()},
        "nested": ((image, numbers), labels_of()),
    }
    expected = saq.quantize_model(build("two_inputs"), 4, calibration=[(image, numbers)])
    found = saq.quantize_model(build("two_inputs"), 4, calibration=[forms[form]])

    assert torch.equal(outputs(found, (image, numbers)), outputs(expected, (image, numbers)))


def test_generators_are_read_once() -> None:
    batches = loader("hand_written", 3)

    def stream() -> Iterator[Any]:
        yield from batches

    expected = saq.quantize_model(build("hand_written"), 4, calibration=batches)
    found = saq.quantize_model(build("hand_written"), 4, calibration=stream())
    assert torch.equal(
        outputs(found, inputs_of("hand_written")), outputs(expected, inputs_of("hand_written"))
    )


def test_samples_limit_what_is_read() -> None:
    seen = []

    class Counting:
        def __iter__(self) -> Iterator[Tensor]:
            for index in range(100):
                seen.append(index)
                yield inputs_of("hand_written")[0]

    saq.quantize_model(build("hand_written"), 4, calibration=Counting(), samples=16)
    assert max(seen) <= 2


def test_inputs_function_replaces_the_rules() -> None:
    (image,) = inputs_of("hand_written")
    batch = {"sample": {"photo": image}, "where": "row 3"}
    q = saq.quantize_model(
        build("hand_written"), 4, calibration=[batch], inputs=lambda batch: batch["sample"]["photo"]
    )
    assert outputs(q, (image,)).shape == (8, CLASSES)


def test_example_alone_suffices() -> None:
    (image,) = inputs_of("hand_written")
    q = saq.quantize_model(build("hand_written"), 4, example=image)
    assert outputs(q, (image,)).isfinite().all()


def test_calibrate_fits_anew() -> None:
    batches = loader("hand_written")
    expected = saq.quantize_model(build("hand_written"), 4, calibration=batches, recalibrate_bn=False)
    q = saq.quantize_model(
        build("hand_written"), 4, example=inputs_of("hand_written", seed=9), recalibrate_bn=False
    )
    saq.calibrate(q, batches, recalibrate_bn=False)

    assert torch.equal(outputs(q, inputs_of("hand_written")), outputs(expected, inputs_of("hand_written")))


def test_calibrating_again_changes_nothing() -> None:
    batches = loader("hand_written")
    expected = saq.quantize_model(build("hand_written").eval(), 3, calibration=batches)
    q = saq.quantize_model(build("hand_written").eval(), 3, example=inputs_of("hand_written", seed=9))
    for _ in range(2):
        saq.calibrate(q, batches)
        assert torch.equal(
            outputs(q, inputs_of("hand_written")), outputs(expected, inputs_of("hand_written"))
        )


def test_calibrate_keeps_parameters_and_modes() -> None:
    q = saq.quantize_model(build("hand_written"), 3, calibration=loader("hand_written")).train()
    q.norm.eval()
    before = [(id(p), p.requires_grad) for p in q.parameters()]
    saq.calibrate(q, loader("hand_written", 3))

    assert [(id(p), p.requires_grad) for p in q.parameters()] == before
    assert q.training
    assert not q.norm.training


def test_calibrate_after_training_corrects_nothing() -> None:
    q = saq.quantize_model(build("hand_written"), 3, calibration=loader("hand_written")).train()
    *inputs, labels = loader("hand_written", 1)[0]
    minimizer = saq.QAT(q, torch.optim.SGD(q.parameters(), 0.05))
    minimizer.step(lambda: F.cross_entropy(q(*inputs), labels))
    before = q.norm.running_mean.clone()
    saq.calibrate(q, loader("hand_written"))

    assert torch.equal(q.norm.running_mean, before)
    with pytest.raises(ConfigError, match="which training has replaced"):
        saq.calibrate(q, loader("hand_written"), recalibrate_bn=True)


@dataclass
class Found:
    scores: Tensor
    box: Tensor


HEADS: dict[str, Callable[[TwoHeads, Tensor], Any]] = {
    "dictionary": lambda net, x: {"scores": net.scores(x), "box": net.box(x)},
    "tuple": lambda net, x: (net.scores(x), net.box(x)),
    "dataclass": lambda net, x: Found(net.scores(x), net.box(x)),
    "changed": lambda net, x: (net.scores(x).log_softmax(1), net.box(x)[:, :3].sigmoid()),
}


@pytest.mark.parametrize("form", HEADS)
def test_returned_heads_keep_eight_bits(form: str) -> None:
    class Net(TwoHeads):
        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.inner(F.relu(self.conv(x)))).mean((2, 3))
            return HEADS[form](self, x)

    q = saq.quantize_model(Net(), 4, calibration=loader("two_heads"))
    assert [str(bits) for bits in saq.bits(q).layers.values()] == ["w8a8", "w4a4", "w8a8", "w8a8"]


def test_lists_of_images_are_one_argument() -> None:
    class Detector(HandWritten):
        def forward(self, images: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
            return [super(Detector, self).forward(image[None])[0] for image in images]

    photos = [torch.randn(3, 16, 20), torch.randn(3, 24, 16)]
    q = saq.quantize_model(Detector(), 4, calibration=[(photos, labels_of(2))])

    assert len(q(photos)) == 2
    assert saq.bops(q) == saq.bops(HandWritten(), 4, example=photos[0][None])


@pytest.mark.parametrize("changes", [{"bits": 9}, {"bits": None, "budget": 10}, {"pins": {"x": "4"}}])
def test_failure_in_place_leaves_a_float_module(changes: dict[str, Any]) -> None:
    net = build("hand_written")
    expected = outputs(net, inputs_of("hand_written"))
    with pytest.raises(saq.SaqError):
        saq.quantize_model(net, **({"bits": 4} | changes), calibration=loader("hand_written"), inplace=True)

    assert not quantized_layers(net)
    assert torch.equal(outputs(net, inputs_of("hand_written")), expected)
    assert saq.quantize_model(net, 4, calibration=loader("hand_written"), inplace=True) is net


def test_policy_gives_every_layer_its_bits() -> None:
    net = build("hand_written")
    layers = {"stem": "w8a8", "left": "w2a4", "right": 3, "head": 8}
    q = saq.quantize_model(net, policy=layers, calibration=loader("hand_written"))

    assert {name: str(bits) for name, bits in saq.bits(q).layers.items()} == {
        **layers, "right": "w3a3", "head": "w8a8"
    }  # fmt: skip


def test_policy_round_trips() -> None:
    q = saq.quantize_model(build("hand_written"), "w4a6", calibration=loader("hand_written"))
    again = saq.quantize_model(build("hand_written"), policy=saq.bits(q), calibration=loader("hand_written"))

    assert torch.equal(outputs(q, inputs_of("hand_written")), outputs(again, inputs_of("hand_written")))


def test_pins_restrict_layers() -> None:
    q = saq.quantize_model(
        build("hand_written"), 4, pins={"left": "w2a8"}, calibration=loader("hand_written")
    )
    assert str(saq.bits(q).layers["left"]) == "w2a8"


def test_budget_is_met() -> None:
    net = build("hand_written")
    most = saq.bops(net, "w5a5", example=inputs_of("hand_written"))
    q = saq.quantize_model(net, budget=most, calibration=loader("hand_written"))
    assert saq.bops(q) <= most


def test_quantized_modules_copy_and_move() -> None:
    q = saq.quantize_model(build("hand_written"), 4, calibration=loader("hand_written"))
    other = copy.deepcopy(q)

    assert torch.equal(outputs(other, inputs_of("hand_written")), outputs(q, inputs_of("hand_written")))
    assert saq.bops(other) == saq.bops(q)
    assert saq.info(torch.compile(other)).name == saq.info(q).name  # type: ignore[arg-type]


@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "pact", "dorefa"])
def test_every_quantizer_is_available(quantizer: str) -> None:
    q = saq.quantize_model(build("hand_written"), 4, calibration=loader("hand_written"), quantizer=quantizer)
    assert next(quantizers_of(q)).bits in (4, 8)
    assert outputs(q, inputs_of("hand_written")).isfinite().all()


def test_bfloat16_takes_batches_of_its_own_type() -> None:
    batches = [(inputs_of("bfloat16")[0].bfloat16(), labels_of())]
    q = saq.quantize_model(build("bfloat16"), 4, calibration=batches)

    assert {p.dtype for p in q.parameters()} == {torch.float32}
    assert saq.evaluate(q, batches).images == 8


def test_names_in_the_table_are_complete() -> None:
    assert "w4a4" in saq.summary(
        saq.quantize_model(build("hand_written"), 4, calibration=loader("hand_written"))
    )


# Refusals


def refused(error: type[Exception], match: str, **changes: Any) -> None:
    options: dict[str, Any] = {"bits": 4, "calibration": loader("hand_written")} | changes
    net = options.pop("model", None) or build("hand_written")
    with pytest.raises(error, match=match) as caught:
        saq.quantize_model(net, **options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"bits": None}, ConfigError, "no bits and no budget"),
        ({"budget": "1G"}, ConfigError, "`bits` and `budget` were given"),
        ({"bits": 9}, ConfigError, "quantizers have 2 to 8"),
        ({"bits": "four"}, ConfigError, "is not a bit-width"),
        ({"quantizer": "none"}, ConfigError, "there is no quantizer"),
        ({"calibration": []}, DataError, "at least one batch"),
        ({"calibration": ["a"]}, DataError, "is a str"),
        ({"calibration": None}, ConfigError, "give `example`"),
        ({"pins": {"nothing": "4"}}, ConfigError, "matches no layer"),
        ({"bits": None, "policy": {"stem": 4}}, PolicyMismatch, "missing layers"),
        ({"bits": None, "budget": 10}, InfeasibleBudget, "fewest bits"),
        ({"bits": None, "budget": "1G", "searcher": "none"}, ConfigError, "there is no searcher"),
        ({"calibration": [torch.randn(2, 4, 16, 16)]}, UnsupportedModel, "does not run on an image of 4x16x16"),
        ({"calibration": [{"a": torch.zeros(1)}]}, DataError, "has the keys a"),
        ({"model": nn.ReLU()}, UnsupportedModel, "nothing to quantize"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(
    changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    refused(error, match, **changes)


def test_missing_input_is_named() -> None:
    with pytest.raises(DataError, match=r"holds 1 of the 2 inputs .* \(image, numbers\)"):
        saq.quantize_model(build("two_inputs"), 4, calibration=[inputs_of("two_inputs")[:1]])


def test_quantized_module_is_refused() -> None:
    q = saq.quantize_model(small(), 4, calibration=loader("weight_norm"))
    with pytest.raises(UnsupportedModel, match="quantized already"):
        saq.quantize_model(q, 4, calibration=loader("weight_norm"))


def test_float_module_has_no_calibration() -> None:
    with pytest.raises(ConfigError, match="is not quantized"):
        saq.calibrate(small(), loader("weight_norm"))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("two_inputs", "takes 3x16x16, 4 for one sample"),
        ("two_heads", "returns a dict"),
        ("tied", "takes 12"),
    ],
)
def test_export_is_refused_before_calibration(name: str, match: str) -> None:
    class Unread:
        def __iter__(self) -> Iterator[Any]:
            yield loader(name)[0]
            raise AssertionError("calibration data was read")

    with pytest.raises(UnsupportedModel, match=match):
        saq.quantize_model(build(name), 4, calibration=Unread(), example=inputs_of(name), export="qdq")
