"""Write the tables of `saq models`: catalogue.csv and published.json.

    python benchmarks/catalogue.py

Both files are in `saqcli/models`. The parameters of every network are counted on the meta device, which takes minutes
for a thousand networks; input sizes and tags are read from timm and torchvision. Run the script again after an update
of these libraries: existing counts are kept, also those of an interrupted run, and removed networks are deleted.
"""

import argparse
import csv
import io
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from saqcli.errors import UnsupportedModel
from saqcli.models.catalogue import installed_version, read_library
from saqcli.models.libraries import ZOOS
from saqcli.models.load import build_architecture
from saqcli.serialization import write_text

PATH = Path(__file__).parents[1] / "saqcli" / "models" / "catalogue.csv"
PUBLISHED = PATH.with_name("published.json")
SECONDS_BETWEEN_SAVES = 10.0
CLASSES = 1000  # of networks without a classifier


def family_of(library: str, name: str) -> str:
    """The module that defines the network."""
    if library != "timm":
        import torchvision.models

        builder = torchvision.models.get_model_builder(name) if library == "torchvision" else None
        return builder.__module__.rpartition(".")[2] if builder else library
    from timm.models._registry import _model_to_module

    return str(_model_to_module[name])


def parameters(library: str, name: str) -> int:
    """Number of parameters, including the classifier."""
    zoo = ZOOS[library]
    build = {
        "name": f"{library}/{name}",
        "num_classes": zoo.default_classes(name) or CLASSES,
        "in_chans": 3,
        "kwargs": {},
    }
    try:
        with torch.device("meta"):
            model = build_architecture(build)
    except UnsupportedModel:  # torchvision's RegNets compute their widths with tensors
        model = build_architecture(build)
    return sum(parameter.numel() for parameter in model.parameters())


def write_published() -> None:
    """Write input sizes and tags of all libraries, one line per network; saq's networks have no version number."""
    libraries = []
    for library in ZOOS:
        version = json.dumps(None if library == "saq" else installed_version(library))
        networks = [
            f"{json.dumps(name)}: {json.dumps(weights)}" for name, weights in read_library(library).items()
        ]
        lines = ",\n".join(networks)
        libraries.append(f'"{library}": {{"version": {version}, "networks": {{\n{lines}\n}}}}')
    write_text(PUBLISHED, "{" + ",\n".join(libraries) + "}\n")


def write_rows(rows: list[dict[str, Any]]) -> None:
    """Replace the table of parameters atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", "family", "parameters"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(PATH, text.getvalue())


def main() -> None:
    """Add missing networks and remove unknown ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anew", action="store_true", help="count every network again")
    args = parser.parse_args()
    known = {}
    if PATH.is_file() and not args.anew:
        with PATH.open() as file:
            known = {row["name"]: row for row in csv.DictReader(file)}
    rows: list[dict[str, Any]] = []
    saved = time.monotonic()
    for library, zoo in ZOOS.items():
        for name in zoo.names():
            full = f"{library}/{name}"
            if full not in known:
                try:
                    count = parameters(library, name)
                except Exception as error:  # one network that cannot be built must not stop the others
                    print(f"{full}: {type(error).__name__}: {str(error)[:150]}", flush=True)
                    continue
                known[full] = {"name": full, "family": family_of(library, name), "parameters": count}
                print(f"{full} {count}", flush=True)
            rows.append(known[full])
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                write_rows(list(known.values()))
                saved = time.monotonic()
    write_rows(rows)
    write_published()
    print(f"{len(rows)} networks in {PATH} and {PUBLISHED}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
