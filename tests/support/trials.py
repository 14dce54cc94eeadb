"""A cache for the trial export before a run, per network and style."""

import sys
from typing import Any


def tried_once() -> None:
    """Skip trial exports that have already passed."""
    exporting: Any = sys.modules.get("saqcli.pipelines.export")
    if exporting is None or not hasattr(exporting, "_try_export") or hasattr(exporting._try_export, "passed"):
        return
    from saqcli.models.networks import NETWORKS

    trial = exporting._try_export

    def once(style: str, config: Any, network: Any) -> None:
        wanted = config.quantization
        entry = NETWORKS.get(config.model.name.partition("/")[2])  # a test may have replaced it
        quantizers = wanted.quantizer, wanted.weight_quantizer, wanted.activation_quantizer
        key = (style, config.model.model_dump_json(), *quantizers, wanted.weight_grid, id(entry))
        if key not in once.passed:  # type: ignore[attr-defined]
            trial(style, config, network)
            once.passed[key] = entry  # type: ignore[attr-defined]

    once.passed = {}  # type: ignore[attr-defined]
    exporting._try_export = once
