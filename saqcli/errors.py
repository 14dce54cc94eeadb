"""All errors that a user can act on, in one tree.

    SaqError                      exit code 1
    ├── ConfigError               an invalid setting, file or option
    │   ├── SeveralProblems       several errors, found before anything was loaded
    │   └── BuilderError          a network of the user's own that fails, or that the user did not name
    ├── UnknownModel              an unknown network; names similar ones
    ├── WeightsMismatch           weights that do not match the network
    ├── UnsafeWeights             a weight file that would run code when loaded
    ├── DataError                 a data set that cannot be read as requested
    ├── UnsupportedModel          a network that cannot be wrapped or traced
    │   └── UnsupportedGrid       a quantizer with levels that a kind of file cannot express
    ├── PolicyMismatch            a policy for another network
    ├── UnperturbedLayer          a quantized layer without influence on the loss
    ├── PluginError               a plugin of another package that fails or breaks its contract
    ├── TrainingDiverged          the loss is NaN or infinite
    ├── DeviceMemoryError         out of memory, on a GPU or the machine
    ├── RunDirectoryError         a run directory that is in use, foreign or damaged
    │   └── CannotWrite           a full disk, a read-only or missing folder
    ├── CorruptArtifact           a file that is truncated, modified or foreign
    ├── ExportMismatch            exit code 3: an artifact that does not equal the model
    ├── InfeasibleBudget          exit code 4: a budget of cost or accuracy that nothing meets
    ├── NotReproduced             exit code 3: a rerun with a different result
    ├── Interrupted               exit code 130: stopped by the user, progress saved
    └── StoppedElsewhere          another process of the same run failed and reported why

A message has three parts: the request, the facts, the remedy. The command line prints it on one line and exits with
``exit_code``, without a traceback.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class SaqError(Exception):
    """An error that the user can act on."""

    exit_code = 1

    @property
    def parts(self) -> "list[SaqError]":
        """The individual errors: the error itself, or those that it combines."""
        return [self]


class PluginWarning(UserWarning):
    """A plugin of another package is broken and disabled; everything else works."""


class AccuracyWarning(UserWarning):
    """A budget of accuracy that no configuration meets; the most accurate one was kept."""


class ConfigError(SaqError):
    """An invalid setting, file or option."""


class BuilderError(ConfigError):
    """A network of the user's own whose code fails, or that a file needs and the user did not name."""


class SeveralProblems(ConfigError):
    """Several errors in one message.

    Args:
        errors: two or more, in the order of the message.
    """

    def __init__(self, errors: list[SaqError]) -> None:
        listed = "; ".join(f"({number}) {error}" for number, error in enumerate(errors, 1))
        super().__init__(f"{len(errors)} problems: {listed}")
        self._errors = errors

    @property
    def parts(self) -> list[SaqError]:
        """The errors."""
        return self._errors


class Problems:
    """Collects errors, so that one message can report all of them."""

    def __init__(self) -> None:
        self.errors: list[SaqError] = []

    def attempt(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The result of ``make``; None if it raises a ``SaqError``, which is collected."""
        try:
            return make(*args, **kwargs)
        except SaqError as error:
            self.add(error)
            return None

    def add(self, error: SaqError) -> None:
        """Collect each part of ``error``; identical messages are kept once."""
        for one in error.parts:
            if str(one) not in map(str, self.errors):
                self.errors.append(one)

    def check(self) -> None:
        """Raise the collected error, or ``SeveralProblems`` if there are several."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralProblems(self.errors)


class UnknownModel(SaqError):
    """An unknown network."""


class WeightsMismatch(SaqError):
    """Weights that do not match the network."""


class UnsafeWeights(SaqError):
    """A weight file that would run code when loaded."""


class DataError(SaqError):
    """A data set that cannot be read as requested."""


class UnsupportedModel(SaqError):
    """A network that cannot be wrapped or traced."""


class UnsupportedGrid(UnsupportedModel):
    """A quantizer with levels that a kind of file cannot express; ``reason`` is the message without a remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: use model.safetensors, or another quantizer")
        self.reason = reason


class PolicyMismatch(SaqError):
    """A bit configuration for another network."""


class UnperturbedLayer(SaqError):
    """A quantized layer without influence on the loss."""


class PluginError(SaqError):
    """A plugin of another package that fails, or breaks the contract of its family."""


class TrainingDiverged(SaqError):
    """The loss is NaN or infinite."""


class DeviceMemoryError(SaqError):
    """Out of memory, on a GPU or the machine."""


class RunDirectoryError(SaqError):
    """A run directory that is in use, foreign or damaged."""


class CannotWrite(RunDirectoryError):
    """A file that cannot be written: a full disk, a read-only or missing folder."""


class CorruptArtifact(SaqError):
    """A file that is truncated, modified or foreign."""


class ExportMismatch(SaqError):
    """An artifact whose outputs differ from the model's."""

    exit_code = 3


class InfeasibleBudget(SaqError):
    """A budget that nothing meets: below the smallest reachable cost, or of more accuracy than was found."""

    exit_code = 4


class NotReproduced(SaqError):
    """A rerun with a different result."""

    exit_code = 3


class Interrupted(SaqError):
    """Stopped by the user.

    Args:
        resume: the command that resumes the work, in backticks.
        exit_code: 128 plus the signal number; that of Ctrl-C by default.
        saved: whether there is progress to resume from.
        export: the command that exports the model as it is, in backticks, if there is one.
    """

    exit_code = 130

    def __init__(
        self, resume: str, exit_code: int = exit_code, *, saved: bool = True, export: str = ""
    ) -> None:
        message = (
            "Interrupted; progress saved. Resume"
            if saved
            else "Interrupted before anything was saved. Start again"
        )
        instead = f", or export the model as it is with {export}" if export else ""
        super().__init__(f"{message} with {resume}{instead}")
        self.exit_code, self.saved = exit_code, saved


class StoppedElsewhere(SaqError):
    """Another process of the same run failed; its message gives the reason.

    Args:
        exit_code: of that process, if known.
    """

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__(
            "another process of this run has failed: its own message says why, or torchrun's report if it was killed"
        )
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of the message of ``error``, or the name of its class if it has none.

    Example:
        >>> first_line(ValueError("too large")), first_line(ValueError())
        ('too large', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an out-of-memory error of Python, torch (GPU or CPU) or ONNX Runtime."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)
