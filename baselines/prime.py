"""PRIME (arXiv 2502.01456): a process reward model that learns online from verdicts alone, beside
the policy.

The PRM is a third language model, started where policy and reference start. Its reward of a token
is `beta * (log pi_prm - log pi_ref)` (Eq. 3), so a model that is taught nothing but whole
responses' verdicts,

    loss = cross-entropy of sigmoid(sum_t beta * (log pi_prm - log pi_ref)) and the verdict,

scores every token. SPRO's process reward is the policy's own log-ratio, summed over the past; PRIME
trains a model for it, and sums over the future.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baselines.beside import Pass, one_pass, step_metrics
from infra.config import Block, knob
from infra.metrics import timed
from model import Policy, batch_log_probs, token_log_probs
from spro import AlgorithmConfig, Batch, at_least_fp32, by_group, estimator, process_reward

MAX_GRAD_NORM = 10.0  # of the PRM: the released training script's


@dataclass
class PrimeConfig(Block):
    learning_rate: float = knob(
        1e-6,
        "of the PRM's own AdamW, constant; this is PRIME's for 7B, small models need far more",
        above=0,
    )
    update: str = knob(
        "after",
        "after: a mini-batch is scored before its PRM step (one pass); before: learn, then score "
        "all",
        choices=("after", "before"),
    )


def check(config) -> None:
    """ValueError where a PRM could not learn."""
    algo = config.algorithm
    if config.learns_beside == "prm" and algo.beta <= 0:
        raise ValueError(
            f"algorithm.advantage={algo.advantage} needs algorithm.beta above 0 to learn by"
        )


# --- the advantages -------------------------------------------------------------------------------


@estimator("reference", "prm")
def prime_advantage(batch: Batch, algo: AlgorithmConfig):
    """PRIME (Eq. 5, gamma 1). `process_log_probs` [B, T] are the PRM's; without them the policy is
    its own PRM.

    Outcome and process reward are each compared with the mean of the siblings, itself left out: r_i
    - mean_j r_j, plus the sum over s >= t of (process reward - mean_j of length-averaged process
    rewards).

    >>> log_ratio = torch.tensor([[0.1, 0.3], [0.4, 0.0]])  # token means .2 and .4
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> batch = Batch(rewards=torch.tensor([1.0, 0.0]), process_log_probs=log_ratio,
    ...               ref_log_probs=torch.zeros(2, 2), mask=mask, group_size=2)
    >>> prime_advantage(batch, AlgorithmConfig(beta=1.0))
    tensor([[ 0.6000,  0.9000],
            [-0.8000,  0.0000]])
    """
    G = batch.group_size
    rewards = at_least_fp32(batch.rewards)
    process_rewards, means = process_rewards_and_means(batch, algo.beta)
    centred = process_rewards - mean_of_others(means, G)[:, None]
    outcome = rewards - mean_of_others(rewards, G)
    return outcome[:, None] + to_go(torch.where(batch.mask, centred, 0.0))


@estimator("reference", "prm", additive=False)
def prime_released_advantage(batch, algo):
    """PRIME as its released code computes it, which is not Eq. 5; fields as for `prime_advantage`.

    The log-ratios, without beta, are divided by the largest |sum over s >= t| of the batch + 1e-6;
    the leave-one-out is K/(K-1) r - sum_j mean_j / (K-1), which is Eq. 5's plus (r - own mean) /
    (K-1); outcome and process returns add one to one, and the sum is whitened over all tokens of
    the batch: (A - mean) / sqrt(unbiased variance + 1e-8).
    """
    K, mask = batch.group_size, batch.mask
    rewards = at_least_fp32(batch.rewards)
    log_ratio, means = process_rewards_and_means(batch, 1.0)
    # Of no tokens: 0
    largest = torch.cat([to_go(log_ratio).abs()[mask], log_ratio.new_zeros(1)]).max() + 1e-6
    baseline = by_group(means, K).sum(1).repeat_interleave(K) / (K - 1)
    process_returns = (
        to_go(torch.where(mask, K / (K - 1) * log_ratio - baseline[:, None], 0.0)) / largest
    )
    returns = (rewards - mean_of_others(rewards, K))[:, None] + process_returns
    return whitened(returns, mask)


def whitened(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(x - mean) / sqrt(unbiased variance + 1e-8), over all tokens of the batch. [B, T] -> [B, T].

    verl's masked_whiten.
    """
    live = x[mask]
    variance = (live - live.mean()).square().sum() / max(1, len(live) - 1)
    return (x - live.mean()) * (variance + 1e-8).rsqrt()


