"""Fused kernels: the same numbers as separate operations, less memory, and none where they cannot be built."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from saqcli.quant.convert import Scheme
from saqcli.quant.grid import Grid, LevelTable, fake_quantize
from saqcli.quant.kernels import compiled, native
from saqcli.quant.kernels.layout import CLIP, OFFSET
from saqcli.quant.kernels.use import use_kernels
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import Quantizer, quantizers_of
from tests.support import tiny
from tests.support.cases import CASES, ROWS, Case, each
from tests.support.strategies import bits, levels, tensors

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
EPS = {dtype: torch.finfo(dtype).eps for dtype in INTEGERS}
FAMILIES = ("clip", "lsq", "lsq_plus", "pact", "dorefa")

every_quantizer = each(CASES)
built = pytest.mark.skipif(isinstance(native.load(), str), reason=f"no kernels: {native.load()}")


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Also the sign of zeros, and NaN where NaN is."""
    if one.dtype != two.dtype or one.stride() != two.stride():
        return False
    number = ~(one.isnan() & two.isnan())
    kind = INTEGERS[one.dtype]
    return torch.equal(one.detach().view(kind)[number], two.detach().view(kind)[number])


def both(quantizer: Quantizer) -> tuple[Quantizer, Quantizer]:
    """It, and a copy with fused kernels."""
    fused = copy.deepcopy(quantizer)
    assert use_kernels(fused, "fused").kind == "fused"
    return quantizer, fused


