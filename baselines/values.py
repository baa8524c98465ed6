"""What a prefix of a response is worth, found by continuing it, and the estimators built on that.

The value V of a prefix is the chance that the policy, going on from there, ends right. Here it is a
Monte-Carlo estimate: the mean verdict of K continuations, drawn by the sampler as it is and graded
like any response. It is unbiased, off by about sqrt(V (1 - V) / K), and needs no critic and no
trained reward model. The price is K more responses, or rests of them, for every step of every
response.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from infra.config import Block, knob
from infra.processes import map_over_ranks
from infra.sharding import unsharded
from infra.waiting import counted
from model import Policy
from rewards import Grader
from sample import SampleConfig, context_of, sample
from spro import AlgorithmConfig, Batch, at_least_fp32, estimator, grpo_advantage
from tasks.responses import EndOfResponse

PAV_ALPHA = 3.0  # weight of progress: PAV's is of this order, its code is not published
PAV_PROVER = 4  # of so many responses the prover gives the best
ER_PRM_ETA = 1.0  # `coefficient` in ER-PRM's MCTS/calculate_score.py
AT_ONCE = 4096  # continuations that are held together: whole, they are large


@dataclass
class ValuesConfig(Block):
    continuations: int = knob(
        9, "K: responses sampled from where each step begins, to value it; 9 is VinePPO's", least=1
    )


# --- the advantages -------------------------------------------------------------------------------


@estimator("values")
def vine_advantage(batch: Batch, algo: AlgorithmConfig):
    """VinePPO (arXiv 2410.01679): what its step added to the chance of being right, `V(after) -
    V(before)`.

    There is no outcome term: the last V is the verdict, so that a response's steps add up to its
    verdict minus the value of its prompt.
    """
    return at_least_fp32(batch.values_after) - at_least_fp32(batch.values_before)


@estimator("values")
def pav_advantage(batch: Batch, algo: AlgorithmConfig):
    """PAV (arXiv 2410.08146), oracle form: the outcome advantage plus alpha times the step's
    progress.

    Progress is the step's `Q(after) - Q(before)` under a better policy, the prover; ours gives the
    best of `PAV_PROVER` responses, so `Q = 1 - (1 - V)^PAV_PROVER`. The paper trains a verifier to
    predict it. Of an estimated V this is not unbiased, for Q is not linear.
    """
    before, after = (
        1 - (1 - at_least_fp32(value)) ** PAV_PROVER
        for value in (batch.values_before, batch.values_after)
    )
    return grpo_advantage(batch, algo) + PAV_ALPHA * (after - before)


@estimator("values")
def er_prm_advantage(batch: Batch, algo: AlgorithmConfig):
    """ER-PRM (arXiv 2412.11006), label form: the outcome advantage plus the difference that the
    step makes to the prefix's entropy-regularized value.

    That value is `(1 / eta) log E[e^(eta r)]`, which of verdicts of 0 and 1 is `(1 / eta) log(1 - V
    + V e^eta)`. The paper trains a PRM on it offline.
    """
    before, after = (
        (at_least_fp32(value) * math.expm1(ER_PRM_ETA)).log1p() / ER_PRM_ETA
        for value in (batch.values_before, batch.values_after)
    )
    return grpo_advantage(batch, algo) + (after - before)


# --- the values -----------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """Where a step of a response begins: the prompt, and the response's tokens before the step."""

    row: int  # of the response in its batch
    start: int  # tokens of the response before the step
    ids: torch.Tensor  # of the prompt and those
    place: tuple[int, int]  # (group, path): siblings that begin alike have it in common


