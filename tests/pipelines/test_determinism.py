"""Deterministic kernels: same results on a CPU, a one-line error where there is none, and settings restored."""

import os

import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.random_state import CUBLAS, deterministic
from tests.support import tiny


def flags() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return (*mode, cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS), torch.get_num_threads())


def trained(name: str) -> dict[str, Tensor]:
    """The state after three steps on quantized layers."""
    torch.manual_seed(0)
    net, x = tiny.build(name)
    tiny.quantized(net, x)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
        optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("name", sorted(tiny.TINY))
def test_deterministic_cpu_run_is_unchanged(name: str) -> None:
    before = flags()
    expected = trained(name)
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS] == ":4096:8"
        found = trained(name)

    assert flags() == before
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("value", [None, ":16:8", ":0:0"])
def test_operation_without_deterministic_kernel_fails(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(CUBLAS, raising=False)
    else:
        monkeypatch.setenv(CUBLAS, value)
    before = flags()

    refused = pytest.raises(
        UnsupportedModel, match=r"^`run.deterministic`: put_ has no .*, or try `run.device=cpu`"
    )
    with refused, deterministic():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    assert flags() == before
