"""One pass of evaluation: every weight is quantized once, whatever the number of batches."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import saqcli
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import (
    back_propagate,
    perturbed,
    quantized_layers,
    quantized_once,
    weight_owners,
    weights_given,
)
from saqcli.quant.quantizers import quantizers_of
from saqcli.tasks.classification import Meter, Score
from saqcli.training.loop import evaluate
from tests.support import tiny
from tests.support.networks import NETWORKS, quantize

CPU = torch.device("cpu")


def batches(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (part, torch.randint(tiny.CLASSES, (len(part),), generator=generator))
        for part in images.repeat(3, 1, 1, 1).tensor_split(3)
    ]


def score(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Score:
    with SILENT.task("", 0) as task:
        return evaluate(net, data, task, device=CPU)


def score_batch_by_batch(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Score:
    meter = Meter()
    with torch.no_grad():
        for images, labels in data:
            meter.update(net(images), labels)
    return meter.score()


@pytest.mark.parametrize("name", ["conv_bn", "residual", "mlp"])
def test_weights_are_quantized_once(name: str) -> None:
    net, x = tiny.build(name)
    tiny.quantized(net, x)
    data, owners, calls = batches(x), weight_owners(net.eval()), Counter[int]()
    expected = score_batch_by_batch(net, data)
    for index, layer in enumerate(owners):
        layer.weight_quantizer.register_forward_hook(lambda *_, index=index: calls.update([index]))

    assert score(net, data) == expected
    assert calls == Counter(range(len(owners)))
    assert saqcli.evaluate(net, data) == expected
    assert calls == Counter([*range(len(owners))] * 2)


def test_perturbed_model_is_evaluated_as_before() -> None:
    net, x = tiny.build("conv_bn")
    layers = list(tiny.quantized(net, x).values())
    data = batches(x)
    net.eval()
    noise = [0.1 * torch.randn_like(layer.latent_weight()) for layer in layers]

    with perturbed(layers, noise):
        assert score(net, data) == score_batch_by_batch(net, data) != score(net, data[:1])


def test_weights_are_quantized_again_after_errors() -> None:
    net, x = tiny.build("conv_bn")
    tiny.quantized(net, x)
    with pytest.raises(RuntimeError):
        score(net.eval(), [(x[:, :1], torch.zeros(len(x), dtype=torch.long))])

    assert all(layer.given_weight is None for layer in weight_owners(net))


def test_given_weights_are_never_registered() -> None:
    """Before quantizers are installed, Q(w) is the Parameter itself."""
    net, x = tiny.build("residual")
    convert.wrap(net)
    parameters, layers = dict(net.named_parameters()), weight_owners(net)
    with torch.no_grad(), weights_given(layers):
        pass
    with weights_given(layers):
        assert dict(net.named_parameters()).keys() == parameters.keys()
        net(x).sum().backward()
        back_propagate(layers)
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert all("given_from" not in layer._parameters for layer in layers)


def test_overlapping_evaluations_leave_nothing_behind() -> None:
    model = quantize(NETWORKS["conv_bn"]).model.eval()
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):  # as in two threads
        stack.enter_context(fused_on_cpu(model))
        stack.enter_context(quantized_once(model))
    first.close()
    second.close()

    assert all(layer.given_weight is None for layer in quantized_layers(model).values())
    assert {quantizer.kernel for quantizer in quantizers_of(model)} == {"eager"}
