"""Unusual modules: each goes through the whole pipeline, stays in floating point, or is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import saqcli
from saqcli.api.costs import unquantized
from saqcli.config import ModelSection
from saqcli.errors import UnsupportedModel
from saqcli.export import EXPORTERS, ModelMetadata
from saqcli.export.restore import restore
from saqcli.export.safetensors import restore_structure
from saqcli.models import networks
from saqcli.models.load import ModelSpec, build_architecture, load_model
from saqcli.models.networks import NetworkEntry
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.quant import calibration, convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.training.minimizers import MINIMIZERS, MicroBatch
from saqcli.verify.publish import export_verified
from saqcli.verify.verdict import synthetic_batches
from tests.support.sweeps import sweep

SIZE, CLASSES, WIDTH = (3, 8, 8), 4, 4
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


class Net(nn.Module):
    """A convolution, the unusual module, and a classifier."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.middle, self.fc = middle, nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.middle(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def conv(kind: Any = nn.Conv2d, **options: Any) -> Any:
    return kind(WIDTH, WIDTH, 3, 1, 1, **options)


def norm() -> nn.Module:
    return nn.BatchNorm2d(WIDTH)


class Half(nn.Module):
    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, w: Tensor) -> Tensor:
        return w * self.factor


def parametrized(layer: Any, *names: str) -> Any:
    for name in names:
        parametrize.register_parametrization(layer, name, Half())
    return layer


def pruned(layer: Any, times: int = 1) -> Any:
    for _ in range(times):
        prune.l1_unstructured(layer, "weight", 0.25)  # type: ignore[no-untyped-call]
    return layer


class Cast(nn.Module):
    """A layer of another dtype in a float32 network."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).float()  # type: ignore[no-any-return]


class Named(nn.Module):
    """Layers with given names, in sequence."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.order = names
        for name in names:
            self.add_module(name, conv())

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = F.relu(getattr(self, name)(x))
        return x


def conv_with(name: str, value: Any) -> Any:
    """A convolution with an attribute, buffer or child of that name."""
    layer = conv()
    layer.register_buffer(name, value) if isinstance(value, Tensor) else setattr(layer, name, value)
    return layer


class Computed(nn.Conv2d):
    """A layer whose weight is a property."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.raw = nn.Parameter(self._parameters.pop("weight").data)  # type: ignore[union-attr]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw * 0.5


class Assigned(nn.Conv2d):
    """A layer whose forward creates its weight."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.raw = nn.Parameter(self._parameters.pop("weight").data)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        self.weight = self.raw * 2
        return super().forward(x)


