"""SPRO training: the whole loop, in seven numbered stages. `grep -n "# [1-7]\\." train.py` is its
table of contents.

    python train.py                                              # configs/quickstart.yaml
    python train.py CONFIG.yaml algorithm.advantage=grpo seed=1  # key=value overrides the YAML
    python train.py CONFIG.yaml resume=true                      # go on where a run was cut off
    torchrun --nproc_per_node 8 train.py CONFIG.yaml             # one process per GPU

Every rank holds the step's whole Batch, which is small, and takes its decisions from all of it, so
that they cannot depend on the number of ranks; sampling, grading and the forward and backward
passes are divided. What a run leaves behind is listed in infra/run_folder.py.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import math
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import baselines
import data
import eval as evaluation
import model
import rewards
import sample
import spro
import tasks
from baselines import a_star, against_reference, diagnostics, supervised, tree
from baselines.a_star import AStarConfig
from baselines.critic import CriticConfig
from baselines.prepare import check_config, models_beside, prepared, require_what_is_needed
from baselines.prime import PrimeConfig
from baselines.supervised import WarmStartConfig
from baselines.tree import TreeConfig
from baselines.values import ValuesConfig
from data import DataConfig
from eval import EvalConfig
from infra import checkpoints, console, dumps, memory, metrics, processes, run_folder, sharding
from infra.config import Block, help_lines, knob, read_config, setting
from infra.errors import EXIT_STOPPED, BadInput, RunStopped, optional
from infra.rng import Draw
from infra.waiting import counted, timed_steps
from model import ModelConfig
from rewards import RewardConfig
from sample import SampleConfig
from spro import AlgorithmConfig
from tasks.problem import problems_hash

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "quickstart.yaml"
LOWER = "lower train.learning_rate or algorithm.beta; metrics.jsonl shows the way here"


# --- config ---------------------------------------------------------------------------------------


@dataclass
class TrainConfig(WarmStartConfig):  # and with it train.warm_start_*
    steps: int = knob(40, "RL steps: each samples, then learns from it", least=1, resume=True)
    prompts_per_step: int = knob(16, "prompts per step, each sampled group_size times", least=1)
    max_refills: int = knob(0, "further batches while fewer groups than that are kept", least=0)
    mini_batch_size: int = knob(32, "responses per optimizer step", least=1)
    micro_batch_tokens: int = setting(
        16384,
        "tokens per forward and backward pass: memory, no gradient",
        least=1,
        warm_start=True,
        rounds=True,
        lowers=dict.fromkeys(
            ("warm_start", "log_probs", "prm", "critic", "update"), "lower train.micro_batch_tokens"
        ),
    )
    old_log_probs: str = knob(
        "recompute",
        "of stage 3: recompute them, or keep the sampler's (one pass less; fp32 only)",
        choices=("recompute", "sampler"),
    )
    epochs: int = knob(1, "passes over a step's responses", least=1)
    learning_rate: float = knob(1e-4, "of AdamW", above=0)
    warmup_steps: int = knob(0, "steps over which the learning rate rises linearly", least=0)
    schedule: str = knob(
        "constant",
        "of the learning rate after that: constant, linear (to 0) or cosine (to 0)",
        choices=("constant", "linear", "cosine"),
    )
    adam_betas: tuple[float, float] = knob((0.9, 0.95), "of AdamW", warm_start=True)
    weight_decay: float = knob(0.0, "of AdamW", least=0, warm_start=True)
    max_grad_norm: float = knob(1.0, "longer gradients are scaled to it", above=0, warm_start=True)
    save_every: int = setting(20, "steps between checkpoints; the last step has one too", least=1)
    keep_checkpoints: int = setting(2, "checkpoints that are kept, the newest ones", least=1)
    timeout_minutes: float = setting(30.0, "a slower step prints where every rank stands", above=0)
    diagnose_every: int = setting(0, "steps between looks at gradient/cosine; 0: never", least=0)
    tensorboard: bool = setting(False, "metrics go to run_dir/tensorboard too")
    dump_every: int = setting(
        10, "steps between dumps to samples/; the first and last too", least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={list(self.adam_betas)} must lie in [0, 1)")


@dataclass
class Config(Block):
    seed: int = knob(0, "of everything random", least=0, compared=False)
    run_dir: str = setting("", "the run's folder; empty: runs/<config name>")
    resume: bool = setting(False, "go on at the newest checkpoint, or start if there is none")
    overwrite: bool = setting(False, "delete what an earlier run left in run_dir")
    dry_run: bool = setting(False, "check all, show prompts and memory needed, then stop")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    prime: PrimeConfig = field(default_factory=PrimeConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    values: ValuesConfig = field(default_factory=ValuesConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    a_star: AStarConfig = field(default_factory=AStarConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self):
        """What blocks demand of each other; ValueError where it does not hold."""
        super().__post_init__()
        t, s = self.train, self.sample
        check_config(self)
        if self.resume and self.overwrite:
            raise ValueError(
                "resume=true goes on with what is in run_dir, overwrite=true deletes it: "
                "give one of them"
            )
        samples = self.samples_per_prompt
        responses = t.prompts_per_step * samples
        if responses % t.mini_batch_size:
            raise ValueError(
                f"{t.prompts_per_step} prompts x {samples} samples = {responses} responses "
                f"do not divide into mini-batches of train.mini_batch_size={t.mini_batch_size}"
            )
        if not self.model.path and self.data.source not in tasks.TOKENIZERS:
            source = self.data.source
            raise ValueError(
                f"model.path is empty: a model from scratch cannot learn data.source={source!r}"
            )
        size, held_out = self.data.train_size, self.data.held_out_size
        if 0 < size < t.prompts_per_step:
            raise ValueError(
                f"train.prompts_per_step={t.prompts_per_step} > data.train_size={size}"
            )
        if self.eval.prompts > held_out:
            raise ValueError(f"eval.prompts={self.eval.prompts} > data.held_out_size={held_out}")
        if self.reward.overlong_buffer > s.max_new_tokens:
            raise ValueError(
                f"reward.overlong_buffer={self.reward.overlong_buffer} > "
                f"sample.max_new_tokens={s.max_new_tokens}: every response would be penalized"
            )

    @property
    def samples_per_prompt(self) -> int:
        return tree.samples_per_prompt(self)

    @property
    def warms_up(self) -> bool:
        """Whether supervised learning comes before RL."""
        return not self.model.path or self.train.warm_start == "always"

    @property
    def reads_reference(self) -> bool:
        """Whether the estimator's formula has the reference in it."""
        return baselines.needs(self.algorithm.advantage, "reference")

    @property
    def learns_beside(self) -> str | None:
        return baselines.learns_beside(self.algorithm.advantage)

    @property
    def needs_values(self) -> bool:
        return baselines.needs(self.algorithm.advantage, "values")

    @property
    def needs_reference(self) -> bool:
        """Whether a reference is loaded: not where its log-ratios would count for nothing."""
        return self.algorithm.kl_coef != 0 or (self.algorithm.beta != 0 and self.reads_reference)


