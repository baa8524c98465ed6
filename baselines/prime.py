"""PRIME (arXiv 2502.01456): a process reward model that learns online from verdicts alone, beside the policy.

The PRM is a third language model, started where policy and reference start. Its reward of a token is
`beta * (log pi_prm - log pi_ref)` (Eq. 3), so a model that is taught nothing but whole responses' verdicts,

    loss = cross-entropy of sigmoid(sum_t beta * (log pi_prm - log pi_ref)) against the verdict in [0, 1],

scores every token. Here is what learns; the advantages, `prime` and `prime_released`, are in spro.py. SPRO's process
reward is the policy's own log-ratio, summed over the past; PRIME trains a model for it, and sums over the future.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import model
from infra.errors import RunStopped
from infra.metrics import timed
from infra.processes import all_reduce
from sample import Rollout
from spro import process_reward

MAX_GRAD_NORM = 10.0  # of the PRM: the released training script's


@dataclass
class PrimeConfig:
    learning_rate: float = 1e-6  # of the PRM's own AdamW, constant; this is PRIME's for 7B, small models need far more
    update: str = "after"  # after: a mini-batch is scored before its PRM step (one pass); before: learn, then score all

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if self.update not in ("after", "before"):
            raise ValueError(f"update={self.update!r}: choose after or before")


def prm_losses(prm, config, rollout: Rollout, verdicts, ref_log_probs, seen: torch.Tensor) -> Iterator:
    """The (loss, stats) of each micro-batch of one PRM step: cross-entropy in nats, a mean over all its responses.

    verdicts [B] in [0, 1]. Leaves the log-probs that the PRM scored with in `seen` [B, T], for this rank's rows.
    """
    temperature, budget = config.sample.temperature, config.train.micro_batch_tokens
    for rows, log_probs, _ in model.scored_micro_batches(prm, rollout, temperature, budget):
        seen[rows, : log_probs.shape[1]] = log_probs.detach().cpu().float()
        mask, ref = (x[rows, : log_probs.shape[1]].to(log_probs.device) for x in (rollout.mask, ref_log_probs))
        score = torch.where(mask, process_reward(log_probs, ref, config.algorithm.beta), 0.0).sum(1)
        targets = verdicts[rows].to(score)
        yield F.binary_cross_entropy_with_logits(score, targets, reduction="sum") / len(rollout), {}


def ranking_accuracy(scores: torch.Tensor, verdicts: torch.Tensor, group_size: int) -> float | None:
    """Of all sibling pairs with different verdicts, the fraction where the better one scores higher; a tie is half.

    scores, verdicts [B]. None without any such pair.
    """
    scores, verdicts = (x.view(-1, group_size, 1) for x in (scores, verdicts))
    better, gap = verdicts > verdicts.mT, scores - scores.mT
    return (0.5 + 0.5 * gap.sign())[better].double().mean().item() if better.any() else None


def score_and_learn(
    prm, optimizer, optimizer_step, config, rollout: Rollout, verdicts, ref_log_probs, parts: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """PRM log-probs [B, T] of a step's responses, for the advantage, while the PRM takes a step on each of `parts`.

    `parts` are the rows of each mini-batch, together all rows once; `optimizer_step` is train.py's. Returns metrics
    too; the ranking accuracy is that of the scores before the respective step.
    """
    metrics, steps, log_probs = {}, [], torch.zeros(rollout.mask.shape)
    with timed(metrics, "time/prm"):
        for rows in parts:
            part, seen = rollout.at(rows), torch.zeros(len(rows), rollout.mask.shape[1])
            losses = prm_losses(prm, config, part, verdicts[rows], ref_log_probs[rows], seen)
            steps.append(optimizer_step(prm, optimizer, config.prime.learning_rate, MAX_GRAD_NORM, losses))
            log_probs[rows] = all_reduce(seen)  # each row was scored by one rank: exact, as a sum with zeros
        rewards = process_reward(log_probs, ref_log_probs, config.algorithm.beta)
        ranking = ranking_accuracy(torch.where(rollout.mask, rewards, 0.0).sum(1), verdicts, config.sample.group_size)
        if config.prime.update == "before":
            budget = config.train.micro_batch_tokens
            log_probs, _ = model.rollout_log_probs(prm, rollout, config.sample.temperature, budget)
    metrics["prm/refused"] = sum(not step for step in steps)
    if steps and not any(steps):
        raise RunStopped(
            "all PRM steps of an RL step had non-finite gradients: lower prime.learning_rate or algorithm.beta"
        )
    for name in ("loss", "grad_norm") if steps else ():
        metrics[f"prm/{name}"] = sum(step[name] for step in steps if step) / sum(map(bool, steps))
    return log_probs, metrics | ({} if ranking is None else {"prm/ranking_accuracy": ranking})
