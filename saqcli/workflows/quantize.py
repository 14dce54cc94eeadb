"""``saq quantize``: from a float network and a budget to a fine-tuned, exported, verified one.

    load        float model, images
    bits        as asked, or searched under the budget
    calibrate   clipping levels and signs from training images
    train       sharpness-aware, checkpointed
    export      safetensors and ONNX, each compared with the model

Every phase can be resumed after.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saqcli import ranks
from saqcli._version import __version__
from saqcli.algorithms.exporters import ModelFacts
from saqcli.algorithms.exporters.safetensors import restore_structure
from saqcli.algorithms.minimizers import MINIMIZERS
from saqcli.algorithms.training import Score, evaluate
from saqcli.config import RunConfig
from saqcli.errors import ConfigError, RunDirectoryError
from saqcli.io.batches import Loader
from saqcli.io.distributed import process_group
from saqcli.io.files import write_text
from saqcli.io.labels import ORDERS, check_files
from saqcli.io.machine import library_versions
from saqcli.io.models import build_architecture
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.runs import RunDirectory
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibrate import InputStatistics
from saqcli.quant.cost import Budget
from saqcli.strict import named_path
from saqcli.workflows.bits import budget_of, check_bits, given_policy, space_of
from saqcli.workflows.calibration import calibrate, install_quantizers, scheme_of
from saqcli.workflows.determinism import deterministic_if_asked
from saqcli.workflows.export import export_verified
from saqcli.workflows.find_bits import ask, make_searcher
from saqcli.workflows.finetune import finetune
from saqcli.workflows.optimization import check_training
from saqcli.workflows.outcome import Outcome
from saqcli.workflows.report import write_report
from saqcli.workflows.resuming import check_same, goes_on, know_images
from saqcli.workflows.search import keep_search, search_and_stop
from saqcli.workflows.setup import (
    Images,
    Network,
    classes_of,
    load_float,
    trained_classes,
    with_names_of_logits,
    wrap_and_trace,
)
from saqcli.workflows.trainable import check_trains
from saqcli.workflows.verdict import verdict_path


@deterministic_if_asked
def quantize(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Outcome:
    """Quantize as ``config`` says and leave a run directory.

    Args:
        config: resolved.
        run_dir: made if it is not there.
        resume: go on with the run in ``run_dir``.
        overwrite: replace the run in ``run_dir``.
        progress: told about everything that takes time.

    Raises:
        SaqError: anything the user can act on; work done so far stays in ``run_dir``.
    """
    with process_group(config.run.device) as device:
        return _on(device, config, run_dir, resume, overwrite, progress if ranks.first() else SILENT)


def _on(
    device: torch.device, config: RunConfig, run_dir: Path, resume: bool, overwrite: bool, progress: Progress
) -> Outcome:
    """Each rank on its own device."""
    run = RunDirectory(run_dir)
    ranks.together(lambda: check(config))
    resume = goes_on(run, resume=resume, overwrite=overwrite)
    state = run.load_checkpoint(progress.note) if resume else None
    if resume:
        ranks.from_first(lambda: check_same(run, config))
    if state is None:
        network, images = ranks.together(lambda: prepare(config, device, progress))
        if config.training.epochs:
            ranks.together(
                lambda: check_trains(network.model, network.name, network.loaded.preprocessing, config)
            )
    run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite, note=progress.note)
    with run.recorded():
        run.restore_metrics(state)
        if state is not None:
            run.end_search()  # a crash may have come between the first checkpoint and this
        if state is None:
            know_images(run, images)
            begin(config, network, images, run, device, progress)
            return complete(config, run, run.load_checkpoint(), device, progress)
        return complete(config, run, state, device, progress, resumed=True)


def check(config: RunConfig) -> None:
    """Refuse what can be seen to be wrong before anything is loaded."""
    if config.training.method not in MINIMIZERS:
        raise ConfigError(
            f"there is no method {config.training.method!r}: choose from {', '.join(MINIMIZERS)}"
        )
    make_searcher(config)
    scheme_of(config).check()
    check_training(config)
    check_bits(config.quantization)


def prepare(config: RunConfig, device: torch.device, progress: Progress) -> tuple[Network, Images]:
    """Load, wrap and trace the network, and open its images: nothing is written yet.

    Raises:
        SaqError: unusable model, data, policy, or a budget that nothing meets.
    """
    check_files(config.data.class_order, config.data.class_map)
    loaded = load_float(config.model, progress)
    if config.training.distill and not loaded.trained:
        raise ConfigError(
            f"--distill learns from the float model, and the weights of {loaded.name} are random, or those of its "
            "classifier: give --weights FILE with all of them, or leave --distill away"
        )
    images = Images.open(config, classes_of(loaded), loaded.preprocessing, device, progress)
    network = wrap_and_trace(loaded, quantize_attention=config.quantization.quantize_attention)
    if given_policy(config.quantization, network) is None:
        space_of(config.quantization, network).check_reachable(budget_of(config.quantization, network))
    network.model.to(device)
    return network, images


def begin(
    config: RunConfig,
    network: Network,
    images: Images,
    run: RunDirectory,
    device: torch.device,
    progress: Progress,
) -> None:
    """Score the float model, choose bits, calibrate, score again; leave the first checkpoint."""
    model = network.model
    validation = images.validation()
    float_score = score(model, validation, "evaluating float", device, progress)
    statistics = calibrate(network, images, config, progress)
    policy, budget = choose_bits(config, network, images, statistics, run, progress)
    quantized = install_quantizers(config, network, policy, statistics, images, progress)
    calibrated = score(quantized, validation, "evaluating calibrated", device, progress)
    progress.note(f"float {float_score.top1:.2f} %, calibrated {calibrated.top1:.2f} % top-1")
    outcome = Outcome(
        network.name,
        float_score,
        calibrated,
        network.costs.bops(policy),
        network.costs.float_bops,
        budget.bops,
        network.costs.size(policy),
        network.costs.float_size,
        policy,
        budget_bytes=budget.size,
    )
    facts = describe(config, network, policy, statistics, images)
    run.log(phase="float", **asdict(float_score))
    run.log(phase="calibrated", **asdict(calibrated))
    run.save_checkpoint(
        {"facts": facts.model_dump_json(), "outcome": outcome.pack(), "model": quantized.state_dict()}
    )
    run.end_search()


def choose_bits(
    config: RunConfig,
    network: Network,
    images: Images,
    statistics: Mapping[str, InputStatistics],
    run: RunDirectory,
    progress: Progress,
) -> tuple[BitConfig, Budget]:
    """The policy that was given, or the one that the searcher finds under the budget; kept in the run."""
    policy = given_policy(config.quantization, network)
    if policy is not None:
        if ranks.first():
            write_text(run.policy_path, policy.to_json())
        return policy, Budget()
    asked = ranks.together(lambda: ask(config, network, images, progress))
    if config.search.proxy is not None:
        know_images(run, asked.images, of="proxy ")
    searched = search_and_stop(config, asked, statistics, run, progress)
    keep_search(searched, config, run)
    return searched.policy, searched.budget


def complete(
    config: RunConfig,
    run: RunDirectory,
    state: dict[str, Any] | None,
    device: torch.device,
    progress: Progress,
    *,
    resumed: bool = False,
) -> Outcome:
    """From the last checkpoint, ``state``, to the end: train, score, export, report."""
    if state is None:
        raise RunDirectoryError(f"{run.path} holds no checkpoint: start again with --overwrite")
    facts = with_names_of_logits(ModelFacts.model_validate_json(state["facts"]))
    outcome = Outcome.unpack(state["outcome"])
    model = build_architecture(facts.build)
    restore_structure(model, facts)
    model.load_state_dict(state["model"])
    outcome.policy = convert.active_bits(model, facts.policy.model, facts.policy.layers)
    model.to(device)
    images = ranks.together(lambda: open_images(config, facts, device))
    if resumed:
        know_images(run, images)
    if config.training.epochs:
        classes = int(facts.build["num_classes"])
        teacher = _teacher(config, device, progress)
        finetune(model, config, images, run, state, progress, num_classes=classes, teacher=teacher)
        outcome.score = score(model, images.validation(), "evaluating", device, progress)
    else:
        outcome.score = outcome.calibrated_score
    run.log(phase="quantized", **asdict(outcome.score))
    if not ranks.first():
        return outcome  # the first one writes the files
    batches = open_images(config, facts, torch.device("cpu")).validation(config.data.verify_images)
    for style, path in (("safetensors", run.safetensors_path), ("qdq", run.onnx_path)):
        verdict = export_verified(model, facts, path, style, batches, len(batches), progress)
        outcome.artifacts[style] = str(path)
        outcome.agreement, outcome.verified_images = verdict.argmax_agreement, verdict.images
        outcome.layers_error = verdict.figures()["layers_error"]
    outcome.artifacts |= {
        "verdict": str(verdict_path(run.onnx_path)),
        "policy": str(run.policy_path),
        "report": str(run.report_path),
    }
    write_report(run.report_path, config, outcome.to_dict(run.path))
    run.finish(outcome.to_dict(run.path))
    return outcome


def _teacher(config: RunConfig, device: torch.device, progress: Progress) -> nn.Module | None:
    """The float model, where the settings ask to learn from it."""
    if not config.training.distill:
        return None
    return load_float(config.model, progress).model.to(device).eval().requires_grad_(False)


def score(model: nn.Module, loader: Loader, title: str, device: torch.device, progress: Progress) -> Score:
    """Accuracy of ``model`` in eval mode, by all ranks together."""
    model.eval()
    with progress.task(title, len(loader) // ranks.count()) as task:
        return evaluate(model, loader, task, device=device, shared=True)


def describe(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images,
) -> ModelFacts:
    """What the exported files will say about the model."""
    loaded = network.loaded
    return ModelFacts(
        saq_version=__version__,
        versions=library_versions(),
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=scheme_of(config),
        signed={name: facts.signed for name, facts in statistics.items()},
        routed=network.traced.routed,
        products=network.products,
        class_names=images.train.class_names,
        folders=dict(images.train.folders),
        class_order=images.train.class_order,
        exif_transpose=bool(images.section.exif_transpose),
        source=loaded.weights_source,
        source_sha256=loaded.weights_sha256,
    )


def open_images(config: RunConfig, facts: ModelFacts, device: torch.device) -> Images:
    """The images of a run that is under way, with the labels that it started with.

    Files that said which class a folder is are not needed any more, but what they say must be the same where they are
    there.
    """
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    gone = {
        name: None
        for name in ("class_order", "class_map")
        if (file := getattr(config.data, name)) not in (None, *ORDERS) and not named_path(file).is_file()
    }
    if gone and facts.folders:
        config = config.model_copy(update={"data": config.data.model_copy(update=gone)})
    return Images.open(config, trained_classes(facts, "the run"), preprocessing, device)
