"""Images that anomalib would read as black or white, and sets of images with nothing to learn from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_mask
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import SMALL, folder_arguments
from PIL import Image
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_csflow import CSFlow
from anomalib_csflow.engine.images import UnreadableImageError, check_images, check_variety
from anomalib_csflow.flows import ChannelStandardization, ChannelWhitening

GREY = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


def saved(values: np.ndarray, path: Path) -> Path:
    """Write an image of whatever mode the values have."""
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY, r"values in \[0, 1\] only, which anomalib reads as black"),
        (np.where(GREY < 0.01, np.nan, 255 * GREY), "values that are not finite"),
        (np.where(GREY > 0.99, np.nan, 255 * GREY), "values that are not finite"),
        (np.where(GREY > 0.99, np.inf, 255 * GREY), "values that are not finite"),
        ((-1000 * GREY).astype(np.int32), "values down to -1000, and anomalib reads all below 0 as black"),
        ((GREY * 255 - 3).astype(np.float32), "values down to -3"),
        ((GREY * 65535).astype(np.uint16), "values up to 65535, and anomalib reads all above 255 as white"),
        ((GREY * 65535).astype(np.int32), "values up to 65535"),
    ],
    ids=["unit", "NaN first", "NaN last", "infinite", "negative", "below 0", "16 bits", "32 bits"],
)
def test_what_would_be_read_as_black_or_white_is_refused_by_name(
    values: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = saved(values.astype(np.float32) if values.dtype == np.float64 else values, tmp_path / "wide.tiff")
    with pytest.raises(UnreadableImageError, match=rf"the image .*wide\.tiff has {message}.*: scale it to 8 bits"):
        check_images([path])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_wide_images_of_8_bit_values_are_read_as_they_are(dtype: type, tmp_path: Path) -> None:
    path = saved((255 * GREY).astype(dtype), tmp_path / "image.tiff")
    check_images([path, saved(np.zeros((8, 8), dtype), tmp_path / "black.tiff")])
    read = np.asarray(Image.open(path).convert("RGB"))[..., 0]
    np.testing.assert_array_equal(read, (255 * GREY).astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("high", [1, 255, 65535])
def test_masks_of_any_depth_are_taken(dtype: type, high: int, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype)
    mask[2:5, 3:6] = min(high, np.iinfo(dtype).max)
    path = saved(mask, tmp_path / "mask.tiff")
    check_images([], [path])
    np.testing.assert_array_equal(read_mask(path, as_tensor=True).numpy(), mask > 0)


@pytest.mark.parametrize(
    ("values", "message"), [(GREY, "between 0 and 1"), (-GREY, "values down to -1"), (GREY * np.nan, "not finite")]
)
def test_masks_that_would_lose_defects_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    path = saved(values, tmp_path / "mask.tiff")
    with pytest.raises(UnreadableImageError, match=rf"the mask .*mask\.tiff has .*{message}"):
        check_images([], [path])


def test_16_bit_masks_in_the_engine(image_folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for file in (image_folder / "masks").iterdir():
        saved(np.asarray(Image.open(file)).astype(np.uint16) * 257, masks / file.name)
    datamodule = Folder(**folder_arguments(image_folder) | {"mask_dir": str(masks)})
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    (found,) = engine.test(CSFlow(**SMALL, image_size=64).eval(), datamodule=datamodule)
    assert 0 <= found["pixel_AUROC"] <= 1


# -- nothing to learn from ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["black", "alike", "one"])
@pytest.mark.parametrize("standardize", [True, False])
def test_training_images_with_nothing_to_learn_from_are_said_before_training(
    kind: str, standardize: bool, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "good").mkdir()
    pixels = np.asarray(Image.open(next((image_folder / "train/good").iterdir())))
    for number in range(1 if kind == "one" else 4):
        saved(pixels if kind == "alike" else np.zeros_like(pixels), tmp_path / f"good/{number}.png")
    datamodule = Folder("same", "good", root=tmp_path, val_split_mode="none", num_workers=0)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False)
    detector = CSFlow(**{**SMALL, "standardize": standardize, "image_size": 64})
    with pytest.raises(UnreadableImageError, match=r"0\.png has nothing to learn from: .*; are they the right files"):
        engine.fit(detector, datamodule=datamodule)
    assert engine.trainer.global_step == 0


def test_images_that_differ_in_one_pixel_are_taken(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    paths = [saved(pixels, tmp_path / f"{number}.png") for number in range(3)]
    pixels[4, 4] = 1
    check_variety([*paths, saved(pixels, tmp_path / "other.png")])
    check_variety([tmp_path / "other.png"])
    check_variety([])


@pytest.mark.parametrize("layer", [ChannelStandardization, ChannelWhitening])
@pytest.mark.parametrize("value", [0.0, 1e-20, 3.0, 1e6])
def test_features_that_do_not_vary_are_refused(layer: type, value: float) -> None:
    features = torch.full((4, 3, 2, 2), value) * (1 + 1e-7 * torch.rand(4, 1, 1, 1))  # as by batches of other sizes
    with pytest.raises(ValueError, match="level 0: the training images' features do not vary: are the images all"):
        layer([(3, 2, 2)]).fit([(features,)])
    with pytest.raises(ValueError, match="level 0: the training images' features are not finite"):
        layer([(3, 2, 2)]).fit([(features * torch.nan,)])


def test_pre_processing_follows_the_backbone() -> None:
    def transform(detector: CSFlow) -> tuple[list[float], list[float], list[int]]:
        resize, normalize = detector.pre_processor.transform.transforms
        assert isinstance(resize, Resize)
        assert isinstance(normalize, Normalize)
        return normalize.mean, normalize.std, resize.size

    assert transform(CSFlow(**SMALL, image_size=(96, 128))) == ([0.5] * 3, [0.5] * 3, [96, 128])
    resnet = CSFlow("resnet18.tv_in1k", "layer2", "random", image_size=64, hidden_channels=4)
    assert transform(resnet) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [64, 64])


def test_custom_pre_processor_is_used() -> None:
    detector = CSFlow(**SMALL, image_size=96, pre_processor=PreProcessor(Resize((128, 64))))
    assert detector.input_size == (128, 64)


@pytest.mark.parametrize(("mode", "gain"), [("L", 1), ("I;16", 1), ("RGB", 1), ("RGBA", 1), ("I;16", 256)])
def test_grey_and_16_bit_images(mode: str, gain: int, image_folder: Path, tmp_path: Path) -> None:
    """Whatever anomalib reads; but it reads 16-bit values above 255 as white, which is said instead."""
    folder = tmp_path / "good"
    folder.mkdir()
    for source in sorted((image_folder / "train/good").iterdir()):
        values = np.asarray(Image.open(source))
        image = Image.fromarray(values.astype(np.uint16) * gain) if mode == "I;16" else Image.open(source).convert(mode)
        assert image.mode == mode
        image.save(folder / source.name)
    datamodule = Folder("grey", "good", root=tmp_path, train_batch_size=4, eval_batch_size=1, num_workers=0)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path)
    detector = CSFlow(**SMALL, image_size=96)
    if gain > 1:
        with pytest.raises(UnreadableImageError, match=r"\.png has values up to .* scale it to 8 bits per channel"):
            engine.fit(detector, datamodule=datamodule)
        return
    engine.fit(detector, datamodule=datamodule)
    (prediction, *_) = engine.predict(detector, data_path=folder)
    assert torch.isfinite(prediction.pred_score).all()
    assert prediction.image.std() > 0.1


def broken_copy(source: Path, folder: Path, kind: str) -> Path:
    """A copy of a folder with one image more, which cannot be read."""
    folder.mkdir(parents=True)
    files = sorted(source.iterdir())
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    content = files[0].read_bytes()
    broken = {"no image": b"no image", "cut": content[: len(content) // 2], "empty": b""}[kind]
    (folder / "broken.png").write_bytes(broken)
    return folder


@pytest.mark.parametrize("kind", ["no image", "cut", "empty"])
def test_unreadable_image_is_named_before_training(kind: str, image_folder: Path, tmp_path: Path) -> None:
    folder = broken_copy(image_folder / "train/good", tmp_path / "images", kind)
    datamodule = Folder(**folder_arguments(image_folder) | {"normal_dir": str(folder)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=datamodule
        )


@pytest.mark.parametrize("folder", ["normal_test_dir", "mask_dir"])
def test_unreadable_validation_image_is_named_before_training(folder: str, image_folder: Path, tmp_path: Path) -> None:
    arguments = folder_arguments(image_folder)
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted((image_folder / str(arguments[folder])).iterdir()):
        content = file.read_bytes()
        (images / file.name).write_bytes(content[: len(content) // 2] if file.stem == "002" else content)
    datamodule = Folder(**arguments | {folder: str(images)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*002\.png"):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=datamodule
        )


def test_unreadable_image_is_named_before_test_and_predict(
    detector: CSFlow, image_folder: Path, tmp_path: Path
) -> None:
    folder = broken_copy(image_folder / "test/good", tmp_path / "images", "cut")
    engine = Engine(accelerator="cpu", default_root_dir=tmp_path)
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        engine.predict(detector, data_path=folder)
    datamodule = Folder(**folder_arguments(image_folder) | {"normal_test_dir": str(folder)})
    with pytest.raises(UnreadableImageError, match=r"cannot read the image .*broken\.png"):
        engine.test(detector, datamodule=datamodule)


@pytest.mark.parametrize("exists", [True, False])
def test_empty_or_missing_folder(exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "good").mkdir()
    with pytest.raises((RuntimeError, FileNotFoundError), match=str(tmp_path / "good")):
        Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path).fit(
            CSFlow(**SMALL, image_size=96), datamodule=Folder("none", "good", root=tmp_path)
        )
