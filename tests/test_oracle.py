"""The estimators that know the first wrong step, and their controls, against slow loops over their definitions."""

import math
from collections import Counter

import baselines
import pytest
import spro
import torch

from test_spro import G, assert_equal, batch_of, estimate, make_batch, padded, ragged, slow_outcome


def case(seed: int, binary: bool):
    b = make_batch(seed)
    if binary:
        b.rewards = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1]).double()
    return b


seeds_and_rewards = pytest.mark.parametrize(("seed", "binary"), [(s, x) for s in range(4) for x in (False, True)])


@seeds_and_rewards
def test_blame_falls_where_the_definition_says(seed, binary):
    b = case(seed, binary)
    outcome, labels = slow_outcome(b.rewards.tolist()), ragged(b.labels, b.mask)
    expected = {"oracle": [], "random_blame": [], "positives": []}
    for i, row in enumerate(labels):
        n, length = row.count(0), len(row)
        first = math.floor(b.luck[i].item() * (length - n + 1))
        places = {
            "oracle": [t for t in range(length) if row[t] == 0],
            "random_blame": list(range(first, first + n)),
            "positives": [],
        }
        for name, blamed in places.items():
            wrong = b.rewards[i] <= 0.5 and outcome[i] < 0 and (n > 0 or name == "positives")
            kept = blamed if wrong else range(length)
            expected[name].append([outcome[i] if t in kept else 0.0 for t in range(length)])
    for name, rows in expected.items():
        assert_equal(estimate(name, b), padded(rows))
    assert any(0 in row for row in labels) and any(0 not in row for row in labels)


@seeds_and_rewards
def test_praise_falls_on_every_right_step_and_blame_on_the_first_wrong_one(seed, binary):
    b = case(seed, binary)
    outcome, rows = slow_outcome(b.rewards.tolist()), []
    for i, labels in enumerate(ragged(b.labels, b.mask)):
        siblings = [outcome[j] for j in range(len(outcome)) if j // G == i // G]
        rows.append([{1: max(siblings), 0: min(siblings), -1: 0.0}[label] for label in labels])
    assert_equal(estimate("step_oracle", b), padded(rows))


@seeds_and_rewards
def test_posterior_grpo_adds_the_fraction_of_right_steps_to_right_answers(seed, binary):
    b, rewards = case(seed, binary), []
    for r, labels, ids in zip(b.rewards.tolist(), ragged(b.labels, b.mask), ragged(b.trace, b.mask), strict=True):
        steps = dict(zip(ids, labels, strict=True))  # the number of a step -> its label
        rewards.append(r + (r > 0.5) * [*steps.values()].count(1) / len(steps))
    outcome = slow_outcome(rewards)
    rows = [[outcome[i]] * len(row) for i, row in enumerate(ragged(b.labels, b.mask))]
    assert_equal(estimate("posterior_grpo", b), padded(rows))


def test_right_answers_of_one_group_are_told_apart_by_their_steps_alone():
    b = make_batch()
    b.rewards[:] = 1.0
    assert not estimate("grpo", b).any() and estimate("posterior_grpo", b).any()
    b.labels[:] = 1
    assert not estimate("posterior_grpo", b).any()
    b.rewards[:] = 0.0
    assert not estimate("posterior_grpo", b).any()


def test_every_place_has_the_same_chance_of_random_blame_and_holds_as_many_tokens():
    n, tokens, blamed = 1000, 7, 3
    labels = torch.tensor([[1, 1, 0, 0, 0, -1, -1], [1] * 7]).repeat(n, 1)
    batch = spro.Batch(
        mask=torch.ones(2 * n, tokens).bool(),
        rewards=torch.tensor([0.0, 1.0]).repeat(n),
        step_labels=labels,
        luck=(torch.arange(2 * n) / (2 * n)).double(),
        group_size=2,
    )
    rows = baselines.advantage("random_blame", batch, spro.AlgorithmConfig())[::2]
    starts = Counter()
    for row in rows:
        (places,) = row.nonzero(as_tuple=True)
        assert places.tolist() == list(range(places[0], places[0] + blamed))
        starts[places[0].item()] += 1
    assert starts == dict.fromkeys(range(tokens - blamed + 1), n // (tokens - blamed + 1))


def test_without_a_known_wrong_step_the_oracle_and_its_control_are_grpo():
    b = make_batch()
    b.labels[b.labels == 0] = -1
    for name in ("oracle", "random_blame"):
        assert estimate(name, b).equal(estimate("grpo", b))
    assert batch_of(b).step_labels is b.labels
