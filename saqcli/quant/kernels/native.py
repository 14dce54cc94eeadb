"""The C kernels: built with the system's compiler on first use, kept for later processes, called on CPU tensors.

``quantize.c`` stands beside this file. Its library is kept in the user's cache folder under a name that depends on the
source, the flags and the instruction set, so that machines may share the folder.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from saqcli.quant.kernels.layout import Codes, in_layout_of, layout_of

SOURCE = Path(__file__).with_name("quantize.c")
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
)
OPTIONAL = ("-march=native", "-fopenmp")  # left out where the compiler refuses them
COMPILERS = ("cc", "gcc", "clang")
LONGEST_BUILD = 120  # seconds; takes one
SUMS = 3  # as in the source
_NAMES = {torch.float32: "float", torch.float64: "double"}


class NativeKernels:
    """The loaded library; methods take CPU tensors."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: it is not a library for this machine.
            AttributeError: it lacks a function.
        """
        library = ctypes.CDLL(str(path))
        pointer, size, number, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
        self._forward, self._backward = {}, {}
        for dtype, name in _NAMES.items():
            forward, backward = library[f"forward_{name}"], library[f"backward_{name}"]
            forward.argtypes = [pointer] * 4 + [size] * 3 + [number] * 2 + [integer] * 2
            backward.argtypes = [pointer] * 6 + [size] * 3 + [number] * 2 + [integer] * 3
            forward.restype, backward.restype = None, integer
            self._forward[dtype], self._backward[dtype] = forward, backward

    def forward(self, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes) -> Tensor:
        """``x`` on the grid, as in ``Kernels``."""
        out = torch.empty_like(x)
        self._forward[x.dtype](
            x.data_ptr(),
            out.data_ptr(),
            level.data_ptr(),
            None if offset is None else offset.data_ptr(),
            *layout_of(x, level),  # type: ignore[misc]
            *codes,
            torch.get_num_threads(),
        )
        return out

    def backward(
        self, grad: Tensor, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes, kind: int
    ) -> tuple[Tensor, Tensor]:
        """The gradient to ``x`` and the sums, as in ``Kernels``.

        Raises:
            MemoryError: none is left for the partial sums.
        """
        grad, grad_x = in_layout_of(x, grad), torch.empty_like(x)
        sums = torch.empty((SUMS, *level.shape), dtype=x.dtype)
        failed = self._backward[x.dtype](
            grad.data_ptr(),
            x.data_ptr(),
            grad_x.data_ptr(),
            level.data_ptr(),
            None if offset is None else offset.data_ptr(),
            sums.data_ptr(),
            *layout_of(x, level),  # type: ignore[misc]
            *codes,
            kind,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("no memory is left for the partial sums of a quantizer's gradient")
        return grad_x, sums


@cache
def load() -> NativeKernels | str:
    """The kernels, built if they are not yet; else why not, in one line. Asked once a process."""
    try:
        compiler = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        return f"the variable CC is no command ({error})"
    if not compiler:
        compiler = list(islice(filter(None, map(shutil.which, COMPILERS)), 1))
    if not compiler:
        return "no C compiler was found"
    folder = cache_folder()
    path = folder and folder / f"{_key(compiler)}.so"
    try:
        if path and _own(path):
            return NativeKernels(path)
    except (OSError, AttributeError):
        pass  # damaged: built again
    try:
        return _built(compiler, path)
    except subprocess.CalledProcessError as error:
        return f"the C compiler failed ({' '.join(error.stderr.split())[:200] or error})"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"the C kernels could not be built ({error})"


def cache_folder() -> Path | None:
    """Where built kernels are kept: ``$XDG_CACHE_HOME/saq/kernels``, else below ``~/.cache``; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    return next((Path(base) / "saq" / "kernels" for base in given if os.path.isabs(base)), None)


def _own(path: Path) -> bool:
    """Whether the file is there and nobody else can have written it: loading a library is running it."""
    if not path.is_file() or not hasattr(os, "geteuid"):
        return path.is_file()
    found = [each.stat() for each in (path, path.parent)]
    return all(each.st_uid in (0, os.geteuid()) and not each.st_mode & 0o022 for each in found)


def _key(compiler: list[str]) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    instructions = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    parts = (*compiler, *FLAGS, *OPTIONAL, platform.platform(), platform.processor(), instructions)
    return hashlib.sha256(SOURCE.read_bytes() + "\n".join(parts).encode()).hexdigest()[:24]


def _built(compiler: list[str], path: Path | None) -> NativeKernels:
    """Compile, and keep the library at ``path`` if that is possible."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = Path(folder) / "kernels.so"
        for optional in (OPTIONAL, OPTIONAL[:1], OPTIONAL[1:], ()):
            command = [*compiler, *FLAGS, *optional, "-o", str(made), str(SOURCE), "-lm"]
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=LONGEST_BUILD, check=False
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        with suppress(OSError, AttributeError):
            if path and _keep(made, path):
                return NativeKernels(path)
        return NativeKernels(made)  # without room in the cache, or where nothing there may be executed


def _keep(made: Path, path: Path) -> bool:
    """Copy ``made`` to ``path``, renamed, since several processes may build; whether it may be loaded from there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = path.with_name(f"{path.stem}.{made.parent.name}")  # as unique as the temporary folder
    try:
        shutil.copyfile(made, copy)
        copy.chmod(0o700)
        copy.replace(path)
    finally:
        copy.unlink(missing_ok=True)
    return _own(path)
