"""``saq export``."""

from pathlib import Path
from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import Problems


@reporting
def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a model.safetensors.")],
    onnx: Annotated[Path, typer.Option("--onnx", metavar="FILE", help="The file to write.")],
    style: Annotated[
        str,
        typer.Option(
            metavar="STYLE",
            help="How quantizers are written: qdq (read by most runtimes), qdq-vnni (with INT8 weights: faster, wrong "
            "on x86 without VNNI), exact (equal to PyTorch bit for bit), trt (INT8 without zero points) or qonnx "
            "(IntQuant nodes).",
        ),
    ] = "qdq",
    data: o.Data = None,
    batch_size: o.EvalBatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    class_order: o.ClassOrder = None,
    class_map: o.ClassMap = None,
    exif_transpose: o.ExifTranspose = None,
    verify_images: o.VerifyImages = None,
    verify: Annotated[
        list[str] | None,
        typer.Option(
            "--verify", metavar="RUNTIME", help="Verify with another runtime too: openvino. May be repeated."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Write a quantized model as ONNX. The file appears under its name only if it passes a comparison with the model.

    Example: `saq export runs/resnet18-w4a4 --onnx resnet18.onnx --data imagenet`
    """
    from saqcli.pipelines.export import check_export, export

    problems = Problems()
    images = o.data_section(
        problems,
        path=data,
        eval_batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        class_order=class_order,
        class_map=class_map,
        exif_transpose=exif_transpose,
        verify_images=problems.attempt(o.parse_count_or_all, verify_images, "--verify-images"),
    )
    if problems.errors:
        problems.attempt(check_export, run, onnx, style, images, tuple(verify or ()))
    problems.check()
    result = export(
        run,
        onnx,
        style=style,
        data=images,
        overwrite=overwrite,
        progress=progress_for(json_output=json_output, quiet=quiet),
        runtimes=tuple(verify or ()),
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_export

    show_export(result)
