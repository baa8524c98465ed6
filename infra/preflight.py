"""Imported first by the scripts: a wrong Python, a missing package or an early Ctrl-C is one line,
not a traceback.

Python 3.8 must be able to read this file and the scripts: no newer syntax in them.
"""

import os
import re
import sys
from pathlib import Path

# Where the code runs with an older version than the one that requirements.txt pins
OLDEST = {"torch": "2.11"}


def numbers(version):
    """The first two numbers of a version: "2.13.0+cpu" -> (2, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def complaint():
    """What is missing to run this project, and what to do; None if nothing is."""
    if sys.version_info < (3, 10):  # noqa: UP036
        found = f"{sys.executable} is {sys.version.split()[0]}"
        return f"Python 3.10 or newer is needed, {found}: use a newer one"
    from importlib.metadata import PackageNotFoundError, version

    requirements = (Path(__file__).parent.parent / "requirements.txt").read_text()
    for name, least in re.findall(r"^([\w-]+)[=>]=([\d.]+)", requirements, re.M):
        try:
            found, least = version(name), OLDEST.get(name, least)
            if numbers(found) < numbers(least):
                return (
                    f"{name} {found} is too old, {least} is needed: pip install -r requirements.txt"
                )
        except PackageNotFoundError:
            return f"{name} is not installed for {sys.executable}: pip install -r requirements.txt"
    return None


def hook(kind, error, trace):
    """Ctrl-C, where nothing catches it, needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = hook
# Before torch is imported, which reads it once. Sampling and updating ask a GPU for blocks of ever
# new sizes; without this the allocator keeps every old one, and reserves a card for a tenth of it.
# An older name that the user has set would lose against the new one, so it is respected too.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if complaint():
    print(f"error: {complaint()}", file=sys.stderr)
    sys.exit(2)
