"""Put every family of timm and torchvision through everything that saq does: which networks does "any" mean?

    python benchmarks/coverage.py --out coverage                  the smallest member of every family
    python benchmarks/coverage.py --out coverage vgg11 timm/xcit_nano_12_p8_224     these
    python benchmarks/coverage.py --out coverage --table          docs/models.md and saqcli/io/coverage.csv

Networks have random weights (no download), their native input size, and batch norms that have seen a few images;
parameters that start at zero are filled, so that signals and gradients flow. Every network runs in a process of its
own under a limit of time and memory; what is in DIR already is not run again.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "saqcli" / "io" / "catalogue.csv"
IMAGES, STEP_IMAGES = 8, 2
PAGE = os.sysconf("SC_PAGE_SIZE")


# One network, in a process of its own ------------------------------------------------------------------------


class Record:
    """What is known of a network so far, on disk after every stage."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.facts = path, {"model": name, "stage": "build"}

    def add(self, stage: str, **facts: Any) -> None:
        """Facts of a stage that is over, and the name of the one that begins."""
        self.facts |= facts | {"stage": stage}
        self.path.write_text(json.dumps(self.facts, indent=1))


def try_out(name: str, path: Path) -> None:
    """Everything, stage by stage."""
    import torch

    record, started = Record(path, name), time.perf_counter()
    torch.manual_seed(0)
    try:
        _stages(name, record)
        record.add("done", problem=None)
    except Exception as error:  # whatever it is, it is what the table has to tell
        text = " ".join(str(error).split())[:400]
        record.add(record.facts["stage"], problem=f"{type(error).__name__}: {text}")
        traceback.print_exc()
    record.add(record.facts["stage"], seconds=round(time.perf_counter() - started))


