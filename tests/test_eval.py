"""Intervals, held-out accuracy and a step's metrics, against the textbook and slow loops."""

import dataclasses
import math
import random
import statistics

import eval as eval_module
import pytest
import torch
from data import DataConfig, encode_prompts, load_problems
from eval import evaluate
from infra.errors import RunStopped
from infra.metrics import sampling_metrics, token_metrics
from rewards import GRADERS, Grader, RewardConfig
from rewards.benchmark_metrics import wilson_interval
from sample import SampleConfig, sample
from spro import Batch
from tasks.chain import chain_solution, chain_tokenizer

from helpers import PROMPTS, keys, tiny_model

CONFIG = SampleConfig(max_new_tokens=9, temperature=0.8)
TOKENIZER = chain_tokenizer()


@pytest.fixture(scope="module")
def held_out():
    return encode_prompts(load_problems(DataConfig(train_size=1, held_out_size=30), 0)[1], TOKENIZER, 100)


@pytest.fixture(scope="module")
def rollout():
    """3 groups of 4."""
    return sample(tiny_model(), PROMPTS[:3], keys(3), SampleConfig(group_size=4, max_new_tokens=30))


@pytest.mark.parametrize("n", [1, 2, 7, 50, 256, 1023, 5000])
def test_the_interval_is_wilsons_and_stays_between_0_and_1(n):
    for right in {0, 1, n // 3, n - 1, n}:
        z, p = 1.96, right / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = wilson_interval(right, n)
        assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-12)
        assert -1e-12 <= low < high <= 1 + 1e-12


@pytest.mark.parametrize("p", [0.03, 0.3, 0.5, 0.97])
def test_the_interval_covers_the_truth_at_about_its_rate(p):
    generator = random.Random(0)
    intervals = [wilson_interval(sum(generator.random() < p for _ in range(100)), 100) for _ in range(2000)]
    assert 0.92 < statistics.mean(low <= p <= high for low, high in intervals) < 0.98


def test_evaluating_twice_gives_identical_metrics_and_another_seed_or_model_others(held_out):
    first, again, *others = (
        evaluate(tiny_model(seed=weights), *held_out, CONFIG, Grader(), seed)
        for weights, seed in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again and 1 <= first["eval/response_length"] <= 9 and first["eval/n"] == 30
    assert all(first["eval/response_length"] != other["eval/response_length"] for other in others)


def test_accuracy_is_the_mean_score_sampled_and_greedy_apart_and_faults_count_nowhere(held_out, monkeypatch):
    problems, prompts = held_out
    right = [chain_solution(problem.prompt) for problem in problems]
    sampled = ["fault", "fault", *("#" if i % 3 == 0 else right[i] for i in range(2, 30))]
    asked, chain = [], GRADERS["chain"]

    def answers(policy, prompts, keys, config, group_size, temperature):
        asked.append((len(set(keys)), {key[0] for key in keys}, group_size, temperature))
        return Batch.from_texts(prompts, (sampled if temperature else right)[: len(prompts)], TOKENIZER)

    monkeypatch.setitem(GRADERS, "crash", lambda text, reference: chain(text, 1 / 0 if text == "fault" else reference))
    monkeypatch.setattr(eval_module, "sample", answers)
    metrics = evaluate(None, problems, prompts, CONFIG, Grader(RewardConfig(grader="crash")), 5)
    assert metrics == {
        "eval/accuracy": pytest.approx((28 - 9) / 28),
        "eval/accuracy_greedy": 1.0,
        "eval/response_length": pytest.approx(statistics.mean(len(text) + 1 for text in sampled)),
        "eval/response_length_right": pytest.approx(
            statistics.mean(len(text) + 1 for text in sampled if text not in ("fault", "#"))
        ),
        "eval/n": 28,
    }
    assert asked == [(30, {5}, 1, 0.8), (30, {5}, 1, 0.0)]
    with pytest.raises(RunStopped, match="ZeroDivisionError"):  # no verdict at all is no accuracy of 0
        evaluate(None, problems[:2], prompts[:2], CONFIG, Grader(RewardConfig(grader="crash")), 5)


def test_sampling_metrics_count_by_hand_and_a_missing_verdict_is_a_fault(rollout):
    groups = [[1.0, 1.0, 1.0, 1.0], [0.0, math.nan, 0.0, 0.0], [0.0, 0.5, math.nan, 1.0]]
    kept = torch.tensor([False, False, True])
    scored = [x for group in groups for x in group if not math.isnan(x)]
    lengths = [sum(row) for row in rollout.mask.int().tolist()]
    assert len(set(lengths)) > 2
    scores = torch.tensor(groups).flatten()
    assert sampling_metrics(dataclasses.replace(rollout, rewards=scores), scores, kept) == {
        "reward/faults": 2,
        "reward/mean": pytest.approx(statistics.mean(scored)),
        "reward/std": pytest.approx(statistics.stdev(scored)),
        "groups/all_right": pytest.approx(1 / 3),
        "groups/all_wrong": 0.0,  # not the group of which one response has no verdict
        "groups/kept": pytest.approx(1 / 3),
        "response_length/mean": pytest.approx(statistics.mean(lengths)),
        "response_length/max": max(lengths),
        "response_length/truncated": pytest.approx(sum(map(bool, rollout.truncated)) / 12),
    }


def test_metrics_that_do_not_exist_are_absent(rollout):
    nothing = torch.full((12,), math.nan)
    metrics = sampling_metrics(dataclasses.replace(rollout, rewards=nothing), nothing, torch.zeros(3).bool())
    assert metrics["reward/faults"] == 12 and "reward/mean" not in metrics and "reward/std" not in metrics
    assert token_metrics(rollout.select(torch.arange(0, 0)), torch.zeros(0, rollout.mask.shape[1])) == {}


@pytest.mark.parametrize("has_reference", [True, False])
def test_token_metrics_are_means_over_real_tokens_alone(rollout, has_reference):
    values = torch.randn(5, *rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    values[:, ~rollout.mask] = math.nan  # what stands in the padding must not count, not even times 0
    log_probs, ref, entropy, outcome, advantages = values
    batch = dataclasses.replace(rollout, log_probs=log_probs, entropy=entropy, advantages=advantages)
    metrics = token_metrics(dataclasses.replace(batch, ref_log_probs=ref) if has_reference else batch, outcome)
    places, columns = rollout.mask.nonzero().tolist(), (*values, rollout.sampler_log_probs)
    log_probs, ref, entropy, outcome, advantages, sampler = ([x[i, t].item() for i, t in places] for x in columns)
    expected = {
        "entropy": statistics.mean(entropy),
        "sampler_gap": max(abs(a - b) for a, b in zip(log_probs, sampler, strict=True)),
        "advantage/outcome_abs": statistics.mean(map(abs, outcome)),
    }
    if has_reference:
        expected["kl/ref"] = statistics.mean(log_probs) - statistics.mean(ref)
        expected["advantage/step_abs"] = statistics.mean(abs(a - b) for a, b in zip(advantages, outcome, strict=True))
    assert metrics == pytest.approx(expected, abs=1e-5)
