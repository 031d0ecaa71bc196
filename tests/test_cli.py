"""The commands that users type, with the dotted model path and with each recipe."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from conftest import folder_arguments

from anomalib_csflow import cli
from anomalib_csflow.features.weights import create_backbone

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted({path.name for path in CONFIGS.glob("*.yaml")} - {"benchmark.yaml", "ablation.yaml"})
OF_CS_FLOW = [name for name in RECIPES if name.startswith("cs_flow")]
Run = Callable[..., Path]


def arguments(options: dict[str, object], prefix: str) -> list[str]:
    """Options as the command line has them."""
    return [f"--{prefix}.{key}={value}" for key, value in options.items()]


SMALL_MODEL = [
    "--model=anomalib_csflow.CSFlow",
    *arguments(
        {
            "backbone": "tf_efficientnet_lite0",
            "layer": "blocks.4",
            "weights": "package",
            "image_size": "[96,128]",
            "num_blocks": 1,
            "hidden_channels": 8,
        },
        "model",
    ),
]
LAYERS = {"backbone": "tf_efficientnet_lite0", "layers": "[blocks.2,blocks.4]", "weights": "package"}
LAYER = {"backbone": "tf_efficientnet_lite0", "layer": "blocks.4", "weights": "package", "hidden_channels": 8}
SIBLINGS: dict[str, dict[str, object]] = {
    "CFlow": LAYERS | {"image_size": "[64,96]", "num_blocks": 1, "condition_channels": 16},
    "FastFlow": LAYERS | {"image_size": "[64,96]", "num_steps": 2},
    "MSFlow": LAYERS | {"image_size": "[64,96]", "num_blocks": "[1,1]", "condition_channels": 16},
    "DifferNet": LAYER | {"image_size": "[64,96]", "num_blocks": 1, "num_scales": 1, "num_test_rotations": 2},
    "RealNVP": LAYER | {"image_size": "[64,96]", "num_blocks": 2},
}
SMALL_MODELS = {"CSFlow": SMALL_MODEL} | {
    name: [f"--model=anomalib_csflow.{name}", *arguments(options, "model")] for name, options in SIBLINGS.items()
}
SMALLER = {
    # what is wide, or slow to make, in a recipe's backbone: a smaller one with the same names of layers
    "wide_resnet50_2.tv_in1k": {"backbone": "resnet18.tv_in1k", "image_size": 64},
    "deit_base_distilled_patch16_384.fb_in1k": {
        "backbone": "deit_tiny_distilled_patch16_224.fb_in1k",
        "image_size": 96,
    },
    "cait_m48_448.fb_dist_in1k": {
        "backbone": "cait_xxs24_224.fb_dist_in1k",
        "image_size": 224,
        "layers": "[blocks.1]",
        "num_steps": 2,
    },
    "tf_efficientnet_lite2": {"image_size": 128},
    "torchvision/alexnet": {"image_size": 256, "hidden_channels": 8, "num_test_rotations": 4},
    "tf_efficientnet_b4.aa_in1k": {"backbone": "tf_efficientnet_lite0", "image_size": 64},
}
EXPORTS = {"torch": "pt", "onnx": "onnx", "openvino": "xml"}
QUICK = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def run(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of anomalib's command line in this process; returns the folder of results."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, *options: str, data: bool = True) -> Path:
        folder = ["--data=anomalib.data.Folder", *arguments(folder_arguments(image_folder), "data")] if data else []
        AnomalibCLI([command, *options, *folder])
        return tmp_path / "results" / model_name(options)

    return run


def model_name(options: Sequence[str]) -> str:
    """The class of the model that a command names, in a recipe or by itself."""
    named = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    config = yaml.safe_load(Path(named["config"]).read_text()) if "config" in named else {}
    return str(named.get("model") or config["model"]["class_path"]).rpartition(".")[2]


def checkpoint(results: Path) -> Path:
    """The latest run's checkpoint."""
    return results / "textures" / "latest" / "weights" / "lightning" / "model.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("model", SMALL_MODELS.values(), ids=SMALL_MODELS.keys())
def test_fit_test_train_predict_and_export(model: list[str], run: Run, image_folder: Path, tmp_path: Path) -> None:
    results = run("fit", *model, *QUICK)
    path = checkpoint(results)
    assert path.is_file()
    run("test", *model, *QUICK[:1], f"--ckpt_path={path}")
    run("train", *model, *QUICK)
    run("predict", *model, *QUICK[:1], f"--ckpt_path={path}", f"--data={image_folder / 'test/blob'}", data=False)
    assert len(list((results / "latest" / "images").rglob("*.png"))) == 4
    for kind, suffix in EXPORTS.items():
        if kind == "onnx" and model is not SMALL_MODEL:  # a sibling's is a step of OpenVINO's, and tested by itself
            continue
        run(
            "export",
            *model,
            f"--export_type={kind}",
            f"--ckpt_path={path}",
            f"--export_root={tmp_path}",
            data=False,
        )
        assert (tmp_path / "weights" / kind / f"model.{suffix}").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", OF_CS_FLOW)