# --- the loop -------------------------------------------------------------------------------------


def train(
    config: Config, folder: Path, trained, reference, grader, train_set, eval_set, state: dict
) -> None:
    """The loop. `trained` holds (Policy, optimizer) by name: "policy", maybe "prm" or "critic".

    `state` is what a checkpoint holds besides tensors; it moves on at the end of a step.
    """
    t, s, a = config.train, config.sample, config.algorithm
    policy, optimizer = trained["policy"]
    tokenizer = policy.tokenizer
    averaging = (a.loss_weights, s.max_new_tokens)
    clip = (a.clip_low, a.clip_high)
    write_scalars = metrics.tensorboard(
        folder, state["step"] if state["before"] else -1, t.tensorboard
    )

    if state["before"] is None:
        evaluate_start(config, folder, policy, eval_set, grader, state, write_scalars)

    for step in timed_steps(state["step"] + 1, t.steps, config.eval.every):
        processes.restart_watchdog(t.timeout_minutes)
        step_started = time.perf_counter()
        seconds: dict[str, float] = {}
        position = state["position"]

        # 1. Sample.
        # Prompts and luck are functions of (seed, position): a resumed run, or one on other ranks,
        # meets the same ones. The sampler keeps the log-probs it drew with, for stage 3 to compare.
        with metrics.timed(seconds, "time/sample"):
            batch = sample_prompts(policy, train_set, position, config)
        position += t.prompts_per_step

        # 2. Reward.
        # A grader's fault is no zero: a response without a verdict drops its whole group, and is
        # counted. So are groups that say nothing, if keep_accuracy is so; refills replace them.
        with metrics.timed(seconds, "time/reward"):
            batch = grade_batch(batch, grader, s.max_new_tokens)
        kept = groups_to_learn_from(batch, a.keep_accuracy)
        if t.max_refills:
            sources = (policy, train_set, grader)
            batch, kept, position = refill(batch, kept, position, sources, config, seconds)
        rows = kept.repeat_interleave(s.group_size).nonzero()[:, 0]
        learned = batch.select(rows).trim()
        scores = scores_of(batch)

        # 3. Log-probs.
        # Of the weights that sampled, at the sampler's temperature: the "old" ones of the loss, and
        # half of the process reward. Their gap to the sampler's, logged, must be numerical noise.
        with metrics.timed(seconds, "time/log_probs"):
            log_probs, entropy = learned.sampler_log_probs, learned.sampler_entropy
            how = (learned, s.temperature, t.micro_batch_tokens)
            if t.old_log_probs == "recompute":
                log_probs, entropy = model.batch_log_probs(policy, *how)
            learned = replace(learned, log_probs=log_probs, entropy=entropy)
            learned = against_reference.scored(policy, reference, learned, config)

        if processes.stop_requested():  # nothing has changed since the last step: drop this one
            break

        # 4. Advantage.
        # One per token, and fixed from here on. This is the only stage that knows which algorithm
        # runs; what some baselines need besides log-probs is made just before.
        batches = data.mini_batches(len(learned), config, step)
        learned, extra = prepared(learned, scores[rows], trained, config, batches, step, grader)
        learned = replace(learned, advantages=baselines.advantage(a.advantage, learned, a))
        outcome = baselines.outcome_term(a.advantage, learned, a)  # all but the step term: to log

        diagnosis: dict[str, float] = {}
        if t.diagnose_every and step % t.diagnose_every == 0 and outcome is not None:
            diagnosis = diagnostics.compare_gradients(policy, config, learned, outcome)

        # 5. Update.
        # Every token's weight is fixed from the whole optimizer step, over all ranks, before its
        # first backward: losses and statistics are sums, and no split into micro-batches or ranks
        # changes them. FSDP averages over ranks; ours are parts of one sum, hence x world_size.
        with metrics.timed(seconds, "time/update"):
            lr = model.learning_rate(step, t.steps, t.learning_rate, t.warmup_steps, t.schedule)
            model.set_learning_rate(optimizer, lr)
            kl_reference = reference if a.kl_coef and a.kl_estimator == "exact" else None
            updates = []
            for chosen in counted(batches, "optimizer step"):
                mini = learned.select(chosen)
                tokens = int(mini.mask.sum())
                weights = spro.token_weights(mini.mask, len(mini), tokens, *averaging)
                mini = replace(mini, weights=weights)
                sums = metrics.StepSums(weights.sum())
                for _, micro in model.micro_batches(policy, mini, t.micro_batch_tokens):
                    new = model.token_log_probs(policy, micro, s.temperature, kl_reference)
                    terms = (micro.log_probs, micro.advantages, micro.weights)
                    loss, stats = spro.policy_loss(new.log_probs, *terms, *clip)
                    if a_star.is_chosen(config):  # it fits whole responses, and clips nothing
                        loss = a_star.regression_loss(new.log_probs, micro, a.beta)
                    if a.kl_coef:
                        kl = against_reference.kl_term(new, micro, a.kl_estimator)
                        loss = loss + a.kl_coef * kl
                        stats["kl/loss"] = kl.detach()
                    if t.old_log_probs == "sampler":
                        stats["sampler_gap"] = metrics.largest_gap(new.log_probs, micro)
                    (loss * processes.world_size()).backward()
                    sums.add(loss, stats)
                if kl_reference is not None:
                    sharding.reshard(kl_reference)

                # A gradient that is not finite is refused: nothing changes, and it is counted.
                grad_norm = sharding.clip_gradients(policy, t.max_grad_norm)
                taken = math.isfinite(grad_norm)
                if taken:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                updates.append(sums.over_ranks() | {"grad_norm": grad_norm} if taken else {})
                metrics.check_refused(state, updates[-1], f"step {step}: {LOWER}")

        # 6. Log.
        # The loss sits near 0 by construction: reward, entropy, KL and length say how a run is.
        seconds["time/step"] = time.perf_counter() - step_started
        row = {"step": step, **metrics.sampling_metrics(batch, scores, kept)}
        row |= tree.response_metrics(batch)
        if t.max_refills:
            row["groups/sampled"] = len(kept)
        row |= metrics.token_metrics(learned, outcome)
        row |= metrics.update_metrics(updates) | extra | diagnosis
        row |= {"lr": lr, **metrics.cost_metrics(batch, seconds)}
        processes.print0(console.progress_line(step, t.steps, row))
        if step % t.dump_every == 0 or step in (1, t.steps):
            file = folder / "samples" / f"step_{step:06d}.jsonl"
            dumps.dump_rollout(file, tokenizer, batch, learned, rows)

        # 7. Evaluate and save.
        # The row of a step is on disk before its checkpoint is: none outlives its metrics.
        if step % config.eval.every == 0 or step == t.steps:
            state["after"] = evaluate(config, policy, eval_set, grader)
            row |= state["after"]
            if row["eval/accuracy"] > state["best"]["eval/accuracy"]:
                state["best"] = {"step": step, "eval/accuracy": row["eval/accuracy"]}
        run_folder.append_line(folder / "metrics.jsonl", row)
        write_scalars(row)
        state |= {"step": step, "position": position}
        if step % t.save_every == 0 or step == t.steps:
            checkpoints.save_checkpoint(folder, step, trained, state, t.keep_checkpoints)
        if processes.stop_requested():
            break

    if state["step"] < t.steps:
        checkpoints.save_checkpoint(folder, state["step"], trained, state, t.keep_checkpoints)
        raise RunStopped(
            f"saved after step {state['step']} of {t.steps}; resume=true goes on", EXIT_STOPPED
        )


