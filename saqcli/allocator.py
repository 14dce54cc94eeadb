"""Freed memory stays with the process, so that the next tensor of that size finds it in place.

By default glibc maps every large tensor afresh and gives it back when it is freed. The system then clears each page of
each activation again, in every batch: for networks of many small operations that takes longer than the operations.
"""

import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory, for this process and those that it forks.

    Large blocks then come from the heap, none of which is returned to the system before the process ends. Results do
    not change.

    Returns:
        Whether it does so. False, and nothing is changed, if the environment configures malloc (``MALLOC_...`` or
        ``GLIBC_TUNABLES``), if another allocator takes its place, or if the C library is not glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        import ctypes

        program, glibc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        addresses = {ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (program, glibc)}
        if not hasattr(glibc, "gnu_get_libc_version") or len(addresses) > 1:
            return False
        # Not the threshold of mmap, which mallopt(3) limits to 32 MiB: activations are larger.
        return bool(glibc.mallopt(_M_MMAP_MAX, 0)) and bool(glibc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (ImportError, OSError, AttributeError, TypeError):
        return False
