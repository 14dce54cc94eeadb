"""``saq quantize``: choose bits, calibrate, fine-tune, export and verify.

    load        float model, images
    bits        given, or searched under the budget
    calibrate   clipping levels and signs from training images, or images without labels
    stages      compensation and reconstruction, without labels (see ``stages``)
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
from saqcli.models.own import own_of
from saqcli.pipelines.calibration import balanced, calibrate, check_exports, describe, install_quantizers
from saqcli.pipelines.checks import check_quantize, check_trainable, network_for
from saqcli.pipelines.export import write_files
from saqcli.pipelines.search import choose_bits
from saqcli.pipelines.setup import (
    Prepared,
    distills,
    load_float,
    load_seeded,
    open_images,
    open_run_images,
    saved_model,
)
from saqcli.pipelines.stages import (
    Measured,
    Scorer,
    announcement,
    climb,
    described,
    end_stage,
    log_stage,
    tensors_before,
    timed,
)
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.report.calibrated import write_network
from saqcli.report.page.page import try_page
from saqcli.report.run_report import NOUNS, QuantizeResult, write_report
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same_settings, note_restart, resuming, should_resume
from saqcli.runs.saving import TrainingSaving
from saqcli.training.trainer import Trainer


def quantize(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize according to ``config`` and write a run directory.

    Args:
        config: resolved.
        run_dir: created if missing.
        resume: resume the run in ``run_dir``.
        overwrite: replace the run in ``run_dir``.
        progress: reports all long steps.

    Raises:
        SaqError: anything the user can act on; completed work stays in ``run_dir``.
    """
    with process_group(
        config.run.device,
        lambda: check_quantize(config, images=True, files=not resume),
        deterministically=config.run.deterministic,
    ) as device:
        progress = progress if distributed.first() else SILENT
        run = RunDirectory(run_dir)
        resume = should_resume(run, resume=resume, overwrite=overwrite)
        state = run.load_checkpoint(progress.note) if resume else None
        if resume:
            distributed.from_first(lambda: check_same_settings(run, config))
        if state is None:
            prepared = distributed.together(lambda: prepare(config, device, progress))
            distributed.together(lambda: check_trainable(config, prepared))
        run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite)
        with run.recorded():
            run.restore_metrics(state)
            run.keep_config(config)
            run.track(config, progress.note)
            resumed = state is not None
            if state is None:
                if resume:
                    note_restart(run, progress.note)
                prepared.images.record_or_check(run)
                start_run(config, prepared, run, device, progress)
                images, state = prepared.images, run.load_saved()
            run.end_search()
            result = QuantizeResult.unpack(state["outcome"])
            own = own_of(config.model.name)
            model, metadata, result.policy = saved_model(state, own)
            model.to(device)
            if resumed:
                images = distributed.together(lambda: open_run_images(config, metadata, device, progress))
                images.record_or_check(run)
                progress.note(resuming(run, resume_point(state, config.training.epochs)))
            scorer = Scorer(images, device, metadata.policy.model, progress, state.get("float_classes"))
            if "position" not in state:
                state = climb(config, run, state, model, result, scorer)
            best_state: Mapping[str, Tensor] | None = None
            if config.training.epochs:
                teacher = load_teacher(config, device, progress)
                with TrainingSaving(run, config.run.checkpoint_minutes, state) as saving:
                    trainer = Trainer(
                        model,
                        images.training(),
                        config.training,
                        num_classes=int(metadata.build["num_classes"]),
                        image_size=max(images.preprocessing.input_size[1:]),
                        network=metadata.policy.model,
                        validation=images.validation(),
                        initial=result.start,
                        teacher=teacher,
                        run=saving,
                        progress=progress,
                    )
                    if "position" in state:
                        trainer.load_state_dict(state)
                    with timed(run, "fine-tuned"):
                        trainer.fit()
                run.note_training(**trainer.execution.recorded())
                best, last, result.radius = trainer.best, trainer.last, trainer.radius
                result.distilled = teacher is not None
                del trainer, teacher  # frees optimizer, average and loaders before evaluation and export
                measured = scorer.of(model, "fine-tuned", "evaluating")
                result.score = measured.score
                row = result.add_stage("fine-tuned", *measured)
                progress.note(described(row, distributed.from_first(run.manifest).seconds.get("fine-tuned")))
                result.note_training(best, last, config.training)
                best_state = best.model if best else None
            else:
                result.score = result.best_score = result.start
                result.best_epoch = 0
                measured = Measured(result.score, result.stages[-1]["agreement"] if result.stages else None)
            if result.advice:
                progress.note(result.advice)
            log_stage(run, "quantized", measured, **result.best_figures())
            result.seconds = distributed.from_first(run.manifest).seconds
            if scorer.classes is None:  # resumed after the last stage
                scorer.of(model, result.stages[-1]["stage"] if result.stages else "calibrated")
            if distributed.first():
                scorer.keep_answers(run)
                write_files(model, metadata, config, run, result, progress, best_state, own)
                write_report(run.report_path, config, result.to_dict(run.path))
                run.finish(result.to_dict(run.path))
        if distributed.first():
            try_page(run.path, progress)
        return result


