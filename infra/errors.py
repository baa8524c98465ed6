"""What goes wrong in a foreseen way: one line that says what, where, and what to do instead.

Exit codes: 2 where the user can mend it, 1 where a run cannot go on, 75 where it was told to stop
and has saved.
"""

import argparse
import errno
from contextlib import contextmanager
from importlib import import_module

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL, "try again later": `resume=true` goes on
UNWRITABLE = tuple(
    getattr(errno, f"E{name}") for name in ("NOSPC", "DQUOT", "FBIG", "ROFS", "ACCES", "PERM", "IO")
)
# Of the driver, a CPU, the libraries. cuBLAS and NCCL ask for memory of their own when they start,
# which the allocator of torch may have taken: one then says that it is not initialized.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "Failed to CUDA calloc",
    "Failed to CUDA host",
)


class BadInput(Exception):
    """The user can mend this: its message is one line that says what, where, and what to do
    instead.
    """


class RunStopped(Exception):
    """The run cannot go on; the message says why, and what is safe. `code` is the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED):
        super().__init__(message)
        self.code = code


class OutOfMemory(RunStopped):
    """A stage did not fit. What makes it need less is said by the knobs, see
    infra.config.memory_advice.
    """

    def __init__(self, reason: str, stage: str = ""):
        super().__init__(reason)
        self.stage = stage


class Parser(argparse.ArgumentParser):
    """Whose complaints are one line, as all of ours are."""

    def error(self, message):
        raise BadInput(f"{message} (python {self.prog} --help)")


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError is a RuntimeError; on a CPU and in the libraries only the words
    tell.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def first_sentences(error: Exception) -> str:
    """The two sentences in which torch says what did not fit into memory; more would be a wall
    of text.
    """
    return ". ".join(" ".join(str(error).split()).split(". ")[:2])


@contextmanager
def enough_memory(stage: str):
    """Where the block runs out of memory, OutOfMemory names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(first_sentences(error), stage) from error


def optional(module: str, package: str):
    """A module that only some runs need. Raises BadInput with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise BadInput(
            f"{package} is needed here and not installed: pip install {package}"
        ) from error
