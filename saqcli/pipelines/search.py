"""``saq search``: bits for every layer under a budget, and the front that a search found on the way.

load        the network that the policy is for; with a proxy, also the one that is searched, which is fitted to its
            images
calibrate   what the inputs of all layers look like
search      on parts of the training images; an interrupted search resumes bit-identically
write       policy.json, search.json, pictures
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.errors import RunDirectoryError
from saqcli.pipelines.bits import given_policy
from saqcli.pipelines.checks import check_search
from saqcli.pipelines.find_bits import Asked, Searched, ask, find_bits, pose
from saqcli.pipelines.proxy import fit_proxy
from saqcli.pipelines.setup import Network, Prepared, load_float, load_seeded, training_images, wrap_and_trace
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget
from saqcli.report.pareto import front_of
from saqcli.report.search_report import SearchResults, write_search
from saqcli.runs.directory import RunDirectory
from saqcli.runs.resume import check_same, goes_on, note_start
from saqcli.runs.saving import SearchMemory
from saqcli.serialization import parse_object, write_text


def search(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Search as ``config`` says and leave policy, figures and pictures in ``run_dir``.

    Args:
        config: resolved.
        run_dir: made if it is not there.
        resume: continue the search in ``run_dir``.
        overwrite: replace what is in ``run_dir``.
        progress: told about everything that takes time.

    Returns:
        Plain values, as JSON has them.

    Raises:
        SaqError: anything the user can act on; a search under way stays in ``run_dir``.
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
    """On one rank, with its own device."""
    run = RunDirectory(run_dir, "search")
    resume = goes_on(run, resume=resume, overwrite=overwrite)
    if resume:
        distributed.from_first(lambda: check_same(run, config))
        done = distributed.from_first(run.manifest)
        if done.status == "finished":
            parse_object(SearchResults, done.results, f"{run_dir}/manifest.json, results", RunDirectoryError)
            return done.results
    prepared = distributed.together(lambda: prepare_search(config, device, progress))
    asked = distributed.together(lambda: ask(config, *prepared, progress))
    run = RunDirectory.start(run_dir, config, resume=resume, overwrite=overwrite, verb="search")
    with run.recorded():
        if resume:
            note_start(run, progress.note)
        asked.images.record_or_check(run)
        results = keep_search(search_and_stop(config, asked, None, run, progress), config, run)
        run.finish(results)
        run.end_search()
    return results


def search_and_stop(
    config: RunConfig,
    asked: Asked,
    statistics: Mapping[str, InputStatistics] | None,
    run: RunDirectory,
    progress: Progress,
) -> Searched:
    """What the searcher finds; a signal stops it where its memory can hold what was done.

    Args:
        config: resolved.
        asked: what is to be found.
        statistics: of the inputs of the network that the policy is for, where they are known already.
        run: that keeps what was done.
        progress: told about everything.

    Raises:
        Interrupted: a signal asked to stop.
    """
    minutes = config.run.checkpoint_minutes
    if config.search.proxy is not None:
        statistics = None
        with SearchMemory(run, minutes, progress.note, "proxy") as memory:
            fit_proxy(asked.searched, asked.images, config, progress, memory)
    posed = pose(config, asked, statistics, progress)
    with SearchMemory(run, minutes, progress.note) as memory:
        return find_bits(config, posed, memory)


def prepare_search(
    config: RunConfig, device: torch.device, progress: Progress
) -> tuple[Network, Images | None]:
    """The network and its training images; with a proxy its images are not needed, nor are published weights."""
    attention = config.quantization.quantize_attention
    if config.search.proxy is not None:
        section = config.model.model_copy(update={"pretrained": False})
        network = wrap_and_trace(load_float(section, SILENT), quantize_attention=attention)
        return network, None
    loaded = load_seeded(config, progress)
    images = training_images(config.data, loaded, device, config.run.seed, progress)
    network = wrap_and_trace(loaded, quantize_attention=attention)
    network.model.to(device)
    return network, images


def choose_bits(
    config: RunConfig,
    prepared: Prepared,
    statistics: Mapping[str, InputStatistics],
    run: RunDirectory,
    progress: Progress,
) -> tuple[BitConfig, Budget]:
    """The policy that was given, or the one that the searcher finds under the budget; kept in the run."""
    network, images = prepared
    policy = given_policy(config.quantization, network)
    if policy is not None:
        if distributed.first():
            write_text(run.policy_path, policy.to_json())
        return policy, Budget()
    asked = distributed.together(lambda: ask(config, network, images, progress))
    if config.search.proxy is not None:
        asked.images.record_or_check(run, prefix="proxy ")
    searched = search_and_stop(config, asked, statistics, run, progress)
    keep_search(searched, config, run)
    return searched.policy, searched.budget


def keep_search(searched: Searched, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Write policy, figures and pictures; the results as plain values."""
    problem, found = searched.posed.problem, searched.found
    results = searched.to_dict()  # by all ranks, as it may have to be scored
    front = None
    if config.search.pareto:
        model, widths = searched.posed.searched.model, config.quantization.candidates
        front = front_of(problem, found, config.search.pareto, searched.searcher, model, widths)
    return distributed.from_first(lambda: write_search(run, problem, found, searched.policy, results, front))
