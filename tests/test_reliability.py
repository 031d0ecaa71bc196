"""Promises under random faults: a short form of each in every run, a long one by ``make long``; docs/reliability.md."""

import multiprocessing
import pickle
import time
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.data.utils import read_image
from conftest import texture
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_arguments import DETECTORS, SIX, WRONG, parameters
from test_checkpoint_files import Harm, good  # noqa: F401 (a fixture)
from test_feature_cache import key

from anomalib_csflow import CSFlow
from anomalib_csflow.benchmark.run import config
from anomalib_csflow.engine.checkpoints import CHECKPOINT_KEY, CheckpointError
from anomalib_csflow.engine.images import UnreadableImageError, check_images
from anomalib_csflow.features.store import FeatureStore
from anomalib_csflow.features.weights import WeightsError, create_backbone
from anomalib_csflow.recipe_files import find_recipes

PYRAMID = (torch.linspace(0, 1, 48).reshape(3, 4, 4), torch.arange(6, dtype=torch.float32).reshape(3, 2, 1))


def counts(short: int, long: int) -> pytest.MarkDecorator:
    """Random cases of the form that is always run, and of the long one."""
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=pytest.mark.long)])


def each(count: int, test: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    """Run a test on random values: the same in every short run, others in every long one."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 200,
        suppress_health_check=quiet,
        phases=[Phase.generate],  # cases are small, and to load checkpoints again for a smaller one takes minutes
    )
    run(given(*strategies)(test))()


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "zeros", "cut", "insert", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """A file's content with some damage."""
    data = bytearray(content)
    for kind, place, value in edits:
        at = int(place * len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << value % 8
        elif kind == "byte" and data:
            data[at] = value
        elif kind == "zeros":
            data[at : at + value] = bytes(len(data[at : at + value]))
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes([value]) * (value + 1)
        elif kind == "swap":
            data[at : at + value], data[:value] = data[:value], data[at : at + value]
    return bytes(data)


# -- cached features -----------------------------------------------------------------------------------


@counts(60, 2000)
def test_a_corrupted_file_never_gives_other_features(count: int, tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {})
    store.put(key("a"), PYRAMID)
    path = store.path(key("a"))
    content = path.read_bytes()

    def holds(edits: list[tuple[str, float, int]]) -> None:
        path.write_bytes(edited(content, edits))
        read = FeatureStore(tmp_path, {}).get(key("a"))
        assert read is None or all(torch.equal(one, true) for one, true in zip(read, PYRAMID, strict=True))

    each(count, holds, EDITS)


def write_forever(directory: Path) -> None:
    """Store fifty pyramids over and over, in so little room that files are deleted all the time."""
    warnings.simplefilter("ignore")
    for turn in range(10**9):
        store = FeatureStore(directory, {}, max_bytes=400_000) if turn % 50 == 0 else store  # noqa: F821
        value = turn % 50
        store.put(f"{value:064d}", tuple(torch.full((16, 16, 16), float(value)) for _ in range(2)))


@counts(4, 200)
def test_kills_leave_whole_features(count: int, tmp_path: Path) -> None:
    instants, found = np.random.default_rng(count), 0
    for _ in range(count):
        writers = [
            multiprocessing.get_context("fork").Process(target=write_forever, args=(tmp_path,)) for _ in range(2)
        ]
        for writer in writers:
            writer.start()
        time.sleep(instants.uniform(0.02, 0.4))
        for writer in writers:
            writer.kill()
            writer.join()
        for value in range(50):
            pyramid = FeatureStore(tmp_path, {}).get(f"{value:064d}")
            found += pyramid is not None
            assert pyramid is None or all(bool((level == value).all()) for level in pyramid)
    assert found


# -- images --------------------------------------------------------------------------------------------

FORMATS = {"PNG": "png", "JPEG": "jpg", "TIFF": "tiff", "BMP": "bmp", "GIF": "gif", "WEBP": "webp"}


@counts(60, 10_000)
@pytest.mark.filterwarnings("ignore")  # Pillow's, on what it repairs
def test_what_passes_the_check_is_read(count: int, tmp_path: Path) -> None:
    pixels = texture(np.random.default_rng(0), 24, 30).astype(np.uint8)
    contents = {}
    for kind in FORMATS:
        buffer = BytesIO()
        Image.fromarray(pixels).convert("RGB" if kind != "GIF" else "L").save(buffer, kind)
        contents[kind] = buffer.getvalue()
    said: list[str] = []
    read: list[str] = []

    def holds(kind: str, edits: list[tuple[str, float, int]]) -> None:
        path = tmp_path / f"image.{FORMATS[kind]}"
        path.write_bytes(edited(contents[kind], edits))
        try:
            check_images([path])
        except UnreadableImageError as error:
            said.append(str(error))
        else:
            assert read_image(path, as_tensor=True).isfinite().all()
            read.append(kind)

    each(count, holds, st.sampled_from(sorted(FORMATS)), EDITS)
    assert read
    assert said
    assert all(str(tmp_path) in text for text in said)


# -- arguments -----------------------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 9), st.floats(-10, 10), st.just(float("nan")), st.text(max_size=5)
)
ODD = st.one_of(JUNK, st.lists(JUNK, max_size=3), st.dictionaries(st.text(max_size=3), JUNK, max_size=2))


@counts(40, 2000)
def test_arguments_are_taken_or_refused_in_a_sentence(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = create_backbone("tf_efficientnet_lite0", "package")
    monkeypatch.setattr("anomalib_csflow.engine.detector.create_backbone", lambda *_: network)
    said: list[str] = []

    def holds(data: st.DataObject) -> None:
        cls = data.draw(st.sampled_from(DETECTORS))
        own = sorted(set(parameters(cls)) & set(WRONG) - {"backbone", "weights"})
        names = data.draw(st.lists(st.sampled_from(own), min_size=1, max_size=3, unique=True))
        changes = {name: data.draw(st.one_of(ODD, st.sampled_from(WRONG[name])), name) for name in names}
        try:
            cls(**{"image_size": 64} | SIX[cls][0] | changes)
        except ValueError as error:
            said.append(str(error))

    each(count, holds, st.data())
    assert said
    assert not any("\n" in text for text in said)


RECIPES = [path.read_text() for path in find_recipes().values()]


@counts(100, 2000)
def test_recipes_are_taken_or_refused_in_a_sentence(count: int, tmp_path: Path) -> None:
    said: list[str] = []
    taken: list[str] = []

    def read(entry: dict[str, Any], content: bytes) -> None:
        (tmp_path / "recipe.yaml").write_bytes(content)
        try:
            taken.append(config.read_detector(entry, tmp_path).name)
        except (ValueError, FileNotFoundError) as error:
            said.append(str(error))

    def holds(data: st.DataObject) -> None:
        text, entry = data.draw(st.sampled_from(RECIPES)), {"config": "recipe.yaml"}
        if data.draw(st.booleans()):  # as text
            return read(entry, edited(text.encode(), data.draw(EDITS)))
        recipe: Any = yaml.safe_load(text)  # or in one of its values
        place = recipe
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [value for value in place.values() if isinstance(value, dict) and value]
            place = data.draw(st.sampled_from(inner)) if inner else place
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ODD)
        for name in data.draw(st.lists(st.sampled_from(sorted(config.FORMS)), max_size=1)):
            entry[name] = data.draw(ODD)
        return read(entry, yaml.safe_dump(recipe).encode())

    each(count, holds, st.data())
    assert taken
    assert said
    assert not any("\n" in text for text in said)


# -- files of others -----------------------------------------------------------------------------------


@counts(25, 400)
def test_a_damaged_checkpoint_is_refused_or_whole(count: int, good: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "model.ckpt"
    torch.save(good, path)
    content = path.read_bytes()
    said: list[str] = []

    def holds(edits: list[tuple[str, float, int]]) -> None:
        path.write_bytes(edited(content, edits))
        try:
            loaded = CSFlow.load_from_checkpoint(path)
        except CheckpointError as error:
            said.append(str(error))
        else:
            for name, value in good["state_dict"].items():
                torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)

    each(count, holds, EDITS)
    assert said
    assert not any("\n" in text for text in said)


@counts(10, 200)
def test_nothing_in_a_file_is_run(count: int, good: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    harm = Harm(tmp_path / "harmed")

    def holds(suffix: str, place: str, is_plain: bool) -> None:
        path = tmp_path / f"model{suffix}"
        content: Any = {"whole": harm, "entry": good | {"x": harm}, "own": good | {CHECKPOINT_KEY: harm}}.get(place)
        content = content or good | {"state_dict": good["state_dict"] | {place: harm}}
        path.write_bytes(pickle.dumps(content)) if is_plain else torch.save(content, path)
        with pytest.raises((CheckpointError, WeightsError)) as error:
            CSFlow.load_from_checkpoint(path) if suffix == ".ckpt" else create_backbone("resnet18", str(path))
        assert "\n" not in str(error.value)
        assert not harm.path.exists()

    places = st.one_of(st.sampled_from(["whole", "entry", "own"]), st.text(max_size=5))
    each(count, holds, st.sampled_from([".ckpt", ".pth", ".safetensors"]), places, st.booleans())
