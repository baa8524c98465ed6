"""What SPRO is compared with: outcome-only estimators, ablations of SPRO, PRIME, PPO, others that
read log-ratios, sampled values, an oracle, trees, a regression.

`ADVANTAGES` is the whole table of `algorithm.advantage`. A new estimator is one function in one of
the files here, marked by `estimator`, and named by what stands before `_advantage`.
"""

from dataclasses import replace

import torch

import spro
from baselines import (
    a_star,
    ablations,
    critic,
    oracle,
    outcome_only,
    prime,
    prime_prefix,
    relatives,
    rto,
    tree,
    values,
)
from spro import AlgorithmConfig, Batch
from tasks import TRACES


def estimators_in(module) -> dict:
    """name -> function, of all estimators that a module defines."""
    functions = {
        name.removesuffix("_advantage"): f
        for name, f in vars(module).items()
        if callable(f) and hasattr(f, "needs")
    }
    return {name: f for name, f in functions.items() if f.__module__ == module.__name__}


ADVANTAGES = spro.ADVANTAGES | {
    name: function
    for module in (
        outcome_only,
        ablations,
        relatives,
        prime,
        prime_prefix,
        rto,
        critic,
        values,
        oracle,
        tree,
        a_star,
    )
    for name, function in estimators_in(module).items()
}


def check_advantage(name: str) -> None:
    """Raise ValueError if there is no such estimator."""
    if name not in ADVANTAGES:
        raise ValueError(
            f"algorithm.advantage={name!r} is not known: choose one of {', '.join(ADVANTAGES)}"
        )


def check_trace(name: str, source: str) -> None:
    """Raise ValueError if the estimator needs verified steps and the task `source` has none."""
    if needs(name, "trace") and source not in TRACES:
        raise ValueError(
            f"algorithm.advantage={name} reads which steps of a response are right, and "
            f"data.source={source!r} does not verify them: choose one of {', '.join(TRACES)}"
        )


def advantage(name: str, batch: Batch, algo: AlgorithmConfig) -> torch.Tensor:
    """The door to every estimator: the advantage of each token, without gradient, 0 where masked.
    -> [B, T].

    Raises ValueError on a name that is not known, and where the batch lacks what the estimator
    needs.
    """
    check_advantage(name)
    estimate = ADVANTAGES[name]
    if not hasattr(estimate, "needs"):  # put into the table without the mark that does this
        estimate = spro.estimator()(estimate)
    return estimate(batch, algo)


def outcome_term(name: str, batch: Batch, algo: AlgorithmConfig) -> torch.Tensor | None:
    """The advantage without its step term, [B, T]: what is left where every log-ratio is 0 and no
    step changes a value. To log, and to compare.

    None where the estimator is no sum of two such terms.
    """
    if not getattr(ADVANTAGES[name], "additive", True):
        return None
    same = batch.policy_log_probs
    silent = replace(batch, ref_log_probs=same, answer_log_probs=same, process_log_probs=None)
    silent = replace(silent, values_after=batch.values_before)
    return advantage(name, silent, algo)


def learns_beside(name: str) -> str | None:
    """The model that learns beside the policy for an estimator: "prm", "critic" or none."""
    return next((model for model in ("prm", "critic") if needs(name, model)), None)


def needs(name: str, what: str) -> bool:
    """Whether the estimator needs `what`: the words are in spro.estimator."""
    return what in getattr(ADVANTAGES[name], "needs", ())
