"""Windows of convolutions and poolings: pads, sizes of results, and the values at every position of a window."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saqcli.verify.twin.graph import Node


@dataclass(frozen=True)
class Windows:
    """The windows of an operator on an input of a given size; lists have one entry a spatial dimension.

    Attributes:
        kernel: size of a window.
        strides: distances of windows.
        dilations: distances within a window.
        before: padding before the input.
        after: padding after it, as far as windows reach.
        count: number of windows.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    count: list[int]

    @property
    def pads(self) -> list[int]:
        """Pads as in ONNX: all before, then all after."""
        return [*self.before, *self.after]

    def positions(self, padded: Any) -> Iterator[Any]:
        """The padded input, (N, C, ...), at each position of all windows, (N, C, *count) each, in memory order."""
        rank = len(self.kernel)
        for position in np.ndindex(*self.kernel):
            first = [position[d] * self.dilations[d] for d in range(rank)]
            last = [first[d] + (self.count[d] - 1) * self.strides[d] + 1 for d in range(rank)]
            part = tuple(slice(first[d], last[d], self.strides[d]) for d in range(rank))
            yield padded[(slice(None), slice(None), *part)]

    def padded(self, x: Any, value: float = 0) -> Any:
        """``x``, (N, C, ...), with its padding."""
        padding = [(0, 0), (0, 0), *zip(self.before, self.after, strict=True)]
        return np.pad(x, padding, constant_values=value)


def windows_of(node: Node, size: tuple[int, ...], kernel: tuple[int, ...] | None = None) -> Windows:
    """The windows of a convolution (``kernel`` from its weight) or pooling on an input of ``size``."""
    rank = len(size)
    kernel_shape = [int(each) for each in (kernel or node.attribute("kernel_shape", []))]
    strides, dilations = (
        [int(n) for n in node.attribute(name, [1] * rank)] for name in ("strides", "dilations")
    )
    before, after = _padding(node, size, kernel_shape, strides, dilations)
    spans = [size[d] + before[d] + after[d] - dilations[d] * (kernel_shape[d] - 1) - 1 for d in range(rank)]
    count = [span // stride + 1 for span, stride in zip(spans, strides, strict=True)]
    if node.attribute("ceil_mode", 0):
        for d, (span, stride) in enumerate(zip(spans, strides, strict=True)):
            more = -(-span // stride) + 1
            starts_inside = (more - 1) * stride < size[d] + before[d]
            count[d] = more if starts_inside else more - 1
    reach = [(count[d] - 1) * strides[d] + dilations[d] * (kernel_shape[d] - 1) + 1 for d in range(rank)]
    after = [max(after[d], reach[d] - size[d] - before[d]) for d in range(rank)]
    return Windows(kernel_shape, strides, dilations, before, after, count)


def _padding(
    node: Node, size: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    rank = len(size)
    auto = node.attribute("auto_pad", "NOTSET")
    if auto in ("NOTSET", ""):
        pads = [int(each) for each in node.attribute("pads", [0] * 2 * rank)]
        return pads[:rank], pads[rank:]
    if auto == "VALID":
        return [0] * rank, [0] * rank
    totals = [
        max((-(-size[d] // strides[d]) - 1) * strides[d] + dilations[d] * (kernel[d] - 1) + 1 - size[d], 0)
        for d in range(rank)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def average(node: Node, x: Any) -> Any:
    """Averages over windows, float32, with sums in the order of the positions."""
    windows = windows_of(node, x.shape[2:])
    total = np.zeros((*x.shape[:2], *windows.count), np.float32)
    for part in windows.positions(windows.padded(x)):
        total += part
    if node.attribute("count_include_pad", 0):
        return total / np.float32(np.prod(windows.kernel))
    inside = windows.padded(np.ones((1, 1, *x.shape[2:]), np.float32))
    number = np.zeros((1, 1, *windows.count), np.float32)
    for part in windows.positions(inside):
        number += part
    return total / number


def maximum(node: Node, x: Any) -> Any:
    """Largest values of windows, of floats or codes."""
    windows = windows_of(node, x.shape[2:])
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    found = None
    for part in windows.positions(windows.padded(x, lowest)):
        found = part.copy() if found is None else np.maximum(found, part, out=found)
    return found