# --- parts of a step ------------------------------------------------------------------------------


def sample_prompts(policy: model.Policy, train_set, position: int, config: Config) -> spro.Batch:
    """Responses to the prompts at `position` of the run and after it, with what was asked."""
    problems, prompts = train_set
    positions = range(position, position + config.train.prompts_per_step)
    chosen = [data.prompt_index(p, len(problems), config.seed) for p in positions]
    keys = [(config.seed, Draw.SAMPLE, p) for p in positions]
    with sharding.unsharded(policy):
        if tree.is_chosen(config):
            return tree.sample_trees(policy, train_set, chosen, keys, config)
        batch = sample.sample(policy, [prompts[i] for i in chosen], keys, config.sample)
    asked = tuple(problems[i] for i in chosen for _ in range(batch.group_size))
    return replace(batch, problems=asked)


def grade_batch(batch: spro.Batch, grader: rewards.Grader, max_new_tokens: int) -> spro.Batch:
    """The batch with its verdicts, and the rewards that training uses; the ranks share the work."""
    if batch.paths:
        return tree.graded(batch, grader, max_new_tokens)
    lengths = batch.mask.sum(1).tolist()
    answers = list(zip(batch.problems, batch.texts, lengths, strict=True))
    judged = processes.map_over_ranks(lambda part: grader.judge(part, max_new_tokens), answers)
    verdicts, rewards = zip(*judged, strict=True)
    return replace(batch, verdicts=verdicts, rewards=torch.tensor(rewards))


