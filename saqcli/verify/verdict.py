"""Verdict on an exported file: images, comparison with the model, result.

A file must compute the same as the model; both run on the same images.

A safetensors file must give the same logits, bit for bit, and so must an ONNX graph of style ``exact``, compared with
the exact form of the model. The other styles cannot: runtimes sum in different orders, where an activation lies on the
edge between two codes the last bit of such a sum decides, and the difference becomes a whole step, which a deep network
amplifies. Therefore they are proved layer by layer (``layerwise``). The end-to-end comparison, with the model in
float64 as reference, only limits the remaining difference: nearly every image must have the same best class, and the
mean difference of logits must be small. Where PyTorch itself, in float32, is far from its float64 results (networks
that amplify every rounding), twice its difference is allowed.

Without a data set the images are synthetic: white noise, and noise with the statistics of natural images. White noise
reaches every code of the first layers; but its neighbouring pixels are uncorrelated, and most filters average it out.
The amplitude of natural images falls with the inverse of the spatial frequency (Field, 1987, "Relations between the
statistics of natural images and the response properties of cortical cells"), and such images drive deeper layers.

The result has figures, reasons, and a JSON file next to the exported file.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
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
from saqcli.verify.exactness import Inexact
from saqcli.verify.hazards import Hazard, summaries
from saqcli.verify.layerwise import LARGEST_ERROR, LayerwiseCheck, MovedCodes
from saqcli.verify.twin.check import TwinCheck

SYNTHETIC = "synthetic images"  # their name in a verdict
IMAGES = 64
BATCH = 16
COMMON = 0.8  # weight of the part common to all channels; natural images are nearly grey


def synthetic_batches(preprocessing: Preprocessing, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Normalized images for use without a data set, with arbitrary labels; deterministic in ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    size = preprocessing.input_size
    half = IMAGES // 2
    images = torch.cat([torch.randn(half, *size, generator=generator), natural(half, size, generator)])
    images = images[torch.randperm(IMAGES, generator=generator)]
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in torch.split(images, BATCH)]


def natural(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with amplitudes 1 / frequency, (count, *size), with mean 0 and deviation 1 per image."""
    channels, height, width = size
    separate = torch.randn(count, channels, height, width, generator=generator)
    common = torch.randn(count, 1, height, width, generator=generator)
    spectrum = torch.fft.rfft2(COMMON * common + (1 - COMMON**2) ** 0.5 * separate)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    images: Tensor = torch.fft.irfft2(spectrum / frequency, s=(height, width))
    mean, deviation = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return (images - mean) / deviation.clamp_min(1e-6)


SCHEMA_VERSION = 1
SUFFIX = ".verdict.json"
LEAST_AGREEMENT = 0.95  # share of images with the same best class
EXTRA_IMAGES = 2  # that may differ in addition, so that one image does not decide in a small sample
LARGEST_MEAN_DIFFERENCE = 0.2  # of logits, in units of their standard deviation
PYTORCH_FACTOR = 2.0  # times the difference of PyTorch in float32 from float64 is always allowed
MAX_DISAGREEMENT, MAX_MEAN_DIFFERENCE = 0.25, 0.5  # limits of that allowance
NAMED = 3  # most layers that a message names


