"""Options of ``saq quantize`` that say how it trains."""

from collections.abc import Container
from typing import Annotated, Any

import typer

from saqcli.cli.options import TRAINING

EFFICIENCY = "Training efficiency"
REGULARIZATION = "Regularization"

# What --efficient stands for; docs/reproduction.md has the measurements that chose it.
EFFICIENT: dict[str, Any] = {"ascent_fraction": 0.25}

Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Training method: saq, asaq (adaptive radius), sam, case1, or qat (no perturbation) [default: saq]",
        rich_help_panel=TRAINING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Epochs of fine-tuning; 0 calibrates only [default: 3]",
        rich_help_panel=TRAINING,
    ),
]
Optimizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Optimizer by timm's name: sgd (Nesterov), adamw, ... [default: sgd]",
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="RATE", help="Learning rate [default: 0.005]", rich_help_panel=TRAINING),
]
Rho = Annotated[
    float | None,
    typer.Option(
        metavar="RADIUS",
        help="Radius of the perturbation [default: the paper's for the bits and the size of the images]",
        rich_help_panel=TRAINING,
    ),
]
RhoUnit = Annotated[
    str | None,
    typer.Option(
        metavar="deviation|absolute",
        help="Unit of --rho: standard deviations of each layer's weights, or none [default: deviation]",
        rich_help_panel=TRAINING,
    ),
]
SharpnessBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Images that share one perturbation [default: 128]",
        rich_help_panel=TRAINING,
    ),
]
Efficient = Annotated[
    bool,
    typer.Option(
        "--efficient",
        help="The cheap strategy that measured best: `--ascent-fraction 0.25`.",
        rich_help_panel=EFFICIENCY,
    ),
]
SamInterval = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Perturb at every N-th step, with plain steps in between [default: 1]",
        rich_help_panel=EFFICIENCY,
    ),
]
SamReuse = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SHARE",
        help="Share of the last perturbation's effect that plain steps reuse [default: 0]",
        rich_help_panel=EFFICIENCY,
    ),
]
AscentFraction = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the images that find the perturbation, above 0 up to 1 [default: 1]",
        rich_help_panel=EFFICIENCY,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16",
        help="Precision of the forward pass; quantizers stay in float32 [default: float32]",
        rich_help_panel=EFFICIENCY,
    ),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Most images in one forward pass; gradients accumulate [default: all that share a perturbation]",
        rich_help_panel=EFFICIENCY,
    ),
]
ClipGrad = Annotated[
    float | None,
    typer.Option(
        metavar="NORM",
        help="Largest norm of all gradients together [default: no limit]",
        rich_help_panel=REGULARIZATION,
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(
        "--ema",
        metavar="DECAY",
        help="Decay of the moving average of the weights, 0 to below 1; the average is evaluated and kept [default: 0]",
        rich_help_panel=REGULARIZATION,
    ),
]
LabelSmoothing = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Label smoothing, 0 to below 1 [default: 0]",
        rich_help_panel=REGULARIZATION,
    ),
]
Mixup = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="ALPHA", help="Alpha of mixup, 0 for none [default: 0]", rich_help_panel=REGULARIZATION
    ),
]
Cutmix = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="ALPHA",
        help="Alpha of cutmix, 0 for none [default: 0]",
        rich_help_panel=REGULARIZATION,
    ),
]
Distill = Annotated[
    bool | None,
    typer.Option(
        "--distill", help="Learn from the answers of the float model too.", rich_help_panel=REGULARIZATION
    ),
]


def training_settings(*, efficient: bool, assigned: Container[str], **options: Any) -> dict[str, Any]:
    """The given ones as keys of the configuration's ``training`` section; None where not given.

    Args:
        efficient: of ``EFFICIENT``, whatever was not given otherwise.
        assigned: keys that ``--set`` gives.
        options: setting to value.
    """
    given = {f"training.{name}": value for name, value in options.items()}
    for name, value in EFFICIENT.items() if efficient else ():
        key = f"training.{name}"
        if given[key] is None and key not in assigned:
            given[key] = value
    return given
