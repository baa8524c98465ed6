"""IPVRM's prefix loss (arXiv 2604.13197) in PRIME's loop: a process reward model that is taught at
every prefix of a response, not by the whole response alone.

PRIME's loss binds the sum over a response; what single tokens of it are worth is left open. Here
the mean over each prefix,

    v_t = (1 / t) sum_{j<=t} beta * (log pi_prm - log pi_ref),

is to tell the verdict, with a margin. In the advantage stand, as in the released code, the
differences of the sum t * v_t, which are the tokens' own process rewards.

Not here: the paper's weights and boundary by a prompt's difficulty, and its updates on tokens that
were not sampled (DistRL).
"""

import torch
import torch.nn.functional as F

from baselines.prime import PartialLoss, process_rewards_and_means, to_go
from model import Policy
from spro import Batch, by_group, estimator, grpo_advantage

# Published: beta 10, which is algorithm.beta, and these two
MARGIN = 0.5  # times beta, so 5: how far v_t is to lie on its verdict's side, in nats
GAE_WEIGHT = 0.05  # of the step term beside the outcome's 1


def prefix_loss(prm: Policy, config, batch: Batch, verdicts: torch.Tensor) -> PartialLoss:
    """The loss on a mini-batch: at every prefix, with the margin m and the verdict r,

        r * softplus(m - v_t) + (1 - r) * softplus(m + v_t),

    a mean over each response's prefixes and then over the responses.

    Knowing nothing, v = 0, it is softplus(m): 5.007 nats at beta 10.
    """
    margin = MARGIN * config.algorithm.beta

    def part(process_rewards, mask, rows):
        v = prefix_means(process_rewards, mask)
        right = verdicts[rows].to(v)[:, None]
        nats = right * F.softplus(margin - v) + (1 - right) * F.softplus(margin + v)
        per_response = torch.where(mask, nats, 0.0).sum(1) / mask.sum(1).clamp(min=1)
        return per_response.sum() / len(batch)

    return part


def prefix_means(process_rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """v_t, the mean of the process rewards up to each token. [B, T] -> [B, T]."""
    return process_rewards.cumsum(1) / mask.cumsum(1).clamp(min=1)


@estimator("reference", "prm")
def prime_prefix_advantage(batch, algo):
    """The outcome plus GAE_WEIGHT times the GAE of the prefix values' differences, after IPVRM
    (arXiv 2604.13197). beta acts on the PRM's loss alone.

        V_t = t * v_t,   d_t = (V_t - V_{t-1} - mean of the differences) / (std of the values + eps)
        A_t = outcome + GAE_WEIGHT * sum_{s>=t} d_s,   which is the GAE at gamma = lambda = 1

    Mean and std (ddof 1) are over all tokens of the group, as the outcome's are; the released code
    takes a mini-batch's, leaves out the last token, and whitens the sums once more.
    """
    differences, _ = process_rewards_and_means(batch, 1.0)
    mean, _ = group_moments(differences, batch.mask, batch.group_size)
    _, std = group_moments(differences.cumsum(1), batch.mask, batch.group_size)
    normalised = torch.where(batch.mask, (differences - mean) / (std + 1e-6), 0.0)
    return grpo_advantage(batch, algo) + GAE_WEIGHT * to_go(normalised)


def group_moments(x: torch.Tensor, mask: torch.Tensor, group_size: int) -> tuple:
    """Mean and unbiased std over all tokens of each group. [B, T] -> two of [B, 1]."""
    grouped, alive = by_group(x, group_size), by_group(mask, group_size)
    tokens = alive.sum((1, 2))
    mean = torch.where(alive, grouped, 0.0).sum((1, 2)) / tokens.clamp(min=1)
    squares = torch.where(alive, grouped - mean[:, None, None], 0.0).square().sum((1, 2))
    std = (squares / (tokens - 1).clamp(min=1)).sqrt()
    return tuple(y.repeat_interleave(group_size)[:, None] for y in (mean, std))