@dataclass
class Verdict:
    """The comparison of a file with the model.

    Attributes:
        images: number of images in the end-to-end comparison.
        argmax_agreement: share of images with the same best class, 0 to 1.
        max_abs_diff: largest difference of a logit.
        mean_abs_diff: mean difference of a logit, in units of the logits' standard deviation.
        problems: defects of the file itself, one line each.
        pytorch_agreement: share of images on which PyTorch, in float32, has the best class of the reference.
        pytorch_difference: mean difference of PyTorch's float32 logits, in the same units as ``mean_abs_diff``.
        pytorch_max_abs_diff: largest difference of a logit of PyTorch, in float32, from the reference.
        largest_logit: largest magnitude of the reference logits.
        verified_on: source of the images, as given by the user.
        images_available: number of images in the source; None for synthetic images.
        size_note: why the file is larger than the model at its true bits; None if it is not much larger.
        layerwise: the layerwise comparison; None if the file is not a graph.
        hazards: patterns that a runtime would change.
        conditions: hazards accepted by the style, which restrict where the file may run.
        accumulators: largest sums of the layers of an exact graph.
        bit_equal: whether logits must be equal to the last bit.
        moved: codes by which the deployed form that the file is compared with differs from the trained model; None if
            it is the trained model.
        inexact: places that keep a file with short steps from being exact by construction, none if it is; None for
            other files.
        others: end-to-end comparison for the requested runtimes, by name; ``bit_equal`` does not apply.
        twin: comparison with the twin; None if the file computes nothing on codes.
        equals_twin: whether the file must equal the twin.
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
    moved: MovedCodes | None = None
    inexact: tuple[Inexact, ...] | None = None
    others: "dict[str, Verdict]" = field(default_factory=dict)
    twin: TwinCheck | None = None
    equals_twin: bool = False

    @property
    def verified(self) -> bool:
        """Whether the file can replace the model."""
        return not self.reasons()

    def reasons(self) -> list[str]:
        """Why the file is not verified, one line each."""
        reasons = [*self.problems, *(f"hazard {line}" for line in summaries(self.hazards))]
        if self.bit_equal and self.max_abs_diff != 0:
            reasons.append(f"logits differ by up to {self.max_abs_diff:.3g} but must be equal")
        reasons += self._end_to_end()
        for name, verdict in self.others.items():
            reasons += [f"in {name} {reason}" for reason in verdict.reasons()]
        if self.layerwise is not None and not self.layerwise.passed:
            reasons.append(self.layerwise.problem or _differing_layers(self.layerwise))
            if self.twin is not None and self.twin.saturated:
                reasons.append(_saturated(self.twin))
        if self.equals_twin and self.twin is not None and self.twin.failed:
            reasons.append(_unlike_twin(self.twin))
        return reasons

    def _end_to_end(self) -> list[str]:
        """Why the whole network differs too much from PyTorch's, one line each."""
        reasons = []
        different = round((1 - self.argmax_agreement) * self.images)
        allowance = min(PYTORCH_FACTOR * (1 - self.pytorch_agreement), MAX_DISAGREEMENT)
        if different > (1 - LEAST_AGREEMENT + allowance) * self.images + EXTRA_IMAGES:
            reasons.append(
                f"the best class agrees on {100 * self.argmax_agreement:.2f} % of {counted(self.images, 'image')}"
            )
        relaxed = min(PYTORCH_FACTOR * self.pytorch_difference, MAX_MEAN_DIFFERENCE)
        allowed = max(LARGEST_MEAN_DIFFERENCE, relaxed)
        if not self.mean_abs_diff <= allowed:
            reasons.append(
                f"logits differ by {self.mean_abs_diff:.3g} of their deviation on average, "
                f"but only {allowed:.3g} is allowed"
            )
        return reasons

    @property
    def remedy(self) -> str | None:
        """What helps where every layer is right and rounding alone separates the networks; None elsewhere."""
        end_to_end = self._end_to_end()
        if self.layerwise is None or not end_to_end or self.reasons() != end_to_end:
            return None
        ways = "choose `style=exact`"
        if self.inexact is None:
            ways += ", or quantize again with `quantization.short_steps=5`, with which `style=qdq` can equal PyTorch"
        return (
            "every layer is right given the same codes, but codes that rounding moves change many others: "
            + ways
        )

    @property
    def explanation(self) -> str | None:
        """Why logits differ by more than single layers; None if they do not."""
        if self.layerwise is None or self.max_abs_diff <= LARGEST_ERROR * self.largest_logit:
            return None
        return (
            f"given the same codes, every layer agrees to {self.layerwise.largest_error:.1e} of its range. End to end, "
            "a code that rounding moves to the next step changes codes of later layers: logits differ by up to "
            f"{self.max_abs_diff:.3g} from PyTorch's in float64, and those of PyTorch in float32 by up to "
            f"{self.pytorch_max_abs_diff:.3g}"
        )

    def figures(self) -> dict[str, Any]:
        """The figures for JSON output and for the head of the verdict file."""
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
            "conditions": summaries(self.conditions),
            "split_layers": [each.layer for each in self.accumulators if each.parts > 1],
            **({"moved_codes": asdict(self.moved)} if self.moved is not None else {}),
            "twin": self.twin.figures() if self.twin is not None else None,
            "size_note": self.size_note,
            "explanation": self.explanation,
        } | ({} if self.inexact is None else self._exactness())

    def _exactness(self) -> dict[str, Any]:
        """Whether a file with short steps is exact by construction, and where it is not."""
        places = [
            {"layer": each.layer, "node": each.node, "reason": each.reason} for each in self.inexact or ()
        ]
        return {"exact_by_construction": not places, "inexact": places}


