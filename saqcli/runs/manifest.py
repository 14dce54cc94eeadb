"""``manifest.json``: command, versions, circumstances, status and results of a run.

The circumstances are what the bits of a result depend on besides the settings: the number of threads changes the order
of summation, the processor selects the kernels. ``saq rerun`` restores what it can and names the rest.
"""

import os
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from saqcli import distributed
from saqcli.machine import cores, cpu_name, resolve_device


def _below_artifacts(name: str) -> str:
    """Check a file name from an untrusted manifest before the file is opened."""
    if not re.fullmatch(r"artifacts(/[^/\\\0]+)+", name) or not {".", ".."}.isdisjoint(name.split("/")):
        raise ValueError("an artifact is a relative path below artifacts/, without '..'")
    return name


class Computed(BaseModel):
    """How the passes of training were computed (see ``training.execution``).

    Attributes:
        compiled: the network was put through ``torch.compile``.
        memory_format: of images and convolution weights.
        precision: of the forward pass.
        kernels: of the quantizers, where the network was not compiled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    compiled: bool = False
    memory_format: str = "contiguous"
    precision: str = "float32"
    kernels: str = "eager"

    def __str__(self) -> str:
        """Such as ``compiled, channels_last, float32, eager quantizers``."""
        how = "compiled" if self.compiled else "not compiled"
        return f"{how}, {self.memory_format}, {self.precision}, {self.kernels} quantizers"


class Circumstances(BaseModel):
    """Where and how a process computed.

    Attributes:
        directory: working directory; relative paths refer to it.
        device: device, with the name of a GPU.
        cpu: name of the processor.
        instructions: widest instruction set of PyTorch's kernels, such as ``AVX512``.
        cores: logical processors available to the process; they set the default number of loader workers.
        threads: number of PyTorch threads.
        processes: number of ranks.
        training: how training was computed; None before it, and without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str
    device: str
    cpu: str
    instructions: str
    cores: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    processes: Annotated[int, Field(ge=1)]
    training: Computed | None = None


class RunManifest(BaseModel):
    """The content of ``manifest.json``.

    Attributes:
        command: the command line as typed.
        verb: the command of saq.
        status: ``running`` also after a crash; ``clearing`` while the files of an overwritten run are removed.
        started: UTC.
        versions: versions of saq and of the libraries that its results depend on.
        circumstances: one entry, plus one for each resume under different circumstances; empty in manifests of
            earlier versions.
        images: fingerprints of the images, one for each split, including those of a proxy.
        class_order: how folders were mapped to classes: ``timm``, ``torchvision``, ``imagenet``, or a file name.
        artifacts: relative path to SHA-256.
        results: the figures that the command printed.
        seconds: of each stage of a quantization so far, over all processes that worked on it.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    command: list[str]
    verb: str = "quantize"
    status: Literal["clearing", "running", "interrupted", "failed", "finished"]
    started: str
    versions: dict[str, str]
    circumstances: list[Circumstances] = []
    images: dict[str, str] = {}
    class_order: str = ""
    artifacts: dict[Annotated[str, AfterValidator(_below_artifacts)], str] = {}
    results: dict[str, Any] = {}
    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}


def computed(circumstances: Sequence[Circumstances]) -> Computed:
    """How training was computed in the end; as the network is written where that is not recorded."""
    return next((each.training for each in reversed(circumstances) if each.training), Computed())


def circumstances(device: str) -> Circumstances:
    """The circumstances of this process; ``device`` is the value of the setting."""
    import torch

    chosen = resolve_device(device)
    gpu = f" ({torch.cuda.get_device_name(chosen)})" if chosen.startswith("cuda") else ""
    return Circumstances(
        directory=os.getcwd(),
        device=f"{chosen}{gpu}",
        cpu=cpu_name(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        cores=cores(),
        threads=torch.get_num_threads(),
        processes=distributed.count(),
    )
