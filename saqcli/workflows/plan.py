"""``saq quantize --dry-run``: what a run would cost, before it takes any time."""

from pathlib import Path
from typing import Any

from saqcli.config import RunConfig
from saqcli.progress import Progress
from saqcli.workflows.profile import measure
from saqcli.workflows.quantize import check
from saqcli.workflows.setup import explicit_policy, float_policy, load_float, parse_budget, wrap_and_trace


def plan(config: RunConfig, run_dir: Path, progress: Progress) -> dict[str, Any]:
    """The resolved configuration and the profile of the network; under a budget at float bits, since nothing
    is searched.

    Raises:
        SaqError: what would stop the run at once: an unknown model, a policy that does not fit, a budget that
            nothing meets.
    """
    check(config)
    network = wrap_and_trace(load_float(config.model.model_copy(update={"pretrained": False}), progress))
    policy = explicit_policy(config, network)
    candidates = config.quantization.candidates
    budget = None
    if policy is None:
        budget = parse_budget(config.quantization.bops or "", network)
        budget.check_reachable(network.costs, candidates, network.name)
        policy = float_policy(network)
    return {
        "run_dir": str(run_dir),
        "config": config.model_dump(mode="json"),
        "budget_bops": budget.bops if budget else None,
        "profile": measure(network, policy, candidates).to_dict(),
    }
