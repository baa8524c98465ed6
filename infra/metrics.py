"""What a step says of itself: the metrics of its stages, and TensorBoard. docs/metrics.md explains
each key.

A quantity that was not computed has no key.
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from infra.errors import RunStopped, enough_memory, optional
from infra.memory import peak_gib
from infra.processes import all_reduce, rank
from infra.waiting import stage

MAX_REFUSED = 3  # optimizer steps with non-finite gradients, in a row, after which a run stops
# Statistics whose whole is the largest part; all others are sums
MAXIMA = (
    "ratio/max",
    "sampler_gap",
)


@contextmanager
def timed(seconds: dict[str, float], key: str):
    """Add the seconds that a stage takes to `seconds`; where it runs out of memory, say so by
    its name, and show that name on a terminal.
    """
    start, name = time.perf_counter(), key.removeprefix("time/")
    with enough_memory(name), stage(name):
        yield
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start


class StepSums:
    """The statistics of one optimizer step, added up over its micro-batches and ranks.

    Each is a weighted sum whose weights were fixed before the step, so adding is all there is to
    it. Weights need not sum to 1: statistics, but not the loss, are divided by their
    `total_weight`.
    """

    def __init__(self, total_weight: torch.Tensor | float = 1.0):
        self.total_weight = total_weight
        self.sums: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def add(self, loss: torch.Tensor, stats: dict[str, torch.Tensor] | None = None) -> None:
        """Those of one micro-batch."""
        self.sums["loss"] += loss.item()
        for key, value in (stats or {}).items():
            if key in MAXIMA:
                self.maxima[key] = max(self.maxima.get(key, 0.0), value.item())
            else:
                self.sums[key] += (value / self.total_weight).item()

    def over_ranks(self) -> dict[str, float]:
        """All ranks call it together."""
        whole = {}
        for values, op in ((self.sums, dist.ReduceOp.SUM), (self.maxima, dist.ReduceOp.MAX)):
            reduced = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64), op)
            whole |= dict(zip(values, reduced.tolist(), strict=True))
        return whole


def check_refused(state: dict, update: dict, where: str) -> None:
    """Count optimizer steps refused in a row; a run that can take none any more stops with a
    clear word.
    """
    state["refused_in_a_row"] = 0 if update else state["refused_in_a_row"] + 1
    if state["refused_in_a_row"] == MAX_REFUSED:
        raise RunStopped(
            f"{MAX_REFUSED} optimizer steps in a row had non-finite gradients, at {where}"
        )


def sampling_metrics(batch, scores: torch.Tensor, kept: torch.Tensor) -> dict[str, float]:
    """Over all responses of a step.

    scores: [B], the verdicts', NaN where there is none. kept: [B / G] bool, one per group.
    """
    groups = scores.view(-1, batch.group_size)
    lengths = batch.mask.sum(1).double()
    rewarded = batch.rewards[~batch.rewards.isnan()]
    metrics = {
        "reward/faults": len(batch) - len(rewarded),
        "groups/all_right": (groups == 1).all(1).double().mean().item(),
        "groups/all_wrong": (groups == 0).all(1).double().mean().item(),
        "groups/kept": kept.double().mean().item(),
        "response_length/mean": lengths.mean().item(),
        "response_length/max": int(lengths.max()),
        "response_length/truncated": batch.truncated.double().mean().item(),
    }
    if len(rewarded) > 1:
        metrics |= {"reward/mean": rewarded.mean().item(), "reward/std": rewarded.std().item()}
    return metrics


def token_metrics(batch, outcome: torch.Tensor | None) -> dict[str, float]:
    """Means over the response tokens of the groups that are learned from; nothing where there are
    none.

    outcome [B, T]: the outcome term of the advantage; None where it is no sum of an outcome and a
    step term.
    """
    if not len(batch):
        return {}
    live = batch.mask
    metrics = {
        "entropy": batch.entropy[live].mean().item(),
        "sampler_gap": (batch.log_probs - batch.sampler_log_probs)[live].abs().max().item(),
    }
    if batch.ref_log_probs is not None:
        metrics["kl/ref"] = (batch.policy_log_probs - batch.ref_log_probs)[live].mean().item()
    if outcome is not None:
        metrics["advantage/outcome_abs"] = outcome[live].abs().mean().item()
    of_a_step = (batch.ref_log_probs, batch.answer_log_probs, batch.values_before)
    has_step_term = any(x is not None for x in of_a_step)
    if outcome is not None and has_step_term:
        metrics["advantage/step_abs"] = (batch.advantages - outcome)[live].abs().mean().item()
    return metrics


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of one RL step, and how many steps were refused.

    Of ratio/max the max; of sampler_gap the first, the only one that compares with the weights that
    sampled.
    """
    taken = [update for update in updates if update]
    metrics = {
        key: sum(update[key] for update in taken) / len(taken)
        for key in (taken[0] if taken else ())
    }
    if taken:
        metrics["ratio/max"] = max(update["ratio/max"] for update in taken)
    if "sampler_gap" in metrics:
        metrics["sampler_gap"] = taken[0]["sampler_gap"]
    return metrics | {"updates/taken": len(taken), "updates/refused": len(updates) - len(taken)}


def largest_gap(log_probs: torch.Tensor, micro) -> torch.Tensor:
    """Between the log-probs that a Batch holds and the model's own, where it has tokens."""
    gaps = (log_probs.detach() - micro.log_probs).abs()
    return torch.where(micro.mask, gaps, 0.0).max()


def cost_metrics(batch, seconds: dict[str, float]) -> dict[str, float]:
    """What a step took: seconds by stage, tokens per second of the whole step, memory."""
    return {
        **seconds,
        "time/verdict_max": max(verdict.seconds for verdict in batch.verdicts),
        "tokens_per_second": int(batch.mask.sum()) / seconds["time/step"],
        "memory/peak_gib": peak_gib(),
    }


def tensorboard(folder: Path, step: int, wanted: bool):
    """A function that writes a row of metrics as scalars to folder/tensorboard, on rank 0 and if
    wanted.

    What an earlier attempt wrote after `step` is hidden. Raises BadInput, on every rank, if the
    package is missing.
    """
    package = optional("torch.utils.tensorboard", "tensorboard") if wanted else None
    if not package or rank():
        return lambda row: None
    board = package.SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(row: dict[str, float]) -> None:
        for key, value in row.items():
            board.add_scalar(key, value, row["step"])
        board.flush()

    return write
