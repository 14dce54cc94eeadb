"""Schemes: quantizers per layer, initial levels, refused combinations, and folding."""

import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.quant import calibration, convert, grid
from saqcli.quant.calibration import reestimate_batch_norms
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import cost_model
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.quantizers.clip import ClipWeight, NormalizedClipWeight
from saqcli.quant.tracer import trace
from tests.support import tiny
from tests.support.cases import WEIGHT_GRIDS, scheme_with

PLAIN = [name for name, entry in QUANTIZERS.items() if entry.weight and entry.normalized is None]
UNPUBLISHED = [name for name in QUANTIZERS if not scheme_with(name).has_published_levels]
NORMALIZED = Scheme(weight_normalization=True)
FOLDED = {
    "clip_normalized": NORMALIZED,
    **{name: Scheme(quantizer=name) for name in ("pact", "dorefa")},
}


def weight_quantizers(net: nn.Module) -> dict[str, Quantizer]:
    return {
        name: layer.weight_quantizer
        for name, layer in quantized_layers(net).items()
        if isinstance(layer.weight_quantizer, Quantizer)
    }


@torch.no_grad()
def answer(net: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = net(x)
    return logits


@pytest.mark.parametrize("name", ["residual", "transposed"])
def test_weight_normalization_needs_convolutions(name: str) -> None:
    net, x = tiny.build(name)
    layers = tiny.quantized(net, x, scheme=NORMALIZED)
    kinds = {name: type(quantizer) for name, quantizer in weight_quantizers(net).items()}
    for name, layer in layers.items():
        linear = issubclass(layer.float_class, nn.Linear)
        assert kinds[name] is (ClipWeight if linear else NormalizedClipWeight)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, {"weight_normalization": True}) for name in PLAIN),
        *((name, {"clip_init": "paper"}) for name in UNPUBLISHED),
    ],
)
def test_unsupported_options_are_refused(name: str, option: dict[str, object]) -> None:
    scheme = scheme_with(name).model_copy(update=option)
    with pytest.raises(ConfigError, match=f"quantizer {name}.*choose clip") as refusal:
        scheme.check()
    assert "\n" not in str(refusal.value)
    net, x = tiny.build("conv_bn")
    with pytest.raises(ConfigError):
        tiny.quantized(net, x, scheme=scheme)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_supported_options_are_accepted(name: str) -> None:
    scheme = scheme_with(name)
    scheme.check()
    if name not in PLAIN:
        scheme.model_copy(update={"weight_normalization": True}).check()
    if name not in UNPUBLISHED:
        scheme.model_copy(update={"clip_init": "paper"}).check()


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(
    ("setting", "declared", "values"),
    [
        ("weight_grid", "weight_grids", WEIGHT_GRIDS),
        ("granularity", "granularities", ("channel", "tensor")),
    ],
)
def test_undeclared_grids_and_scopes_are_refused(
    name: str, setting: str, declared: str, values: tuple[str, ...]
) -> None:
    scheme = scheme_with(name)
    supported = getattr(QUANTIZERS[scheme.names[0]].weight, declared)
    for value in values:
        changed = scheme.model_copy(update={setting: value})
        if value in supported:
            changed.check()
        else:
            with pytest.raises(ConfigError, match=f"`quantization.{setting}={value}` is not defined"):
                changed.check()


def test_unknown_quantizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no quantizer 'magic'.*lsq_plus"):
        Scheme(quantizer="magic").check()


@pytest.mark.parametrize("family", UNPUBLISHED)
def test_paper_clip_init_is_refused_for_others(family: str) -> None:
    net, x = tiny.build("conv_bn")
    tiny.quantized(net, x, scheme=scheme_with(family))
    with pytest.raises(ConfigError, match="no initial levels of SAQ"):
        calibration.fit(net, {name: calibration.InputStatistics() for name in quantized_layers(net)}, "paper")


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_paper_clip_init_levels(granularity: str, normalized: bool) -> None:
    """1 for convolutions, 0.8 of the largest magnitude for the linear layer, least squared error for the image."""
    scheme = Scheme(granularity=granularity, weight_normalization=normalized, clip_init="paper")  # type: ignore[arg-type]
    net, x = tiny.build("conv_bn")
    inputs: dict[str, Tensor] = {}
    float_layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for name, module in float_layers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    answer(net, x)
    layers = tiny.quantized(net, x, scheme=scheme)
    by_error = {name: float(layer.input_quantizer.level().detach()) for name, layer in layers.items()}  # type: ignore[operator]
    statistics = {name: calibration.InputStatistics() for name in layers}
    for name, entry in statistics.items():
        entry.update(inputs[name], torch.Generator())
    calibration.fit(net, statistics, "paper")

    first, second, head = layers
    for name in (first, second):
        weight = layers[name].latent_weight().detach()
        expected = 1.0 if normalized else float(weight.std())
        levels = layers[name].weight_quantizer.clipping_level  # type: ignore[union-attr]
        torch.testing.assert_close(levels, torch.full_like(levels, expected))  # type: ignore[arg-type]
    level = {name: float(layers[name].input_quantizer.level().detach()) for name in layers}  # type: ignore[operator]
    assert level[first] == by_error[first]
    assert level[second] == 1.0
    assert level[head] == pytest.approx(0.8 * float(inputs[head].abs().max()))
    assert float(layers[head].weight_quantizer.clipping_level.detach().flatten()[0]) == pytest.approx(  # type: ignore[union-attr]
        0.8 * float(layers[head].latent_weight().detach().abs().max())
    )


