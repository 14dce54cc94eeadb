"""``saq quantize``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli import run_options as r
from saqcli.cli import training_options as t
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import Problems

if TYPE_CHECKING:
    from saqcli.config import RunConfig


@reporting
def quantize_command(
    model: o.OptionalModel = None,
    data: o.Data = None,
    bops: b.Bops = None,
    size: b.Size = None,
    bits: b.Bits = None,
    policy: b.Policy = None,
    searcher: b.SearcherName = None,
    candidates: b.Candidates = None,
    activation_candidates: b.ActivationCandidates = None,
    pin: b.Pin = None,
    quantizer: b.QuantizerName = None,
    weight_grid: b.WeightGrid = None,
    granularity: b.Granularity = None,
    weight_norm: b.WeightNorm = None,
    quantize_attention: b.QuantizeAttention = None,
    correct_bias: b.CorrectBias = None,
    recalibrate_bn: b.RecalibrateBN = None,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    new_head: o.NewHead = None,
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
    verify_images: o.VerifyImages = None,
    bad_images: o.BadImages = None,
    class_order: o.ClassOrder = None,
    class_map: o.ClassMap = None,
    exif_transpose: o.ExifTranspose = None,
    export: r.Export = None,
    style: r.Style = None,
    recipe: r.Recipe = None,
    config: r.Config = None,
    assign: r.Assign = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Run directory to write [default: runs/NAME-BITS]", rich_help_panel=o.RUN
        ),
    ] = None,
    resume: r.Resume = False,
    overwrite: r.Overwrite = False,
    seed: r.Seed = None,
    device: o.Device = None,
    deterministic: r.Deterministic = None,
    dry_run: r.DryRun = False,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Quantize a pretrained network to given bits or under a budget, fine-tune it, export it, and check the
    result.

    Example: `saq quantize resnet18 --bops 34G --data imagenet`
    """
    problems = Problems()
    named = o.model_options(
        problems,
        weights=weights,
        weights_key=weights_key,
        pretrained=pretrained,
        num_classes=num_classes,
        new_head=new_head,
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
        "data.class_order": class_order,
        "data.class_map": class_map,
        "data.exif_transpose": exif_transpose,
        "data.verify_images": problems.attempt(o.parse_count_or_all, verify_images, "--verify-images"),
        "quantization.bits": bits,
        "quantization.bops": bops,
        "quantization.size": size,
        "quantization.policy": None if policy is None else str(policy),
        "quantization.searcher": searcher,
        "quantization.candidates": o.parse_widths(problems, candidates),
        "quantization.activation_candidates": o.parse_widths(
            problems, activation_candidates, "--activation-candidates"
        ),
        "quantization.pins": problems.attempt(o.parse_pins, pin),
        "quantization.quantizer": quantizer,
        "quantization.weight_grid": weight_grid,
        "quantization.granularity": granularity,
        "quantization.weight_normalization": weight_norm,
        "quantization.quantize_attention": quantize_attention,
        "quantization.correct_bias": correct_bias,
        "quantization.recalibrate_bn": recalibrate_bn,
        "export.styles": r.export_styles(export=export, styles=style),
        "run.seed": seed,
        "run.device": device,
        "run.deterministic": deterministic,
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
    resumed = ("quantize", run_dir) if resume and run_dir else None
    check = partial(_check, dry_run=dry_run)
    resolved = r.resolved(problems, recipe, config, assign or [], given, resumed, check)
    target = run_dir or r.default_run_dir(resolved)
    progress = progress_for(json_output=json_output, quiet=quiet)
    if dry_run:
        r.dry_run(
            resolved,
            target,
            "quantize",
            resume=resume,
            overwrite=overwrite,
            json_output=json_output,
            quiet=quiet,
        )
        return
    from saqcli.pipelines.quantize import quantize

    result = quantize(resolved, target, resume=resume, overwrite=overwrite, progress=progress).to_dict(target)
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_quantized

    show_quantized(result)


def _check(config: "RunConfig", *, dry_run: bool) -> None:
    from saqcli.pipelines.checks import check_quantize

    check_quantize(config, images=not dry_run)
