"""Setting the kernel of all quantizers of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from saqcli.quant.kernels.choice import KernelKind, fused_kernels
from saqcli.quant.quantizers.base import quantizers_of


class KernelChoice(NamedTuple):
    """What a model computes with.

    Attributes:
        kind: the kernel that runs.
        reason: why it is not the one that was asked for, in one line; else None.
    """

    kind: KernelKind
    reason: str | None = None


def use_kernels(model: nn.Module, kind: KernelKind) -> KernelChoice:
    """Let every quantizer of ``model`` compute with ``kind``, or with separate operations where that is impossible.

    Outputs and the gradients of inputs are the same to the last bit, those of levels to the order of sums. Quantizers
    that are copied, pickled or moved keep the setting; where it cannot be met later, they use separate operations.

    Example:
        >>> use_kernels(nn.Linear(2, 2), "eager")
        KernelChoice(kind='eager', reason=None)
    """
    choice = KernelChoice(kind)
    if kind == "fused":
        devices = {level.device.type for one in quantizers_of(model) for level in one.state_dict().values()}
        reasons = [found for found in map(fused_kernels, sorted(devices)) if isinstance(found, str)]
        if reasons:
            choice = KernelChoice("eager", f"quantizers run as separate operations: {reasons[0]}")
    for quantizer in quantizers_of(model):
        quantizer.kernel = choice.kind
    return choice


@contextmanager
def fused_on_cpu(model: nn.Module) -> Iterator[None]:
    """Within the context quantizers on a CPU use fused kernels, whose outputs are the same; afterwards their own again.

    Elsewhere the kernels take seconds to build, so that a few batches do not repay them.
    """
    quantizers = list(quantizers_of(model))
    eager = [quantizer for quantizer in quantizers if quantizer.kernel == "eager"]
    try:
        if all(level.device.type == "cpu" for one in quantizers for level in one.state_dict().values()):
            use_kernels(model, "fused")
        yield
    finally:
        for quantizer in eager:
            quantizer.kernel = "eager"
