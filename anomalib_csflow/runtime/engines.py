"""What computes a bundle's model: OpenVINO, or ONNX Runtime. Both are optional."""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, BundleError
from .precision import read_model

Runtime = Literal["openvino", "onnx"]
Precision = Literal["f32", "bf16", "int8"]
Outputs = dict[str, NDArray[Any]]
PACKAGES: dict[str, str] = {"openvino": "openvino", "onnx": "onnxruntime"}
SIZES_KEPT = 4
"""Image sizes that get a compiled model of their own, the fastest; others share one, since compiling takes long."""


class Engine(Protocol):
    """Computes a model."""

    def __call__(self, pixels: NDArray[np.uint8]) -> Outputs:
        """Outputs by name of images ``(N, H, W, 3)``, RGB."""

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Outputs]:
        """Outputs of many batches, in their order, several at once if the engine can."""


class OpenVinoEngine:
    """OpenVINO on the CPU. It takes 8-bit pixels, since large images take four times the memory in float32.

    Args:
        bundle: with an OpenVINO model.
        precision: ``f32``, which gives the detector's own scores; ``bf16``; or ``int8``, the bundle's 8-bit model.
        num_threads: of the processor; OpenVINO's own choice if None.
    """

    def __init__(self, bundle: Bundle, precision: Precision = "f32", num_threads: int | None = None) -> None:
        import openvino  # noqa: PLC0415 (optional)

        self.precision = precision
        self.settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        if num_threads is not None:
            self.settings["INFERENCE_NUM_THREADS"] = num_threads
        self.openvino = openvino
        self.core = openvino.Core()
        self.path = bundle.model("int8" if precision == "int8" else "openvino")
        self._compiled: dict[tuple[tuple[int, ...] | None, str], Any] = {}

    def __call__(self, pixels: NDArray[np.uint8]) -> Outputs:
        """Outputs of a batch."""
        request = self._model(pixels.shape, "LATENCY").create_infer_request()
        return _named(request.infer({0: pixels}, share_inputs=True))  # a large image takes much memory twice

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Outputs]:
        """Outputs of batches of one size, as many at once as OpenVINO finds best."""
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            return
        model = self._model(first.shape, "THROUGHPUT")
        requests = [model.create_infer_request() for _ in range(model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))]
        busy: list[Any] = []
        for pixels in _chained(first, batches):
            if pixels.shape != first.shape:  # of another size: one by one
                yield from _finished(busy, requests, len(busy))
                yield self(pixels)
                continue
            if not requests:
                yield from _finished(busy, requests, 1)
            request = requests.pop()
            request.start_async({0: pixels})
            busy.append(request)
        yield from _finished(busy, requests, len(busy))

    def _model(self, shape: tuple[int, ...], hint: str) -> Any:
        key: tuple[tuple[int, ...] | None, str] = (shape, hint)
        if key not in self._compiled and len(self._compiled) >= SIZES_KEPT:
            key = (None, hint)
        if key not in self._compiled:
            try:
                model = read_model(self.core, self.path, self.precision)
                check_size(model, *shape[1:3])
                model = self._of_bytes(model)
                if key[0] is not None:
                    model.reshape(list(shape))
                self._compiled[key] = self.core.compile_model(model, "CPU", {**self.settings, "PERFORMANCE_HINT": hint})
            except RuntimeError as error:
                size = f"{shape[1]}x{shape[2]}"
                msg = f"OpenVINO cannot run this model on images of {size} pixels ({str(error).splitlines()[0]})"
                raise BundleError(msg) from error
        return self._compiled[key]

    def _of_bytes(self, model: Any) -> Any:
        """The same model of ``(N, H, W, 3)`` in 8 bits instead of ``(N, 3, H, W)`` in [0, 1]."""
        from openvino.preprocess import PrePostProcessor  # noqa: PLC0415 (optional)

        layout, types = self.openvino.Layout, self.openvino.Type
        steps = PrePostProcessor(model)
        steps.input().tensor().set_element_type(types.u8).set_layout(layout("NHWC"))
        steps.input().preprocess().convert_element_type(types.f32).scale(255.0)
        steps.input().model().set_layout(layout("NCHW"))
        return steps.build()


class OnnxEngine:
    """ONNX Runtime on the CPU, in float32.

    Args:
        bundle: with an ONNX model.
        num_threads: of the processor; ONNX Runtime's own choice if None.
    """

    def __init__(self, bundle: Bundle, num_threads: int | None = None) -> None:
        import onnxruntime  # noqa: PLC0415 (optional)

        options = onnxruntime.SessionOptions()
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        path = str(bundle.model("onnx"))
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, pixels: NDArray[np.uint8]) -> Outputs:
        """Outputs of a batch."""
        return dict(zip(self.outputs, self.session.run(None, {self.input: planes(pixels)}), strict=True))

    def stream(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[Outputs]:
        """Outputs of batches, one after the other."""
        for pixels in batches:
            yield self(pixels)


def installed(bundle: Bundle) -> list[Runtime]:
    """Runtimes that are installed and that the bundle has a model for."""
    runtimes: tuple[Runtime, ...] = ("openvino", "onnx")
    return [name for name in runtimes if name in bundle.manifest["models"] and find_spec(PACKAGES[name])]


def open_engine(bundle: Bundle, runtime: Runtime | None, precision: Precision, num_threads: int | None) -> Engine:
    """The engine of a runtime, or of the first one that is installed.

    Raises:
        BundleError: if the runtime is unknown, not installed, or has no model in the bundle.
    """
    if runtime is not None and runtime not in PACKAGES:
        msg = f"unknown runtime {runtime!r}: choose one of {', '.join(PACKAGES)}"
        raise BundleError(msg)
    usable = installed(bundle)
    chosen = runtime or next(iter(usable), None)
    if chosen is None or find_spec(PACKAGES[chosen]) is None:
        names = [chosen] if chosen else [name for name in PACKAGES if name in bundle.manifest["models"]]
        wanted = " or ".join(PACKAGES[name] for name in names)
        msg = f"no runtime for this bundle is installed: pip install {wanted}"
        raise BundleError(msg)
    if chosen == "onnx":
        return OnnxEngine(bundle, num_threads)
    return OpenVinoEngine(bundle, precision, num_threads)


def check_size(model: Any, height: int, width: int) -> None:
    """Raise BundleError if a model for one image size gets another, whose lower part it might never look at."""
    expected = model.input(0).partial_shape
    sides = ((expected[2], height), (expected[3], width))
    if any(side.is_static and side.get_length() != found for side, found in sides):
        msg = f"this model is for images of {expected[2]}x{expected[3]} pixels only, got {height}x{width}"
        raise BundleError(msg)


def planes(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images ``(N, H, W, 3)`` of 8 bits as exported models take them: ``(N, 3, H, W)`` in [0, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def _named(results: Any) -> Outputs:
    return {output.get_any_name(): np.array(value) for output, value in results.items()}


def _chained(first: NDArray[np.uint8], rest: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    yield first
    yield from rest


def _finished(busy: list[Any], free: list[Any], count: int) -> Iterator[Outputs]:
    """Wait for the oldest requests and give their outputs."""
    for _ in range(count):
        request = busy.pop(0)
        request.wait()
        yield _named(request.results)
        free.append(request)
