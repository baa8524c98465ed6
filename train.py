"""SPRO training: the whole loop, in seven numbered stages. `grep -n "# [1-7]\\." train.py` is its table of contents.

    python train.py                                            # configs/quickstart.yaml: minutes on a laptop
    python train.py CONFIG.yaml algorithm.advantage=grpo seed=1  # key=value overrides YAML, YAML overrides defaults

A run folder (`run_dir`, default runs/<config name>) holds config.yaml, metrics.jsonl, samples/, model/ and, where the
model was built from scratch, warm_start/.
"""

import dataclasses
import difflib
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from tqdm import tqdm

from data import (
    DEMONSTRATORS,
    BadInput,
    DataConfig,
    Draw,
    chain_tokenizer,
    command_line,
    encode_prompts,
    index_at,
    load_problems,
    random_for,
    require_at_least,
)
from eval import EvalConfig, eval_line, evaluate, progress_line, sampling_metrics, token_metrics
from model import ModelConfig, build, frozen, load, rollout_log_probs, save, scored_micro_batches
from reward import RewardConfig, grade
from sample import Rollout, SampleConfig, context_left, dump_rollout, generation_settings, sample
from spro import ADVANTAGES, OUTCOME_ONLY, AlgorithmConfig, keep_groups, policy_loss, token_weights


@dataclass
class TrainConfig:
    steps: int = 60  # RL steps: each samples once and then updates on what it sampled
    prompts_per_step: int = 16  # prompts sampled per step, each sample.group_size times
    mini_batch_size: int = 32  # responses per optimizer step
    micro_batch_size: int = 32  # responses per forward and backward pass, a bound on memory; changes no gradient
    epochs: int = 1  # passes over a step's responses
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # the learning rate rises linearly over these steps
    schedule: str = "constant"  # of the learning rate after that: constant, linear (to 0) or cosine (to 0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dump_every: int = 10  # whole rollouts go to samples/ every this many steps, and at the first and the last
    warm_start_clean_steps: int = 600  # from scratch: supervised steps on right, concise solutions
    warm_start_noisy_steps: int = 250  # ... and then on the noisy demonstrator's, at half the learning rate
    warm_start_batch_size: int = 64
    warm_start_learning_rate: float = 4e-3

    def __post_init__(self):
        require_at_least(1, self, "steps", "prompts_per_step", "mini_batch_size", "micro_batch_size", "epochs")
        require_at_least(1, self, "dump_every", "warm_start_batch_size")
        require_at_least(0, self, "warmup_steps", "warm_start_clean_steps", "warm_start_noisy_steps", "weight_decay")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: choose constant, linear or cosine")
        if min(self.learning_rate, self.warm_start_learning_rate, self.max_grad_norm) <= 0:
            raise ValueError("learning_rate, warm_start_learning_rate and max_grad_norm must be positive")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)} must lie in [0, 1)")


@dataclass
class Config:
    seed: int = 0
    run_dir: str = ""  # default: runs/<config name>
    resume: bool = False
    overwrite: bool = False  # delete what an earlier run left in run_dir
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        require_at_least(0, self, "seed")


MAX_REFUSED = 3  # optimizer steps with non-finite gradients, in a row, after which a run stops


# --- configuration ------------------------------------------------------------------------------------------------


def all_keys(cls=Config, prefix="") -> list[str]:
    """Every key of the config, dotted."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys += all_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def typed(value, kind, key):
    """`value` as `kind`, or BadInput. YAML reads 1e-4 as text, so numbers may come as text where a float is due."""
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
            return tuple(typed(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    elif kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    wanted = f"a list of {len(get_args(kind))} numbers" if get_origin(kind) is tuple else f"of type {kind.__name__}"
    raise BadInput(f"config: {key} must be {wanted}, not {value!r}")


def build_config(values, cls=Config, prefix=""):
    """A config dataclass from nested dicts; unknown keys and wrong types raise BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"config: {prefix.rstrip('.') or 'the file'} must hold keys and values, not {values!r}")
    kinds, built = get_type_hints(cls), {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            known = all_keys()
            same_name = [k for k in known if k.split(".")[-1] == str(name).split(".")[-1]]
            near = (same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.0))[0]
            raise BadInput(f"config: unknown key {key!r}; the nearest is {near!r}")
        nested = dataclasses.is_dataclass(kinds[name])
        built[name] = build_config(value, kinds[name], key + ".") if nested else typed(value, kinds[name], key)
    try:
        return cls(**built)
    except ValueError as error:  # a block's own check of its values
        raise BadInput(f"config: {prefix}{error}") from error


