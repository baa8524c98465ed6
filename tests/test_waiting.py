"""The line of a terminal: there while a stage runs, gone behind it, never in a log; what it counts and foretells."""

import dataclasses
import fcntl
import io
import os
import re
import struct
import termios
import threading
from collections import defaultdict
from datetime import datetime

import fast.decode
import model as model_module
import pytest
import sample as sampler
from data import micro_batch_rows
from infra import waiting
from model import batch_log_probs
from sample import SampleConfig, sample

import chaos
from conftest import TINY, finished
from helpers import PROMPTS, keys, tiny_model


@pytest.fixture(autouse=True)
def progress(monkeypatch):
    """A fresh one for every test."""
    monkeypatch.setattr(waiting, "now", waiting.Progress())
    return waiting.now


# --- a terminal ---------------------------------------------------------------------------------------------------


def screen(written: str) -> list[str]:
    """What stands on a terminal after all that was written to it."""
    lines, column = [""], 0
    for part in re.findall(r"\x1b\[K|\x1b\[A|[\r\n]|[^\r\n\x1b]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append("")
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif part != "\x1b[A":
            lines[-1] = lines[-1][:column].ljust(column) + part + lines[-1][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def run_on(device: str, arguments: list[str]) -> None:
    """train.py, in this process, on the terminal `device`."""
    terminal = os.open(device, os.O_RDWR | os.O_NOCTTY)
    for stream in (1, 2):
        os.dup2(terminal, stream)
    waiting.PERIOD = 0.001  # stages of a tiny run are short
    chaos.child(None, arguments)


@pytest.fixture(scope="module")
def written_by_a_run(tmp_path_factory) -> str:
    """All that a run with a warm start, two steps and two evaluations writes to a terminal."""
    folder, (master, slave) = tmp_path_factory.mktemp("terminal"), os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    parts: list[bytes] = []

    def read():
        while part := os.read(master, 65536):
            parts.append(part)
            if b"THE END" in part:
                return

    reader = threading.Thread(target=read)
    reader.start()
    arguments = [*TINY, f"run_dir={folder / 'run'}", "train.steps=2", "train.micro_batch_tokens=60"]
    run = chaos.fork(run_on, (os.ttyname(slave), arguments), 1, folder / "log")
    assert chaos.exit_code(run, timeout=120) == 0
    os.write(slave, b"THE END")
    reader.join()
    for end in (master, slave):
        os.close(end)
    assert (folder / "log").read_text() == ""
    return b"".join(parts).decode().removesuffix("THE END")


def test_a_terminal_shows_where_a_run_is_and_what_is_printed_next_stands_in_its_place(written_by_a_run):
    shown = set(re.findall(r"\r((?:step \d/2: )?[a-z_]+, [^\r\x1b]*; [^\r\x1b]+)\x1b\[K", written_by_a_run))
    assert any(re.match(r"evaluate, pass 1/2, token \d+/14, alive \d+/16; \d+ s$", line) for line in shown)
    for step in (1, 2):
        assert any(re.match(rf"step {step}/2: sample, token \d+/14, alive \d+/\d+; \d+ s", line) for line in shown)
        assert any(
            re.match(rf"step {step}/2: update, (optimizer step \d/\d, )?micro-batch \d+/\d+; ", line) for line in shown
        )
    left = screen(written_by_a_run)
    assert not any(re.search(r"; \d+ s\b|alive \d|micro-batch \d", line) for line in left)
    assert_foretold_between_the_steps(left)


def assert_foretold_between_the_steps(lines: list[str]) -> None:
    kinds = (
        "step 1/2  reward ",
        r"about \d+ s a step, \d+ s an evaluation: done in about \d+ s, at ",
        "step 2/2  reward ",
    )
    first, then, second = ([i for i, line in enumerate(lines) if re.match(kind, line)] for kind in kinds)
    assert then == [first[0] + 1] and second == [first[0] + 2]


def test_the_warm_start_keeps_its_bar_to_itself(written_by_a_run):
    before, after = written_by_a_run.split("held out: ")[:2]
    bars = before[before.index("warm start, clean") : before.rindex("warm start, noisy")]
    assert not re.search(r"micro-batch \d", before) and "60/60" in bars and waiting.ERASE not in bars
    assert re.search(r"micro-batch \d", after)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_log_has_none_of_it_but_the_forecast(ranks, warm, tmp_path):
    words = finished(tmp_path / "run", warm, "train.steps=2", ranks=ranks)
    assert "\r" not in words and "\x1b" not in words and "alive" not in words
    assert_foretold_between_the_steps(words.splitlines())


class Terminal(io.StringIO):
    """A stream as sys.stderr is on a terminal of `width` columns."""

    def __init__(self, width: int, monkeypatch):
        super().__init__()
        self.written = threading.Event()
        monkeypatch.setattr(waiting.os, "get_terminal_size", lambda _: os.terminal_size((width, 24)))
        monkeypatch.setattr(waiting, "PERIOD", 0.001)
        monkeypatch.setattr(waiting.sys, "stderr", self)

    def fileno(self):
        return -1

    def isatty(self):
        return True

    def flush(self):
        self.written.set()


def test_a_line_is_no_longer_than_the_terminal_is_wide_or_it_could_not_be_erased(monkeypatch):
    out = Terminal(20, monkeypatch)
    monkeypatch.setattr(waiting, "now", waiting.Progress())
    waiting.count("micro-batch", 3, 40)  # now, for on a busy machine the first line may come before the stage's own
    with waiting.stage("log_probs"):
        assert out.written.wait(60)
    lines = out.getvalue().replace("\x1b[K", "").split("\r")
    assert {len(line) for line in lines[1:-1]} == {19} and lines[1].startswith("log_probs, micro-ba")
    assert screen(out.getvalue()) == [""]


def test_a_failure_takes_the_line_away_before_it_is_said(monkeypatch):
    out, threads = Terminal(80, monkeypatch), threading.active_count()
    with pytest.raises(ZeroDivisionError), waiting.stage("sample"):
        assert out.written.wait(60)
        raise ZeroDivisionError
    assert screen(out.getvalue()) == [""] and threading.active_count() == threads
    assert (waiting.now.stage, waiting.now.counts) == ("", {})


def test_a_terminal_that_is_gone_stops_nothing(monkeypatch):
    out = Terminal(80, monkeypatch)

    def gone(_):
        out.written.set()
        raise OSError

    out.write, failed = gone, []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with waiting.stage("sample"):
        assert out.written.wait(60)
    assert failed == []


def test_either_stream_may_be_the_terminal_and_ranks_but_the_first_have_none(monkeypatch):
    out, log = Terminal(80, monkeypatch), io.StringIO()
    for streams, expected in (((out, out), out), ((log, out), out), ((out, log), out), ((log, log), None)):
        monkeypatch.setattr(waiting.sys, "stdout", streams[0])
        monkeypatch.setattr(waiting.sys, "stderr", streams[1])
        assert waiting.terminal() is expected
    monkeypatch.setattr(waiting.sys, "stderr", out)
    monkeypatch.setenv("RANK", "1")
    assert waiting.terminal() is None


# --- what is counted ----------------------------------------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch) -> dict[str, list]:
    """What the sampler's loops count from here on, by its name."""
    said: dict[str, list] = defaultdict(list)
    for module in (fast.decode, sampler):
        monkeypatch.setattr(module, "count", lambda what, *numbers: said[what].append(numbers))
    return said


def test_the_fast_sampler_counts_tokens_and_the_rows_that_go_on_and_the_plain_one_tokens(counts):
    config = SampleConfig(group_size=16, max_new_tokens=12, temperature=0.7)
    rollout = sample(tiny_model(), PROMPTS, keys(len(PROMPTS)), config)
    lengths = rollout.mask.sum(1)
    going = [int(((lengths > t) | (rollout.truncated & (lengths == t))).sum()) for t in range(1, 13)]
    assert counts["token"] == [(t, 12) for t in range(1, 13)]
    assert counts["alive"] == [(n, 96) for n in going] and len(set(going)) > 3
    counts.clear()
    sample(tiny_model(), PROMPTS, keys(len(PROMPTS)), dataclasses.replace(config, decoding="plain"))
    assert counts["token"] == [(t, 12) for t in range(1, 13)]


def test_log_probs_count_micro_batches(progress, monkeypatch):
    policy, seen = tiny_model(), []
    rollout = sample(policy, PROMPTS, keys(len(PROMPTS)), SampleConfig(group_size=4, max_new_tokens=9))
    n = len(micro_batch_rows(rollout, 60, policy.fast.prompt_numbers(policy, rollout)))
    forward = model_module.token_log_probs
    note = lambda *inputs: seen.append(progress.counts["micro-batch"]) or forward(*inputs)  # noqa: E731
    monkeypatch.setattr(model_module, "token_log_probs", note)
    batch_log_probs(policy, rollout, 1.0, 60)
    assert seen == [(i, n) for i in range(1, n + 1)] and n > 3 and progress.counts == {}


def test_counters_inside_each_other_leave_what_they_found(progress):
    seen = []
    for _ in waiting.counted("ab", "optimizer step"):
        for _ in waiting.counted("xyz", "micro-batch"):
            waiting.count("token", 1, 9)
            seen.append(dict(progress.counts))
        assert list(progress.counts) == ["optimizer step"]
    assert progress.counts == {} and len(seen) == 6
    assert seen[4] == {"optimizer step": (2, 2), "micro-batch": (2, 3), "token": (1, 9)}
    with pytest.raises(KeyError):
        for _ in waiting.counted([1], "batch"):
            raise KeyError
    assert progress.counts == {}


def test_what_is_counted_are_numbers_of_the_host_for_tensors_would_make_a_gpu_wait(counts):
    for decoding in ("fast", "plain"):
        sample(tiny_model(), PROMPTS, keys(len(PROMPTS)), SampleConfig(max_new_tokens=5, decoding=decoding))
    assert {type(x) for said in counts.values() for pair in said for x in pair} == {int}


# --- what is foretold ---------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0] in seconds."""
    hands = [0.0]
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: hands[0])
    return hands


def test_the_line_says_how_far_how_long_and_how_long_yet_by_the_last_steps(clock):
    said = []
    for step in waiting.timed_steps(1, 8, eval_every=2):
        with waiting.stage("sample"):
            waiting.count("token", 20, 110)
            waiting.count("alive", 7, 16)
            waiting.count("batch", 1, 1)  # of one there is nothing to say
            clock[0] += 4
            said.append(waiting.line())
        clock[0] += 10 * step - 4
        if step % 2 == 0:
            with waiting.stage("evaluate"):
                clock[0] += 60
                said.append(waiting.line())
    where = "sample, token 20/110, alive 7/16; 4 s"
    assert said[0] == f"step 1/8: {where}"
    assert said[1] == f"step 2/8: {where}, about 6 s left"  # of 10
    assert said[2] == "step 2/8: evaluate; 60 s"
    assert said[3] == f"step 3/8: {where}, about 11 s left"  # of 10 and 20
    assert said[-2] == f"step 8/8: {where}, about 46 s left"  # of 30 to 70: evaluations do not count


@pytest.mark.parametrize("first, last, every", [(1, 40, 10), (1, 7, 3), (15, 20, 5), (1, 2, 1)])
def test_after_the_first_step_it_is_said_once_when_the_last_one_ends(first, last, every, clock, capsys):
    """Every step takes 100 s and every evaluation 1000, the one before the first step too."""
    expected = []
    with waiting.stage("evaluate"):
        clock[0] += 1000
    for step in waiting.timed_steps(first, last, every):
        clock[0] += 100
        if step % every == 0 or step == last:
            with waiting.stage("evaluate"):
                clock[0] += 1000
        expected.append(clock[0])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("about 100 s a step, 17 min an evaluation: done in about ")
    assert f"done in about {waiting.in_words(expected[-1] - expected[0])}, at " in said[0]


def test_the_time_of_the_end_has_its_day_where_that_is_another(progress):
    progress.took["step"] = [3600.0]
    assert (
        waiting.forecast(1, 3, 10, datetime(2026, 5, 1, 9, 30)) == "about 60 min a step: done in about 2.0 h, at 11:30"
    )
    assert waiting.forecast(1, 21, 10, datetime(2026, 5, 1, 9, 30)).endswith("in about 20.0 h, at 2026-05-02 05:30")


def test_a_run_of_one_step_left_foretells_nothing(capsys):
    assert list(waiting.timed_steps(7, 7, 10)) == [7] and list(waiting.timed_steps(8, 7, 10)) == []
    assert capsys.readouterr().out == ""


def test_a_run_without_a_planned_end_is_told_none_and_does_not_count_its_way_there(progress):
    progress.took["step"], progress.took["evaluate"] = [60.0], [10.0]
    assert waiting.forecast(1, 10**12, 10, datetime(2026, 5, 1)) == "about 60 s a step, 10 s an evaluation"
