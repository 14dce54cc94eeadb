"""Dry runs of ``quantize`` and ``search``: the plan and cost of a run.

A dry run makes all checks that precede the first long step of a run, with the same functions: model, data, device, bits
or budget, training, run directory. Nothing is written, and published weights are not downloaded.
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from saqcli.api.costs import measure
from saqcli.config import ModelSection, RunConfig, names_own_network
from saqcli.data.datasets import Split
from saqcli.data.splits import Images
from saqcli.models.load import LoadedModel, default_classes, published_weights
from saqcli.pipelines.bits import (
    accuracy_bound,
    budget_of,
    figures_of,
    given_policy,
    keeps_scores,
    space_of,
    weight_error_of,
)
from saqcli.pipelines.calibration import check_exports
from saqcli.pipelines.checks import check_quantize, check_search, network_for
from saqcli.pipelines.export import onnx_names
from saqcli.pipelines.find_bits import request_search
from saqcli.pipelines.setup import Network, images_of_search, load_float, open_images, wrap_and_trace
from saqcli.pipelines.stages import planned_stages
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same_settings, should_resume
from saqcli.searchers.accuracy import ladder, most_measured
from saqcli.searchers.uniforms import largest_uniform
from saqcli.serialization import check_can_write
from saqcli.training.preflight import check_trains

PUBLISHED = "{} (published; downloaded when the run starts, unless cached)"
WRITTEN = {
    "quantize": """
        manifest.json config.json policy.json network.json answers.json metrics.jsonl report.md report.html
        checkpoints/last.ckpt artifacts/model.safetensors
    """.split(),
    "search": "manifest.json config.json policy.json search.json policy.png policy.svg report.md report.html".split(),
}
SEARCHED = ("search.json", "policy.png", "policy.svg")  # also written by a quantization under a budget
FRONT = ("pareto.json", "pareto.csv", "pareto.png", "pareto.svg")


def plan(
    config: RunConfig,
    run_dir: Path,
    progress: Progress,
    *,
    verb: str = "quantize",
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """The plan of ``saq VERB`` with ``config``.

    Args:
        config: resolved.
        run_dir: the run directory that would be written.
        progress: receives notes.
        verb: ``quantize`` or ``search``.
        resume: resume the run in ``run_dir``.
        overwrite: replace the run in ``run_dir``.

    Returns:
        Plain values, as in JSON. Under a budget the profile is that of the largest uniform bits that fit, since no
        search is run.

    Raises:
        SaqError: the errors that the run would raise before its first long step.
    """
    if verb == "search":
        check_search(config, images=False, files=not resume)
    else:
        check_quantize(config, files=not resume)
    device = pick_device(config.run.device)
    loaded, weights = _load(config.model, progress)
    images = _images(config, loaded, verb, device, progress)
    section = config.quantization
    if verb == "search":
        network = wrap_and_trace(loaded, section)
    else:
        network = network_for(config, loaded)
        check_exports(config, network, progress)
    network.model.to(device)
    budget = budget_of(section, network)
    bound = accuracy_bound(section)
    searches = verb == "search" or bool(budget.bounds()) or bound is not None
    space = space_of(section, network) if budget.bounds() or bound is not None else None
    if space is not None:
        space.check_reachable(budget)
    proxy = _check_search(config, network, images) if searches else None
    if verb == "quantize" and config.training.epochs:
        count = None if images is None else images.train.images
        check_trains(network.model, network.name, loaded.preprocessing, config, images=count)
    check_can_write(run_dir)
    run = RunDirectory(run_dir, verb)
    if resume := should_resume(run, resume=resume, overwrite=overwrite):
        check_same_settings(run, config)
    trains = verb == "quantize" and images is not None and images.trains
    policy = given_policy(section, network) if space is None else space.config(largest_uniform(space, budget))
    assert policy is not None
    profile = measure(network, policy, space_of(section.model_copy(update={"cost": "bops"}), network))
    return {
        "verb": verb,
        "run_dir": str(run_dir),
        "resume": resume,
        "config": config.model_dump(mode="json"),
        "model": network.name,
        "weights": weights,
        "device": str(device),
        "data": _described(images, proxy, verb),
        "bits": _bits(config),
        "searcher": section.searcher if searches else None,
        "weight_error": weight_error_of(config) if searches else None,
        "decisions": len(space.decisions) if space is not None else 0,
        "budget_bops": budget.bit_operations,
        "budget_bytes": budget.size,
        **figures_of(section, network, policy, space, budget),
        **(
            {}
            if bound is None or space is None
            else {"accuracy": _accuracy(config, len(ladder(space, budget).budgets), verb)}
        ),
        "steps_per_epoch": len(images.training()) if trains and images is not None else None,
        "stages": planned_stages(config) if verb == "quantize" else [],
        "scored_on": images.scored_on if images is not None and verb == "quantize" else None,
        "scored_images": images.val.images if images is not None and verb == "quantize" else None,
        "writes": [str(run_dir / name) for name in _written(config, verb, searches=searches)],
        "profile": profile.to_dict(),
    }


def _accuracy(config: RunConfig, rungs: int, verb: str) -> dict[str, Any]:
    """The budget of accuracy, and the most measurements that a ladder of ``rungs`` takes, but for what noise adds."""
    return {
        "max_drop": config.quantization.max_drop,
        "min_top1": config.quantization.min_top1,
        "measurements": most_measured(rungs),
        "trials": config.search.trials if verb == "quantize" and planned_stages(config)[1:] else 0,
    }


def _load(section: ModelSection, progress: Progress) -> tuple[LoadedModel, str]:
    """The float model and the source of its weights; random weights stand in for published ones."""
    if section.weights is not None or not section.pretrained or names_own_network(section.name):
        loaded = load_float(section, progress)
        return loaded, loaded.weights_source
    published = published_weights(section.name)
    loaded = load_float(section.model_copy(update={"pretrained": False}), progress)
    return replace(loaded, trained=loaded.num_classes == default_classes(section.name)), PUBLISHED.format(
        published
    )


def _images(
    config: RunConfig, loaded: LoadedModel, verb: str, device: Any, progress: Progress
) -> Images | None:
    """The images of the run; None if none are given yet, or if a search uses a proxy's."""
    if (config.data.path is None and config.data.calibration is None) or (
        verb == "search" and config.search.proxy is not None
    ):
        return None
    if verb == "search":
        return images_of_search(config, loaded, device, progress)
    return open_images(config, loaded, device, progress)