@pytest.mark.parametrize("scheme", FOLDED.values(), ids=FOLDED)
@pytest.mark.parametrize("name", ["residual", "transposed", "attention"])
def test_folding_is_exact_and_idempotent(name: str, scheme: Scheme) -> None:
    net, x = tiny.build(name)
    tiny.quantized(net, x, scheme=scheme)
    before = answer(net, x)
    kinds = {type(quantizer) for quantizer in weight_quantizers(net).values()}
    convert.fold(net)
    assert torch.equal(answer(net, x), before)
    folded = weight_quantizers(net)
    assert not kinds & {type(quantizer) for quantizer in folded.values()} - {ClipWeight}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    convert.fold(net)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(
        one is other for one, other in zip(folded.values(), weight_quantizers(net).values(), strict=True)
    )


@pytest.mark.parametrize("scheme", FOLDED.values(), ids=FOLDED)
def test_tied_weights_are_folded_per_layer(scheme: Scheme) -> None:
    net, x = tiny.build("residual")
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    convs[-1].weight = convs[-2].weight
    tiny.quantized(net, x, scheme=scheme)
    before = answer(net, x)
    convert.fold(net)
    assert torch.equal(answer(net, x), before)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_size_is_independent_of_the_quantizer(name: str) -> None:
    """Counted in the quantized network, where quantizers hold additional values."""
    twin, x = tiny.build("conv_bn")
    convert.wrap(twin)
    costs = cost_model(trace(twin, x[:1]))
    net, x = tiny.build("conv_bn")
    layers = tiny.quantized(net, x, bits=3, scheme=scheme_with(name), candidates=(2, 5))
    own = [
        p for module in net.modules() if isinstance(module, Quantizer) for p in module.state_dict().values()
    ]
    weights = [layer.latent_weight() for layer in layers.values()]
    kept = {t.data_ptr() for t in (*own, *weights)}
    floats = [t for t in net.state_dict().values() if t.is_floating_point() and t.data_ptr() not in kept]
    packed = sum(-(-3 * weight.numel() // 8) + 4 * len(weight) for weight in weights)

    config = convert.active_bits(net, "tiny", [layer.name for layer in costs.layers])
    assert costs.size(config) == packed + 4 * sum(t.numel() for t in floats)


def test_single_weight_can_be_normalized() -> None:
    """Its standard deviation is undefined."""
    quantizer = NormalizedClipWeight({4: grid.weights(4, "paper")})
    w = torch.full((1, 1, 1, 1), -0.7, requires_grad=True)
    quantizer.fit(w.detach())
    q = quantizer(w)
    q.sum().backward()
    assert q.item() == pytest.approx(-0.7, rel=1e-6)
    assert quantizer.clipping_level.grad is not None
    assert quantizer.clipping_level.grad.isfinite().all()


def test_recalibrated_norms_hold_batch_means() -> None:
    net, x = tiny.build("conv_bn")
    batches = [x, x + 1]
    momenta = [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = {name: p.clone() for name, p in net.named_parameters()}
    net[1].eval()  # type: ignore[index]
    modes = [module.training for module in net.modules()]

    reestimate_batch_norms(net, batches)

    conv, norm = net[0], net[1]  # type: ignore[index]
    outputs = [answer(conv, batch) for batch in batches]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert [m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(p, parameters[name]) for name, p in net.named_parameters())


def test_recalibration_undoes_mean_removal() -> None:
    """Where channels sum to 1, the mean of a 1 x 1 convolution adds a constant: only statistics shift."""
    net = nn.Sequential(
        nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 5)
    ).eval()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    x = torch.randn(64, 4, 2, 2).softmax(1)
    reestimate_batch_norms(net, [x])
    truth = answer(net, x)
    tiny.quantized(net, x, bits=8, scheme=NORMALIZED)
    off = (answer(net, x) - truth).abs().max()
    reestimate_batch_norms(net, [x])

    assert off > 1
    assert (answer(net, x) - truth).abs().max() < off / 20
