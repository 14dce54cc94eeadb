"""How the passes of training are computed: compiled or not, in which memory format and precision.

What is fastest depends on network and machine, so it is measured: before the first step, one step's passes on its own
images, without an update. What is chosen changes the last bits of results, so it is part of a run's state: a resumed
run, all ranks and a rerun compute in the same way.

    kernels          one fused kernel for each quantizer, if the machine has a compiler
    memory format    channels_last where that makes the passes faster
    precision        bfloat16 likewise, if ``training.precision`` is ``auto`` and no layer has 2 bits or fewer
    compiled         the whole network by ``torch.compile``, if the steps ahead repay the time that it takes

Compiled graphs are made for the sizes of whole batches; in training, other batches, such as a short last one, are
computed as the network is written, and in evaluation padded. A network that cannot be compiled is computed as written.
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
from saqcli.errors import SaqError, UnsupportedModel, first_line, out_of_memory
from saqcli.quant.kernels.choice import KernelKind
from saqcli.quant.kernels.compiled import prepare_compiler
from saqcli.quant.kernels.use import use_kernels
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.training.memory import Attempt
from saqcli.units import format_duration

MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["float32", "bfloat16"]
LEAST_STEPS = 100  # below it nothing is measured
LEAST_SECONDS = 120.0  # of all steps: below it nothing is changed
FASTER = 0.95  # of the time before: a smaller gain is noise
GAIN = 0.3  # share of a step's time that compiling is expected to save
SECONDS_A_LAYER = 3.0  # to compile, for lack of a measurement of this network
ROUNDS = 3  # of which the first, which warms up and compiles, does not count
LEAST_BITS = 3  # in bfloat16; with fewer it costs accuracy, see docs/speed.md
MOST_GRAPHS = 1000  # of one function, such as the forward pass of the blocks of several networks
LEAST_CHANNELS = 16  # see ``overruns``, which was seen below 8
NOT_COMPILED = "torch.compile fails for this network, which runs without it"
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Execution:
    """How passes are computed.

    Attributes:
        compiled: the network was put through ``torch.compile``.
        memory_format: of images and convolution weights.
        precision: of the forward pass; quantizers compute in float32.
        kernels: of quantizers that are not compiled with the network, such as those of weights.
        sizes: images of the forward passes that are compiled.
        evaluates: evaluation is compiled too.
    """

    compiled: bool = False
    memory_format: MemoryFormat = "contiguous"
    precision: Precision = "float32"
    kernels: KernelKind = "eager"
    sizes: tuple[int, ...] = ()
    evaluates: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a checkpoint."""
        return asdict(self) | {"sizes": list(self.sizes)}

    def recorded(self) -> dict[str, Any]:
        """What a manifest records."""
        return {name: value for name, value in asdict(self).items() if name not in ("sizes", "evaluates")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Execution":
        """The inverse of ``to_dict``."""
        return cls(**{**values, "sizes": tuple(values["sizes"])})

    def __str__(self) -> str:
        """Such as ``compiled, channels_last, bfloat16``; ``as written`` where nothing was changed."""
        words = ["compiled"] if self.compiled else []
        words += ["with fused kernels"] if self.kernels == "fused" else []
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
        self._most = 0  # images of a batch of evaluation
        self._told = False  # that there are no fused kernels
        self._laid: list[nn.Parameter] = []  # weights whose format was changed

    def set(self, execution: Execution) -> None:
        """Compute in this way from now on."""
        if execution.memory_format != self.execution.memory_format:
            self._lay_out(execution.memory_format)
        if isinstance(self.model, nn.Module) and execution.kernels != self.execution.kernels:
            kernels = use_kernels(self.model, execution.kernels)
            if kernels.reason is not None and not self._told:
                self._note(kernels.reason)
                self._told = True
            execution = replace(execution, kernels=kernels.kind)
        if execution.compiled and self._compiled is None:
            prepare_compiler()
            self._compiled = torch.compile(self.model, dynamic=False)
        self.execution = execution

    def __call__(self, images: Tensor) -> Tensor:
        """The outputs for images (N, C, H, W)."""
        images = self._laid_out(images)
        if not self.execution.compiled or len(images) not in self.execution.sizes:
            return self.model(images)
        return self._run_compiled(images)

    def evaluate(self, images: Tensor) -> Tensor:
        """The outputs for images (N, C, H, W) of one pass over evaluation images, whose first batch is the largest."""
        images = self._laid_out(images)
        if not self.execution.compiled or not self.execution.evaluates:
            return self.model(images)
        self._most = max(self._most, len(images))
        missing = self._most - len(images)
        padded = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
        attempt, outputs = Attempt(), list[Tensor]()
        with attempt:
            outputs.append(self._run_compiled(padded)[: len(images)])
        return self.model(images) if attempt.out_of_memory else outputs[0]

    def _laid_out(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or self.execution.memory_format == "contiguous":
            return images  # as they are given
        return images.contiguous(memory_format=torch.channels_last)

    def _run_compiled(self, images: Tensor) -> Tensor:
        assert self._compiled is not None
        from torch._dynamo import config

        try:
            with config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS):
                return self._compiled(images)
        except Exception as error:  # the compiler may raise anything
            if out_of_memory(error):
                raise
            reason = first_line(error)[:200]
        outputs = self.model(images)  # raises if it was the network that failed
        self._note(f"{NOT_COMPILED}: {reason}")
        self.execution = replace(self.execution, compiled=False, sizes=(), evaluates=False)
        return outputs

    def restore(self) -> None:
        """Compute as written again."""
        self.set(Execution())

    def _lay_out(self, memory_format: MemoryFormat) -> None:
        """Lay out the weights of 2-D convolutions anew; other weights, and clipping levels, stay as they are."""
        if memory_format == "channels_last":
            modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
            found = [
                module._parameters.get("weight")
                for module in modules
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            ]
            self._laid = [weight for weight in found if weight is not None and weight.is_contiguous()]
        for weight in self._laid:
            weight.data = weight.data.contiguous(memory_format=_FORMATS[memory_format])


def overruns(layer: QuantizedLayer) -> bool:
    """Whether the gradient of the weight may not be computed in channels_last.

    On a CPU, torch 2.15 writes beyond its memory where a convolution of one pixel has a stride and few channels.
    """
    weight = layer.latent_weight()
    channels, *kernel = weight.shape[1:]
    strided = max(getattr(layer, "stride", (1,))) > 1
    return weight.device.type == "cpu" and set(kernel) == {1} and strided and channels < LEAST_CHANNELS


class Trial(Protocol):
    """Computes the passes of a step, and leaves everything as it was."""

    def __call__(self, execution: Execution) -> Execution:
        """How it was computed in fact: a network that cannot be compiled is computed as written."""


def choose(
    training: TrainingSection,
    trial: Trial,
    sizes: tuple[int, ...],
    steps: int,
    evaluates: bool,
    model: nn.Module,
    note: Callable[[str], None],
) -> Execution:
    """The fastest of the ways that the settings allow; all ranks agree on that of the first.

    Args:
        training: the settings.
        trial: computes a step's passes.
        sizes: images of the forward passes of a whole batch.
        steps: steps ahead.
        evaluates: whether the model is evaluated after epochs.
        model: the model; its size decides whether compiling is worth a try.
        note: receives a line if anything but the plain way was chosen, or compiling failed.

    Raises:
        UnsupportedModel: the network cannot be computed in the memory format that the settings ask for.
    """
    plain = Execution(
        memory_format="channels_last" if training.memory_format == "channels_last" else "contiguous",
        precision="bfloat16" if training.precision == "bfloat16" else "float32",
        kernels="fused" if training.compile == "kernels" else "eager",
    )
    compiled = replace(plain, compiled=True, kernels="fused", sizes=sizes, evaluates=evaluates)
    unsafe = next((name for name, layer in quantized_layers(model).items() if overruns(layer)), None)
    if training.memory_format == "channels_last":
        if unsafe is not None:
            raise UnsupportedModel(
                f"{unsafe} is a strided convolution of one pixel with few channels, whose gradient torch gets "
                "wrong in channels_last on a CPU: use `training.memory_format=contiguous`"
            )
        _check(trial, plain)
    seconds = _Clock(trial, plain)
    cost = SECONDS_A_LAYER * len(quantized_layers(model))
    if training.compile == "on":
        note(_compiling(cost))
    is_open = "auto" in (training.memory_format, training.precision, training.compile)
    if not (is_open and steps >= LEAST_STEPS and LEAST_SECONDS <= steps * seconds(plain) < math.inf):
        return _as_computed(trial, compiled, note) if training.compile == "on" else plain
    found = plain
    if training.compile in ("auto", "on"):
        found = seconds.faster(replace(found, kernels="fused"), found)
    if training.memory_format == "auto" and unsafe is None:
        found = seconds.faster(replace(found, memory_format="channels_last"), found)
    if training.precision == "auto" and _fewest_bits(model) >= LEAST_BITS:
        found = seconds.faster(replace(found, precision="bfloat16"), found)
    compiled = replace(compiled, memory_format=found.memory_format, precision=found.precision)
    if training.compile == "on":
        found = _as_computed(trial, compiled, note)
    elif training.compile == "auto" and steps * seconds(found) * GAIN > 2 * cost:
        note(_compiling(cost))
        found = seconds.faster(compiled, found)
    if found != plain:
        note(
            f"training runs {found}: forward and backward passes take {seconds(found):.2g} s a step instead of "
            f"{seconds(plain):.2g} s"
        )
    return found


def _fewest_bits(model: nn.Module) -> float:
    """The smallest width of all operands; infinite without quantizers."""
    widths = [layer.bits for layer in quantized_layers(model).values()]
    return min(
        (width for bits in widths for width in (bits.weight, bits.activation) if width), default=math.inf
    )


def _compiling(seconds: float) -> str:
    took = format_duration(seconds)
    return f"compiling the network before the first step (torch.compile), about {took} the first time"


def _check(trial: Trial, execution: Execution) -> None:
    """Check that the network can be computed in channels_last, as requested.

    Raises:
        UnsupportedModel: it cannot, though it can be computed as written.
    """
    try:
        trial(execution)
    except Exception as error:
        if out_of_memory(error):
            return  # the step itself takes smaller parts
        if isinstance(error, SaqError):
            raise
        trial(Execution())  # raises if it was the network that failed
        reason = first_line(error)[:200]
        raise UnsupportedModel(
            f"the network fails in channels_last ({reason}): use `training.memory_format=contiguous`"
        ) from None


def _as_computed(trial: Trial, execution: Execution, note: Callable[[str], None]) -> Execution:
    """``execution``, if the network can be compiled on all ranks; else the same, as written.

    It is tried first: a network that fails halfway through has drawn random numbers and updated statistics.
    """
    attempt, compiled = Attempt(), True
    try:
        with attempt:
            compiled = trial(execution).compiled
    except Exception as error:  # the compiler may raise anything, also in the backward pass
        compiled = False
        reason = first_line(error)[:200]
        note(f"{NOT_COMPILED}: {reason}")
    if distributed.any_of(not compiled):
        return replace(execution, compiled=False, sizes=(), evaluates=False)
    return execution


class _Clock:
    """Seconds of a step's passes, each way measured once; the same on all ranks."""

    def __init__(self, trial: Trial, plain: Execution) -> None:
        self._trial, self._plain = trial, plain
        self._seconds: dict[Execution, float] = {}

    def __call__(self, execution: Execution) -> float:
        if execution not in self._seconds:
            took = [self._measure(execution) for _ in range(ROUNDS)]
            failed = distributed.any_of(math.inf in took)
            self._seconds[execution] = distributed.from_first(lambda: math.inf if failed else min(took[1:]))
        return self._seconds[execution]

    def _measure(self, execution: Execution) -> float:
        """Infinity if memory runs out, or the network cannot be computed in this way."""
        start = time.perf_counter()
        attempt, computed = Attempt(), execution
        try:
            with attempt:
                computed = self._trial(execution)
        except Exception:  # of any kind: a network may view a tensor as only contiguous ones can be
            if execution == self._plain:
                raise
            return math.inf
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return math.inf if attempt.out_of_memory or computed != execution else time.perf_counter() - start

    def faster(self, one: Execution, other: Execution) -> Execution:
        """``one`` if it is clearly faster."""
        return one if self(one) < FASTER * self(other) else other
