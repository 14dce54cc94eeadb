"""The command line: exit codes, stdout, stderr and the files written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.cli.quantize import EFFICIENT
from saqcli.cli.screens.tables import show_models
from saqcli.models.catalogue import Entry
from saqcli.pipelines import quantize
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.training import trainer
from tests.support.command_line import answer, last_error, last_line, saq
from tests.support.digits import MODEL, float_options

pytestmark = pytest.mark.usefixtures("digits")


class TestProfile:
    def test_resnet18_bops_match_the_paper(self) -> None:
        result = saq("profile", "torchvision/resnet18", "--bits", 4, "--no-pretrained", "--json")

        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["bops"] == 34_714_419_200
        assert found["float_bops"] == 1_857_611_104_256 == 1024 * found["macs"]
        assert found["floor_bops"] == 14_367_850_496
        assert {"name", "kind", "macs", "weight_bits", "activation_bits", "bops", "pinned"} <= set(
            found["layers"][0]
        )
        assert sum(layer["bops"] for layer in found["layers"]) == found["bops"]
        assert [layer["name"] for layer in found["layers"] if layer["pinned"]] == ["conv1", "fc"]

    @pytest.mark.parametrize(
        ("model", "bits", "bops"),
        [
            ("saq/preresnet20", 4, 674_643_968),
            ("saq/preresnet20", 3, 392_052_736),
            ("saq/mobilenetv2_cifar", 4, 1_508_933_632),
            ("saq/mobilenetv2_cifar", 3, 877_131_776),
        ],
    )
    def test_cifar_bops_match_the_paper(self, model: str, bits: int, bops: int) -> None:
        result = saq("profile", model, "--num-classes", 100, "--bits", bits, "--json")

        assert json.loads(result.stdout)["bops"] == bops

    def test_prints_a_table(self) -> None:
        result = saq("profile", "saq/resnet20", "--bits", 4)

        assert result.exit_code == 0
        assert "layer1.0.conv1" in result.stdout
        assert "reachable budgets" in result.stdout

    def test_policy_is_costed(self, tmp_path: Path, digits: Path) -> None:
        policy = {
            "schema_version": 1,
            "model": "saq/resnet20",
            "layers": {"conv1": {"weight": 8, "activation": 8}},
        }
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(policy))

        result = saq("profile", "saq/resnet20", "--policy", path)

        assert result.exit_code == 1
        assert "layer1.0.conv1" in last_error(result)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            (["profile", "resnet17"], 1, "resnet18"),
            (["profile", "resnet18", "--bits", "9"], 1, "2 to 8"),
            (["profile", "resnet18", "--bits", "4", "--policy", "p.json"], 1, "one of them"),
            (["quantize", "saq/resnet20", "--bits", "9"], 1, "2 to 8"),
            (["quantize", "saq/resnet20", "--bops", "34"], 1, "unit"),
            (["quantize", "saq/resnet20", "--no-pretrained", "--bits", "4"], 1, "--data"),
            (["quantize", "saq/resnet20", "--bits", "4", "--method", "magic"], 1, "saq"),
            (
                ["eval", "saq/resnet20", "--no-pretrained", "--data", "x", "--device", "cuda:99"],
                1,
                "--device cuda:99 is not available (",
            ),
            (
                ["eval", "saq/resnet20", "--no-pretrained", "--data", "x", "--device", "meta"],
                1,
                "--device meta is not a device: give cpu, cuda or cuda:1, or omit it",
            ),
            (["quantize", "saq/resnet20", "--bits", "4", "--recipe", "magic"], 1, "quick"),
            (["quantize", "saq/resnet20", "--bits", "4", "--set", "training.speed=1"], 1, "speed"),
            (["quantize", "saq/resnet20", "--bits", "4", "--set", "training.schedule=foo"], 1, "foo"),
            (["quantize", "saq/resnet20", "--bits", "4", "--set", "training.optimizer=foo"], 1, "foo"),
            (["quantize", "saq/resnet20", "--bits", "4", "--set", "training.minimizer.foo=1"], 1, "foo"),
            (
                ["quantize", "saq/resnet20", "--bits", "4", "--set", "training.minimizer.bn_second_pass=x"],
                1,
                "freeze",
            ),
            (["quantize", "saq/resnet20", "--bits", "4", "--seed", "99999999999999999999"], 1, "seed"),
            (["quantize", "saq/resnet20", "--bits", "4", "--set", "training.lr.x=1"], 1, "training.lr"),
            (
                ["quantize", "saq/resnet20", "--bops", "4G", "--set", "quantization.candidates=[1,12]"],
                1,
                "candidates",
            ),
            (["quantize", "--resume", "--run-dir", "/no/such/run"], 1, "/no/such/run"),
            (["quantize", "--bits", "4"], 1, "MODEL"),
            (
                ["eval", "timm/test_vit", "--no-pretrained", "--num-classes", "9", "--input-size", "33"],
                1,
                "33",
            ),
            (["eval", "saq/resnet20", "--no-pretrained", "--data", "/no/such/folder"], 1, "/no/such/folder"),
            (["eval", "model.onnx", "--data", "x"], 1, "model.onnx"),
            (["eval", "--no-such-option"], 2, "No such option"),
            (["profile", "--bits", "4"], 1, "no model was named"),
        ],
    )
    def test_errors_are_one_line_with_advice(self, arguments: list[str], code: int, says: str) -> None:
        result = saq(*arguments)

        assert result.exit_code == code
        assert says in result.stderr
        if code == 1:
            assert says in last_error(result)

    def test_budget_below_floor_reports_range(self, digits: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"

        result = saq("quantize", MODEL, *float_options(digits), "--bops", "1M", "--run-dir", run, "--quiet")

        assert result.exit_code == 4
        assert "reachable: 42.51 M" in last_error(result)
        assert not run.exists()

    def test_weights_of_another_model(self, digits: Path, tmp_path: Path) -> None:
        options = float_options(digits)

        result = saq(
            "quantize", "saq/resnet32", *options, "--bits", 4, "--run-dir", tmp_path / "run", "--quiet"
        )

        assert result.exit_code == 1
        assert "does not fit saq/resnet32" in last_error(result)

    def test_pickle_code_is_not_executed(self, digits: Path, tmp_path: Path) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "exploded"),)

        path = tmp_path / "weights.pth"
        torch.save({"conv1.weight": Bomb()}, path)

        result = saq("eval", MODEL, "--weights", path, "--data", digits / "images", "--quiet")

        assert result.exit_code == 1
        assert "code" in last_error(result)
        assert not (tmp_path / "exploded").exists()

    def test_unreadable_image_is_named_or_skipped(self, digits: Path, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        for label in range(10):
            (folder / str(label)).mkdir(parents=True)
            source = sorted((digits / "images" / "val" / str(label)).iterdir())[0]
            (folder / str(label) / "good.png").write_bytes(source.read_bytes())
        (folder / "3" / "broken.png").write_bytes(b"no image")
        options = [*float_options(digits)]
        options[options.index("--data") + 1] = str(folder)

        refused = saq("eval", MODEL, *options, "--json")
        skipped = saq("eval", MODEL, *options, "--json", "--bad-images", "skip")

        assert refused.exit_code == 1
        assert "broken.png" in last_error(refused)
        assert skipped.exit_code == 0
        assert (json.loads(skipped.stdout)["images"], json.loads(skipped.stdout)["skipped"]) == (10, 1)

    def test_empty_class_folder_is_named(self, digits: Path, tmp_path: Path) -> None:
        for label in range(10):
            (tmp_path / "images" / str(label)).mkdir(parents=True)

        result = saq("eval", MODEL, *float_options(digits, data=tmp_path / "images"), "--json")

        assert result.exit_code == 1
        assert str(tmp_path / "images") in last_error(result)

    def test_diverging_training_fails(self, digits: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        options = ("--bits", 4, "--epochs", 1, "--batch-size", 32, "--lr", "1e6", "--run-dir", run, "--quiet")

        result = saq("quantize", MODEL, *float_options(digits, digits / "few"), *options)

        assert result.exit_code == 1
        assert "--lr" in last_error(result)
        assert json.loads((run / "manifest.json").read_text())["status"] == "failed"
        assert not any((run / "artifacts").iterdir())

    def test_run_failed_at_startup_can_restart(self, digits: Path, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        shutil.copytree(digits / "few", folder)
        broken = folder / "val" / "3" / "broken.png"
        broken.write_bytes(b"no image")
        options = [*float_options(digits, data=folder), "--bits", 4, "--epochs", 0, "--json"]
        options += ["--no-export"]

        first = saq("quantize", MODEL, *options, "--run-dir", tmp_path / "run")
        broken.unlink()
        second = saq("quantize", MODEL, *options, "--run-dir", tmp_path / "run")

        assert first.exit_code == 1
        assert "broken.png" in last_error(first)
        assert second.exit_code == 0, second.stderr

    def test_foreign_files_are_not_overwritten(self, digits: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")

        result = saq(
            "quantize", MODEL, *float_options(digits), "--bits", 4, "--overwrite", "--run-dir", tmp_path
        )

        assert result.exit_code == 1
        assert "other files" in last_error(result)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestTrainingOptions:
    def test_invalid_options_are_one_line_errors(self, digits: Path, tmp_path: Path) -> None:
        given = ["quantize", MODEL, *float_options(digits), "--bits", 4, "--run-dir", tmp_path / "run"]
        for options, expected in (
            (["--mixup", 0.2, "--batch-size", 33], "multiple of 2"),
            (["--ascent-fraction", 0], "ascent_fraction"),
            (["--ema", 1], "ema_decay"),
            (["--clip-grad", 0], "clip_grad"),
            (["--precision", "float16"], "precision"),
            (["--optimizer", "nosuch"], "nosuch"),
            (["--optimizer", "adahessian"], "twice"),
            (["--sam-reuse", 0.5], "--sam-interval"),
            (["--sam-reuse", 0.5, "--sam-interval", 5, "--ascent-fraction", 0.5], "--ascent-fraction"),
            (["--set", "training.minimizer.rho=abc"], "rho"),
        ):
            result = saq(*given, *options)
            assert result.exit_code == 1, options
            assert expected in last_error(result)
        assert not (tmp_path / "run").exists()

    def test_random_teacher_is_refused(self, digits: Path) -> None:
        result = saq(
            *("quantize", "saq/resnet20", "--no-pretrained", "--bits", 4, "--distill"),
            *("--data", digits / "images"),
        )
        assert result.exit_code == 1
        assert "--weights" in last_error(result)

    def test_flags_override_the_efficient_preset(self) -> None:
        base = ["quantize", "saq/resnet20", "--no-pretrained", "--bits", 4, "--dry-run", "--json"]
        for options, fraction in (
            ([], 1),
            (["--efficient"], EFFICIENT["training.ascent_fraction"]),
            (["--efficient", "--ascent-fraction", 0.5], 0.5),
            (["--efficient", "--set", "training.ascent_fraction=0.4"], 0.4),
        ):
            plan = json.loads(saq(*base, *options).stdout)
            assert plan["config"]["training"]["ascent_fraction"] == fraction


class TestModels:
    def test_lists_matching_names(self) -> None:
        result = saq("models", "saq/*")

        assert result.exit_code == 0
        assert "saq/preresnet20" in result.stdout.splitlines()

    def test_json_has_more_fields(self) -> None:
        networks = {network["name"]: network for network in answer("models", "mobilenet_v2*")["models"]}

        found = networks["torchvision/mobilenet_v2"]
        assert (found["parameters"], found["input_size"]) == (3_504_872, [3, 224, 224])
        assert found["tags"] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
        assert found["covered"] in (True, False, None)

    def test_prints_a_table(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        entries = [
            Entry(
                "timm/a_network_with_a_long_name_of_fifty_characters_or_so",
                61_000_000,
                (3, 224, 160),
                (),
                None,
            ),
            Entry("torchvision/other", None, (1, 32, 32), ("first", "second"), True),
        ]
        for width in (80, 120):
            monkeypatch.setenv("COLUMNS", str(width))
            show_models(entries)
            shown = capsys.readouterr().out
            *table, note = shown.splitlines()
            assert max(map(len, table)) <= width
            rows = [line.split() for line in table]
            long, numbers = entries[0].name, ["61", "M", "224x160", "-", "-"]
            assert ["torchvision/other", "-", "1x32", "first", "+1", "yes"] in rows
            assert rows[1] == [long] if width == 80 else [long, *numbers]
            assert numbers in (rows[2], rows[1][1:])
            assert "saq models 'torchvision/other.*'" in note

    def test_pattern_without_match_is_refused(self) -> None:
        assert saq("models", "nosuchnet*").exit_code == 1


class TestInstalledProgram:
    def test_help_does_not_import_torch(self) -> None:
        code = "import sys; import saqcli.cli; sys.exit('torch' in sys.modules)"

        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_error_is_one_line_with_exit_code(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "saqcli", "quantize", "--resume", "--run-dir", "/no/such/run"],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1

    @pytest.fixture(scope="class")
    def whole(self, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """An uninterrupted run."""
        run = tmp_path_factory.mktemp("whole") / "run"
        assert subprocess.run(_command(digits, run), env=_single_threaded(), check=False).returncode == 0
        return run

    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_signal_before_training_gives_resume_command(
        self, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
    ) -> None:
        run = tmp_path / "run"
        monkeypatch.setattr(quantize, "calibrate", lambda *_: signal.raise_signal(number))
        stopped = saq(*_command(digits, run)[3:])

        assert stopped.exit_code == code
        resume = f"`saq quantize --run-dir {run} --resume`"
        assert last_line(stopped) == f"Interrupted before anything was saved. Start again with {resume}"
        assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
        assert not (run / ".lock").exists()

    def test_resume_within_an_epoch_is_bit_identical(
        self, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Runs in this process, since starting another takes longer than the test."""
        whole, run = tmp_path / "whole", tmp_path / "run"
        assert saq(*_command(digits, whole)[3:]).exit_code == 0
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "make_minimizer", _raising(signal.SIGTERM, step=2))
            stopped = saq(*_command(digits, run)[3:])

        assert stopped.exit_code == 143
        assert last_line(stopped).startswith("Interrupted; progress saved. Resume with `saq ")
        assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"
        state = CheckpointFile(run / "checkpoints" / "last.ckpt").load() or {}
        assert state["position"] == {"epoch": 0, "step": 2}
        assert saq("quantize", "--run-dir", run, "--resume", "--quiet").exit_code == 0
        assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
        assert _tensors(whole) == _tensors(run)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
    )
    def test_resume_after_signal_is_bit_identical(
        self, digits: Path, tmp_path: Path, whole: Path, number: int, code: int
    ) -> None:
        run = tmp_path / "run"
        process = subprocess.Popen(
            _command(digits, run), env=_single_threaded(), stderr=subprocess.PIPE, text=True
        )
        _wait_for(run / "checkpoints" / "last.ckpt", process)
        time.sleep(0.3)  # into the first epoch
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)

        assert process.returncode == code
        assert "--resume" in stderr
        assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"

        again = [sys.executable, "-m", "saqcli", "quantize", "--run-dir", str(run), "--resume", "--quiet"]
        assert subprocess.run(again, env=_single_threaded(), check=False).returncode == 0
        assert json.loads((run / "manifest.json").read_text())["status"] == "finished"
        assert _tensors(whole) == _tensors(run)


def _raising(number: int, step: int) -> Any:
    """Build a minimizer that raises the signal in the step of that number."""
    make, calls = trainer.make_minimizer, 0

    def made(*arguments: Any) -> Any:
        minimizer = make(*arguments)
        take = minimizer.update

        def counted(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                signal.raise_signal(number)
            return take(*given, **options)

        minimizer.update = counted
        return minimizer

    return made


def _command(digits: Path, run: Path) -> list[str]:
    """A run with every kind of state that a checkpoint must hold."""
    options = [
        *(*float_options(digits, digits / "few"), "--bits", "3", "--epochs", "2", "--quiet"),
        *("--batch-size", "48", "--no-export", "--run-dir", str(run)),
        *("--sam-interval", "3", "--sam-reuse", "0.5", "--ema", "0.9", "--mixup", "0.2", "--cutmix", "0.5"),
        *("--distill", "--micro-batch", "24", "--clip-grad", "1"),
    ]
    return [sys.executable, "-m", "saqcli", "quantize", MODEL, *options]


def _single_threaded() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _wait_for(path: Path, process: Any) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def _tensors(run: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    tensors = load_file(run / "artifacts" / "model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
