"""Worker processes for verdicts that may hang: one answer at a time, and killed where it takes too long.

sympy decides whether two formulas are equal, and for some it never ends.
"""

import atexit
import functools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rewards.answers import grade_math, parsed

VERDICT_SECONDS = 2.0  # wall clock for one verdict of a worker; then it is killed, and the answer is wrong
START_SECONDS = 60.0  # for a worker to import what it needs
WORKER_BYTES = 2**30  # address space of a worker
WORKER_VERDICTS = 1000  # then a fresh one: the parser's caches grow
JUDGES = {"math": grade_math}  # what a worker is asked for
WORKER_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUSERBASE")  # all it inherits


@functools.lru_cache(maxsize=1)
def threads(_process: int) -> ThreadPoolExecutor:
    """The threads of this process (a fork of it needs its own): its share of the cores, at most one worker each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


_of_thread = threading.local()
_workers: set["Worker"] = set()


class Worker:
    """A process that judges one answer at a time and can be killed. It ends by itself when its parent is gone."""

    def __init__(self):
        environment = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from rewards.worker import serve; serve()"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONHASHSEED": "0"},  # it decides sympy's order of terms
            start_new_session=True,  # a Ctrl-C is for the trainer
        )
        self.owner, self.asked, self.received = os.getpid(), 0, b""
        _workers.add(self)
        try:
            self._line(START_SECONDS)
        except (TimeoutError, ConnectionError) as error:
            self.close()
            raise RuntimeError("a worker of the math grader could not start") from error

    def _line(self, seconds: float) -> bytes:
        """The next line it writes. TimeoutError: there was none in time. ConnectionError: it has ended."""
        end, poll = time.monotonic() + seconds, select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.received:
            if not poll.poll(max(0, end - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 2**16)
            if not chunk:
                raise ConnectionError("a worker ended without a verdict")
            self.received += chunk
        line, _, self.received = self.received.partition(b"\n")
        return line

    def ask(self, *question) -> tuple[float | None, str]:
        self.asked += 1
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        return tuple(json.loads(self._line(VERDICT_SECONDS)))

    def close(self) -> None:
        _workers.discard(self)
        if self.owner == os.getpid():  # not where it was only inherited by a fork
            self.process.kill()
            self.process.communicate()


atexit.register(lambda: [worker.close() for worker in list(_workers)])


def ask_worker(grader: str, text: str, reference) -> tuple[float, str]:
    """The verdict of this thread's worker. An answer that takes too long is wrong; a worker that breaks is a fault."""
    worker = getattr(_of_thread, "worker", None)
    if worker and (worker.owner != os.getpid() or worker.asked >= WORKER_VERDICTS):
        worker.close()
        worker = None
    worker = _of_thread.worker = worker or Worker()
    try:
        score, reason = worker.ask(grader, text, reference)
    except BaseException as error:  # whatever it still writes would be taken for the next answer's verdict
        worker.close()
        _of_thread.worker = None
        if isinstance(error, TimeoutError):
            return 0.0, f"took longer than {VERDICT_SECONDS:g} s to compare"
        raise
    if score is None:
        raise RuntimeError(reason)
    return score, reason


def serve() -> None:
    """A worker's life: a question per line of stdin, a verdict per line of stdout, until stdin ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no verdict
    parsed("x^2")  # imports all it needs, or ends here
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin.buffer:
        limit = math.ceil(time.process_time() + VERDICT_SECONDS) + 1  # the kernel's, should the parent be gone
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        grader, text, reference = json.loads(line)
        try:
            verdict = JUDGES[grader](text, reference)
        except Exception as error:
            verdict = None, f"{type(error).__name__}: {error}"
        print(json.dumps(verdict), file=verdicts, flush=True)
