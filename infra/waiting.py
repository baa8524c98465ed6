"""The line that a terminal shows while a stage runs: where it is, for how long, how long yet.

    step 3/40: update, optimizer step 2/4, micro-batch 3/5; 28 s, about 12 s left

Who works says a number now and then, by `count` or `counted`, which stores it and no more. A thread
of the stage's own writes the line over itself, and takes it away when the stage ends, so that what
is printed next stands in its place. Nothing waits for it, a GPU neither. It is there on rank 0
alone, and where stderr or stdout is a terminal: a log has none of it.
"""

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import mean

from infra.processes import print0, rank

PERIOD = 0.3  # seconds between two looks; a shorter stage shows nothing
YEAR = 365 * 24 * 3600
RECENT = 5  # steps whose mean says how long the next one takes
ERASE = "\r\x1b[K"  # back to the first column, and clear to the end of the line


@dataclass
class Progress:
    """Where a run is: all that the line is made of."""

    stage: str = ""  # empty between stages
    stage_began: float = 0.0
    step_began: float | None = None  # None outside the steps of a run
    # What is counted -> (how far, of how many), from the outside in
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    # Seconds of each step without its evaluation, as "step", and of each stage by its name
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


# Of the process, for a sampler or a micro-batch knows of no run that it could be handed by. Stages,
# counters and steps leave it as they found it; a test may put another one here.
now = Progress()


# --- what the work says ---------------------------------------------------------------------------


def count(what: str, done: int, total: int) -> None:
    """`done` of `total`, until the stage or the counter around it goes on."""
    now.counts[what] = (done, total)


def counted(items: Sequence, what: str) -> Iterator:
    """The items, counted: how far is the one that is being worked on."""
    around = dict(now.counts)
    try:
        for i, item in enumerate(items, 1):
            now.counts = around | {what: (i, len(items))}
            yield item
    finally:
        now.counts = around


@contextmanager
def stage(name: str):
    """Show where the block is while it runs. Inside another stage it is a part of that."""
    if now.stage:
        yield
        return
    around = dict(now.counts)
    now.stage, now.stage_began = name, time.perf_counter()
    try:
        with _shown():
            yield
    finally:
        now.took[name].append(time.perf_counter() - now.stage_began)
        now.stage, now.counts = "", around


def timed_steps(first: int, last: int, eval_every: int) -> Iterator[int]:
    """The numbers of a run's steps. After the first one it is said when the last one will end."""
    try:
        for step in range(first, last + 1):
            now.counts = {"step": (step, last)}
            now.step_began = time.perf_counter()
            evaluations = len(now.took["evaluate"])
            yield step
            evaluating = sum(now.took["evaluate"][evaluations:])
            now.took["step"].append(time.perf_counter() - now.step_began - evaluating)
            if step == first < last:
                print0(forecast(step, last, eval_every, datetime.now()))
    finally:
        now.step_began = None
        now.counts = {}
        now.took.clear()


# --- what is shown --------------------------------------------------------------------------------


def forecast(step: int, last: int, eval_every: int, clock: datetime) -> str:
    """When a run ends that is behind `step`, by what its steps and evaluations took so far."""
    seconds = (last - step) * mean(now.took["step"])
    words = f"about {in_words(mean(now.took['step']))} a step"
    if now.took["evaluate"]:
        evaluations = last // eval_every - step // eval_every + (last % eval_every != 0)
        seconds += evaluations * mean(now.took["evaluate"])
        words += f", {in_words(mean(now.took['evaluate']))} an evaluation"
    if seconds > YEAR:  # a number of steps that is no plan, but "until I stop it"
        return words
    end = clock + timedelta(seconds=seconds)
    day = "" if end.date() == clock.date() else f"{end:%Y-%m-%d} "
    return f"{words}: done in about {in_words(seconds)}, at {day}{end:%H:%M}"


def in_words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def line() -> str:
    """Where the run is now."""
    counts = dict(now.counts)
    step = "step {}/{}: ".format(*counts.pop("step")) if "step" in counts else ""
    parts = [now.stage, *(f"{what} {i}/{n}" for what, (i, n) in counts.items() if n > 1)]
    # An evaluation has a time of its own: most steps have none
    of_step = now.step_began is not None and now.stage != "evaluate"
    kind, began = ("step", now.step_began) if of_step else (now.stage, now.stage_began)
    elapsed, took = time.perf_counter() - began, now.took.get(kind, [])[-RECENT:]
    left = mean(took) - elapsed if took else 0.0
    about = f", about {in_words(left)} left" if left > 0 else ""
    return f"{step}{', '.join(parts)}; {in_words(elapsed)}{about}"


def terminal():
    """The stream that the line goes to; None where there is to be none."""
    streams = () if rank() else (sys.stderr, sys.stdout)
    return next((stream for stream in streams if stream and stream.isatty()), None)


@contextmanager
def _shown():
    out = terminal()
    if out is None:
        yield
        return
    over = threading.Event()
    writer = threading.Thread(target=_write, args=(out, over), daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


def _write(out, over: threading.Event) -> None:
    """Write the line over itself until it is `over`, then take it away."""
    with suppress(OSError, ValueError):  # a terminal that is gone is no reason to stop
        width = os.get_terminal_size(out.fileno()).columns or 80
        shown = False
        while not over.wait(PERIOD):
            # A longer one would go on in a second line, which nothing erases
            out.write(f"\r{line()[: width - 1]}\x1b[K")
            out.flush()
            shown = True
        if shown:
            out.write(ERASE)
            out.flush()
