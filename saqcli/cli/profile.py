"""``saq profile``."""

from typing import Annotated

import typer

from saqcli.cli import options as o
from saqcli.cli.console import print_json, progress_for, reporting
from saqcli.config import QuantizationSection


@reporting
@o.with_settings(
    *("quantization.bits", "quantization.policy", "quantization.candidates"),
    "quantization.quantize_attention",
    *("model.weights", "model.weights_key"),
    o.adapted(
        "model.pretrained",
        help="Load the published weights; no cost depends on them",
        default="--no-pretrained",
    ),
    *("model.num_classes", "model.in_chans", "model.input_size", "model.kwargs"),
)
def profile_command(
    given: o.Given,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model name (see `saq models`), or a run directory, .safetensors or .onnx file, whose bits are "
            "known",
        ),
    ],
    builder: o.Builder = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compute MACs, bit-operations and size of a network at given bits or of a run, and the reachable budgets.

    No data is needed.

    Example: `saq profile resnet18 --bits 4`

    Example: `saq profile runs/resnet18-34g`
    """
    from saqcli.pipelines.profile import check_profile, profile

    section, bits, policy = (
        given.model(target),
        given.get("quantization.bits"),
        given.path("quantization.policy"),
    )
    attention = given.get("quantization.quantize_attention", False)
    if given.problems.errors:
        given.problems.attempt(check_profile, section, bits, policy, attention, builder)
    given.problems.check()
    result = profile(
        section,
        bits=bits,
        policy=policy,
        candidates=given.get("quantization.candidates", QuantizationSection().candidates),
        progress=progress_for(json_output=json_output, quiet=quiet),
        quantize_attention=attention,
        pretrained=section.pretrained if "model.pretrained" in given else False,
        builder=builder,
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_profile

    show_profile(result)