def read_config(arguments: list[str]) -> Config:
    """`[CONFIG.yaml] [key=value ...]` -> a checked Config."""
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1 or any(a.startswith("-") for a in arguments):
        raise BadInput(f"usage: python train.py [CONFIG.yaml] [key=value ...], not {' '.join(arguments)!r}")
    path = Path(files[0]) if files else Path(__file__).parent / "configs" / "quickstart.yaml"
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise BadInput(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    for override in overrides:
        key, _, text = override.partition("=")
        *blocks, name = key.split(".")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"config: cannot read the value of {override!r}") from error
        block = values
        for part in blocks:
            block = block.setdefault(part, {}) if isinstance(block, dict) else block
        if not isinstance(block, dict):
            raise BadInput(f"config: {override!r} goes through a value that is no block")
        block[name] = "" if value is None else value
    config = build_config(values)
    config.run_dir = config.run_dir or f"runs/{path.stem}"
    check_batches(config)
    return config


def check_batches(config: Config) -> None:
    """Raise BadInput where the blocks do not fit together; each block has checked its own values."""
    t, group_size, data = config.train, config.sample.group_size, config.data
    responses = t.prompts_per_step * group_size
    for wrong, message in (
        (
            responses % t.mini_batch_size,
            f"{t.prompts_per_step} prompts x {group_size} samples = {responses} responses do not divide into "
            f"mini-batches of train.mini_batch_size={t.mini_batch_size}",
        ),
        (
            t.mini_batch_size % t.micro_batch_size,
            f"train.mini_batch_size={t.mini_batch_size} does not divide into micro-batches of "
            f"train.micro_batch_size={t.micro_batch_size}",
        ),
        (t.prompts_per_step > data.train_size, f"train.prompts_per_step exceeds data.train_size={data.train_size}"),
        (config.eval.prompts > data.held_out_size, f"eval.prompts exceeds data.held_out_size={data.held_out_size}"),
    ):
        if wrong:
            raise BadInput(f"config: {message}")


# --- the run folder -----------------------------------------------------------------------------------------------


def open_run_folder(config: Config) -> Path:
    """Make `run_dir` and write config.yaml with the command, commit and versions that made it. Raises BadInput."""
    run = Path(config.run_dir)
    if config.resume:
        raise BadInput("resume=true is not there yet: start over with overwrite=true, or choose another run_dir")
    try:
        if run.is_dir() and any(run.iterdir()):
            if not config.overwrite:
                raise BadInput(f"run_dir {run} is in use: give overwrite=true, resume=true or another run_dir=...")
            if not (run / "config.yaml").exists():
                raise BadInput(f"run_dir {run} is not a run folder (no config.yaml), so it will not be overwritten")
            shutil.rmtree(run)
        (run / "samples").mkdir(parents=True)
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        made_by = [f"# {' '.join(sys.argv)}", f"# commit {commit.stdout.strip() or 'unknown'}"]
        made_by += [f"# {name} {version(name)}" for name in ("torch", "transformers", "numpy")]
        text = yaml.safe_dump(plain(config), sort_keys=False)
        (run / "config.yaml").write_text("\n".join([*made_by, text]))
    except OSError as error:
        raise BadInput(f"run_dir {run} cannot be written: {error.strerror}") from error
    return run


