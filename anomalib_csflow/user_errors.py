"""What went wrong in a command, in a sentence for its user; a program's own faults keep their traceback."""

import re
from argparse import ArgumentError
from collections.abc import Iterator
from traceback import walk_tb

DEBUG = "ANOMALIB_CSFLOW_DEBUG"
"""Environment variable: with any value, errors keep their traceback."""
CHECKS = (ValueError, RuntimeError)
"""What code raises on purpose; others, such as KeyError, are faults of a program."""
CHECKING = ("anomalib_csflow", "anomalib", "jsonargparse")
"""Packages that check what a user gives them."""
NOISE = re.compile(
    r"(Given value|Subtypes:|Does not validate|Errors:$|Parser key|Problem with|Expected a <class 'None)"
)
HINTS = {"contains non-printable characters": "anomalib takes only ASCII characters in paths, no ü or é: rename it"}
"""What to do about other packages' errors that do not say it."""


def sentence(error: BaseException) -> str | None:
    """What a user can do something about, in a sentence; None for a fault of a program.

    Args:
        error: that ended a command.
    """
    for one in _chain(error):
        if isinstance(one, (ArgumentError, *CHECKS)) and re.search("Parser key|Subtypes:", str(one)):
            return _of_parser(str(one))
    if any(_is_for_users(one) for one in _chain(error)):
        return _own_line(next(str(one) for one in _chain(error) if _is_for_users(one)))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_for_users(error: BaseException) -> bool:
    is_lightnings = type(error).__name__ == "MisconfigurationException"  # Lightning may not be installed
    if is_lightnings or isinstance(error, (ArgumentError, ModuleNotFoundError, OSError)):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return isinstance(error, CHECKS) and bool(modules) and modules[-1].partition(".")[0] in CHECKING


def _own_line(text: str) -> str:
    """An error's own words, without the traceback that a loader's worker puts before them."""
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.removeprefix("None: ").split())
    return " ".join([text, *(f"({hint})" for said, hint in HINTS.items() if said in text)])


def _of_parser(text: str) -> str:
    """What jsonargparse objects to, without what it tried and the values of all other arguments."""
    text = re.sub('(Parser key "[^"]+": )(?=.)', r"\1\n", text)
    keys = re.findall(r'Parser key "([^"]+)"', text)
    owners = re.findall("Problem with given class_path '([^']+)'", text)
    values = re.findall(r"Given value: (?!NestedArg|Namespace)(.*)", text)
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    kept = [line for line in lines if line and not NOISE.match(line)]
    kept = [f"{line} by {owners[-1]}" if line.startswith("Option") and owners else line for line in kept]
    said = re.sub(r"a <class '([^']+)'>", r"\1", " or ".join(dict.fromkeys(kept)))
    got = f", got {values[0]}" if values and "Got value" not in said else ""
    return f"{'.'.join(keys)}: {said}{got}" if keys else f"{said}{got}"
