"""Communication between ranks, and their behaviour when one fails."""

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from saqcli import distributed
from saqcli.errors import ConfigError, DataError, StoppedElsewhere
from saqcli.runs import interrupts
from saqcli.runs.interrupts import deferred_interrupts
from tests.support.joined import ranks_run


def outcome(call: Any) -> Any:
    """The result of a call, or the class and exit code of its error."""
    try:
        return call()
    except (ConfigError, DataError, StoppedElsewhere) as error:
        return type(error).__name__, error.exit_code


def refuse(what: type[Exception] = ConfigError) -> None:
    raise what("no")


def everything() -> dict[str, Any]:
    here = distributed.index()
    tensors = [torch.full((3, 2), float(here)), torch.full((), 2.0 * here, dtype=torch.float64)]
    distributed.average(tensors)
    return {
        "count": distributed.count(),
        "first": distributed.first(),
        "from_first": distributed.from_first(lambda: {"rank": here, "tensor": torch.tensor([1.5])}),
        "refused_by_first": outcome(lambda: distributed.from_first(refuse)),
        "together": outcome(lambda: distributed.together(lambda: here)),
        "one_refuses": outcome(
            lambda: distributed.together(lambda: refuse(DataError) if here == 1 else None)
        ),
        "all_refuse": outcome(lambda: distributed.together(refuse)),
        "gathered": distributed.gathered(f"rank {here}"),
        "any": [distributed.any_of(here == 2), distributed.any_of(False)],
        "totals": distributed.totals(here, 0.1),
        "mean": distributed.mean(float(here)),
        "averaged": [tensor.tolist() for tensor in tensors],
        "shares": distributed.interleaved(distributed.gathered(list(distributed.share(range(7))))),
    }


def test_three_ranks_agree() -> None:
    found = ranks_run(3, everything)

    told = ("StoppedElsewhere", 1)
    for rank, seen in enumerate(found):
        assert (seen["count"], seen["first"]) == (3, rank == 0)
        assert seen["from_first"]["rank"] == 0
        assert seen["from_first"]["tensor"].tolist() == [1.5]
        assert seen["refused_by_first"] == (("ConfigError", 1) if rank == 0 else told)
        assert seen["together"] == rank
        assert seen["one_refuses"] == (("DataError", 1) if rank == 1 else told)
        assert seen["all_refuse"] == (("ConfigError", 1) if rank == 0 else told)
        assert seen["gathered"] == ["rank 0", "rank 1", "rank 2"]
        assert seen["any"] == [True, False]
        assert seen["totals"] == [3.0, pytest.approx(0.3)]
        assert seen["mean"] == 1.0
        assert seen["averaged"] == [[[1.0, 1.0]] * 3, 2.0]
        assert seen["shares"] == list(range(7))


def test_single_process_collectives() -> None:
    tensor = torch.tensor([2.0])
    distributed.average([tensor])

    assert (distributed.count(), distributed.index(), tensor.item()) == (1, 0, 2.0)
    assert distributed.from_first(lambda: 3) == distributed.together(lambda: 3) == 3
    assert distributed.gathered(4) == [4]
    assert (distributed.any_of(True), distributed.any_of(False), distributed.totals(5.0)) == (
        True,
        False,
        [5.0],
    )
    assert list(distributed.share([1, 2, 3])) == [1, 2, 3]


def averaged() -> list[float]:
    distributed.BUCKET = 10
    tensors = [torch.full((size,), float(distributed.index() + size)) for size in (1, 9, 10, 11, 25, 3)]
    distributed.average(tensors)
    return [tensor.unique().item() for tensor in tensors]


def test_large_tensors_are_averaged_in_buckets() -> None:
    assert ranks_run(2, averaged) == [[size + 0.5 for size in (1, 9, 10, 11, 25, 3)]] * 2


def _waiting() -> float:
    """Rank 1 dies while the others wait for it."""
    if distributed.index() == 1:
        os._exit(7)
    start = time.monotonic()
    with pytest.raises(StoppedElsewhere):
        distributed.totals(1.0)
    return time.monotonic() - start


def test_dead_rank_is_detected_immediately() -> None:
    with pytest.raises(AssertionError, match="rank 1: it ended with 7"):
        ranks_run(3, _waiting)


def _blocked(number: int) -> None:
    """Rank 0 blocks outside Python, waiting for a rank that never arrives, and gets a signal."""
    if distributed.index() == 1:
        time.sleep(4)
        return
    interrupts.SECONDS_TO_ANSWER = 1.0
    with deferred_interrupts():
        threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
        dist.barrier()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_waiting_rank_ends_promptly_on_signal(number: int, code: int) -> None:
    with pytest.raises(AssertionError, match=f"rank 0: it ended with {code}"):
        ranks_run(2, partial(_blocked, number))
