"""Estimators of other papers that read the policy's own log-ratios, otherwise than SPRO does: a
penalty on the future (PRL), a belief about success (OPPO).
"""

import torch

from baselines.prime import to_go
from spro import (
    Batch,
    at_least_fp32,
    by_group,
    cumulative_process_reward,
    estimator,
    grpo_advantage,
    masked_step_advantage,
    process_reward,
)


@estimator("reference", "steps")
def prl_advantage(batch, algo):
    """PRL (arXiv 2601.10201): the outcome minus the process rewards still to come,

        A_t = outcome - sum_{s >= e(t)} beta * log(pi / pi_ref),   e(t) the last token of t's step.

    SPRO's identity with the other sign and in the other direction: a KL penalty, where SPRO's term
    is a bonus. beta is the paper's 1 / eta: eta 100 with steps of 64 tokens, 200 with 256. With
    steps of one token the gradient is that of the KL of whole responses (FRPO, the paper's second
    version); in longer ones a token is spared the log-ratios up to its step's end.
    """
    process_rewards = process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta)
    future = to_go(torch.where(batch.mask, process_rewards, 0.0))
    return grpo_advantage(batch, algo) - future.gather(1, step_ends(batch))


def step_ends(batch: Batch) -> torch.Tensor:
    """The position of the last token of each token's step. int64 [B, T]; 0 where masked."""
    ids = torch.where(batch.mask, batch.step_ids, 0)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    positions = torch.where(batch.mask, positions, 0)
    last = torch.zeros_like(ids).scatter_reduce(1, ids, positions, "amax")
    return torch.where(batch.mask, last.gather(1, ids), 0)


@estimator("answer")
def oppo_advantage(batch, algo):
    """After OPPO (arXiv 2605.21851), with the policy as its own oracle: the outcome plus beta times
    what a token adds to the policy's belief in success, compared among the siblings alive at t.

        V_t = sigmoid(log-odds of the prior + sum_{j<=t} log(pi(y_j | answer, ..) / pi(y_j | ..)))
        A_t = outcome + beta * MSA of (V_t - V_{t-1}),   V_{-1} the prior

    The paper's are V and its difference. What is ours: the sum with GRPO's outcome, weighted by
    beta, the comparison with siblings, and the prior, see `prior_log_odds`. Of two parts of its
    recipe, direction anchoring and evidence clipping, we know the names alone: they are not here.
    """
    evidence = answer_evidence(batch)
    prior = prior_log_odds(batch)[:, None]
    beliefs = torch.cat([prior, prior + evidence], 1).sigmoid()
    gains = masked_step_advantage(beliefs.diff(dim=1), batch.mask, batch.group_size)
    return grpo_advantage(batch, algo) + algo.beta * gains


def answer_evidence(batch: Batch) -> torch.Tensor:
    """sum_{j<=t} log(pi(y_j | x, answer, y_<j) / pi(y_j | x, y_<j)), nats; 0 where masked. [B, T].

    By Bayes' rule the log of P(answer | x, y_<=t) / P(answer | x), if the policy behind the answer
    is its own conditional distribution. Added to log-odds, as the paper does, it takes the policy
    itself for the distribution of wrong responses, which it is where success is rare.
    """
    log_ratio = process_reward(batch.answer_log_probs, batch.policy_log_probs, beta=1.0)
    return cumulative_process_reward(log_ratio, batch.mask)


def prior_log_odds(batch: Batch) -> torch.Tensor:
    """Of success at the prompt: (right + 1) / (G + 2) of the group's G, Laplace's rule, so that no
    group is certain; rewards count as chances, in [0, 1]. [B] -> [B].
    """
    rewards = by_group(at_least_fp32(batch.rewards), batch.group_size).clamp(0, 1)
    chance = (rewards.sum(1) + 1) / (batch.group_size + 2)
    return chance.logit().repeat_interleave(batch.group_size)
