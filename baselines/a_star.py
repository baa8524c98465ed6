"""A*-PO (arXiv 2505.20686): the log-ratio to the reference is fitted to the optimal advantage.

    V*(x)    = beta1 log mean exp(r / beta1)              over N responses of the reference to x
    A*(x, y) = r(y) - V*(x)
    loss     = mean (beta2 log(pi(y) / pi_ref(y)) - A*)^2     over responses y of the policy

With beta1 = beta2 and V* exact, the policy of least loss is pi_ref exp(r / beta2), normalised: the
optimum of E[r] - beta2 KL(pi || pi_ref). There beta2 log(pi / pi_ref) is the optimal advantage;
SPRO takes it for that all along.

beta2 is `algorithm.beta`, beta1 and N are `a_star.beta` and `a_star.samples`. V* is made before RL,
for the prompts that the run will meet, and kept in its folder. The paper draws one response per
prompt; here all G siblings are fitted, each by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import baselines
from data import prompt_index
from infra.config import Block, knob
from infra.errors import EXIT_STOPPED, RunStopped, enough_memory
from infra.processes import map_over_ranks, print0, restart_watchdog, stop_requested
from infra.rng import Draw
from infra.run_folder import append_line, keep_rows
from infra.sharding import unsharded
from infra.waiting import counted, stage
from model import Policy
from rewards import Grader
from sample import sample
from spro import AlgorithmConfig, Batch, at_least_fp32, estimator

UNREAD = ("clip_low", "clip_high", "loss_weights", "kl_coef", "process_dtype")  # of algorithm


@dataclass
class AStarConfig(Block):
    samples: int = knob(8, "a_star: responses of the reference to a prompt, before RL", least=1)
    beta: float = knob(0.5, "beta1, of V* = beta1 log mean exp(r / beta1) over these", above=0)


def is_chosen(config) -> bool:
    """Whether a run's loss is the regression."""
    return baselines.needs(config.algorithm.advantage, "v_star")


def check(config) -> None:
    """ValueError where another key asks a run for what the regression does not have."""
    if not is_chosen(config):
        return
    name, algo = f"algorithm.advantage={config.algorithm.advantage}", config.algorithm
    if algo.beta <= 0:
        raise ValueError(f"{name} needs algorithm.beta above 0: it is beta2, published 1e-3")
    for key in UNREAD:
        value, default = getattr(algo, key), getattr(AlgorithmConfig, key)
        if value != default:
            raise ValueError(
                f"{name} takes no algorithm.{key}={value}: its loss is a regression on whole "
                f"responses, which has none; leave it at {default}"
            )
    if config.train.max_refills:
        raise ValueError(
            f"{name} takes no train.max_refills={config.train.max_refills}: V* is made before RL, "
            "when it is not known how many prompts refills will take; set it to 0"
        )


# --- the advantage, and the loss ------------------------------------------------------------------


@estimator("reference", "v_star")
def a_star_advantage(batch, algo):
    """A*-PO: the optimal advantage r - V*. The reference is read by the loss alone."""
    rewards = at_least_fp32(batch.rewards)
    known = [problem.v_star for problem in batch.problems or ()]
    if len(known) != len(rewards) or None in known:
        raise ValueError("a_star_advantage needs v_star in its problems")
    v_star = rewards.new_tensor(known)
    return (rewards - v_star)[:, None]


def regression_loss(log_probs: torch.Tensor, batch: Batch, beta: float) -> torch.Tensor:
    """Mean over responses of `(beta x sum_t log(pi / pi_ref) - A*)^2`, as a weighted sum: parts of
    an optimizer step add up.

    log_probs [B, T] are those of the policy as it stands, and carry the gradient. A response weighs
    what its tokens do together, which is 1 / N. Its A* is `advantages` at any token.
    """
    live = batch.weights != 0
    log_ratio = at_least_fp32(log_probs) - at_least_fp32(batch.ref_log_probs)
    fitted = beta * torch.where(live, log_ratio, 0.0).sum(1)
    weights = batch.weights.sum(1).to(fitted.dtype)
    return (weights * (fitted - batch.advantages[:, 0]).square()).sum()


# --- V*, before RL --------------------------------------------------------------------------------


