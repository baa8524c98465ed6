"""Estimators that read rewards alone, like GRPO: no reference is loaded for them."""

import torch

from spro import at_least_fp32, by_group, centred_rewards, estimator, outcome_advantage

RANK_PENALTY = 0.25  # beta_rank of the unlikeliness reward, as its authors' code has it


@estimator()
def dr_grpo_advantage(batch, algo):
    """Dr. GRPO (arXiv 2503.20783): `r - mean`, no std. Its loss is
    loss_weights=seq-mean-token-sum-norm.
    """
    return centred_rewards(batch.rewards, batch.group_size).flatten()[:, None]


@estimator()
def rloo_advantage(batch, algo):
    """RLOO (arXiv 2402.14740): r minus the mean of the *other* siblings, which is `(r - mean) x
    G / (G - 1)`.
    """
    G = batch.group_size
    return dr_grpo_advantage(batch, algo) * (G / (G - 1))


@estimator()
def raft_advantage(batch, algo):
    """RAFT++ (arXiv 2504.11343): `max(r, 0)`, right answers alone, no baseline; ratio and clip
    as everywhere here.
    """
    return at_least_fp32(batch.rewards).clamp(min=0)[:, None]


@estimator()
def reinforce_rej_advantage(batch, algo):
    """Reinforce-Rej (arXiv 2504.11343): the reward itself, groups of equal rewards rejected.

    `2 r - 1`, so that wrong answers push: with 0/1 rewards the raw r would be RAFT++ on fewer
    groups.
    """
    mixed = (
        centred_rewards(batch.rewards, batch.group_size).any(1).repeat_interleave(batch.group_size)
    )
    signed = 2 * at_least_fp32(batch.rewards) - 1
    return torch.where(mixed, signed, 0.0)[:, None]


@estimator()
def unlikeliness_advantage(batch, algo):
    """The unlikeliness reward (arXiv 2506.02355): GRPO on `r x (1 - RANK_PENALTY x rank / G)`.

    rank 0 .. G - 1 orders siblings by the mean log-prob of their tokens, the likeliest last: of the
    right answers the one that the policy finds likeliest earns least, so that rare ones are not
    unlearned.
    """
    total = torch.where(batch.mask, at_least_fp32(batch.log_probs), 0.0).sum(1)
    likelihood = by_group(total / batch.mask.sum(1).clamp(min=1), batch.group_size)
    rank = likelihood.argsort(stable=True).argsort().flatten()
    r = at_least_fp32(batch.rewards)
    return outcome_advantage(r - r * rank * (RANK_PENALTY / batch.group_size), batch.group_size)[
        :, None
    ]
