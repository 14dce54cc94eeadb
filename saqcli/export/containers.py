"""Size of the weights in an ONNX file, compared with their true bits.

ONNX has containers of 4, 8, 16 or 32 bits:

    2 to 4 bits, codes in -8 ... 7       INT4
    up to 8 bits, codes in -128 ... 127  INT8     odd codes of 4 bits reach 15
    odd codes of 8 bits                  INT16    they reach 255

Figures are read from the graph and therefore hold for every style and grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from saqcli.export import STYLES, onnx_helpers
from saqcli.export.style import CONTAINERS, OnnxStyle, widths
from saqcli.units import format_quantity

WIDTHS = widths(OnnxStyle)  # of the containers of most styles, in bits
EXPLAINED_RATIO = 1.25  # of a file's size to that at the true bits, above which the size is explained
LEAST_SHARE = 0.05  # of a file's size, for a cause or a remedy to be named
_NAMED = 2  # most kinds of containers that a message names


@dataclass(frozen=True)
class StoredWeight:
    """The codes of a layer, or some of them, as stored in a file.

    Attributes:
        layer: name of the layer.
        count: number of codes.
        bits: true bits of a code.
        container: name of the type.
        width: bits of the container per code.
        reach: largest magnitude of a code; 0 if values are stored instead.
    """

    layer: str
    count: int
    bits: int
    container: str
    width: int
    reach: int

    def least(self, among: Sequence[int]) -> int:
        """Container bits per code on a grid with zero, whose codes of b bits fit b bits."""
        return min((width for width in among if width >= self.bits), default=self.width)


@dataclass(frozen=True)
class WeightStorage:
    """The weights of quantized layers in a file.

    Attributes:
        file_bytes: size of the whole file.
        weights: stored weights in the order of the graph.
    """

    file_bytes: int
    weights: tuple[StoredWeight, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the codes in their containers."""
        return sum(each.count * each.width for each in self.weights) // 8

    @property
    def true_bytes(self) -> int:
        """Bytes of the codes at their true bits."""
        return sum(each.count * each.bits for each in self.weights) // 8

    def with_zero_grid(self, among: Sequence[int] = WIDTHS) -> int:
        """Approximate size of the file if all codes fitted their true bits, as on a grid with zero.

        Args:
            among: bits of the style's containers.
        """
        saved = sum(each.count * (each.width - each.least(among)) for each in self.weights if each.reach)
        return self.file_bytes - saved // 8

    def explain_size(self, true_size: int, style: str) -> str | None:
        """Why the file is much larger than the model at its true bits, and what to do; None if it is not.

        Args:
            true_size: bytes of the model, each weight at its bits.
            style: style of the file.
        """
        if self.file_bytes <= EXPLAINED_RATIO * true_size:
            return None
        wide = [each for each in self.weights if each.width > each.bits]
        wider = self.weight_bytes - self.true_bytes
        rest = self.file_bytes - true_size - wider
        reasons = []
        if wider >= LEAST_SHARE * self.file_bytes:
            reasons.append(f"{format_quantity(wider, 'B')} for wider containers ({_containers(wide)})")
        if rest >= LEAST_SHARE * self.file_bytes:
            reasons.append(f"{format_quantity(rest, 'B')} for graph, names and metadata")
        text = (
            f"the ONNX file has {format_quantity(self.file_bytes, 'B')} where the true bits need "
            f"{format_quantity(true_size, 'B')}: {' and '.join(reasons)}"
        )
        own = widths(STYLES.find(style))
        if len(own) == 1:
            text += f". Style {style} has {_listed(STYLES.find(style))} only"
            narrower = any(each.width > 8 or (each.width == 8 and each.reach < 8) for each in wide)
            smaller = next((name for name, each in STYLES.items() if widths(each)[0] < own[0]), None)
            return f"{text}: style {smaller} has smaller ones" if narrower and smaller else text
        shrunk = self.with_zero_grid(own)
        if self.file_bytes - shrunk >= LEAST_SHARE * self.file_bytes:
            text += (
                f". Quantized with `quantization.weight_grid=zero` it can shrink to about "
                f"{format_quantity(shrunk, 'B')}: compare the accuracy"
            )
        return text


def _listed(style: type[OnnxStyle]) -> str:
    """The containers of a style in words."""
    return (
        "float32 constants"
        if style.containers == ("FLOAT",)
        else f"{' and '.join(style.containers)} containers"
    )


def _containers(wide: list[StoredWeight]) -> str:
    """As in ``4-bit weights of 18 layers in INT8, their codes reach 15``, largest excess first."""
    kinds: dict[tuple[int, str], list[StoredWeight]] = {}
    for each in wide:
        kinds.setdefault((each.bits, each.container), []).append(each)

    def excess(members: list[StoredWeight]) -> int:
        return sum(each.count * (each.width - each.bits) for each in members)

    texts = []
    for members in sorted(kinds.values(), key=excess, reverse=True)[:_NAMED]:
        bits, layers = members[0].bits, len({each.layer for each in members})
        reach = max(each.reach for each in members)
        why = f", their codes reach {reach}" if reach >= 2 ** (bits - 1) else ""
        texts.append(
            f"{bits}-bit weights of {layers} layer{'s' * (layers != 1)} in {members[0].container}{why}"
        )
    return "; ".join(texts)


def weight_storage(path: Path) -> WeightStorage:
    """The stored weights of the ONNX file at ``path``, written in one of ``STYLES``."""
    graph = onnx.load(str(path)).graph
    constants = {each.name: each for each in graph.initializer}
    return WeightStorage(path.stat().st_size, tuple(_stored(graph, constants)))


def _zeros(node: Any, constants: dict[str, Any]) -> Any:
    """The zero points of a DequantizeLinear, a scalar or one per slice along its axis, shaped like its codes."""
    if len(node.input) < 3 or node.input[2] not in constants:
        return 0
    zeros = onnx.numpy_helper.to_array(constants[node.input[2]]).astype(int)
    dims = len(constants[node.input[0]].dims)
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    return zeros.reshape([-1 if dim == axis % dims else 1 for dim in range(dims)]) if zeros.ndim else zeros


def _stored(graph: Any, constants: dict[str, Any]) -> Iterator[StoredWeight]:
    seen: set[str] = set()
    for node in graph.node:
        annotations = {entry.key: entry.value for entry in node.metadata_props}
        name = node.input[0] if node.input else ""
        if annotations.get(onnx_helpers.OPERAND) != "weight" or name not in constants or name in seen:
            continue
        seen.add(name)
        kind = onnx.TensorProto.DataType.Name(constants[name].data_type)
        codes = onnx.numpy_helper.to_array(constants[name])
        reach = (
            0 if kind == "FLOAT" else int(np.abs(codes.astype(int) - _zeros(node, constants)).max(initial=0))
        )
        width = CONTAINERS[kind][0] if kind in CONTAINERS else 8 * codes.itemsize
        yield StoredWeight(
            annotations[onnx_helpers.LAYER],
            codes.size,
            int(annotations[onnx_helpers.BITS]),
            kind,
            width,
            reach,
        )
