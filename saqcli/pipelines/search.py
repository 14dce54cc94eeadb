"""``saq search``: bits for every layer under a budget, and the Pareto front.

load        the target network of the policy; with a proxy, also the proxy's network, which is trained on its images
calibrate   input statistics of all layers
search      on parts of the training images; an interrupted search resumes bit-identically
accuracy    under a budget of accuracy: configurations of the search's front, measured on held-out images
write       policy.json, search.json, plots
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.pipelines.accuracy.keep import keep, top1_in_float
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.checks import check_search
from saqcli.pipelines.find_bits import FoundBits, SearchRequest, bind_search, find_bits, request_search
from saqcli.pipelines.proxy import fit_proxy
from saqcli.pipelines.setup import (
    Network,
    Prepared,
    images_of_search,
    load_float,
    load_seeded,
    wrap_and_trace,
)
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget
from saqcli.report.page.page import try_page
from saqcli.report.pareto import front_of
from saqcli.report.search_report import check_results, write_search
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same_settings, note_restart, should_resume
from saqcli.runs.saving import SearchMemory


def search(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Search according to ``config`` and write policy, results and plots to ``run_dir``.

    Args:
        config: resolved.
        run_dir: created if missing.
        resume: resume the search in ``run_dir``.
        overwrite: replace the search in ``run_dir``.
        progress: reports all long steps.

    Returns:
        Plain values, as in JSON.

    Raises:
        SaqError: anything the user can act on; an interrupted search stays in ``run_dir``.
    """
    with process_group(
        config.run.device,
        lambda: check_search(config, files=not resume),
        deterministically=config.run.deterministic,
    ) as device:
        progress = progress if distributed.first() else SILENT
        return _search(device, config, run_dir, resume, overwrite, progress)


def _search(
    device: torch.device, config: RunConfig, run_dir: Path, resume: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """The search of one rank, on its device."""
    run = RunDirectory(run_dir, "search")
    resume = should_resume(run, resume=resume, overwrite=overwrite)
    if resume:
        distributed.from_first(lambda: check_same_settings(run, config))
        done = distributed.from_first(run.manifest)
        if done.status == "finished":
            check_results(done.results, f"{run_dir}/manifest.json, results")
            if distributed.first() and not run.page_path.is_file():
                try_page(run.path, progress)
            return done.results
    prepared = distributed.together(lambda: prepare_search(config, device, progress))
    request = distributed.together(lambda: request_search(config, *prepared, progress))
    run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite, verb="search")
    with run.recorded():
        if resume:
            note_restart(run, progress.note)
        run.keep_config(config)
        run.track(config, progress.note)
        request.images.record_or_check(run)
        float_top1 = top1_in_float(config, request.network, request.images, progress)
        found = run_search(config, request, None, run, progress, float_top1=float_top1)
        results = save_search(found, config, run)
        run.finish(results)
        run.end_search()
    if distributed.first():
        try_page(run.path, progress)
    return results


def run_search(
    config: RunConfig,
    request: SearchRequest,
    statistics: Mapping[str, InputStatistics] | None,
    run: RunDirectory,
    progress: Progress,
    *,
    fine_tunes: bool = False,
    float_top1: float | None = None,
) -> FoundBits:
    """Run the searcher, and keep the accuracy that was asked for; a signal interrupts both once their state is saved.

    Args:
        config: resolved.
        request: the search.
        statistics: input statistics of the target network, if known already.
        run: stores the state of the search.
        progress: reports all long steps.
        fine_tunes: whether the run fine-tunes what is found, so that trials of that may decide.
        float_top1: percent, of the float network on the validation images; needed by ``min_top1`` only.

    Raises:
        Interrupted: a signal asked to stop.
    """
    minutes = config.run.checkpoint_minutes
    if config.search.proxy is not None:
        statistics = None
        with SearchMemory(run, minutes, progress.note, "proxy") as memory:
            fit_proxy(request.search_network, request.images, config, progress, memory)
    bound = bind_search(config, request, statistics, progress)
    with SearchMemory(run, minutes, progress.note) as memory:
        found = find_bits(config, bound, memory)
    return keep(config, found, run, progress, request.images, float_top1, fine_tunes=fine_tunes)


def prepare_search(
    config: RunConfig, device: torch.device, progress: Progress
) -> tuple[Network, Images | None]:
    """The network and its training images; with a proxy, neither images nor published weights are needed."""
    if config.search.proxy is not None:
        section = config.model.model_copy(update={"pretrained": False})
        network = wrap_and_trace(load_float(section, SILENT), config.quantization)
        return network, None
    loaded = load_seeded(config, progress)
    images = images_of_search(config, loaded, device, progress)
    network = wrap_and_trace(loaded, config.quantization)
    network.model.to(device)
    return network, images


def choose_bits(
    config: RunConfig,
    prepared: Prepared,
    statistics: Mapping[str, InputStatistics],
    run: RunDirectory,
    progress: Progress,
    float_top1: float,
) -> tuple[BitConfig, Budget, dict[str, Any] | None]:
    """The given policy, or the one that is found under the budget, with what became of its bound of accuracy.

    The policy is saved in the run. ``float_top1`` is that of the float network on the validation images, in percent.
    """
    network, images = prepared
    policy = given_policy(config.quantization, network)
    if policy is not None:
        run.keep_policy(policy.to_json())
        return policy, Budget(), None
    request = distributed.together(lambda: request_search(config, network, images, progress))
    if config.search.proxy is not None:
        request.images.record_or_check(run, prefix="proxy ")
    found = run_search(config, request, statistics, run, progress, fine_tunes=True, float_top1=float_top1)
    save_search(found, config, run)
    return found.policy, found.budget, None if found.accuracy is None else found.accuracy.to_dict()


def save_search(found: FoundBits, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Write policy, results and plots; returns the results as plain values."""
    problem, result = found.bound.problem, found.result
    results = found.to_dict()  # on all ranks, since the policy may have to be scored
    front = None
    if config.search.pareto:
        model, widths = found.bound.search_network.model, config.quantization.candidates
        front = front_of(problem, result, config.search.pareto, found.searcher, model, widths)
    return distributed.from_first(lambda: write_search(run, problem, result, found.policy, results, front))
