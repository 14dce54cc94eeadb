"""Plain quantization-aware training: one pass and the base optimizer's step; the baseline of the others."""

from saqcli.training.minimizers import reference
from saqcli.training.minimizers.base import Minimizer


class QAT(Minimizer):
    """Descends on the loss at the quantized weights.

    Args:
        model: in training mode when steps are taken.
        base: over parameters of ``model``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> minimizer = QAT(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> loss = minimizer.step(lambda: model(torch.ones(4, 2)).square().mean())
    """

    description = "no perturbation"
    ignored = ("rho", "rho_unit", "perturb", "interval", "reuse", "start")
    reference = staticmethod(reference.plain)
