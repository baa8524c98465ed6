"""What the reference says of a step's responses, and the policy beside it: the process reward's two
halves.
"""

from dataclasses import replace

import torch

import baselines
import model
from baselines import a_star
from model import Policy
from spro import Batch, kl_estimate


def finer_type(config, policy: Policy) -> str | None:
    """In what the process reward's log-probs are scored, where that is finer than the rest of the
    run: "tf32" or "float32"; else None. See docs/precision.md.

    PRIME's are those of its PRM's own training pass, in `model.dtype` as published.
    """
    finer = config.algorithm.process_dtype
    if policy.dtype == torch.float32 or finer == "bfloat16":
        return None
    if a_star.is_chosen(config):  # compared with the update's own pass, in that pass's type
        return None
    is_of_policy = config.needs_reference and config.reads_reference and not config.learns_beside
    reads_answer = baselines.needs(config.algorithm.advantage, "answer")
    return finer if is_of_policy or reads_answer else None


def scored(policy: Policy, reference: Policy | None, batch: Batch, config) -> Batch:
    """The batch with the reference's log-probs, if there is one, and with the policy's in the same
    type where `log_probs` are in a coarser one: their difference would be rounding.
    """
    if reference is None:
        return batch
    finer = finer_type(config, policy)
    how = (batch, config.sample.temperature, config.train.micro_batch_tokens, finer)
    fine_log_probs = model.batch_log_probs(policy, *how)[0] if finer else None
    ref_log_probs = model.batch_log_probs(reference, *how)[0]
    return replace(batch, ref_log_probs=ref_log_probs, fine_log_probs=fine_log_probs)


def kl_term(new: model.TokenLogProbs, micro: Batch, estimator: str) -> torch.Tensor:
    """KL(policy || reference) of a micro-batch, weighted like the surrogate."""
    kl = new.kl
    if estimator != "exact":
        kl = kl_estimate(new.log_probs, micro.ref_log_probs, micro.weights != 0, estimator)
    return (micro.weights.to(kl.dtype) * kl).sum()
