"""Estimators that read rewards alone, like GRPO: no reference is loaded for them."""

import torch

from spro import (
    at_least_fp32,
    by_group,
    centred_rewards,
    estimator,
    grpo_advantage,
    outcome_advantage,
)

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


@estimator()
def lambda_grpo_advantage(batch, algo):
    """lambda-GRPO (arXiv 2509.21154, as its released code counts): GRPO's advantage over the number
    of siblings that share the token and all before it, the response itself included.

    The paper divides the token's loss. The surrogate, min(ratio x A, clip(ratio) x A), of A / n is
    1 / n of that of A, so this is the same; and here a token's weight could not know siblings that
    stand in other mini-batches. A KL term in the loss (kl_coef) keeps its weight; there it does
    not.
    """
    return grpo_advantage(batch, algo) / sharing_siblings(batch)


def sharing_siblings(batch) -> torch.Tensor:
    """How many siblings have the same response up to and with each token, itself included. int64
    [B, T]; at least 1. ValueError without `tokens`.
    """
    if batch.tokens is None:
        raise ValueError("lambda_grpo_advantage needs tokens in its batch")
    responses = by_group(batch.tokens[:, batch.prompt_length :], batch.group_size)
    alive = by_group(batch.mask, batch.group_size)
    counts = torch.zeros_like(responses)
    for k in range(batch.group_size):  # one sibling at a time: [B, T] of memory
        same = (responses == responses[:, k : k + 1]) & alive & alive[:, k : k + 1]
        counts += same.cumprod(2)
    return counts.clamp(min=1).flatten(0, 1)