def scores_of(batch: spro.Batch) -> torch.Tensor:
    """The verdicts' scores [B], NaN where a grader failed."""
    scores = [verdict.score for verdict in batch.verdicts]
    return torch.tensor([math.nan if score is None else score for score in scores])


def groups_to_learn_from(batch: spro.Batch, keep_accuracy: tuple[float, float]) -> torch.Tensor:
    """bool [B / G]: every response has a reward, and the mean verdict lies in the range."""
    usable = ~batch.rewards.isnan().view(-1, batch.group_size).any(1)
    if batch.paths:
        usable &= tree.differ_enough(batch)
    return usable & spro.keep_groups(scores_of(batch), batch.group_size, *keep_accuracy)


def refill(batch: spro.Batch, kept, position: int, sources, config: Config, seconds: dict):
    """Further batches while too few groups are kept, DAPO's dynamic sampling (arXiv 2503.14476).

    -> the whole batch, which groups are kept, and the position after it. Of a surplus the first
    ones count, so that a step never grows.
    """
    policy, train_set, grader = sources
    wanted = config.train.prompts_per_step
    for _ in range(config.train.max_refills):
        if kept.sum() >= wanted or processes.stop_requested():
            break
        with metrics.timed(seconds, "time/sample"):
            more = sample_prompts(policy, train_set, position, config)
        position += wanted
        with metrics.timed(seconds, "time/reward"):
            more = grade_batch(more, grader, config.sample.max_new_tokens)
        batch = spro.Batch.cat([batch, more])
        kept = groups_to_learn_from(batch, config.algorithm.keep_accuracy)
    return batch, kept & (kept.cumsum(0) <= wanted), position


def evaluate(
    config: Config, policy: model.Policy, eval_set, grader: rewards.Grader
) -> dict[str, float]:
    """Held-out accuracy, sampled and greedy, said and returned."""
    with sharding.unsharded(policy):
        row = evaluation.evaluate(policy, *eval_set, config.sample, grader, config.seed)
    processes.print0(evaluation.eval_line(row))
    return row


