"""What many verdicts come to: proportions with intervals, pass@k, majority votes, a benchmark's
figures.
"""

from collections import defaultdict
from math import comb, sqrt
from statistics import fmean, pvariance, stdev

from infra.errors import BadInput

from rewards.answers import last_box


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


def majority(votes: list[tuple[str | None, float]]) -> float:
    """Score of the most common answer of (answer, score) pairs; of several as common, their mean
    score.

    That is the expected score where ties are broken at random. Without an answer (None) there is no
    vote.
    """
    scores = defaultdict(list)
    for answer, score in votes:
        if answer is not None:
            scores["".join(answer.split())].append(score)
    most = max(map(len, scores.values()), default=0)
    return fmean([fmean(group) for group in scores.values() if len(group) == most] or [0.0])


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


def benchmark_metrics(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """name -> (mean over problems, low, high) of saved outputs; a response without a verdict counts
    in no score.

    accuracy is the mean score (avg@n), pass@k takes a score of 1 as right, maj@n lets all n samples
    of a problem vote by what they box (absent where nothing is boxed).
    """
    problems = defaultdict(list)
    for row in rows:
        problems[row["problem"]].append(row)
    graded = [[row for row in group if row["score"] is not None] for group in problems.values()]
    graded = [group for group in graded if group]
    if not graded:
        raise BadInput(f"no response has a verdict; the first: {rows[0]['reason'] if rows else 'there is none'}")
    n = max(map(len, graded))
    metrics = {"accuracy": mean_interval([fmean(row["score"] for row in group) for group in graded])}
    for k in sorted({2**i for i in range(1, n.bit_length())} | {n} - {1}):
        counts = [(len(group), sum(row["score"] == 1 for row in group)) for group in graded if len(group) >= k]
        metrics[f"pass@{k}"] = mean_interval([pass_at_k(*count, k) for count in counts])
    votes = [[(last_box(row["text"]), row["score"]) for row in group] for group in graded]
    if n > 1 and any(answer is not None for group in votes for answer, _ in group):
        metrics[f"maj@{n}"] = mean_interval([majority(group) for group in votes])
    lengths = [fmean(row["length"] for row in group) for group in problems.values()]
    m, half = (
        fmean(lengths),
        1.96 * stdev(lengths) / sqrt(len(lengths)) if len(lengths) > 1 else 0.0,
    )
    cut = mean_interval([fmean(row["truncated"] for row in group) for group in problems.values()])
    return metrics | {"length, tokens": (m, m - half, m + half), "cut off": cut}
