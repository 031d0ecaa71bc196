"""Images of one part, place or session, which resemble each other more than any new image will resemble them."""

import re
from collections.abc import Iterable
from pathlib import Path

EXAMPLE = r"(session_\d+)"


class GroupError(ValueError):
    """The images cannot be grouped as asked."""


def check_pattern(pattern: str) -> None:
    """Check a regular expression before it is used.

    Raises:
        ValueError: says what is wrong with it.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        msg = f"groups must be a regular expression such as {EXAMPLE}, got {pattern!r}: {error}"
        raise ValueError(msg) from error


def groups_of(files: Iterable[str], pattern: str) -> list[str]:
    r"""Group of each image: what the pattern's parentheses match in its path, or all that the pattern matches there.

    Args:
        files: paths.
        pattern: regular expression.

    Raises:
        GroupError: names the first image that does not match.

    Example:
        >>> groups_of(["good/day_1/a.png", "good/day_1/b.png", "good/day_2/a.png"], r"day_(\d+)")
        ['1', '1', '2']
    """
    found = []
    for file in files:
        match = re.search(pattern, Path(file).as_posix())
        if match is None:
            msg = (
                f"{file} belongs to no group, since groups={pattern!r} matches nothing in its path: change the pattern"
            )
            raise GroupError(msg)
        found.append("/".join(part or "" for part in match.groups()) or match.group())
    return found


def check_groups(groups: Iterable[str], pattern: str) -> None:
    """Check that training images can be divided by their groups.

    Raises:
        GroupError: if they are all of one group.
    """
    if len(names := {*groups}) == 1:
        msg = (
            f"all training images are of one group, {names.pop()!r}, by groups={pattern!r}, so that none can be held "
            "out: change the pattern, or leave out groups"
        )
        raise GroupError(msg)
