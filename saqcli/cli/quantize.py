"""``saq quantize``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli import options as o
from saqcli.cli import training_options as t
from saqcli.cli.screen import print_json, progress_for, reporting
from saqcli.errors import ConfigError, RunDirectoryError

if TYPE_CHECKING:
    from saqcli.config import RunConfig


@reporting
def quantize_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Network: `resnet18` (timm first, then torchvision), `timm/NAME`, `torchvision/NAME` or `saq/NAME`.",
        ),
    ] = None,
    data: o.Data = None,
    bops: Annotated[
        str | None,
        typer.Option(
            "--bops",
            "--budget",
            help="Budget of bit-operations: 34G, 500M, or w4a4 for its cost.",
            rich_help_panel=o.BITS,
        ),
    ] = None,
    bits: o.Bits = None,
    policy: o.Policy = None,
    searcher: Annotated[
        str | None,
        typer.Option(help="How bits are found under a budget: error, uniform.", rich_help_panel=o.BITS),
    ] = None,
    candidates: o.Candidates = None,
    quantizer: o.QuantizerName = None,
    weight_grid: Annotated[
        str | None,
        typer.Option(metavar="auto|paper|zero", help="Levels of the weights.", rich_help_panel=o.BITS),
    ] = None,
    granularity: o.Granularity = None,
    weight_norm: o.WeightNorm = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    method: t.Method = None,
    epochs: t.Epochs = None,
    optimizer: t.Optimizer = None,
    lr: t.LearningRate = None,
    rho: t.Rho = None,
    rho_unit: t.RhoUnit = None,
    sharpness_batch: t.SharpnessBatch = None,
    efficient: t.Efficient = False,
    sam_interval: t.SamInterval = None,
    sam_reuse: t.SamReuse = None,
    ascent_fraction: t.AscentFraction = None,
    precision: t.Precision = None,
    micro_batch: t.MicroBatch = None,
    clip_grad: t.ClipGrad = None,
    ema: t.Ema = None,
    label_smoothing: t.LabelSmoothing = None,
    mixup: t.Mixup = None,
    cutmix: t.Cutmix = None,
    distill: t.Distill = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    recipe: Annotated[str | None, typer.Option(help="Settings to start from.", rich_help_panel=o.RUN)] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML or JSON, such as the config.json of a run.", rich_help_panel=o.RUN),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=VALUE", help="Any setting; may be repeated.", rich_help_panel=o.RUN
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; by default runs/NAME-BITS.", rich_help_panel=o.RUN),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --run-dir.", rich_help_panel=o.RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --run-dir.", rich_help_panel=o.RUN)
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything random.", rich_help_panel=o.RUN)
    ] = None,
    device: o.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the settings and costs, then stop.", rich_help_panel=o.RUN)
    ] = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Quantize a pretrained network to given bits or under a budget, fine-tune it, export it, and check the
    result.

    Example: `saq quantize resnet18 --bops 34G --data imagenet`
    """
    from saqcli.quant.bits import parse_candidates

    named = o.model_options(
        weights=weights,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=mean,
        std=std,
    )
    given: dict[str, Any] = {f"model.{name}": value for name, value in named.items()} | {
        "model.name": model,
        "data.path": data,
        "data.batch_size": batch_size,
        "data.workers": workers,
        "data.bad_images": bad_images,
        "quantization.bits": bits,
        "quantization.bops": bops,
        "quantization.policy": None if policy is None else str(policy),
        "quantization.searcher": searcher,
        "quantization.candidates": parse_candidates(candidates) if candidates else None,
        "quantization.quantizer": quantizer,
        "quantization.weight_grid": weight_grid,
        "quantization.granularity": granularity,
        "quantization.weight_normalization": weight_norm,
        "run.seed": seed,
        "run.device": device,
    }
    given |= t.training_settings(
        efficient=efficient,
        assigned=[text.partition("=")[0].strip() for text in assign or []],
        method=method,
        epochs=epochs,
        optimizer=optimizer,
        lr=lr,
        rho=rho,
        rho_unit=rho_unit,
        sharpness_batch=sharpness_batch,
        sam_interval=sam_interval,
        sam_reuse=sam_reuse,
        ascent_fraction=ascent_fraction,
        precision=precision,
        micro_batch=micro_batch,
        clip_grad=clip_grad,
        ema_decay=ema,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        distill=distill,
    )
    resolved = _resolve(recipe, config, assign or [], given, run_dir if resume else None)
    target = run_dir or default_run_dir(resolved)
    progress = progress_for(json_output=json_output, quiet=quiet)
    if dry_run:
        _show_plan(resolved, target, json_output=json_output)
        return
    from saqcli.workflows.quantize import quantize

    result = quantize(resolved, target, resume=resume, overwrite=overwrite, progress=progress).to_dict(target)
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_quantized

    show_quantized(result)


def _resolve(
    recipe: str | None, config: Path | None, assign: list[str], given: dict[str, Any], resumed: Path | None
) -> "RunConfig":
    """The configuration; with ``--resume`` that of the run, on top of which the same options may be given again."""
    from saqcli.config import resolve

    pairs = {}
    for text in assign:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give SECTION.KEY=VALUE, such as training.lr=0.01")
        pairs[key.strip()] = value.strip()
    if resumed is not None and config is None:
        if (resumed / "config.json").is_file():
            config = resumed / "config.json"
        elif given["model.name"] is None:
            raise RunDirectoryError(
                f"{resumed} holds no run to go on with: give MODEL and its options to start one"
            )
    return resolve(recipe=recipe, file=config, assignments=pairs, options=given)


def default_run_dir(config: "RunConfig") -> Path:
    """``runs/resnet18-w4a4``: the network's name and what it is quantized to."""
    wanted = config.quantization
    bits = wanted.bops or wanted.bits or (Path(wanted.policy).stem if wanted.policy else "float")
    return Path("runs") / f"{config.model.name.split('/')[-1]}-{o.folder_of_bits(bits)}"


def _show_plan(config: "RunConfig", target: Path, *, json_output: bool) -> None:
    """What a run would do and cost, without doing it."""
    from saqcli.progress import SILENT
    from saqcli.workflows.plan import plan

    result = plan(config, target, SILENT)
    if json_output:
        print_json(result)
        return
    typer.echo(config.to_json().rstrip())
    from saqcli.cli.tables import show_profile

    show_profile(result["profile"])
