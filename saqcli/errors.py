"""Everything that can go wrong and that a person can act on, in one tree.

    SaqError                      exit code 1
    ├── ConfigError               a setting, file or option that makes no sense
    │   └── SeveralProblems       more than one of all these, found before anything was loaded
    ├── UnknownModel              no such network; names near matches
    ├── WeightsMismatch           weights that do not belong to the network
    ├── UnsafeWeights             a weight file that would run code when loaded
    ├── DataError                 a data set that cannot be read as asked
    ├── UnsupportedModel          a network that cannot be wrapped or traced
    ├── PolicyMismatch            a policy that was made for another network
    ├── UnperturbedLayer          a quantized layer that took no part in the loss
    ├── TrainingDiverged          the loss stopped being a number
    ├── DeviceMemoryError         memory of a GPU or of the machine that does not suffice
    ├── RunDirectoryError         a run directory that is taken, foreign or damaged
    │   └── CannotWrite           a full disk, a folder that is read-only or gone
    ├── CorruptArtifact           a file that is truncated, tampered with or foreign
    ├── ExportMismatch            exit code 3: an artifact that does not equal the model
    ├── InfeasibleBudget          exit code 4: no configuration meets the budget
    ├── NotReproduced             exit code 3: a run that did not give the same again
    ├── Interrupted               exit code 130: stopped by the user, work saved
    └── StoppedElsewhere          another process of the same run failed, and said why

A message has three parts: what was asked, what is true, what to do. The command line prints it on one
line and exits with ``exit_code``; no traceback.
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
        """What can be told apart in it: itself, or what it was put together from."""
        return [self]


class ConfigError(SaqError):
    """A setting, file or option that makes no sense."""


class SeveralProblems(ConfigError):
    """More than one thing that is wrong with what was asked, in one message.

    Args:
        errors: two or more, in the order in which they are told.
    """

    def __init__(self, errors: list[SaqError]) -> None:
        told = "; ".join(f"({number}) {error}" for number, error in enumerate(errors, 1))
        super().__init__(f"{len(errors)} problems: {told}")
        self._errors = errors

    @property
    def parts(self) -> list[SaqError]:
        """The errors."""
        return self._errors


class Problems:
    """Collects what is wrong, so that one message can tell all of it."""

    def __init__(self) -> None:
        self.errors: list[SaqError] = []

    def attempt(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What ``make`` returns; None where it raises a ``SaqError``, which is kept."""
        try:
            return make(*args, **kwargs)
        except SaqError as error:
            self.add(error)
            return None

    def add(self, error: SaqError) -> None:
        """Keep ``error``, each of its parts by itself; one that says the same as another is kept once."""
        for one in error.parts:
            if str(one) not in map(str, self.errors):
                self.errors.append(one)

    def check(self) -> None:
        """Raise what was kept: the error itself where it is one, ``SeveralProblems`` where there are more."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralProblems(self.errors)


class UnknownModel(SaqError):
    """No such network."""


class WeightsMismatch(SaqError):
    """Weights that do not belong to the network."""


class UnsafeWeights(SaqError):
    """A weight file that would run code when loaded."""


class DataError(SaqError):
    """A data set that cannot be read as asked."""


class UnsupportedModel(SaqError):
    """A network that cannot be wrapped or traced."""


class PolicyMismatch(SaqError):
    """A bit configuration that was made for another network."""


class UnperturbedLayer(SaqError):
    """A quantized layer that took no part in the loss."""


class TrainingDiverged(SaqError):
    """The loss stopped being a number."""


class DeviceMemoryError(SaqError):
    """Memory of a GPU or of the machine that does not suffice."""


class RunDirectoryError(SaqError):
    """A run directory that is taken, foreign or damaged."""


class CannotWrite(RunDirectoryError):
    """A file that cannot be written: a full disk, a folder that is read-only or gone."""


class CorruptArtifact(SaqError):
    """A file that is truncated, tampered with or foreign."""


class ExportMismatch(SaqError):
    """An artifact that does not compute what the model computes."""

    exit_code = 3


class InfeasibleBudget(SaqError):
    """No bit configuration meets the budget."""

    exit_code = 4


class NotReproduced(SaqError):
    """A run that was run again and did not give the same."""

    exit_code = 3


class Interrupted(SaqError):
    """Stopped by the user, as asked: no error to whom asked.

    Args:
        resume: the command that resumes the work, in backticks.
        exit_code: 128 plus the number of the signal; that of Ctrl-C where nothing is given.
        saved: whether there is anything to resume from.
    """

    exit_code = 130

    def __init__(self, resume: str, exit_code: int = exit_code, *, saved: bool = True) -> None:
        said = (
            "Interrupted; progress saved. Resume"
            if saved
            else "Interrupted before anything was saved. Start again"
        )
        super().__init__(f"{said} with {resume}")
        self.exit_code, self.saved = exit_code, saved


class StoppedElsewhere(SaqError):
    """Another process of the same run failed; what it said is the reason.

    Args:
        exit_code: of that process, as far as it is known.
    """

    def __init__(self, exit_code: int = 1) -> None:
        super().__init__(
            "another process of this run has failed: its own message says why, or torchrun's report if it was killed"
        )
        self.exit_code = exit_code


def out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python, torch on a GPU or a CPU, or ONNX Runtime says that memory has run out."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)
