"""Supervised learning on demonstrations: the model that RL starts from, and is to be better
than.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import model
import tasks
from data import prompt_index
from infra.config import Block, knob
from infra.errors import EXIT_STOPPED, RunStopped, enough_memory
from infra.metrics import StepSums, check_refused
from infra.processes import print0, rank, restart_watchdog, stop_requested, world_size
from infra.rng import Draw, rng_for
from infra.run_folder import append_line, fresh_folder
from infra.sharding import clip_gradients, shard
from model import (
    Policy,
    learning_rate,
    make_optimizer,
    micro_batches,
    set_learning_rate,
    token_log_probs,
)
from spro import Batch, token_weights

BATCH = 32  # demonstrations per step
LEARNING_RATE = 4e-3


@dataclass
class WarmStartConfig(Block):
    """The keys train.warm_start_*."""

    warm_start_clean_steps: int = knob(
        1000, "from scratch: supervised steps on right, concise solutions", least=0, warm_start=True
    )
    warm_start_noisy_steps: int = knob(
        250, "then on the noisy demonstrator's, at half the rate", least=0, warm_start=True
    )


def supervised_step(policy: Policy, optimizer, batch: Batch, settings) -> dict[str, float]:
    """One step of cross-entropy on demonstrations, a mean over their tokens -> its metrics, {}
    where it was refused.

    settings: the config's block `train`.
    """
    weights = token_weights(batch.mask, len(batch), int(batch.mask.sum()), "token-mean")
    sums = StepSums()
    for _, micro in micro_batches(
        policy, replace(batch, weights=weights), settings.micro_batch_tokens
    ):
        log_probs = token_log_probs(policy, micro, temperature=1.0).log_probs
        loss = -(micro.weights.to(log_probs) * log_probs).sum()
        (loss * world_size()).backward()  # FSDP averages over ranks, but ours are parts of one sum
        sums.add(loss)
    grad_norm = clip_gradients(policy, settings.max_grad_norm)
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums.over_ranks() | {"grad_norm": grad_norm} if math.isfinite(grad_norm) else {}


@enough_memory("warm_start")
def warm_start(config, policy: Policy, train_set, folder: Path) -> None:
    """Teach a new model the task from demonstrations: right and concise ones first, then the noisy
    demonstrator's.

    The two stages matter: on noisy traces alone a small model learns the format but not, reliably,
    the arithmetic. Writes metrics.jsonl and model/ to `folder`; another run can start from there
    with model.path=FOLDER/model.
    """
    fresh_folder(folder)
    t = config.train
    problems, prompts = train_set
    optimizer = make_optimizer(policy, t)
    demonstrate = tasks.demonstrator(config.data)
    state = {"refused_in_a_row": 0}
    position = 0
    clean, noisy = t.warm_start_clean_steps, t.warm_start_noisy_steps
    print0(f"warm start: {clean} supervised steps on right solutions, {noisy} noisy")
    for stage, steps, scale in (("clean", clean, 1.0), ("noisy", noisy, 0.5)):
        bar = tqdm(
            range(1, steps + 1), desc=f"warm start, {stage}", disable=True if rank() else None
        )
        for step in bar:
            restart_watchdog(t.timeout_minutes)
            positions = range(position, position + BATCH)
            position += BATCH
            chosen = [prompt_index(p, len(problems), config.seed) for p in positions]
            noise = [
                rng_for(config.seed, Draw.DEMONSTRATE, p) if stage == "noisy" else None
                for p in positions
            ]
            texts = [
                demonstrate(problems[i].prompt, source)
                for i, source in zip(chosen, noise, strict=True)
            ]
            batch = Batch.from_texts([prompts[i] for i in chosen], texts, policy.tokenizer)
            lr = scale * learning_rate(step, steps, LEARNING_RATE, min(50, steps // 5), "cosine")
            set_learning_rate(optimizer, lr)
            update = supervised_step(policy, optimizer, batch, t)
            check_refused(
                state,
                update,
                f"step {step} of the warm start: model.scratch cannot be taught like this",
            )
            append_line(
                folder / "metrics.jsonl", {"stage": stage, "step": step, "lr": lr, **update}
            )
            bar.set_postfix(loss=f"{update.get('loss', math.nan):.3f}")
            if stop_requested():
                raise RunStopped(
                    "told to stop during the warm start, which resume=true begins again",
                    EXIT_STOPPED,
                )
    model.save(policy, folder / "model")


def start_path(config, folder: Path) -> str | Path:
    """The saved model that policy, reference and PRM start from."""
    return config.model.path or folder / "warm_start" / "model"


def start_models(config, folder: Path, device, policy: Policy, train_set):
    """(policy, reference or None, hash of the reference's weights), sharded, as RL starts from
    them.

    The reference comes from model.path or the finished warm start, never from weights that RL has
    touched.
    """
    start, attention = start_path(config, folder), config.model.attention
    must_warm_up = not config.model.path and not start.exists()
    if not config.model.path and not must_warm_up:
        print0("the warm start of this run is finished and kept")
        policy = model.load(start, attention)
    policy = shard(policy, config.model, device)
    if must_warm_up:
        warm_start(config, policy, train_set, folder / "warm_start")
    if not config.needs_reference:
        return policy, None, None
    reference = model.freeze(model.load(start, attention))
    start_hash = model.weights_hash(reference)
    return (
        policy,
        shard(reference, config.model, device, config.model.offload_reference),
        start_hash,
    )
