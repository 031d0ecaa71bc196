"""A bundle: a folder, or a zip of it, with a model for the line and everything needed to run and check it.

``bundle.json`` lists every file with its SHA-256, and has one of its own contents. Nothing is read whose hash differs.
No file is a pickle.
"""

import hashlib
import json
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from anomalib_csflow.calibration import Scale, p_values

FORMAT = "anomalib-csflow-bundle"
VERSION = 1
MANIFEST = "bundle.json"
DIGEST = "sha256"
"""Key of the manifest: SHA-256 of all its other keys and values."""
Format = Literal["openvino", "int8", "onnx"]
"""Models that a bundle may hold; ``int8`` is OpenVINO's in 8 bits."""
FORMATS: tuple[Format, ...] = get_args(Format)
REQUIRED = ("detector", "input", "calibration", "models", "reference", "tolerance", "files", DIGEST)


class BundleError(ValueError):
    """A bundle is incomplete, was changed, or has another format."""


@dataclass(frozen=True)
class GoodScale:
    """A calibrated scale, and the good images that it was calibrated on.

    Attributes:
        scale: raw to calibrated values.
        good: ``(n,)``, raw values of the good images, in rising order.
    """

    scale: Scale
    good: NDArray[np.float32]

    def p_value(self, calibrated: float) -> float:
        """Share of good images as unusual as this one, itself included: ``(1 + #{good >= value}) / (n + 1)``."""
        return float(p_values(np.float32(calibrated), self.scale.calibrated(self.good)))


class Bundle:
    """A verified bundle.

    Args:
        path: a folder or a zip file; a zip is unpacked to a temporary folder, which goes with this object.

    Attributes:
        folder: where the files are.
        manifest: what ``bundle.json`` says.

    Raises:
        FileNotFoundError: if there is none.
        BundleError: if it is incomplete, was changed, or has another format.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            msg = f"there is no bundle at {path}"
            raise FileNotFoundError(msg)
        self.folder = path
        if path.is_file():
            self.folder = Path(tempfile.mkdtemp(prefix="anomalib_csflow_"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            _unpack(path, self.folder)
        self.manifest = _read_manifest(self.folder, path)
        for name, expected in self.manifest["files"].items():
            _check_file(self.folder, name, expected["sha256"])

    def file(self, name: str) -> Path:
        """Path of one of the bundle's files.

        Raises:
            BundleError: if it is not among the files whose hash was checked.
        """
        if name not in self.manifest["files"]:
            msg = f"{MANIFEST} does not list the file {name!r}: make the bundle again"
            raise BundleError(msg)
        return self.folder / name

    def model(self, kind: Format) -> Path:
        """The model of a format.

        Raises:
            BundleError: if the bundle has none for it.
        """
        models: dict[str, str] = self.manifest["models"]
        if kind not in models:
            msg = f"the bundle has no model for {kind!r}, only for {', '.join(models)}: make it with --formats {kind}"
            raise BundleError(msg)
        if kind != "onnx":  # OpenVINO, which finds the weights beside the graph by itself
            self.file(str(PurePosixPath(models[kind]).with_suffix(".bin")))
        return self.file(models[kind])

    def scale(self, of: str) -> GoodScale | None:
        """The scale of ``score`` or ``map``; None if there is none: no maps, or no calibration."""
        found = self.manifest["calibration"][of]
        if found is None:
            return None
        good = np.asarray(found["good"], dtype=np.float32)
        return GoodScale(Scale(found["threshold"], found["width"]), good)

    def reference(self) -> tuple[list[Path], dict[str, NDArray[Any]]]:
        """The reference images, and the outputs that are expected for them, by name ``(n, ...)``."""
        reference = self.manifest["reference"]
        with np.load(self.file(reference["outputs"]), allow_pickle=False) as outputs:
            expected = {name: outputs[name] for name in outputs.files}
        return [self.file(name) for name in reference["images"]], expected


def _read_manifest(folder: Path, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path} is not a bundle: it has no {MANIFEST}"
        raise BundleError(msg) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{MANIFEST} of {path} cannot be read ({error}): copy the bundle again"
        raise BundleError(msg) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        msg = f"{path} is not a bundle of anomalib-csflow"
        raise BundleError(msg)
    if manifest.get("version") != VERSION:
        msg = (
            f"{path} is a bundle of version {manifest.get('version')!r}, and this package reads version {VERSION}: "
            "install the anomalib-csflow that made it, or make it again"
        )
        raise BundleError(msg)
    missing = [key for key in REQUIRED if key not in manifest]
    if missing:
        msg = f"{MANIFEST} of {path} has no {missing[0]!r}: make the bundle again"
        raise BundleError(msg)
    if manifest[DIGEST] != digest(manifest):
        msg = f"{MANIFEST} of {path} was changed or damaged: copy the bundle again, or make it again"
        raise BundleError(msg)
    return manifest


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's keys and values, except that of the digest itself."""
    others = {key: value for key, value in manifest.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _check_file(folder: Path, name: str, expected: str) -> None:
    """Raise BundleError unless the file is inside the folder and has this SHA-256."""
    if not _is_inside(name):
        msg = f"{MANIFEST} lists the file {name!r}, which is outside the bundle"
        raise BundleError(msg)
    path = folder / name
    if not path.is_file():
        msg = f"the bundle lacks {name}: copy it again"
        raise BundleError(msg)
    if sha256(path) != expected:
        msg = f"{name} is not the file that the bundle was made with: copy the bundle again, or make it again"
        raise BundleError(msg)


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            outside = [name for name in archive.namelist() if not _is_inside(name)]
            if outside:
                msg = f"{path} contains the file {outside[0]!r}, which is outside the bundle"
                raise BundleError(msg)
            archive.extractall(folder)
    except BundleError:
        raise
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:  # encrypted ones too
        msg = f"{path} is not a readable zip file ({error}): copy it again"
        raise BundleError(msg) from error


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
