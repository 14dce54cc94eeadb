"""``saq search``: bits for every layer under a budget, and the front found on the way.

What a search keeps in its run directory, so that it can be stopped at any step and go on: a file a stage.

What ``saq search`` prints, as it is read back from the manifest of a search that has ended.

The rest of the manifest is for people; this is shown again by ``--resume``, so it must be whole.

``saq search``: bits for every layer under a budget, and the front that a search found on the way.

load        the network that the policy is for; with a proxy, also the one that is searched, which is fitted to its
            images
calibrate   what the inputs of all layers look like
search      on parts of the training images; an interrupted search resumes bit-identically
write       policy.json, search.json, pictures
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from saqcli import distributed
from saqcli._version import __version__
from saqcli.config import RunConfig
from saqcli.data.splits import Images, know_images
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.models.load import LoadedModel
from saqcli.pipelines.bits import check_bits
from saqcli.pipelines.calibration import scheme_of
from saqcli.pipelines.checks import check_builds, check_device, check_images, check_model
from saqcli.pipelines.find_bits import Asked, Searched, ask, find_bits, make_searcher, pose
from saqcli.pipelines.proxy import fit_proxy, proxy_data
from saqcli.pipelines.setup import Network, classes_of, load_float, wrap_and_trace
from saqcli.process_group import process_group
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import LayerBits
from saqcli.quant.calibration import InputStatistics
from saqcli.random_state import deterministic_if_requested, random_state, seed_everything, set_random_state
from saqcli.report.front import draw_front
from saqcli.report.pareto import Front, find_front, to_table, write_front
from saqcli.report.policy import draw_policy
from saqcli.runs.directory import RunDirectory, Stage, stop_if_asked
from saqcli.runs.interrupts import StopRequest, deferred_interrupts
from saqcli.runs.resume import check_same, goes_on, note_start, resuming
from saqcli.search.supernet import Scorer
from saqcli.serialization import json_text, parse_object, write_text
from saqcli.training.loop import evaluate
from saqcli.training.optimizer import make_optimizer, search_training


class SearchMemory:
    """Saves the state of a search now and then, and when a signal asks to stop.

    Args:
        run: whose directory it is.
        stop: tells whether a signal came.
        minutes: between two saves.
        note: told when the newest state is damaged.
        stage: of the search.
    """

    def __init__(
        self,
        run: RunDirectory,
        stop: StopRequest,
        minutes: float,
        note: Callable[[str], None] = lambda _: None,
        stage: Stage = "search",
    ) -> None:
        self.run, self.stop, self.minutes = run, stop, minutes
        self._file = run.search_states[stage]
        self._note, self._stage = note, stage
        self._saved_at = time.monotonic()
        self._random: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        """What was kept before.

        Raises:
            RunDirectoryError: damaged.
        """
        kept = distributed.from_first(lambda: self._file.load(self._note))
        if kept is None:
            return None
        if self._stage == "search" or not self.run.search_states["search"].exists():
            self._note(
                resuming(self.run, "the search" if self._stage == "search" else "the fit of the proxy")
            )
        randoms = kept["ranks"]
        self._random = randoms[distributed.index()] if len(randoms) == distributed.count() else None
        state: dict[str, Any] = kept["search"]
        return state

    def offer(self, state: Callable[[], dict[str, Any]], *, milestone: bool = False) -> None:
        """Keep ``state()`` if it is time, or at a ``milestone``.

        Raises:
            Interrupted: a signal asked to stop.
        """
        due = distributed.first() and time.monotonic() - self._saved_at > 60 * self.minutes
        if not distributed.any_of(due or milestone or bool(self.stop.signal)):
            return
        kept = {"search": state(), "ranks": distributed.gathered(random_state())}
        if distributed.first():
            self.run.save(self._file, kept)
        self._saved_at = time.monotonic()
        self.check()

    def check(self) -> None:
        """Stop if a signal asked for it.

        Raises:
            Interrupted: one did.
        """
        stop_if_asked(self.stop, self.run)

    def restore_random(self) -> None:
        """Put the random numbers back to where they were when the state was kept."""
        if self._random is not None:
            set_random_state(self._random)


Count = Annotated[int, Field(ge=0)]


class LayerRow(BaseModel):
    """What the picture of a policy needs of a layer; there is more beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    macs: Count
    bops: Count
    pinned: bool


class FrontRow(BaseModel):
    """A line of the table of a front."""

    model_config = ConfigDict(extra="allow", frozen=True)

    budget_bops: Count | None
    budget_bytes: Count | None
    bops: Count
    size_bytes: Count
    top1: float
    on_front: bool
    searcher: str
    uniform: str | None
    chosen: bool


class FrontTable(BaseModel):
    """The front of a search."""

    model_config = ConfigDict(extra="allow", frozen=True)

    images: Count
    float_top1: float | None
    points: list[FrontRow]


class SearchResults(BaseModel):
    """What is shown of a search; there is more beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str
    searcher: str
    policy: dict[str, LayerBits]
    layers: list[LayerRow]
    bops: Count
    size_bytes: Count
    budget_bops: Count | None
    budget_bytes: Count | None
    seconds: float
    scoring_top1: float | None
    front: FrontTable | None = None
    artifacts: dict[str, str]

    @model_validator(mode="after")
    def _of_one_network(self) -> Self:
        if {row.name for row in self.layers} != set(self.policy):
            raise ValueError("policy and layers are not of one network")
        return self


@deterministic_if_requested
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
        What ``--json`` prints.

    Raises:
        SaqError: anything the user can act on; a search under way stays in ``run_dir``.
    """
    with process_group(config.run.device, lambda: check_search(config, files=not resume)) as device:
        return _on(device, config, run_dir, resume, overwrite, progress if distributed.first() else SILENT)


