"""``saq eval``."""

from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.screen import print_json, progress_for, reporting


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
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    mean: o.Mean = None,
    std: o.Std = None,
    model_kwargs: o.ModelKwargs = None,
    batch_size: o.BatchSize = None,
    workers: o.Workers = None,
    bad_images: o.BadImages = None,
    device: o.Device = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Accuracy on a folder of images: of a float model, a quantized run, or an exported file.

    Example: `saq eval runs/resnet18-w4a4 --data imagenet`
    """
    from saqcli.workflows.evaluate import evaluate_target

    section = o.model_section(
        target,
        weights=weights,
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=mean,
        std=std,
    )
    images = o.data_section(path=data, eval_batch_size=batch_size, workers=workers, bad_images=bad_images)
    result = evaluate_target(
        target,
        section,
        images,
        device=device or "auto",
        progress=progress_for(json_output=json_output, quiet=quiet),
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_evaluation

    show_evaluation(result)
