"""Instruments, compared with explicit Hessians of an independent reference, brute force and separately built models."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.analysis import INSTRUMENTS, AnalysisInput, Session, Settings
from saqcli.analysis.base import dot, hessian_products
from saqcli.analysis.distributions import measure_distributions
from saqcli.analysis.eigenvalue import measure_eigenvalue
from saqcli.analysis.flips import measure_flips
from saqcli.analysis.hessian_trace import measure_trace
from saqcli.analysis.landscape import LandscapeReading, directions, measure_landscape
from saqcli.analysis.loss_sharpness import measure_sharpness
from saqcli.analysis.sensitivity import measure_sensitivity
from saqcli.progress import SILENT
from saqcli.quant.bits import LayerBits
from saqcli.quant.quantizers import Quantizer
from saqcli.report.readings import draw
from saqcli.training.loop import evaluate
from tests.support.analyzed import COUNT, subject_of
from tests.support.networks import NETWORKS, quantize, same_bits


def state_of(subject: AnalysisInput) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def same_state(subject: AnalysisInput, before: dict[str, Tensor]) -> bool:
    after = subject.model.state_dict()
    return set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def line_through(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Straight-through gradient by detaching, in plain operators; the quantizer's own gradient is not used."""
    grid, step = quantizer.grid(), quantizer.step().detach()
    inside = ((x / step <= grid.highest) & (x / step >= grid.lowest)).to(x.dtype).detach()
    return x * inside + (quantizer.codes(x) * step - x * inside).detach()


