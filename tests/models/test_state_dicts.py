"""Checkpoints of training scripts: the right one of several weight sets, without wrapper prefixes."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from saqcli.errors import ConfigError, CorruptArtifact, SaqError, WeightsMismatch
from saqcli.models import networks
from saqcli.models.load import LoadedModel, ModelSpec, load_model
from saqcli.models.networks import NetworkEntry

State = dict[str, Tensor]


class Tiny(nn.Module):
    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Module(nn.Module):
    """A network whose parameter names all begin like a wrapper's."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.module = Tiny(num_classes, in_chans)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, build in (("tiny", Tiny), ("inner", Module)):
        entry = NetworkEntry(build, 10, "", (0.5,) * 3, (0.5,) * 3, (3, 8, 8))
        monkeypatch.setitem(networks.NETWORKS, name, entry)


def weights(seed: int) -> State:
    torch.manual_seed(seed)
    return {
        name: torch.rand_like(x) if x.is_floating_point() else x for name, x in Tiny().state_dict().items()
    }


RAW, AVERAGED = weights(0), weights(1)


def under(prefix: str, state: State = RAW) -> State:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def swa() -> State:
    averaged = AveragedModel(Tiny())
    averaged.module.load_state_dict(AVERAGED)
    averaged.n_averaged.fill_(3)
    return averaged.state_dict()


def lightning(callback: str, key: str) -> dict[str, Any]:
    return {"state_dict": under("model"), "callbacks": {callback: {key: under("model", AVERAGED)}}}


def load(tmp_path: Path, content: Any, name: str = "saq/tiny", **spec: Any) -> LoadedModel:
    torch.save(content, path := tmp_path / "w.pth.tar")
    return load_model(ModelSpec(name, weights=path, **spec))


