"""Whose features are read: this user's alone, by names, places, owners and modes; and where they are without a home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_feature_cache import PYRAMID, files, fit, key

from anomalib_csflow import FeatureCache
from anomalib_csflow.features import trust
from anomalib_csflow.features.store import FeatureStore, default_directory
from anomalib_csflow.features.trust import UntrustedError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="only POSIX says who owns a file")


def filled(directory: Path, *names: str) -> FeatureStore:
    """A store with pyramids."""
    store = FeatureStore(directory, {})
    for name in names:
        store.put(key(name), PYRAMID)
    return store


def test_what_the_store_makes_is_private_whatever_the_mask(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        filled(tmp_path / "new" / "cache", "a")
    finally:
        os.umask(mask)
    made = [tmp_path / "new/cache", *(path for path in (tmp_path / "new/cache").rglob("*") if path.is_dir())]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o722])
def test_a_folder_that_others_can_write_is_not_used(mode: int, tmp_path: Path) -> None:
    store = filled(tmp_path / "cache", "a")
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(UntrustedError, match=r"kept in .*cache, which can be written by others: chmod go-w .*cache"):
        FeatureStore(tmp_path / "cache", {})
    (tmp_path / "cache").chmod(0o1777)  # as /tmp: nobody else can rename or remove what is in it
    assert FeatureStore(tmp_path / "cache", {}).get(key("a")) is not None
    store.folder.chmod(mode)
    with pytest.raises(UntrustedError, match="can be written by others"):
        FeatureStore(tmp_path / "cache", {})


def test_another_users_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "cache", "a")
    monkeypatch.setattr(trust.os, "getuid", lambda: 12345)
    with pytest.raises(UntrustedError, match=r"belongs to another user \(\d+\): name a folder of your own"):
        FeatureStore(tmp_path / "cache", {})
    assert store.get(key("a")) is None  # nor is a file that another has put there
    monkeypatch.undo()
    assert store.get(key("a")) is not None


def test_a_folder_that_is_a_file_or_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UntrustedError, match="is not a folder: remove it"):
        FeatureStore(tmp_path / "file", {})
    store = filled(tmp_path / "cache", "a")
    shutil.move(store.folder, tmp_path / "elsewhere")
    store.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedError, match="is not a folder: remove it"):
        FeatureStore(tmp_path / "cache", {})
    (tmp_path / "link").symlink_to(filled(tmp_path / "real", "a").directory)  # whoever made it chose where it leads
    assert FeatureStore(tmp_path / "link", {}).get(key("a")) is not None


def test_links_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    store, other = filled(tmp_path / "cache", "a"), filled(tmp_path / "other", "a")
    store.path(key("a")).unlink()
    store.path(key("a")).symlink_to(other.path(key("a")))
    assert FeatureStore(tmp_path / "cache", {}).get(key("a")) is None
    assert key("a") not in store
    before = other.path(key("a")).read_bytes()
    partial = store.path(key("a")).with_name(f".{key('a')}.{os.getpid()}.partial")
    partial.symlink_to(other.path(key("a")))
    store.put(key("a"), (torch.ones(1, 1, 1),))
    assert other.path(key("a")).read_bytes() == before
    assert store.get(key("a"))[0].item() == 1
    shutil.rmtree(store.path(key("a")).parent)
    store.path(key("a")).parent.symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="is a link, which the cache did not make"):
        store.put(key("a"), PYRAMID)
    assert not list(tmp_path.glob("*.safetensors"))


def test_only_the_stores_own_files_are_ever_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "cache", "a")
    shard = store.path(key("a")).parent
    foreign = [shard / "notes.safetensors", shard / f"{'g' * 64}.safetensors", store.folder / f"{'a' * 64}.safetensors"]
    foreign += [tmp_path / "cache" / "ab" / f"{'a' * 64}.safetensors", shard / ("b" * 64)]
    target = tmp_path / "precious"
    target.mkdir()
    (target / f"{'c' * 64}.safetensors").write_bytes(b"0" * 10_000)
    (store.folder / "ff").symlink_to(target)
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 10_000)
        os.utime(path, (0, 0))
    (shard / f"{'d' * 64}.safetensors").symlink_to(target / f"{'c' * 64}.safetensors")
    killed = shard / f".{'e' * 64}.77.partial"
    killed.write_bytes(b"0" * 10_000)
    FeatureStore(tmp_path / "cache", {}, max_bytes=2000).put(key("b"), PYRAMID)
    assert all(path.exists() for path in foreign)
    assert (target / f"{'c' * 64}.safetensors").exists()
    assert (shard / f"{'d' * 64}.safetensors").is_symlink()
    assert not killed.exists()  # what a killed process left is the store's
    assert not store.path(key("a")).exists()
    monkeypatch.setattr(trust.os, "getuid", lambda: 12345)
    assert not list(trust.own_files(tmp_path / "cache"))


def test_the_checksum_has_type_shape_and_whose_they_are(tmp_path: Path) -> None:
    store = filled(tmp_path, "a", "b")
    path = store.path(key("a"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for changed in (PYRAMID[0].reshape(5, 4, 6), PYRAMID[0].view(torch.int32), PYRAMID[0].flatten()):
        save_file({"000": changed, "001": PYRAMID[1]}, path, metadata)
        assert FeatureStore(tmp_path, {}).get(key("a")) is None
    path.write_bytes(store.path(key("b")).read_bytes())  # another image's
    assert FeatureStore(tmp_path, {}).get(key("a")) is None
    other = FeatureStore(tmp_path, {"another": "backbone"})
    other.put(key("b"), PYRAMID)
    store.path(key("b")).write_bytes(other.path(key("b")).read_bytes())
    assert FeatureStore(tmp_path, {}).get(key("b")) is None


def test_a_fit_says_why_nothing_is_kept(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(
        UserWarning, match=r"Features are computed in every epoch: .*can be written by others: chmod go-w"
    ):
        watch = fit(image_folder, tmp_path, FeatureCache(tmp_path / "cache"), max_epochs=1)
    assert watch.images == 12 * 2 + 8
    assert not files(tmp_path / "cache")
    assert type(watch.datamodule.train_data).__module__.startswith("anomalib.")


# -- without a home ------------------------------------------------------------------------------------


def test_a_user_without_a_home_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "ANOMALIB_CSFLOW_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])  # KeyError, as for a uid that is not in passwd
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert default_directory() == tmp_path / f"anomalib_csflow-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == Path("/x/anomalib_csflow")


PREDICT = """
import sys, warnings
warnings.simplefilter("ignore")
from anomalib.engine import Engine
from anomalib_csflow import CSFlow
detector = CSFlow("tf_efficientnet_lite0", "blocks.4", "package", image_size=64, num_blocks=1, hidden_channels=8,
                  post_processor=False, visualizer=False)
found = Engine(default_root_dir=sys.argv[1], accelerator="cpu", enable_progress_bar=False).predict(
    detector.eval(), data_path=sys.argv[2])
print("scores", sum(len(batch.pred_score) for batch in found))
"""


NOBODY = ["unshare", "--user", "--map-user=54321"]
"""Runs a command as a user who is not in passwd, as containers do."""


@pytest.mark.slow
def test_predict_by_a_user_who_is_nobody(image_folder: Path, tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*NOBODY, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody be another user")
    environment = {name: os.environ[name] for name in os.environ.keys() & {"PATH", "LD_LIBRARY_PATH"}}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [*NOBODY, sys.executable, "-c", PREDICT, str(tmp_path), str(image_folder / "test/good")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "scores 4" in done.stdout
