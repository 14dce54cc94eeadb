"""Writes down what the command line answers on a tiny network: one JSON of hashes and figures.

    python golden_runs.py OUT.json

Nothing but the command line is used, so that the same file runs with any version of the package on ``PYTHONPATH``: two
versions that compute the same write the same JSON. Images are scikit-learn's digits, weights random numbers of NumPy's
oldest generator, which is frozen. Left out is what is another in every run: times, paths, versions, dates. Of an ONNX
file the graph counts and not the notes of its writer, of a safetensors file the tensors and the bits of its layers.
"""

import hashlib
import io
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

MODEL, TRANSFORMER = "timm/test_resnet", "timm/test_vit"
SIDE, DEPTH = 32, 2  # pixels, blocks of the transformer
TRAIN, VAL = 10, 4  # images of a class
SEARCHERS = {
    "uniform": (),
    "error": (),
    "hawq": ("search.options.hawq.samples=2", "search.options.hawq.images=32"),
    "sensitivity": (),
    "random": ("search.options.random.draws=4",),
    "samq": ("search.epochs=1", "search.options.samq.draws=3", "search.options.samq.warmup=0"),
    "asga": ("search.epochs=1", "search.options.asga.step_images=16"),
}
STYLES = ("qdq", "qdq-vnni", "exact", "trt", "qonnx")
VOLATILE = ("circumstances", "command", "environment", "created", "started")  # and seconds, and versions
INTERRUPTED_STEP = 3


def main(out: Path) -> None:
    """Run all cases and write their records to ``out``."""
    os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):  # no path in a record depends on where it is
        text = json.dumps(records(), indent=1, sort_keys=True)
    out.write_text(text + "\n", encoding="utf-8")


def records() -> dict[str, Any]:
    """What every case left, by the case's name."""
    write_digits(Path("digits"))
    write_weights(MODEL, Path("float.safetensors"))
    write_weights(TRANSFORMER, Path("transformer.safetensors"))
    found: dict[str, Any] = {}
    found["quantize-saq"] = quantize("saq", "--method", "saq")
    found["quantize-qat"] = quantize("qat", "--method", "qat", "--no-export")
    found["quantize-resumed"] = interrupted_and_resumed()
    attention = ("--quantize-attention", "--model-kwargs", f"depth={DEPTH}")
    found["quantize-transformer"] = quantize("transformer", *attention, model=TRANSFORMER)
    for searcher, settings in SEARCHERS.items():
        found[f"search-{searcher}"] = search(searcher, settings)
    for style in STYLES:
        answer = saq(
            "export", "saq", "--onnx", f"{style}.onnx", "--style", style, *IMAGES, "--verify-images", "10"
        )
        found[f"export-{style}"] = {"json": answer, **onnx_record(Path(f"{style}.onnx"))}
    answer = saq("analyze", "saq", "--images", "20", "--starts", "1", "--iterations", "3", *ANALYZED)
    found["analyze"] = {"json": answer, **folder_record(Path("analysis"))}
    found["rerun"] = {"json": saq("rerun", "search-error", "--run-dir", "again")}
    found["rerun"] |= folder_record(Path("again"))
    found["eval"] = {"json": saq("eval", "saq", *IMAGES)}
    found["profile"] = {"json": saq("profile", "saq")}
    return found


IMAGES = ("--data", "digits", "--workers", "0")
TRAINED = (
    *("--bops", "w4a4", "--searcher", "error", "--method", "saq", "--epochs", "1", "--lr", "0.02"),
    *("--set", "data.verify_images=10"),
)
ANALYZED = (
    *("--sharpness", "--eigenvalue", "--flips", "--distributions", "--trace", "--samples", "2"),
    *("--data", "digits", "--workers", "0", "--batch-size", "20", "--out", "analysis"),
)


def options(model: str) -> list[str]:
    """Name the network, its weights and images; seed and device."""
    weights = "float.safetensors" if model == MODEL else "transformer.safetensors"
    return [
        *(model, "--weights", weights, "--num-classes", "10", "--in-chans", "1", "--input-size", str(SIDE)),
        *("--mean", "0.3", "--std", "0.4", *IMAGES, "--batch-size", "20", "--seed", "1", "--device", "cpu"),
        *("--set", "data.augmentation=none", "--set", "data.calibration_images=40"),
    ]


def quantize(run: str, *more: str, model: str = MODEL) -> dict[str, Any]:
    """Under a budget, with an epoch of training and an ONNX file."""
    return {
        "json": saq("quantize", *options(model), *TRAINED, *more, "--run-dir", run),
        **folder_record(Path(run)),
    }