def run(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of ``x``, gradients of the parameters."""
    quantizer.zero_grad()
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(torch.cos(torch.arange(q.numel(), dtype=q.dtype)).view_as(q))
    assert x.grad is not None
    return q, x.grad, {n: p.grad for n, p in quantizer.named_parameters() if p.grad is not None}


def compare(quantizer: Quantizer, x: Tensor) -> None:
    """Outputs and gradients of ``x`` equal to the last bit, those of levels to the order of the sum."""
    (q, grad, of_levels), (fused, fused_grad, fused_levels) = (run(one, x) for one in both(quantizer))
    assert same_bits(q, fused)
    assert same_bits(grad, fused_grad)
    assert of_levels.keys() == fused_levels.keys()
    for name, expected in of_levels.items():
        # A term is at most |x| / step + codes steps, with |upstream| <= 1; terms may cancel in the sum.
        finite = x.nan_to_num(0, 0, 0).abs().max().double()
        bound = 4 * x.numel() * EPS[q.dtype] * float(256 + finite / quantizer.step().detach().min())
        torch.testing.assert_close(
            fused_levels[name], expected, rtol=1e-4, atol=bound, equal_nan=True, check_stride=False
        )


@built
@every_quantizer
@given(
    x=tensors(ROWS),
    level=levels(),
    width=bits(),
    sign=st.sampled_from([1.0, -1.0]),
    double=st.booleans(),
)
def test_fused_kernels_equal_separate_operations(
    case: Case, x: Tensor, level: float, width: int, sign: float, double: bool
) -> None:
    quantizer = case.build(sign * level)
    quantizer.select(width)
    compare(quantizer.double() if double else quantizer, x.double() if double else x)


@built
@every_quantizer
@pytest.mark.parametrize("level", [1.0, -1.0, 1e-20, 0.0])
def test_special_values_pass_alike(case: Case, level: float) -> None:
    """Ties, zeros of both signs, infinities, NaN and vanishing levels, in vectors and in the rest of a block."""
    quantizer = case.build(level)
    x = torch.randn(ROWS, 4099).mul_(2)
    step = 1 / quantizer.grids[2].highest
    x[:, :40] = (torch.arange(40) - 20) * step / 2
    x[:, -4:] = x[:, 50:54] = torch.tensor([0.0, -0.0, -1e-30, 1e-45])
    for width in (2, 4, 8):
        quantizer.select(width)
        compare(quantizer, x)
        with torch.no_grad():
            wild = x.clone()
            wild[:, 60:63] = wild[:, -3:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            one, two = both(quantizer)
            assert same_bits(one(wild), two(wild))


@built
@pytest.mark.parametrize("shape", [(), (6, 1, 1, 1), (1, 6, 1, 1)])
def test_memory_format_is_kept(shape: tuple[int, ...]) -> None:
    level = torch.rand(shape).add_(0.5).requires_grad_()
    x = torch.randn(6, 6, 5, 7)
    for like in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(1, 0, 3, 2),
        x[:, :, ::2],
        x[:1].expand(6, -1, -1, -1),
    ):
        grads = []
        for kind in ("eager", "fused"):
            leaf = like.detach().requires_grad_()
            q = fake_quantize(leaf, level, Grid(-7, 7, 2), kind)
            grads.append((q, *torch.autograd.grad(q, (leaf, level), torch.cos(like.contiguous()))))
        (q, grad, to_level), (fused, fused_grad, to_fused) = grads
        assert same_bits(q, fused)
        assert torch.equal(grad, fused_grad)
        torch.testing.assert_close(to_level, to_fused, rtol=1e-4, atol=1e-4)


@built
@every_quantizer
def test_bfloat16_gives_the_same_float32(case: Case) -> None:
    one, two = both(case.build(1.0))
    x = torch.randn(ROWS, 70).bfloat16()
    with torch.no_grad():
        assert same_bits(one(x), two(x))


@built
@each([case for case in CASES if not isinstance(case.grid(4), LevelTable)])
def test_level_gradients_have_a_fixed_order(case: Case) -> None:
    """Two runs are bit-identical, whatever the number of threads; on tables torch itself adds."""
    _, fused = both(case.build(1.0))
    x, threads = torch.randn(ROWS, 30_000), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            fused.zero_grad()
            found.append(run(fused, x))
    finally:
        torch.set_num_threads(threads)
    for q, grad, of_levels in found[1:]:
        assert same_bits(q, found[0][0])
        assert same_bits(grad, found[0][1])
        assert all(same_bits(value, found[0][2][name]) for name, value in of_levels.items())


@built
@every_quantizer
def test_gradients_of_gradients_are_the_same(case: Case) -> None:
    found = []
    for quantizer in both(case.build(1.0).double()):
        x = torch.linspace(-3, 3, ROWS * 20, dtype=torch.float64).view(ROWS, 20).requires_grad_()
        weight = torch.cos(x.detach()).requires_grad_()
        wanted = (x, *quantizer.parameters())
        first = torch.autograd.grad((quantizer(x) * weight).square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), (weight, *wanted), allow_unused=True
        )
        found.append((*first, *second))
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two)


@built
def test_tables_and_other_dtypes_stay_separate() -> None:
    x, level = torch.randn(50), torch.tensor(1.0)
    table = LevelTable((-1.0, 0.0, 1.0))
    assert torch.equal(fake_quantize(x, level, table, "fused"), fake_quantize(x, level, table))
    mixed = fake_quantize(x.double(), level, Grid(0, 3, 1), "fused")
    assert torch.equal(mixed, fake_quantize(x.double(), level, Grid(0, 3, 1)))
    assert fake_quantize(x[:0], level, Grid(0, 3, 1), "fused").shape == (0,)


# Networks


def quantized(quantizer: str, name: str = "residual") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = tiny.build(name)
    tiny.quantized(net, x, 4, Scheme(quantizer=quantizer))
    return net.train(), x


@built
@pytest.mark.parametrize("quantizer", FAMILIES)
def test_networks_train_alike(quantizer: str) -> None:
    """The last layer's gradients are exact; levels differ in the order of sums, and gradients do not depend on them."""
    net, x = quantized(quantizer)
    fused = copy.deepcopy(net)
    assert use_kernels(fused, "fused") == ("fused", None)
    outputs = [one(x) for one in (net, fused)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (name, one), (_, two) in zip(net.named_parameters(), fused.named_parameters(), strict=True):
        if "quantizer" in name:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(one.grad, two.grad), name


@built
def test_layers_do_not_keep_quantized_inputs() -> None:
    net, x = quantized("clip", "conv_bn")
    layer = list(quantized_layers(net).values())[1]
    seen: list[Tensor] = []
    layer.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    for kind, kept in (("eager", True), ("fused", False)):
        use_kernels(net, kind)  # type: ignore[arg-type]
        seen.clear()
        before = x.clone().requires_grad_()
        node: Any = net[:4](before).grad_fn
        saved = node._saved_input
        assert (saved.data_ptr() == seen[0].data_ptr()) == kept
        assert torch.equal(saved, seen[0])


@built
def test_inputs_modified_afterwards_are_an_error() -> None:
    layer = nn.Sequential(nn.ReLU(), nn.Linear(12, 3))
    x = torch.randn(4, 12)
    tiny.quantized(layer, x, 4)
    use_kernels(layer, "fused")
    hidden = layer[0](x.requires_grad_())
    output = layer[1](hidden)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Doubling(nn.Linear):
    """Writes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


class Doubled(nn.Linear):
    """The same without."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


@built
def test_layers_that_write_over_their_input_differentiate() -> None:
    x, nets = torch.randn(4, 12), []
    for kind in (Doubling, Doubled):
        net = nn.Sequential(nn.ReLU(), kind(12, 3))
        tiny.quantized(net, x.clone(), 4)
        use_kernels(net, "fused")
        nets.append(net)
    nets[1].load_state_dict(nets[0].state_dict())
    leaves = [x.clone().requires_grad_() for _ in nets]
    for net, leaf in zip(nets, leaves, strict=True):
        net(leaf).square().sum().backward()
    one, two = ([leaf.grad, *(p.grad for p in n.parameters())] for n, leaf in zip(nets, leaves, strict=True))
    assert all(map(torch.equal, one, two))


def _spread(x: Tensor) -> Tensor:
    return x.detach().repeat_interleave(2, -1) if x.ndim == 4 else x.detach()


HOOKS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "reentrant checkpoint": lambda net, x: checkpoint(net, x, use_reentrant=True),
    "another layout": lambda net, x: _hooked(net, x, lambda y: y.detach().contiguous(), lambda y: y),
    "gaps": lambda net, x: _hooked(net, x, _spread, lambda y: y[..., ::2] if y.ndim == 4 else y),
    "forbidden": lambda net, x: _forbidden(net, x),
}


def _hooked(net: nn.Module, x: Tensor, *hooks: Callable[[Tensor], Tensor]) -> Tensor:
    with saved_tensors_hooks(*hooks):
        output: Tensor = net(x)
    return output


def _forbidden(net: nn.Module, x: Tensor) -> Tensor:
    with disable_saved_tensors_hooks("none here"):
        output: Tensor = net(x)
    return output


@built
@pytest.mark.parametrize("quantizer", ["clip", "lsq_plus", "pact"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_saved_tensors_are_respected(name: str, quantizer: str) -> None:
    net, x = quantized(quantizer, "conv_bn")
    net.eval()  # a checkpoint computes statistics twice
    found = []
    for kind in ("eager", "fused"):
        use_kernels(net, kind)  # type: ignore[arg-type]
        net.zero_grad()
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        HOOKS[name](net, leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for n, p in net.named_parameters() if "quantizer" not in n)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@built
def test_copies_keep_the_kernel_and_keys_stay() -> None:
    net, _ = quantized("lsq_plus")
    keys = list(net.state_dict())
    use_kernels(net, "fused")
    assert list(net.state_dict()) == keys
    stream = io.BytesIO()
    torch.save(net.state_dict(), stream)
    quantizer = next(quantizers_of(net))
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert twin.kernel == "fused"
    use_kernels(net, "eager")
    assert {one.kernel for one in quantizers_of(net)} == {"eager"}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", FAMILIES)
def test_networks_compile_in_one_graph(quantizer: str) -> None:
    net, x = quantized(quantizer)
    use_kernels(net, "fused")
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for one in (net, compiled):
        one(x).square().sum().backward()
    for (name, one), (_, two) in zip(net.named_parameters(), compiled.named_parameters(), strict=True):
        scale = float(one.grad.abs().max()) if one.grad is not None else 0.0
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


# Other devices


@built
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_kernels_equal_the_native_ones() -> None:
    """On the CPU, in the place of a GPU; one compilation serves all sizes."""
    kernels, native_kernels = compiled.load("cpu"), native.load()
    assert not isinstance(kernels, str)
    assert not isinstance(native_kernels, str)
    graphs = []
    for sizes in ((17, 18, 19), (21, 22, 23), (26, 27, 29)):
        for shape, codes, kind, offset in (
            ((), (0, 15, 1), CLIP, None),
            ((), (-7, 7, 2), CLIP, None),
            ((), (0, 15, 1), OFFSET, torch.tensor(-0.3)),
            ((sizes[0], 1, 1), (-127, 127, 1), CLIP, None),
        ):
            x, grad = torch.randn(sizes), torch.randn(sizes)
            level = torch.rand(shape).add_(0.5) / (15 if kind == OFFSET else 1)
            outputs = [one.forward(x, level, offset, codes=codes) for one in (kernels, native_kernels)]
            assert same_bits(*outputs)
            (to_x, sums), (expected, of_native) = (
                one.backward(grad, x, level, offset, codes=codes, kind=kind)
                for one in (kernels, native_kernels)
            )
            assert same_bits(to_x, expected)
            torch.testing.assert_close(sums, of_native, rtol=1e-4, atol=1e-3)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[1] == graphs[0]


# Building


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not built anything yet, with an empty cache."""
    monkeypatch.setattr(native, "load", cache(native.load.__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": "/nowhere"}, "no C compiler was found"),
        ({"CC": "/nowhere/cc"}, "the C kernels could not be built"),
        ({"CC": "false"}, "the C compiler failed"),
        ({"CC": "cc 'x"}, "the variable CC is no command"),
    ],
)
def test_without_a_compiler_operations_are_separate(
    variables: dict[str, str], reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    net, x = quantized("clip")
    expected = net.eval()(x)
    choice = use_kernels(net, "fused")
    assert choice.kind == "eager"
    assert choice.reason is not None
    assert choice.reason.startswith("quantizers run as separate operations: ")
    assert reason in choice.reason
    assert "\n" not in choice.reason
    for one in quantizers_of(net):
        one.kernel = "fused"  # as in a copy from another machine
    assert torch.equal(net(x), expected)


@built
def test_built_kernels_are_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(native.load(), native.NativeKernels)
    (kept,) = (fresh / "saq" / "kernels").iterdir()
    assert kept.suffix == ".so"
    monkeypatch.setattr(native, "_built", None)
    native.load.cache_clear()
    assert isinstance(native.load(), native.NativeKernels)


@built
def test_damaged_kernels_are_built_again(fresh: Path) -> None:
    compiler = str(native.shutil.which("cc") or native.shutil.which("gcc") or native.shutil.which("clang"))
    path = fresh / "saq" / "kernels" / f"{native._key([compiler])}.so"
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_bytes(b"torn")
    assert isinstance(native.load(), native.NativeKernels)
    assert path.stat().st_size > 1000


def kept_file() -> Path:
    """Of built kernels, which are asked for again."""
    assert isinstance(native.load(), native.NativeKernels)
    native.load.cache_clear()
    folder = native.cache_folder()
    assert folder is not None
    (path,) = folder.iterdir()
    return path


@built
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files")
@pytest.mark.parametrize("of", ["file", "folder"])
def test_kernels_that_others_may_write_are_not_loaded(of: str, fresh: Path) -> None:
    path = kept_file()
    (path if of == "file" else path.parent).chmod(0o777)
    assert not native._own(path)
    assert isinstance(native.load(), native.NativeKernels)
    assert native._own(path) == (of == "file")  # built again; the folder stays as it is


@built
def test_compilers_may_refuse_flags(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "cc"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-march*|*-fopenmp*) exit 1; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert isinstance(native.load(), native.NativeKernels)


@built
def test_without_a_home_kernels_are_not_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where a user has none
    assert native.cache_folder() is None
    assert isinstance(native.load(), native.NativeKernels)


@built
def test_a_cache_without_room_is_no_obstacle(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert isinstance(native.load(), native.NativeKernels)
