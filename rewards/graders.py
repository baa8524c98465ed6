"""Verdicts: a response's text and the reference -> a score with its reason.

A score is the model's doing, between 0 and 1. A fault of ours (a grader that crashed, a malformed reference) has no
score and must never be mistaken for a wrong answer: training drops the whole group of a response without a score.

A `Grader` judges as a RewardConfig says. To add a grader, write `(text, reference) -> (score, reason)` and name it in
GRADERS; and in CHECKS what references it can read, so that a row with another is named before anything runs. The
rules of `number` and `math` stand at the top of answers.py, those of `code` in programs.py and sandbox.py.
"""

import functools
import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass

from infra.config import Block, knob

from rewards import sandbox
from rewards.answers import grade_math, grade_number, last_box, read_reference
from rewards.programs import check_tests, grade_code
from rewards.worker import ask_worker, threads

ATTEMPTS = 2  # a grader that raises is tried again once before its fault is reported


def check_digit(reference) -> None:
    """What the grader `chain` can read: a digit, as text or as a number."""
    if type(reference) not in (str, int) or not re.fullmatch("[0-9]", str(reference)):
        raise ValueError("it must be a digit, as text or as a number")


def grade_chain(text: str, reference) -> tuple[float, str]:
    """The chain task: the text must end in `#` and the one right digit."""
    check_digit(reference)
    answer = re.search(r"#([0-9])\Z", text)
    if not answer:
        return 0.0, "no answer: the text does not end in '#' and a digit"
    if answer[1] != str(reference):  # rows may say 2 for "2"
        return 0.0, f"answered {answer[1]}, expected {reference}"
    return 1.0, "right"


def grade_boxed(text: str, reference) -> tuple[float, str]:
    """Whether there is a box to be graded at all: a bonus for the format."""
    return (0.0, "no box") if last_box(text) is None else (1.0, "boxed")


def check_entry(reference) -> None:
    """What reasoning-gym can read: an entry of one of its tasks."""
    if not isinstance(reference, dict) or not {"metadata", "answer"} <= reference.keys():
        raise ValueError("it must be an entry of a reasoning-gym task, with answer and metadata")


def grade_reasoning_gym(text: str, reference: dict) -> tuple[float, str]:
    """A reasoning-gym task's own score of what is boxed; the reference is the task's entry."""
    import reasoning_gym

    answer = last_box(text)
    source = reference["metadata"]["source_dataset"]
    score = reasoning_gym.get_score_answer_fn(source)(answer, reference)
    return min(1.0, max(0.0, float(score))), f"boxed {answer!r}, expected {reference['answer']!r}"


GRADERS = {
    "chain": grade_chain,
    "boxed": grade_boxed,
    "number": grade_number,
    "math": grade_math,
    "reasoning_gym": grade_reasoning_gym,
    "code": grade_code,
}
CHECKS = {  # raise where no answer could be right by a reference; a grader that has none reads any
    "chain": check_digit,
    "number": read_reference,
    "math": read_reference,
    "reasoning_gym": check_entry,
    "code": check_tests,
}
IN_WORKER = {"math"}  # graders that may hang: they run in a process that can be killed
IN_THREAD = IN_WORKER | {"code"}  # graders that leave the work to other processes: one per core


def check_name(name: str, key: str = "grader") -> None:
    """Raise ValueError if there is no such grader."""
    if name not in GRADERS:
        raise ValueError(f"{key}={name!r} is not known: choose one of {', '.join(GRADERS)}")


@dataclass
class RewardConfig(Block):
    grader: str = knob("", "a name in rewards.GRADERS for all problems; empty: each names its own")
    bonus: dict = knob({}, "{grader: weight}: its score, so weighted, is added", free=True)
    overlong_buffer: int = knob(0, "tokens before the limit over which the reward falls", least=0)
    code_fraction: bool = knob(False, "programs: the fraction of the tests passed, as PRIME has it")
    allow_unsafe_code_execution: bool = knob(False, "run programs without a sandbox: SECURITY.md")

    def __post_init__(self):
        super().__post_init__()
        if self.grader:
            check_name(self.grader)
        for name, weight in self.bonus.items():
            check_name(name, "bonus")
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise ValueError(f"bonus={self.bonus!r}: the weight of {name} must be a number")


@dataclass(frozen=True)
class Verdict:
    score: float | None  # 0..1; None: an infrastructure fault, no statement about the response
    reason: str
    seconds: float = 0.0


