"""The trace of every layer's Hessian block: the loss's curvature along its weights.

Hutchinson: E <z, H z> = tr H for random signs z. One z over all layers at once serves every layer, since the
blocks between two layers average to zero:

    tr H_l = E <z_l, (H z)_l>

HAWQ-V2 (Dong et al., arXiv:1911.03852) weights quantization errors with the average trace per weight.
"""

import math

import torch

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings, Vector, hessian_products, seeded

VECTORS_PER_PASS = 4  # vectors per pass over the images: they share the forward and the first backward pass


class LayerTrace(Reading):
    """The trace of one layer's block.

    Attributes:
        name: of the layer.
        weights: number of weights.
        trace: mean over the samples.
        standard_error: of that mean.
        per_weight: trace divided by the number of weights.
    """

    name: str
    weights: int
    trace: float
    standard_error: float
    per_weight: float


class TraceReading(Reading):
    """Traces of the Hessian of the mean cross-entropy.

    Attributes:
        layers: in execution order.
        trace: of the whole Hessian.
        standard_error: of that trace.
        samples: number of random vectors.
    """

    layers: list[LayerTrace]
    trace: float
    standard_error: float
    samples: int


def measure_trace(analyzed: AnalysisInput, settings: Settings, session: Session) -> TraceReading:
    """Hutchinson's estimate with ``settings.samples`` random sign vectors."""
    estimates: list[list[float]] = []  # (samples, layers)
    with session.progress.task("Hessian trace", settings.samples) as task:
        for first in range(0, settings.samples, VECTORS_PER_PASS):
            numbers = range(first, min(first + VECTORS_PER_PASS, settings.samples))
            vectors = [_signs(analyzed, settings.seed, number) for number in numbers]
            for vector, product in zip(vectors, hessian_products(analyzed, vectors), strict=True):
                estimates.append(
                    [float((z * p).double().sum()) for z, p in zip(vector, product, strict=True)]
                )
            task.advance(len(numbers), images=analyzed.images)
    layers = []
    for index, (name, layer) in enumerate(analyzed.layers.items()):
        mean, error = _mean_and_error([row[index] for row in estimates])
        count = layer.latent_weight().numel()
        layers.append(
            LayerTrace(name=name, weights=count, trace=mean, standard_error=error, per_weight=mean / count)
        )
    mean, error = _mean_and_error([sum(row) for row in estimates])
    return TraceReading(layers=layers, trace=mean, standard_error=error, samples=settings.samples)


def _signs(analyzed: AnalysisInput, seed: int, number: int) -> Vector:
    generator = seeded(seed, "trace", number)
    vector = []
    for layer in analyzed.layers.values():
        like = layer.latent_weight()
        vector.append((torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like))
    return vector


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
