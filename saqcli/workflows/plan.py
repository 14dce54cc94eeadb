"""``saq quantize --dry-run`` and ``saq search --dry-run``: what a run would cost, before it takes any time."""

from pathlib import Path
from typing import Any

from saqcli.config import RunConfig
from saqcli.progress import Progress
from saqcli.quant.cost import Budget
from saqcli.workflows.bits import budget_of, float_policy, given_policy, space_of
from saqcli.workflows.profile import measure
from saqcli.workflows.quantize import check
from saqcli.workflows.setup import load_float, wrap_and_trace


def plan(config: RunConfig, run_dir: Path, progress: Progress) -> dict[str, Any]:
    """The resolved configuration and the profile of the network; under a budget at float bits, since nothing
    is searched.

    Raises:
        SaqError: what would stop the run at once: an unknown model, a policy that does not fit, a budget that
            nothing meets.
    """
    check(config)
    section = config.quantization
    loaded = load_float(config.model.model_copy(update={"pretrained": False}), progress)
    network = wrap_and_trace(loaded, quantize_attention=section.quantize_attention)
    policy, space = given_policy(section, network), space_of(section, network)
    budget = Budget()
    if policy is None:
        budget = budget_of(section, network)
        space.check_reachable(budget)
        policy = float_policy(network)
    return {
        "run_dir": str(run_dir),
        "config": config.model_dump(mode="json"),
        "budget_bops": budget.bops,
        "budget_bytes": budget.size,
        "profile": measure(network, policy, space).to_dict(),
    }