def test_recipes(config: str, run: Run, image_folder: Path, tmp_path: Path) -> None:
    """Each recipe as it is, but for what needs a hub, hours or a GPU: weights, width, size and epochs."""
    model = [f"--config={CONFIGS / config}", "--model.hidden_channels=8", "--model.image_size=128"]
    name = yaml.safe_load((CONFIGS / config).read_text())["model"]["init_args"]["backbone"]
    torch.save(create_backbone(name, "random").state_dict(), tmp_path / "random.pth")
    model.append(f"--model.weights={tmp_path / 'random.pth'}")
    path = checkpoint(run("fit", *model, *QUICK))
    run("test", *model, f"--ckpt_path={path}")
    run("train", *model, *QUICK)
    run("predict", *model, f"--ckpt_path={path}", f"--data={image_folder / 'test/blob'}", data=False)
    for kind, suffix in EXPORTS.items():
        options = [f"--export_type={kind}", f"--ckpt_path={path}", f"--export_root={tmp_path}"]
        run("export", *model, *options, data=False)
        assert (tmp_path / "weights" / kind / f"model.{suffix}").is_file()


@pytest.mark.parametrize("config", sorted(set(RECIPES) - set(OF_CS_FLOW)))
def test_recipes_of_siblings(config: str, run: Run, tmp_path: Path) -> None:
    """Each recipe trains as it is, but for what needs a hub, hours or a GPU."""
    arguments_ = yaml.safe_load((CONFIGS / config).read_text())["model"]["init_args"]
    changes: dict[str, object] = {"weights": tmp_path / "random.pth"} | SMALLER.get(
        arguments_["backbone"], {"image_size": 64}
    )
    changes |= {"max_steps": 2} if "max_steps" in arguments_ else {}
    name = str(changes.get("backbone", arguments_["backbone"]))
    torch.save(create_backbone(name, "random").state_dict(), tmp_path / "random.pth")
    options = [f"--config={CONFIGS / config}", *arguments(changes, "model")]
    path = checkpoint(run("fit", *options, *QUICK))
    assert torch.load(path, weights_only=True)["anomalib_csflow"]["arguments"]["backbone"] == name
    run("test", *options, f"--ckpt_path={path}")


@pytest.mark.parametrize("config", RECIPES)
def test_recipes_fix_the_seed(config: str) -> None:
    """Without the data's, anomalib splits a folder anew in each command, and tests on what it trained on."""
    recipe = yaml.safe_load((CONFIGS / config).read_text())
    assert recipe["seed_everything"] == recipe["data"]["init_args"]["seed"] == 0


def test_console_script_knows_short_names(run: Run, image_folder: Path, tmp_path: Path) -> None:
    options = ["--model=CSFlow", *SMALL_MODEL[1:], *QUICK]
    folder = ["--data=Folder", *arguments(folder_arguments(image_folder), "data")]
    cli.main(["fit", *options, *folder])
    assert checkpoint(tmp_path / "results" / "CSFlow").is_file()


def test_benchmark_of_anomalib(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = {
        "class_path": "anomalib_csflow.CSFlow",
        "init_args": {
            "backbone": "tf_efficientnet_lite0",
            "layer": "blocks.4",
            "weights": "package",
            "image_size": 64,
            "num_blocks": 1,
            "hidden_channels": 4,
            "max_epochs": 1,
        },
    }
    config = tmp_path / "benchmark.yaml"
    data = {"class_path": "Folder", "init_args": folder_arguments(image_folder)}
    benchmark = {"seed": 0, "model": model, "data": data}
    config.write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": benchmark}))
    cli.main(["benchmark", f"--config={config}"])
    assert list(tmp_path.rglob("results.csv"))


@pytest.mark.slow
def test_the_unchanged_anomalib_command(image_folder: Path, tmp_path: Path) -> None:
    """A process of its own, and nothing imported before: the dotted path is enough."""
    folder = ["--data=Folder", *arguments(folder_arguments(image_folder), "data")]
    command = [str(Path(sys.executable).with_name("anomalib")), "fit", *SMALL_MODEL, *QUICK, *folder]
    subprocess.run(command, cwd=tmp_path, check=True)
    state = torch.load(checkpoint(tmp_path / "results" / "CSFlow"), weights_only=True)
    assert state["epoch"] == 1  # written once more when the epoch was over, with thresholds


def test_help_lists_own_commands_and_anomalibs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for command in (*cli.COMMANDS, "fit", "predict"):
        assert re.search(rf"^\W*{command}  +\w", said, re.MULTILINE), command


@pytest.mark.parametrize("names", [[], ["--help"]])
def test_install_weights_says_how(names: Sequence[str]) -> None:
    with pytest.raises(SystemExit, match=r"usage: anomalib-csflow install-weights NAME .* tf_efficientnet_lite0"):
        cli.main(["install-weights", *names])
