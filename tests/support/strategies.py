"""Hypothesis strategies for inputs of quantizers: tensors, bit-widths, clipping levels.

No subnormals: flush-to-zero differs between machines. The profile is deterministic, so that failures are reproducible.
"""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.sweeps import examples

settings.register_profile("saq", deadline=None, max_examples=examples(50), derandomize=True, database=None)
settings.load_profile("saq")

BITS = range(2, 9)


def bits() -> st.SearchStrategy[int]:
    """Supported bit-widths."""
    return st.integers(2, 8)


def levels() -> st.SearchStrategy[float]:
    """Clipping levels, float32 numbers from 1/16 to 16."""
    return st.floats(0.0625, 16.0, width=32)


def numbers(bound: float = 20.0) -> st.SearchStrategy[float]:
    """Finite float32 numbers, inside and outside the levels."""
    return st.floats(-bound, bound, width=32, allow_subnormal=False)


def tensors(rows: int = 3, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Tensor]:
    """Matrices of ``rows`` channels with 1 to 12 columns."""
    row = st.integers(1, 12).flatmap(
        lambda columns: st.lists(
            st.lists(numbers(), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
    return row.map(lambda values: torch.tensor(values, dtype=dtype))
