"""``saq quantize``: from a float network and a budget to a fine-tuned, exported, verified one.

    load        float model, images
    bits        as given, or searched under the budget
    calibrate   clipping levels and signs from training images
    train       sharpness-aware, with checkpoints
    export      safetensors and ONNX, each compared with the model

An interrupted run resumes bit-identically.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.pipelines.calibration import calibrate, describe, install_quantizers
from saqcli.pipelines.checks import check_quantize, check_trainable, network_for
from saqcli.pipelines.export import check_exports, write_files
from saqcli.pipelines.search import choose_bits
from saqcli.pipelines.setup import (
    Prepared,
    load_float,
    load_seeded,
    open_images,
    open_run_images,
    saved_model,
)
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.report.run_report import QuantizeResult, write_report
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same, goes_on, note_start, resuming
from saqcli.runs.saving import TrainingSaving
from saqcli.training.loop import score
from saqcli.training.trainer import Trainer


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
        resume: continue the run in ``run_dir``.
        overwrite: replace the run in ``run_dir``.
        progress: reports everything that takes time.

    Raises:
        SaqError: anything the user can act on; work done so far stays in ``run_dir``.
    """
    with process_group(
        config.run.device,
        lambda: check_quantize(config, images=True, files=not resume),
        deterministically=config.run.deterministic,
    ) as device:
        progress = progress if distributed.first() else SILENT
        run = RunDirectory(run_dir)
        resume = goes_on(run, resume=resume, overwrite=overwrite)
        state = run.load_checkpoint(progress.note) if resume else None
        if resume:
            distributed.from_first(lambda: check_same(run, config))
        if state is None:
            prepared = distributed.together(lambda: prepare(config, device, progress))
            distributed.together(lambda: check_trainable(config, prepared))
        run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite)
        with run.recorded():
            run.restore_metrics(state)
            run.keep_config(config)
            resumed = state is not None
            if state is None:
                if resume:
                    note_start(run, progress.note)
                prepared.images.record_or_check(run)
                begin(config, prepared, run, device, progress)
                state = run.load_saved()
            run.end_search()
            outcome = QuantizeResult.unpack(state["outcome"])
            model, facts, outcome.policy = saved_model(state)
            model.to(device)
            images = distributed.together(lambda: open_run_images(config, facts, device))
            if resumed:
                images.record_or_check(run)
                progress.note(resuming(run, place_of(state, config.training.epochs)))
            best: Mapping[str, Tensor] | None = None
            if config.training.epochs:
                teacher = load_teacher(config, device, progress)
                with TrainingSaving(run, config.run.checkpoint_minutes, state) as saving:
                    trainer = Trainer(
                        model,
                        images.training(),
                        config.training,
                        num_classes=int(facts.build["num_classes"]),
                        image_size=max(images.preprocessing.input_size[1:]),
                        validation=images.validation(),
                        initial=outcome.calibrated_score,
                        teacher=teacher,
                        run=saving,
                        progress=progress,
                    )
                    if "position" in state:
                        trainer.load_state_dict(state)
                    trainer.fit()
                name = f"{facts.policy.model}, fine-tuned,"
                outcome.score = score(model, images.validation(), "evaluating", device, progress, name)
                outcome.note_training(trainer.best, trainer.last, config.training)
                best = trainer.best.model if trainer.best else None
            else:
                outcome.score = outcome.best_score = outcome.calibrated_score
                outcome.best_epoch = 0
            if outcome.advice:
                progress.note(outcome.advice)
            run.log(phase="quantized", **asdict(outcome.score), **outcome.best_figures())
            if distributed.first():
                write_files(model, facts, config, run, outcome, progress, best)
                write_report(run.report_path, config, outcome.to_dict(run.path))
                run.finish(outcome.to_dict(run.path))
            return outcome


def prepare(config: RunConfig, device: torch.device, progress: Progress) -> Prepared:
    """Load, wrap and trace the network, open its images, and try the export: nothing is written yet.

    Raises:
        SaqError: unusable model, data or policy, a budget below the smallest reachable cost, or a network that cannot
            be exported.
    """
    loaded = load_seeded(config, progress)
    images = open_images(config, loaded, device, progress)
    network = network_for(config, loaded)
    if distributed.first():
        check_exports(config, network, progress)
    network.model.to(device)
    return Prepared(network, images)


def begin(
    config: RunConfig, prepared: Prepared, run: RunDirectory, device: torch.device, progress: Progress
) -> None:
    """Score the float model, choose bits, calibrate, score again; leave the first checkpoint."""
    network, images = prepared
    validation, name = images.validation(), network.name
    float_score = score(network.model, validation, "evaluating float", device, progress, name)
    statistics = calibrate(network, images, config, progress)
    policy, budget = choose_bits(config, prepared, statistics, run, progress)
    model = install_quantizers(config, network, policy, statistics, images, progress)
    calibrated = score(model, validation, "evaluating calibrated", device, progress, f"{name}, calibrated,")
    progress.note(f"float {float_score.top1:.2f} %, calibrated {calibrated.top1:.2f} % top-1")
    outcome = QuantizeResult(
        name,
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
        {"facts": facts.model_dump_json(), "outcome": outcome.pack(), "model": model.state_dict()}
    )


def place_of(state: dict[str, Any], epochs: int) -> str:
    """Where a run resumes from its checkpoint, counting epochs from 1 and steps done."""
    if "position" not in state:
        return "after calibration"
    epoch, step = state["position"]["epoch"], state["position"]["step"]
    return f"at epoch {epoch + 1}, step {step}" if epoch < epochs else f"after epoch {epoch}"


def load_teacher(config: RunConfig, device: torch.device, progress: Progress) -> nn.Module | None:
    """The float model, for distillation."""
    if not config.training.distill:
        return None
    return load_float(config.model, progress).model.to(device).eval().requires_grad_(False)
