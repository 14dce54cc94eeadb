"""Packed codes: exact size, lossless, and strict when read."""

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saqcli.errors import CorruptArtifact
from saqcli.quant import grid as grids
from saqcli.quant.grid import Grid, pack, unpack
from tests.support.strategies import BITS, bits

KINDS = {
    "paper": grids.paper_weights,
    "integer": grids.integer_weights,
    "unsigned": lambda width: grids.activations(width, signed=False),
    "signed": lambda width: grids.activations(width, signed=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def all_codes(grid: Grid) -> torch.Tensor:
    return torch.arange(grid.lowest, grid.highest + 1, grid.stride, dtype=torch.int32)


@every_kind
@given(width=bits(), data=st.data())
def test_codes_survive_packing(kind: str, width: int, data: st.DataObject) -> None:
    grid = KINDS[kind](width)
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4), label="shape"))
    seed = data.draw(st.integers(0, 2**16), label="seed")
    index = np.random.default_rng(seed).integers(0, grid.levels, shape)
    codes = torch.from_numpy(index * grid.stride + grid.lowest).to(torch.int32)
    packed = pack(codes, grid, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (ceil(codes.numel() * width / 8),)
    restored = unpack(packed, grid, width, shape)
    assert restored.dtype == torch.int32
    assert torch.equal(restored, codes)


@every_kind
@pytest.mark.parametrize("width", BITS)
def test_every_grid_code_survives(kind: str, width: int) -> None:
    grid = KINDS[kind](width)
    codes = all_codes(grid)
    assert torch.equal(unpack(pack(codes, grid, width), grid, width, tuple(codes.shape)), codes)


def test_bits_are_msb_first_and_zero_padded() -> None:
    grid = grids.activations(3, signed=False)
    packed = pack(torch.tensor([1, 7, 4], dtype=torch.int32), grid, 3)
    assert packed.tolist() == [0b00111110, 0b00000000]


@every_kind
@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_byte_count_is_refused(kind: str, width: int, change: int) -> None:
    grid = KINDS[kind](width)
    packed = pack(all_codes(grid)[:3].repeat(5), grid, width)
    wrong = packed[:-1] if change < 0 else torch.cat([packed, packed[:1]])
    with pytest.raises(CorruptArtifact, match="cannot hold 15 codes"):
        unpack(wrong, grid, width, (15,))


def test_non_bytes_input_is_refused() -> None:
    grid = grids.paper_weights(8)
    with pytest.raises(CorruptArtifact):
        unpack(torch.zeros(4, dtype=torch.int32), grid, 8, (4,))


def test_index_beyond_the_grid_is_refused() -> None:
    grid = grids.integer_weights(8)  # 255 levels: index 255 is unused
    packed = pack(all_codes(grid)[:4], grid, 8)
    packed[2] = 255
    with pytest.raises(CorruptArtifact, match="outside a grid of 255 levels"):
        unpack(packed, grid, 8, (4,))


def test_nonzero_padding_bits_are_refused() -> None:
    grid = grids.paper_weights(3)
    packed = pack(all_codes(grid)[:3], grid, 3)  # 9 bits: seven are padding
    packed[1] |= 1
    with pytest.raises(CorruptArtifact):
        unpack(packed, grid, 3, (3,))
