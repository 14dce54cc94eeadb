"""``saq profile``."""

from typing import Annotated

import typer

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.errors import Problems


@reporting
def profile_command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model name (see `saq models`), or a run directory, .safetensors or .onnx file, which have bits of "
            "their own.",
        ),
    ],
    bits: b.Bits = None,
    policy: b.Policy = None,
    candidates: b.Candidates = None,
    weights: o.Weights = None,
    weights_key: o.WeightsKey = None,
    pretrained: Annotated[
        bool | None,
        typer.Option(
            "--pretrained/--no-pretrained",
            help="Load the published weights, on which no cost depends [default: --no-pretrained]",
            rich_help_panel=o.MODEL,
        ),
    ] = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    model_kwargs: o.ModelKwargs = None,
    quantize_attention: b.QuantizeAttention = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """MACs, bit-operations and size of a network at given bits or of a run, and the budgets that it can reach.

    Needs no data.

    Example: `saq profile resnet18 --bits 4`

    Example: `saq profile runs/resnet18-34g`
    """
    from saqcli.config import QuantizationSection
    from saqcli.pipelines.profile import check_profile, profile

    problems = Problems()
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
        mean=None,
        std=None,
    )
    widths = o.parse_widths(problems, candidates) or QuantizationSection().candidates
    if problems.errors:
        problems.attempt(check_profile, section, bits, policy, bool(quantize_attention))
    problems.check()
    result = profile(
        section,
        bits=bits,
        policy=policy,
        candidates=widths,
        progress=progress_for(json_output=json_output, quiet=quiet),
        quantize_attention=bool(quantize_attention),
        pretrained=bool(pretrained),
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_profile

    show_profile(result)
