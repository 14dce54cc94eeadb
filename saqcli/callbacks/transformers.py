"""Sharpness-aware steps in the Trainer of Hugging Face's transformers.

Its ``training_step`` runs the forward and the backward pass, and is documented to be overridden. Here it lets a
minimizer do both, at the perturbed point, and leaves the gradients in the parameters: clipping, optimizer, schedule,
logging and checkpoints stay the Trainer's. A ``TrainerCallback`` would not do: it sees neither the batch nor the loss.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from saqcli.callbacks.base import check_first
from saqcli.errors import ConfigError
from saqcli.training.minimizers import SAQ
from saqcli.training.minimizers.base import Minimizer


class SAQTrainerMixin:
    """A ``transformers.Trainer`` whose steps are sharpness-aware; name it before ``Trainer``.

    ``compute_loss`` runs once per pass, on the same batch. The reported loss is that at the unperturbed weights. The
    state of the minimizer, which methods with an interval have, is not in checkpoints.

    Raises:
        ConfigError: at the first step: ``gradient_accumulation_steps`` above 1, ``fp16``, DeepSpeed or FSDP, or several
            GPUs in one process.

    Example:
        >>> import saqcli as saq
        >>> class Trainer(SAQTrainerMixin):  # and transformers.Trainer
        ...     def create_minimizer(self, model, optimizer):
        ...         return saq.SAQ(model, optimizer, rho=0.3)
    """

    args: Any
    accelerator: Any
    optimizer: Any
    _saq_minimizer: Minimizer | None = None
    _saq_optimizer: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Check the order of the bases."""
        super().__init_subclass__(**options)
        check_first(cls, SAQTrainerMixin, "training_step")

    def create_minimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Minimizer:
        """The minimizer that takes the steps; override it for another one than ``SAQ`` with the paper's radius.

        Args:
            model: as the Trainer wrapped it.
            optimizer: the Trainer's, whose step does nothing here, since the Trainer calls it.
        """
        return SAQ(model, optimizer)

    def training_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Both passes of a minimizer on a batch; returns the loss at the unperturbed weights, detached."""
        trainer = cast(Any, self)
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # as schedule-free ones want
            self.optimizer.train()
        batch = trainer._prepare_inputs(inputs)

        def loss() -> Tensor:
            with trainer.compute_loss_context_manager():
                found: Tensor = trainer.compute_loss(
                    model, dict(batch), num_items_in_batch=num_items_in_batch
                )
            return found

        return self._minimizer_of(model).step(loss)

    def _minimizer_of(self, model: nn.Module) -> Minimizer:
        """The minimizer of this training: every training has an optimizer of its own."""
        if self._saq_minimizer is None or self._saq_optimizer is not self.optimizer:
            self._check()
            self._saq_optimizer = self.optimizer
            self._saq_minimizer = self.create_minimizer(
                model, cast(torch.optim.Optimizer, _Deferred(self.optimizer))
            )
        return self._saq_minimizer

    def _check(self) -> None:
        problem = None
        steps = self.args.gradient_accumulation_steps
        if steps != 1:
            problem = (
                f"gradient_accumulation_steps={steps} has no sharpness-aware step: use 1 with larger batches"
            )
        elif self.accelerator.scaler is not None:
            problem = "fp16 scales the loss, which the minimizer does not know: use bf16 or float32"
        elif self.args.n_gpu > 1:
            problem = (
                f"{self.args.n_gpu} GPUs in one process have no sharpness-aware step: start one process a GPU"
            )
        elif str(getattr(self.accelerator.distributed_type, "name", "")) in (
            "DEEPSPEED",
            "FSDP",
            "MEGATRON_LM",
        ):
            kind = self.accelerator.distributed_type.name
            problem = f"{kind} shards the weights that are to be perturbed: use DistributedDataParallel"
        if problem is not None:
            raise ConfigError(problem)


class _Deferred:
    """An optimizer whose step is left to the Trainer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        """Do nothing: the Trainer clips the gradients, and then calls the optimizer."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)