def _differing_layers(check: LayerwiseCheck) -> str:
    names = check.wrong
    if not names:
        return f"logits computed from the same codes differ by {check.logits_error:.2g} of their range"
    more = f" and {counted(len(names) - NAMED, 'more layer')}" if len(names) > NAMED else ""
    return f"given the same codes, it differs before {', '.join(names[:NAMED])}{more}"


def _saturated(check: TwinCheck) -> str:
    """Why a layer with INT8 weights is wrong on this processor."""
    operators = counted(len(check.saturating), "operator")
    same = ", which its twin predicts bit by bit" if check.equal else ""
    return (
        f"products of {operators} saturate on this processor, which has no VNNI{same}: use style qdq, or weights of "
        "7 bits on a grid with zero"
    )


def _unlike_twin(check: TwinCheck) -> str:
    if check.skipped is not None:
        return check.skipped
    if not check.unlike:
        return f"its logits differ from its twin's by up to {check.max_abs_diff:.3g}"
    more = f" and {len(check.unlike) - NAMED} more" if len(check.unlike) > NAMED else ""
    return f"operators on codes differ from the twin's: {', '.join(check.unlike[:NAMED])}{more}"


def verdict_path(path: Path) -> Path:
    """Path of the verdict on the file at ``path``: ``model.verdict.json`` for ``model.onnx``."""
    return path.with_suffix(SUFFIX)


def verdict_text(verdict: Verdict, path: Path, about: dict[str, Any]) -> str:
    """The verdict as JSON.

    Args:
        verdict: the verdict.
        path: path of the file; its hash identifies the file that the verdict is about.
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
    if verdict.twin is not None:
        tree["twin"] = verdict.twin.figures() | {"per_layer": verdict.twin.per_layer()}
    return json_text(tree, indent=1) + "\n"


TIE = 2.0**-20  # of the largest logit; rounding decides between best classes that are closer


def compare(
    reference: Callable[[Tensor], Tensor],
    candidates: dict[str, Callable[[Tensor], Tensor]],
    batches: Batches,
    total: int,
    progress: Progress,
) -> dict[str, Verdict]:
    """Compare every candidate with the reference on all batches; one verdict per candidate.

    Args:
        reference: images (N, C, H, W) to logits (N, classes): the PyTorch model, in float64 if sums must not depend on
            their order.
        candidates: by name, the same file run in several ways, and the model in float32.
        batches: images on the device of the reference; images with a negative label are skipped.
        total: number of batches.
        progress: reports every batch.
    """
    truth: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in candidates}
    with progress.task("verifying", total) as task, torch.inference_mode():
        for images, labels in batches:
            images = images[labels.to(images.device) >= 0]  # without substitutes for unreadable images
            if not len(images):
                continue
            truth.append(reference(images).float().cpu())
            for name, predict in candidates.items():
                answers[name].append(predict(images).float().cpu())
            task.advance(images=len(images))
    return {name: judge(torch.cat(truth), torch.cat(answer)) for name, answer in answers.items()}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst verdict on several runs of the same file: a failed one, or the one with the largest difference."""
    return max(verdicts, key=lambda verdict: (not verdict.verified, verdict.max_abs_diff))


def judge(truth: Tensor, answer: Tensor) -> Verdict:
    """The verdict on two sets of logits, (N, classes) each."""
    if truth.shape != answer.shape or not answer.isfinite().all():
        wrong_shape = f"its logits have the shape {tuple(answer.shape)} instead of {tuple(truth.shape)}"
        problem = "its logits are NaN or infinite" if truth.shape == answer.shape else wrong_shape
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