def _stages(name: str, record: Record) -> None:
    import torch
    from torch.nn import functional as F

    from saqcli.algorithms.exporters import ModelFacts
    from saqcli.algorithms.minimizers import MINIMIZERS, MicroBatch
    from saqcli.config import ModelSection
    from saqcli.progress import SILENT
    from saqcli.quant import convert
    from saqcli.quant.bits import BitConfig, LayerBits
    from saqcli.quant.calibrate import fit, observe
    from saqcli.quant.convert import Scheme
    from saqcli.quant.layers import quantized_layers
    from saqcli.workflows.export import export_verified
    from saqcli.workflows.profile import unquantized
    from saqcli.workflows.setup import load_float, wrap_and_trace
    from saqcli.workflows.synthetic import natural

    heads = {"num_classes": 100} if name.startswith(WITHOUT_CLASSIFIER) else {}
    loaded = load_float(ModelSection(name=name, pretrained=False, **heads), SILENT)
    model, size = loaded.model, loaded.preprocessing.input_size
    images = natural(IMAGES, size, torch.Generator().manual_seed(0))
    _wake(model)
    _settle(model, images)
    parameters = sum(p.numel() for p in model.parameters())
    record.add("wrap", name=loaded.name, parameters=parameters, input_size=list(size))

    silent = _zero_gradients(model, images[:STEP_IMAGES])
    with torch.inference_mode():
        before = torch.cat([model(image) for image in images.split(STEP_IMAGES)])
    network = wrap_and_trace(loaded)
    with torch.inference_mode():
        after = torch.cat([model(image) for image in images.split(STEP_IMAGES)])
    costs, traced = network.costs, network.traced
    weights = sum(layer.weight_count for layer in costs.layers if layer.stored)
    record.add(
        "quantize",
        layers=len(costs.layers),
        kinds=_counts(layer.kind for layer in costs.layers),
        weight_share=weights / parameters,
        macs=costs.macs,
        mac_share=sum(layer.macs for layer in costs.layers) / costs.macs,
        float=unquantized(traced),
        routed=sorted(set(traced.routed)),
        bops_w4a4=costs.bops(costs.uniform(loaded.name, LayerBits(weight=4, activation=4))),
        wrapped_is_equal=bool(torch.equal(before, after)),
    )

    policy = costs.uniform(loaded.name, LayerBits(weight=8, activation=8))
    round_trip = BitConfig.model_validate_json(policy.to_json()) == policy
    statistics = observe(model, images.split(STEP_IMAGES))
    signed = {layer: facts.signed for layer, facts in statistics.items()}
    convert.install(model, Scheme(), policy, signed)
    fit(model, statistics)
    with torch.inference_mode():
        quantized = torch.cat([model(image) for image in images.split(STEP_IMAGES)])
    mean = before.mean(0)
    record.add(
        "step",
        policy_round_trip=round_trip,
        cosine=F.cosine_similarity(before, quantized).mean().item(),
        centred_cosine=F.cosine_similarity(before - mean, quantized - mean).mean().item(),
    )

    layers = quantized_layers(model)
    latent = {layer: module.latent_weight().detach().clone() for layer, module in layers.items()}
    perturbed = _perturbed(model.train(), images[:STEP_IMAGES])
    labels = torch.arange(STEP_IMAGES)

    def loss(*, ascent: bool = False) -> torch.Tensor:
        return F.cross_entropy(model(images[:STEP_IMAGES]), labels)

    statistics_before = {key: value.clone() for key, value in model.state_dict().items()}
    norm = perturbed.pop("")
    base = torch.optim.SGD([m.latent_weight() for m in layers.values()], lr=0.05 / max(norm, 1e-12))
    MINIMIZERS["saq"](model, base, rho=0.1).step([[MicroBatch(loss, 1.0)]])
    changed = {
        layer for layer, module in layers.items() if not torch.equal(module.latent_weight(), latent[layer])
    }
    still = [layer for layer in layers if layer not in changed and layer not in silent]
    untouched = [layer for layer, moved in perturbed.items() if not moved and layer not in silent]
    record.add(
        "export", unchanged=still, unperturbed=untouched, silent_in_float=sorted(set(silent) & set(layers))
    )
    model.load_state_dict(statistics_before)
    model.eval()

    facts = ModelFacts(
        saq_version="coverage",
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=Scheme(),
        signed=signed,
        routed=traced.routed,
    )
    batches = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images.split(STEP_IMAGES)]
    for style, ending in (("safetensors", "safetensors"), ("qdq", "onnx")):
        path = record.path.with_suffix(f".{ending}")
        try:
            verdict = export_verified(model, facts, path, style, batches, len(batches), SILENT)
            record.add("export", **{style: verdict.figures(), f"{style}_bytes": path.stat().st_size})
        finally:
            for left in record.path.parent.glob(f"{record.path.stem}*"):
                if left.suffix in (".onnx", ".safetensors", ".data") or left.name.endswith(".verdict.json"):
                    left.unlink()


WITHOUT_CLASSIFIER = ("timm/gemma4_vit", "timm/deepseek_vit", "timm/qwen3_vit")


def _counts(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def _wake(model: Any) -> None:
    """Fill what starts at zero or so near to it that nothing passes: last norms, gains, scales of residual branches."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.numel() == 0 or parameter.abs().max() > 1e-3:
                continue
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                parameter.fill_(0.5)
            else:
                parameter.normal_(std=0.02)


def _settle(model: Any, images: Any) -> None:
    """Let batch norms see images: at their initial statistics, activations vanish on the way."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(images[: IMAGES // 2])
    model.eval()


def _zero_gradients(model: Any, images: Any) -> list[str]:
    """Modules whose weight gets no gradient in the float model either."""
    import torch
    from torch.nn import functional as F

    model.train()
    F.cross_entropy(model(images), torch.arange(len(images))).backward()
    model.eval()
    silent = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.any()):
            silent.append(name.rpartition(".")[0])
    model.zero_grad()
    return silent


def _perturbed(model: Any, images: Any) -> dict[str, Any]:
    """Which layers SAQ's ascent moves; under the empty name, the norm of their gradients."""
    import torch
    from torch.nn import functional as F

    from saqcli.algorithms.sharpness import PerturbedSet
    from saqcli.quant.layers import frozen_batch_stats, quantized_layers

    subject = PerturbedSet(model)
    with frozen_batch_stats(model):
        _, gradients = subject.gradients(lambda: F.cross_entropy(model(images), torch.arange(len(images))))
    ascent = subject.ascent(gradients, 0.1, "deviation")
    names = list(quantized_layers(model))
    moved: dict[str, Any] = {name: bool(e.any()) for name, e in zip(names, ascent.weights, strict=True)}
    total = sum(float(g.square().sum()) for g in gradients[: len(names)] if g is not None)
    return moved | {"": total**0.5}


