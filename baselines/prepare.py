"""What some estimators need of a batch besides rewards and log-probs, made just before them.

Each thing is made where `estimator(...)` asks for it by name, and nothing else is. The list is in
docs/estimators.md.
"""

from dataclasses import replace

import torch

import baselines
from baselines import (
    a_star,
    answer,
    critic,
    needs,
    prime,
    prime_prefix,
    rto,
    steps,
    traces,
    tree,
    values,
)
from baselines.beside import load_beside
from infra.metrics import timed
from infra.rng import Draw, rng_for
from model import Policy
from rewards import Grader
from spro import Batch
from tasks import TRACES
from tasks.problem import Problem

# What a PRM learns by, where it is not PRIME's cross-entropy
PRM_LOSSES = {"prime_prefix": prime_prefix.prefix_loss, "rto": rto.pairwise_loss}


def check_config(config) -> None:
    """ValueError where a run's estimator is not known, or does not go with what else is asked."""
    baselines.check_advantage(config.algorithm.advantage)
    baselines.check_trace(config.algorithm.advantage, config.data.source)
    for baseline in (prime, tree, a_star):
        baseline.check(config)


def require_what_is_needed(config, policy: Policy, problems: list[Problem]) -> None:
    """Before anything runs: raises BadInput where the problems lack what the run's estimator needs.
    All ranks call it.
    """
    if needs(config.algorithm.advantage, "answer"):
        answer.require_answers(config, policy, problems)


def models_beside(config, path, device: torch.device) -> dict:
    """{name: (model, optimizer)} of what learns beside the policy, sharded; of most estimators
    nothing does. `path`: of the model that the policy starts from.
    """
    if config.learns_beside == "prm":
        return {"prm": load_beside(path, config, device, config.prime.learning_rate)}
    if config.learns_beside == "critic":
        return {"critic": critic.load_critic(path, config, device)}
    return {}


def prepared(
    learned: Batch,
    scores: torch.Tensor,
    trained: dict,
    config,
    mini_batches: list[torch.Tensor],
    step: int,
    grader: Grader,
) -> tuple[Batch, dict[str, float]]:
    """The batch with the fields that the run's estimator needs, and metrics of their making.

    scores [B]: the verdicts'. `trained` holds (Policy, optimizer) by name. `mini_batches`: lists of
    rows, as often as the update has epochs. `step`: of the run; what is drawn here depends on it.

    Where the task has a trace, every run has it: its dumps then say which steps were right.
    """
    algo = config.algorithm
    policy, _ = trained["policy"]
    metrics: dict[str, float] = {}

    def needed(what: str) -> bool:
        return needs(algo.advantage, what)

    if needed("steps") or needed("values"):
        learned = replace(learned, step_ids=steps.step_ids(learned, policy.tokenizer, algo))
    if config.data.source in TRACES and not tree.is_chosen(config):  # edges are no whole responses
        trace = TRACES[config.data.source]
        labels, numbers = traces.verified(learned, policy.tokenizer, trace)
        learned = replace(learned, step_labels=labels, trace_ids=numbers)
    if needed("luck"):
        luck = rng_for(config.seed, Draw.LUCK, step).random(len(learned))
        learned = replace(learned, luck=torch.from_numpy(luck))
    if needed("answer"):
        learned = answer.scored(policy, learned, config)
    if config.learns_beside:
        learned, metrics = taught(learned, scores, trained, config, mini_batches)
    if needed("values"):
        how = (config.values.continuations, config.sample, grader)
        key = (config.seed, Draw.CONTINUE, step)
        with timed(metrics, "time/values"):
            before, after, counts = values.continue_prefixes(
                policy, learned, learned.step_ids, *how, key
            )
        learned = replace(learned, values_before=before, values_after=after)
        metrics |= counts
    return learned, metrics


def taught(
    learned: Batch,
    scores: torch.Tensor,
    trained: dict,
    config,
    mini_batches: list[torch.Tensor],
) -> tuple[Batch, dict[str, float]]:
    """The batch with what the model beside the policy says of it while it learns from it, and the
    metrics of that. Arguments as for `prepared`.
    """
    name = config.algorithm.advantage
    once = mini_batches[: len(mini_batches) // config.train.epochs]  # each row once
    if config.learns_beside == "critic":
        # An estimator that reads `truncated` takes the reward of a cut response as unknown
        cut = learned.truncated
        ended = ~cut if needs(name, "truncated") else torch.ones_like(cut)
        values, metrics = critic.value_and_learn(*trained["critic"], config, learned, ended, once)
        return replace(learned, critic_values=values), metrics
    if name == "rto":
        once = rto.whole_groups(once, learned.group_size)
    loss_on = PRM_LOSSES.get(name, prime.cross_entropy_loss)
    log_probs, metrics = prime.score_and_learn(
        *trained["prm"], config, learned, scores, once, loss_on
    )
    return replace(learned, process_log_probs=log_probs), metrics
