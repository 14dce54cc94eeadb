"""Starting the worker processes of torch's loaders: their signals and warnings."""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from saqcli.runs.interrupts import blocked_signals, outlive_one_signal


def prepare_workers(loader: Any) -> None:
    """Let the workers of torch's ``loader`` start with signals held back, and ignore the first signal they get."""
    loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
    loader._get_iterator = partial(_start_workers, weakref.ref(loader))


def _start_workers(batches: weakref.ref[Any]) -> Any:
    """Start a pass of torch's loader, with signals held back while it starts its worker processes.

    The reference is weak, since the garbage collector cannot end the workers of a loader that refers to itself.
    """
    loader: Any = batches()
    with any_number_of_workers(), blocked_signals() if loader.num_workers else nullcontext():
        return type(loader)._get_iterator(loader)


@contextmanager
def any_number_of_workers() -> Iterator[None]:
    """Without torch's warning about more workers than cores, which ``splits.py`` notes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    """Ignore the first signal in a worker process, then run the loader's own initialization ``init``."""
    outlive_one_signal()
    if init is not None:
        init(worker)
