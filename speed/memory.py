"""Peak memory and time of a training step with and without recomputed activations, each in its own process.

glibc does not return freed blocks of less than 32 MB to the system, which hides the memory that tensors free:
MALLOC_MMAP_THRESHOLD_ makes it return them, here for both sides. Set it wherever memory is short.
"""

import json
import os
import resource
import subprocess
import sys

import torch
from side_by_side import begin, parser, row, seconds, write
from torch import nn

from anomalib_csflow import scoring
from anomalib_csflow.flows import CrossScaleCoupling, PyramidFlow, ScalePermutation

Size = tuple[int, int, int, int]
SIZE: Size = (208, 128, 24, 16)
"""Channels, hidden channels, side, images: the small recipe's flow on images of 768 pixels."""
TINY: Size = (16, 8, 8, 2)


def peak() -> int:
    """Peak memory of the process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(size: Size, blocks: int, threads: int, repeats: int, *, recompute: bool) -> dict[str, float]:
    """Memory that a step adds to the parameters, and its time."""
    torch.set_num_threads(threads)
    channels, hidden, side, images = size
    dims = [(channels, side >> s, side >> s) for s in range(3)]
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [ScalePermutation(dims, seed=block), CrossScaleCoupling(dims, hidden_channels=hidden)]
    flow = PyramidFlow(layers, recompute=recompute)
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pyramid = tuple(torch.randn(images, *shape) for shape in dims)

    def run() -> None:
        latents, log_det = flow(pyramid)
        loss = (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)
        loss.backward()

    before = peak()
    run()
    return {"bytes": peak() - before, "seconds": seconds(run, repeats, warm_up=1)}


def main() -> None:
    """Measure a step with and without recomputing, for several numbers of blocks."""
    options = parser(__doc__)
    options.add_argument("--one", nargs=2, type=int, metavar=("BLOCKS", "RECOMPUTE"), help="measure and print one")
    arguments = options.parse_args()
    begin(arguments)
    if arguments.one:
        blocks, recompute = arguments.one
        size = TINY if arguments.quick else SIZE
        measured = step(size, blocks, arguments.threads, arguments.repeats, recompute=bool(recompute))
        sys.stdout.write(json.dumps(measured))
        return

    def measure(blocks: int, *, recompute: bool) -> dict[str, float]:
        options = [f"--threads={arguments.threads}", f"--repeats={arguments.repeats}"]
        options += ["--quick"] * arguments.quick
        command = [sys.executable, __file__, *options, "--one", str(blocks), str(int(recompute))]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S603
        return json.loads(output)

    rows = []
    for blocks in (1,) if arguments.quick else (2, 4, 8):
        kept, again = measure(blocks, recompute=False), measure(blocks, recompute=True)
        targets = (0.4, 1.6) if blocks == 8 else (None, None)
        what = f"step with {blocks} blocks, recomputed beside kept"
        rows.append(row(f"{what}: peak memory", again["bytes"] / 2**20, kept["bytes"] / 2**20, targets[0], "MiB"))
        rows.append(row(f"{what}: time", 1e3 * again["seconds"], 1e3 * kept["seconds"], targets[1]))
    write("memory", rows, arguments)


if __name__ == "__main__":
    main()
