"""Where a recorded pass can be cut: positions at which one tensor holds all that follows from the network's input.

A value is *live* between two operators if it depends on the input, exists already, and is read later by an operator
that the output needs. With exactly one live value every path from the input to the output goes through it: it is an
articulation point of the flow of tensors. Values that do not depend on the input, such as masks and derived weights,
are computed anew in every part that reads them.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from saqcli.reconstruction.tape import Tape


@dataclass(frozen=True)
class Part:
    """A part of a pass.

    Attributes:
        operators: indices on the tape.
        inputs: values that it is given.
        outputs: values that it gives.
        changed: inputs whose memory it writes to.
        layers: quantized layers, products and junctions, in order of execution.
    """

    operators: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    changed: frozenset[int]
    layers: tuple[str, ...]


class Flow:
    """What depends on the input in a recorded pass, and what the output needs.

    Attributes:
        dependent: operators that compute from the input, in order; those that nothing needs are left out.
        since: the operator after which a value depends on the input; -1 for the inputs.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.since = dict.fromkeys(tape.inputs, -1)
        self.makers: dict[int, int] = {}  # the operator that makes a constant
        self.writers: dict[int, list[int]] = {}  # operators that change a constant
        computing = []
        for i, operator in enumerate(tape.operators):
            if any(value in self.since for value in operator.reads):
                computing.append(i)
                for value in (*operator.makes, *operator.writes):
                    self.since.setdefault(value, i)
                continue
            for value in operator.makes:
                self.makers.setdefault(value, i)
            for value in operator.writes:
                self.writers.setdefault(value, []).append(i)
        self.dependent = self._needed(computing)

    def _needed(self, computing: Sequence[int]) -> list[int]:
        needed, kept = set(self.tape.outputs), []
        for i in reversed(computing):
            operator = self.tape.operators[i]
            if operator.writes or needed.intersection(operator.makes):
                needed.update(operator.reads)
                kept.append(i)
        return kept[::-1]

    def live(self) -> list[list[int]]:
        """For every dependent operator the values that depend on the input and are read after it."""
        last = dict.fromkeys(self.tape.outputs, len(self.tape.operators))
        for i in self.dependent:
            for value in self.tape.operators[i].reads:
                last[value] = max(i, last.get(value, i))
        return [
            [
                value
                for value, end in last.items()
                if end > i and value in self.since and self.since[value] <= i
            ]
            for i in self.dependent
        ]

    def with_constants(self, operators: Sequence[int]) -> list[int]:
        """``operators`` and those that compute the constants they read, in order."""
        found, waiting = set(operators), list(operators)
        while waiting:
            i = waiting.pop()
            for value in self.tape.operators[i].reads:
                before = [self.makers.get(value), *self.writers.get(value, ())]
                if self.since.get(value, i) < i:
                    continue
                for j in before:
                    if j is not None and j < i and j not in found:
                        found.add(j)
                        waiting.append(j)
        return sorted(found)


@dataclass
class _Piece:
    """Dependent operators ``start`` to ``stop``, which is not included, by position among them."""

    start: int
    stop: int
    layers: tuple[str, ...]
    keeps_shape: bool


def parts_of(tape: Tape, larger: Tape, same: Mapping[str, str]) -> list[Part]:
    """The parts of a pass: each has quantized layers, and receives and gives one tensor with the batch first.

    Args:
        tape: of one batch size.
        larger: of one sample more, which shows the dimension of the batch.
        same: for every layer a name that is the same for layers that must share a part.
    """
    flow = Flow(tape)
    cuts: dict[int, int] = {}  # the value that passes, by position after the cut
    for position, live in enumerate(flow.live()[:-1], 1):
        if len(live) == 1 and tape.floating[live[0]] and _batch_first(live[0], tape, larger):
            cuts[position] = live[0]
    bounds = [0, *cuts, len(flow.dependent)]
    pieces = []
    for start, stop in pairwise(bounds):
        layers = _layers(tape, flow.with_constants(flow.dependent[start:stop]))
        keeps = start in cuts and stop in cuts and tape.shapes[cuts[start]] == tape.shapes[cuts[stop]]
        pieces.append(_Piece(start, stop, layers, keeps))
    parts = []
    for start, stop in grouped(_merged(pieces, same)):
        operators = tuple(flow.with_constants(flow.dependent[start:stop]))
        inputs = (cuts[start],) if start in cuts else tape.inputs
        outputs = (cuts[stop],) if stop in cuts else tape.outputs
        written = {value for i in operators for value in tape.operators[i].writes}
        parts.append(
            Part(
                operators, inputs, outputs, frozenset(written.intersection(inputs)), _layers(tape, operators)
            )
        )
    return parts


def _batch_first(value: int, tape: Tape, larger: Tape) -> bool:
    small, large = tape.shapes[value], larger.shapes[value]
    return len(small) > 0 and small[1:] == large[1:] and (small[0], large[0]) == (2, 3)


def _layers(tape: Tape, operators: Iterable[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for i in operators for name in tape.operators[i].layers))


def _merged(pieces: Sequence[_Piece], same: Mapping[str, str]) -> list[_Piece]:
    """Pieces that share a layer, joined with all between them."""
    last: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        for name in piece.layers:
            last[same.get(name, name)] = index
    merged: list[_Piece] = []
    end = -1
    for index, piece in enumerate(pieces):
        reach = max((last[same.get(name, name)] for name in piece.layers), default=index)
        if index <= end:
            one = merged[-1]
            merged[-1] = _Piece(one.start, piece.stop, tuple(dict.fromkeys(one.layers + piece.layers)), False)
        else:
            merged.append(piece)
        end = max(end, reach)
    return merged


def grouped(pieces: Collection[_Piece]) -> list[tuple[int, int]]:
    """Bounds of the blocks: each of a piece with layers and its neighbours without any."""
    bounds: list[tuple[int, int]] = []
    waiting: int | None = None
    for piece in pieces:
        if piece.layers:
            bounds.append((piece.start if waiting is None else waiting, piece.stop))
            waiting = None
        elif bounds and waiting is None and piece.keeps_shape:
            bounds[-1] = bounds[-1][0], piece.stop
        elif waiting is None:
            waiting = piece.start
    if waiting is not None and bounds:
        bounds[-1] = bounds[-1][0], list(pieces)[-1].stop
    return bounds
