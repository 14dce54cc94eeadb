"""A cache for the trial export before a run, per network and style."""

import sys
from typing import Any

BITS = set(
    "bits bops size max_drop min_top1 cost policy searcher candidates activation_candidates pins".split()
)


def tried_once() -> None:
    """Skip trial exports that have already passed with the same network and settings, at whatever bits.

    A network of the user's own is tried every time, since another one may have the same name.
    """
    calibration: Any = sys.modules.get("saqcli.pipelines.calibration")
    if calibration is None or hasattr(calibration._try_export, "passed"):
        return
    from saqcli.models.networks import NETWORKS

    trial = calibration._try_export

    def once(style: str, config: Any, network: Any) -> None:
        family, _, name = config.model.name.partition("/")
        entry = NETWORKS.get(name)  # a test may have replaced it
        settings = config.quantization.model_dump_json(exclude=BITS)
        key = (style, config.model.model_dump_json(), settings, id(entry))
        if (family != "timm" and entry is None) or key not in once.passed:  # type: ignore[attr-defined]
            trial(style, config, network)
            once.passed[key] = entry  # type: ignore[attr-defined]

    once.passed = {}  # type: ignore[attr-defined]
    calibration._try_export = once