def continue_prefixes(
    policy: Policy,
    batch: Batch,
    step_ids: torch.Tensor,
    continuations: int,
    config: SampleConfig,
    grader: Grader,
    key: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """The values of the prefixes at which the steps of responses begin and end.

    batch: tokens, masks, problems and verdicts. step_ids [B, T]: a step is a run of equal numbers.
    -> (values before each token's step, values after it, both [B, T] and 0 where masked; counts,
    under their metrics' names). Where one step ends the next begins, with the same value.

    - The value of a prefix is the mean verdict of `continuations` responses that begin with it. A
      whole response is not continued: its own verdict is its value.
    - Prefix and continuation are one response: at most config.max_new_tokens in all, ended by stop
      ids and stop strings, and graded, like any other.
    - Siblings that begin alike, as all do with the bare prompt, share one estimate.
    - Luck is a function of `key` (seed, purpose, step of the run), the prefix's tokens and the
      number of the continuation: not of what else is in the batch, nor of the ranks.
    - A verdict that failed is no zero: it is left out of the mean. A prefix with none at all is
      worth what the one before it is, so that the step between them earns nothing; a bare prompt,
      what its own responses' verdicts are on average (NaN where these failed too).

    Raises RunStopped where the model gives NaN.
    """
    prefixes = [prefixes_of(batch, step_ids, row) for row in range(len(batch))]
    distinct = list({prefix.place: prefix for of_row in prefixes for prefix in of_row}.values())
    parts = parts_of(distinct, continuations, config.max_new_tokens, context_of(policy))
    scores: dict[tuple[int, int], list[float | None]] = {}
    tokens = 0
    with unsharded(policy):
        for part in counted(parts, "part"):
            texts, drawn = continued(policy, part, continuations, config, key)
            problems = [batch.problems[prefix.row] for prefix in part for _ in range(continuations)]
            verdicts = map_over_ranks(grader.grade, list(zip(problems, texts, strict=True)))
            for i, prefix in enumerate(part):
                own = verdicts[i * continuations : (i + 1) * continuations]
                scores[prefix.place] = [verdict.score for verdict in own]
            tokens += drawn
    counts = {
        "values/continuations": len(distinct) * continuations,
        "values/tokens": tokens,
        "values/faults": sum(own.count(None) for own in scores.values()),
    }
    return *along_tokens(batch, prefixes, scores), counts


def prefixes_of(batch: Batch, step_ids: torch.Tensor, row: int) -> list[Prefix]:
    """Where each step of one response begins: the first is the bare prompt."""
    ids = batch.tokens[row][batch.attention_mask[row]]
    _, lengths = step_ids[row][batch.mask[row]].unique_consecutive(return_counts=True)
    prompt = len(ids) - int(lengths.sum())
    group = row // batch.group_size
    found = []
    for start in (lengths.cumsum(0) - lengths).tolist():
        beginning = ids[: prompt + start]
        found.append(Prefix(row, start, beginning, (group, path_of(beginning))))
    return found


def path_of(ids: torch.Tensor) -> int:
    """One number for all these tokens, to be part of a random key: 128 bits of their SHA-256."""
    return int.from_bytes(hashlib.sha256(ids.numpy().tobytes()).digest()[:16], "little")


def parts_of(
    prefixes: list[Prefix], continuations: int, max_new_tokens: int, context: float
) -> list[list[Prefix]]:
    """Which prefixes are continued together: the shortest ones first.

    The sampler gives all of a part as many new tokens as its first has left. So a part ends before
    a prefix that has less than half of that left, or that would leave the model's context.
    """
    parts: list[list[Prefix]] = []
    longest = 0  # new tokens of the part at hand
    for prefix in sorted(prefixes, key=lambda prefix: prefix.start):
        left = max_new_tokens - prefix.start
        alike = 2 * left >= longest and len(prefix.ids) + longest <= context
        if not parts or not alike or len(parts[-1]) * continuations >= AT_ONCE:
            parts.append([])
            longest = left
        parts[-1].append(prefix)
    return parts


def continued(
    policy: Policy,
    part: list[Prefix],
    continuations: int,
    config: SampleConfig,
    key: tuple[int, ...],
) -> tuple[list[str], int]:
    """(the texts of `continuations` responses that begin with each prefix, those of one prefix side
    by side; how many of their tokens are new).
    """
    drawn = sample(
        policy,
        [prefix.ids.tolist() for prefix in part],
        [(*key, prefix.place[1]) for prefix in part],
        replace(config, max_new_tokens=config.max_new_tokens - part[0].start),
        group_size=continuations,
    )
    responses = []
    for i, new in enumerate(drawn.tokens[:, drawn.prompt_length :]):
        prefix = part[i // continuations]
        begun = prefix.ids[len(prefix.ids) - prefix.start :]
        responses.append(torch.cat([begun, new[drawn.mask[i]]])[: config.max_new_tokens])
    # Again on the whole, for a stop string may begin in the prefix and end behind it
    end = EndOfResponse(policy, config.stop, 0)
    padded = pad_sequence(responses, batch_first=True, padding_value=policy.pad_id)
    stops = end.ends(padded.to(policy.device)).cpu()
    texts, tokens = [], 0
    for i, response in enumerate(responses):
        stop = stops[i, : len(response)]
        length = int(stop.int().argmax()) + 1 if stop.any() else len(response)
        texts.append(end.text(response[:length].tolist()))
        tokens += length - part[i // continuations].start
    return texts, tokens


def along_tokens(
    batch: Batch,
    prefixes: list[list[Prefix]],
    scores: dict[tuple[int, int], list[float | None]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values before and after the step of each token, [B, T] each, of the scores at places."""
    before, after = torch.zeros(batch.mask.shape), torch.zeros(batch.mask.shape)
    verdicts = [verdict.score for verdict in batch.verdicts]
    for row, of_row in enumerate(prefixes):
        first = row - row % batch.group_size
        value = mean_of_known(verdicts[first : first + batch.group_size], math.nan)
        values = []
        for found in (*(scores[prefix.place] for prefix in of_row), [verdicts[row]]):
            value = mean_of_known(found, value)
            values.append(value)
        length = int(batch.mask[row].sum())
        lengths = torch.tensor([*(prefix.start for prefix in of_row), length]).diff()
        before[row, :length] = torch.tensor(values[:-1]).repeat_interleave(lengths)
        after[row, :length] = torch.tensor(values[1:]).repeat_interleave(lengths)
    return before, after


def mean_of_known(scores: list[float | None], otherwise: float) -> float:
    """The mean of those that are there; `otherwise` where none is."""
    known = [score for score in scores if score is not None]
    return fmean(known) if known else otherwise