def evaluate_start(
    config: Config, folder: Path, policy: model.Policy, eval_set, grader, state: dict, write_scalars
) -> None:
    """Row 0 of the metrics: what RL starts from."""
    processes.restart_watchdog(config.train.timeout_minutes)
    state["before"] = evaluate(config, policy, eval_set, grader)
    state["best"] = {"step": 0, "eval/accuracy": state["before"]["eval/accuracy"]}
    run_folder.append_line(folder / "metrics.jsonl", {"step": 0, **state["before"]})
    write_scalars({"step": 0, **state["before"]})


# --- before the loop ------------------------------------------------------------------------------


def load_or_build(config: Config) -> model.Policy:
    """The policy as configured; for a dry run its shapes alone."""
    if config.model.path:
        how = {"empty": config.dry_run, "in_shares": sharding.is_split()}
        return model.load(config.model.path, config.model.attention, **how)
    tokenizer = tasks.TOKENIZERS[config.data.source]()
    with torch.device("meta" if config.dry_run else "cpu"):
        return model.build(config.model, tokenizer, config.seed)


def main() -> None:
    started = time.perf_counter()
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__, "Keys:", *help_lines(Config), sep="\n  ")
        return
    config = read_config(Config, sys.argv[1:], DEFAULT_CONFIG)
    device = processes.start_processes(config.train.timeout_minutes, config.model.deterministic)
    dtype = sharding.compute_dtype(config.model, device.type == "cuda")
    if config.train.old_log_probs == "sampler" and dtype != torch.float32:
        raise BadInput(
            "train.old_log_probs=sampler: sums of its log-ratios would be noise unless "
            "model.dtype=float32"
        )
    if config.train.tensorboard:  # now, not after the warm start
        optional("torch.utils.tensorboard", "tensorboard")
    grader = rewards.Grader(config.reward)
    train_problems, held_out = data.load_problems(config.data, config.seed, grader)
    policy = load_or_build(config)
    processes.choose_threads(policy.num_parameters())
    longest = sample.context_left(
        policy, config.sample.max_new_tokens, config.data.max_prompt_tokens
    )
    limits = (longest, config.data.chat_template, policy.known_ids)
    train_set = data.encode_prompts(train_problems, policy.tokenizer, *limits)
    held_out_set = data.encode_prompts(held_out, policy.tokenizer, *limits)
    require_what_is_needed(config, policy, train_set[0])
    taught = supervised.demonstrated(config, train_set, policy.tokenizer)
    eval_set = [part[: config.eval.prompts] for part in held_out_set]
    generation = sample.generation_settings(policy, config.sample).to_diff_dict()
    generation.pop("transformers_version", None)
    policy.device = device
    layers = sharding.decoder_layers(policy)
    together = memory.batch_tokens(config, policy.model, layers, train_set[1], device)
    how = (len(eval_set[0]), grader, generation, together)
    processes.print0(console.describe(config, policy, train_set[0], *how))
    if config.dry_run:
        processes.print0(memory.dry_run_report(config, policy, layers, train_set[1], together))
        return

    sharding.shard_size(config.model)  # before anything is written
    processes.catch_signals()
    folder = run_folder.open_run_folder(config)
    config.sample.batch_tokens = together  # the run folder keeps what was asked
    policy, reference, start_hash = supervised.start_models(config, folder, device, policy, taught)
    trained = {"policy": (policy, model.make_optimizer(policy, config.train))}
    trained |= models_beside(config, supervised.start_path(config, folder), device)
    problems = {"training": problems_hash(train_set[0]), "held-out": problems_hash(held_out_set[0])}
    state = checkpoints.resume(config.resume, folder, trained, start_hash, problems)
    if state["step"] >= config.train.steps and (folder / "model").exists():
        processes.print0(f"{folder} is finished: {state['step']} steps; raise train.steps to go on")
        return
    if state["step"] < config.train.steps:  # an earlier end of this run is not the end any more
        processes.on_first_rank(lambda: shutil.rmtree(folder / "model", ignore_errors=True))
    train_set = a_star.with_values(config, folder, reference, train_set, grader, state)
    train(config, folder, trained, reference, grader, train_set, eval_set, state)
    model.save(policy, folder / "model")
    processes.print0(console.summary(config, folder, state, time.perf_counter() - started))


if __name__ == "__main__":
    processes.command_line(main, Config)