def _check_search(config: RunConfig, network: Network, images: Images | None) -> Images | None:
    """Check that the search could start; returns the images of its proxy, if any."""
    if images is None and config.search.proxy is None:
        return None
    if config.model.weights is None:  # the proxy loads the weights of the network
        config = config.model_copy(update={"model": config.model.model_copy(update={"pretrained": False})})
    request = request_search(config, network, images, SILENT)
    return None if config.search.proxy is None else request.images


def _described(images: Images | None, proxy: Images | None, verb: str) -> dict[str, Any] | None:
    """Every split of the run; None if no images are given."""
    splits = {} if images is None else images.splits
    if verb == "search":
        splits.pop("val", None)  # equal to the training split
    if proxy is not None:
        splits["proxy"] = proxy.train
    return {name: _split(split) for name, split in splits.items()} or None


def _split(split: Split) -> dict[str, Any]:
    classes = sorted(split.folders, key=split.folders.__getitem__)  # the folders present, not all class names
    return {"name": split.name, "images": split.images, "classes": classes}


def _bits(config: RunConfig) -> str:
    """The settings that determine the bits."""
    section = config.quantization
    given = {
        "bits": section.bits,
        "policy": section.policy,
        "bops": section.bops,
        "size": section.size,
        "max_drop": None if section.max_drop is None else f"{section.max_drop:g}",
        "min_top1": None if section.min_top1 is None else f"{section.min_top1:g}",
    }
    words = [(setting, value) for setting, value in given.items() if value is not None]
    words += [("pins", f"{pattern}={bits}") for pattern, bits in section.pins.items()]
    return " ".join(f"`quantization.{setting}={shlex.quote(value)}`" for setting, value in words)


def _written(config: RunConfig, verb: str, *, searches: bool) -> list[str]:
    """The files of the run directory, in the order of ``WRITTEN``."""
    written = [*WRITTEN[verb]]
    if verb == "quantize":
        names = onnx_names(config.export.styles).values()
        written += [f"artifacts/{name}{ending}" for name in names for ending in (".onnx", ".verdict.json")]
        written += SEARCHED if searches else ()
    if searches and keeps_scores(config.quantization):
        written.append("scores.json")
    return [*written, *(FRONT if searches and config.search.pareto else ())]
