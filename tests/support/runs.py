"""Run directories without a model: what commands on runs find, made in milliseconds."""

import os
from pathlib import Path
from typing import Any

from saqcli.config import RunConfig, resolve
from saqcli.runs.directory import RunDirectory


def make_run(
    where: str,
    *,
    age: int,
    model: bool = True,
    finished: bool = True,
    verb: str = "quantize",
    results: dict[str, Any] | None = None,
    **data: str,
) -> Path:
    """A run that was last written to ``age`` minutes ago."""
    config: RunConfig = resolve(
        options={"model.name": "resnet18", "quantization.bits": "4"}
        | {f"data.{key}": value for key, value in data.items()}
    )
    run = RunDirectory.start(Path(where), config, resume=False, overwrite=False, verb=verb)
    with run.recorded():
        if model:
            run.safetensors_path.parent.mkdir(exist_ok=True)
            run.safetensors_path.write_bytes(b"")
        if finished:
            run.finish(results or {})
    manifest = run.path / "manifest.json"
    then = manifest.stat().st_mtime - 60 * age
    os.utime(manifest, (then, then))
    return run.path
