"""Why a run that was done again may differ: whatever is recorded of both and is not the same."""

from saqcli.io.manifest import RunManifest
from saqcli.workflows.comparison import Record

CIRCUMSTANCES = {  # field to what a person calls it
    "device": "device",
    "cpu": "processor",
    "instructions": "vector instructions",
    "threads": "number of threads",
    "processes": "number of processes",
}


def versions_differ(one: RunManifest, other: RunManifest) -> dict[str, list[str | None]]:
    """Name to the version then and now, where they are not the same."""
    names = dict.fromkeys([*one.versions, *other.versions])
    pairs = {name: [one.versions.get(name), other.versions.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def reasons(before: Record, after: Record) -> list[str]:
    """Likely ones, a line each, the likeliest first; one that says so where nothing is recorded."""
    found = [
        f"{record.run.path / name} was changed after the run"
        for record in (before, after)
        for name in record.changed()
    ]
    found += [
        f"another version of {name}: {then or 'none'} then, {now or 'none'} now"
        for name, (then, now) in versions_differ(before.manifest, after.manifest).items()
    ]
    found += [*_circumstances(before, after), *_inputs(before, after)]
    devices = {c.device.partition(" ")[0] for c in after.manifest.circumstances}
    if devices - {"cpu"} and not after.run.config().run.deterministic:
        found.append("a GPU adds in any order: run with --deterministic to get the same bits")
    return found or ["nothing that is recorded differs"]


def _circumstances(before: Record, after: Record) -> list[str]:
    found = [
        f"the run in {record.run.path} was resumed under other circumstances (see its manifest.json)"
        for record in (before, after)
        if len({c.model_copy(update={"directory": ""}) for c in record.manifest.circumstances}) > 1
    ]
    if not before.manifest.circumstances:
        return [*found, f"threads, processor and device of {before.run.path} are not recorded"]
    then, now = before.manifest.circumstances[0], after.manifest.circumstances[0]
    for field, called in CIRCUMSTANCES.items():
        pair = getattr(then, field), getattr(now, field)
        if pair[0] != pair[1]:
            found.append(f"another {called}: {pair[0]} then, {pair[1]} now")
    return found


def _inputs(before: Record, after: Record) -> list[str]:
    """Weights, images, and the processes that augment them."""
    found = []
    old, new = before.run.config(), after.run.config()
    facts = [record.content.facts for record in (before, after) if record.content]
    same_weights = len(facts) == 2 and facts[0].source_sha256 == facts[1].source_sha256
    if facts and not same_weights:
        hashes = [(each.source_sha256 or "none")[:12] for each in facts]
        found.append(f"other float weights: SHA-256 {hashes[0]}... then, {hashes[1]}... now")
    for split in before.manifest.images.keys() & after.manifest.images.keys():
        if before.manifest.images[split] != after.manifest.images[split]:
            found.append(f"other images for {'training' if split == 'train' else 'validation'}")
    floats = [record.texts.get("metrics", [{}])[:1] for record in (before, after)]
    counts = [line[0].get("images") if line else None for line in floats]
    if counts[0] != counts[1]:
        found.append(f"other images: {counts[0]} for validation then, {counts[1]} now")
    elif same_weights and floats[0] != floats[1] and not found:
        found.append("other images, most likely: the same float weights score otherwise on them")
    if old.data.workers != new.data.workers and new.data.augmentation != "none":
        found.append(
            f"another number of reading processes ({old.data.workers} then, {new.data.workers} now), each of which "
            "draws its own augmentation"
        )
    return found