class Grader:
    """Judges texts as `config` says. Making one starts nothing; `require` looks whether a grader can work here."""

    def __init__(self, config: RewardConfig | None = None):
        self.config = config or RewardConfig()
        self.unsafe = self.config.allow_unsafe_code_execution
        code = functools.partial(grade_code, fraction=self.config.code_fraction, unsafe=self.unsafe)
        self.graders = GRADERS | {"code": code}

    def name_for(self, problem) -> str:
        """Which grader judges this problem: the config's, or else the problem's own."""
        return self.config.grader or problem.grader

    def require(self, name: str, key: str = "grader") -> None:
        """Raise ValueError if there is no such grader, or if what it needs is not installed."""
        check_name(name, key)
        if name == "math" and not all(map(importlib.util.find_spec, ("math_verify", "latex2sympy2_extended"))):
            raise ValueError(f"{key}='math' needs a package that is not installed: pip install math-verify")
        if name == "code":
            try:
                sandbox.isolation(self.unsafe)
            except sandbox.SandboxError as error:
                raise ValueError(f"{key}='code': {error}, or set reward.allow_unsafe_code_execution=true") from error

    def check(self, problem) -> None:
        """Raise ValueError if one of its graders, those of a bonus too, cannot read the problem's reference."""
        for name in (self.name_for(problem), *self.config.bonus):
            try:
                if name in CHECKS:
                    CHECKS[name](problem.reference)
            except Exception as error:  # whatever a check trips over, the reference cannot be read
                shown = repr(problem.reference)
                shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
                why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise ValueError(f"the grader {name!r} cannot read the reference {shown}: {why}") from error

    def isolation(self) -> str:
        """What stands between this machine and the programs that are graded: see sandbox.py."""
        level = sandbox.isolation(self.unsafe).name
        return "resource limits alone, no sandbox" if level == "none" else f"a {level} sandbox"

    def grade_one(self, name: str, text: str, reference) -> Verdict:
        """One verdict of the grader `name`. Its crash is a fault (score None), never a wrong answer."""
        judge, start = self.graders[name], time.perf_counter()
        if name in IN_WORKER:
            judge = functools.partial(ask_worker, name)
        for _ in range(ATTEMPTS):
            try:
                score, reason = judge(text, reference)
                if not 0 <= score <= 1:  # NaN too
                    raise ValueError(f"a score of {score!r} does not lie in [0, 1]")
                break
            except Exception as error:  # whatever a grader trips over is not the response's fault
                score, reason = None, f"fault in grader {name!r}: {type(error).__name__}: {error}"
        return Verdict(score, reason, time.perf_counter() - start)

    def grade(self, answers, name: str = "") -> list[Verdict]:
        """One verdict for each (problem, text) of `answers`, in order, by `name` if it is given."""
        jobs = [(name or self.name_for(problem), text, problem.reference) for problem, text in answers]
        for used in {used for used, _, _ in jobs}:
            self.require(used)
        if any(used in IN_THREAD for used, _, _ in jobs):
            return list(threads(os.getpid()).map(lambda job: self.grade_one(*job), jobs))
        return [self.grade_one(*job) for job in jobs]

    def judge(self, answers, max_new_tokens: int) -> list[tuple[Verdict, float]]:
        """(verdict, reward to train on) of each (problem, text, length in tokens)."""
        texts = [answer[:2] for answer in answers]
        lengths = [answer[2] for answer in answers]
        verdicts = self.grade(texts)
        return list(zip(verdicts, self.shaped_rewards(texts, verdicts, lengths, max_new_tokens), strict=True))

    def shaped_rewards(self, answers, verdicts, lengths, max_new_tokens: int) -> list[float]:
        """The rewards to train on: score + weighted bonuses + over-long penalty of each answer; NaN without a verdict.

        lengths: in tokens. The penalty is DAPO's (arXiv 2503.14476, Eq. 13): 0 up to max_new_tokens - overlong_buffer,
        from there falling linearly to -1 at max_new_tokens. The verdicts stay as they are: accuracy counts those.
        """
        rewards = [math.nan if verdict.score is None else float(verdict.score) for verdict in verdicts]
        for name, weight in self.config.bonus.items():
            for i, verdict in enumerate(self.grade(answers, name)):
                rewards[i] += math.nan if verdict.score is None else weight * verdict.score
        buffer = self.config.overlong_buffer
        for i, length in enumerate(lengths if buffer else ()):
            excess = length - (max_new_tokens - buffer)
            rewards[i] -= min(max(excess / buffer, 0), 1)
        return rewards
