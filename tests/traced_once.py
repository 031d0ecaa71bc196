"""Exports for tests that make many: tracing, which takes seconds, is done once, and all else as ever."""

import shutil
from pathlib import Path
from typing import Any

import torch


def trace_once(folder: Path, key: Any = lambda model: "model") -> None:
    """Have torch's exporter write a model once to ``folder/key``, and copy it from there ever after.

    Args:
        folder: where the graphs are kept.
        key: name of a model's graph.
    """
    trace = torch.onnx.export

    def export(model: Any, args: Any, f: str, **options: Any) -> None:
        kept = folder / key(model)
        if not kept.is_dir():
            kept.mkdir(parents=True)
            trace(model, args, str(kept / Path(f).name), **options)
        for file in kept.iterdir():
            shutil.copyfile(file, Path(f).with_name(file.name))

    torch.onnx.export = export
