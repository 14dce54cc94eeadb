"""Sweeps over many cases: some in every run, all with ``pytest -m slow``."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], always: Callable[..., bool]) -> list[Any]:
    """``cases`` for ``pytest.mark.parametrize``, slow where ``always``, which is given a case, is false.

    A case is a value, or a tuple of them.

    Example:
        >>> [bool(case.marks) for case in sweep([2, 3, 4], lambda bits: bits == 4)]
        [True, True, False]
    """
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=() if always(*values) else pytest.mark.slow))
    return found


def examples(count: int) -> int:
    """How many of ``count`` examples Hypothesis draws: a fifth, or all where the environment has ``SAQ_THOROUGH``.

    Example:
        >>> examples(400) in (80, 400)
        True
    """
    return count if os.environ.get("SAQ_THOROUGH") else max(1, count // 5)
