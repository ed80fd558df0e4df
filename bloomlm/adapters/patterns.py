"""Regular expressions for names of modules, which come with an adapter's files and are not trusted."""

import re

from bloomlm.errors import AdapterError

_MOST_REPETITIONS = 4
_REPETITION = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")


def check_pattern(pattern: object) -> str:
    """The pattern, if it is a regular expression that is matched quickly.

    Python's matching takes exponential time where a repeated group can match in many ways, and a power of the length
    of a name for so many repetitions.

    Raises:
        AdapterError: it is no regular expression, repeats a group, or has more than 4 repetitions.
    """
    if not isinstance(pattern, str):
        raise AdapterError(f"{str(pattern)[:200]!r} stands for names of modules; expected a text")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{pattern[:200]!r} is no regular expression for names of modules: {error}") from error
    if _REPEATED_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS:
        raise AdapterError(
            f"the regular expression {pattern[:200]!r} could take hours to match; write one for the names of modules "
            f"without repeated groups and with at most {_MOST_REPETITIONS} of *, + and {{...}}"
        )
    return pattern
