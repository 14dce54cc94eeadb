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

from saqcli import distributed
from saqcli._version import __version__
from saqcli.config import RunConfig
from saqcli.data.batches import Loader
from saqcli.data.splits import Images, know_images
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export import ModelFacts
from saqcli.export.restore import trained_classes, with_names_of_logits
from saqcli.export.safetensors import restore_structure
from saqcli.machine import library_versions
from saqcli.models.load import LoadedModel, build_architecture
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.bits import budget_of, check_bits, check_way, given_policy, space_of
from saqcli.pipelines.calibration import calibrate, install_quantizers, scheme_of
from saqcli.pipelines.checks import check_builds, check_device, check_images, check_model
from saqcli.pipelines.export import check_exports, check_styles, export_verified, onnx_names, verify_limit
from saqcli.pipelines.find_bits import ask, make_searcher
from saqcli.pipelines.proxy import proxy_data
from saqcli.pipelines.search import keep_search, search_and_stop
from saqcli.pipelines.setup import Network, classes_of, load_float, wrap_and_trace
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget
from saqcli.random_state import deterministic_if_requested, seed_everything
from saqcli.report.run_report import QuantizeResult, write_report
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same, goes_on, note_start, resuming
from saqcli.serialization import named_path, write_text
from saqcli.tasks.labels import ORDERS
from saqcli.training.loop import Score, evaluate
from saqcli.training.minimizers.base import check_score
from saqcli.training.optimizer import check_training
from saqcli.training.preflight import check_trains
from saqcli.training.trainer import Best, finetune
from saqcli.verify.verdict import verdict_path


@deterministic_if_requested
def quantize(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
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
    with process_group(config.run.device, lambda: check(config, images=True, files=not resume)) as device:
        return _on(device, config, run_dir, resume, overwrite, progress if distributed.first() else SILENT)


def _on(
    device: torch.device, config: RunConfig, run_dir: Path, resume: bool, overwrite: bool, progress: Progress
) -> QuantizeResult:
    """Each rank on its own device."""
    run = RunDirectory(run_dir)
    resume = goes_on(run, resume=resume, overwrite=overwrite)
    state = run.load_checkpoint(progress.note) if resume else None
    if resume:
        distributed.from_first(lambda: check_same(run, config))
    if state is None:
        network, images = distributed.together(lambda: prepare(config, device, progress))
        if config.training.epochs:
            distributed.together(
                lambda: check_trains(
                    network.model,
                    network.name,
                    network.loaded.preprocessing,
                    config,
                    images=images.train.images,
                )
            )
    run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite)
    with run.recorded():
        run.restore_metrics(state)
        run.keep_config(config)
        if state is not None:
            run.end_search()  # a crash may have come between the first checkpoint and this
        if state is None:
            if resume:
                note_start(run, progress.note)
            know_images(run, images)
            begin(config, network, images, run, device, progress)
            return complete(config, run, run.load_checkpoint(), device, progress)
        return complete(config, run, state, device, progress, resumed=True)


def check(config: RunConfig, *, images: bool = False, files: bool = True) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Args:
        config: of the run.
        images: whether it needs images; if not, those that are named must be there nevertheless.
        files: whether weights and policy must be there; not where a run is resumed.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    problems = Problems()
    problems.attempt(check_model, config.model, files=files)
    if images or config.data.path is not None:
        problems.attempt(check_images, config.data, "train", "val", files=files)
    if config.search.proxy is not None:
        problems.attempt(check_images, proxy_data(config), "train", files=files)
    problems.attempt(check_way, config.quantization)
    problems.attempt(check_bits, config.quantization, files=files)
    problems.attempt(make_searcher, config)
    problems.attempt(scheme_of(config).check)
    problems.attempt(check_training, config)
    problems.attempt(check_device, config.run.device)
    if config.model.new_head and not config.training.epochs:
        problems.add(
            ConfigError("--new-head starts a random classifier, which fine-tuning trains: remove --epochs 0")
        )
    problems.attempt(check_styles, config.export.styles)
    check_builds(problems, config.model)
    problems.check()


def prepare(config: RunConfig, device: torch.device, progress: Progress) -> tuple[Network, Images]:
    """Load, wrap and trace the network, open its images, and try the export: nothing is written yet.

    Raises:
        SaqError: unusable model, data, policy, a budget that nothing meets, or a network that cannot be exported.
    """
    if config.model.new_head:
        seed_everything(config.run.seed)
    loaded = load_float(config.model, progress)
    images = Images.open(config, classes_of(loaded), loaded.preprocessing, device, progress)
    network = network_for(config, loaded)
    if distributed.first():
        check_exports(config, network, progress)
    network.model.to(device)
    return network, images


