"""Bitwise comparison of the files of two runs, and likely causes of differences.

Times and paths differ in every run and are ignored. For a difference the comparison reports where it is first and how
large it is; as likely causes it lists every recorded circumstance that differs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saqcli.errors import RunDirectoryError, SaqError
from saqcli.export.restore import restore
from saqcli.export.safetensors import Content, read_content
from saqcli.models.weights import sha256_of
from saqcli.quant.bits import BitConfig
from saqcli.runs.directory import RunDirectory
from saqcli.runs.manifest import RunManifest, computed
from saqcli.serialization import json_text, parse_json, printable
from saqcli.units import counted

VARYING = {"run_dir", "artifacts", "seconds", "saq_version", "policy"}  # or compared separately
_SHOWN = 60  # maximum characters of a value in a message
CIRCUMSTANCES = {  # field to its name in messages
    "device": "device",
    "cpu": "processor",
    "instructions": "vector instructions",
    "threads": "number of threads",
    "processes": "number of processes",
}


class Difference(NamedTuple):
    """A difference between two runs.

    Attributes:
        what: ``policy``, ``search``, ``front``, ``metrics``, ``weights``, ``onnx`` or ``figures``.
        detail: one line: the first difference, from the first run to the second.
    """

    what: str
    detail: str


@dataclass(frozen=True)
class Record:
    """The files of a finished run, read and checked.

    Attributes:
        run: its directory.
        manifest: of the run.
        policy: bits by layer.
        texts: name to parsed JSON: ``search`` and ``front`` if they exist, ``metrics`` as a list.
        content: of ``model.safetensors``; None for a search.
        onnx: SHA-256 of every ONNX file, by name; empty for a search, or if a run wrote none.
    """

    run: RunDirectory
    manifest: RunManifest
    policy: BitConfig
    texts: dict[str, Any]
    content: Content | None
    onnx: dict[str, str]

    @classmethod
    def read(cls, run: RunDirectory) -> "Record":
        """Read the directory of a finished run.

        Raises:
            SaqError: a file is missing or damaged; the message names it.
        """
        manifest = run.manifest()
        whole = manifest.verb == "quantize"
        texts: dict[str, Any] = {"figures": manifest.results} if whole else {}
        for name, path in (("search", run.search_path), ("front", run.path / "pareto.json")):
            if path.is_file() or (name == "search" and not whole):
                texts[name] = _parse_json(_read_text(path), str(path))
        if whole:
            lines = _read_text(run.metrics_path).splitlines()
            texts["metrics"] = [
                _parse_json(line, f"{run.metrics_path} line {number}") for number, line in enumerate(lines, 1)
            ]
        files = _onnx_files(run) if whole else []
        for path in (run.safetensors_path, *files):
            if whole and not path.is_file():
                raise RunDirectoryError(f"{path} is missing, so the run cannot be compared: restore the file")
        return cls(
            run,
            manifest,
            parse_json(BitConfig, _read_text(run.policy_path), str(run.policy_path), RunDirectoryError),
            texts,
            read_content(run.safetensors_path) if whole else None,
            {path.name: sha256_of(path) for path in files},
        )

    def changed(self) -> list[str]:
        """Names of files that changed after the run, as far as their hashes or contents are recorded."""
        found = [
            name
            for name, hashed in self.manifest.artifacts.items()
            if not (self.run.path / name).is_file() or sha256_of(self.run.path / name) != hashed
        ]
        if self.policy.model_dump()["layers"] != self.manifest.results.get("policy"):
            found.append("policy.json")
        return found


def compare(one: Record, other: Record) -> tuple[list[str], list[Difference]]:
    """The compared items, and the differences among them."""
    details: dict[str, str | None] = {
        "policy": first_difference(one.policy.model_dump()["layers"], other.policy.model_dump()["layers"]),
    }
    for name in ("search", "front", "metrics", "figures"):
        if name in one.texts or name in other.texts:
            details[name] = _texts_differ(one.texts.get(name), other.texts.get(name), name)
    if one.content or other.content:
        details["weights"] = _weights_differ(one, other)
    if one.onnx or other.onnx:
        details["onnx"] = None if one.onnx == other.onnx else _onnx_differ(one, other)
    return list(details), [Difference(what, printable(detail)) for what, detail in details.items() if detail]


def first_difference(one: object, other: object, place: str = "") -> str | None:
    """The first difference between two JSON trees, such as ``layers.fc.weight: 4 -> 8``; None if they are equal.

    Example:
        >>> first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]})
        'a[1].b: 2 -> 3'
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in one or key not in other:
                return f"{inner} is in the {'first' if key in one else 'second'} only"
            found = first_difference(one[key], other[key], inner)
            if found:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list):
        for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            found = first_difference(mine, theirs, f"{place}[{index}]")
            if found:
                return found
        return (
            None if len(one) == len(other) else f"{place}: {len(one):,} -> {counted(len(other), 'element')}"
        )
    texts = [json_text(value) for value in (one, other)]  # NaN equals NaN here, and 1 differs from 1.0
    return None if texts[0] == texts[1] else f"{place}: {' -> '.join(printable(t, _SHOWN) for t in texts)}"


