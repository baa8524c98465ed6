"""What goes wrong in a foreseen way: one line that says what, where, and what to do instead.

Exit codes: 2 where the user can mend it, 1 where a run cannot go on, 75 where it was told to stop and has saved.
"""

import argparse
import errno
from contextlib import contextmanager
from importlib import import_module

EXIT_BAD_INPUT = 2  # the user can mend it
EXIT_FAILED = 1  # the run cannot go on
EXIT_STOPPED = 75  # SIGTERM or Ctrl-C: saved, `resume=true` goes on (EX_TEMPFAIL, "try again later")
UNWRITABLE = tuple(getattr(errno, f"E{name}") for name in ("NOSPC", "DQUOT", "FBIG", "ROFS", "ACCES", "PERM", "IO"))
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of the driver, a CPU, the libraries
MEMORY_KNOBS = {  # stage -> what makes it need less memory
    "load": "give each GPU less by more of them (model.shard), or set model.offload_reference=true",
    "warm_start": "lower train.micro_batch_tokens",
    "evaluate": "lower sample.batch_tokens",
    "sample": "lower sample.batch_tokens",
    "log_probs": "lower train.micro_batch_tokens",
    "prm": "lower train.micro_batch_tokens",
    "update": "lower train.micro_batch_tokens, or set model.gradient_checkpointing=true",
}


class BadInput(Exception):
    """The user can mend this: its message is one line that says what, where, and what to do instead."""


class RunStopped(Exception):
    """The run cannot go on; the message says why, and what is safe. `code` is the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED):
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Whose complaints are one line, as all of ours are."""

    def error(self, message):
        raise BadInput(f"{message} (python {self.prog} --help)")


def told(error: Exception) -> str:
    """The two sentences in which torch says what did not fit into memory; more would be a wall of text."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:2])


@contextmanager
def enough_memory(stage: str):
    """Where the block runs out of memory, RunStopped names the stage and what makes it need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise RunStopped(
            f"out of memory in stage {stage} ({told(error)}): {MEMORY_KNOBS.get(stage, 'give it less')}; "
            "resume=true goes on from the newest checkpoint"
        ) from error


def optional(module: str, package: str):
    """A module that only some runs need. Raises BadInput with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise BadInput(f"{package} is needed here and not installed: pip install {package}") from error