def has(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


N = torch.tensor(5)
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
TIMM = {"state_dict": RAW, "state_dict_ema": AVERAGED, "args": Namespace(lr=1), "optimizer": OPTIMIZER}
AVERAGES: dict[str, tuple[Any, str]] = {  # content, and the key selected
    "timm": (TIMM, "state_dict_ema"),
    "torchvision": ({"model": RAW, "model_ema": under("module", AVERAGED) | {"n_averaged": N}}, "model_ema"),
    "swa": ({"model_state_dict": RAW, "swa_model": swa()}, "swa_model"),
    "suffix": ({"net": RAW, "net_ema": AVERAGED}, "net_ema"),
    "basicsr": ({"params": RAW, "params_ema": AVERAGED}, "params_ema"),
    "ultralytics": ({"model": RAW, "ema": AVERAGED, "updates": 7}, "ema"),
    "nested": ({"model": RAW, "ema": {"module": AVERAGED, "updates": 7}}, "ema.module"),
    "lightning swa": (
        lightning("StochasticWeightAveraging", "average_model_state"),
        "callbacks.StochasticWeightAveraging.average_model_state",
    ),
    "lightning ema": (
        lightning("EMACallback{'decay': 0.99}", "ema_state_dict"),
        "callbacks.EMACallback{'decay': 0.99}.ema_state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", AVERAGES)
def test_averaged_weights_are_preferred(layout: str, tmp_path: Path) -> None:
    content, key = AVERAGES[layout]
    loaded = load(tmp_path, content)
    assert has(loaded.model, AVERAGED)
    assert f"averaged weights taken from {key!r}" in loaded.notes[0]
    assert "`model.weights_key`" in loaded.notes[0]
    raw = next(path for path in content if not path.startswith("ema"))
    assert repr(raw) in loaded.notes[0]
    assert has(load(tmp_path, content, weights_key=raw).model, RAW)
    assert has(load(tmp_path, content, weights_key=key).model, AVERAGED)


def test_uninitialized_average_is_noted(tmp_path: Path) -> None:
    """As torch.optim.swa_utils saves it before averaging starts."""
    never = swa() | {"n_averaged": torch.tensor(0)}
    loaded = load(tmp_path, {"model": RAW, "swa_model": never})
    assert "averaged weights (never updated: n_averaged is 0) taken from 'swa_model'" in loaded.notes[0]


@pytest.mark.parametrize("key", ["ema.shadow_params", "avg_model", "callbacks.EMA.ema_weights"])
def test_unnamed_averages_require_a_choice(key: str, tmp_path: Path) -> None:
    """torch_ema and diffusers save a list of tensors."""
    content: Any = list(AVERAGED.values())
    for part in reversed(key.split(".")):
        content = {part: content}
    with pytest.raises(
        ConfigError, match=rf"under '{key}', and raw weights under 'model'.*`model.weights_key=model`"
    ):
        load(tmp_path, {"model": RAW, **content})
    assert has(load(tmp_path, {"model": RAW, **content}, weights_key="model").model, RAW)


@pytest.mark.parametrize("content", [
    {"state_dict": RAW, "state_dict_ema": AVERAGED}, {"model": RAW, "model_ema": AVERAGED},
    {"state_dict": RAW, "state_dict_ema": None}, {"state_dict": AVERAGED, "model": RAW},
    {"state_dict_ema": AVERAGED, "model_ema": RAW, "state_dict": RAW}, RAW,
])  # fmt: skip
def test_selection_matches_timm(content: Any, tmp_path: Path) -> None:
    loaded = load(tmp_path, content)
    assert has(loaded.model, load_state_dict(str(tmp_path / "w.pth.tar")))  # type: ignore[arg-type]


def test_mmengine_averages_are_found(tmp_path: Path) -> None:
    content = {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": AVERAGED,
        "ema_state_dict": under("module"),
    }
    loaded = load(tmp_path, content)
    assert has(loaded.model, AVERAGED)
    assert "'ema_state_dict'" in loaded.notes[0]


def test_lightning_averages_are_found(tmp_path: Path) -> None:
    content = {
        "state_dict": under("model", AVERAGED),
        "current_model_state": under("model"),
        "averaging_state": {"n_averaged": N},
    }
    assert has(load(tmp_path, content).model, AVERAGED)


PREFIXED: dict[str, State] = {
    **{name: under(name) for name in ("model", "net", "module", "_orig_mod", "backbone", "network.encoder")},
    "compiled in parallel": under("module._orig_mod"),
    "lightning of compiled": under("model._orig_mod"),
    "averaged model": under("module") | {"n_averaged": N},
    "with a loss": under("model") | {"criterion.weight": torch.ones(10)},
    "average within": under("model") | under("ema.module", AVERAGED) | {"ema.decay": torch.tensor(0.9)},
}


@pytest.mark.parametrize("layout", PREFIXED)
def test_wrapper_prefixes_are_removed_and_noted(layout: str, tmp_path: Path) -> None:
    loaded = load(tmp_path, {"state_dict": PREFIXED[layout]})
    assert has(loaded.model, AVERAGED if layout == "average within" else RAW)
    assert len(loaded.notes) == 1
    prefix = next(name for name in PREFIXED[layout] if name.endswith("conv.weight")).removesuffix(
        "conv.weight"
    )
    assert f"prefix {'ema.module.' if layout == 'average within' else prefix!r}".replace("'", "") in (
        loaded.notes[0].replace("'", "")
    )


def test_prefix_of_the_network_is_kept(tmp_path: Path) -> None:
    loaded = load(tmp_path, Module().state_dict(), "saq/inner")
    assert loaded.notes == []
    assert next(iter(loaded.model.state_dict())) == "module.conv.weight"
    wrapped = load(tmp_path, under("module", under("module", RAW)), "saq/inner")
    assert has(wrapped.model, under("module", RAW))


def test_unhelpful_prefix_is_kept(tmp_path: Path) -> None:
    state = under("model")
    del state["model.fc.weight"]
    with pytest.raises(WeightsMismatch, match=r"1 missing .fc.weight"):
        load(tmp_path, state)
    with pytest.raises(WeightsMismatch, match=r"1 unexpected .extra.weight"):
        load(tmp_path, RAW | {"extra.weight": torch.ones(1)})
    with pytest.raises(WeightsMismatch, match=r"1 unexpected .extra.weight"):
        load(tmp_path, under("model", RAW | {"extra.weight": torch.ones(1)}))


def refusal(tmp_path: Path, kind: type[SaqError], content: Any, **spec: Any) -> str:
    with pytest.raises(kind) as caught:
        load(tmp_path, content, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_key_lists_the_valid_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, ConfigError, AVERAGES["timm"][0], weights_key="model")
    assert (
        "no tensors under `model.weights_key='model'`: choose from 'state_dict', 'state_dict_ema'" in message
    )
    assert "remove it" in refusal(tmp_path, ConfigError, RAW, weights_key="model")


def test_several_unknown_sets_require_a_choice(tmp_path: Path) -> None:
    content = {"student": RAW, "teacher": under("backbone", AVERAGED)}
    assert "'student', 'teacher'" in refusal(tmp_path, ConfigError, content)
    assert has(load(tmp_path, content, weights_key="teacher").model, AVERAGED)
    flat = under("module.encoder_q") | under("module.encoder_k", AVERAGED)
    assert "'module.encoder_q', 'module.encoder_k'" in refusal(tmp_path, ConfigError, {"state_dict": flat})
    for key in ("module.encoder_k", "state_dict.module.encoder_k"):
        assert has(load(tmp_path, {"state_dict": flat}, weights_key=key).model, AVERAGED)


def test_key_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`model\.weights=FILE`"):
        load_model(ModelSpec("saq/tiny", pretrained=False, weights_key="ema"))


NAMES = tuple("zero one two three four five six seven eight nine".split())
CLASS_LISTS: dict[str, Any] = {
    "class_to_idx": {name: index for index, name in reversed(list(enumerate(NAMES)))},
    "idx_to_class": dict(enumerate(NAMES)),
    "classes": list(NAMES),
    "class_names": NAMES,
    "args": Namespace(class_names=list(NAMES), lr=0.1),
    "hyper_parameters": {"lr": 0.1, "class_to_idx": {name: index for index, name in enumerate(NAMES)}},
    "meta": {"categories": list(NAMES), "task": "classification"},
}


@pytest.mark.parametrize("key", CLASS_LISTS)
def test_checkpoint_class_names_are_returned(key: str, tmp_path: Path) -> None:
    assert load(tmp_path, {"state_dict": RAW, key: CLASS_LISTS[key]}).class_names == NAMES


@pytest.mark.parametrize("value", [list(NAMES[:9]), {"a": 0, "b": 5}, [1] * 10, "0123456789", None])
def test_invalid_class_lists_are_ignored(value: Any, tmp_path: Path) -> None:
    assert load(tmp_path, {"state_dict": RAW, "classes": value}).class_names == ()


def test_safetensors_class_names_are_returned(tmp_path: Path) -> None:
    names = json.dumps({name: index for index, name in enumerate(NAMES)})
    save_file(RAW, path := tmp_path / "w.safetensors", metadata={"class_to_idx": names, "format": "pt"})
    assert load_model(ModelSpec("saq/tiny", weights=path)).class_names == NAMES


@pytest.mark.parametrize(("name", "value", "said"), [
    ("conv.weight", float("nan"), "conv.weight has NaN values (1 of 108)"),
    ("fc.bias", float("inf"), "fc.bias has infinite values (1 of 10)"),
    ("bn.running_mean", float("-inf"), "bn.running_mean has infinite values (1 of 4)"),
    ("bn.running_var", float("nan"), "bn.running_var has NaN values (1 of 4)"),
    ("bn.running_var", -1e-3, "bn.running_var has negative variances (1 of 4)"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_nan_weights_are_refused(
    name: str, value: float, said: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {key: x.to(dtype, copy=True) if x.is_floating_point() else x for key, x in RAW.items()}
    state[name].view(-1)[0] = value
    assert said in refusal(tmp_path, CorruptArtifact, {"model": state})
    assert said in refusal(tmp_path, CorruptArtifact, under("module", state))


def test_overflowing_weights_are_refused(tmp_path: Path) -> None:
    state = RAW | {"fc.weight": RAW["fc.weight"].double()}
    state["fc.weight"][0, 0] = 1e39
    message = refusal(tmp_path, CorruptArtifact, state)
    assert "fc.weight has infinite values (1 of 40) once it is converted from float64 to float32" in message


def test_nan_in_unused_sets_is_ignored(tmp_path: Path) -> None:
    spoiled = {name: value * float("nan") for name, value in RAW.items()}
    assert has(load(tmp_path, {"state_dict": spoiled, "state_dict_ema": AVERAGED}).model, AVERAGED)
