"""What a step says of itself: the metrics of its stages, the line on the console, and TensorBoard.

No key where a quantity was not computed. docs/metrics.md explains each.
"""

import time
from contextlib import contextmanager
from pathlib import Path

import torch

from infra.errors import enough_memory, optional
from infra.processes import rank


@contextmanager
def timed(seconds: dict[str, float], key: str):
    """Add the seconds that a stage takes to `seconds`; where it runs out of memory, say so by its name."""
    start = time.perf_counter()
    with enough_memory(key.removeprefix("time/")):
        yield
    seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start


def sampling_metrics(rollout, scores, rewards, kept: torch.Tensor, group_size: int) -> dict[str, float]:
    """Over all responses of a step. scores, rewards [B], NaN where there is no verdict; kept [B / G] bool."""
    groups, lengths, scored = scores.view(-1, group_size), rollout.mask.sum(1).double(), rewards[~rewards.isnan()]
    metrics = {
        "reward/faults": len(rewards) - len(scored),
        "groups/all_right": (groups == 1).all(1).double().mean().item(),
        "groups/all_wrong": (groups == 0).all(1).double().mean().item(),
        "groups/kept": kept.double().mean().item(),
        "response_length/mean": lengths.mean().item(),
        "response_length/max": int(lengths.max()),
        "response_length/truncated": rollout.truncated.double().mean().item(),
    }
    if len(scored) > 1:
        metrics |= {"reward/mean": scored.mean().item(), "reward/std": scored.std().item()}
    return metrics


def token_metrics(
    kept, log_probs, ref_log_probs, entropy, outcome, advantages, has_reference: bool
) -> dict[str, float]:
    """Means over the response tokens of the kept groups, all arguments [B, T]; nothing where no group was kept.

    outcome: None where the advantage is no sum of an outcome and a step term.
    """
    if not len(kept):
        return {}
    m = kept.mask
    metrics = {
        "entropy": entropy[m].mean().item(),
        "sampler_gap": (log_probs - kept.sampler_log_probs)[m].abs().max().item(),
    }
    if has_reference:
        metrics["kl/ref"] = (log_probs - ref_log_probs)[m].mean().item()
    if outcome is not None:
        metrics["advantage/outcome_abs"] = outcome[m].abs().mean().item()
    if outcome is not None and has_reference:
        metrics["advantage/step_abs"] = (advantages - outcome)[m].abs().mean().item()
    return metrics


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of one RL step, and how many steps were refused.

    Of ratio/max the max; of sampler_gap the first, the only one that scores with the weights that sampled.
    """
    taken = [update for update in updates if update]
    metrics = {key: sum(update[key] for update in taken) / len(taken) for key in (taken[0] if taken else ())}
    if taken:
        metrics["ratio/max"] = max(update["ratio/max"] for update in taken)
    if "sampler_gap" in metrics:
        metrics["sampler_gap"] = taken[0]["sampler_gap"]
    return metrics | {"updates/taken": len(taken), "updates/refused": len(updates) - len(taken)}


def progress_line(step: int, steps: int, m: dict[str, float]) -> str:
    """One aligned line of the metrics that tell whether a run is well."""
    cells = [f"step {step:>{len(str(steps))}}/{steps}"]
    for label, key, width, digits in (
        ("reward", "reward/mean", 5, 3),
        ("kept", "groups/kept", 4, 2),
        ("length", "response_length/mean", 6, 1),
        ("entropy", "entropy", 6, 4),
        ("kl/ref", "kl/ref", 7, 4),
        ("|step|", "advantage/step_abs", 6, 4),
        ("clip", "clip_fraction", 6, 4),
        ("grad", "grad_norm", 5, 2),
    ):
        cells.append(f"{label} {m[key]:{width}.{digits}f}" if key in m else f"{label} {'-':>{width}}")
    return "  ".join([*cells, f"{m['time/step']:.2f} s"])


def summary(config, folder: Path, state: dict, seconds: float) -> str:
    """The end of a run: what it began with, what it reached, and where to look."""
    first, last = state["before"], state["after"] or state["before"]
    lines = [f"\ndone in {seconds:.0f} s: {folder}"]
    for name, key, form in (
        (f"held-out accuracy, T={config.sample.temperature:g}", "eval/accuracy", ".3f"),
        ("held-out accuracy, greedy", "eval/accuracy_greedy", ".3f"),
        ("response length, tokens", "eval/response_length", ".1f"),
    ):
        lines.append(f"  {name:<26} {first[key]:{form}} -> {last[key]:{form}}")
    lines.append(f"  {'best accuracy':<26} {state['best']['eval/accuracy']:.3f} at step {state['best']['step']}")
    return "\n".join([*lines, f"the model is in {folder / 'model'}; look at what it writes: python sample.py {folder}"])


def tensorboard(folder: Path, step: int, wanted: bool):
    """A function that writes a row of metrics as scalars to folder/tensorboard, on rank 0 and if wanted.

    What an earlier attempt wrote after `step` is hidden. Raises BadInput, on every rank, if the package is missing.
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
