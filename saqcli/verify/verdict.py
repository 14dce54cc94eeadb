"""The verdict on an exported file: the images it is checked on, the comparison, and its result.

Images to verify a file on where none are given: white noise, and noise with the statistics of natural images.

White noise reaches every code of the first layers; but its neighbouring pixels have nothing to do with each
other, and most filters average it away. The amplitude of natural images falls with the inverse of the spatial
frequency (Field, 1987, "Relations between the statistics of natural images and the response properties of
cortical cells"), and such images drive deeper layers.

The verdict on an exported file: what was compared and what came out, as numbers, lines and a JSON file beside it.

Does a file compute what the model computes? Run both on the same images and compare.

A safetensors file must give the same logits, bit for bit, and so must an ONNX graph of style ``exact``,
compared with the exact form of the model. The other styles cannot: two runtimes sum in different orders,
where an activation lies on the edge between two codes the last bit of such a sum decides, and the difference
becomes a whole step, which a deep network multiplies. So they are proved layer by layer
(``graphs.layerwise``); end to end both runtimes are compared with the model in float64, and it is only asked
that little is left of that: nearly every image has the same best class, and the logits differ by little on average.
Where PyTorch itself, in float32, is far from its own float64 (networks that amplify every rounding), twice as
far is allowed.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saqcli.export.integers import Accumulator
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.serialization import json_text
from saqcli.training.loop import Batches
from saqcli.units import counted
from saqcli.verify.hazards import Hazard
from saqcli.verify.layerwise import LARGEST_ERROR, LayerwiseCheck

SYNTHETIC = "synthetic images"  # what a verdict calls them
IMAGES = 64
BATCH = 16
COMMON = 0.8  # share of colour channels in their common part; natural images are nearly grey


def synthetic_batches(preprocessing: Preprocessing, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Normalized images in the place of a data set, with labels that mean nothing; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size = preprocessing.input_size
    half = IMAGES // 2
    images = torch.cat([torch.randn(half, *size, generator=generator), natural(half, size, generator)])
    images = images[torch.randperm(IMAGES, generator=generator)]
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in torch.split(images, BATCH)]


def natural(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with amplitudes 1 / frequency, (count, *size), of mean 0 and deviation 1 an image."""
    channels, height, width = size
    own = torch.randn(count, channels, height, width, generator=generator)
    common = torch.randn(count, 1, height, width, generator=generator)
    spectrum = torch.fft.rfft2(COMMON * common + (1 - COMMON**2) ** 0.5 * own)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    images: Tensor = torch.fft.irfft2(spectrum / frequency, s=(height, width))
    mean, deviation = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return (images - mean) / deviation.clamp_min(1e-6)


SCHEMA_VERSION = 1
SUFFIX = ".verdict.json"
LEAST_AGREEMENT = 0.95  # share of images with the same best class
FREE_IMAGES = 2  # that may differ beyond that, so that small samples are not judged by one image
LARGEST_MEAN_DIFFERENCE = 0.2  # of logits, in units of their standard deviation
AS_PYTORCH = 2.0  # times what PyTorch in float32 differs from itself in float64 may always differ
MOST_ASTRAY, LARGEST_LOOSE_DIFFERENCE = 0.25, 0.5  # however far PyTorch is from itself
NAMED = 3  # layers that a message names