def _on(
    device: torch.device, config: RunConfig, run_dir: Path, resume: bool, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Each rank on its own device."""
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
        know_images(run, asked.images)
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
        with deferred_interrupts() as stop:
            memory = SearchMemory(run, stop, minutes, progress.note, "proxy")
            fit_proxy(asked.searched, asked.images, config, progress, memory)
            memory.check()
    posed = pose(config, asked, statistics, progress)
    with deferred_interrupts() as stop:
        memory = SearchMemory(run, stop, minutes, progress.note)
        searched = find_bits(config, posed, memory)
        memory.check()  # a signal may have come where nothing was offered
    return searched


def check_search(config: RunConfig, *, images: bool = True, files: bool = True) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Args:
        config: of the search.
        images: whether it needs images; if not, those that are named must be there nevertheless.
        files: whether weights must be there; not where a search is resumed, which may have ended.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    section, problems = config.quantization, Problems()
    problems.attempt(check_model, config.model, files=files and config.search.proxy is None)
    data = config.data if config.search.proxy is None else proxy_data(config)
    if images or data.path is not None:
        problems.attempt(check_images, data, "train", files=files)
    if section.bits is not None or section.policy is not None:
        problems.add(
            ConfigError("--bits and --policy give the bits, so there is nothing to search: remove them")
        )
    elif section.bops is None and section.size is None:
        problems.add(ConfigError("no budget was given: give --budget 34G, --size 5MB, or both"))
    problems.attempt(check_bits, section, files=False)
    problems.attempt(make_searcher, config)
    problems.attempt(scheme_of(config).check)
    problems.attempt(make_optimizer, nn.Linear(1, 1, device="meta"), search_training(config))
    problems.attempt(check_device, config.run.device)
    check_builds(problems, config.model)
    problems.check()


def prepare_search(
    config: RunConfig, device: torch.device, progress: Progress
) -> tuple[Network, Images | None]:
    """The network and its training images; with a proxy its images are not needed, nor are published weights."""
    attention = config.quantization.quantize_attention
    if config.search.proxy is not None:
        section = config.model.model_copy(update={"pretrained": False})
        network = wrap_and_trace(load_float(section, SILENT), quantize_attention=attention)
        return network, None
    if config.model.new_head:
        seed_everything(config.run.seed)
    loaded = load_float(config.model, progress)
    images = images_for(config, loaded, device, progress)
    network = wrap_and_trace(loaded, quantize_attention=attention)
    network.model.to(device)
    return network, images


def images_for(config: RunConfig, loaded: LoadedModel, device: torch.device, progress: Progress) -> Images:
    """The training images that a search without a proxy looks at."""
    return Images.training_alone(
        config.data, classes_of(loaded), loaded.preprocessing, device, config.run.seed, progress
    )


def keep_search(searched: Searched, config: RunConfig, run: RunDirectory) -> dict[str, Any]:
    """Write policy, figures and pictures; what ``--json`` prints."""
    count, widths = config.search.pareto, config.quantization.candidates
    results = searched.to_dict()  # by all ranks, as it may have to be scored
    front = pareto(searched, count, widths) if count else None
    return distributed.from_first(lambda: _write(searched, results, front, run))


def _write(
    searched: Searched, results: dict[str, Any], front: Front | None, run: RunDirectory
) -> dict[str, Any]:
    costs = searched.posed.problem.space.costs
    write_text(run.policy_path, searched.policy.to_json())
    files = draw_policy(
        searched.policy,
        costs,
        run.path / "policy",
        f"Bits of {searched.policy.model}, found by searcher {searched.searcher}",
    )
    if front is not None:
        files += write_front(front, run.path) + draw_front(front, run.path / "pareto")
    results["front"] = None if front is None else to_table(front)
    artifacts = {"policy": str(run.policy_path), "search": str(run.search_path)}
    results |= {"run_dir": str(run.path), "artifacts": artifacts | {path.name: str(path) for path in files}}
    kept = {"schema_version": 1, "saq_version": __version__, **results}
    kept["configurations"] = [
        {
            "choice": list(s.choice),
            "bops": s.cost.bops,
            "size_bytes": s.cost.size,
            "top1": s.top1,
            "loss": s.loss,
        }
        for s in searched.found.scored
    ]
    write_text(run.search_path, json_text(kept, indent=2) + "\n")
    return results


def pareto(searched: Searched, count: int, widths: Sequence[int]) -> Front:
    """The front of a search, all its points calibrated."""
    score = searched.found.score
    if score is None:
        score = Scorer(replace(searched.posed.problem, model=searched.posed.searched.model))
    with SILENT.task("", 0) as task:
        scoring = searched.posed.problem.images.scoring
        in_float = evaluate(
            searched.posed.searched.model.eval(), scoring, task, device=searched.posed.problem.device
        )
    return find_front(
        searched.posed.problem, searched.found, count, searched.searcher, score, widths, in_float.top1
    )
