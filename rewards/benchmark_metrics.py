"""What many verdicts come to: proportions with intervals, pass@k, majority votes, a benchmark's
figures.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from math import comb, sqrt
from statistics import fmean, pvariance, stdev

from infra.errors import BadInput

from rewards import Grader
from rewards.answers import final_answer, last_box
from rewards.worker import VERDICT_SECONDS, threads

BY_VALUE = ("math", "number")  # graders that say when two answers are equal; others know spellings alone


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike +- 2 standard errors, honest near 0
    and 1.
    """
    centre, spread = right + z * z / 2, z * sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, `right` of them right, hold a right one (unbiased; arXiv
    2107.03374, Eq. 1).
    """
    return 1 - comb(n - right, k) / comb(n, k)


def majority(votes: list[tuple[str | None, float]], same: Callable[[str, str], bool] | None = None) -> float:
    """Score of the most common answer of (answer, score) pairs; of several as common, their mean
    score.

    That is the expected score where ties are broken at random. Without an answer (None) there is no
    vote. Answers vote together that are spelled alike, or that are equal as `same` has it.
    """
    votes = [(answer, score) for answer, score in votes if answer is not None]
    if same:
        parties = equal_answers(votes, same)
    else:
        spellings = defaultdict(list)
        for answer, score in votes:
            spellings["".join(answer.split())].append(score)
        parties = list(spellings.values())
    most = max(map(len, parties), default=0)
    return fmean([fmean(party) for party in parties if len(party) == most] or [0.0])


def equal_answers(votes: list[tuple[str, float]], same: Callable[[str, str], bool]) -> list[list[float]]:
    """The scores of answers, those of equal answers together.

    Right answers equal the reference, and so one another. A wrong one is compared with the most
    common spelling of each party so far; and none is where that could not change who wins.
    """
    right = [score for _, score in votes if score == 1]
    wrong = defaultdict(list)
    for answer, score in votes:
        if score != 1:
            wrong[answer.strip()].append(score)
    if not right or len(right) > len(votes) - len(right):
        return [right] if right else list(wrong.values())
    parties: dict[str, list[float]] = {}
    for answer in sorted(wrong, key=lambda answer: (-len(wrong[answer]), answer)):  # in whatever order they came
        party = next((other for other in parties if same(other, answer)), answer)
        parties.setdefault(party, []).extend(wrong[answer])
    return [right, *parties.values()]


def equality(grader: str, reference) -> Callable[[str, str], bool]:
    """Whether two answers to a problem are equal, by its grader, either of them taken for the reference.

    Two whose comparison was cut off for its time are compared with nothing more, so that a problem costs at most one
    such wait for two samples.
    """
    judge, slow = Grader(), set()

    def same(one: str, other: str) -> bool:
        for expected, answer in ((one, other), (other, one)):
            if slow & {one, other}:
                return False
            gold = reference | {"answer": expected} if isinstance(reference, dict) else expected
            verdict = judge.grade_one(grader, rf"\boxed{{{answer}}}", gold)
            if verdict.score == 1:
                return True
            if verdict.seconds >= VERDICT_SECONDS:
                slow.update((one, other))
        return False

    return same


def vote(rows: list[dict]) -> float | None:
    """The majority's score of all responses to a problem; None where none of them has an answer."""
    grader = rows[0].get("grader", "math")
    answer_of = final_answer if grader in BY_VALUE else last_box
    votes = [(answer_of(row["text"]), row["score"]) for row in rows]
    if all(answer is None for answer, _ in votes):
        return None
    return majority(votes, equality(grader, rows[0].get("reference")) if grader in BY_VALUE else None)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value in [0, 1] per problem, and its 95 % interval over problems like these.

    Wilson's interval at the effective sample size m(1-m) / variance, by which n exceeds that of
    yes-or-no values (Korn and Graubard 1998 do so for surveys): exactly Wilson's for those,
    narrower for averages of several samples. It covers more often than bootstrap and normal
    intervals; worst are few problems of which few are ever solved.
    """
    m, n = fmean(values), len(values)
    n *= m * (1 - m) / pvariance(values) if len(set(values)) > 1 else 1
    return m, *wilson_interval(m * n, n)


def whole_problems(rows: list[dict]) -> tuple[list[list[dict]], int]:
    """(the responses to each problem of which all have a verdict, how many problems are left out).

    So every figure of a row is of the same problems, and of as many responses to each.
    """
    problems = defaultdict(list)
    for row in rows:
        problems[row["problem"]].append(row)
    n = max(map(len, problems.values()), default=0)
    whole = [group for group in problems.values() if len(group) == n and all(row["score"] is not None for row in group)]
    return whole, len(problems) - len(whole)


def benchmark_metrics(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """name -> (mean over problems, low, high) of saved outputs, over `whole_problems`.

    accuracy is the mean score (avg@n), pass@k takes a score of 1 as right, maj@n lets all n samples
    of a problem vote by their answers (absent where there is none).
    """
    problems, _ = whole_problems(rows)
    if not problems:
        faults = [row["reason"] for row in rows if row["score"] is None]
        raise BadInput(
            "no response has a verdict, or none to a problem all of whose responses have one; the first without: "
            f"{faults[0] if faults else 'there is none'}"
        )
    n = len(problems[0])
    metrics = {"accuracy": mean_interval([fmean(row["score"] for row in group) for group in problems])}
    rights = [sum(row["score"] == 1 for row in group) for group in problems]
    for k in sorted({2**i for i in range(1, n.bit_length())} | {n} - {1}):
        metrics[f"pass@{k}"] = mean_interval([pass_at_k(n, right, k) for right in rights])
    votes = list(threads(os.getpid()).map(vote, problems)) if n > 1 else []
    if any(score is not None for score in votes):
        metrics[f"maj@{n}"] = mean_interval([score or 0.0 for score in votes])
    lengths = [fmean(row["length"] for row in group) for group in problems]
    m, half = (
        fmean(lengths),
        1.96 * stdev(lengths) / sqrt(len(lengths)) if len(lengths) > 1 else 0.0,
    )
    cut = mean_interval([fmean(row["truncated"] for row in group) for group in problems])
    return metrics | {"length, tokens": (m, m - half, m + half), "cut off": cut}
