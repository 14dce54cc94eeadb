"""Codes of weights by coordinate descent on the squared error of a layer's output: no backward pass, seconds.

With the second moments H and C of a layer's operands (``second_moments``), the error of one output channel with step s
and codes k is a quadratic form,

    J(s, k) = s^2 k H k' - 2 s k r + const          r = C w'         w: the float weight

One code after the other takes the best value of the grid with all others held, and after each sweep so does the step:

    k_i <- nearest code to  k_i + (r / s - H k)_i / H_ii               s <- k r / k H k

No step raises J. A first sweep from the float weights, w / s, in the place of codes lets each code make up for those
before it, as GPTQ does; of its result and that of the sweeps from the nearest codes each channel keeps the better one.

The target is the float network's output on its own input, so that a layer makes up for the errors before it. Where an
offset can be folded, into the layer's bias or the running mean of the batch norm that reads its output, moments are
about the means, and the offset makes the means equal. H and C get a diagonal of ``DAMPING`` times the mean of H's,
which pulls towards the float weight what few images leave open.

Source: COMQ, arXiv:2403.07134, for codes and steps; GPTQ, arXiv:2210.17323, for the first sweep and the damping;
GPTAQ, arXiv:2504.02692, for the target. The latter two solve with the inverse of H and visit each weight once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.calls import Call
from saqcli.quant.correction import Interception, bias_of
from saqcli.quant.grid import AnyGrid
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, quantized_layers
from saqcli.quant.quantizers.base import Quantizer
from saqcli.reconstruction.activations import Rows
from saqcli.reconstruction.block import BlockError, measured
from saqcli.reconstruction.blocks import Block
from saqcli.reconstruction.rounding import SoftRounding
from saqcli.reconstruction.second_moments import (
    Operands,
    SecondMoments,
    count_patches,
    has_patches,
    patches,
    rows_wanted,
)

SWEEPS = 4
DAMPING = 0.01  # of the mean diagonal
PART = 64  # codes that see each other's changes at once
LEAST_DIAGONAL = 1e-30  # for a group without input

BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def descend_block(
    block: Block,
    model: nn.Module,
    float_model: nn.Module,
    inputs: Rows,
    float_inputs: Rows,
    targets: Rows,
    norms: Mapping[str, str],
    *,
    batch_size: int = 32,
    sweeps: int = SWEEPS,
) -> BlockError:
    """Choose the codes of all layers of a block, in order of execution, in place.

    A block that does not become better stays as it was, bit for bit.

    Args:
        block: the part of ``model``.
        model: quantized and calibrated; its mode is restored.
        float_model: its float network, wrapped.
        inputs: of the block, (N, ...), from the quantized blocks before it.
        float_inputs: the same from the float network.
        targets: outputs of the float block.
        norms: the batch norm that reads the output of a layer, by the layer's name; see ``norms_after``.
        batch_size: images that are computed together.
        sweeps: over all codes of a layer; with 0 nothing changes.
    """
    with in_eval_mode(model), in_eval_mode(float_model):
        before, power = measured(block, model, inputs, targets)
        if not sweeps:
            return BlockError(block.name, before / power, before / power)
        layers, in_float = quantized_layers(model), quantized_layers(float_model)
        kept: list[tuple[Tensor, Tensor]] = []
        for name in block.layers:
            if name not in layers or not can_descend(layers[name], model):
                continue
            layer, twin = layers[name], in_float[name]
            norm = model.get_submodule(norms[name]) if name in norms else None
            float_norm = float_model.get_submodule(norms[name]) if name in norms else None
            moments = _measured(block, model, float_model, name, inputs, float_inputs, batch_size)
            if moments is None:
                continue
            kept += [(tensor, tensor.clone()) for tensor in _tensors(layer, norm)]
            offset = bias_of(layer) is not None or norm is not None
            chosen = descend_layer(layer, twin.effective_weight(), moments, offset=offset, sweeps=sweeps)
            if chosen and offset:
                _equal_means(layer, twin, norm, float_norm, moments)
        after, _ = measured(block, model, inputs, targets)
        if not after < before:
            for tensor, value in reversed(kept):
                tensor.copy_(value)
            after = before
    return BlockError(block.name, before / power, after / power)


def can_descend(layer: QuantizedLayer, model: nn.Module) -> bool:
    """Whether a layer's codes can be chosen: no other layer has its weight, and they are those of w / step."""
    sharing = [each for each in quantized_layers(model).values() if layer in each.tied_to]
    return has_patches(layer) and not layer.tied_to and not sharing and SoftRounding.suits(layer)


def norms_after(model: nn.Module, call: Call) -> dict[str, str]:
    """The batch norm with running statistics that reads the output of a layer, by the layer's name; both run once."""
    with in_eval_mode(model), torch.no_grad(), _Followers(model) as followers:
        call.run(model)
    ran = followers.order
    return {
        layer: norm for layer, norm in followers.found.items() if ran.count(layer) == ran.count(norm) == 1
    }