def network_for(config: RunConfig, loaded: LoadedModel) -> Network:
    """The network, wrapped and traced, once bits, budget and distillation are known to suit it.

    Raises:
        SaqError: a policy of another network, a budget that nothing meets, no float model to learn from.
    """
    if config.training.distill and not loaded.trained:
        raise ConfigError(
            f"--distill learns from the float model, and the weights of {loaded.name} are random, or those of its "
            "classifier: give --weights FILE with all of them, or remove --distill"
        )
    network = wrap_and_trace(loaded, quantize_attention=config.quantization.quantize_attention)
    if given_policy(config.quantization, network) is None:
        space_of(config.quantization, network).check_reachable(budget_of(config.quantization, network))
    return network


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
    check_score(float_score.loss, float_score.images, network.name)
    statistics = calibrate(network, images, config, progress)
    policy, budget = choose_bits(config, network, images, statistics, run, progress)
    quantized = install_quantizers(config, network, policy, statistics, images, progress)
    calibrated = score(quantized, validation, "evaluating calibrated", device, progress)
    check_score(calibrated.loss, calibrated.images, f"{network.name}, calibrated,")
    progress.note(f"float {float_score.top1:.2f} %, calibrated {calibrated.top1:.2f} % top-1")
    outcome = QuantizeResult(
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
        if distributed.first():
            write_text(run.policy_path, policy.to_json())
        return policy, Budget()
    asked = distributed.together(lambda: ask(config, network, images, progress))
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
) -> QuantizeResult:
    """From the last checkpoint, ``state``, to the end: train, score, export, report."""
    if state is None:
        raise RunDirectoryError(f"{run.path} holds no checkpoint: start again with --overwrite")
    facts = with_names_of_logits(ModelFacts.model_validate_json(state["facts"]))
    outcome = QuantizeResult.unpack(state["outcome"])
    model = build_architecture(facts.build)
    restore_structure(model, facts)
    model.load_state_dict(state["model"])
    outcome.policy = convert.active_bits(model, facts.policy.model, facts.policy.layers)
    model.to(device)
    images = distributed.together(lambda: open_images(config, facts, device))
    if resumed:
        know_images(run, images)
        progress.note(resuming(run, place_of(state, config.training.epochs)))
    if config.training.epochs:
        classes = int(facts.build["num_classes"])
        teacher = _teacher(config, device, progress)
        best, outcome.last_score = finetune(
            model,
            config,
            images,
            run,
            state,
            progress,
            num_classes=classes,
            calibrated=outcome.calibrated_score,
            teacher=teacher,
        )
        outcome.score = score(model, images.validation(), "evaluating", device, progress)
        check_score(outcome.score.loss, outcome.score.images, f"{facts.policy.model}, fine-tuned,")
        outcome.note_training(best, config.training)
        if outcome.advice:
            progress.note(outcome.advice)
    else:
        best, outcome.score = None, outcome.calibrated_score
        outcome.best_epoch, outcome.best_score = 0, outcome.score
    run.log(phase="quantized", **asdict(outcome.score), **outcome.best_figures())
    if not distributed.first():
        return outcome  # the first one writes the files
    write_files(model, facts, config, run, outcome, progress, best)
    outcome.artifacts |= {"policy": str(run.policy_path), "report": str(run.report_path)}
    write_report(run.report_path, config, outcome.to_dict(run.path))
    run.finish(outcome.to_dict(run.path))
    return outcome


def place_of(state: dict[str, Any], epochs: int) -> str:
    """Where a run resumes from its checkpoint, counting epochs from 1 and steps done."""
    if "position" not in state:
        return "after calibration"
    epoch, step = state["position"]["epoch"], state["position"]["step"]
    return f"at epoch {epoch + 1}, step {step}" if epoch < epochs else f"after epoch {epoch}"


def write_files(
    model: nn.Module,
    facts: ModelFacts,
    config: RunConfig,
    run: RunDirectory,
    outcome: QuantizeResult,
    progress: Progress,
    best: Best | None,
) -> None:
    """The safetensors file and an ONNX file a style, each compared with ``model``; noted in ``outcome``.

    ``best`` is the best state of fine-tuning, kept in a file of its own where it is clearly better than the exported
    one.
    """
    images = open_images(config, facts, torch.device("cpu"))
    batches = images.validation(verify_limit(config.data.verify_images))
    about: dict[str, Any] = {
        "verified_on": str(config.data.path),
        "available": images.val.images,
        "true_size": outcome.size,
    }
    export_verified(
        model, facts, run.safetensors_path, "safetensors", batches, len(batches), progress, **about
    )
    outcome.artifacts["safetensors"] = str(run.safetensors_path)
    for style, name in onnx_names(config.export.styles).items():
        path = run.onnx_path.with_name(f"{name}.onnx")
        verdict = export_verified(model, facts, path, style, batches, len(batches), progress, **about)
        outcome.artifacts[style] = str(path)
        outcome.artifacts[name.replace("model", "verdict", 1)] = str(verdict_path(path))
        if outcome.onnx is None:
            outcome.onnx = {**verdict.figures(), "style": style, "size_bytes": path.stat().st_size}
    if best is not None and outcome.advice and best.epoch != outcome.exported_epoch:
        model.load_state_dict(best.model)
        export_verified(model, facts, run.best_path, "safetensors", batches, len(batches), progress, **about)
        outcome.artifacts["best"] = str(run.best_path)
    else:
        run.best_path.unlink(missing_ok=True)  # of an attempt in which another epoch was best


def _teacher(config: RunConfig, device: torch.device, progress: Progress) -> nn.Module | None:
    """The float model, where the settings ask to learn from it."""
    if not config.training.distill:
        return None
    return load_float(config.model, progress).model.to(device).eval().requires_grad_(False)


def score(model: nn.Module, loader: Loader, title: str, device: torch.device, progress: Progress) -> Score:
    """Accuracy of ``model`` in eval mode, by all ranks together."""
    model.eval()
    with progress.task(title, len(loader) // distributed.count()) as task:
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
