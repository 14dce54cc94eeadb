"""``saq eval``.

How fast a network is, as two tables: what each way to run it multiplies with, and how long that takes.
"""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.cli.tables import print_table, say
from saqcli.errors import ConfigError, Problems
from saqcli.units import counted, format_quantity

SMALLER_NOT_FASTER = (
    "Fewer than 8 bits make the file smaller, not faster, on this runtime: "
    "it has no integer kernels below 8 bits."
)


def show_bench(bench: dict[str, Any]) -> None:
    """Print what ``saq eval --bench --json`` holds under ``bench``."""
    console = Console()
    size = "x".join(map(str, bench["input_size"]))
    say(console, f"{bench['model']}, input {size}, on {bench['cpu']['name']}\n")
    print_table(console, ("", "size", "integer kernels", "float kernels"), _contenders(bench["rows"]))
    console.print()
    columns = ("", "batch", "threads", "ms a batch", "spread", "images/s", "relative")
    print_table(console, columns, _timings(bench["rows"]))
    console.print()
    say(
        console,
        f"Medians of {counted(bench['repeats'], 'run')}, in turns; spread is the interquartile range.",
    )
    say(console, f"Relative is images a second, with {bench['baseline']} as 1.")
    for note in bench["notes"]:
        say(console, f"{note[0].upper()}{note[1:]}.")
    if bench["few_bits"]:
        say(console, SMALLER_NOT_FASTER)


def _contenders(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Size and kernels, which are the same in every case."""
    return [
        [
            name,
            format_quantity(row["size_bytes"], "B"),
            *("" if row[kind] is None else str(row[kind]) for kind in ("integer_kernels", "float_kernels")),
        ]
        for name, row in {row["name"]: row for row in rows}.items()
    ]


def _timings(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row for every contender in every case, and a gap between cases."""
    milliseconds = _places(row["latency_ms"] for row in rows)
    rate = _places(row["images_per_second"] for row in rows)
    table: list[list[str]] = []
    for _, case in groupby(rows, key=lambda row: (row["threads"], row["batch_size"])):
        table += [[]] if table else []
        table += [
            [
                row["name"],
                str(row["batch_size"]),
                str(row["threads"]),
                f"{row['latency_ms']:.{milliseconds}f}",
                f"{row['spread_ms']:.{milliseconds}f}",
                f"{row['images_per_second']:.{rate}f}",
                f"{row['relative']:.2f}",
            ]
            for row in case
        ]
    return table


def _places(values: Iterable[float]) -> int:
    """Behind the point, so that the least of a column has three digits, or three places."""
    return min(max(2 - math.floor(math.log10(min(values))), 0), 3)


if TYPE_CHECKING:
    from saqcli.pipelines.bench import BenchSettings


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
    from saqcli.pipelines.evaluate import check_evaluation, evaluate_target

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
    from saqcli.pipelines.bench import BenchSettings

    return BenchSettings(**o.given(found))
