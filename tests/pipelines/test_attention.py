"""``--quantize-attention`` in every command: profile, search, quantize, export, eval."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from saqcli.errors import SaqError
from saqcli.export.restore import restore
from saqcli.export.safetensors import read_content, restore_structure
from saqcli.quant.products import quantized_products
from tests.support.command_line import answer, last_error, saq

BLOCKS = 2  # of six: each has two products and is exported in every style
NETWORK = (
    *("timm/test_vit", "--no-pretrained", "--num-classes", 3, "--input-size", 32),
    *("--model-kwargs", f"depth={BLOCKS}"),
)


def network() -> nn.Module:
    found: nn.Module = timm.create_model("test_vit", num_classes=3, img_size=32, depth=BLOCKS)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured noise."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("noise")
    for split in ("train", "val"):
        for label in range(3):
            (path / split / f"class{label}").mkdir(parents=True)
            for number in range(6):
                pixels = generator.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 80
                Image.fromarray(pixels).save(path / split / f"class{label}" / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    options = ("--batch-size", 9, "--epochs", 1, "--workers", 0, "--run-dir", path)
    answer("quantize", *NETWORK, "--data", data, "--bits", 4, "--quantize-attention", *options)
    return path


def test_profile_counts_products_on_request() -> None:
    plain, counted = (
        answer("profile", *NETWORK, "--bits", "w8a4", *more) for more in ((), ("--quantize-attention",))
    )
    assert [row["bops"] for row in plain["products"]] == [None] * (2 * BLOCKS)
    assert counted["bops"] == plain["bops"] + sum(row["bops"] for row in counted["products"])
    assert all(row["bops"] == row["macs"] * 4 * 4 for row in counted["products"])
    assert {row["follows"] for row in counted["products"]} == {f"blocks.{i}.attn.qkv" for i in range(BLOCKS)}
    assert counted["macs"] == plain["macs"] + sum(row["macs"] for row in counted["products"])


@pytest.mark.parametrize("searcher", ["error", "sensitivity"])
def test_searched_policy_meets_the_budget(searcher: str, data: Path, tmp_path: Path) -> None:
    found = answer(
        *("search", *NETWORK, "--data", data, "--budget", "w4a4", "--quantize-attention", "--workers", 0),
        *("--searcher", searcher, "--run-dir", tmp_path / "run"),
    )
    policy = tmp_path / "run" / "policy.json"
    again = answer("profile", *NETWORK, "--policy", policy, "--quantize-attention")
    uniform = answer("profile", *NETWORK, "--bits", 4, "--quantize-attention")
    assert found["bops"] == again["bops"]
    assert 0.985 * uniform["bops"] <= found["bops"] <= uniform["bops"] == found["budget_bops"]


def test_exported_files_keep_the_products(run: Path, data: Path, tmp_path: Path) -> None:
    model, facts = restore(run / "artifacts" / "model.safetensors")
    found = quantized_products(model)
    assert list(found) == list(facts.products)
    assert len(found) == 2 * BLOCKS
    assert all(
        product.input_quantizer.bits == product.weight_quantizer.bits == 4 for product in found.values()
    )
    score = answer("eval", run, "--data", data)["top1"]
    assert answer("eval", run / "artifacts" / "model.onnx", "--data", data)["top1"] == score
    for style in ("exact", "trt", "qonnx"):
        verdict: dict[str, Any] = answer(
            *("export", run, "--style", style, "--onnx", tmp_path / f"{style}.onnx", "--data", data)
        )
        assert verdict["verified"]
        assert (
            verdict["layers"] >= (4 * BLOCKS + 2) + 4 * BLOCKS - 1
        )  # inputs of layers, operands of products


def test_deit_on_powers_of_two_is_exported_or_refused(data: Path, tmp_path: Path) -> None:
    """Random weights, balanced norms, products on tables of levels; the first layer is a convolution."""
    path = tmp_path / "run"
    network = ("timm/deit_tiny_patch16_224", "--no-pretrained", "--num-classes", 3, "--input-size", 32)
    options = ("--quantize-attention", "--balance-norms", "--activation-quantizer", "log2", "--bits", 4)
    images = ("--calibration", data / "train", "--set", "data.verify_images=2", "--workers", 0)
    found = answer("quantize", *network, "--model-kwargs", "depth=1", *options, *images, "--run-dir", path)
    assert found["top1"] is None
    model, _ = restore(path / "artifacts" / "model.safetensors")
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert len(quantized_products(model)) == 2
    assert answer("export", path, "--style", "qdq", "--onnx", tmp_path / "qdq.onnx")["verified"]
    for style in ("exact", "trt", "qonnx"):
        refused = saq("export", path, "--style", style, "--onnx", tmp_path / f"{style}.onnx", "--json")
        assert refused.exit_code == 1
        assert "uniform grids" in last_error(refused)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attnproducts.7",
        "blocks.0.attn..products.7",
        ".products.0",
        "blocks.products.0",  # a container
        "blocks.0.attn.qkv.products.0",  # a layer
        "blocks.0.attn.products.00",
        "blocks.0.attn.products.٣",
        "blocks.9.attn.products.0",
        "products",
    ],
)
def test_unknown_products_are_refused(name: str, run: Path) -> None:
    facts = read_content(run / "artifacts" / "model.safetensors").metadata
    signed = facts.signed | {f"{name}.left": True, f"{name}.right": True}
    products = facts.products | {name: "blocks.0.attn.qkv"}
    strange = facts.model_copy(update={"products": products, "signed": signed})
    with pytest.raises(SaqError, match="has no product"):
        restore_structure(network(), strange)
    with torch.device("meta"):
        fresh = network()
    restore_structure(fresh.to_empty(device="cpu"), facts)