def optimal_values(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """V* = beta log mean exp(r / beta) of rewards [B, N] -> float64 [B].

    Of responses that have a reward: NaN is none, and where all are, so is V*.
    """
    found = ~rewards.isnan()
    scaled = torch.where(found, rewards.double() / beta, -torch.inf)
    return beta * (scaled.logsumexp(1) - found.sum(1).double().log())


def with_values(
    config, folder: Path, reference: Policy | None, train_set, grader: Grader, state: dict
) -> tuple:
    """The training set. Where a run needs V*, each problem that it will meet holds its own.

    FOLDER/v_star.jsonl has a line for the prompts that are new in a step. What stands there is not
    made again, unless it is of another reference or of other problems, by the hashes in `state`.
    """
    if not is_chosen(config):
        return train_set
    problems, prompts = train_set
    file = folder / "v_star.jsonl"
    origin = {"reference": state["start_hash"], "problems": state["problems"]["training"]}
    rows = keep_rows(file, lambda row: row["of"] == origin)
    values = {i: v for row in rows for i, v in zip(row["prompts"], row["v_star"], strict=True)}
    missing = new_prompts(config, len(problems), set(values))
    for chosen, found, tokens in sampled_values(config, reference, train_set, grader, missing):
        line = {"of": origin, "prompts": chosen, "v_star": found, "tokens": tokens}
        append_line(file, line)
        values |= zip(chosen, found, strict=True)
    problems = list(problems)
    for i, value in values.items():
        problems[i] = replace(problems[i], v_star=value)
    return problems, prompts


def sampled_values(
    config, reference: Policy, train_set, grader: Grader, missing: list[list[int]]
) -> Iterator[tuple[list[int], list[float], int]]:
    """(numbers of problems, their V*, tokens sampled for them), one list of `missing` after the
    other. Raises RunStopped where the run is told to stop.
    """
    if not missing:
        return
    problems, prompts = train_set
    n = sum(map(len, missing))
    print0(f"V*: {config.a_star.samples} responses of the reference to each of {n} prompts")
    with enough_memory("sample"), stage("V*"), unsharded(reference):
        for chosen in counted(missing, "step"):
            restart_watchdog(config.train.timeout_minutes)
            asked = [problems[i] for i in chosen], [prompts[i] for i in chosen]
            rewards, tokens = rewards_of(reference, *asked, chosen, grader, config)
            yield chosen, optimal_values(rewards, config.a_star.beta).tolist(), tokens
            if stop_requested():
                raise RunStopped(
                    "told to stop while V* was made; resume=true goes on there", EXIT_STOPPED
                )


def new_prompts(config, size: int, known: set[int]) -> list[list[int]]:
    """Which of `size` training problems each step of a run is the first to meet, without those that
    are known and without steps that meet none.
    """
    n, seen, new = config.train.prompts_per_step, set(known), []
    for start in range(0, config.train.steps * n, n):
        if len(seen) == size:  # all are known, however many steps follow
            break
        met = [prompt_index(p, size, config.seed) for p in range(start, start + n)]
        new.append([i for i in dict.fromkeys(met) if i not in seen])
        seen |= set(met)
    return [indices for indices in new if indices]


def rewards_of(
    reference: Policy, problems: list, prompts: list, numbers: list[int], grader: Grader, config
) -> tuple[torch.Tensor, int]:
    """(rewards [prompts, N] of responses that the reference gives, NaN without a verdict; the
    tokens of these responses).

    Their luck depends on the problems' numbers in the training set. Raises RunStopped where a
    problem has no verdict at all, and so no V*.
    """
    n, limit = config.a_star.samples, config.sample.max_new_tokens
    keys = [(config.seed, Draw.V_STAR, i) for i in numbers]
    batch = sample(reference, prompts, keys, config.sample, group_size=n)
    asked = [problem for problem in problems for _ in range(n)]
    answers = list(zip(asked, batch.texts, batch.mask.sum(1).tolist(), strict=True))
    judged = map_over_ranks(lambda part: grader.judge(part, limit), answers)
    rewards = torch.tensor([reward for _, reward in judged]).view(-1, n)
    without = rewards.isnan().all(1).nonzero().flatten().tolist()
    if without:
        verdict, _ = judged[without[0] * n]
        raise RunStopped(
            f"no response of the reference to training prompt {numbers[without[0]]} has a verdict, "
            f"and so there is no V*: {verdict.reason}"
        )
    return rewards, int(batch.mask.sum())
