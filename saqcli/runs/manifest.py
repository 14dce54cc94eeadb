"""``manifest.json``: who made a run directory, from what, under which circumstances, and how it ended.

The circumstances are what bits can depend on beside the settings: another number of threads adds in another order,
another processor has other kernels. ``saq rerun`` restores those it can, and names the others.
"""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from saqcli import distributed
from saqcli.machine import cores, cpu_name, resolve_device


def _below_artifacts(name: str) -> str:
    """A name that a manifest from elsewhere may give a file, which is then opened."""
    if not re.fullmatch(r"artifacts(/[^/\\\0]+)+", name) or not {".", ".."}.isdisjoint(name.split("/")):
        raise ValueError("an artifact is a relative path below artifacts/, without '..'")
    return name


class Circumstances(BaseModel):
    """Where and how a process computed.

    Attributes:
        directory: that relative paths refer to.
        device: that computed, with the name of a GPU.
        cpu: name of the processor.
        instructions: the widest that PyTorch's kernels use, such as ``AVX512``.
        cores: logical processors that the process could use; the default number of reading processes follows it.
        threads: that PyTorch computed with.
        processes: that worked as one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str
    device: str
    cpu: str
    instructions: str
    cores: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1, le=1024)]
    processes: Annotated[int, Field(ge=1)]


class RunManifest(BaseModel):
    """Who made this run directory, from what, and how it ended. This is ``manifest.json``.

    Attributes:
        command: as typed.
        verb: the command of saq.
        status: ``running`` also after a crash; ``clearing`` while the files of the run before are removed.
        started: UTC.
        versions: of saq and of what its numbers depend on.
        circumstances: under which it was made: one, and another for each time that it was resumed under others;
            empty in manifests of earlier versions.
        images: a line for each split, and for those of a proxy beside it, which says what images it holds (see
            ``fingerprints.py``).
        class_order: what decided which class a folder is: ``timm``, ``torchvision``, ``imagenet``, a file's name.
        artifacts: relative path to SHA-256.
        results: the figures that ``saq quantize`` printed.
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


def circumstances(device: str) -> Circumstances:
    """Those of this process, which computes on ``device``, as the setting names it."""
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