def plain(config: Config) -> dict:
    """The config as YAML and JSON can hold it (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def append_line(file: Path, row: dict) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def peak_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def timed(seconds: dict[str, float], key: str):
    start = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - start


# --- updates ------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, base: float, warmup: int, schedule: str) -> float:
    """Of step 1..steps: a linear rise over `warmup` steps, then constant, or falling towards 0 at the end."""
    if step <= warmup:
        return base * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    return base * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


def make_optimizer(policy, config: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        policy.parameters(), lr=0.0, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )


def optimizer_step(policy, optimizer, lr: float, max_grad_norm: float, losses: Iterator) -> dict[str, float]:
    """One optimizer step over `losses`, which yields the (loss, stats) of one micro-batch after the other.

    Losses and stats are weighted sums with weights fixed beforehand, so adding them up is all there is to accumulating.
    Returns the sums with `loss` and `grad_norm`, or, where the gradient is not finite and nothing was changed, {}.
    """
    sums: dict[str, float] = defaultdict(float)
    for loss, stats in losses:
        loss.backward()
        sums["loss"] += loss.item()
        for key, value in stats.items():
            sums[key] = max(sums[key], value.item()) if key == "ratio/max" else sums[key] + value.item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**sums, "grad_norm": norm} if math.isfinite(norm) else {}


def policy_losses(policy, config: Config, rollout: Rollout, old_log_probs, advantages) -> Iterator:
    """The (loss, stats) of each micro-batch of one optimizer step. Every token's weight is fixed before the first."""
    mask, a, s = rollout.mask, config.algorithm, config.sample
    weights = token_weights(mask, len(rollout), int(mask.sum()), a.loss_weights, s.max_new_tokens)
    total = weights.sum()
    for rows, log_probs, _ in scored_micro_batches(policy, rollout, s.temperature, config.train.micro_batch_size):
        constants = (x[rows, : log_probs.shape[1]].to(policy.device) for x in (old_log_probs, advantages, weights))
        loss, stats = policy_loss(log_probs, *constants, a.clip_low, a.clip_high)
        yield loss, {key: value if key == "ratio/max" else value / total for key, value in stats.items()}


def imitation_losses(policy, rollout: Rollout, micro_batch_size: int) -> Iterator:
    """The (loss, stats) of each micro-batch of one supervised step: cross-entropy per token of the demonstrations."""
    weights = token_weights(rollout.mask, len(rollout), int(rollout.mask.sum()), "token-mean")
    for rows, log_probs, _ in scored_micro_batches(policy, rollout, 1.0, micro_batch_size):
        weight = weights[rows, : log_probs.shape[1]].to(log_probs)
        yield -(weight * torch.where(weight > 0, log_probs, 0.0)).sum(), {}


