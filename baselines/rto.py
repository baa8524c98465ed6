"""RTO (arXiv 2404.18922) as an online method: the DPO model that gives it its token rewards learns
beside the policy, in PRIME's loop.

The paper trains that model beforehand, on given pairs of responses, and has a reward model and a
critic besides. Here pairs are siblings with different verdicts, verdicts take the reward model's
place, and the group the critic's. The paper's second token reward, minus a KL term to the
reference, is `algorithm.kl_coef`.
"""

import torch
import torch.nn.functional as F

from baselines.prime import PartialLoss, process_rewards_and_means, to_go
from model import Policy, batch_log_probs
from spro import Batch, by_group, estimator, grpo_advantage, process_reward

LARGEST_REWARD = 0.05  # of a token, either way: the released code's


@estimator("reference", "prm")
def rto_advantage(batch, algo):
    """The outcome plus the token rewards to go:

        A_t = outcome + sum_{s>=t} clip(beta * log(pi_dpo / pi_ref), -0.05, 0.05)

    beta is the paper's beta_1, 0.05, and DPO's own, which the paper sets apart.
    """
    process_rewards, _ = process_rewards_and_means(batch, algo.beta)
    token_rewards = process_rewards.clamp(-LARGEST_REWARD, LARGEST_REWARD)
    return grpo_advantage(batch, algo) + to_go(token_rewards)


def dpo_loss(sums: torch.Tensor, verdicts: torch.Tensor, group_size: int) -> torch.Tensor:
    """DPO's loss, -log sigmoid(sum of the better's process rewards - sum of the worse's), in nats:
    a mean over all pairs of siblings with different verdicts, 0 without any. sums, verdicts [B].
    """
    sums, verdicts = (by_group(x, group_size)[:, :, None] for x in (sums, verdicts))
    better = verdicts > verdicts.mT
    losses = torch.where(better, F.softplus(sums.mT - sums), 0.0)
    return losses.sum() / better.sum().clamp(min=1)


def pairwise_loss(prm: Policy, config, batch: Batch, verdicts: torch.Tensor) -> PartialLoss:
    """`dpo_loss` on a mini-batch of whole groups.

    A pair's rows may stand in different micro-batches, or on different ranks. So all sums are first
    computed without gradients, a forward pass more, and with them the loss and its slope in every
    sum: a row's part then has the slope as its gradient, whatever rows are beside it.
    """
    how = (config.sample.temperature, config.train.micro_batch_tokens)
    log_probs, _ = batch_log_probs(prm, batch, *how)
    process_rewards = process_reward(log_probs, batch.ref_log_probs, config.algorithm.beta)
    sums = torch.where(batch.mask, process_rewards, 0.0).sum(1).requires_grad_()
    loss = dpo_loss(sums, verdicts, batch.group_size)
    (slopes,) = torch.autograd.grad(loss, sums)
    share = loss.item() / len(batch)  # of the loss's value: which row has it does not matter

    def part(process_rewards, mask, rows):
        own = process_rewards.sum(1)
        return (slopes[rows].to(own) * (own - own.detach())).sum() + share * len(rows)

    return part


def whole_groups(mini_batches: list[torch.Tensor], group_size: int) -> list[torch.Tensor]:
    """The same rows in about as equal lists, as many at most, none of which cuts a group: a
    mini-batch may, and a pair must not be.
    """
    if not mini_batches:
        return []
    groups = torch.cat(mini_batches).view(-1, group_size)
    return [part.flatten() for part in groups.tensor_split(len(mini_batches)) if len(part)]
