"""Functions that run on several ranks, as under torchrun, without the seconds of starting processes.

The processes are forked from a server that has imported everything but run nothing, since autograd does not survive
a fork after use. The function is pickled, so it must be a module-level function or a ``partial``.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tests.support.command_line import saq

SECONDS = 120.0


def ranks_run(
    count: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS
) -> list[Any]:
    """The results of ``function(*arguments)`` in ``count`` processes of one group; all must succeed."""
    found = _run(count, _in_group, (function, arguments), seconds)
    for rank, (value, failure) in enumerate(found):
        assert failure is None, f"rank {rank}: {failure}"
        del value
    return [value for value, _ in found]


def ranks_saq(
    count: int, *arguments: object, before: Callable[[int], None] = abs, **environment: str
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command in each of ``count`` processes that torchrun could have started.

    ``before`` is called with the rank in each of them (``abs`` does nothing); ``environment`` holds further variables.
    """
    found = _run(count, _command, (arguments, before, environment), SECONDS)
    return [value if failure is None else (-1, "", str(failure)) for value, failure in found]


def forks() -> "multiprocessing.context.ForkServerContext":
    """A context for processes that have already imported torch and the command line."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "timm", "tests.support.command_line", "saqcli.pipelines.quantize"]
    )
    return context


def _run(count: int, function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forks()
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(
            context.Process(target=_child, args=(theirs, rank, count, port, function, arguments), daemon=True)
        )
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    found = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(seconds) else (None, "it did not end"))
        except EOFError:
            process.join(5)
            found.append((None, f"it ended with {process.exitcode}"))
    for process in processes:
        process.join(5)
        process.kill()
    return found


def _child(pipe: Any, rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send_bytes(pickle.dumps((function(*arguments), None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        pipe.close()
        sys.stdout.flush()
        os._exit(0)


def _in_group(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.distributed.init_process_group("gloo")
    try:
        return function(*arguments)
    finally:
        torch.distributed.destroy_process_group()


def _command(
    arguments: tuple[object, ...], before: Callable[[int], None], environment: dict[str, str]
) -> tuple[int, str, str]:
    os.environ |= environment
    before(int(os.environ["RANK"]))
    result = saq(*arguments)
    return result.exit_code, result.stdout, result.stderr
