"""A second model that learns beside the policy, one optimizer step on each mini-batch of an RL
step's responses: PRIME's PRM, PPO's critic.

It starts where policy and reference start. It is sharded, and kept in checkpoints, as the policy
is.
"""

import math
from collections.abc import Callable

import torch

from infra.errors import RunStopped
from infra.metrics import StepSums
from infra.processes import all_reduce, world_size
from infra.sharding import clip_gradients, is_split, shard
from model import Policy, load, make_optimizer, micro_batches
from spro import Batch

# A pass over n rows of a mini-batch, from the rows and the Batch of them (a filler of one row where
# n is 0) -> what the model says of their tokens, [n, T] or more rows; their part of the loss.
Pass = Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]


def load_beside(
    path, config, device: torch.device, lr: float, made_of: Callable[[Policy], Policy] = lambda x: x
) -> tuple[Policy, torch.optim.Optimizer]:
    """(model, its optimizer), sharded, from the model that policy and reference start from.

    `made_of`: of the model that is loaded, the one that learns.
    """
    model = made_of(load(path, config.model.attention, in_shares=is_split()))
    model = shard(model, config.model, device)
    return model, make_optimizer(model, config.train, lr)


def one_pass(
    model: Policy,
    optimizer,
    config,
    batch: Batch,
    mini_batches: list[torch.Tensor],
    pass_on: Callable[[torch.Tensor, Batch], Pass],
    max_grad_norm: float,
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """A step on each mini-batch. `mini_batches` are lists of rows, together all rows once;
    `pass_on`: the rows of one and their Batch -> the Pass over parts of it.

    -> what the model said of each token before the step on it, [B, T], and each step's metrics.
    """
    said, steps = torch.zeros(batch.mask.shape), []
    for rows in mini_batches:
        mini = batch.select(rows)
        said[rows], step = step_on(
            model, optimizer, config, mini, pass_on(rows, mini), max_grad_norm
        )
        steps.append(step)
    return said, steps


def step_on(
    model: Policy, optimizer, config, batch: Batch, run_pass: Pass, max_grad_norm: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """One optimizer step on a mini-batch.

    -> what the model said of each token before it, [B, T], and its metrics, {} where the step was
    refused.
    """
    said = torch.zeros(batch.mask.shape)
    sums = StepSums()
    for rows, part in micro_batches(model, batch, config.train.micro_batch_tokens):
        values, loss = run_pass(rows, part)
        said[rows, : values.shape[1]] = values.detach()[: len(rows)].cpu().float()
        # FSDP averages gradients over ranks, but ours are parts of one sum
        (loss * world_size()).backward()
        sums.add(loss)
    grad_norm = clip_gradients(model, max_grad_norm)
    taken = math.isfinite(grad_norm)
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics = sums.over_ranks() | {"grad_norm": grad_norm} if taken else {}
    return all_reduce(said), metrics  # a row is one rank's: the sum is exact


def step_metrics(name: str, steps: list[dict[str, float]], lower: str) -> dict[str, float]:
    """Of the steps of one RL step, under `name`/: how many were refused, and means over the others.

    Raises RunStopped where all were refused; `lower` says of what there should be less.
    """
    taken = [step for step in steps if step]
    if steps and not taken:
        raise RunStopped(
            f"all steps of the {name} in an RL step had non-finite gradients: lower {lower}"
        )
    metrics: dict[str, float] = {f"{name}/refused": len(steps) - len(taken)}
    for key in ("loss", "grad_norm") if taken else ():
        metrics[f"{name}/{key}"] = sum(step[key] for step in taken) / len(taken)
    return metrics