class _Followers(Interception):
    def __init__(self, model: nn.Module) -> None:
        norms: list[Any] = [m for m in model.modules() if isinstance(m, BatchNorm)]
        super().__init__([norm for norm in norms if norm.running_mean is not None])
        self._names = {module: name for name, module in model.named_modules()}
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # by id; kept alive
        self.found: dict[str, str] = {}
        self.order: list[str] = []

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        """Note the layer."""
        self._outputs[id(output)] = self._names[layer], output
        self.order.append(self._names[layer])
        return output

    def norm_input(self, norm: Any, x: Tensor) -> None:
        """Note which layer the norm follows."""
        name, _ = self._outputs.get(id(x), (None, x))
        self.order.append(self._names[norm])
        if name is not None:
            self.found[name] = self._names[norm]


def _tensors(layer: QuantizedLayer, norm: Any) -> list[Tensor]:
    """All that the descent of one layer may change."""
    quantizer, bias = layer.weight_quantizer, bias_of(layer)
    found = [layer.latent_weight(), *quantizer.parameters(), *quantizer.buffers()]
    if bias is not None:
        found.append(bias)
    if norm is not None:
        affine = [] if norm.weight is None else [norm.weight, norm.bias]
        found += [norm.running_mean, norm.running_var, *affine]
    return found


def _measured(
    block: Block,
    model: nn.Module,
    float_model: nn.Module,
    name: str,
    inputs: Rows,
    float_inputs: Rows,
    batch_size: int,
) -> SecondMoments | None:
    """The moments of one layer's operands; None if it runs differently in the two networks."""
    layer, twin = quantized_layers(model)[name], quantized_layers(float_model)[name]
    moments, generator = SecondMoments(), torch.Generator().manual_seed(0)
    for start in range(0, len(inputs), batch_size):
        index = torch.arange(start, min(start + batch_size, len(inputs)))
        with Operands(layer) as quantized:
            block(model, inputs[index])
        with Operands(twin) as in_float:
            block(float_model, float_inputs[index])
        if not quantized.calls or len(quantized.calls) != len(in_float.calls):
            return None
        for one, other in zip(quantized.calls, in_float.calls, strict=True):
            if one[0].shape != other[0].shape:
                return None
            count = count_patches(layer, one)
            wanted = round(rows_wanted(layer) * len(index) / len(inputs) / len(quantized.calls))
            chosen = torch.randperm(count, generator=generator)[: max(1, wanted)].sort().values
            moments.add(patches(layer, one, chosen), patches(layer, other, chosen))
    moments.average()
    return moments


