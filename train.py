"""SPRO training: the whole loop, in seven numbered stages. `grep -n "# [1-7]\\." train.py` is its table of contents.

    python train.py                                              # configs/quickstart.yaml: minutes on a laptop
    python train.py CONFIG.yaml algorithm.advantage=grpo seed=1  # key=value overrides YAML, YAML overrides defaults
    python train.py CONFIG.yaml resume=true                      # go on where a run was cut off
    torchrun --nproc_per_node 8 train.py CONFIG.yaml             # one process per GPU, or on a CPU

Every rank holds the step's whole Rollout, which is small, and takes its decisions from all of it, so that they cannot
depend on the number of ranks; sampling, grading, scoring and the backward passes are divided. What a run leaves behind
is listed in run.py.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import math
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import data
import model
import tasks
from baselines import prime
from baselines.prime import PrimeConfig
from data import DataConfig
from eval import EvalConfig, describe, dry_run_report, eval_line, evaluate
from infra.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from infra.config import all_keys, plain, read_config, require_at_least
from infra.errors import EXIT_STOPPED, BadInput, RunStopped, enough_memory, optional
from infra.memory import peak_gib
from infra.metrics import progress_line, sampling_metrics, summary, tensorboard, timed, token_metrics, update_metrics
from infra.processes import (
    all_reduce,
    catch_signals,
    choose_threads,
    command_line,
    on_first_rank,
    rank,
    say,
    shared,
    start_processes,
    stop_requested,
    watch,
    world_size,
)
from infra.rng import Draw, random_for
from infra.run_folder import append_line, fresh_folder, keep_metrics_through, open_run_folder
from model import ModelConfig
from rewards import Grader, RewardConfig
from sample import Rollout, SampleConfig, context_left, dump_rollout, line_ids, sample
from spro import (
    ADVANTAGES,
    BY_LINE,
    NEEDS_PRM,
    NOT_ADDITIVE,
    OUTCOME_ONLY,
    AlgorithmConfig,
    keep_groups,
    kl_estimate,
    policy_loss,
    token_weights,
)


@dataclass
class TrainConfig:
    steps: int = 40  # RL steps: each samples and then updates on what it sampled
    prompts_per_step: int = 16  # prompts sampled per step, each sample.group_size times
    max_refills: int = 0  # further batches of prompts sampled while fewer groups than prompts_per_step are kept
    mini_batch_size: int = 32  # responses per optimizer step
    micro_batch_tokens: int = 16384  # prompt and response tokens per forward and backward pass: memory, no gradient
    old_log_probs: str = "recompute"  # of stage 3: recompute them, or keep the sampler's (one pass less; fp32 only)
    epochs: int = 1  # passes over a step's responses
    learning_rate: float = 1e-4
    warmup_steps: int = 0  # the learning rate rises linearly over these steps
    schedule: str = "constant"  # of the learning rate after that: constant, linear (to 0) or cosine (to 0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_every: int = 20  # checkpoints: every this many steps, at the last step, and when the run is told to stop
    keep_checkpoints: int = 2  # the newest ones; older ones are deleted once a new one is complete
    timeout_minutes: float = 30.0  # a step that takes longer prints where every rank stands
    diagnose_every: int = 0  # compare the gradients of outcome and step term every this many steps; 0: never
    tensorboard: bool = False  # metrics go to run_dir/tensorboard too (pip install tensorboard)
    dump_every: int = 10  # whole rollouts go to samples/ every this many steps, and at the first and the last
    warm_start_clean_steps: int = 1000  # from scratch: supervised steps on right, concise solutions
    warm_start_noisy_steps: int = 250  # ... and then on the noisy demonstrator's, at half the learning rate

    def __post_init__(self):
        require_at_least(1, self, "steps", "prompts_per_step", "mini_batch_size", "micro_batch_tokens", "epochs")
        require_at_least(1, self, "save_every", "keep_checkpoints", "dump_every")
        require_at_least(0, self, "warmup_steps", "warm_start_clean_steps", "warm_start_noisy_steps", "weight_decay")
        require_at_least(0, self, "max_refills", "diagnose_every")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: choose constant, linear or cosine")
        if self.old_log_probs not in ("recompute", "sampler"):
            raise ValueError(f"old_log_probs={self.old_log_probs!r}: choose recompute or sampler")
        for name in ("learning_rate", "max_grad_norm", "timeout_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)} must lie in [0, 1)")


@dataclass
class Config:
    seed: int = 0
    run_dir: str = ""  # default: runs/<config name>
    resume: bool = False  # go on where run_dir's newest checkpoint stands, or start if there is none
    overwrite: bool = False  # delete what an earlier run left in run_dir
    dry_run: bool = False  # check config and data, show prompts and the memory needed, then stop
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    prime: PrimeConfig = field(default_factory=PrimeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        t, group_size = self.train, self.sample.group_size
        require_at_least(0, self, "seed")
        if self.resume and self.overwrite:
            raise ValueError("resume=true goes on with what is in run_dir, overwrite=true deletes it: give one of them")
        responses = t.prompts_per_step * group_size
        if responses % t.mini_batch_size:
            raise ValueError(
                f"{t.prompts_per_step} prompts x {group_size} samples = {responses} responses do not divide into "
                f"mini-batches of train.mini_batch_size={t.mini_batch_size}"
            )
        if not self.model.path and self.data.source not in tasks.DEMONSTRATORS:
            raise ValueError(f"model.path is empty: a model from scratch cannot learn data.source={self.data.source!r}")
        if 0 < self.data.train_size < t.prompts_per_step:
            raise ValueError(f"train.prompts_per_step={t.prompts_per_step} > data.train_size={self.data.train_size}")
        if self.eval.prompts > self.data.held_out_size:
            raise ValueError(f"eval.prompts={self.eval.prompts} > data.held_out_size={self.data.held_out_size}")
        if self.needs_prm and self.algorithm.beta <= 0:
            raise ValueError(f"algorithm.advantage={self.algorithm.advantage} needs algorithm.beta above 0 to learn by")

    @property
    def needs_prm(self) -> bool:
        return self.algorithm.advantage in NEEDS_PRM

    @property
    def needs_reference(self) -> bool:
        a = self.algorithm
        return a.kl_coef != 0 or (a.beta != 0 and a.advantage not in OUTCOME_ONLY)


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
WARM_START_BATCH, WARM_START_LEARNING_RATE = 32, 4e-3  # demonstrations per supervised step
MAXIMA = ("ratio/max", "sampler_gap")  # statistics whose whole is the largest part; all others are sums
MAX_REFUSED = 3  # optimizer steps with non-finite gradients, in a row, after which a run stops


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
    """One optimizer step over `losses`, which yields the (loss, stats) of one micro-batch of this rank after the other.

    Losses and stats are weighted sums with weights fixed beforehand, so adding up, over micro-batches and ranks, is all
    there is to it. Returns the sums with `grad_norm`, or, where that is not finite and nothing was changed, {}.
    """
    sums, maxima = defaultdict(float), {}
    for loss, stats in losses:
        (loss * world_size()).backward()  # FSDP averages gradients over ranks, but ours are parts of one sum
        for key, value in {"loss": loss, **stats}.items():
            if key in MAXIMA:
                maxima[key] = max(maxima.get(key, 0.0), value.item())
            else:
                sums[key] += value.item()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(norm):
        return {}
    for values, op in ((sums, dist.ReduceOp.SUM), (maxima, dist.ReduceOp.MAX)):
        reduced = all_reduce(torch.tensor(list(values.values()), dtype=torch.float64), op)
        values.update(zip(values, reduced.tolist(), strict=True))
    return {**sums, **maxima, "grad_norm": norm}


def policy_losses(
    policy, config: Config, rollout: Rollout, old_log_probs, advantages, ref_log_probs=None, reference=None
) -> Iterator:
    """The (loss, stats) of each micro-batch of one optimizer step. Every token's weight is fixed before the first.

    The KL term needs `ref_log_probs` [B, T] for its estimators, or the `reference` itself if it is to be exact.
    """
    mask, a, s, budget = rollout.mask, config.algorithm, config.sample, config.train.micro_batch_tokens
    weights = token_weights(mask, len(rollout), int(mask.sum()), a.loss_weights, s.max_new_tokens)
    total = weights.sum()
    per_token = [x for x in (old_log_probs, advantages, weights, ref_log_probs) if x is not None]
    compared = reference if a.kl_coef and a.kl_estimator == "exact" else None
    for rows, log_probs, _, *kl in model.scored_micro_batches(policy, rollout, s.temperature, budget, compared):
        old, A, weight, *ref = (x[rows, : log_probs.shape[1]].to(log_probs.device) for x in per_token)
        loss, stats = policy_loss(log_probs, old, A, weight, a.clip_low, a.clip_high)
        if a.kl_coef:
            kl = kl[0] if kl else kl_estimate(log_probs, *ref, weight != 0, a.kl_estimator)
            kl = (weight.to(kl.dtype) * kl).sum()
            loss, stats["kl/loss"] = loss + a.kl_coef * kl, kl.detach()
        stats = {key: value if key in MAXIMA else value / total for key, value in stats.items()}
        if config.train.old_log_probs == "sampler":
            gaps = (log_probs.detach() - old).abs()
            stats["sampler_gap"] = gaps.max() if len(rows) else gaps.sum()
        yield loss, stats


def likelihood_losses(policy, rollout: Rollout, weights, temperature: float, micro_batch_tokens: int) -> Iterator:
    """The (loss, stats) of each micro-batch of `-sum(weights x log-probs)`; weights [B, T]."""
    for rows, log_probs, _ in model.scored_micro_batches(policy, rollout, temperature, micro_batch_tokens):
        weight = weights[rows, : log_probs.shape[1]].to(log_probs)
        yield -(weight * torch.where(weight != 0, log_probs, 0.0)).sum(), {}


def imitation_losses(policy, rollout: Rollout, micro_batch_tokens: int) -> Iterator:
    """The (loss, stats) of each micro-batch of one supervised step: cross-entropy per token of the demonstrations."""
    weights = token_weights(rollout.mask, len(rollout), int(rollout.mask.sum()), "token-mean")
    return likelihood_losses(policy, rollout, weights, 1.0, micro_batch_tokens)


@enough_memory("update")
def compare_gradients(policy, config: Config, rollout: Rollout, outcome, step_term) -> dict[str, float]:
    """How the two halves of Eq. 13 push: cosine of their gradients, and the ratio of their norms, |step| / |outcome|.

    outcome, step_term [B, T]. Gradients of the surrogate at ratio 1 with the update's weights, over the whole rollout;
    {} where one of them is 0 or not finite. Changes nothing; a second gradient is held meanwhile.
    """
    if not (outcome.any() and step_term.any()):
        return {}
    mask, s, gradients = rollout.mask, config.sample, []
    weights = token_weights(mask, len(rollout), int(mask.sum()), config.algorithm.loss_weights, s.max_new_tokens)
    for term in (outcome, step_term):
        losses = likelihood_losses(policy, rollout, weights * term, s.temperature, config.train.micro_batch_tokens)
        for loss, _ in losses:
            loss.backward()
        whole = (p.grad for p in policy.parameters() if p.grad is not None)
        gradients.append([g.to_local() if isinstance(g, DTensor) else g for g in whole])
        policy.zero_grad(set_to_none=True)
    # Each rank adds up its shards. Replicas count alike in all three sums, and so does FSDP's averaging: both cancel.
    a, b = gradients
    dots = [
        sum((x.double() * y.double()).sum() for x, y in zip(*pair, strict=True)) for pair in ((a, a), (b, b), (a, b))
    ]
    aa, bb, ab = all_reduce(torch.stack(dots).cpu()).tolist()
    if not 0 < aa * bb < math.inf:
        return {}
    return {"gradient/cosine": ab / math.sqrt(aa * bb), "gradient/norm_ratio": math.sqrt(bb / aa)}


@enough_memory("warm_start")
def warm_start(config: Config, policy, tokenizer, problems, prompts, folder: Path) -> None:
    """Teach a new model the task from demonstrations: right and concise ones first, then the noisy demonstrator's.

    The two stages matter: on noisy traces alone a small model learns the format but not, reliably, the arithmetic.
    Writes metrics.jsonl and model/ to `folder`; another run can start from there with model.path=FOLDER/model.
    """
    fresh_folder(folder)
    t, optimizer, position, state = config.train, make_optimizer(policy, config.train), 0, {"refused_in_a_row": 0}
    demonstrate, size = tasks.demonstrator(config.data), WARM_START_BATCH
    say(f"warm start: {t.warm_start_clean_steps} supervised steps on right solutions, {t.warm_start_noisy_steps} noisy")
    for stage, steps, scale in (("clean", t.warm_start_clean_steps, 1.0), ("noisy", t.warm_start_noisy_steps, 0.5)):
        bar = tqdm(range(1, steps + 1), desc=f"warm start, {stage}", disable=True if rank() else None)
        for step in bar:
            watch(t.timeout_minutes)
            places = range(position, position + size)
            batch = [data.index_at(place, len(problems), config.seed) for place in places]
            noise = [random_for(config.seed, Draw.DEMONSTRATE, p) if stage == "noisy" else None for p in places]
            texts = [demonstrate(problems[i].prompt, source) for i, source in zip(batch, noise, strict=True)]
            rollout = Rollout.of_texts([prompts[i] for i in batch], texts, tokenizer)
            lr = scale * learning_rate(step, steps, WARM_START_LEARNING_RATE, min(50, steps // 5), "cosine")
            losses = imitation_losses(policy, rollout, t.micro_batch_tokens)
            stats = optimizer_step(policy, optimizer, lr, t.max_grad_norm, losses)
            check_refused(state, stats, f"step {step} of the warm start: model.scratch cannot be taught like this")
            append_line(folder / "metrics.jsonl", {"stage": stage, "step": step, "lr": lr, **stats})
            bar.set_postfix(loss=f"{stats.get('loss', math.nan):.3f}")
            position += size
            if stop_requested():
                raise RunStopped("told to stop during the warm start, which resume=true begins again", EXIT_STOPPED)
    model.save(policy, tokenizer, folder / "model")


def mini_batches(n: int, config: Config, step: int) -> list[torch.Tensor]:
    """Row indices of each optimizer step of this RL step: a new shuffle per epoch, cut into about equal parts.

    Groups are shuffled, not rows: siblings stay together, so that a pass can run their prompt once.
    """
    t, groups = config.train, torch.arange(n).view(-1, config.sample.group_size)
    parts = max(1, math.ceil(n / t.mini_batch_size))
    shuffles = [random_for(config.seed, Draw.SHUFFLE, step, e).permutation(len(groups)) for e in range(t.epochs)]
    return [rows for shuffle in shuffles for rows in groups[shuffle].flatten().tensor_split(parts) if len(rows)]


def check_refused(state: dict, update: dict, where: str) -> None:
    """Count optimizer steps refused in a row; a run that can take none any more stops with a clear word."""
    state["refused_in_a_row"] = 0 if update else state["refused_in_a_row"] + 1
    if state["refused_in_a_row"] == MAX_REFUSED:
        raise RunStopped(f"{MAX_REFUSED} optimizer steps in a row had non-finite gradients, at {where}")


def start_of(config: Config, folder: Path) -> str | Path:
    """The saved model that policy, reference and PRM start from."""
    return config.model.path or folder / "warm_start" / "model"


def start_models(config: Config, folder: Path, device, policy, tokenizer, problems, prompts):
    """(policy, reference or None, hash of the reference's weights), sharded, as RL starts from them.

    The reference comes from model.path or the finished warm start, never from weights that RL has touched.
    """
    start, attention = start_of(config, folder), config.model.attention
    warm = not config.model.path and not start.exists()
    if not config.model.path and not warm:
        say("the warm start of this run is finished and kept")
        policy, _ = model.load(start, attention)
    policy = model.shard(policy, config.model, device)
    if warm:
        warm_start(config, policy, tokenizer, problems, prompts, folder / "warm_start")
    if not config.needs_reference:
        return policy, None, None
    reference = model.frozen(model.load(start, attention)[0])
    start_hash = model.weights_hash(reference)
    return policy, model.shard(reference, config.model, device, config.model.offload_reference), start_hash


def resume(config: Config, folder: Path, trained: dict, start_hash: str | None) -> dict:
    """The state to go on from, all that is not a tensor: of the newest checkpoint that holds, else of the start.

    Fills `trained`, (model, optimizer) by name, and cuts metrics.jsonl back to where that state stands.
    """
    state = {"step": 0, "position": 0, "refused_in_a_row": 0, "start_hash": start_hash}
    state |= {"before": None, "after": None, "best": None}
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        state |= load_checkpoint(checkpoint, trained)
        if state["start_hash"] != start_hash:
            raise BadInput(f"the model that {folder} started from has changed on disk: bring it back, or start anew")
        say(f"resume: going on after step {state['step']}, from {checkpoint}")
    elif config.resume:
        say("resume: no valid checkpoint yet, so RL starts over")
    keep_metrics_through(folder, state["step"] if checkpoint else -1)
    return state


def main() -> None:
    started = time.perf_counter()
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__, "Keys, explained in the dataclasses at the top of each file:", *all_keys(Config), sep="\n  ")
        return
    config = read_config(Config, sys.argv[1:], DEFAULT_CONFIG)
    device = start_processes(config.train.timeout_minutes)
    if config.train.old_log_probs == "sampler" and device.type == "cuda" and config.model.dtype != "float32":
        raise BadInput("train.old_log_probs=sampler: sums of its log-ratios would be noise unless model.dtype=float32")
    grader = Grader(config.reward)
    if config.train.tensorboard:  # now, not after the warm start
        optional("torch.utils.tensorboard", "tensorboard")
    train_problems, held_out = data.load_problems(config.data, config.seed, grader)
    if config.model.path:
        policy, tokenizer = model.load(config.model.path, config.model.attention, empty=config.dry_run)
    else:
        tokenizer = tasks.TOKENIZERS[config.data.source]()
        with torch.device("meta" if config.dry_run else "cpu"):
            policy = model.build(config.model, tokenizer, config.seed)
    choose_threads(policy.num_parameters())
    longest = context_left(policy, config.sample.max_new_tokens, config.data.max_prompt_tokens)
    limits = (longest, config.data.chat_template)
    problems, prompts = data.encode_prompts(train_problems, tokenizer, *limits)
    eval_set = [part[: config.eval.prompts] for part in data.encode_prompts(held_out, tokenizer, *limits)]
    say(describe(config, policy, tokenizer, device, problems, len(eval_set[0])))
    if config.dry_run:
        say(dry_run_report(config, policy, tokenizer, prompts))
        return

    model.shard_size(config.model)  # before anything is written
    catch_signals()
    folder = open_run_folder(plain(config))
    policy, reference, start_hash = start_models(config, folder, device, policy, tokenizer, problems, prompts)
    models = {"policy": policy}
    if config.needs_prm:
        prm, _ = model.load(start_of(config, folder), config.model.attention)
        models["prm"] = model.shard(prm, config.model, device)
    trained = {name: (each, make_optimizer(each, config.train)) for name, each in models.items()}
    state = resume(config, folder, trained, start_hash)
    if state["step"] >= config.train.steps and (folder / "model").exists():
        say(f"{folder} is finished: {state['step']} steps; raise train.steps to go on")
        return
    if state["step"] < config.train.steps:  # an earlier end of this run is not the end any more
        on_first_rank(lambda: shutil.rmtree(folder / "model", ignore_errors=True))
    train(config, folder, trained, reference, tokenizer, grader, (problems, prompts), eval_set, state)
    model.save(policy, tokenizer, folder / "model")
    say(summary(config, folder, state, time.perf_counter() - started))


def train(
    config: Config, folder: Path, trained, reference, tokenizer, grader, train_set, eval_set, state: dict
) -> None:
    """The loop. `trained` holds (model, optimizer) by name: "policy", and with PRIME "prm".

    `state` is what a checkpoint holds besides tensors; it moves on at the end of a step.
    """
    t, s, a, (policy, optimizer) = config.train, config.sample, config.algorithm, trained["policy"]
    (problems, prompts), advantage_of = train_set, ADVANTAGES[a.advantage]
    write_scalars = tensorboard(folder, state["step"] if state["before"] else -1, t.tensorboard)

    def evaluation() -> dict[str, float]:
        with model.gathered(policy):
            return evaluate(policy, tokenizer, *eval_set, s, grader, config.seed)

    def judge(answers: list) -> list:
        """(verdict, reward) of each (problem, text, length in tokens)."""
        texts, lengths = [answer[:2] for answer in answers], [answer[2] for answer in answers]
        verdicts = grader.grade(texts)
        shaped = grader.shaped_rewards(texts, verdicts, lengths, s.max_new_tokens)
        return list(zip(verdicts, shaped, strict=True))

    if state["before"] is None:
        watch(t.timeout_minutes)
        state["before"] = evaluation()
        state["best"] = {"step": 0, "eval/accuracy": state["before"]["eval/accuracy"]}
        append_line(folder / "metrics.jsonl", {"step": 0, **state["before"]})
        write_scalars({"step": 0, **state["before"]})
        say(eval_line(state["before"]))

    for step in range(state["step"] + 1, t.steps + 1):
        watch(t.timeout_minutes)
        step_started, seconds = time.perf_counter(), {}

        parts, asked, graded = [], [], []
        for refill in range(1 + t.max_refills):
            # 1. Sample.
            with timed(seconds, "time/sample"), model.gathered(policy):
                first = state["position"] + refill * t.prompts_per_step
                places = range(first, first + t.prompts_per_step)
                batch = [data.index_at(place, len(problems), config.seed) for place in places]
                keys = [(config.seed, Draw.SAMPLE, place) for place in places]
                parts.append(sample(policy, tokenizer, [prompts[i] for i in batch], keys, s))

            # 2. Reward.
            with timed(seconds, "time/reward"):
                asked += [problems[i] for i in batch for _ in range(s.group_size)]
                answers = zip(asked[len(graded) :], parts[-1].texts, parts[-1].mask.sum(1).tolist(), strict=True)
                graded += shared(judge, list(answers))
                verdicts, shaped = zip(*graded, strict=True)
                scores = torch.tensor([math.nan if v.score is None else v.score for v in verdicts])
                rewards = torch.tensor(shaped)
                usable = ~rewards.isnan().view(-1, s.group_size).any(1)
                passed = usable & keep_groups(scores, s.group_size, *a.keep_accuracy)
            if passed.sum() >= t.prompts_per_step or stop_requested():
                break
        rollout, kept = Rollout.cat(parts), passed & (passed.cumsum(0) <= t.prompts_per_step)  # not a refill's surplus
        rows = kept.repeat_interleave(s.group_size).nonzero()[:, 0]
        learned = rollout.pick(rows)

        # 3. Log-probs.
        with timed(seconds, "time/log_probs"):
            scored = (learned, s.temperature, t.micro_batch_tokens)
            old_log_probs, entropy = (
                (learned.sampler_log_probs, learned.sampler_entropy)
                if t.old_log_probs == "sampler"
                else model.rollout_log_probs(policy, *scored)
            )
            # Without a reference, a log-ratio of 0 everywhere: no step term.
            ref_log_probs = old_log_probs if reference is None else model.rollout_log_probs(reference, *scored)[0]

        if stop_requested():  # nothing has changed since the last step: drop this one
            break

        # 4. Advantage.
        batches = mini_batches(len(learned), config, step)
        if config.needs_prm:
            judged = (learned, scores[rows], ref_log_probs, batches[: len(batches) // t.epochs])  # each row once
            process_log_probs, prm_metrics = prime.score_and_learn(*trained["prm"], optimizer_step, config, *judged)
        else:
            process_log_probs, prm_metrics = old_log_probs, {}  # the policy itself says what each token was worth
        responses, by_line = learned.tokens[:, -learned.mask.shape[1] :], a.advantage in BY_LINE
        step_ids = line_ids(responses, learned.mask, tokenizer, a.line_end) if by_line else None
        group = (learned.mask, s.group_size, a.beta, step_ids)
        advantages = advantage_of(rewards[rows], process_log_probs, ref_log_probs, *group)
        if by_line and not step_ids.any():
            say(f"note: no response of this step holds algorithm.line_end={a.line_end!r}: each is one line")
        # All but the step term, where there are two: to log.
        outcome = None
        if a.advantage not in NOT_ADDITIVE:
            outcome = advantage_of(rewards[rows], old_log_probs, old_log_probs, *group)

        # 5. Update.
        due = t.diagnose_every and step % t.diagnose_every == 0 and outcome is not None
        diagnosis = compare_gradients(policy, config, learned, outcome, advantages - outcome) if due else {}
        with timed(seconds, "time/update"):
            lr, updates = learning_rate(step, t.steps, t.learning_rate, t.warmup_steps, t.schedule), []
            for chosen in batches:
                constants = (x[chosen] for x in (old_log_probs, advantages, ref_log_probs))
                losses = policy_losses(policy, config, learned.at(chosen), *constants, reference)
                updates.append(optimizer_step(policy, optimizer, lr, t.max_grad_norm, losses))
                advice = "lower train.learning_rate or algorithm.beta; metrics.jsonl shows the way here"
                check_refused(state, updates[-1], f"step {step}: {advice}")

        # 6. Log.
        seconds["time/step"] = time.perf_counter() - step_started
        seconds["time/verdict_max"] = max(v.seconds for v in verdicts)
        metrics = {
            "step": step,
            **sampling_metrics(rollout, scores, rewards, kept, s.group_size),
            **({"groups/sampled": len(kept)} if t.max_refills else {}),
            **token_metrics(learned, old_log_probs, ref_log_probs, entropy, outcome, advantages, reference is not None),
            **update_metrics(updates),
            **prm_metrics,
            **diagnosis,
            "lr": lr,
            **seconds,
            "tokens_per_second": int(rollout.mask.sum()) / seconds["time/step"],
            "memory/peak_gib": peak_gib(),
        }
        say(progress_line(step, t.steps, metrics))
        if step % t.dump_every == 0 or step in (1, t.steps):
            per_token = {"log_prob": old_log_probs, "entropy": entropy, "advantage": advantages}
            per_token |= {"ref_log_prob": ref_log_probs} if reference is not None else {}
            per_token |= {"prm_log_prob": process_log_probs} if config.needs_prm else {}
            per_token |= {"step_id": step_ids} if by_line else {}
            file = folder / "samples" / f"step_{step:06d}.jsonl"
            dump_rollout(file, tokenizer, rollout, s.group_size, asked, verdicts, rewards, rows, per_token)

        # 7. Evaluate and save.
        if step % config.eval.every == 0 or step == t.steps:
            state["after"] = evaluation()
            metrics |= state["after"]
            say(eval_line(metrics))
            if metrics["eval/accuracy"] > state["best"]["eval/accuracy"]:
                state["best"] = {"step": step, "eval/accuracy": metrics["eval/accuracy"]}
        append_line(folder / "metrics.jsonl", metrics)
        write_scalars(metrics)
        state |= {"step": step, "position": places.stop}
        if step % t.save_every == 0 or step == t.steps:
            save_checkpoint(folder, step, trained, state, t.keep_checkpoints)
        if stop_requested():
            break

    if state["step"] < t.steps:
        save_checkpoint(folder, state["step"], trained, state, t.keep_checkpoints)
        raise RunStopped(f"saved after step {state['step']} of {t.steps}; resume=true goes on", EXIT_STOPPED)


if __name__ == "__main__":
    command_line(main)