def to_go(rewards: torch.Tensor) -> torch.Tensor:
    """Reverse running sum along each response: the sum over s >= t. [B, T] -> [B, T]."""
    return rewards.flip(1).cumsum(1).flip(1)


def mean_of_others(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Leave-one-out mean over the siblings. [B] -> [B]."""
    grouped = by_group(x, group_size)
    return ((grouped.sum(1, keepdim=True) - grouped) / (group_size - 1)).flatten()


def process_rewards_and_means(batch: Batch, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Process rewards, 0 where masked [B, T], and their mean over each response's tokens [B]."""
    log_probs = batch.process_log_probs
    if log_probs is None:
        log_probs = batch.policy_log_probs
    process_rewards = torch.where(
        batch.mask, process_reward(log_probs, batch.ref_log_probs, beta), 0.0
    )
    return process_rewards, process_rewards.sum(1) / batch.mask.sum(1).clamp(min=1)


# --- the PRM learns -------------------------------------------------------------------------------


def ranking_accuracy(sums: torch.Tensor, verdicts: torch.Tensor, group_size: int) -> float | None:
    """Of all sibling pairs with different verdicts, the fraction where the better one has the
    larger sum of process rewards; a tie is half. sums, verdicts [B]. None without any such pair."""
    sums, verdicts = (x.view(-1, group_size, 1) for x in (sums, verdicts))
    better = verdicts > verdicts.mT
    gap = sums - sums.mT
    return (0.5 + 0.5 * gap.sign())[better].double().mean().item() if better.any() else None


# A part of a mini-batch's loss, in nats, of some of its rows: of their process rewards, 0 where
# masked [n, T], their mask [n, T], and which rows they are [n]. The parts add up to the whole.
PartialLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_loss(prm: Policy, config, batch: Batch, verdicts: torch.Tensor) -> PartialLoss:
    """PRIME's loss on a mini-batch: the cross-entropy of sigmoid(sum of process rewards) and the
    verdict, a mean over its responses.
    """

    def part(process_rewards, mask, rows):
        logits = process_rewards.sum(1)
        targets = verdicts[rows].to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(batch)

    return part


def prm_pass(prm: Policy, config, partial_loss: PartialLoss) -> Pass:
    """The PRM's pass over some rows, with their `partial_loss`. What it says of a token is its
    log-prob.
    """

    def run_pass(rows, part):
        new = token_log_probs(prm, part, config.sample.temperature).log_probs
        process_rewards = process_reward(new, part.ref_log_probs, config.algorithm.beta)
        process_rewards = torch.where(part.mask, process_rewards, 0.0)
        loss = partial_loss(process_rewards[: len(rows)], part.mask[: len(rows)], rows)
        return new, loss

    return run_pass


def score_and_learn(
    prm: Policy,
    optimizer,
    config,
    batch: Batch,
    verdicts: torch.Tensor,
    mini_batches: list[torch.Tensor],
    loss_on=cross_entropy_loss,
) -> tuple[torch.Tensor, dict[str, float]]:
    """PRM log-probs [B, T] of a step's responses, for the advantage, while the PRM takes a step on
    each mini-batch.

    verdicts [B], in [0, 1]; `mini_batches` are lists of rows, together all rows once; `loss_on`: a
    mini-batch -> its PartialLoss, as `cross_entropy_loss` does. Returns metrics too; the ranking
    accuracy is that of the scores before the respective step. Raises RunStopped where every step
    was refused.
    """
    metrics: dict[str, float] = {}

    def pass_on(rows, mini):
        return prm_pass(prm, config, loss_on(prm, config, mini, verdicts[rows]))

    with timed(metrics, "time/prm"):
        log_probs, steps = one_pass(
            prm, optimizer, config, batch, mini_batches, pass_on, MAX_GRAD_NORM
        )
        rewards = process_reward(log_probs, batch.ref_log_probs, config.algorithm.beta)
        sums = torch.where(batch.mask, rewards, 0.0).sum(1)
        ranking = ranking_accuracy(sums, verdicts, batch.group_size)
        if config.prime.update == "before":
            log_probs, _ = batch_log_probs(
                prm, batch, config.sample.temperature, config.train.micro_batch_tokens
            )
    metrics |= step_metrics("prm", steps, "prime.learning_rate or algorithm.beta")
    if ranking is not None:
        metrics["prm/ranking_accuracy"] = ranking
    return log_probs, metrics
