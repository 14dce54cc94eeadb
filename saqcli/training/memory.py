"""Attempts that may run out of memory.

The passes of a step, or of a part of an evaluation, are repeated in smaller parts where the memory does not suffice, on
all ranks if it does not on one.
"""

from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from saqcli import distributed
from saqcli.errors import out_of_memory

T = TypeVar("T")


class Attempt:
    """A context that ends quietly if memory runs out in it.

    Attributes:
        out_of_memory: whether it did.
    """

    out_of_memory = False

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Whether to suppress ``error``."""
        self.out_of_memory = isinstance(error, RuntimeError | MemoryError) and out_of_memory(error)
        return self.out_of_memory


def retry_on_oom(work: Callable[[], T], shrink: Callable[[], None]) -> T:
    """The result of ``work`` in the first attempt that fits in the memory of all ranks.

    Args:
        work: forward and backward passes. It is a function so that its tensors are freed when it fails.
        shrink: called between two attempts, after the tensors of the failed one are freed, also on ranks where it
            succeeded; undoes its changes and reduces its size.

    Example:
        >>> sizes = [64]
        >>> def work():
        ...     if sizes[-1] > 20:
        ...         raise MemoryError
        ...     return "done"
        >>> retry_on_oom(work, lambda: sizes.append(sizes[-1] // 2)), sizes
        ('done', [64, 32, 16])
    """
    while True:
        attempt, results = Attempt(), list[T]()
        with attempt:
            results.append(work())
        if not distributed.any_of(attempt.out_of_memory):
            return results[0]
        results.clear()
        shrink()