def search(searcher: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """Under the same budget."""
    run = f"search-{searcher}"
    assigned = [part for each in settings for part in ("--set", each)]
    given = (*options(MODEL), "--budget", "w4a4", "--searcher", searcher, "--scoring-images", "20", *assigned)
    return {"json": saq("search", *given, "--run-dir", run), **folder_record(Path(run))}


def interrupted_and_resumed() -> dict[str, Any]:
    """A run that gets Ctrl-C within an optimizer's step, whoever takes it, and goes on: it ends as a whole one does."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = []

    def interrupt(*_: object) -> None:
        steps.append(1)
        if len(steps) == INTERRUPTED_STEP:
            signal.raise_signal(signal.SIGINT)

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell lets what it runs behind its back ignore it
    hook = register_optimizer_step_post_hook(interrupt)
    try:
        saq("quantize", *options(MODEL), *TRAINED, "--no-export", "--quiet", "--run-dir", "resumed", code=130)
    finally:
        hook.remove()
    if len(steps) != INTERRUPTED_STEP:
        raise SystemExit(f"the run that was to stop at step {INTERRUPTED_STEP} took {len(steps)}")
    return {"json": saq("quantize", "--run-dir", "resumed", "--resume"), **folder_record(Path("resumed"))}


def saq(*arguments: str, code: int = 0) -> Any:
    """What a command prints with ``--json``, less what is volatile."""
    from saqcli.cli import main as command_line

    sys.argv = ["saq", *arguments, "--json"]
    told = io.StringIO()
    ended: object = 0
    with redirect_stdout(told):
        try:
            command_line()
        except SystemExit as end:
            ended = end.code or 0
    if ended != code:
        raise SystemExit(f"saq {' '.join(arguments)} ended with {ended}")
    return steady(json.loads(told.getvalue())) if not code else None


def volatile(key: str) -> bool:
    """Whether what stands under it is another in every run, or with every version."""
    return key in VOLATILE or "second" in key or "version" in key


def steady(value: Any) -> Any:
    """``value`` without what is volatile, and paths as seen from here."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not volatile(key)}
    if isinstance(value, list):
        return [steady(each) for each in value]
    return value.replace(os.getcwd(), ".") if isinstance(value, str) else value


def folder_record(folder: Path) -> dict[str, Any]:
    """Which files a run left, and what is in those that hold results."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found: dict[str, Any] = {"files": [path.relative_to(folder).as_posix() for path in paths]}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        record = READERS.get(path.name) or READERS.get(path.suffix)
        if record:
            found[name] = record(path)
    return found


def onnx_record(path: Path) -> dict[str, Any]:
    """Hash of the graph, and what it is made of."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    digest = hashlib.sha256()
    for each in (*model.opset_import, *graph.input, *graph.output, *graph.node):
        if isinstance(each, onnx.NodeProto):
            each.ClearField("doc_string")
            each.ClearField("metadata_props")
        digest.update(each.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda each: each.name):
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        digest.update(onnx.numpy_helper.to_array(tensor).tobytes())
    return {
        "sha256": digest.hexdigest(),
        "operators": dict(Counter(node.op_type for node in graph.node)),
        "opsets": {each.domain: each.version for each in model.opset_import},
        "initializers": len(graph.initializer),
        "metadata": {each.key: _parsed(each.value) for each in model.metadata_props},
    }


def safetensors_record(path: Path) -> dict[str, Any]:
    """Hash of the tensors, and their shapes; what it says beside them."""
    from safetensors.numpy import safe_open

    digest = hashlib.sha256()
    shapes: dict[str, str] = {}
    with safe_open(path, "numpy") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            shapes[name] = f"{tensor.dtype} {list(tensor.shape)}"
            digest.update(f"{name} {shapes[name]}".encode() + tensor.tobytes())
        noted = file.metadata() or {}
    return {
        "sha256": digest.hexdigest(),
        "tensors": shapes,
        "metadata": {k: _parsed(v) for k, v in noted.items()},
    }


def _parsed(text: str) -> Any:
    try:
        return steady(json.loads(text))
    except ValueError:
        return text


def json_record(path: Path) -> Any:
    """What it holds, less what is volatile."""
    return steady(json.loads(path.read_text(encoding="utf-8")))


def lines_record(path: Path) -> Any:
    """Likewise, line by line."""
    return [steady(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest_record(path: Path) -> Any:
    """Likewise; files count by their contents, see above."""
    found = json_record(path)
    return found | {"artifacts": sorted(found["artifacts"])}


def verdict_record(path: Path) -> Any:
    """Likewise."""
    return {key: each for key, each in json_record(path).items() if key != "sha256"}


def policy_record(path: Path) -> dict[str, Any]:
    """Hash of the bytes, and the bits."""
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "holds": json_record(path)}


READERS: dict[str, Callable[[Path], Any]] = {
    "policy.json": policy_record,
    "manifest.json": manifest_record,
    "model.verdict.json": verdict_record,
    ".json": json_record,
    ".jsonl": lines_record,
    ".safetensors": safetensors_record,
    ".onnx": onnx_record,
}


def write_digits(folder: Path) -> None:
    """Write the first digits of every class as ``folder/{train,val}/CLASS/INDEX.png``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: Counter[int] = Counter()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        seen[label] += 1
        if seen[label] > TRAIN + VAL:
            continue
        path = folder / ("train" if seen[label] <= TRAIN else "val") / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype("uint8"))
        image.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(path)


def write_weights(model: str, path: Path) -> None:
    """Write weights of ``model`` that are random, and the same everywhere."""
    import numpy as np
    import timm
    import torch
    from safetensors.torch import save_file

    size = {"img_size": SIDE, "depth": DEPTH} if model == TRANSFORMER else {}
    net = timm.create_model(model.partition("/")[2], num_classes=10, in_chans=1, **size)
    random = np.random.RandomState(0)
    state = net.state_dict()
    for name, tensor in state.items():
        if name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() > 1:
            deviation = (2 / tensor[0].numel()) ** 0.5
            values = (random.standard_normal(tuple(tensor.shape)) * deviation).astype("float32")
            tensor.copy_(torch.from_numpy(values))
    save_file(state, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
