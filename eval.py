"""What is measured: held-out accuracy (`evaluate`, training's stage 7, and a script) and each step's metrics.

python eval.py runs/quickstart                      # accuracy at the run's temperature and greedy, with intervals
python eval.py runs/quickstart --prompts 200 --seed 1
"""

import argparse
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch

from data import DataConfig, Draw, Problem, encode_prompts, load_problems, require_at_least
from model import memory_plan
from reward import grade
from run import BadInput, command_line, shared, world_size
from sample import Rollout, SampleConfig, context_left, generation_settings, open_run, sample
from spro import OUTCOME_ONLY


@dataclass
class EvalConfig:
    every: int = 10  # evaluate every this many steps; the start and the last step always are
    prompts: int = 256  # held-out prompts used, the first ones

    def __post_init__(self):
        require_at_least(1, self, "every", "prompts")


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike +- 2 standard errors, honest near 0 and 1."""
    centre, spread = right + z * z / 2, z * sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def evaluate(
    model, tokenizer, problems: list[Problem], prompts: list[list[int]], config: SampleConfig, grader: str, seed: int
) -> dict[str, float]:
    """One response per prompt at `config.temperature` and one greedy -> the `eval/*` metrics.

    The uniforms depend on (seed, prompt index) alone, so that two evaluations differ by the model, not by luck.
    `eval/accuracy` is the mean score, `eval/response_length` the mean tokens at `config.temperature`; responses
    without a verdict (a grader's fault) count in neither accuracy nor `eval/n`.
    """
    keys = [(seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    metrics = {}
    for name, temperature in (("eval/accuracy", config.temperature), ("eval/accuracy_greedy", 0.0)):
        rollout = sample(model, tokenizer, prompts, keys, config, group_size=1, temperature=temperature)
        answers = list(zip(problems, rollout.texts, strict=True))
        verdicts = shared(lambda part: grade(part, grader), answers)
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if not scores:
            raise RuntimeError(f"no held-out response could be graded; the first: {verdicts[0].reason}")
        metrics[name] = sum(scores) / len(scores)
        if temperature:
            metrics["eval/response_length"] = rollout.mask.sum(1).double().mean().item()
            metrics["eval/n"] = len(scores)
    return metrics


def eval_line(m: dict[str, float]) -> str:
    low, high = wilson_interval(m["eval/accuracy"] * m["eval/n"], m["eval/n"])
    return (
        f"held out: accuracy {m['eval/accuracy']:.3f} ({low:.3f} to {high:.3f}), greedy "
        f"{m['eval/accuracy_greedy']:.3f}, length {m['eval/response_length']:.1f}, n {m['eval/n']}"
    )


def sampling_metrics(rollout: Rollout, scores, rewards, kept: torch.Tensor, group_size: int) -> dict[str, float]:
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
    kept: Rollout, log_probs, ref_log_probs, entropy, outcome, advantages, has_reference: bool
) -> dict[str, float]:
    """Means over the response tokens of the kept groups, all arguments [B, T]; nothing where no group was kept."""
    if not len(kept):
        return {}
    m = kept.mask
    metrics = {
        "entropy": entropy[m].mean().item(),
        "sampler_gap": (log_probs - kept.sampler_log_probs)[m].abs().max().item(),
        "advantage/outcome_abs": outcome[m].abs().mean().item(),
    }
    if has_reference:
        metrics["kl/ref"] = (log_probs - ref_log_probs)[m].mean().item()
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


def peak_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def timed(seconds: dict[str, float], key: str):
    """Note the seconds that the block takes in `seconds`."""
    start = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - start


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


def describe(config, policy, device, n_train: int, n_held_out: int) -> str:
    """What is about to run, with the batch arithmetic and the sampling settings that are really in force."""
    t, s, a = config.train, config.sample, config.algorithm
    responses = t.prompts_per_step * s.group_size
    settings = generation_settings(policy, s).to_diff_dict()
    settings.pop("transformers_version", None)
    return "\n".join((
        f"{a.advantage}{'' if a.advantage in OUTCOME_ONLY else f', beta {a.beta:g}'}, seed {config.seed}, "
        f"into {config.run_dir}",
        f"model    {config.model.path or 'from scratch'}: {policy.config.model_type}, {policy.num_parameters():,} "
        f"parameters; {world_size()} x {device.type}, {torch.get_num_threads()} threads each",
        f"data     {config.data.source}: {n_train} training prompts, {n_held_out} held out for evaluation",
        f"step     {t.prompts_per_step} prompts x {s.group_size} samples = {responses} responses = "
        f"{responses // t.mini_batch_size} optimizer steps in micro-batches of at most "
        f"{t.micro_batch_tokens} tokens; {t.epochs} epoch(s); keeping groups of accuracy {list(a.keep_accuracy)}",
        f"sampler  softmax at temperature {s.temperature:g} over the whole vocabulary; generate: {settings}",
    ))  # fmt: skip


def dry_run_report(config, policy, tokenizer, prompts: list[list[int]]) -> str:
    """The first prompts exactly as the model will see them, and the memory plan of each rank."""
    t, s = config.train, config.sample
    shown = [f"prompt {i + 1}: {tokenizer.decode(ids)!r}" for i, ids in enumerate(prompts[:2])]
    ranks = max(world_size(), config.model.shard * config.model.replicate)
    on_gpu = torch.cuda.is_available() or bool(config.model.path)  # a plan for a saved model is one for GPUs
    row = max(map(len, prompts)) + s.max_new_tokens
    plan = memory_plan(
        policy,
        config.model,
        ranks,
        on_gpu,
        sampled_tokens=min(max(row, s.batch_tokens), row * -(-t.prompts_per_step * s.group_size // ranks)),
        tokens_per_row=row,
        trained_tokens=min(max(row, t.micro_batch_tokens), row * -(-t.mini_batch_size // ranks)),
        has_reference=config.needs_reference,
    )
    table = [f"  {name:<42} {gib:9.3f} GiB" for name, gib in plan.items()]
    return "\n".join(
        [
            *shown,
            f"memory of each of {ranks} {'GPU' if on_gpu else 'CPU process'}(s), estimated:",
            *table,
            "dry run: nothing was written",
        ]
    )


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a run's model on the run's held-out prompts.")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--prompts", type=int, help="default: the run's eval.prompts")
    parser.add_argument("--seed", type=int, help="of the sampling; default: the run's")
    args = parser.parse_args()
    if not (Path(args.run) / "config.yaml").exists():
        raise BadInput(f"{args.run} is not a run folder: it has no config.yaml, so no held-out prompts")
    model, tokenizer, config = open_run(args.run)
    settings, data_config = SampleConfig(**config["sample"]), DataConfig(**config["data"])
    limit = context_left(model, settings.max_new_tokens, data_config.max_prompt_tokens)
    problems, prompts = encode_prompts(load_problems(data_config, config["seed"])[1], tokenizer, limit)
    n = args.prompts or config["eval"]["prompts"]
    if not 1 <= n <= len(prompts):
        raise BadInput(f"--prompts {n}: the run has {len(prompts)} held-out prompts")
    seed = config["seed"] if args.seed is None else args.seed
    metrics = evaluate(model, tokenizer, problems[:n], prompts[:n], settings, config["reward"]["grader"], seed)
    for label, key in ((f"T={settings.temperature:g}", "eval/accuracy"), ("greedy", "eval/accuracy_greedy")):
        low, high = wilson_interval(round(metrics[key] * metrics["eval/n"]), metrics["eval/n"])
        print(
            f"accuracy {label:8} {metrics[key]:.3f}   95 % interval {low:.3f} to {high:.3f}   n = {metrics['eval/n']}"
        )
    print(f"response length   {metrics['eval/response_length']:.1f} tokens")


if __name__ == "__main__":
    command_line(main)
