"""What an estimator's step term does to the policy, measured beside its outcome term."""

import math
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from infra.errors import enough_memory
from infra.processes import all_reduce
from model import Policy, micro_batches, token_log_probs
from spro import Batch, token_weights


@enough_memory("update")
def compare_gradients(
    policy: Policy, config, batch: Batch, outcome: torch.Tensor
) -> dict[str, float]:
    """How the two halves of Eq. 13 push: cosine of their gradients, and the ratio of their norms,
    |step| / |outcome|.

    outcome [B, T] is one half, batch.advantages without it the other. Gradients of the surrogate at
    ratio 1 with the update's weights, over the whole batch; {} where one of them is 0 or not
    finite. Changes nothing; a second gradient is held meanwhile.
    """
    step_term = batch.advantages - outcome
    if not (outcome.any() and step_term.any()):
        return {}
    a = gradient_of(policy, config, batch, outcome)
    b = gradient_of(policy, config, batch, step_term)
    # Each rank adds up its shards. Replicas count alike in all three sums, and so does FSDP's
    # averaging: both cancel.
    aa, bb, ab = all_reduce(torch.stack([dot(a, a), dot(b, b), dot(a, b)]).cpu()).tolist()
    if not 0 < aa * bb < math.inf:
        return {}
    return {"gradient/cosine": ab / math.sqrt(aa * bb), "gradient/norm_ratio": math.sqrt(bb / aa)}


def gradient_of(
    policy: Policy, config, batch: Batch, advantages: torch.Tensor
) -> list[torch.Tensor]:
    """This rank's shard of the gradient of `-sum(weights x advantages x log-probs)`, parameter
    by parameter.
    """
    max_tokens = config.sample.max_new_tokens
    weights = token_weights(
        batch.mask, len(batch), int(batch.mask.sum()), config.algorithm.loss_weights, max_tokens
    )
    weighted = replace(batch, weights=weights * advantages)
    for _, part in micro_batches(policy, weighted, config.train.micro_batch_tokens):
        log_probs = token_log_probs(policy, part, config.sample.temperature).log_probs
        weight = part.weights.to(log_probs)
        loss = -(weight * torch.where(weight != 0, log_probs, 0.0)).sum()
        loss.backward()
    whole = [p.grad for p in policy.parameters() if p.grad is not None]
    policy.zero_grad(set_to_none=True)
    return [g.to_local() if isinstance(g, DTensor) else g for g in whole]


def dot(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    return sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