def _without_best(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without the keys that earlier versions lack; they follow from the other lines and the model."""
    return {key: value for key, value in line.items() if key not in ("best_epoch", "best_top1", "agreement")}


def _texts_differ(one: Any, other: Any, name: str) -> str | None:
    if name == "metrics":
        one, other = ([_without_best(line) for line in lines] for lines in (one, other))
        for number, (mine, theirs) in enumerate(zip(one, other, strict=False), 1):
            found = first_difference(_without_varying(mine), _without_varying(theirs))
            if found:
                epoch = f", epoch {mine['epoch']}" if "epoch" in mine else ""
                return f"line {number} ({mine.get('phase')}{epoch}): {found}"
        return None if len(one) == len(other) else f"{len(one)} lines -> {len(other)}"
    if one is None or other is None:
        return f"it exists in the {'first' if other is None else 'second'} run only"
    if name == "figures":  # versions of saq may record different keys
        one, other = (_without_seconds(tree) for tree in (one, other))
        one, other = (
            {key: tree[key] for key in tree if key in one and key in other} for tree in (one, other)
        )
    return first_difference(_without_varying(one), _without_varying(other))


def _without_varying(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in VARYING}


def _without_seconds(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a run without the time of each stage."""
    stages = tree.get("stages")
    if not isinstance(stages, list):
        return dict(tree)
    rows = [_without_varying(row) if isinstance(row, dict) else row for row in stages]
    return {**tree, "stages": rows}


def _weights_differ(one: Record, other: Record) -> str | None:
    """Number of different tensors and values, and the largest difference; codes are compared as dequantized weights."""
    if one.content is None or other.content is None:
        return f"there is a model in the {'first' if other.content is None else 'second'} run only"
    stored = _differing(one.content.tensors, other.content.tensors)
    if not stored:
        return None
    try:
        states = [restore(each.run.safetensors_path)[0].state_dict() for each in (one, other)]
    except SaqError:  # perhaps another version: compare the stored tensors
        states = [dict(one.content.tensors), dict(other.content.tensors)]
    names = _differing(*states)
    numbers, most, where = 0, -1.0, ""
    for name in names:
        pair = [state.get(name) for state in states]
        if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            different = f"{len(names)} of {counted(len(states[0]), 'tensor')} differ"
            return f"{name} is missing in one, or has another shape; {different}"
        apart = (pair[0].double() - pair[1].double()).abs()
        numbers += int((apart != 0).sum())
        if apart.numel() and not apart.max() <= most:  # NaN counts as the largest
            most, where = float(apart.max()), name
    if not where:
        return f"{stored[0]} is stored as different bytes with the same meaning"
    total = sum(tensor.numel() for tensor in states[0].values())
    return (
        f"{len(names)} of {counted(len(states[0]), 'tensor')}, {numbers:,} of {counted(total, 'number')}; the largest "
        f"difference is {most:.3g}, in {where}"
    )


def _differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors whose bits differ."""
    names = [*one, *(name for name in other if name not in one)]
    return [
        name for name in names if name not in one or name not in other or not _same(one[name], other[name])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether type, shape and bits are equal: -0 differs from 0, and NaN may equal NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


def _onnx_files(run: RunDirectory) -> list[Path]:
    """The ONNX files that a finished run wrote, sorted by name; not those of later exports."""
    manifest = run.manifest()
    if not manifest.artifacts:  # written by an earlier version
        return [run.onnx_path]
    found = sorted(run.path / name for name in manifest.artifacts if name.endswith(".onnx"))
    written = manifest.results.get("artifacts")
    if not isinstance(written, dict):
        return found
    names = {Path(str(path)).name for path in written.values()}
    return [path for path in found if path.name in names]


def _onnx_differ(one: Record, other: Record) -> str:
    """Where different ONNX files differ: in weights, graph or metadata."""
    for name in dict.fromkeys([*one.onnx, *other.onnx]):
        if name not in one.onnx or name not in other.onnx:
            return f"there is a {name} in the {'first' if name in one.onnx else 'second'} run only"
    name = next(name for name in one.onnx if one.onnx[name] != other.onnx[name])
    found = _graphs_differ(*(record.run.onnx_path.with_name(name) for record in (one, other)))
    return found if len(one.onnx) == 1 else f"{name}: {found}"


def _graphs_differ(*paths: Path) -> str:
    import onnx

    tensors: list[dict[str, str]] = []
    described: list[dict[str, str]] = []
    for path in paths:
        try:
            model = onnx.load(str(path))
        except Exception as error:  # protobuf and onnx have their own classes
            return f"{path} cannot be read as ONNX: {printable(str(error), 200)}"
        kept = {
            tensor.name: tensor.SerializeToString(deterministic=True) for tensor in model.graph.initializer
        }
        tensors.append({name: hashlib.sha256(value).hexdigest() for name, value in kept.items()})
        described.append({entry.key: entry.value for entry in model.metadata_props})
    names = [name for name in tensors[0] if tensors[0][name] != tensors[1].get(name)]
    if names or len(tensors[0]) != len(tensors[1]):
        first = f", {names[0]} first" if names else ""
        return f"{len(names)} of {counted(len(tensors[0]), 'initializer')} differ{first}"
    found = first_difference(_parsed(described[0]), _parsed(described[1]))
    return f"the same initializers; {f'the metadata differ: {found}' if found else 'the graph differs'}"


def _parsed(described: Mapping[str, str]) -> dict[str, Any]:
    """Metadata as a tree, so that a message can name a key."""
    found: dict[str, Any] = {}
    for key, text in described.items():
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}): restore it") from None


def _parse_json(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RunDirectoryError(f"{source} is not a JSON object: restore it")
    return found


def versions_differ(one: RunManifest, other: RunManifest) -> dict[str, list[str | None]]:
    """The versions that differ: name to the earlier and the later version."""
    names = dict.fromkeys([*one.versions, *other.versions])
    pairs = {name: [one.versions.get(name), other.versions.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def explain_diff(before: Record, after: Record) -> list[str]:
    """Likely causes of a difference, one line each, the likeliest first; a single line if no recorded item differs."""
    found = [
        f"{record.run.path / name} was changed after the run"
        for record in (before, after)
        for name in record.changed()
    ]
    found += [
        f"different version of {name}: {then or 'none'} then, {now or 'none'} now"
        for name, (then, now) in versions_differ(before.manifest, after.manifest).items()
    ]
    found += [*_circumstances(before, after), *_inputs(before, after)]
    devices = {c.device.partition(" ")[0] for c in after.manifest.circumstances}
    if devices - {"cpu"} and not after.run.config().run.deterministic:
        found.append("a GPU adds in any order: run with `run.deterministic=True` to get the same bits")
    return found or ["nothing that is recorded differs"]


def _circumstances(before: Record, after: Record) -> list[str]:
    found = [
        f"the run in {record.run.path} was resumed under other circumstances (see its manifest.json)"
        for record in (before, after)
        if len(
            {c.model_copy(update={"directory": "", "training": None}) for c in record.manifest.circumstances}
        )
        > 1
    ]
    if not before.manifest.circumstances:
        return [*found, f"threads, processor and device of {before.run.path} are not recorded"]
    then, now = before.manifest.circumstances[0], after.manifest.circumstances[0]
    for field, name in CIRCUMSTANCES.items():
        pair = getattr(then, field), getattr(now, field)
        if pair[0] != pair[1]:
            found.append(f"different {name}: {pair[0]} then, {pair[1]} now")
    ways = computed(before.manifest.circumstances), computed(after.manifest.circumstances)
    if ways[0] != ways[1]:
        found.append(f"training was computed differently: {ways[0]} then, {ways[1]} now")
    return found


def _inputs(before: Record, after: Record) -> list[str]:
    """Differences in weights, images and the number of augmenting processes."""
    found = []
    old, new = before.run.config(), after.run.config()
    facts = [record.content.metadata for record in (before, after) if record.content]
    same_weights = len(facts) == 2 and facts[0].source_sha256 == facts[1].source_sha256
    if facts and not same_weights:
        hashes = [(each.source_sha256 or "none")[:12] for each in facts]
        found.append(f"different float weights: SHA-256 {hashes[0]}... then, {hashes[1]}... now")
    for split in before.manifest.images.keys() & after.manifest.images.keys():
        if before.manifest.images[split] != after.manifest.images[split]:
            found.append(f"different images for {'training' if split == 'train' else 'validation'}")
    floats = [record.texts.get("metrics", [{}])[:1] for record in (before, after)]
    counts = [line[0].get("images") if line else None for line in floats]
    if counts[0] != counts[1]:
        found.append(f"different images: {counts[0]} for validation then, {counts[1]} now")
    elif same_weights and floats[0] != floats[1] and not found:
        found.append("other images, most likely: the same float weights score differently on them")
    if old.data.workers != new.data.workers and new.data.augmentation != "none":
        found.append(
            f"different number of data-loading workers ({old.data.workers} then, {new.data.workers} now), each with "
            "its own augmentation"
        )
    return found
