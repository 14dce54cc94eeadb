"""Options of ``saq quantize`` that say how it trains."""

from collections.abc import Container
from typing import Annotated, Any

import typer

from saqcli.cli.options import TRAINING

EFFICIENCY = "Training, cheaper"
REGULARIZATION = "Training, further"

# What --efficient stands for; docs/reproduction.md has the measurements that chose it.
EFFICIENT: dict[str, Any] = {"ascent_fraction": 0.25}

Method = Annotated[
    str | None,
    typer.Option(help="saq, asaq (adaptive), sam, case1, or qat (plain).", rich_help_panel=TRAINING),
]
Epochs = Annotated[
    int | None, typer.Option(min=0, help="Of fine-tuning; 0 calibrates only.", rich_help_panel=TRAINING)
]
Optimizer = Annotated[
    str | None, typer.Option(help="timm's name of one: sgd (Nesterov), adamw, ...", rich_help_panel=TRAINING)
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate.", rich_help_panel=TRAINING)]
Rho = Annotated[
    float | None,
    typer.Option(
        help="Radius of the perturbation, in deviations of each layer's weights.", rich_help_panel=TRAINING
    ),
]
RhoUnit = Annotated[
    str | None,
    typer.Option(metavar="deviation|absolute", help="Unit of --rho.", rich_help_panel=TRAINING),
]
SharpnessBatch = Annotated[
    int | None, typer.Option(min=1, help="Images that share one perturbation.", rich_help_panel=TRAINING)
]
Efficient = Annotated[
    bool,
    typer.Option(
        "--efficient",
        help="The cheap strategy that measured best: --ascent-fraction 0.25.",
        rich_help_panel=EFFICIENCY,
    ),
]
SamInterval = Annotated[
    int | None,
    typer.Option(min=1, help="Perturb at every N-th step; plain steps between.", rich_help_panel=EFFICIENCY),
]
SamReuse = Annotated[
    float | None,
    typer.Option(
        min=0, help="Share of the last perturbation's effect in the plain steps.", rich_help_panel=EFFICIENCY
    ),
]
AscentFraction = Annotated[
    float | None,
    typer.Option(
        help="Share of the images that find the perturbation.",
        rich_help_panel=EFFICIENCY,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(metavar="float32|bfloat16", help="Of the forward pass.", rich_help_panel=EFFICIENCY),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Images in one forward pass; gradients accumulate.", rich_help_panel=EFFICIENCY),
]
ClipGrad = Annotated[
    float | None, typer.Option(help="Largest norm of the gradients.", rich_help_panel=REGULARIZATION)
]
Ema = Annotated[
    float | None,
    typer.Option(
        "--ema", help="Decay of averaged weights, which are kept in the end.", rich_help_panel=REGULARIZATION
    ),
]
LabelSmoothing = Annotated[
    float | None, typer.Option(help="From 0 to below 1.", rich_help_panel=REGULARIZATION)
]
Mixup = Annotated[float | None, typer.Option(min=0, help="Alpha of mixup.", rich_help_panel=REGULARIZATION)]
Cutmix = Annotated[float | None, typer.Option(min=0, help="Alpha of cutmix.", rich_help_panel=REGULARIZATION)]
Distill = Annotated[
    bool | None,
    typer.Option("--distill", help="Learn from the float model too.", rich_help_panel=REGULARIZATION),
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
