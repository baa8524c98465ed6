"""Supervised learning on demonstrations: the model that RL starts from, and is to be better
than.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import model
import tasks
from data import prompt_index
from infra.config import Block, knob
from infra.errors import EXIT_STOPPED, BadInput, RunStopped, enough_memory
from infra.metrics import StepSums, check_refused
from infra.processes import print0, rank, restart_watchdog, stop_requested, world_size
from infra.rng import Draw, rng_for
from infra.run_folder import append_line, fresh_folder
from infra.sharding import clip_gradients, is_split, shard
from model import (
    Policy,
    learning_rate,
    make_optimizer,
    micro_batches,
    set_learning_rate,
    token_log_probs,
)
from spro import Batch, token_weights

LEARNING_RATE_FROM_SCRATCH = 4e-3
LEARNING_RATE_OF_LOADED = 1e-4


@dataclass
class WarmStartConfig(Block):
    """The keys train.warm_start and train.warm_start_*."""

    warm_start: str = knob(
        "scratch",
        "which models learn from solutions before RL: those from scratch, or always",
        choices=("scratch", "always"),
        warm_start=True,
    )
    warm_start_clean_steps: int = knob(
        1000, "of it: supervised steps on right solutions", least=0, warm_start=True
    )
    warm_start_noisy_steps: int = knob(
        250, "then on a noisy demonstrator's, at half the rate", least=0, warm_start=True
    )
    warm_start_batch_size: int = knob(32, "solutions per step of it", least=1, warm_start=True)
    warm_start_learning_rate: float = knob(
        0.0, "of it; 0: 4e-3 from scratch, 1e-4 for a loaded model", least=0, warm_start=True
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


def demonstrated(config, train_set, tokenizer) -> tuple[list, list]:
    """The problems of a train set that a warm start can learn from, and their prompts.

    All of a made task, whose demonstrator solves any; of a dataset those whose solution a response
    has room for. Raises BadInput where there is none, or no noisy demonstrator where one is wanted.
    """
    problems, prompts = train_set
    source = config.data.source
    if source in tasks.DEMONSTRATORS or not config.warms_up:
        return problems, prompts
    if config.train.warm_start_noisy_steps:
        raise BadInput(
            f"train.warm_start_noisy_steps={config.train.warm_start_noisy_steps}: set it to 0, for "
            f"data.source={source} has no noisy demonstrator "
            f"({', '.join(tasks.DEMONSTRATORS)} have)"
        )
    solved = [i for i, problem in enumerate(problems) if problem.solution]
    room = config.sample.max_new_tokens - 1  # one is the token that ends a response
    texts = [problems[i].solution for i in solved]
    lengths = map(len, tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    fitting = [i for i, length in zip(solved, lengths, strict=True) if length <= room]
    counts = (
        f"{len(fitting)} of {len(problems)} problems of data.source={source} have a solution of at "
        f"most sample.max_new_tokens={room + 1} tokens"
    )
    if not fitting:
        raise BadInput(f"train.warm_start={config.train.warm_start}: {counts}")
    print0(f"warm start: {counts}")
    return [problems[i] for i in fitting], [prompts[i] for i in fitting]


@enough_memory("warm_start")
def warm_start(config, policy: Policy, taught, folder: Path) -> None:
    """Teach a model the task from demonstrations: right and concise ones first, then the noisy
    demonstrator's.

    The two stages matter: on noisy traces alone a small model learns the format but not, reliably,
    the arithmetic. Writes metrics.jsonl and model/ to `folder`; another run can start from there
    with model.path=FOLDER/model. `taught`: what `demonstrated` gave.
    """
    t = config.train
    problems, prompts = taught
    fresh_folder(folder)
    optimizer = make_optimizer(policy, t)
    demonstrate = tasks.demonstrator(config.data)
    state = {"refused_in_a_row": 0}
    position = 0
    clean, noisy = t.warm_start_clean_steps, t.warm_start_noisy_steps
    usual = LEARNING_RATE_OF_LOADED if config.model.path else LEARNING_RATE_FROM_SCRATCH
    base = t.warm_start_learning_rate or usual
    print0(f"warm start: {clean} supervised steps on right solutions, {noisy} noisy")
    for stage, steps, scale in (("clean", clean, 1.0), ("noisy", noisy, 0.5)):
        bar = tqdm(
            range(1, steps + 1), desc=f"warm start, {stage}", disable=True if rank() else None
        )
        for step in bar:
            restart_watchdog(t.timeout_minutes)
            positions = range(position, position + t.warm_start_batch_size)
            position += t.warm_start_batch_size
            chosen = [prompt_index(p, len(problems), config.seed) for p in positions]
            noise = [
                rng_for(config.seed, Draw.DEMONSTRATE, p) if stage == "noisy" else None
                for p in positions
            ]
            texts = [
                demonstrate(problems[i], source) for i, source in zip(chosen, noise, strict=True)
            ]
            batch = Batch.from_texts([prompts[i] for i in chosen], texts, policy.tokenizer)
            lr = scale * learning_rate(step, steps, base, min(50, steps // 5), "cosine")
            set_learning_rate(optimizer, lr)
            update = supervised_step(policy, optimizer, batch, t)
            check_refused(
                state,
                update,
                f"step {step} of the warm start: lower train.warm_start_learning_rate",
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
    """The saved model that policy, reference, PRM and critic start from."""
    return folder / "warm_start" / "model" if config.warms_up else config.model.path


def start_models(config, folder: Path, device, policy: Policy, taught):
    """(policy, reference or None, hash of the reference's weights), sharded, as RL starts from
    them.

    The reference comes from the finished warm start, or without one from model.path, never from
    weights that RL has touched.
    """
    start = start_path(config, folder)
    load = partial(model.load, start, config.model.attention, in_shares=is_split())
    must_warm_up = config.warms_up and not start.exists()
    if config.warms_up and not must_warm_up:
        print0("the warm start of this run is finished and kept")
        policy = load()
    policy = shard(policy, config.model, device)
    if must_warm_up:
        warm_start(config, policy, taught, folder / "warm_start")
    if not config.needs_reference:
        return policy, None, None
    reference = model.freeze(load())
    start_hash = model.weights_hash(reference)
    return (
        policy,
        shard(reference, config.model, device, config.model.offload_reference),
        start_hash,
    )
