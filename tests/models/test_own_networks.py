"""Networks of one's own: naming, building, and never importing what a file names."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from saqcli.config import names_own_network, resolve
from saqcli.errors import BuilderError, ConfigError, SaqError
from saqcli.models.load import ModelSpec, build_architecture, default_classes, load_model
from saqcli.models.names import resolve as resolve_name
from saqcli.models.own import own_network
from tests.support.own import mynets, no_imports

__all__ = ["mynets", "no_imports"]
SIZE = 16


@pytest.mark.parametrize(("name", "is_own"), [
    ("mypackage.nets:build", True), ("nets:Net", True), ("nets:zoo.build", True), ("models:build", True),
    ("timm:resnet18", False), ("torchvision.models:resnet18", False), ("saq:resnet20", False), ("nets.py:build", False),
    ("a/nets:build", False), ("C:\\nets", False), ("hf-hub:timm/resnet18", False), ("nets:", False), (":build", False),
    ("nets:build()", False), (" nets:build", False), ("nets:build\n", False),
])  # fmt: skip
def test_module_and_name_make_own_network(name: str, is_own: bool) -> None:
    assert names_own_network(name) is is_own


def test_library_spellings_with_colon_are_kept(mynets: Path) -> None:
    assert resolve_name("models:resnet18").full == "torchvision/resnet18"
    assert resolve_name("models:build").full == "models:build"


@pytest.mark.parametrize("name", ["build", "Net", "Fixed", "module", "loading"])
def test_function_class_and_module_are_built(name: str, mynets: Path) -> None:
    loaded = load_model(ModelSpec(f"mynets.nets:{name}", input_size=SIZE))
    classes = {"Fixed": 6, "module": 4}.get(name, 10)
    assert (loaded.name, loaded.num_classes) == (f"mynets.nets:{name}", classes)
    assert loaded.weights_source == f"weights as built by mynets.nets:{name}"
    assert loaded.trained
    assert loaded.model(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, classes)
    assert loaded.classifiers == ("fc",)
    assert loaded.preprocessing.crop_pct == 1.0
    own = own_network(loaded.name)
    rebuilt = build_architecture(loaded.build, own)
    assert [x.shape for x in rebuilt.state_dict().values()] == [
        x.shape for x in loaded.model.state_dict().values()
    ]
    assert str(mynets) not in sys.path


def test_given_module_stays_unchanged(mynets: Path) -> None:
    net = own_network("mynets.nets:module")
    loaded = load_model(ModelSpec("mynets.nets:module", input_size=SIZE))
    assert isinstance(net.source, nn.Module)
    assert loaded.model is not net.source
    assert torch.equal(loaded.model.fc.weight, net.source.fc.weight)  # type: ignore[union-attr, arg-type]


def test_builder_receives_the_arguments_it_names(mynets: Path) -> None:
    spec = ModelSpec(
        "mynets.nets:build", num_classes=7, in_chans=1, kwargs={"width": 4}, input_size=SIZE, pretrained=False
    )
    loaded = load_model(spec)
    assert loaded.build == {
        "name": "mynets.nets:build",
        "num_classes": 7,
        "in_chans": 1,
        "kwargs": {"width": 4},
    }
    assert loaded.model(torch.zeros(1, 1, SIZE, SIZE)).shape == (1, 7)
    assert (loaded.weights_source, loaded.trained) == ("random", False)


@pytest.mark.parametrize(("pretrained", "bias"), [(True, 1.0), (False, 0.0)])
def test_builder_may_take_pretrained(pretrained: bool, bias: float, mynets: Path) -> None:
    loaded = load_model(ModelSpec("mynets.nets:loading", pretrained=pretrained, input_size=SIZE))
    assert (loaded.model.fc.bias == bias).all()  # type: ignore[union-attr]


def test_preprocessing_comes_from_the_network(mynets: Path) -> None:
    found = load_model(ModelSpec("mynets.nets:described")).preprocessing
    assert (found.input_size, found.mean, found.crop_pct) == ((3, 24, 32), (0.5, 0.4, 0.3), 0.9)
    assert load_model(ModelSpec("mynets.nets:described", input_size=SIZE)).preprocessing.input_size[1] == SIZE
    default = load_model(ModelSpec("mynets.nets:build")).preprocessing
    assert (default.input_size, default.crop_pct) == ((3, 224, 224), 0.875)


def test_weight_file_determines_the_classes(mynets: Path) -> None:
    net = load_model(ModelSpec("mynets.nets:Net", num_classes=7, input_size=SIZE)).model
    torch.save(net.state_dict(), "w.pth")
    loaded = load_model(ModelSpec("mynets.nets:build", weights=Path("w.pth"), input_size=SIZE))
    assert (loaded.num_classes, loaded.weights_source) == (7, "w.pth")
    assert torch.equal(loaded.model.fc.weight, net.fc.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(SaqError, match=r"has 7 classes, mynets.nets:Fixed was built for 6"):
        load_model(ModelSpec("mynets.nets:Fixed", weights=Path("w.pth"), input_size=SIZE))


@pytest.mark.parametrize(("name", "options", "said"), [
    ("nowhere:build", {}, "there is no module nowhere in"),
    ("mynets.nowhere:build", {}, "there is no module mynets.nowhere in"),
    ("mynets.nets:nothing", {}, "mynets.nets has no nothing; it has "),
    ("mynets.nets:constant", {}, "is a int: name a function"),
    ("mynets.nets:counting", {}, "returned 'int', not a torch.nn.Module"),
    ("mynets.nets:deserting", {}, "failed: KeyError: 'no such width' (mynets/nets.py:51)"),
    ("mynets.broken:build", {}, "importing mynets.broken failed: KeyError: 'width' (mynets/broken.py:3)"),
    ("mynets.incomplete:build", {}, "No module named 'no_such_library' (mynets/incomplete.py:1)"),
    ("mynets.syntax:build", {}, "SyntaxError: invalid syntax (mynets/syntax.py:1)"),
    ("mynets.nets:demanding", {}, "needs the argument width: use `model.kwargs=width=VALUE`"),
    ("mynets.nets:build", {"kwargs": {"depth": 3}}, "has no argument 'depth': correct `model.kwargs`"),
    ("mynets.nets:build", {"kwargs": {"width": 5}}, "failed: KeyError: 5 (mynets/nets.py:"),
    ("mynets.nets:module", {"kwargs": {"width": 5}}, "has no argument 'width'"),
    ("mynets.nets:Fixed", {"num_classes": 7}, "gives 6 classes, not 7, since it takes no argument num_classes"),
    ("mynets.nets:Fixed", {"in_chans": 1}, "does not run on an image of 1x16x16"),
    ("mynets.nets:Strange", {}, "does not run on an image: LookupError: lost (mynets/nets.py:"),
    ("mynets/nets.py:build", {}, "such as mynets.nets:build"),
    ("mynets/nets.py", {}, "such as mynets.nets:NAME"),
    ("mynets.nets.build", {}, "such as mynets.nets:build"),
    ("mynets.nets:build()", {}, "unknown model"),
])  # fmt: skip
def test_mistake_gives_one_clear_line(name: str, options: dict[str, object], said: str, mynets: Path) -> None:
    with pytest.raises(SaqError) as caught:
        load_model(ModelSpec(name, **{"input_size": SIZE, **options}))  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["evil:build", "os:system", "mynets.nets:build"])
def test_metadata_never_import_a_module(name: str, mynets: Path, no_imports: None) -> None:
    build = {"name": name, "num_classes": 3, "in_chans": 3, "kwargs": {}}
    with pytest.raises(BuilderError, match="never imported"):
        build_architecture(build)
    assert not (mynets / "was_run").exists()


@pytest.mark.parametrize("name", ["evil:build", " evil:build", "evil:build()", "evil.py:build", "evil.build"])
def test_configuration_file_never_imports_a_module(name: str, mynets: Path, no_imports: None) -> None:
    Path("c.toml").write_text(f'[model]\nname = "{name}"\n')
    with pytest.raises(SaqError, match=r"never imported|unknown model"):
        load_model(ModelSpec(resolve(file=Path("c.toml")).model.name))
    assert resolve(file=Path("c.toml"), options={"model.name": "evil:build"}).model.name == "evil:build"


def test_named_network_must_equal_the_metadata(mynets: Path) -> None:
    own = own_network("mynets.nets:Net")
    build = {"name": "mynets.nets:build", "num_classes": 3, "in_chans": 3, "kwargs": {}}
    with pytest.raises(BuilderError, match=r"not from mynets.nets:Net: use `builder="):
        build_architecture(build, own)
    with pytest.raises(BuilderError, match="remove `builder`"):
        build_architecture({**build, "name": "saq/resnet20"}, own)
    assert build_architecture(build, own_network(nn.Flatten())).training is False  # given as an object


def test_builder_that_is_no_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="give MODULE:NAME"):
        own_network("resnet18")
    assert default_classes("saq/resnet20") == 10
