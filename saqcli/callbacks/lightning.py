"""Sharpness-aware steps in Lightning's automatic optimization.

Lightning's step is ``optimizer_step(closure)``, whose closure runs ``training_step`` and then ``backward``. Both are
public hooks: here ``backward`` keeps the loss with its graph, and ``optimizer_step`` lets the minimizer call the
closure once per pass. Clipping, schedules, hooks and counters stay Lightning's. A ``Callback`` would not do: its hooks
see the loss, but cannot keep Lightning from the backward pass, which would cost a third pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.callbacks.base import check_first
from saqcli.errors import ConfigError
from saqcli.training.minimizers import SAQ
from saqcli.training.minimizers.base import Minimizer

STATE = "saq_minimizer"  # in Lightning's checkpoints


class SAQLightningMixin:
    """A ``LightningModule`` whose steps are sharpness-aware; name it before ``LightningModule``.

    ``training_step`` runs once per pass, on the same batch. ``self.log`` acts in the first pass, at the unperturbed
    weights; metrics that ``training_step`` updates by itself see both. The minimizer's state is in checkpoints.

    Raises:
        ConfigError: at the first step: ``accumulate_grad_batches`` above 1, precision ``16-mixed``, a ``training_step``
            without a loss, or manual optimization, which needs a minimizer and no mixin.

    Example:
        >>> import saqcli as saq
        >>> class Net(SAQLightningMixin):  # and lightning.LightningModule
        ...     def configure_minimizer(self, model, optimizer):
        ...         return saq.SAQ(model, optimizer, rho=0.3)
    """

    trainer: Any
    automatic_optimization: bool
    _saq_minimizer: Minimizer | None = None
    _saq_state: dict[str, Any] | None = None  # of a checkpoint, until there is a minimizer
    _saq_loss: Tensor | None = None
    _saq_passes = 0  # of the current step

    def __init_subclass__(cls, **options: Any) -> None:
        """Check the order of the bases."""
        super().__init_subclass__(**options)
        if any("optimizer_step" in vars(base) for base in cls.__mro__ if base is not SAQLightningMixin):
            check_first(cls, SAQLightningMixin, "optimizer_step")

    def configure_minimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Minimizer:
        """The minimizer that takes the steps; override it for another one than ``SAQ`` with the paper's radius.

        Args:
            model: this module, as the strategy wrapped it.
            optimizer: of ``configure_optimizers``, as Lightning wrapped it.
        """
        return SAQ(model, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Keep the loss, which the minimizer differentiates."""
        if not self.automatic_optimization:
            raise ConfigError(
                "manual optimization needs no mixin: remove it, and call saqcli.SAQ(model, self.optimizers())"
                ".step(closure) in training_step"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} has no sharpness-aware step: use 1 "
                "with larger batches, or manual optimization with a list of closures"
            )
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                "precision 16-mixed scales the loss before the minimizer sees it: use bf16-mixed or 32"
            )
        self._saq_loss = loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """A step of the minimizer, which calls Lightning's closure once per pass."""
        assert optimizer_closure is not None
        closure = optimizer_closure

        def loss() -> Tensor:
            self._saq_passes += 1
            self._saq_loss = None
            closure()
            return self._kept()

        try:
            self._minimizer_of(optimizer).step(loss)
        finally:
            self._saq_passes, self._saq_loss = 0, None

    def _kept(self) -> Tensor:
        """The loss that ``backward`` was given."""
        if self._saq_loss is None:
            raise ConfigError("training_step returned no loss: return one; batches cannot be skipped")
        return self._saq_loss

    def _minimizer_of(self, optimizer: Any) -> Minimizer:
        """The minimizer of this fit: every fit has an optimizer of its own."""
        if self._saq_minimizer is None or self._saq_minimizer.base is not optimizer:
            self._saq_minimizer = self.configure_minimizer(self.trainer.strategy.model, optimizer)
            if self._saq_state is not None:
                self._saq_minimizer.load_state_dict(self._saq_state)
                self._saq_state = None
        return self._saq_minimizer

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As ``LightningModule.log``, in the first pass of a step only."""
        if self._saq_passes <= 1:
            super().log(*args, **kwargs)  # type: ignore[misc]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the minimizer."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self._saq_minimizer is not None:
            checkpoint[STATE] = self._saq_minimizer.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state for the minimizer of the next fit."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        self._saq_state = checkpoint.get(STATE)
