"""How the passes of training are computed: compiled or not, in which memory format and precision.

What is fastest depends on network and machine, so it is measured: before the first step, one step's passes on its own
images, without an update. What is chosen changes the last bits of results, so it is part of a run's state: a resumed
run, all ranks and a rerun compute in the same way.

    memory format    channels_last where that makes the passes faster
    precision        bfloat16 likewise, if ``training.precision`` is ``auto``
    compiled         the whole network by ``torch.compile``, if the steps ahead repay the time that it takes

Compiled graphs are made for the sizes of whole batches; other batches, such as a short last one, are computed as the
network is written. A network that cannot be compiled is computed as written.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import TrainingSection
from saqcli.errors import out_of_memory
from saqcli.quant.layer import quantized_layers
from saqcli.training.memory import Attempt

MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["float32", "bfloat16"]
LEAST_SECONDS = 120.0  # of all steps: below it nothing is measured, let alone compiled
FASTER = 0.95  # of the time before: a smaller gain is noise
GAIN = 0.3  # share of a step's time that compiling is expected to save
SECONDS_A_LAYER = 3.0  # to compile, for lack of a measurement of this network
ROUNDS = 3  # of which the first, which warms up and compiles, does not count
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Execution:
    """How passes are computed.

    Attributes:
        compiled: the network was put through ``torch.compile``.
        memory_format: of images and convolution weights.
        precision: of the forward pass; quantizers compute in float32.
        sizes: images of the forward passes that are compiled.
    """

    compiled: bool = False
    memory_format: MemoryFormat = "contiguous"
    precision: Precision = "float32"
    sizes: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a checkpoint."""
        return asdict(self) | {"sizes": list(self.sizes)}

    def recorded(self) -> dict[str, Any]:
        """What a manifest records: all but the sizes, which follow from the settings."""
        return {name: value for name, value in asdict(self).items() if name != "sizes"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Execution":
        """The inverse of ``to_dict``."""
        return cls(**{**values, "sizes": tuple(values["sizes"])})

    def __str__(self) -> str:
        """Such as ``compiled, channels_last, bfloat16``; ``as written`` where nothing was changed."""
        words = ["compiled"] if self.compiled else []
        words += [value for value in (self.memory_format, self.precision) if value not in _PLAIN]
        return ", ".join(words) or "as written"


_PLAIN = ("contiguous", "float32")


class Engine:
    """Calls a model in the way of an ``Execution``.

    Attributes:
        model: the model, whose convolution weights follow the memory format.
        execution: see ``set``.
    """

    def __init__(
        self, model: Callable[[Tensor], Tensor], note: Callable[[str], None] = lambda _: None
    ) -> None:
        self.model, self._note = model, note
        self.execution = Execution()
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def set(self, execution: Execution) -> None:
        """Compute in this way from now on."""
        if execution.memory_format != self.execution.memory_format:
            self._lay_out(execution.memory_format)
        if execution.compiled and self._compiled is None:
            self._compiled = torch.compile(self.model, dynamic=False)
        self.execution = execution

    def __call__(self, images: Tensor) -> Tensor:
        """The outputs for images (N, C, H, W)."""
        if images.dim() == 4:
            images = images.contiguous(memory_format=_FORMATS[self.execution.memory_format])
        if not self.execution.compiled or len(images) not in self.execution.sizes:
            return self.model(images)
        assert self._compiled is not None
        try:
            return self._compiled(images)
        except Exception as error:  # the compiler may raise anything
            if out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        outputs: Tensor = self.model(images)  # raises if it was the network that failed
        self._note(f"the network cannot be compiled and is computed as written: {reason}")
        self.execution = replace(self.execution, compiled=False, sizes=())
        return outputs

    def restore(self) -> None:
        """Compute as written again."""
        self.set(Execution())

    def _lay_out(self, memory_format: MemoryFormat) -> None:
        """Lay out the weights of 2-D convolutions anew; other weights, and clipping levels, stay as they are."""
        for module in self.model.modules() if isinstance(self.model, nn.Module) else ():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and weight is not None:
                weight.data = weight.data.contiguous(memory_format=_FORMATS[memory_format])


class Trial(Protocol):
    """Computes the passes of a step, and leaves everything as it was."""

    def __call__(self, execution: Execution) -> Execution:
        """How it was computed in fact: a network that cannot be compiled is computed as written."""


def choose(
    training: TrainingSection,
    trial: Trial,
    sizes: tuple[int, ...],
    steps: int,
    model: nn.Module,
    note: Callable[[str], None],
) -> Execution:
    """The fastest of the ways that the settings allow; all ranks agree on that of the first.

    Args:
        training: the settings.
        trial: computes a step's passes.
        sizes: images of the forward passes of a whole batch.
        steps: steps ahead.
        model: the model; its size decides whether compiling is worth a try.
        note: receives a line if anything but the plain way was chosen, or compiling failed.
    """
    plain = Execution(
        memory_format="channels_last" if training.memory_format == "channels_last" else "contiguous",
        precision="bfloat16" if training.precision == "bfloat16" else "float32",
    )
    compiled = replace(plain, compiled=True, sizes=sizes)
    open_choices = "auto" in (training.memory_format, training.precision, training.compile)
    if not open_choices:
        return compiled if training.compile == "on" else plain
    seconds = _Clock(trial)
    if not LEAST_SECONDS <= steps * seconds(plain) < math.inf:
        return compiled if training.compile == "on" else plain
    found = plain
    if training.memory_format == "auto":
        found = seconds.faster(replace(found, memory_format="channels_last"), found)
    if training.precision == "auto":
        found = seconds.faster(replace(found, precision="bfloat16"), found)
    compiled = replace(found, compiled=True, sizes=sizes)
    if training.compile == "on":
        found = compiled
    elif training.compile == "auto":
        cost = SECONDS_A_LAYER * len(quantized_layers(model))
        if distributed.from_first(lambda: steps * seconds(found) * GAIN > 2 * cost):
            found = seconds.faster(compiled, found)
    if found != Execution():
        note(
            f"training is computed {found}: {seconds(found):.2f} s for the passes of a step, {seconds(plain):.2f} s as "
            "written"
        )
    return found


class _Clock:
    """Seconds of a step's passes, each way measured once; the same on all ranks."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._seconds: dict[Execution, float] = {}

    def __call__(self, execution: Execution) -> float:
        if execution not in self._seconds:
            took = [self._measure(execution) for _ in range(ROUNDS)]
            failed = distributed.any_of(math.inf in took)
            self._seconds[execution] = distributed.from_first(lambda: math.inf if failed else min(took[1:]))
        return self._seconds[execution]

    def _measure(self, execution: Execution) -> float:
        """Infinity if memory runs out, or the network cannot be compiled."""
        start = time.perf_counter()
        attempt, computed = Attempt(), execution
        with attempt:
            computed = self._trial(execution)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return math.inf if attempt.out_of_memory or computed != execution else time.perf_counter() - start

    def faster(self, one: Execution, other: Execution) -> Execution:
        """``one`` if it is clearly faster."""
        return one if self(one) < FASTER * self(other) else other