def twin_loss(subject: AnalysisInput) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss of ``conv_bn`` as a function of one flat vector of quantized weights, and that vector."""
    layers = list(subject.layers.values())
    start = [layer.quantized_weight().detach() for layer in layers]
    pictures = torch.cat([x for x, _ in subject.batches])
    labels = torch.cat([y for _, y in subject.batches])
    net: Any = subject.model

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in start])
        w = [part.view_as(like) for part, like in zip(parts, start, strict=True)]
        x = line_through(pictures, layers[0].input_quantizer)  # type: ignore[arg-type]
        x = torch.relu(_norm(F.conv2d(x, w[0], None, padding=1), net[1]))
        x = line_through(x, layers[1].input_quantizer)  # type: ignore[arg-type]
        x = torch.relu(_norm(F.conv2d(x, w[1], net[3].bias, stride=2, padding=1), net[4]))
        x = line_through(x.flatten(1), layers[2].input_quantizer)  # type: ignore[arg-type]
        return F.cross_entropy(F.linear(x, w[2], net[7].bias), labels)

    return loss, torch.cat([w.flatten() for w in start])


def _norm(x: Tensor, norm: Any) -> Tensor:
    shape = (1, -1, 1, 1)
    centred = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
    return centred * norm.weight.view(shape) + norm.bias.view(shape)


def explicit_hessian(subject: AnalysisInput) -> Tensor:
    """(weights, weights), by differentiating the reference twice."""
    loss, point = twin_loss(subject)
    assert loss(point).item() == pytest.approx(subject.score().loss, rel=1e-6)  # equals the model
    hessian: Tensor = torch.autograd.functional.hessian(loss, point)
    return hessian


EIGHT, THREE = same_bits(8), same_bits(3)


@pytest.fixture(scope="module", params=["smooth", "coarse"])
def with_hessian(request: pytest.FixtureRequest) -> tuple[AnalysisInput, Tensor]:
    torch.manual_seed(0)
    subject = subject_of(bits=EIGHT if request.param == "smooth" else THREE)
    return subject, explicit_hessian(subject)


class TestCurvature:
    def test_matches_the_explicit_hessian(self, with_hessian: tuple[AnalysisInput, Tensor]) -> None:
        subject, hessian = with_hessian
        sizes = [layer.latent_weight().numel() for layer in subject.layers.values()]
        flat = torch.randn(2, sum(sizes), dtype=torch.float64)
        vectors = [
            [p.view_as(layer.latent_weight()) for p, layer in zip(v.split(sizes), subject.layers.values(), strict=True)]
            for v in flat
        ]  # fmt: skip

        found = hessian_products(subject, vectors)

        for v, product in zip(flat, found, strict=True):
            torch.testing.assert_close(torch.cat([p.flatten() for p in product]), hessian @ v)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_hessian_is_symmetric(self, name: str) -> None:
        subject = subject_of(name)
        u, v = ([torch.randn_like(x.latent_weight()) for x in subject.layers.values()] for _ in range(2))

        hu, hv = hessian_products(subject, [u, v])

        scale = math.sqrt(dot(hu, hu) * dot(v, v))
        assert scale > 0
        assert dot(u, hv) == pytest.approx(dot(v, hu), abs=1e-9 * scale)

    def test_model_state_is_restored(self) -> None:
        subject = subject_of()
        measure_eigenvalue(subject, Settings(iterations=2), Session())

        assert all(p.requires_grad and p.grad is None for p in subject.model.parameters())
        assert all(layer.perturbation is None for layer in subject.layers.values())


class TestEigenvalue:
    def test_matches_the_explicit_hessian(self, with_hessian: tuple[AnalysisInput, Tensor]) -> None:
        subject, hessian = with_hessian
        largest = torch.linalg.eigvalsh(hessian)[-1].item()

        found = measure_eigenvalue(subject, Settings(tolerance=1e-10, iterations=2000), Session())

        assert all(start.converged for start in found.starts)
        assert found.eigenvalue == pytest.approx(largest, rel=1e-6)
        assert found.spread <= 1e-6 * largest

    def test_default_tolerance_is_close(self, with_hessian: tuple[AnalysisInput, Tensor]) -> None:
        subject, hessian = with_hessian
        values = torch.linalg.eigvalsh(hessian)

        found = measure_eigenvalue(subject, Settings(), Session())

        assert len(found.starts) == 3
        assert found.eigenvalue <= values[-1] * (1 + 1e-9)  # a Rayleigh quotient is a lower bound
        assert found.eigenvalue == pytest.approx(values[-1].item(), rel=0.02)
        for start in found.starts:  # for a symmetric matrix, an eigenvalue lies within the residual
            nearest = (values - start.eigenvalue).abs().min().item()
            assert nearest <= start.residual * abs(start.eigenvalue) + 1e-12
        assert found.mean == pytest.approx(sum(s.eigenvalue for s in found.starts) / 3)

    def test_ignores_larger_negative_eigenvalues(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from saqcli.analysis import eigenvalue

        subject = subject_of()
        count = sum(layer.latent_weight().numel() for layer in subject.layers.values())
        diagonal = torch.linspace(-8.0, 5.0, count, dtype=torch.float64)

        def products(subject: AnalysisInput, vectors: list[list[Tensor]]) -> list[list[Tensor]]:
            sizes = [layer.latent_weight().numel() for layer in subject.layers.values()]
            parts = diagonal.split(sizes)
            return [[v * d.view_as(v) for v, d in zip(vector, parts, strict=True)] for vector in vectors]

        monkeypatch.setattr(eigenvalue, "hessian_products", products)
        found = measure_eigenvalue(subject, Settings(tolerance=1e-9, iterations=5000), Session())

        assert found.eigenvalue == pytest.approx(5.0, rel=1e-3)
        assert found.lowest == pytest.approx(-8.0, rel=1e-3)

    def test_reports_non_convergence(self) -> None:
        found = measure_eigenvalue(subject_of(), Settings(iterations=1), Session())

        assert not any(start.converged for start in found.starts)
        assert {start.iterations for start in found.starts} == {1}


class TestTrace:
    def test_is_within_its_error_estimate(self, with_hessian: tuple[AnalysisInput, Tensor]) -> None:
        subject, hessian = with_hessian
        samples = 200

        found = measure_trace(subject, Settings(samples=samples), Session())

        first = 0
        for entry, layer in zip(found.layers, subject.layers.values(), strict=True):
            count = layer.latent_weight().numel()
            rows = hessian[first : first + count]
            block = rows[:, first : first + count]
            # Variance of <z_l, (H z)_l> over random signs: pairs within the layer count twice.
            off = block - block.diag().diag()
            variance = 2 * off.square().sum() + rows.square().sum() - block.square().sum()
            error = (variance / samples).sqrt().item()
            assert entry.weights == count
            assert abs(entry.trace - block.trace().item()) < 5 * error
            assert entry.standard_error == pytest.approx(error, rel=0.5)
            assert entry.per_weight == pytest.approx(entry.trace / count)
            first += count
        assert found.trace == pytest.approx(sum(entry.trace for entry in found.layers))
        assert abs(found.trace - hessian.trace().item()) < 5 * found.standard_error


class TestSharpness:
    def test_matches_one_full_gradient_step(self) -> None:
        subject = subject_of()
        loss, point = twin_loss(subject)
        point.requires_grad_()
        (g,) = torch.autograd.grad(loss(point), point)

        found = measure_sharpness(subject, Settings(rho=0.2, rho_unit="absolute"), Session())

        with torch.no_grad():
            expected = loss(point + 0.2 * g / g.norm()) - loss(point)
        # the reference is linear only at this point: elsewhere inputs are rounded again, as here
        assert found.gradient_norm == pytest.approx(g.norm().item(), rel=1e-6)
        assert found.sharpness == pytest.approx(expected.item(), rel=1e-5)
        assert found.relative_norm == pytest.approx(0.2 / point.norm().item(), rel=1e-6)

    def test_is_independent_of_batch_size(self) -> None:
        found = [
            measure_sharpness(subject_of(batch=size), Settings(rho=0.5), Session()) for size in (5, 8, COUNT)
        ]

        for other in found[1:]:
            assert other.perturbed_loss == pytest.approx(found[0].perturbed_loss, rel=1e-6)
            assert other.gradient_norm == pytest.approx(found[0].gradient_norm, rel=1e-6)

    def test_is_zero_at_radius_zero(self) -> None:
        assert measure_sharpness(subject_of(), Settings(rho=0.0), Session()).sharpness == 0


class TestFlips:
    def test_counts_match_hand_computation(self) -> None:
        subject = subject_of(batch=COUNT)
        layers = subject.layers
        ((pictures, labels),) = subject.batches
        latents = [layer.latent_weight() for layer in layers.values()]
        gradients = torch.autograd.grad(F.cross_entropy(subject.model(pictures), labels), latents)
        norm = sum(g.square().sum() for g in gradients).sqrt()  # type: ignore[union-attr]
        flipped, moved = 0, 0.0
        for layer, g in zip(layers.values(), gradients, strict=True):
            quantizer = layer.weight_quantizer
            assert isinstance(quantizer, Quantizer)
            w = layer.latent_weight().detach()
            a, b = quantizer(w).detach(), quantizer(w + 0.4 * g / norm).detach()
            flipped += int(((a - b).abs() > 1e-9).sum())
            moved += float((a - b).square().sum())

        found = measure_flips(subject, Settings(rho=0.4, rho_unit="absolute"), Session())

        assert found.reason is None
        assert 0 < found.flipped == flipped == sum(layer.flipped for layer in found.layers)
        assert found.share == flipped / found.weights
        assert found.norm_ratio == pytest.approx(math.sqrt(moved) / 0.4, rel=1e-5)

    def test_latent_weights_are_restored(self) -> None:
        subject = subject_of("standardized")
        before = state_of(subject)

        measure_flips(subject, Settings(rho=5.0), Session())

        assert same_state(subject, before)

    def test_require_latent_weights(self) -> None:
        subject = subject_of()
        found = measure_flips(
            AnalysisInput(subject.model, subject.layers, subject.batches, latent=False), Settings(), Session()
        )

        assert found.reason is not None
        assert "checkpoint" in found.reason
        assert not found.layers


class TestDistributions:
    def test_histograms_sum_to_one(self) -> None:
        subject = subject_of()

        found = measure_distributions(subject, Settings(), Session())

        assert [layer.name for layer in found.layers] == list(subject.layers)
        for entry, layer in zip(found.layers, subject.layers.values(), strict=True):
            for operand in (entry.weights, entry.inputs):
                assert operand is not None
                assert sum(operand.codes) == pytest.approx(1)
                assert sum(operand.histogram) == pytest.approx(1)
                assert 0 <= operand.entropy <= operand.bits
                assert len(operand.codes) == (operand.highest - operand.lowest) // operand.stride + 1
            w = layer.effective_weight().detach()
            quantized = layer.quantized_weight().detach()
            error = float((w - quantized).square().sum() / w.square().sum())
            assert entry.weights is not None
            assert entry.weights.error == pytest.approx(error, rel=1e-4)
            step = layer.weight_quantizer.step()  # type: ignore[operator,union-attr]
            outside = (w / step > entry.weights.highest) | (w / step < entry.weights.lowest)
            assert entry.weights.clipped == pytest.approx(float(outside.double().mean()))

    def test_input_codes_match_the_model(self) -> None:
        subject = subject_of(batch=COUNT)
        second = list(subject.layers.values())[1]
        seen: list[Tensor] = []
        handle = second.input_quantizer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        subject.model(subject.batches[0][0])
        handle.remove()

        found = measure_distributions(subject, Settings(), Session())

        inputs = found.layers[1].inputs
        assert inputs is not None
        assert inputs.values == seen[0].numel()
        zero = (second.input_quantizer.codes(seen[0]) == 0).double().mean()  # type: ignore[operator,union-attr]
        assert inputs.zero == pytest.approx(float(zero))


class TestSensitivity:
    def test_matches_a_model_built_at_those_bits(self) -> None:
        subject = subject_of(batch=COUNT)
        pictures, _ = subject.batches[0]
        name = list(subject.layers)[1]

        found = measure_sensitivity(subject, Settings(candidates=(2, 5)), Session())

        def other(names: Any) -> dict[str, LayerBits]:
            bits = {layer.name: layer for layer in found.layers}
            return {
                n: LayerBits(weight=5, activation=5)
                if n == name
                else LayerBits(weight=bits[n].weight_bits, activation=bits[n].activation_bits)
                for n in names
            }

        built = quantize(NETWORKS["conv_bn"], other)
        model = built.model.double().eval()
        state = model.state_dict()
        own = {key for key in state if key.startswith(name) and "quantizer" in key}
        model.load_state_dict(
            {k: v for k, v in subject.model.state_dict().items() if k not in own}, strict=False
        )
        seen: list[Tensor] = []
        layer = built.layers[name]
        handle = layer.input_quantizer.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        model(pictures)
        handle.remove()
        layer.weight_quantizer.fit(layer.latent_weight().detach())  # type: ignore[operator,union-attr]
        layer.input_quantizer.fit(seen[0].float().flatten().double())  # type: ignore[operator,union-attr]
        with SILENT.task("", 1) as task:
            score = evaluate(model, subject.batches, task, device=torch.device("cpu"))

        row = next(layer for layer in found.layers if layer.name == name)
        assert [candidate.bits for candidate in row.candidates] == [2, 5]
        assert row.candidates[1].loss == pytest.approx(score.loss, rel=1e-9)
        assert row.candidates[1].top1 == score.top1
        assert row.candidates[1].loss_change == pytest.approx(score.loss - found.loss)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_model_is_unchanged(self, name: str) -> None:
        subject = subject_of(name, dtype=torch.float32)
        before, modules = state_of(subject), list(subject.model.modules())
        loss = subject.score().loss

        measure_sensitivity(subject, Settings(candidates=(2,)), Session())

        assert same_state(subject, before)
        assert all(a is b for a, b in zip(subject.model.modules(), modules, strict=True))
        assert subject.score().loss == loss

    def test_fewer_bits_cost_more(self) -> None:
        found = measure_sensitivity(subject_of(bits=EIGHT), Settings(candidates=(2, 8)), Session())

        worst = [max(c.loss_change for c in layer.candidates if c.bits == 2) for layer in found.layers]
        mild = [max(abs(c.loss_change) for c in layer.candidates if c.bits == 8) for layer in found.layers]
        assert max(worst) > max(mild)


class TestLandscape:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_centre_is_the_evaluation_loss(self, name: str) -> None:
        subject = subject_of(name, dtype=torch.float32)

        found = measure_landscape(subject, Settings(grid=3), Session())

        assert found.finished
        assert found.axis == [-1, 0, 1]
        assert found.loss[1][1] == subject.score().loss
        assert found.top1[1][1] == subject.score().top1

    def test_corner_adds_both_directions(self) -> None:
        subject = subject_of()
        found = measure_landscape(subject, Settings(grid=3, span=0.5, seed=3), Session())
        one, two = directions(subject.layers, 3)
        for layer, a, b in zip(subject.layers.values(), one, two, strict=True):
            layer.perturbation = 0.5 * a - 0.5 * b

        assert subject.score().loss == pytest.approx(found.loss[0][2], rel=1e-12)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_directions_are_normalized_and_orthogonal(self, name: str) -> None:
        subject = subject_of(name)

        for layer, *pair in zip(subject.layers.values(), *directions(subject.layers, 0), strict=True):
            dim = layer.channel_dim
            weight = layer.quantized_weight().detach().movedim(dim, 0).flatten(1)
            flat = [d.movedim(dim, 0).flatten(1) for d in pair]
            for d in flat:
                torch.testing.assert_close(d.norm(dim=1), weight.norm(dim=1))
            assert (flat[0] * flat[1]).sum(1).abs().max() < 1e-9 * weight.square().sum(1).max()

    def test_directions_differ_only_in_norm(self) -> None:
        coarse, fine = subject_of(bits=THREE), subject_of(bits=EIGHT)

        for a, b in zip(directions(coarse.layers, 0)[0], directions(fine.layers, 0)[0], strict=True):
            cosines = F.cosine_similarity(a.flatten(1), b.flatten(1))
            torch.testing.assert_close(cosines, torch.ones_like(cosines))

    def test_resume_is_bit_identical(self) -> None:
        subject = subject_of()
        whole = measure_landscape(subject, Settings(grid=5), Session())
        kept: list[LandscapeReading] = []

        class Stop(Exception):
            pass

        def keep(reading: Any) -> None:
            kept.append(reading)
            if reading.done == 8:
                raise Stop

        with pytest.raises(Stop):
            measure_landscape(subject, Settings(grid=5), Session(keep=keep))
        partial = LandscapeReading.model_validate_json(kept[-1].model_dump_json())
        calls: list[int] = []
        rest = measure_landscape(
            subject, Settings(grid=5), Session(earlier=partial, keep=lambda r: calls.append(r.done))  # type: ignore[attr-defined]
        )  # fmt: skip

        assert not partial.finished
        assert calls == list(range(9, 26))
        assert rest.model_dump_json() == whole.model_dump_json()


FEW = Settings(grid=3, samples=2, iterations=3, candidates=(4,))


@pytest.mark.parametrize("name", INSTRUMENTS)
@pytest.mark.parametrize("network", ["residual", "attention"])
class TestEveryInstrument:
    def test_reading_is_json_and_model_unchanged(self, name: str, network: str) -> None:
        subject = subject_of(network, dtype=torch.float32)
        before = state_of(subject)
        instrument = INSTRUMENTS[name]
        settings = instrument.settings_with(FEW, {})

        readings = [instrument.measure(subject, settings, Session()) for _ in range(2)]

        kind = instrument.reading
        assert isinstance(readings[0], kind)
        assert kind.model_validate_json(readings[0].model_dump_json()) == readings[0]
        assert readings[0] == readings[1]  # deterministic
        assert same_state(subject, before)
        assert not subject.model.training

    def test_depends_on_its_declared_settings_alone(self, name: str, network: str) -> None:
        instrument, subject = INSTRUMENTS[name], subject_of(network, dtype=torch.float32)
        other = {
            "seed": 1,
            "rho": 0.9,
            "samples": 3,
            "iterations": 2,
            "candidates": (5,),
            "grid": 5,
            "span": 2.0,
        }
        undeclared = {key: value for key, value in other.items() if key not in instrument.settings}
        changed = instrument.settings_with(FEW.model_copy(update=undeclared), {})

        first = instrument.measure(subject, instrument.settings_with(FEW, {}), Session())

        assert instrument.measure(subject, changed, Session()) == first

    def test_pictures_carry_its_name(self, name: str, network: str, tmp_path: Path) -> None:
        instrument, subject = INSTRUMENTS[name], subject_of(network, dtype=torch.float32)
        reading = instrument.measure(subject, instrument.settings_with(FEW, {}), Session())

        drawn = draw(name, [("one", reading), ("another", reading)], tmp_path, "24 images")

        assert sorted(drawn) == sorted(tmp_path.iterdir())
        assert all(path.stem == name or path.stem.startswith(f"{name}_") for path in drawn)


def test_float_layers_are_measured() -> None:
    subject = subject_of()
    first = next(iter(subject.layers))
    layer = subject.layers[first]
    layer.weight_quantizer, layer.input_quantizer = nn.Identity(), nn.Identity()

    readings = {
        name: instrument.measure(subject, instrument.settings_with(FEW, {}), Session())
        for name, instrument in INSTRUMENTS.items()
    }

    assert readings["distributions"].layers[0].weights is None  # type: ignore[attr-defined]
    assert first not in [entry.name for entry in readings["flips"].layers]  # type: ignore[attr-defined]
    assert readings["sensitivity"].layers[0].weight_bits is None  # type: ignore[attr-defined]