# All networks ------------------------------------------------------------------------------------------------


def smallest() -> list[str]:
    """The smallest member of every family, by the catalogue; from the smallest to the largest."""
    from saqcli.io.zoos import ZOOS

    best: dict[tuple[str, str], tuple[int, str]] = {}
    with CATALOGUE.open() as file:
        for row in csv.DictReader(file):
            library, _, name = row["name"].partition("/")
            if library == "saq" or name.startswith("test_"):
                continue
            without = ZOOS[library].default_classes(name) < 1 and not row["name"].startswith(
                WITHOUT_CLASSIFIER
            )
            if without:
                continue
            key, size = (library, row["family"]), int(row["parameters"])
            best[key] = min(best.get(key, (size, row["name"])), (size, row["name"]))
    return [name for _, name in sorted(best.values())]


def run_all(names: list[str], out: Path, jobs: int, seconds: float, gibibytes: float) -> None:
    """Every network that has no record yet, ``jobs`` at a time."""
    waiting = [name for name in names if not _record(out, name).is_file()]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    print(f"{len(names)} networks, {len(waiting)} to run", flush=True)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = (_start(name, out), time.monotonic())
        time.sleep(0.5)
        for name, (process, began) in list(running.items()):
            peak = _resident(process.pid)
            if process.poll() is None and time.monotonic() - began > seconds:
                _stop(process, _record(out, name), f"over the limit of {seconds:.0f} s")
            elif process.poll() is None and peak > gibibytes * 2**30:
                _stop(process, _record(out, name), f"over the limit of {gibibytes} GiB")
            elif process.poll() is None:
                continue
            del running[name]
            print(_line(out, name), flush=True)


def _record(out: Path, name: str) -> Path:
    return out / f"{name.replace('/', '-')}.json"


def _start(name: str, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--out", str(out), "--one", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with _record(out, name).with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def _stop(process: subprocess.Popen[bytes], record: Path, why: str) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    facts = json.loads(record.read_text()) if record.is_file() else {"stage": "build"}
    record.write_text(json.dumps(facts | {"problem": why}, indent=1))


def _line(out: Path, name: str) -> str:
    path = _record(out, name)
    facts = json.loads(path.read_text()) if path.is_file() else {"problem": "died", "stage": "build"}
    return f"{name:45} {facts['stage']:9} {facts.get('seconds', '?'):>4} s  {failure(facts) or 'ok'}"


# What came out -----------------------------------------------------------------------------------------------


def records(out: Path) -> Iterator[dict[str, Any]]:
    """All of them, by library and name."""
    for path in sorted(out.glob("*.json")):
        yield json.loads(path.read_text())


def failure(facts: dict[str, Any]) -> str | None:
    """What is wrong, or None."""
    if facts.get("problem"):
        return str(facts["problem"])
    for key, title in (("unchanged", "a step leaves"), ("unperturbed", "SAQ does not perturb")):
        if facts[key]:
            return f"{title} {len(facts[key])} layers, such as {facts[key][0]}"
    if not facts["policy_round_trip"]:
        return "the policy does not come back as it was written"
    if not facts["wrapped_is_equal"]:
        return "wrapping alone changes the outputs"
    if not facts["cosine"] > 0.95:
        return f"8 bits give logits of cosine {facts['cosine']:.3f}"
    return None


def main() -> None:
    """Run, or tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--gibibytes", type=float, default=10)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        try_out(args.one, _record(args.out, args.one))
        return
    names = args.models or smallest()
    run_all(names, args.out, args.jobs, args.seconds, args.gibibytes)
    bad = [facts for name in names if failure(facts := json.loads(_record(args.out, name).read_text()))]
    print(f"{len(names) - len(bad)} of {len(names)} went through everything")


if __name__ == "__main__":
    main()
