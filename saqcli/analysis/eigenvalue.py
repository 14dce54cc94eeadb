"""The largest eigenvalue of the Hessian over the quantized weights.

It is the curvature of the sharpest direction. Power iteration: v <- H v / ||H v||, the eigenvalue is <v, H v>. It
converges to the eigenvalue of largest magnitude; if that is negative, a second round on H - lambda I finds the largest.
All starts advance together, so that every batch runs once per iteration.

Source: Liu et al. (arXiv:2111.12273), who report it on 500 training images, as in HAWQ (Dong et al.,
arXiv:1905.03696).
"""

import math
from dataclasses import dataclass

import torch

from saqcli.analysis.base import (
    AnalysisInput,
    Reading,
    Session,
    Settings,
    Vector,
    dot,
    hessian_products,
    seeded,
)
from saqcli.progress import Task


class Start(Reading):
    """The result of one start of the power iteration.

    Attributes:
        eigenvalue: <v, H v> of the last unit vector; a lower bound of the largest eigenvalue.
        iterations: number of products with the Hessian.
        converged: whether the relative change of the eigenvalue fell below the tolerance.
        residual: ||H v - eigenvalue v|| / |eigenvalue|; an eigenvalue is within this relative distance.
    """

    eigenvalue: float
    iterations: int
    converged: bool
    residual: float


class EigenvalueReading(Reading):
    """Largest eigenvalue of the Hessian of the mean cross-entropy.

    Attributes:
        eigenvalue: maximum over the starts.
        mean: over the starts.
        spread: maximum minus minimum over the starts; large if they disagree.
        starts: result of every start.
        lowest: the negative eigenvalue of largest magnitude, if that exceeds the largest eigenvalue; else None.
    """

    eigenvalue: float
    mean: float
    spread: float
    starts: list[Start]
    lowest: float | None


def measure_eigenvalue(analyzed: AnalysisInput, settings: Settings, session: Session) -> EigenvalueReading:
    """Power iteration from several random starts; each stops at the tolerance or after ``settings.iterations``."""
    with session.progress.task("largest Hessian eigenvalue", settings.iterations) as task:
        runs = _iterate(analyzed, settings, 0.0, task)
        lowest = min(run.eigenvalue for run in runs)
        if any(run.eigenvalue < 0 for run in runs):
            runs = _iterate(analyzed, settings, lowest, task)
        else:
            lowest = math.inf
    starts = [Start(**{name: getattr(run, name) for name in Start.model_fields}) for run in runs]
    values = [start.eigenvalue for start in starts]
    return EigenvalueReading(
        eigenvalue=max(values),
        mean=sum(values) / len(values),
        spread=max(values) - min(values),
        starts=starts,
        lowest=None if math.isinf(lowest) else lowest,
    )


@dataclass
class _Run:
    """The state of one start."""

    vector: Vector
    eigenvalue: float = math.nan
    iterations: int = 0
    converged: bool = False
    residual: float = math.inf

    def advance(self, product: Vector, shift: float, tolerance: float) -> None:
        """Use the product H v: update the eigenvalue, and step along (H - shift) v."""
        before, self.eigenvalue = self.eigenvalue, dot(self.vector, product)
        self.iterations += 1
        rest = [p - self.eigenvalue * v for p, v in zip(product, self.vector, strict=True)]
        size = abs(self.eigenvalue)
        self.residual = math.sqrt(dot(rest, rest)) / size if size > 0 else 0.0
        moved = [p - shift * v for p, v in zip(product, self.vector, strict=True)]
        norm = math.sqrt(dot(moved, moved))
        scale = abs(self.eigenvalue - shift)  # the limit of the iteration
        self.converged = norm == 0 or abs(self.eigenvalue - before) < tolerance * min(size or scale, scale)
        if norm > 0:
            self.vector = [part / norm for part in moved]


def _iterate(analyzed: AnalysisInput, settings: Settings, shift: float, task: Task) -> list[_Run]:
    runs = [_Run(_unit_vector(analyzed, settings.seed, start)) for start in range(settings.starts)]
    for _ in range(settings.iterations):
        moving = [run for run in runs if not run.converged]
        if not moving:
            break
        for run, product in zip(
            moving, hessian_products(analyzed, [run.vector for run in moving]), strict=True
        ):
            run.advance(product, shift, settings.tolerance)
        task.advance(images=analyzed.images, eigenvalue=max(run.eigenvalue for run in runs))
    return runs


def _unit_vector(analyzed: AnalysisInput, seed: int, start: int) -> Vector:
    generator = seeded(seed, "eigenvalue", start)
    vector = []
    for layer in analyzed.layers.values():
        like = layer.latent_weight()
        vector.append(torch.randn(like.shape, generator=generator).to(like))
    norm = math.sqrt(dot(vector, vector))
    return [part / norm for part in vector]
