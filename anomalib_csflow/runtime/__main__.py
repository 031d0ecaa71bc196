"""``python -m anomalib_csflow.runtime validate | watch``, where anomalib and torch are not installed."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from anomalib_csflow.user_errors import DEBUG

from .bundle import Bundle
from .detector import Detector
from .engines import PACKAGES, Precision
from .validate import table, validate
from .watch import Watch


def main(arguments: Sequence[str] | None = None, program: str = "python -m anomalib_csflow.runtime") -> None:
    """Run a command; the exit status is 1 if a promise is broken, 2 for bad input."""
    parsed = parser(program).parse_args(arguments)
    try:
        if parsed.command == "validate":
            bundle = Bundle(parsed.bundle)
            measured = validate(bundle, parsed.images, parsed.threads)
            tolerance = bundle.manifest["tolerance"]
            print(table(measured, tolerance))
            broken = [str(one.case) for one in measured if not one.keeps(tolerance)]
            if broken:
                print(
                    f"broken: {', '.join(broken)} must be within {tolerance:g}, with the same labels", file=sys.stderr
                )
                sys.exit(1)
            return
        detector = Detector(parsed.bundle, parsed.runtime, parsed.precision, parsed.threads, parsed.false_alarm_rate)
        if detector.promise:
            print(detector.promise)
        count = Watch(detector, parsed.folder, parsed.out, settle=parsed.settle).run(once=parsed.once)
        print(f"{count} images judged; the record is {parsed.out / 'results.jsonl'}")
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:  # OpenVINO raises RuntimeError
        if os.environ.get(DEBUG):
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


def parser(program: str) -> argparse.ArgumentParser:
    """The commands and their options."""
    made = argparse.ArgumentParser(prog=program, description="Run a bundle.")
    commands = made.add_subparsers(dest="command", required=True)
    check = commands.add_parser("validate", help="compare each installed runtime with the expected outputs")
    check.add_argument("bundle", type=Path, help="a folder or a zip file")
    check.add_argument("--images", type=Path, help="a folder of more images to compare the runtimes on")
    check.add_argument("--threads", type=int, help="of the processor")
    line = commands.add_parser("watch", help="judge the images that arrive in a folder")
    line.add_argument("bundle", type=Path, help="a folder or a zip file")
    line.add_argument("--folder", type=Path, required=True, help="where images arrive")
    line.add_argument("--out", type=Path, default=Path("results"), help="for the record and the pictures of rejects")
    line.add_argument("--runtime", choices=list(PACKAGES), help="default: the first that is installed")
    line.add_argument("--precision", choices=get_args(Precision), default="f32", help="of OpenVINO")
    line.add_argument("--threads", type=int, help="of the processor")
    line.add_argument("--false_alarm_rate", type=float, help="another rate than the bundle's: the threshold moves")
    line.add_argument("--settle", type=float, default=0.5, help="seconds for which a file must not have changed")
    line.add_argument("--once", action="store_true", help="stop when all images that are there are judged")
    return made


if __name__ == "__main__":
    main()