def prepare(config: RunConfig, device: torch.device, progress: Progress) -> Prepared:
    """Load, wrap and trace the network, open its images, and make a trial export; writes nothing.

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


def start_run(
    config: RunConfig, prepared: Prepared, run: RunDirectory, device: torch.device, progress: Progress
) -> None:
    """Score the float model, choose bits, calibrate, score again, and save the first checkpoint."""
    network, images = prepared
    progress.note(announcement(config, images, learns_from_float=distills(config, network.loaded)))
    scorer = Scorer(images, device, network.name, progress)
    float_score = scorer.of_float(network.model)
    with timed(run, "calibrated"):
        statistics = calibrate(network, images, config, progress)
    policy, budget, accuracy = choose_bits(config, prepared, statistics, run, progress, float_score.top1)
    with timed(run, "calibrated"):
        fitted = balanced(config, network, policy, statistics, images, progress)
        kept = tensors_before(config, network.model)
        model = install_quantizers(config, network, policy, fitted, images, progress)
        if distributed.first():
            preprocessing, classes = network.loaded.preprocessing, network.loaded.num_classes
            write_network(run, network, preprocessing, classes, policy, fitted)
    measured = scorer.of(model, "calibrated")
    calibrated = measured.score
    result = QuantizeResult(
        network.name,
        float_score,
        calibrated,
        network.costs.bops(policy),
        network.costs.float_bops,
        budget.bit_operations,
        network.costs.size(policy),
        network.costs.float_size,
        policy,
        budget_bytes=budget.size,
        accuracy=accuracy,
        scored_on=images.scored_on,
    )
    if images.labelled:
        progress.note(f"float: {float_score.top1:.2f} % top-1")
    run.log(phase="float", **asdict(float_score))
    end_stage("calibrated", measured, result, run, progress)
    metadata = describe(model, images)
    run.save_checkpoint(
        {
            "facts": metadata.model_dump_json(),
            "outcome": result.pack(),
            "model": model.state_dict(),
            "float_classes": scorer.float_classes,
            **kept,
        }
    )


def resume_point(state: dict[str, Any], epochs: int) -> str:
    """The position of a checkpoint as text; counts epochs from 1 and completed steps."""
    if "position" not in state:
        stages = state["outcome"].get("stages") or [{"stage": "calibrated"}]
        return f"after {NOUNS[stages[-1]['stage']]}"
    epoch, step = state["position"]["epoch"], state["position"]["step"]
    return f"at epoch {epoch + 1}, step {step}" if epoch < epochs else f"after epoch {epoch}"


def load_teacher(config: RunConfig, device: torch.device, progress: Progress) -> nn.Module | None:
    """The float model, for distillation; None if training does not distill."""
    if config.training.distill is False or (config.training.distill is None and config.model.new_head):
        return None
    loaded = load_float(config.model, progress)
    return loaded.model.to(device).eval().requires_grad_(False) if distills(config, loaded) else None
