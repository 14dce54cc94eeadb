"""``saq profile``."""

from saqcli.cli import bit_options as b
from saqcli.cli import options as o
from saqcli.cli.screen import print_json, progress_for, reporting
from saqcli.errors import Problems


@reporting
def profile_command(
    model: o.Model,
    bits: b.Bits = None,
    policy: b.Policy = None,
    candidates: b.Candidates = None,
    weights: o.Weights = None,
    pretrained: o.Pretrained = None,
    num_classes: o.NumClasses = None,
    in_chans: o.InChans = None,
    input_size: o.InputSize = None,
    model_kwargs: o.ModelKwargs = None,
    quantize_attention: b.QuantizeAttention = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """MACs, bit-operations and size of a network at given bits, and the budgets it can reach. Needs no data.

    Example: `saq profile resnet18 --bits 4`
    """
    from saqcli.config import QuantizationSection
    from saqcli.workflows.profile import check_profile, profile

    problems = Problems()
    section = o.model_section(
        problems,
        model,
        weights=weights,
        pretrained=bool(pretrained) and weights is None,
        num_classes=num_classes,
        in_chans=in_chans,
        model_kwargs=model_kwargs,
        input_size=input_size,
        mean=None,
        std=None,
    )
    widths = o.parse_widths(problems, candidates) or QuantizationSection().candidates
    if problems.errors:
        problems.attempt(check_profile, section, bits, policy)
    problems.check()
    result = profile(
        section,
        bits=bits,
        policy=policy,
        candidates=widths,
        progress=progress_for(json_output=json_output, quiet=quiet),
        quantize_attention=bool(quantize_attention),
    ).to_dict()
    if json_output:
        print_json(result)
        return
    from saqcli.cli.tables import show_profile

    show_profile(result)
