"""What perfect credit is worth: estimators that are told which step of a response went wrong, and
their controls.

Where a task verifies its steps (tasks.TRACES) the truth is known. An estimator of credit can gain
at most what the oracle gains on its controls, which blame as little but know nothing.
"""

import torch
import torch.nn.functional as F

from spro import (
    Batch,
    at_least_fp32,
    by_group,
    estimator,
    grpo_advantage,
    outcome_advantage,
)


@estimator("trace", additive=False)
def oracle_advantage(batch, algo):
    """GRPO whose blame falls on the first wrong step alone.

    Right responses (r > 0.5) are as in GRPO, and so is a wrong one in which no wrong step is known.
    """
    return blaming(first_wrong_step(batch), batch, algo)


@estimator("trace", additive=False)
def step_oracle_advantage(batch, algo):
    """The oracle that praises too: what is right in a wrong response is learned as well.

    A right step has the advantage of its group's right responses, wherever it stands, the first
    wrong step that of the wrong ones, and what stands behind it none.
    """
    outcomes = by_group(grpo_advantage(batch, algo)[:, 0], batch.group_size)
    praise, blame = (
        outcome.repeat_interleave(batch.group_size)[:, None]
        for outcome in (outcomes.amax(1), outcomes.amin(1))
    )
    labels = batch.step_labels
    return torch.where(labels == 1, praise, torch.where(labels == 0, blame, 0.0))


@estimator("trace", "luck", additive=False)
def random_blame_advantage(batch, algo):
    """The oracle's control: as many tokens, side by side, are blamed at a random place.

    `luck` [B] in [0, 1) chooses it, each place of the response with the same chance.
    """
    tokens = first_wrong_step(batch).sum(1)
    places = batch.mask.sum(1) - tokens + 1
    first = (batch.luck.double() * places).long()[:, None]
    place = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return blaming((place >= first) & (place < first + tokens[:, None]), batch, algo)


@estimator()
def positives_advantage(batch, algo):
    """The oracle's other control: nothing is blamed, and wrong responses are silent."""
    advantages = grpo_advantage(batch, algo)
    return torch.where(is_blamed(batch, advantages), 0.0, advantages)


@estimator("trace")
def posterior_grpo_advantage(batch, algo):
    """Posterior-GRPO (arXiv 2508.05170): GRPO on `R = R_f + R_o + R_o x R_t`.

    R_t is the fraction of right steps, which counts where the answer is right (R_o = 1, r > 0.5).
    The paper learns it from a reward model; here it is verified. R_f + R_o is the reward as it
    comes: a bonus for the format, R_f, is reward.bonus.
    """
    r = at_least_fp32(batch.rewards)
    thinking = right_fraction(batch).to(r)
    return outcome_advantage(r + torch.where(r > 0.5, thinking, 0.0), batch.group_size)[:, None]


def first_wrong_step(batch: Batch) -> torch.Tensor:
    """The tokens of each response's first wrong step. bool [B, T]."""
    return batch.mask & (batch.step_labels == 0)


def right_fraction(batch: Batch) -> torch.Tensor:
    """Right steps over all steps of each response, those behind a wrong one included. [B]."""
    ids = torch.where(batch.mask, batch.trace_ids, -1)
    begins = (ids >= 0) & (ids != F.pad(ids, (1, -1), value=-1))
    right = begins & (batch.step_labels == 1)
    return right.sum(1).double() / begins.sum(1).clamp(min=1)


def is_blamed(batch: Batch, advantages: torch.Tensor) -> torch.Tensor:
    """The tokens of wrong responses with a negative advantage. bool [B, T]."""
    return (batch.rewards[:, None] <= 0.5) & (advantages < 0)


def blaming(where: torch.Tensor, batch: Batch, algo) -> torch.Tensor:
    """GRPO whose wrong responses are blamed `where` (bool [B, T]) alone, if anywhere there.
    [B, T].
    """
    advantages = grpo_advantage(batch, algo)
    spared = is_blamed(batch, advantages) & where.any(1, keepdim=True) & ~where
    return torch.where(spared, 0.0, advantages)
