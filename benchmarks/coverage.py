"""Run every step of saq on every family of timm and torchvision.

    python benchmarks/coverage.py --out coverage                  the smallest member of every family
    python benchmarks/coverage.py --out coverage vgg11 timm/xcit_nano_12_p8_224     these networks
    python benchmarks/coverage.py --out coverage --table          write docs/models.md and saqcli/models/coverage.csv

Networks have random weights (no download), their native input size, and batch norms estimated on a few images;
parameters that start at zero are filled, so that signals and gradients flow. Each network runs in its own process with
limits of time and memory; networks with a complete record in the output folder are not run again.
"""

import argparse
import contextlib
import copy
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
CATALOGUE = ROOT / "saqcli" / "models" / "catalogue.csv"
IMAGES, STEP_IMAGES = 8, 2
PAGE = os.sysconf("SC_PAGE_SIZE")
COVERAGE = ROOT / "saqcli" / "models" / "coverage.csv"
PAGE_OF_MODELS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- coverage -->", "<!-- end of coverage -->"


# One network, in its own process ------------------------------------------------------------------------------


class Record:
    """The results of a network, written after every stage."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.facts = path, {"model": name, "stage": "build"}

    def add(self, stage: str, **facts: Any) -> None:
        """Add the results of the last stage, and the name of the next one, ``stage``."""
        self.facts |= facts | {"stage": stage}
        _write(self.path, self.facts)


def _write(path: Path, facts: dict[str, Any]) -> None:
    """Write a record atomically."""
    from saqcli.serialization import write_text

    write_text(path, json.dumps(facts, indent=1))


def try_out(name: str, path: Path) -> None:
    """Run all stages on one network and record the result."""
    import torch

    record, started = Record(path, name), time.perf_counter()
    torch.manual_seed(0)
    try:
        _stages(name, record)
        record.add("done", problem=None)
    except Exception as error:  # any error is a result of the table
        text = " ".join(str(error).split())[:400]
        record.add(record.facts["stage"], problem=f"{type(error).__name__}: {text}")
        traceback.print_exc()
    record.add(record.facts["stage"], seconds=round(time.perf_counter() - started))


def _stages(name: str, record: Record) -> None:
    import torch
    from torch.nn import functional as F

    from saqcli.api.costs import unquantized
    from saqcli.config import ModelSection
    from saqcli.export import ModelMetadata
    from saqcli.pipelines.setup import load_float, wrap_and_trace
    from saqcli.progress import SILENT
    from saqcli.quant import convert
    from saqcli.quant.bits import BitConfig, LayerBits
    from saqcli.quant.calibration import fit, observe
    from saqcli.quant.convert import Scheme
    from saqcli.quant.layer import quantized_layers
    from saqcli.training.minimizers import MINIMIZERS, MicroBatch
    from saqcli.verify.publish import export_verified
    from saqcli.verify.verdict import natural

    heads = {"num_classes": 100} if name.startswith(WITHOUT_CLASSIFIER) else {}
    loaded = load_float(ModelSection(name=name, pretrained=False, **heads), SILENT)
    model, size = loaded.model, loaded.preprocessing.input_size
    images = natural(IMAGES, size, torch.Generator().manual_seed(0))
    _wake(model)
    _settle(model, images)
    _teach(model, images)
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
        wrapped_is_equal=_same(
            before, after, exactly="MultiheadAttention" not in {t.kind for t in traced.layers.values()}
        ),
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
    perturbed = _perturbed(_train(model), images[:STEP_IMAGES])

    def loss(*, ascent: bool = False) -> torch.Tensor:
        return _loss(model, images[:STEP_IMAGES])

    before_step = copy.deepcopy(model.state_dict())
    base = torch.optim.Adafactor(
        [m.latent_weight() for m in layers.values()], lr=0.01
    )  # steps relative to weights
    MINIMIZERS["saq"](model, base, rho=0.1).step([[MicroBatch(loss, 1.0)]])
    changed = {
        layer for layer, module in layers.items() if not torch.equal(module.latent_weight(), latent[layer])
    }
    still = [layer for layer in layers if layer not in changed and layer not in silent]
    untouched = [layer for layer, moved in perturbed.items() if not moved and layer not in silent]
    record.add(
        "export", unchanged=still, unperturbed=untouched, silent_in_float=sorted(set(silent) & set(layers))
    )
    model.load_state_dict(before_step)
    model.eval()

    facts = ModelMetadata(
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


def _same(before: Any, after: Any, *, exactly: bool) -> bool:
    """Whether outputs are equal bit for bit, or up to rounding if torch's fused attention was decomposed."""
    import torch

    return bool(torch.equal(before, after)) or (
        not exactly and float((before - after).abs().max()) < 1e-4 * float(before.abs().max())
    )


