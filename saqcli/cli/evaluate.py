"""``saq eval``."""

from typing import TYPE_CHECKING, Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.screen import print_json, progress_for, reporting
from saqcli.errors import ConfigError, Problems

if TYPE_CHECKING:
    from saqcli.workflows.bench import BenchSettings


@reporting
def eval_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A model name, a run directory, a .safetensors or an .onnx file."
        ),
    ],
    data: o.Data = None,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    batch_size: o.EvalBatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    class_order: o.ClassOrder = None,
    class_map: o.ClassMap = None,
    exif_transpose: o.ExifTranspose = None,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="Measure latency and throughput on the CPU, in PyTorch and ONNX Runtime, float and quantized; "
            "needs no --data.",
            rich_help_panel=o.BENCH,
        ),
    ] = False,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="1,8", help="Batch sizes that --bench measures [default: 1,8]", rich_help_panel=o.BENCH
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="1,2",
            help="Numbers of threads that --bench measures [default: as many as PyTorch uses]",
            rich_help_panel=o.BENCH,
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Timed runs of every case of --bench [default: 20]",
            rich_help_panel=o.BENCH,
        ),
    ] = None,
    device: o.Device = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Accuracy of a float model, a quantized run or an exported file on a folder of images.

    With `--bench` also its speed, beside that of the same network in PyTorch and in ONNX Runtime, float and quantized.

    Example: `saq eval runs/resnet18-w4a4 --data imagenet`

    Example: `saq eval runs/resnet18-w4a4 --bench --batch-sizes 1,8 --threads 1,2`
    """
    problems = Problems()
    settings = problems.attempt(_bench_settings, bench, batch_sizes, threads, repeats)
    if bench and data is None and batch_size is not None:
        problems.add(ConfigError("--batch-size is for the images of --data: give --batch-sizes for --bench"))
    if bench and device not in (None, "auto", "cpu"):
        problems.add(ConfigError(f"--device {device}: --bench measures the CPU, remove --device or --bench"))
    from saqcli.workflows.evaluate import check_evaluation, evaluate_target

    section = o.model_section(
        problems,
        target,
        weights=weights,
        weights_key=weights_key,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=mean,
        std=std,
    )
    images = o.data_section(
        problems,
        path=data,
        eval_batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        class_order=class_order,
        class_map=class_map,
        exif_transpose=exif_transpose,
    )
    if problems.errors:
        problems.attempt(check_evaluation, target, section, images, device or "auto", needs_images=not bench)
    problems.check()
    result = evaluate_target(
        target,
        section,
        images,
        device=device or "auto",
        progress=progress_for(json_output=json_output, quiet=quiet),
        bench=settings,
    ).to_dict()
    if json_output:
        print_json(result)
        return
    if result["images"] is not None:
        from saqcli.cli.tables import show_evaluation

        show_evaluation(result)
    if result["bench"] is not None:
        from saqcli.cli.bench_view import show_bench

        show_bench(result["bench"])


def _bench_settings(
    bench: bool, batch_sizes: str | None, threads: str | None, repeats: int | None
) -> "BenchSettings | None":
    """What ``--bench`` measures; None without it.

    Raises:
        ConfigError: an option of it without it, or one that is no list of numbers.
    """
    options = {"--batch-sizes": batch_sizes, "--threads": threads, "--repeats": repeats}
    for option, value in options.items():
        if value is not None and not bench:
            raise ConfigError(f"{option} says what --bench measures: give --bench with it")
    if not bench:
        return None
    found = {
        "batch_sizes": o.parse_counts(batch_sizes, "--batch-sizes"),
        "threads": o.parse_counts(threads, "--threads"),
        "repeats": repeats,
    }
    from saqcli.workflows.bench import BenchSettings

    return BenchSettings(**o.given(found))
