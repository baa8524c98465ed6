"""SPRO with one thing changed: the mean, the sum, the grouping, the step, or which responses
have a step term.
"""

import torch
import torch.nn.functional as F

from spro import (
    by_group,
    cumulative_process_reward,
    estimator,
    grpo_advantage,
    masked_step_advantage,
    process_reward,
)


def step_cpr(batch, algo) -> torch.Tensor:
    """Cumulative process reward of each token, Eq. 11. [B, T]."""
    process_rewards = process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta)
    return cumulative_process_reward(process_rewards, batch.mask)


@estimator("reference")
def msa_only_advantage(batch, algo):
    """The step term without the outcome: Eq. 12 alone, which never sees a reward."""
    return masked_step_advantage(step_cpr(batch, algo), batch.mask, batch.group_size)


@estimator("reference")
def spro_loo_advantage(batch, algo):
    """SPRO with the mean over the *other* living siblings: MSA x n / (n - 1), n alive; 0 for one
    that lives alone.
    """
    alive = by_group(batch.mask, batch.group_size).sum(1).repeat_interleave(batch.group_size, 0)
    msa = msa_only_advantage(batch, algo)
    return grpo_advantage(batch, algo) + msa * alive / (alive - 1).clamp(min=1)


@estimator("reference")
def spro_local_advantage(batch, algo):
    """SPRO without the sum of Eq. 11: MSA of the current token's process reward alone."""
    process_rewards = process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta)
    return grpo_advantage(batch, algo) + masked_step_advantage(
        process_rewards, batch.mask, batch.group_size
    )


@estimator("reference")
def spro_history_advantage(batch, algo):
    """What spro_local leaves out: MSA of the sum over the *earlier* tokens, j < t, a baseline in
    expectation.
    """
    earlier = F.pad(step_cpr(batch, algo), (1, -1))
    return grpo_advantage(batch, algo) + masked_step_advantage(
        earlier, batch.mask, batch.group_size
    )


@estimator("reference")
def spro_pooled_advantage(batch, algo):
    """SPRO with PRIME's grouping (arXiv 2502.01456): the CPR minus its mean over all steps of
    all siblings.
    """
    cpr = step_cpr(batch, algo)
    tokens = by_group(batch.mask, batch.group_size).sum((1, 2)).clamp(min=1)
    mean = by_group(cpr, batch.group_size).sum((1, 2)) / tokens
    return grpo_advantage(batch, algo) + (cpr - mean.repeat_interleave(batch.group_size)[:, None])


@estimator("reference", "steps")
def spro_line_advantage(batch, algo):
    """SPRO with a line as the step, or so many tokens: log-ratios are summed per step, and every
    token gets its step's MSA.

    `step_ids` [B, T] numbers each response's steps from 0.
    """
    process_rewards = process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta)
    ids = torch.where(batch.mask, batch.step_ids, 0)
    line_rewards, line_mask = sums_by_line(process_rewards, batch.mask, ids)
    cpr = cumulative_process_reward(line_rewards, line_mask)
    line_msa = masked_step_advantage(cpr, line_mask, batch.group_size)
    return grpo_advantage(batch, algo) + line_msa.gather(1, ids)


@estimator("reference")
def spro_posterior_advantage(batch, algo):
    """SPRO with the step term of right answers (r > 0.5) alone, after Posterior-GRPO (arXiv
    2508.05170).

    The mean is still over all living siblings: right answers are compared with the wrong ones too.
    """
    right = batch.rewards[:, None] > 0.5
    return grpo_advantage(batch, algo) + torch.where(right, msa_only_advantage(batch, algo), 0.0)


def sums_by_line(process_rewards, mask, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rewards [B, T] and line numbers [B, T] -> each line's sum, and which lines there
    are. [B, lines].
    """
    shape = (len(mask), int(ids.max()) + 1 if ids.numel() else 1)
    rewards = torch.where(mask, process_rewards, 0.0)
    sums = rewards.new_zeros(shape).scatter_add(1, ids, rewards)
    tokens = torch.zeros(shape, dtype=torch.int, device=mask.device).scatter_add(1, ids, mask.int())
    return sums, tokens > 0
