"""Random networks, exported and verified: style exact bit for bit, the others layer by layer."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from saqcli.errors import UnsupportedModel
from saqcli.export import EXPORTERS, STYLES
from saqcli.progress import SILENT
from saqcli.verify.proof import prove_graph
from tests.support.random_networks import random_network

FEW = {2: ("exact", "qonnx"), 3: ("qdq", "trt")}  # two fast ones that together cover every style
MANY, CHUNK = 300, 10
BATCHES = (16, 5, 1, 16)


def refused_by_design(style: str, seed: int) -> bool:
    """INT8 cannot hold the paper's grid at 8 bits."""
    facts = random_network(seed).facts
    eight = any(bits.weight == 8 for bits in facts.policy.layers.values())
    return style == "trt" and facts.scheme.weight_grid == "paper" and eight


def outcomes(seed: int, styles: Iterable[str], folder: Path) -> dict[str, str]:
    """The outcome of every style tried: "proved", "refused", or the error."""
    quantized = random_network(seed)
    size = quantized.facts.preprocessing["input_size"]
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.randn(count, *size, generator=generator), torch.zeros(count, dtype=torch.long))
        for count in BATCHES
    ]
    found = {}
    for style in styles:
        path = folder / f"{seed}-{style}.onnx"
        try:
            EXPORTERS[style]().export(quantized.model, batches[0][0][:2], path, quantized.facts)
            verdict = prove_graph(path, quantized.model, style, batches, len(batches), SILENT)
        except UnsupportedModel as error:
            found[style] = "refused" if refused_by_design(style, seed) else f"refused: {error}"
        else:
            reasons = verdict.reasons()
            if STYLES[style].bit_equal and verdict.max_abs_diff:
                reasons.append(f"not bit-equal: {verdict.max_abs_diff}")
            found[style] = "; ".join(reasons) or "proved"
    return found


def check(seed: int, styles: Iterable[str], folder: Path) -> None:
    assert set(outcomes(seed, styles, folder).values()) <= {"proved", "refused"}, seed


@pytest.mark.parametrize(("seed", "styles"), FEW.items())
def test_random_network_exports_faithfully(seed: int, styles: tuple[str, ...], tmp_path: Path) -> None:
    check(seed, styles, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(MANY // CHUNK))
def test_many_random_networks_export_faithfully(chunk: int, tmp_path: Path) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        check(seed, ("exact", "qdq", "trt" if seed % 2 else "qonnx"), tmp_path)


def test_generator_covers_all_and_is_seeded() -> None:
    """Every block, scheme and bit-width occurs among the networks, and a seed determines the network."""
    kinds: Counter[str] = Counter()
    for seed in range(60):
        quantized = random_network(seed)
        kinds.update(type(module).__name__ for module in quantized.model.modules())
        kinds.update([quantized.facts.scheme.quantizer, quantized.facts.scheme.weight_grid])
        kinds.update(str(bits) for bits in quantized.facts.policy.layers.values())
    wanted = """QuantizedConv2d QuantizedConvTranspose2d QuantizedLinear BatchNorm2d GroupNorm LayerNorm Sum Concat Gate
        MaxPool2d AvgPool2d AdaptiveAvgPool2d SiLU GELU Hardswish ReLU6 Sigmoid Hardsigmoid PixelShuffle Upsample
        Attention Mixer SelfAttention clip lsq lsq_plus auto paper zero w2a2 w8a8"""
    assert not [name for name in wanted.split() if not kinds[name]]
    one, other = random_network(5).model.state_dict(), random_network(5).model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
