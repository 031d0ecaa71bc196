"""What went wrong in a command, in a sentence for its user; a program's own faults keep their traceback."""

import dis
import re
from argparse import ArgumentError
from collections.abc import Iterator

DEBUG = "ANOMALIB_CSFLOW_DEBUG"
"""Environment variable: with any value, errors keep their traceback."""
OF_USERS = (ArgumentError, ModuleNotFoundError, OSError, UnicodeDecodeError)
"""Mostly about what a user gave, wherever they come from."""
CHECKS = (ValueError, TypeError, RuntimeError)
"""What code raises on purpose; others, such as KeyError, are faults of a program."""
FAULTS = (NotImplementedError, RecursionError)
"""Those of them that are not."""
CHECKING = ("anomalib_csflow", "anomalib", "jsonargparse", "lightning", "torch.utils.data")
"""Packages that check what a user gives them."""
NOISE = re.compile(
    r"(Given value|Subtypes:|Does not validate|Errors:$|Parser key|Problem with|Expected a <class 'None)"
)
NO_MEMORY = ("can't allocate memory", "out of memory")
"""What torch says of it, in operations of a CPU and of a GPU."""
HINTS = {
    "contains non-printable characters": "anomalib takes only ASCII characters in paths, no ü or é: rename it",
    **dict.fromkeys(NO_MEMORY, "lower data.train_batch_size and data.eval_batch_size, or image_size"),
}
"""What to do about other packages' errors that do not say it."""


def sentence(error: BaseException) -> str | None:
    """What a user can do something about, in a sentence; None for a fault of a program.

    Args:
        error: that ended a command. If it was raised from another one, the first that is about the user's input counts.
    """
    for one in _chain(error):
        if isinstance(one, (ArgumentError, *CHECKS)) and re.search("Parser key|Subtypes:", str(one)):
            return _of_parser(str(one))
        if _is_for_users(one):
            return _own_line(str(one)) or type(one).__name__
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_for_users(error: BaseException) -> bool:
    kind = type(error)
    is_known = kind.__name__ == "MisconfigurationException" or kind.__module__.partition(".")[0] == "yaml"
    is_memory = isinstance(error, RuntimeError) and any(said in str(error) for said in NO_MEMORY)
    if is_known or is_memory or isinstance(error, OF_USERS):
        return True
    last = error.__traceback__
    if last is None or not isinstance(error, CHECKS) or isinstance(error, FAULTS):
        return False
    while last.tb_next is not None:
        last = last.tb_next
    module = f"{last.tb_frame.f_globals.get('__name__', '')}."
    # not by an operation that failed in the package's code, such as a sum of tensors whose shapes differ
    is_raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return is_raised and any(module.startswith(f"{name}.") for name in CHECKING)


def _own_line(text: str) -> str:
    """An error's own words, without the traceback that a loader's worker puts before them."""
    if "Original Traceback" in text:
        last = text.strip().splitlines()[-1]
        text = last.partition(": ")[2] or last
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
