"""Tar files of images, generated as timm's ``wds/`` reads them."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

Sample = tuple[str, dict[str, bytes]]  # key, and contents by extension


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write one file."""
    with tarfile.open(path, "w") as archive:
        for key, files in samples:
            for extension, content in files.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def write_shards(folder: Path, splits: dict[str, Sequence[Sequence[Sample]]]) -> Path:
    """Write splits of these numbers of files, and their ``_info.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for split, shards in splits.items():
        files = [f"{split}-{number:04d}.tar" for number in range(len(shards))]
        for file, samples in zip(files, shards, strict=True):
            write_shard(folder / file, samples)
        lengths = [len(samples) for samples in shards]
        info[split] = {
            "name": split,
            "filenames": files,
            "shard_lengths": lengths,
            "num_samples": sum(lengths),
        }
    (folder / "_info.json").write_text(json.dumps({"splits": info}))
    return folder


def shards_of_folder(folder: Path, target: Path, sizes: Sequence[int]) -> Path:
    """``folder/{train,val}/CLASS/*.png`` as shards of ``sizes`` images in turn, with classes mixed."""
    splits = {}
    for split, name in (("train", "train"), ("val", "validation")):
        classes = sorted(path.name for path in (folder / split).iterdir())
        samples = [
            (file.stem, {"png": file.read_bytes(), "cls": str(classes.index(file.parent.name)).encode()})
            for file in sorted((folder / split).glob("*/*.png"), key=lambda file: file.name)
        ]
        shards, rest, turn = [], samples, 0
        while rest:
            size = sizes[turn % len(sizes)]
            shards.append(rest[:size])
            rest, turn = rest[size:], turn + 1
        splits[name] = shards
    return write_shards(target, splits)