@torch.no_grad()
def descend_layer(
    layer: QuantizedLayer, target: Tensor, moments: SecondMoments, *, offset: bool, sweeps: int = SWEEPS
) -> bool:
    """Choose codes and steps of one layer's weight, and make the latent weight ``step * code``.

    Args:
        layer: see ``can_descend``.
        target: the float weight, in the weight's shape.
        moments: of its operands.
        offset: whether an offset of every output channel is free.
        sweeps: over all codes.

    Returns:
        Whether that was possible; otherwise nothing has changed.
    """
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    weight = layer.latent_weight()
    groups = getattr(layer, "groups", 1)
    rows = (groups, len(weight) // groups, -1)
    step = quantizer.step().double().expand(len(weight), *(1,) * (weight.dim() - 1)).reshape(*rows[:2], 1)
    problem = Problem.of(target.double().reshape(rows), moments, offset=offset)
    start = quantizer.codes(weight).double().reshape(rows)
    shared = quantizer.shape == ()
    codes, steps = descend(problem, start, step, quantizer.grid(), sweeps, shared=shared)
    return _harden(layer, codes.reshape(weight.shape), (steps / step).reshape(-1), shared=shared)


@dataclass(frozen=True)
class Problem:
    """The quadratic forms of all output channels of a layer, float64.

    Attributes:
        h: (groups, d, d), with the damping.
        r: (groups, channels, d): C w' of every channel.
        float_weight: (groups, channels, d).
    """

    h: Tensor
    r: Tensor
    float_weight: Tensor

    @classmethod
    def of(cls, float_weight: Tensor, moments: SecondMoments, *, offset: bool) -> "Problem":
        """The problem of a layer; see the module's docstring."""
        about = moments.centered() if offset else moments
        diagonal = about.quantized.diagonal(dim1=1, dim2=2).mean(1).clamp_min(LEAST_DIAGONAL)
        unit = torch.eye(about.quantized.shape[1], dtype=diagonal.dtype, device=diagonal.device)
        damping = DAMPING * diagonal.view(-1, 1, 1) * unit
        return cls(
            about.quantized + damping,
            torch.einsum("gij,gcj->gci", about.mixed + damping, float_weight),
            float_weight,
        )

    def in_order(self, order: Tensor) -> "Problem":
        """The same problem with the inputs of every group in ``order``, (groups, d)."""
        h = _along(_along(self.h, order, 1), order, 2)
        return Problem(h, _along(self.r, order, 2), _along(self.float_weight, order, 2))

    def objective(self, codes: Tensor, step: Tensor) -> Tensor:
        """J without its constant, (groups, channels)."""
        curved = torch.einsum("gci,gij,gcj->gc", codes, self.h, codes)
        return step.squeeze(2) ** 2 * curved - 2 * step.squeeze(2) * (codes * self.r).sum(2)


def descend(
    problem: Problem, codes: Tensor, step: Tensor, grid: AnyGrid, sweeps: int, *, shared: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and steps of low error; no channel's is above that of the given ones, all channels' with a shared step.

    Args:
        problem: of a layer.
        codes: to start from, (groups, channels, d), on the grid.
        step: (groups, channels, 1), positive.
        grid: the codes to choose from.
        sweeps: over all codes.
        shared: whether all channels have one step.
    """
    order = problem.h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    ordered = problem.in_order(order)
    found = []
    for start in (codes, problem.float_weight / step):
        best, steps = _along(start, order, 2), step
        for _ in range(sweeps):
            best = sweep(ordered, best, steps, grid)
            steps = best_step(ordered, best, steps, shared=shared)
        found.append((_along(best, order.argsort(dim=1), 2), steps))
    (codes, step), (other, other_step) = found
    better = problem.objective(other, other_step) < problem.objective(codes, step)
    if shared:
        total = problem.objective(other, other_step).sum() < problem.objective(codes, step).sum()
        better = total.expand_as(better)
    better = better.unsqueeze(2)
    return torch.where(better, other, codes), torch.where(better, other_step, step)


def _along(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """``x``, (groups, ., .), with the positions of one dimension in the order (groups, d) of its group."""
    index = order.unsqueeze(3 - dim).expand_as(x)
    return x.gather(dim, index)


def sweep(problem: Problem, codes: Tensor, step: Tensor, grid: AnyGrid) -> Tensor:
    """Every code once, in order. What the codes of a part change elsewhere is added up in one product (as in GPTQ)."""
    codes = codes.clone()
    diagonal = problem.h.diagonal(dim1=1, dim2=2)  # (groups, d)
    rest = problem.r / step - codes @ problem.h
    for start in range(0, codes.shape[2], PART):
        part = slice(start, min(start + PART, codes.shape[2]))
        near, h, before = rest[:, :, part].clone(), problem.h[:, part, part], codes[:, :, part].clone()
        for i in range(near.shape[2]):
            old = codes[:, :, start + i].clone()  # (groups, channels)
            new = grid.nearest(old + near[:, :, i] / diagonal[:, start + i].unsqueeze(1))
            codes[:, :, start + i] = new
            near -= (new - old).unsqueeze(2) * h[:, i].unsqueeze(1)
        rest -= (codes[:, :, part] - before) @ problem.h[:, part]
    return codes


def best_step(problem: Problem, codes: Tensor, step: Tensor, *, shared: bool) -> Tensor:
    """The step of least error with the codes held; the old one where that is not positive."""
    curved = torch.einsum("gci,gij,gcj->gc", codes, problem.h, codes)
    linear = (codes * problem.r).sum(2)
    if shared:
        curved, linear = (each.sum().expand_as(each) for each in (curved, linear))
    best = (linear / curved).unsqueeze(2)
    return torch.where((best > 0) & best.isfinite(), best, step)


def _harden(layer: QuantizedLayer, codes: Tensor, ratio: Tensor, *, shared: bool) -> bool:
    """Scale the levels of a layer's weight by ``ratio``, one per channel, and give its latent weight these codes."""
    quantizer, weight = layer.weight_quantizer, layer.latent_weight()
    assert isinstance(quantizer, Quantizer)
    tensors = [weight, *quantizer.parameters(), *quantizer.buffers()]
    kept = [tensor.clone() for tensor in tensors]
    factor = ratio[0] if shared else ratio.view([-1 if size > 1 else 1 for size in quantizer.shape])
    for level in tensors[1:]:
        level.copy_(level.double() * factor)
    weight.copy_(quantizer.step() * codes.to(weight))
    if torch.equal(quantizer.codes(weight), codes.to(quantizer.codes(weight))):
        return True
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)
    return False


def _equal_means(
    layer: QuantizedLayer, twin: QuantizedLayer, norm: Any, float_norm: Any, moments: SecondMoments
) -> None:
    """Give the output of a layer, or of the batch norm that reads it, its float mean, and undo earlier corrections."""
    groups = len(moments.mean)
    quantized = (
        layer.weight_quantizer(layer.effective_weight()).double().reshape(groups, -1, moments.mean.shape[1])
    )
    in_float = twin.effective_weight().double().reshape(quantized.shape)
    moved = torch.einsum("gci,gi->gc", quantized, moments.mean)
    moved = (moved - torch.einsum("gci,gi->gc", in_float, moments.float_mean)).flatten()
    if norm is not None:
        for tensor, value in zip(_statistics(norm), _statistics(float_norm), strict=True):
            tensor.copy_(value)
        norm.running_mean.add_(moved)
        moved = torch.zeros_like(moved)
    if (bias := bias_of(layer)) is not None:
        before = bias_of(twin)
        assert before is not None
        bias.copy_(before.double() - moved)


def _statistics(norm: Any) -> list[Tensor]:
    found: list[Tensor] = [norm.running_mean, norm.running_var]
    return found if norm.weight is None else [*found, norm.weight, norm.bias]