def warm_start(config: Config, policy, tokenizer, problems, prompts, folder: Path) -> None:
    """Teach a new model the task from demonstrations: right and concise ones first, then the noisy demonstrator's.

    The two stages matter: on noisy traces alone a small model learns the format but not, reliably, the arithmetic.
    Writes metrics.jsonl and model/ to `folder`; another run can start from there with model.path=FOLDER/model.
    """
    folder.mkdir()
    t, optimizer, position = config.train, make_optimizer(policy, config.train), 0
    demonstrate, size = DEMONSTRATORS[config.data.source], t.warm_start_batch_size
    for stage, steps, scale in (("clean", t.warm_start_clean_steps, 1.0), ("noisy", t.warm_start_noisy_steps, 0.5)):
        bar = tqdm(range(1, steps + 1), desc=f"warm start, {stage}", disable=None)
        for step in bar:
            places = range(position, position + size)
            batch = [index_at(place, len(problems), config.seed) for place in places]
            noise = [random_for(config.seed, Draw.DEMONSTRATE, p) if stage == "noisy" else None for p in places]
            texts = [demonstrate(problems[i].prompt, source) for i, source in zip(batch, noise, strict=True)]
            rollout = Rollout.of_texts([prompts[i] for i in batch], texts, tokenizer)
            lr = scale * learning_rate(step, steps, t.warm_start_learning_rate, min(50, steps // 5), "cosine")
            losses = imitation_losses(policy, rollout, t.micro_batch_size)
            stats = optimizer_step(policy, optimizer, lr, t.max_grad_norm, losses)
            append_line(folder / "metrics.jsonl", {"stage": stage, "step": step, "lr": lr, **stats})
            bar.set_postfix(loss=f"{stats.get('loss', math.nan):.3f}")
            position += size
    save(policy, tokenizer, folder / "model")


def mini_batches(n: int, config: Config, step: int) -> list[torch.Tensor]:
    """Row indices of each optimizer step of this RL step: a new shuffle per epoch, cut into about equal parts."""
    parts = max(1, math.ceil(n / config.train.mini_batch_size))
    shuffles = [random_for(config.seed, Draw.SHUFFLE, step, e).permutation(n) for e in range(config.train.epochs)]
    return [rows for shuffle in shuffles for rows in torch.from_numpy(shuffle).tensor_split(parts) if len(rows)]


def update_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the optimizer steps of one RL step (of ratio/max the max), and how many steps were refused."""
    taken = [update for update in updates if update]
    metrics = {key: sum(update[key] for update in taken) / len(taken) for key in (taken[0] if taken else ())}
    if taken:
        metrics["ratio/max"] = max(update["ratio/max"] for update in taken)
    return metrics | {"updates/taken": len(taken), "updates/refused": len(updates) - len(taken)}


def describe(config: Config, policy, n_train: int, n_held_out: int) -> str:
    """What is about to run, with the batch arithmetic and the sampling settings that are really in force."""
    t, s, a = config.train, config.sample, config.algorithm
    responses = t.prompts_per_step * s.group_size
    settings = generation_settings(policy, s.max_new_tokens).to_diff_dict()
    settings.pop("transformers_version", None)
    return "\n".join((
        f"{a.advantage}, beta {a.beta:g}, seed {config.seed}, into {config.run_dir}",
        f"model    {config.model.path or 'from scratch'}: {policy.config.model_type}, {policy.num_parameters():,} "
        f"parameters, on {policy.device}, {torch.get_num_threads()} threads",
        f"data     {config.data.source}: {n_train} training prompts, {n_held_out} held out for evaluation",
        f"step     {t.prompts_per_step} prompts x {s.group_size} samples = {responses} responses = "
        f"{responses // t.mini_batch_size} optimizer steps x {t.mini_batch_size // t.micro_batch_size} micro-batches "
        f"x {t.micro_batch_size}; {t.epochs} epoch(s); keeping groups of accuracy {list(a.keep_accuracy)}",
        f"sampler  softmax at temperature {s.temperature:g} over the whole vocabulary; generate: {settings}",
    ))  # fmt: skip


def main() -> None:
    config, started = read_config(sys.argv[1:]), time.perf_counter()
    t, s, a = config.train, config.sample, config.algorithm
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_problems, held_out = load_problems(config.data, config.seed)
    if config.model.path:
        policy, tokenizer = load(config.model.path, config.model.attention)
    else:
        tokenizer = chain_tokenizer()
        policy = build(config.model, tokenizer, config.seed)
    policy.to(device)
    longest_prompt = context_left(policy, s.max_new_tokens, config.data.max_prompt_tokens)
    problems, prompts = encode_prompts(train_problems, tokenizer, longest_prompt)
    eval_set = [part[: config.eval.prompts] for part in encode_prompts(held_out, tokenizer, longest_prompt)]
    run = open_run_folder(config)
    print(describe(config, policy, len(problems), len(eval_set[0])))

    start_model = config.model.path
    if not start_model:
        warm_start(config, policy, tokenizer, problems, prompts, run / "warm_start")
        start_model = run / "warm_start" / "model"
    needs_reference = a.beta != 0 and a.advantage not in OUTCOME_ONLY
    reference = frozen(load(start_model, config.model.attention)[0].to(device)) if needs_reference else None
    optimizer, position, refused_in_a_row = make_optimizer(policy, t), 0, 0

    before = after = evaluate(policy, tokenizer, *eval_set, s, config.reward.grader, config.seed)
    append_line(run / "metrics.jsonl", {"step": 0, **before})
    print(eval_line(before))

    for step in range(1, t.steps + 1):
        step_started, seconds = time.perf_counter(), {}

        # 1. Sample.
        with timed(seconds, "time/sample"):
            places = range(position, position + t.prompts_per_step)
            batch = [index_at(place, len(problems), config.seed) for place in places]
            keys = [(config.seed, Draw.SAMPLE, place) for place in places]
            rollout = sample(policy, tokenizer, [prompts[i] for i in batch], keys, s)
            position += t.prompts_per_step

        # 2. Reward.
        with timed(seconds, "time/reward"):
            asked = [problems[i] for i in batch for _ in range(s.group_size)]
            verdicts = grade(asked, rollout.texts, config.reward.grader)
            rewards = torch.tensor([math.nan if v.score is None else v.score for v in verdicts])
            kept = keep_groups(rewards, s.group_size, *a.keep_accuracy)
            rows = kept.repeat_interleave(s.group_size).nonzero()[:, 0]
            learned = rollout.pick(rows)

        # 3. Log-probs.
        with timed(seconds, "time/log_probs"):
            old_log_probs, entropy = rollout_log_probs(policy, learned, s.temperature, t.micro_batch_size)
            ref_log_probs = old_log_probs  # a log-ratio of 0: no step term
            if reference is not None:
                ref_log_probs, _ = rollout_log_probs(reference, learned, s.temperature, t.micro_batch_size)

        # 4. Advantage.
        advantages = ADVANTAGES[a.advantage](
            rewards[rows], old_log_probs, ref_log_probs, learned.mask, s.group_size, a.beta
        )

        # 5. Update.
        with timed(seconds, "time/update"):
            lr, updates = learning_rate(step, t.steps, t.learning_rate, t.warmup_steps, t.schedule), []
            for chosen in mini_batches(len(learned), config, step):
                losses = policy_losses(policy, config, learned.at(chosen), old_log_probs[chosen], advantages[chosen])
                updates.append(optimizer_step(policy, optimizer, lr, t.max_grad_norm, losses))
                refused_in_a_row = 0 if updates[-1] else refused_in_a_row + 1
                if refused_in_a_row == MAX_REFUSED:
                    sys.exit(
                        f"stopped at step {step}: {MAX_REFUSED} optimizer steps in a row had non-finite gradients; "
                        f"lower train.learning_rate or algorithm.beta ({run / 'metrics.jsonl'} shows the way here)"
                    )

        # 6. Log.
        outcome = ADVANTAGES[a.advantage](  # what is left of the advantage where policy and reference agree
            rewards[rows], old_log_probs, old_log_probs, learned.mask, s.group_size, a.beta
        )
        seconds["time/step"] = time.perf_counter() - step_started
        metrics = {
            "step": step,
            **sampling_metrics(rollout, rewards, kept, s.group_size),
            **token_metrics(learned, old_log_probs, ref_log_probs, entropy, outcome, advantages, reference is not None),
            **update_metrics(updates),
            "lr": lr,
            **seconds,
            "tokens_per_second": int(rollout.mask.sum()) / seconds["time/step"],
            "memory/peak_gib": peak_gib(),
        }
        print(progress_line(step, t.steps, metrics))
        if step % t.dump_every == 0 or step in (1, t.steps):
            per_token = {"log_prob": old_log_probs, "entropy": entropy, "advantage": advantages}
            per_token |= {"ref_log_prob": ref_log_probs} if reference is not None else {}
            file = run / "samples" / f"step_{step:05d}.jsonl"
            dump_rollout(file, tokenizer, rollout, s.group_size, asked, verdicts, rows, per_token)

        # 7. Evaluate and save.
        if step % config.eval.every == 0 or step == t.steps:
            after = evaluate(policy, tokenizer, *eval_set, s, config.reward.grader, config.seed)
            metrics |= after
            print(eval_line(after))
        append_line(run / "metrics.jsonl", metrics)
        if step == t.steps:
            save(policy, tokenizer, run / "model")

    print(f"""
done in {time.perf_counter() - started:.0f} s: {run}
  held-out accuracy   {before["eval/accuracy"]:.3f} -> {after["eval/accuracy"]:.3f} at temperature {s.temperature:g}
  greedy              {before["eval/accuracy_greedy"]:.3f} -> {after["eval/accuracy_greedy"]:.3f}
  response length     {before["eval/response_length"]:.1f} -> {after["eval/response_length"]:.1f} tokens
  entropy             {metrics.get("entropy", math.nan):.4f} nats per token at the last step
  model               {run / "model"}
look at what it writes: python sample.py {run}""")


if __name__ == "__main__":
    command_line(main)
