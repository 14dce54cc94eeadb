"""The input, settings, session and reading of instruments.

An instrument evaluates a quantized model in eval mode on a fixed set of images and returns a reading: a strict
object that converts to JSON and back. Every change to the model is undone bit for bit.

``observe_inputs`` records the values that reach the input quantizers. Unlike ``quant.calibration``, which runs the
float network, every layer computes with its own bits, and the values are recorded just before rounding.

``hessian_products`` differentiates twice. The variables are the quantized weights of all quantized layers: zero leaves
in the ports, so that the function is L(Q(w) + leaf) at leaf = 0, averaged over all images. Activation quantizers pass
gradients straight through.
Differentiating twice gives the Hessian of the network in which every activation quantizer is replaced by its
straight-through line at the point,

    q(x) = Q(x0) + inside * (x - x0)          inside = 1 where x0 is not clipped, else 0,

which has the value and the gradient of training, and no jumps. It is a twice differentiable function of the weights
(almost everywhere, as with ReLU), so its Hessian is symmetric, and power iteration and Hutchinson's estimate apply.

Source of the choice of variables: Liu et al., arXiv:2111.12273, section 5, which reports the largest
eigenvalue of the quantized models; products as in Pearlmutter (1994).
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from saqcli.config import WIDTHS
from saqcli.progress import SILENT, Progress, Task
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, perturbed, zero_ports
from saqcli.tasks import classification
from saqcli.tasks.classification import Score
from saqcli.training import hessian
from saqcli.training.loop import evaluate
from saqcli.training.perturbation import Gradients, PerturbedSet, RadiusUnit, add_up

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Reading(BaseModel):
    """The result of an instrument. Plain values only; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def finished(self) -> bool:
        """Whether the measurement is complete."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The reading as JSON-compatible values."""
        return self.model_dump(mode="json")


class Settings(BaseModel):
    """Settings that instruments share; each uses some of them, and may add its own in a derived class.

    Attributes:
        seed: random seed of vectors and directions.
        rho: radius of the perturbation, in ``rho_unit``.
        rho_unit: deviations of each layer's weights, or absolute.
        starts: number of power iterations.
        tolerance: relative change of the eigenvalue at which an iteration stops.
        iterations: maximum number per start.
        samples: random vectors for the trace.
        candidates: bit-widths for the sensitivity.
        grid: points along each axis of the landscape; odd, so that there is a center.
        span: the landscape extends from -span to span, in norms of the weights' filters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rho: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    rho_unit: RadiusUnit = "deviation"
    starts: Count = 3
    tolerance: Positive = 1e-3
    iterations: Count = 100
    samples: Annotated[int, Field(ge=2)] = 64
    candidates: Annotated[tuple[int, ...], Field(min_length=1)] = WIDTHS
    grid: Annotated[int, Field(ge=3)] = 21
    span: Positive = 1.0


@dataclass(frozen=True)
class Session:
    """How an instrument communicates with its caller.

    Attributes:
        progress: reports all long-running work.
        earlier: an unfinished reading of the same analysis input and settings to resume from.
        keep: called with an unfinished reading after every completed piece; may save it, and may raise to stop.
    """

    progress: Progress = SILENT
    earlier: Reading | None = None
    keep: Callable[[Reading], None] = field(default=lambda reading: None)


@dataclass(frozen=True)
class AnalysisInput:
    """A quantized model and the images to analyze it on.

    Attributes:
        model: wrapped, quantizers installed, in eval mode.
        layers: its quantized layers by name, in execution order.
        batches: normalized images (N, C, H, W) and labels (N,), on the model's device.
        scheme: its quantizers.
        latent: whether the float weights of its training are available; otherwise they equal the quantized ones.
    """

    model: nn.Module
    layers: dict[str, QuantizedLayer]
    batches: Sequence[tuple[Tensor, Tensor]]
    scheme: Scheme = field(default_factory=Scheme)
    latent: bool = True

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(len(labels) for _, labels in self.batches)

    @property
    def device(self) -> torch.device:
        """The device of images and model."""
        return self.batches[0][0].device

    def score(self) -> Score:
        """Loss and accuracy over all images, as ``saq eval`` computes them."""
        with SILENT.task("", len(self.batches)) as task:
            return evaluate(self.model, self.batches, task, device=self.device)

    def gradients(self, of: PerturbedSet, title: str, session: "Session") -> Gradients:
        """Gradients of the mean loss over all images for the members of ``of``; ``title`` names the task."""
        sums: Gradients = []
        with session.progress.task(title, len(self.batches)) as task:
            for loss, (images, _) in zip(self.losses(), self.batches, strict=True):
                sums = add_up(sums, of.gradients(loss)[1])
                task.advance(images=len(images))
        return sums

    def losses(self) -> Iterator[Callable[[], Tensor]]:
        """One function per batch: its share of the mean cross-entropy; the shares sum to the mean."""
        count = self.images
        for images, labels in self.batches:
            yield lambda images=images, labels=labels: (  # type: ignore[misc]
                classification.total_loss(self.model(images), labels) / count
            )


def seeded(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``key`` alone."""
    numbers = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key]
    state = np.random.SeedSequence((seed, *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def finite_or_none(value: float) -> float | None:
    """``value``, or None if it is NaN or infinite, which JSON cannot represent."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def observe_inputs(analyzed: AnalysisInput, seed: int, task: Task) -> dict[str, InputStatistics]:
    """Range and a sample of the values at every layer's input, over all images.

    Args:
        analyzed: analysis input; unchanged.
        seed: random seed of the sample.
        task: reports every batch.
    """
    statistics = {name: InputStatistics() for name in analyzed.layers}
    handles = []
    for name, layer in analyzed.layers.items():
        generator = seeded(seed, "inputs", name)

        def note(
            module: nn.Module,
            arguments: tuple[Tensor, ...],
            name: str = name,
            generator: torch.Generator = generator,
        ) -> None:
            statistics[name].update(arguments[0], generator)

        handles.append(layer.input_quantizer.register_forward_pre_hook(note))
    try:
        for images, _ in analyzed.batches:
            analyzed.model(images)
            task.advance(images=len(images))
    finally:
        for handle in handles:
            handle.remove()
    return statistics


Vector = list[Tensor]  # one tensor per layer, in the order of the input's layers


def hessian_products(analyzed: AnalysisInput, vectors: Sequence[Vector]) -> list[Vector]:
    """H v for every v in ``vectors``, accumulated over all images; every batch runs once for all of them.

    Args:
        analyzed: analysis input, in eval mode.
        vectors: one tensor per layer each, in the shape of its weight.

    Returns:
        In the structure of ``vectors``; zero for a layer without influence on the loss.
    """
    layers = list(analyzed.layers.values())
    sums: list[Vector] = [[torch.zeros_like(part) for part in vector] for vector in vectors]
    for loss in analyzed.losses():
        ports = zero_ports(layers)
        with hessian.twice_differentiable(analyzed.model), perturbed(layers, ports):
            product_with = hessian.HessianProduct(loss(), ports)
            for total, vector in zip(sums, vectors, strict=True):
                for part, more in zip(total, product_with(vector), strict=True):
                    part += more
    return sums


def dot(one: Vector, other: Vector) -> float:
    """Inner product over all layers, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
