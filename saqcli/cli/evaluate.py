"""``saq eval``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli.completion import complete_source
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.cli.help import SPEED
from saqcli.errors import ConfigError

if TYPE_CHECKING:
    from saqcli.pipelines.bench import BenchSettings


@reporting
@o.with_settings(*o.IMAGES, *o.FLOAT_MODEL, "run.device")
def eval_command(
    given: o.Given,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            autocompletion=complete_source,
            help=f"A model name, a run directory, a .safetensors or an .onnx file; {r.LEFT_OUT}",
        ),
    ] = None,
    bench: Annotated[
        bool,
        typer.Option(
            "--bench",
            help="Measure latency and throughput on the CPU, in PyTorch and ONNX Runtime, float and quantized; "
            "--data is optional",
            rich_help_panel=SPEED,
        ),
    ] = False,
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="1,8", help="Batch sizes that --bench measures [default: 1,8]", rich_help_panel=SPEED
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="1,2",
            help="Numbers of threads that --bench measures [default: as many as PyTorch uses]",
            rich_help_panel=SPEED,
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Timed runs of every case of --bench [default: 20]",
            rich_help_panel=SPEED,
        ),
    ] = None,
    memory_format: Annotated[
        str,
        typer.Option(
            metavar="auto|contiguous|channels_last",
            autocompletion=lambda: ["auto", "contiguous", "channels_last"],
            help="Memory format of convolutions. channels_last is faster on most CPUs and changes the last bits of "
            "logits; auto uses it on a CPU for images of more than 64 pixels",
            rich_help_panel=SPEED,
        ),
    ] = "auto",
    builder: o.Builder = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure the accuracy of a float model, a quantized run or an exported file on a folder of images.

    With `--bench`, compare its speed with that of the same network in PyTorch and ONNX Runtime, float and quantized.

    Example: `saq eval`

    Example: `saq eval runs/resnet18-w4a4 --data imagenet`

    Example: `saq eval runs/resnet18-w4a4 --bench --batch-sizes 1,8 --threads 1,2`
    """
    source = r.chosen_run(source, "a model", models=True, json_output=json_output, quiet=quiet)
    problems, device = given.problems, given.get("run.device", "auto")
    settings = problems.attempt(_bench_settings, bench, batch_sizes, threads, repeats)
    if bench and "data.path" not in given and "data.eval_batch_size" in given:
        problems.add(
            ConfigError("--batch-size applies to the images of --data: use --batch-sizes for --bench")
        )
    if bench and device not in ("auto", "cpu"):
        problems.add(ConfigError(f"--device {device}: --bench runs on the CPU, remove --device or --bench"))
    from saqcli.pipelines.evaluate import check_evaluation, evaluate_source

    section = given.model(source)
    quick = bench and "data.path" not in given  # the benchmark alone
    images = given.data() if quick else r.images_for(given, source, json_output=json_output, quiet=quiet)
    if problems.errors:
        problems.attempt(
            check_evaluation, source, section, images, device, builder, memory_format, needs_images=not bench
        )
    problems.check()
    result = evaluate_source(
        source,
        section,
        images,
        device=device,
        progress=progress_for(json_output=json_output, quiet=quiet),
        bench=settings,
        builder=builder,
        memory_format=memory_format,
    ).to_dict()
    if json_output:
        print_json(result)
        return
    if result["images"] is not None:
        from saqcli.cli.screens.tables import show_evaluation

        show_evaluation(result)
    if result["bench"] is not None:
        from saqcli.cli.screens.readings import show_bench

        show_bench(result["bench"])


def _bench_settings(
    bench: bool, batch_sizes: str | None, threads: str | None, repeats: int | None
) -> "BenchSettings | None":
    """The settings of ``--bench``; None without it.

    Raises:
        ConfigError: one of its options without ``--bench``, or an invalid list of numbers.
    """
    options = {"--batch-sizes": batch_sizes, "--threads": threads, "--repeats": repeats}
    for option, value in options.items():
        if value is not None and not bench:
            raise ConfigError(f"{option} requires --bench: add it")
    if not bench:
        return None
    counts = {"batch_sizes": batch_sizes, "threads": threads}
    found: dict[str, Any] = {
        name: o.parse_counts(text, name) for name, text in counts.items() if text is not None
    }
    found |= {} if repeats is None else {"repeats": repeats}
    from saqcli.pipelines.bench import BenchSettings

    return BenchSettings(**found)
