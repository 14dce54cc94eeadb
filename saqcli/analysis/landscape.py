"""The loss over a plane through the quantized weights.

    L(Q(w) + a * d1 + b * d2),   a and b from -span to span

d1 and d2 are Gaussian, drawn per layer from (seed, name of the layer), so that two models of one network are evaluated
along the same directions. They are orthogonalized and scaled so that every filter has the norm of the quantized filter
that it is added to (filter normalization); biases and norms are not perturbed. Perturbing the latent weights instead
would show the plateaus of rounding.

Source: Li et al., *Visualizing the Loss Landscape of Neural Nets*, arXiv:1712.09913, section 4; orthogonal
directions as in Liu et al., arXiv:2111.12273.
"""

import torch
from torch import Tensor

from saqcli.analysis.base import (
    AnalysisInput,
    Reading,
    Session,
    Settings,
    Vector,
    dot,
    finite_or_none,
    seeded,
)
from saqcli.quant.layer import QuantizedLayer, perturbed

MIN_REMAINDER = 1e-6  # a second direction is not orthogonalized if that leaves less than this share


class LandscapeReading(Reading):
    """Loss and accuracy on a square grid of points.

    Attributes:
        grid: points along each axis, odd.
        span: the axes extend from -span to span.
        done: points measured so far, row by row.
        loss: row i, column j is a = axis[j], b = axis[i]; None if not measured, NaN or infinite.
        top1: in percent, in the same order; None if not measured.
        cosine: of the two directions.
    """

    grid: int
    span: float
    done: int
    loss: list[list[float | None]]
    top1: list[list[float | None]]
    cosine: float

    @property
    def finished(self) -> bool:
        """Whether every point was measured."""
        return self.done >= self.grid**2

    @property
    def axis(self) -> list[float]:
        """The coordinates along either axis; the middle one is exactly 0."""
        return axis_of(self.grid, self.span)


def axis_of(grid: int, span: float) -> list[float]:
    """``grid`` coordinates from -span to span, symmetric, 0 in the middle."""
    half = grid // 2
    return [span * (k - half) / half for k in range(grid)]


def measure_landscape(analyzed: AnalysisInput, settings: Settings, session: Session) -> LandscapeReading:
    """Evaluate the model at every point of the grid; resumes from an earlier, unfinished reading."""
    layers = list(analyzed.layers.values())
    one, two = directions(analyzed.layers, settings.seed)
    grid, axis = settings.grid, axis_of(settings.grid, settings.span)
    loss: list[float | None] = [None] * grid**2
    top1: list[float | None] = [None] * grid**2
    done, cosine = 0, _cosine(one, two)
    if isinstance(session.earlier, LandscapeReading):
        done = session.earlier.done
        loss = [value for row in session.earlier.loss for value in row]
        top1 = [value for row in session.earlier.top1 for value in row]

    def unfinished(done: int) -> LandscapeReading:
        rows = [slice(first, first + grid) for first in range(0, grid**2, grid)]
        return LandscapeReading(
            grid=grid,
            span=settings.span,
            done=done,
            loss=[loss[row] for row in rows],
            top1=[top1[row] for row in rows],
            cosine=cosine,
        )

    with session.progress.task("loss landscape", grid**2) as task:
        task.advance(done)
        for point in range(done, grid**2):
            row, column = divmod(point, grid)
            shift = [axis[column] * a + axis[row] * b for a, b in zip(one, two, strict=True)]
            with perturbed(layers, shift):
                score = analyzed.score()
            loss[point], top1[point] = finite_or_none(score.loss), score.top1
            task.advance(images=score.images, loss=score.loss, top1=score.top1)
            session.keep(unfinished(point + 1))
    return unfinished(grid**2)


@torch.no_grad()
def directions(layers: dict[str, QuantizedLayer], seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Two filter-normalized directions, one tensor per layer, in the shape of its weight.

    They are orthogonal filter by filter, except for filters of a single weight, where this is impossible.
    """
    first: list[Tensor] = []
    second: list[Tensor] = []
    for name, layer in layers.items():
        weight = layer.quantized_weight()
        rows = weight.transpose(0, layer.channel_dim) if weight.dim() > 1 else weight[None]
        flat = rows.flatten(1)
        noise = [
            torch.randn(weight.shape, generator=seeded(seed, "landscape", axis, name)).to(weight)
            for axis in range(2)
        ]
        a, b = ((d.transpose(0, layer.channel_dim) if d.dim() > 1 else d[None]).flatten(1) for d in noise)
        rest = b - (a * b).sum(1, keepdim=True) / a.square().sum(1, keepdim=True).clamp_min(1e-30) * a
        b = torch.where(rest.norm(dim=1, keepdim=True) > MIN_REMAINDER * b.norm(dim=1, keepdim=True), rest, b)
        size = flat.norm(dim=1, keepdim=True)
        for found, d in ((first, a), (second, b)):
            scaled = (d * (size / d.norm(dim=1, keepdim=True).clamp_min(1e-30))).reshape(rows.shape)
            found.append(
                (scaled.transpose(0, layer.channel_dim) if weight.dim() > 1 else scaled[0]).contiguous()
            )
    return first, second


def _cosine(one: Vector, two: Vector) -> float:
    norms = (dot(one, one) * dot(two, two)) ** 0.5
    return dot(one, two) / norms if norms > 0 else 0.0
