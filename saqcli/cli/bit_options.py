"""Options that say to how many bits a network goes, and by which quantizers."""

from pathlib import Path
from typing import Annotated

import typer

BITS = "Bits"

Bits = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="The same bits in every layer but the first and the last, which keep 8: `4`, or `w4a8` for weights and "
        "inputs.",
        rich_help_panel=BITS,
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|RUN",
        help="Bits of every layer: a policy.json, or a run that holds one.",
        rich_help_panel=BITS,
    ),
]
Candidates = Annotated[
    str | None,
    typer.Option(
        metavar="2,3,4",
        help="Bit-widths that a layer may have [default: 2,3,4,5,6,8]",
        rich_help_panel=BITS,
    ),
]
ActivationCandidates = Annotated[
    str | None,
    typer.Option(
        metavar="4,8",
        help="Bit-widths that the inputs of a layer may have, chosen apart from those of its weights [default: always "
        "those of the weights]",
        rich_help_panel=BITS,
    ),
]
Bops = Annotated[
    str | None,
    typer.Option(
        "--bops",
        "--budget",
        metavar="BUDGET",
        help="Budget of bit-operations for one image: `34G`, `500M`, or `w4a4` for what 4 bits everywhere cost.",
        rich_help_panel=BITS,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="BUDGET",
        help="Budget of bytes: `5MB`, `4MiB`, or `w4a4` for the size at 4 bits everywhere; alone or beside --bops.",
        rich_help_panel=BITS,
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=BITS",
        help="Bits of the layers that match a pattern: `'layer4.*=8'`, `'*.conv1=3-6'`, `'fc=w8a4'`. May be repeated.",
        rich_help_panel=BITS,
    ),
]
SearcherName = Annotated[
    str | None,
    typer.Option(
        "--searcher",
        metavar="NAME",
        help="How bits are found under a budget: samq, asga, hawq, sensitivity, random, error or uniform "
        "[default: error]",
        rich_help_panel=BITS,
    ),
]
WeightGrid = Annotated[
    str | None,
    typer.Option(
        metavar="auto|paper|zero",
        help="Levels of the weights: the paper's (none at zero), with one at zero, or auto: the paper's up to 7 bits, "
        "INT8 at 8 [default: auto]",
        rich_help_panel=BITS,
    ),
]
QuantizerName = Annotated[
    str | None,
    typer.Option(
        "--quantizer",
        metavar="NAME",
        help="Quantizers of weights and inputs: clip, lsq, lsq_plus, pact or dorefa [default: clip]",
        rich_help_panel=BITS,
    ),
]
Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="channel|tensor",
        help="Levels of a weight: for each output channel, or for the whole tensor [default: channel]",
        rich_help_panel=BITS,
    ),
]
WeightNorm = Annotated[
    bool | None,
    typer.Option(
        "--weight-norm/--no-weight-norm",
        help="Standardize the weights of convolutions before they are quantized; quantizer clip only [default: "
        "--no-weight-norm]",
        rich_help_panel=BITS,
    ),
]
QuantizeAttention = Annotated[
    bool | None,
    typer.Option(
        "--quantize-attention/--no-quantize-attention",
        help="Quantize the products of attention too (queries, keys, probabilities, values), and count them [default: "
        "--no-quantize-attention]",
        rich_help_panel=BITS,
    ),
]
CorrectBias = Annotated[
    bool | None,
    typer.Option(
        "--correct-bias/--no-correct-bias",
        help="Bias correction: restore each layer's float output mean after calibration [default: --no-correct-bias]",
        rich_help_panel=BITS,
    ),
]
RecalibrateBN = Annotated[
    bool | None,
    typer.Option(
        "--recalibrate-bn/--no-recalibrate-bn",
        help="Adapt batch-norm statistics to the quantized layers after calibration [default: --recalibrate-bn]",
        rich_help_panel=BITS,
    ),
]
