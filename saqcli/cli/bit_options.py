"""Options that say to how many bits a network goes, and by which quantizers."""

from pathlib import Path
from typing import Annotated

import typer

BITS = "Bits"

Bits = Annotated[
    str | None, typer.Option(help="The same bits in every layer: 4, or w4a8.", rich_help_panel=BITS)
]
Policy = Annotated[
    Path | None, typer.Option(help="Bits of every layer, as a policy.json.", rich_help_panel=BITS)
]
Candidates = Annotated[
    str | None,
    typer.Option(
        metavar="2,3,4",
        help="Bit-widths that a layer may have; by default 2,3,4,5,6,8.",
        rich_help_panel=BITS,
    ),
]
ActivationCandidates = Annotated[
    str | None,
    typer.Option(
        metavar="4,8",
        help="Bit-widths of inputs, if they are to be chosen apart from weights.",
        rich_help_panel=BITS,
    ),
]
Bops = Annotated[
    str | None,
    typer.Option(
        "--bops",
        "--budget",
        help="Budget of bit-operations: 34G, 500M, or w4a4 for its cost.",
        rich_help_panel=BITS,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Budget of bytes: 5MB, or w4a4 for its size; alone or with --bops.", rich_help_panel=BITS
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=BITS",
        help="Bits of the layers that a pattern matches: 'layer4.*=8', '*.conv1=3-6', 'fc=w8a4'. May be repeated.",
        rich_help_panel=BITS,
    ),
]
SearcherName = Annotated[
    str | None,
    typer.Option(
        "--searcher",
        help="How bits are found under a budget: samq, asga, hawq, sensitivity, random, error or uniform.",
        rich_help_panel=BITS,
    ),
]
WeightGrid = Annotated[
    str | None,
    typer.Option(metavar="auto|paper|zero", help="Levels of the weights.", rich_help_panel=BITS),
]
QuantizerName = Annotated[
    str | None,
    typer.Option("--quantizer", help="clip, lsq, lsq_plus, pact or dorefa.", rich_help_panel=BITS),
]
Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="channel|tensor",
        help="Levels for every output channel of a weight, or for all of it.",
        rich_help_panel=BITS,
    ),
]
WeightNorm = Annotated[
    bool | None,
    typer.Option(
        "--weight-norm/--no-weight-norm",
        help="Quantize convolutions in deviations from the mean weight.",
        rich_help_panel=BITS,
    ),
]
QuantizeAttention = Annotated[
    bool | None,
    typer.Option(
        "--quantize-attention/--no-quantize-attention",
        help="Quantize and count the products of attention too: queries, keys, probabilities, values.",
        rich_help_panel=BITS,
    ),
]
CorrectBias = Annotated[
    bool | None,
    typer.Option(
        "--correct-bias/--no-correct-bias",
        help="After calibration, give every layer's output its float mean again.",
        rich_help_panel=BITS,
    ),
]
RecalibrateBN = Annotated[
    bool | None,
    typer.Option(
        "--recalibrate-bn/--no-recalibrate-bn",
        help="After calibration, move batch-norm statistics by what quantization moved.",
        rich_help_panel=BITS,
    ),
]