@dataclass
class Verdict:
    """How a file compares with the model.

    Attributes:
        images: compared from end to end.
        argmax_agreement: share of images with the same best class, 0 to 1.
        max_abs_diff: largest difference of a logit.
        mean_abs_diff: mean difference of a logit, in units of the logits' standard deviation.
        problems: what is wrong with the file itself, a line each.
        pytorch_agreement: share of images on which PyTorch, in float32, has the best class of the reference.
        pytorch_difference: mean difference of PyTorch's own logits in float32, in the same units as ``mean_abs_diff``.
        pytorch_max_abs_diff: largest difference of a logit of PyTorch, in float32, from the reference.
        largest_logit: magnitude of the reference's.
        verified_on: where the images are from, as a person named it.
        images_available: how many there are, of which ``images`` are a part; None where they are synthetic.
        size_note: why the file is larger than the model at its true bits; None where it is not much larger.
        layerwise: the comparison part by part; None where the file is no graph.
        hazards: patterns that a runtime would change.
        conditions: hazards that the style accepts: where the file must not run.
        accumulators: of an exact graph, the largest sums of its layers.
        bit_equal: whether logits must be equal to the last bit.
        others: the same comparison for runtimes that were asked for, by name; never held to ``bit_equal``.
    """

    images: int
    argmax_agreement: float
    max_abs_diff: float
    mean_abs_diff: float
    problems: list[str] = field(default_factory=list)
    pytorch_agreement: float = 1.0
    pytorch_difference: float = 0.0
    pytorch_max_abs_diff: float = 0.0
    largest_logit: float = field(default=0.0, compare=False)
    verified_on: str = SYNTHETIC
    images_available: int | None = None
    size_note: str | None = None
    layerwise: LayerwiseCheck | None = None
    hazards: list[Hazard] = field(default_factory=list)
    conditions: list[Hazard] = field(default_factory=list)
    accumulators: tuple[Accumulator, ...] = ()
    bit_equal: bool = False
    others: "dict[str, Verdict]" = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether the file may be used in place of the model."""
        return not self.reasons()

    def reasons(self) -> list[str]:
        """Why not, a line each."""
        reasons = [*self.problems, *(f"hazard {hazard}" for hazard in self.hazards)]
        if self.bit_equal and self.max_abs_diff != 0:
            reasons.append(f"logits differ by up to {self.max_abs_diff:.3g} where none may")
        different = round((1 - self.argmax_agreement) * self.images)
        astray = min(AS_PYTORCH * (1 - self.pytorch_agreement), MOST_ASTRAY)
        if different > (1 - LEAST_AGREEMENT + astray) * self.images + FREE_IMAGES:
            reasons.append(
                f"the best class agrees on {100 * self.argmax_agreement:.2f} % of {counted(self.images, 'image')}"
            )
        loose = min(AS_PYTORCH * self.pytorch_difference, LARGEST_LOOSE_DIFFERENCE)
        allowed = max(LARGEST_MEAN_DIFFERENCE, loose)
        if not self.mean_abs_diff <= allowed:
            reasons.append(
                f"logits differ by {self.mean_abs_diff:.3g} of their deviation on average, "
                f"where {allowed:.3g} is allowed"
            )
        for name, verdict in self.others.items():
            reasons += [f"in {name} {reason}" for reason in verdict.reasons()]
        if self.layerwise is not None and not self.layerwise.passed:
            reasons.append(self.layerwise.problem or _which_layers(self.layerwise))
        return reasons

    @property
    def explanation(self) -> str | None:
        """Why logits differ by more than layers do; None where they do not."""
        if self.layerwise is None or self.max_abs_diff <= LARGEST_ERROR * self.largest_logit:
            return None
        return (
            f"fed the same codes, every layer agrees to {self.layerwise.largest_error:.1e} of its range. End to end, "
            "one code that rounding moves to the next step moves codes of later layers: logits are up to "
            f"{self.max_abs_diff:.3g} away from PyTorch's in float64, and PyTorch's own in float32 up to "
            f"{self.pytorch_max_abs_diff:.3g}"
        )

    def figures(self) -> dict[str, Any]:
        """Plain values, as JSON has them, and the head of the verdict file."""
        parts = self.layerwise
        return {
            "verified": self.verified,
            "verified_on": self.verified_on,
            "images": self.images,
            "images_available": self.images_available,
            "argmax_agreement": self.argmax_agreement,
            "pytorch_agreement": self.pytorch_agreement,
            "pytorch_difference": self.pytorch_difference,
            "max_abs_diff": self.max_abs_diff,
            "pytorch_max_abs_diff": self.pytorch_max_abs_diff,
            "mean_abs_diff": self.mean_abs_diff,
            "layers": len(parts.layers) if parts else 0,
            "layers_error": parts.largest_error if parts else 0.0,
            "codes": parts.codes if parts else 0,
            "flipped_codes": parts.flipped if parts else 0,
            "largest_accumulator": max((each.largest for each in self.accumulators), default=None),
            "runtimes": {
                name: {"argmax_agreement": other.argmax_agreement, "max_abs_diff": other.max_abs_diff}
                for name, other in self.others.items()
            },
            "conditions": list(dict.fromkeys(f"{each.code}: {each.text}" for each in self.conditions)),
            "split_layers": [each.layer for each in self.accumulators if each.parts > 1],
            "size_note": self.size_note,
            "explanation": self.explanation,
        }


def _which_layers(check: LayerwiseCheck) -> str:
    names = check.wrong
    if not names:
        return f"logits computed from the same codes differ by {check.logits_error:.2g} of their range"
    more = f" and {counted(len(names) - NAMED, 'more layer')}" if len(names) > NAMED else ""
    return f"fed the same codes, it differs in front of {', '.join(names[:NAMED])}{more}"


def verdict_path(path: Path) -> Path:
    """Where the verdict on the file at ``path`` lies: ``model.onnx`` has ``model.verdict.json``."""
    return path.with_suffix(SUFFIX)


def verdict_text(verdict: Verdict, path: Path, about: dict[str, Any]) -> str:
    """The verdict as JSON.

    Args:
        verdict: to tell.
        path: of the file; its hash is kept, so that a verdict is not taken for that of another file.
        about: style, opset, versions.
    """
    parts = verdict.layerwise
    sums = {each.layer: each for each in verdict.accumulators}
    layers = [
        {
            "layer": layer.layer,
            "codes": layer.codes,
            "flipped": layer.flipped,
            "wrong": layer.wrong,
            "error": layer.largest_error,
            "allowed": layer.allowed,
            **(
                {"accumulator": sums[layer.layer].largest, "parts": sums[layer.layer].parts}
                if layer.layer in sums
                else {}
            ),
        }
        for layer in (parts.layers if parts else ())
    ]
    tree = {
        "schema_version": SCHEMA_VERSION,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size_bytes": path.stat().st_size,
        **about,
        **verdict.figures(),
        "hazards": [str(hazard) for hazard in verdict.hazards],
        "conditions_at": [hazard.node for hazard in verdict.conditions],
        "per_layer": layers,
    }
    return json_text(tree, indent=1) + "\n"


TIE = 2.0**-20  # of the largest logit: where two best classes are nearer, rounding decides


def compare(
    reference: Callable[[Tensor], Tensor],
    candidates: dict[str, Callable[[Tensor], Tensor]],
    batches: Batches,
    total: int,
    progress: Progress,
) -> dict[str, Verdict]:
    """Compare every candidate with the reference on all batches; a verdict each.

    Args:
        reference: images (N, C, H, W) to logits (N, classes): the PyTorch model, in float64 where sums must
            not depend on their order.
        candidates: by name: the same file run in several ways, the model in float32.
        batches: images on the device of the reference; labels are not used.
        total: number of batches.
        progress: told about every batch.
    """
    truth: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in candidates}
    with progress.task("verifying", total) as task, torch.inference_mode():
        for images, labels in batches:
            images = images[
                labels.to(images.device) >= 0
            ]  # what stands in for an unreadable image proves nothing
            if not len(images):
                continue
            truth.append(reference(images).float().cpu())
            for name, predict in candidates.items():
                answers[name].append(predict(images).float().cpu())
            task.advance(images=len(images))
    return {name: judge(torch.cat(truth), torch.cat(answer)) for name, answer in answers.items()}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on the same file run in several ways: that of the run that failed, or else differs most."""
    return max(verdicts, key=lambda verdict: (not verdict.verified, verdict.max_abs_diff))


def judge(truth: Tensor, answer: Tensor) -> Verdict:
    """The verdict on two sets of logits, (N, classes) each."""
    if truth.shape != answer.shape or not answer.isfinite().all():
        problem = f"it answers {tuple(answer.shape)} where {tuple(truth.shape)} finite numbers are expected"
        return Verdict(len(truth), 0.0, float("inf"), float("inf"), [problem])
    difference = (truth - answer).abs()
    spread = float(truth.std()) or 1.0
    lost = truth.amax(1) - truth.gather(1, answer.argmax(1, keepdim=True)).squeeze(1)
    agreement = (lost <= TIE * truth.abs().amax(1)).double().mean()
    return Verdict(
        len(truth),
        float(agreement),
        float(difference.max()),
        float(difference.mean()) / spread,
        largest_logit=float(truth.abs().max()),
    )
