"""Verifiers: a response's text and the reference answer -> a verdict with its reason.

    python reward.py GRADER < pairs.jsonl > verdicts.jsonl

reads lines {"text": ..., "reference": ...} and writes one line {"score": 0..1 or null, "reason": ..., "seconds": ...}
for each, in order. A score is the model's doing; null is a fault of ours (a grader that crashed, a malformed line) and
must never be mistaken for a wrong answer: training drops the whole group of a response that has no score.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass

ATTEMPTS = 2  # a grader that raises is tried again once before its fault is reported


@dataclass
class RewardConfig:
    grader: str = ""  # a name in GRADERS for all problems; empty: each problem names its own

    def __post_init__(self):
        if self.grader and self.grader not in GRADERS:
            raise ValueError(f"grader={self.grader!r} is not known: choose one of {', '.join(GRADERS)}")


@dataclass(frozen=True)
class Verdict:
    score: float | None  # 0..1; None: an infrastructure fault, no statement about the response
    reason: str
    seconds: float = 0.0


def grade_chain(text: str, reference: str) -> tuple[float, str]:
    """The chain task: the text must end in `#` and the one right digit."""
    answer = re.search(r"#([0-9])\Z", text)
    if not answer:
        return 0.0, "no answer: the text does not end in '#' and a digit"
    if answer[1] != reference:
        return 0.0, f"answered {answer[1]}, expected {reference}"
    return 1.0, "right"


GRADERS = {"chain": grade_chain}


def grade_one(grader: str, text: str, reference: str) -> Verdict:
    """One verdict. A crash of the grader is a fault (score None), never a wrong answer. KeyError: unknown grader."""
    judge, start = GRADERS[grader], time.perf_counter()
    for _ in range(ATTEMPTS):
        try:
            score, reason = judge(text, reference)
            if not 0 <= score <= 1:  # NaN too
                raise ValueError(f"a score of {score!r} does not lie in [0, 1]")
            break
        except Exception as error:  # whatever a grader trips over is not the response's fault
            score, reason = None, f"fault in grader {grader!r}: {type(error).__name__}: {error}"
    return Verdict(score, reason, time.perf_counter() - start)


def grade(answers, grader: str = "") -> list[Verdict]:
    """One verdict for each (problem, text) of `answers`, in order: by `grader`, or else by each problem's own."""
    return [grade_one(grader or problem.grader, text, problem.reference) for problem, text in answers]


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in GRADERS:
        known = ", ".join(GRADERS)
        print(f"error: usage: python reward.py GRADER < pairs.jsonl, where GRADER is one of: {known}", file=sys.stderr)
        return 2
    for line in sys.stdin.buffer:
        try:
            row = json.loads(line)
            text, reference = row["text"], row["reference"]
            if not (isinstance(text, str) and isinstance(reference, str)):
                raise TypeError("text and reference must be strings")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            verdict = Verdict(
                None, f"fault: not a JSON object with text and reference ({type(error).__name__}: {error})"
            )
        else:
            verdict = grade_one(sys.argv[1], text, reference)
        print(json.dumps(asdict(verdict)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