def _counts(values: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def _wake(model: Any) -> None:
    """Fill parameters that start near zero and block the signal: last norms, gains, scales of residual branches."""
    import torch

    for (
        module
    ) in model.modules():  # a branch that is dropped for both images of a step would have no gradient
        for rate in ("drop_prob", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or parameter.numel() == 0 or parameter.abs().max() > 1e-3:
                continue
            if parameter.dim() <= 1 or parameter.numel() == max(parameter.shape):
                parameter.fill_(0.5)
            else:
                parameter.normal_(std=0.02)


def _settle(model: Any, images: Any) -> None:
    """Estimate batch norms on images: with their initial statistics, activations vanish."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(images)
    model.eval()


def _teach(model: Any, images: Any) -> None:
    """Fit the last layer so that it distinguishes the images.

    With random weights the logits of all images are nearly equal. A single rounding would then decide which class is
    the best, and comparisons of runtimes would be meaningless.
    """
    import torch

    inputs: dict[Any, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda module, given: inputs.update({module: given[0]}))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    with torch.no_grad():
        classes = model(images).shape[1]
        for handle in handles:
            handle.remove()
        for head in (module for module in inputs if len(module.weight) == classes):
            features = inputs[head]
            if isinstance(head, torch.nn.Conv2d):
                features = features.flatten(2).transpose(1, 2)
            features = features.reshape(len(images), -1, features.shape[-1]).mean(1).double()
            centred = features - features.mean(0)
            gram = centred @ centred.T
            ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(images))
            weight = torch.linalg.solve(gram + ridge, centred).float()
            head.weight[: len(images)] = weight.reshape(head.weight[: len(images)].shape)
            head.weight[len(images) :] *= 0.1 * weight.std() / head.weight.std()


def _train(model: Any) -> Any:
    """Training mode except for batch norms, since the statistics of two images differ from those of calibration."""
    import torch

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def _loss(model: Any, images: Any) -> Any:
    """Cross-entropy with label smoothing, so that no gradient is exactly zero for confident logits."""
    import torch
    from torch.nn import functional as F

    return F.cross_entropy(model(images), torch.arange(len(images)), label_smoothing=0.1)


def _zero_gradients(model: Any, images: Any) -> list[str]:
    """Modules whose weight has no gradient in the float model."""
    _train(model)
    _loss(model, images).backward()
    model.eval()
    silent = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.any()):
            silent.append(name.rpartition(".")[0])
    model.zero_grad()
    return silent


def _perturbed(model: Any, images: Any) -> dict[str, bool]:
    """For every layer, whether SAQ's ascent perturbs it."""
    from saqcli.quant.layer import frozen_batch_stats, quantized_layers
    from saqcli.training.perturbation import PerturbedSet

    subject = PerturbedSet(model)
    with frozen_batch_stats(model):
        _, gradients = subject.gradients(lambda: _loss(model, images))
    ascent = subject.ascent(gradients, 0.1, "deviation")
    names = list(quantized_layers(model))
    return {name: bool(e.any()) for name, e in zip(names, ascent.weights, strict=True)}


# All networks ------------------------------------------------------------------------------------------------


def smallest() -> list[str]:
    """The smallest member of every family in the catalogue, sorted by size."""
    from saqcli.models.libraries import ZOOS

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
    """Run all networks without a complete record, ``jobs`` at a time."""
    waiting = [name for name in names if not _ended(_record(out, name))]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    print(f"{len(names)} networks, {len(waiting)} to run", file=sys.stderr)
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
            if not _ended(_record(out, name)):
                _stop(process, _record(out, name), "died")
            del running[name]
            print(_line(out, name), file=sys.stderr)


def _record(out: Path, name: str) -> Path:
    return out / f"{name.replace('/', '-')}.json"


def _ended(record: Path) -> bool:
    """Whether the record is complete; that of an interrupted process is not."""
    return record.is_file() and "problem" in json.loads(record.read_text())


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
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    facts = json.loads(record.read_text()) if record.is_file() else {"stage": "build"}
    _write(record, facts | {"problem": why})


def _line(out: Path, name: str) -> str:
    path = _record(out, name)
    facts = json.loads(path.read_text()) if path.is_file() else {"problem": "died", "stage": "build"}
    return f"{name:45} {facts['stage']:9} {facts.get('seconds', '?'):>4} s  {failure(facts) or 'ok'}"


# Results -------------------------------------------------------------------------------------------------------


def records(out: Path) -> Iterator[dict[str, Any]]:
    """All complete records."""
    for path in sorted(out.glob("[!.]*.json")):
        facts = json.loads(path.read_text())
        if "problem" in facts:
            yield facts


def failure(facts: dict[str, Any]) -> str | None:
    """The first failure in a record; None if there is none."""
    if facts.get("problem"):
        return str(facts["problem"])
    for key, title in (("unchanged", "a step leaves"), ("unperturbed", "SAQ does not perturb")):
        if facts[key]:
            return f"{title} {len(facts[key])} layers, such as {facts[key][0]}"
    if not facts["policy_round_trip"]:
        return "the policy does not come back as it was written"
    if not facts["wrapped_is_equal"]:
        return "wrapping alone changes the outputs"
    if not facts["cosine"] > 0.9:
        return f"8 bits give logits of cosine {facts['cosine']:.3f}"
    return None


def write_tables(out: Path) -> None:
    """Write the table in ``docs/models.md``, between its marks, and ``saqcli/models/coverage.csv``."""
    with CATALOGUE.open() as file:
        families = {row["name"]: row["family"] for row in csv.DictReader(file)}
    lines, verdicts = [], []
    for facts in sorted(records(out), key=lambda facts: (facts["model"].partition("/")[0], facts["model"])):
        library, _, name = facts["model"].partition("/")
        family, verdict = families[facts["model"]], failure(facts) or "ok"
        if facts["model"] in smallest():
            verdicts.append((library, family, facts["model"], verdict))
        lines.append(f"| {library} | {family} | {name} | " + " | ".join(_cells(facts, verdict)) + " |")
    head = "library family network layers weights MACs cosine W4A4 result".split()
    table = [f"| {' | '.join(head)} |", "|--" * len(head) + "|", *lines]
    before, _, rest = PAGE_OF_MODELS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = "\n".join([before + BEGIN, "", *table, "", END + after])
    PAGE_OF_MODELS.write_text(text, encoding="utf-8")
    with COVERAGE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("library", "family", "model", "verdict"))
        writer.writerows(sorted(verdicts))
    print(
        f"{len(lines)} networks, {sum(verdict == 'ok' for *_, verdict in verdicts)} families without a fault"
    )


def _cells(facts: dict[str, Any], verdict: str) -> list[str]:
    if facts.get("layers") is None:
        return ["", "", "", "", "", verdict]
    reasons = _counts(entry["reason"] for entry in facts["float"])
    left = "; ".join(
        f"{count} {'operation stays' if count == 1 else 'operations stay'} in floating point: {reason}"
        for reason, count in sorted(reasons.items())
    )
    cosine = f"{facts['cosine']:.4f}" if "cosine" in facts else ""
    return [
        str(facts["layers"]),
        f"{100 * facts['weight_share']:.1f} %",
        f"{100 * facts['mac_share']:.1f} %",
        cosine,
        f"{facts['bops_w4a4'] / 1e9:.2f} G",
        f"{verdict}; {left}" if left else verdict,
    ]


def main() -> None:
    """Run the networks, or write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--gibibytes", type=float, default=10)
    parser.add_argument("--table", action="store_true", help="write the results into docs and package")
    parser.add_argument("--quick", action="store_true", help="the five smallest networks")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        try_out(args.one, _record(args.out, args.one))
        return
    if args.table:
        write_tables(args.out)
        return
    names = args.models or smallest()[: 5 if args.quick else None]
    run_all(names, args.out, args.jobs, args.seconds, args.gibibytes)
    bad = [facts for name in names if failure(facts := json.loads(_record(args.out, name).read_text()))]
    if args.json:
        print(json.dumps({"records": [json.loads(_record(args.out, name).read_text()) for name in names]}))
        return
    print(f"{len(names) - len(bad)} of {len(names)} went through everything")


if __name__ == "__main__":
    main()
