"""Reconstruction and compensation in the library."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saqcli as saq
from saqcli.errors import ConfigError
from tests.support.modules import build, inputs_of, labels_of, small

X = inputs_of("hand_written", 16)[0]
BATCHES = [X[:8], X[8:]]


def quantized(**options: Any) -> nn.Module:
    return saq.quantize_model(build("hand_written"), 3, calibration=BATCHES, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def codes(model: nn.Module) -> list[Tensor]:
    from saqcli.quant.layer import quantized_layers

    return [
        layer.weight_quantizer.codes(layer.effective_weight())  # type: ignore[operator]
        for layer in quantized_layers(model).values()
    ]


def test_given_float_module_is_the_one_within() -> None:
    one, other = quantized(), quantized()
    net = build("hand_written")
    kept = state(net)

    errors = saq.reconstruct(one, BATCHES, iterations=5)

    assert saq.reconstruct(other, BATCHES, iterations=5, float_model=net) == errors
    assert same(state(one), state(other))
    assert same(kept, state(net))


def test_no_iterations_change_nothing() -> None:
    q = quantized()
    before = state(q)

    saq.reconstruct(q, BATCHES, iterations=0)
    errors = saq.reconstruct(q, BATCHES, iterations=0)  # the float network is still there

    assert same(before, state(q))
    assert [error.name for error in errors] == ["stem", "left to right", "head"]


def test_reconstructed_modules_are_saved_and_trained(tmp_path: Any) -> None:
    q = quantized()
    saq.compensate(q, BATCHES)
    saq.reconstruct(q, BATCHES, iterations=5, float_model=build("hand_written"))
    saq.save(q, tmp_path / "net.safetensors")

    loaded = saq.load(tmp_path / "net.safetensors", model=build("hand_written", seed=5)).eval()
    q.eval()

    assert torch.equal(loaded(X), q(X))
    assert all(torch.equal(one, other) for one, other in zip(codes(loaded), codes(q), strict=True))
    saq.finetune(q, [(X, labels_of(16))], epochs=1)
    assert bool(q(X).isfinite().all())


def test_second_calls_need_the_float_module(tmp_path: Any) -> None:
    q = quantized()
    saq.reconstruct(q, BATCHES, iterations=2)
    saq.save(q, tmp_path / "net.safetensors")
    loaded = saq.load(tmp_path / "net.safetensors", model=build("hand_written"))
    for one in (q, loaded):
        for call in (saq.reconstruct, saq.compensate):
            with pytest.raises(ConfigError, match="give `float_model`, the float module"):
                call(one, BATCHES)
    before = state(q)
    with pytest.raises(ConfigError, match="is not the float module of"):
        saq.reconstruct(q, BATCHES, float_model=small())
    with pytest.raises(ConfigError, match="`float_model` is quantized"):
        saq.reconstruct(q, BATCHES, float_model=quantized())
    assert same(before, state(q))


def test_mistakes_are_one_line() -> None:
    q = quantized()
    before = state(q)
    with pytest.raises(ConfigError, match="has no option 'iteration': choose from iterations, batch_size"):
        saq.reconstruct(q, BATCHES, iteration=3)
    with pytest.raises(ConfigError, match="is not quantized"):
        saq.reconstruct(build("hand_written"), BATCHES)
    with pytest.raises(saq.SaqError, match="drop"):
        saq.reconstruct(q, BATCHES, drop=2.0)
    assert same(before, state(q))


def test_labels_and_streams_are_taken() -> None:
    one, other = quantized(), quantized()

    saq.reconstruct(one, BATCHES, iterations=3)
    saq.reconstruct(other, iter([(X[:8], labels_of(8)), (X[8:], labels_of(8))]), iterations=3)

    assert same(state(one), state(other))