class Attended(nn.Module):
    """Attention whose weights are used."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(WIDTH, 2, batch_first=True), options

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        mixed, weights = self.attention(tokens, tokens, tokens, **self.options)
        mixed = mixed * weights.reshape(n, -1, height * width, height * width).amax((1, 2))[..., None]
        return mixed.transpose(1, 2).reshape(n, c, height, width)  # type: ignore[no-any-return]


class Stateful(nn.Conv2d):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def lazy() -> nn.Module:
    net = Net(nn.Sequential(nn.LazyConv2d(WIDTH, 3, 1, 1), nn.LazyBatchNorm2d()))
    net.fc = nn.LazyLinear(CLASSES)
    return net


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


class Odd(NamedTuple):
    """A network, why one of its layers stays in floating point, and the note printed."""

    build: Callable[[], nn.Module]
    left: str = ""
    note: str = ""
    layers: int = 3


FOLDED = "parametrization or pruning of middle folded into plain weights"
RESERVED = "a name reserved for quantization"
ODD = {
    "plain": Odd(lambda: Net(conv())),
    "weight_norm": Odd(lambda: Net(parametrizations.weight_norm(conv())), note=FOLDED),
    "spectral_norm": Odd(lambda: Net(parametrizations.spectral_norm(conv())), note=FOLDED),
    "orthogonal": Odd(lambda: Net(parametrizations.orthogonal(conv())), note=FOLDED),
    "old weight_norm": Odd(lambda: Net(old_weight_norm(conv())), note=FOLDED),
    "old spectral_norm": Odd(lambda: Net(old_spectral_norm(conv())), note=FOLDED),
    "own parametrization": Odd(lambda: Net(parametrized(conv(), "weight", "bias")), note=FOLDED),
    "chained": Odd(lambda: Net(parametrized(parametrizations.weight_norm(conv()), "weight")), note=FOLDED),
    "of a norm": Odd(lambda: Net(nn.Sequential(conv(), parametrized(norm(), "weight"))), note="middle.1 folded"),
    "of frozen": Odd(lambda: Net(frozen(parametrized(conv(), "weight"))), note=FOLDED),
    "of attention": Odd(lambda: parametrized_attention(), note="middle.attention folded", layers=4),
    "pruned": Odd(lambda: Net(pruned(conv())), note=FOLDED),
    "pruned twice": Odd(lambda: Net(pruned(conv(), 2)), note=FOLDED),
    "pruned direction": Odd(
        lambda: Net(prune.l1_unstructured(old_weight_norm(conv()), "weight_v", 0.5)), note=FOLDED
    ),
    "bfloat16": Odd(lambda: Net(Cast(conv(), torch.bfloat16)), note="middle.layer is quantized in float32"),
    "float16": Odd(lambda: Net(Cast(conv(), torch.float16)), note="returns float16 as before"),
    "float64": Odd(lambda: Net(Cast(conv(), torch.float64)), note="returns float64 as before"),
    "float64 norm": Odd(lambda: Net(nn.Sequential(conv(), Cast(norm(), torch.float64)))),
    "all float64": Odd(lambda: Net(conv()).double()),
    "all bfloat16": Odd(lambda: Net(conv()).bfloat16()),
    "lazy": Odd(lazy),
    "frozen": Odd(lambda: Net(frozen(conv()))),
    "spaces": Odd(lambda: Net(Named("my conv", "my conv 2", "my%20conv")), layers=5),
    "our names": Odd(lambda: Net(Named("weight", "bias", "codes", "step", "input_quantizer", "products")), layers=8),
    "signs": Odd(lambda: Net(Named("a/b", "<c>", "é", "w[0]", "*")), layers=7),
    "attribute": Odd(lambda: Net(conv_with("step", 3))),
    "buffer codes": Odd(lambda: Net(conv_with("codes", torch.ones(2))), f"'codes', {RESERVED}", layers=2),
    "buffer step": Odd(lambda: Net(conv_with("step", torch.ones(2))), f"'step', {RESERVED}", layers=2),
    "child quantizer": Odd(
        lambda: Net(conv_with("input_quantizer", nn.ReLU())), f"'input_quantizer', {RESERVED}", layers=2
    ),
    "attribute bits": Odd(lambda: Net(conv_with("bits", 8)), f"'bits', {RESERVED}", layers=2),
    "property": Odd(lambda: Net(conv(Computed)), "its weight is not a plain parameter", layers=2),
    "assigned": Odd(lambda: Net(conv(Assigned)), "its weight is not a plain parameter", layers=2),
    "attention weights": Odd(lambda: Net(Attended()), layers=4),
    "weights of heads": Odd(lambda: Net(Attended(average_attn_weights=False)), layers=4),
}  # fmt: skip
REFUSED = {
    "scripted": (lambda: Net(torch.jit.script(conv())), "middle is a TorchScript module"),
    "scripted function": (lambda: Net(nn.Sequential(conv(), torch.jit.script(nn.ReLU()))), "middle.1 is a Torch"),
    "lazy": (lambda: Net(nn.LazyConv2d(WIDTH, 3)), "middle.weight is lazy"),
    "meta": (lambda: Net(conv().to("meta")), "middle.weight is on the meta device"),
    "half norm": (lambda: Net(Cast(norm(), torch.bfloat16)), "middle.layer.weight is in half precision"),
    "extra state": (lambda: Net(conv(Stateful)), "middle._extra_state of the network's state is a dict"),
    "line break": (lambda: Net(Named("my\nconv")), r"'middle.my\nconv' has a line break"),
}  # fmt: skip


def parametrized_attention() -> nn.Module:
    net = Net(Attended())
    parametrized(net.middle.attention, "in_proj_weight")
    return net


def opened(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Network, nn.Module]:
    """The network, wrapped and traced, and an unwrapped copy."""

    def build(num_classes: int, in_chans: int) -> nn.Module:
        torch.manual_seed(0)  # lazy layers are initialized after this
        return ODD[name].build()

    entry = NetworkEntry(build, CLASSES, "", (0.5,) * 3, (0.5,) * 3, SIZE)
    monkeypatch.setitem(networks.NETWORKS, "odd", entry)
    before = load_model(ModelSpec("saq/odd", pretrained=False)).model
    loaded = load_float(ModelSection(name="saq/odd", pretrained=False), SILENT)
    return wrap_and_trace(loaded), before


def images(count: int = 8) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def quantized(network: Network) -> ModelMetadata:
    """Quantize to 4 bits, take one SAQ step, and return the metadata."""
    model, x = network.model, images()
    statistics = calibration.observe(model, [x])
    signed = {name: found.signed for name, found in statistics.items()}
    policy = network.costs.uniform(network.name, LayerBits(weight=4, activation=4))
    convert.install(model, Scheme(), policy, signed)
    calibration.fit(model, statistics)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    labels = torch.arange(len(x)) % CLASSES
    batch = MicroBatch(lambda *, ascent=False: F.cross_entropy(model(x), labels), 1.0)
    MINIMIZERS["saq"](model.train(), optimizer, rho=0.1).step([[batch]])
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert "fc.weight" in moved
    assert all(value.isfinite().all() for value in model.parameters())
    with torch.no_grad():
        model.eval()(x)  # as runs do: tensors assigned in a forward have no gradient afterwards
    return ModelMetadata(
        saq_version=saqcli.__version__,
        build=network.loaded.build,
        preprocessing=network.loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=Scheme(),
        signed=signed,
        routed=network.traced.routed,
    )


@pytest.mark.parametrize("name", ODD)
def test_odd_modules_train_save_and_resume(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = ODD[name]
    network, before = opened(name, monkeypatch)
    left = unquantized(network.traced)
    assert len(network.traced.layers) == odd.layers
    assert [row["name"] for row in left] == (["middle"] if odd.left else [])
    assert all(odd.left in row["reason"] and row["macs"] > 0 for row in left)
    assert any(odd.note in note for note in ["", *network.loaded.notes])
    assert bool(network.loaded.notes) == bool(odd.note)
    loose = 2e-2 if "16" in name else 1e-5
    with torch.no_grad():
        expected = before(images())
        torch.testing.assert_close(network.model(images()), expected, atol=loose, rtol=loose)

    facts = quantized(network)
    with torch.no_grad():
        answers = network.model(images())
    EXPORTERS["safetensors"]().export(network.model, images(), path := tmp_path / "model.safetensors", facts)
    resumed = build_architecture(facts.build)
    restore_structure(resumed, facts)
    resumed.load_state_dict(network.model.state_dict())
    with torch.no_grad():
        assert torch.equal(resumed.eval()(images()), answers)
        assert torch.equal(restore(path)[0](images()), answers)
    assert torch.equal(resumed.fc.weight, network.model.fc.weight)  # type: ignore[union-attr, arg-type]


EVERY_TIME = {
    "weight_norm",
    "old spectral_norm",
    "pruned",
    "bfloat16",
    "spaces",
    "weights of heads",
    "buffer codes",
}


@pytest.mark.parametrize(
    ("name", "style"),
    sweep(
        [(name, style) for name in ODD for style in ("qdq", "exact")],
        lambda name, style: (
            name in EVERY_TIME and (style == "qdq" or name in ("bfloat16", "weights of heads"))
        ),
    ),
)
def test_odd_modules_are_exported(
    name: str, style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if style == "exact" and ODD[name].left:
        pytest.skip("style exact needs every convolution quantized")
    network, _ = opened(name, monkeypatch)
    facts = quantized(network)
    batches = synthetic_batches(network.loaded.preprocessing)[:1]
    path = tmp_path / "model.onnx"
    verdict = export_verified(network.model, facts, path, style, batches, 1, SILENT)
    assert verdict.verified
    assert not math.isnan(verdict.max_abs_diff)
    if style == "exact":
        assert verdict.max_abs_diff == 0


@pytest.mark.parametrize("name", REFUSED)
def test_untraceable_models_are_refused(name: str) -> None:
    build, said = REFUSED[name]
    with pytest.raises(UnsupportedModel) as caught:
        convert.wrap(build())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pruned_weights_stay_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    network, before = opened("pruned", monkeypatch)
    pruned_away = before.middle.weight == 0  # type: ignore[union-attr]
    assert pruned_away.sum() == round(0.25 * pruned_away.numel())  # type: ignore[union-attr, operator, arg-type]
    statistics = calibration.observe(network.model, [images()])
    signed = {key: found.signed for key, found in statistics.items()}
    policy = network.costs.uniform(network.name, LayerBits(weight=4, activation=4))
    convert.install(network.model, Scheme(weight_grid="zero"), policy, signed)
    calibration.fit(network.model, statistics)
    quantized_weight = network.model.middle.quantized_weight()  # type: ignore[union-attr, operator]
    assert not quantized_weight[pruned_away].any()
    assert torch.equal(network.model.middle.latent_weight() == 0, pruned_away)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("options", [
    {}, {"average_attn_weights": False}, {"attn_mask": torch.full((6, 6), -torch.inf).triu(1)},
    {"key_padding_mask": torch.tensor([[False] * 5 + [True]] * 2)},
])  # fmt: skip
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_weights_match_torch(options: dict[str, Any], batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x = torch.randn(2, 6, 8)
    x = x if batch_first else x.transpose(0, 1)
    _, expected = attention(x, x, x, **options)
    convert.wrap(nn.Sequential(attention))
    _, weights = attention(x, x, x, **options)
    torch.testing.assert_close(weights, expected)
    assert attention(x, x, x, need_weights=False, **options)[1] is None
