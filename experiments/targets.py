"""Functions and classes that settings name as `_target_`: ours, those of libraries and the user's own."""

import os
import re
import sys
from collections.abc import Callable
from pydoc import ErrorDuringImport, locate
from typing import Any


def named(key: str, target: str) -> Callable[..., Any]:
    """What the setting `key` names as "module.name": of what is installed, or of a file in the current folder.

    Raises:
        ValueError: it is not there, or it cannot be called.
    """
    if os.getcwd() not in sys.path:  # of a script it is the folder of the script that Python looks in
        sys.path.append(os.getcwd())
    try:
        found = locate(target)
    except ErrorDuringImport as error:
        raise ValueError(f"{key}={target} cannot be imported ({error}): mend that module") from error
    if not callable(found):
        what = "is not there" if found is None else f"is a {type(found).__name__}"
        raise ValueError(f"{key}={target} {what}: name module.function of what is installed or in the current folder")
    return found


def call(key: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the function that the setting `key` names returns.

    Raises:
        ValueError: it does not take these arguments.
    """
    try:
        return function(*arguments, **options)
    except TypeError as error:
        if not re.search(r"unexpected keyword|required (positional|keyword)|positional arguments? but", str(error)):
            raise
        how = ", ".join([*("..." for _ in arguments), *(f"{name}={value!r}" for name, value in options.items())])
        raise ValueError(f"{key}: {function.__name__} is called as {function.__name__}({how}), but {error}") from error
