"""Peak memory and time of a training step with and without recomputed activations, in a process of its own each.

glibc keeps freed blocks of less than 32 MB for itself, and so hides what tensors give back: MALLOC_MMAP_THRESHOLD_
makes it return them, on both sides. It is worth setting wherever memory is short.
"""

import json
import os
import resource
import subprocess
import sys

import torch
from side_by_side import begin, parser, row, seconds, write

from anomalib_csflow import scoring
from anomalib_csflow.flows import CrossScaleCoupling, PyramidFlow, ScalePermutation

CHANNELS, HIDDEN, SIDE, IMAGES = 208, 128, 24, 16
"""The small recipe's flow on images of 768 pixels."""


def peak() -> int:
    """Bytes that the process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step(blocks: int, threads: int, repeats: int, *, recompute: bool) -> dict[str, float]:
    """Memory that a step adds to the parameters, and its time."""
    torch.set_num_threads(threads)
    dims = [(CHANNELS, SIDE >> s, SIDE >> s) for s in range(3)]
    layers = []
    for block in range(blocks):
        layers += [ScalePermutation(dims, seed=block), CrossScaleCoupling(dims, hidden_channels=HIDDEN)]
    flow = PyramidFlow(layers, recompute=recompute)
    for parameter in flow.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pyramid = tuple(torch.randn(IMAGES, *shape) for shape in dims)

    def run() -> None:
        latents, log_det = flow(pyramid)
        loss = (scoring.energy(latents) - log_det).mean() / scoring.num_dims(latents)
        loss.backward()

    before = peak()
    run()
    return {"bytes": peak() - before, "seconds": seconds(run, repeats, warm_up=1)}


def main() -> None:
    """Measure 8 blocks with and without, and how memory grows with blocks."""
    arguments = parser(__doc__)
    arguments.add_argument("--one", nargs=2, type=int, metavar=("BLOCKS", "RECOMPUTE"), help="measure and print one")
    arguments = arguments.parse_args()
    begin(arguments)
    if arguments.one:
        blocks, recompute = arguments.one
        sys.stdout.write(json.dumps(step(blocks, arguments.threads, arguments.repeats, recompute=bool(recompute))))
        return

    def measure(blocks: int, *, recompute: bool) -> dict[str, float]:
        options = [f"--threads={arguments.threads}", f"--repeats={arguments.repeats}"]
        command = [sys.executable, __file__, *options, "--one", str(blocks), str(int(recompute))]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S603
        return json.loads(output)

    rows = []
    for blocks in (2, 4, 8):
        kept, again = measure(blocks, recompute=False), measure(blocks, recompute=True)
        targets = (0.4, 1.6) if blocks == 8 else (None, None)
        what = f"step with {blocks} blocks, recomputed beside kept"
        rows.append(row(f"{what}: peak memory", again["bytes"] / 2**20, kept["bytes"] / 2**20, targets[0], "MiB"))
        rows.append(row(f"{what}: time", 1e3 * again["seconds"], 1e3 * kept["seconds"], targets[1]))
    write("memory", rows)


if __name__ == "__main__":
    main()
