"""PRIME: its two advantages against loops in float64, the PRM against responses scored one by one, and whole runs."""

import dataclasses
import math
import statistics

import infra.config
import infra.errors
import model
import pytest
import spro
import torch
import train
from baselines import prime
from infra.memory import Work, host_plan, memory_plan
from spro import Batch
from tasks.chain import chain_tokenizer

import chaos
from conftest import finished, ran
from helpers import PROMPTS, slow_log_probs, tiny_model
from test_ranks import assert_a_kill_in_step_4_changes_nothing, assert_alike, learned_rows
from test_spro import BETA, G, assert_equal, estimate, make_batch, padded, ragged

# --- the advantages -----------------------------------------------------------------------------------------------


def others(values: list[float], i: int) -> list[float]:
    """The values of response i's siblings, its own left out."""
    first = i - i % G
    return [values[j] for j in range(first, first + G) if j != i]


def slow_prime(b) -> torch.Tensor:
    """Eq. 5 with gamma 1, one sum per token."""
    r, outcome, rows = ragged(BETA * (b.pi - b.ref), b.mask), b.rewards.tolist(), []
    means = [statistics.fmean(row) for row in r]
    for i, row in enumerate(r):
        baseline, advantage = statistics.fmean(others(means, i)), outcome[i] - statistics.fmean(others(outcome, i))
        rows.append([math.fsum(x - baseline for x in row[t:]) + advantage for t in range(len(row))])
    return padded(rows)


def slow_prime_released(b) -> torch.Tensor:
    """In the released code's own order: normalise, leave one out token by token, returns, whiten."""
    q = ragged(b.pi - b.ref, b.mask)
    largest = max(abs(math.fsum(row[t:])) for row in q for t in range(len(row)))
    q = [[x / (largest + 1e-6) for x in row] for row in q]
    means, outcome, returns = [statistics.fmean(row) for row in q], b.rewards.tolist(), []
    for i, row in enumerate(q):
        first = i - i % G
        compared = [x * G / (G - 1) - math.fsum(means[first : first + G]) / (G - 1) for x in row]
        compared[-1] += outcome[i] * G / (G - 1) - math.fsum(outcome[first : first + G]) / (G - 1)  # at the last token
        returns.append([math.fsum(compared[t:]) for t in range(len(row))])
    tokens = [x for row in returns for x in row]
    mean, scale = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return padded([[(x - mean) / scale for x in row] for row in returns])


@pytest.mark.parametrize("seed", range(5))
def test_prime_matches_a_loop_over_equation_5(seed):
    assert_equal(estimate("prime", make_batch(seed)), slow_prime(make_batch(seed)))


@pytest.mark.parametrize("seed", range(5))
def test_the_released_variant_matches_a_loop_in_the_released_codes_order(seed):
    b = make_batch(seed)
    assert_equal(estimate("prime_released", b), slow_prime_released(b), 1e-10)
    assert torch.equal(estimate("prime_released", b, beta=7.0), estimate("prime_released", b))  # beta: the PRM's alone


LOG_RATIO = torch.tensor([[0.1, 0.3], [0.4, 9.0]], dtype=torch.float64)  # the second response has one token
SIBLINGS = spro.Batch(
    rewards=torch.tensor([1.0, 0.0], dtype=torch.float64),
    log_probs=LOG_RATIO.new_full((2, 2), math.nan),  # the policy's own are not asked
    process_log_probs=LOG_RATIO,
    ref_log_probs=0 * LOG_RATIO,
    mask=torch.tensor([[True, True], [True, False]]),
    group_size=2,
)


def test_prime_on_two_siblings_by_hand():
    """Means over tokens .2 and .4; each is compared with the other's: .1 - .4, .3 - .4 and .4 - .2."""
    actual = prime.prime_advantage(SIBLINGS, spro.AlgorithmConfig(beta=1.0))
    expected = torch.tensor([[1 + (-0.3 - 0.1), 1 - 0.1], [-1 + 0.2, 0]], dtype=torch.float64)
    assert_equal(actual, expected)
    halved = prime.prime_advantage(SIBLINGS, spro.AlgorithmConfig(beta=0.5))
    assert_equal(halved, torch.tensor([[1 - 0.2, 1 - 0.05], [-1 + 0.1, 0]], dtype=torch.float64))


def test_the_released_variant_on_two_siblings_by_hand():
    """The largest return is .4, so log-ratios count as .25, .75 and 1, with means .5 and 1, which sum to 1.5.

    Leave-one-out as coded: 2 x - 1.5, so -1, 0 and .5; returns with the outcome's 1 and -1: 0, 1, -.5.
    Their mean is 1/6 and their unbiased variance (1/36 + 25/36 + 16/36) / 2 = 7/12.
    """
    actual = prime.prime_released_advantage(SIBLINGS, spro.AlgorithmConfig(beta=0.05))
    expected = (torch.tensor([[0.0, 1.0], [-0.5, 1 / 6]], dtype=torch.float64) - 1 / 6) / math.sqrt(7 / 12)
    assert_equal(actual, expected, 1e-5)  # the 1e-6 beside the largest return


def test_without_process_rewards_prime_is_the_leave_one_out_outcome():
    b = make_batch()
    b.pi = b.ref.clone()
    outcome = torch.tensor(
        [r - statistics.fmean(others(b.rewards.tolist(), i)) for i, r in enumerate(b.rewards.tolist())]
    )
    assert_equal(estimate("prime", b), torch.where(b.mask, outcome[:, None].double(), 0.0), 1e-6)
    released = estimate("prime_released", b)[b.mask]
    assert_equal(torch.stack([released.mean(), released.std()]), torch.tensor([0.0, 1.0]).double(), 1e-6)


# --- the PRM ------------------------------------------------------------------------------------------------------

TEXTS = ["b1+2=3;#3", "#7", "b1+2=4;c4*5=0;d0-1=9;#9", "", "b9*9=1;(b9*9=1)#", "b1+2=3;#4", "#1", "b5+5=0;#0"]
VERDICTS = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.5, 1.0])  # code is graded in fractions
PARTS = [torch.tensor([4, 5, 6, 7]), torch.tensor([0, 1, 2, 3])]


def config_of(update: str = "after", micro_batch_tokens: int = 1000, learning_rate: float = 1e-3) -> train.Config:
    return train.Config(
        algorithm=train.AlgorithmConfig(advantage="prime", beta=0.5),
        sample=train.SampleConfig(group_size=4),
        prime=prime.PrimeConfig(learning_rate=learning_rate, update=update),
        train=train.TrainConfig(micro_batch_tokens=micro_batch_tokens),
    )


@pytest.fixture(scope="module")
def rollout() -> Batch:
    batch = Batch.from_texts([PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, TEXTS, chain_tokenizer())
    return dataclasses.replace(batch, group_size=4)


@pytest.fixture(scope="module")
def ref_log_probs(rollout) -> torch.Tensor:
    return model.batch_log_probs(tiny_model(seed=1), rollout, 1.0, 1000)[0]


def learned(rollout, ref_log_probs, config, prm=None, optimizer=None, parts=PARTS):
    """(PRM, log-probs, metrics) of one call on a PRM that starts as `tiny_model`."""
    prm = prm or tiny_model()
    optimizer = optimizer or model.make_optimizer(prm, config.train, config.prime.learning_rate)
    batch = dataclasses.replace(rollout, ref_log_probs=ref_log_probs)
    return prm, *prime.score_and_learn(prm, optimizer, config, batch, VERDICTS, parts)


def log_probs_of(prm, rollout) -> torch.Tensor:
    """Of every response token, one response at a time, without padding; 0 elsewhere."""
    found = torch.zeros(rollout.mask.shape)
    for i, (ids, attended, mask) in enumerate(zip(rollout.tokens, rollout.attention_mask, rollout.mask, strict=True)):
        P, n = len(attended) - len(mask), int(mask.sum())
        prompt, response = ids[:P][attended[:P]].tolist(), ids[P : P + n].tolist()
        found[i, :n] = slow_log_probs(prm, prompt, response, 1.0)[0]
    return found


def slow_sums_of(log_probs, ref_log_probs, mask, beta=0.5) -> list[float]:
    return [beta * math.fsum(row) for row in ragged(log_probs.double() - ref_log_probs.double(), mask)]


def cross_entropy(score: float, verdict: float) -> float:
    p = 1 / (1 + math.exp(-score))
    return -(verdict * math.log(p) + (1 - verdict) * math.log(1 - p))


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 1000])
def test_the_prms_loss_is_the_cross_entropy_of_summed_log_ratios_against_soft_verdicts(
    rollout, ref_log_probs, micro_batch_tokens
):
    config, whole = config_of(micro_batch_tokens=micro_batch_tokens), [torch.arange(8)]
    start = log_probs_of(tiny_model(), rollout)
    scores = slow_sums_of(start, ref_log_probs, rollout.mask)
    _, _, metrics = learned(rollout, ref_log_probs, config, parts=whole)
    expected = statistics.fmean(map(cross_entropy, scores, VERDICTS.tolist()))
    assert metrics["prm/loss"] == pytest.approx(expected, rel=1e-4)
    pairs = [(i, j) for i in range(8) for j in range(8) if i // 4 == j // 4 and VERDICTS[i] > VERDICTS[j]]
    ranked = statistics.fmean(scores[i] > scores[j] for i, j in pairs)
    assert metrics["prm/ranking_accuracy"] == pytest.approx(ranked)


def test_by_default_a_mini_batch_is_scored_by_the_prm_as_it_stands_before_its_own_step(rollout, ref_log_probs):
    config = config_of()
    prm, log_probs, _ = learned(rollout, ref_log_probs, config)
    after_one, _, _ = learned(rollout, ref_log_probs, config, parts=PARTS[:1])
    for rows, scorer in ((PARTS[0], tiny_model()), (PARTS[1], after_one)):
        torch.testing.assert_close(log_probs[rows], log_probs_of(scorer, rollout)[rows], rtol=0, atol=1e-4)
    assert (log_probs - log_probs_of(prm, rollout)).abs().max() > 1e-3  # the steps have moved it


def test_before_scores_with_the_prm_that_has_taken_all_its_steps(rollout, ref_log_probs):
    prm, log_probs, before = learned(rollout, ref_log_probs, config_of("before"))
    torch.testing.assert_close(log_probs, log_probs_of(prm, rollout), rtol=0, atol=1e-4)
    _, _, after = learned(rollout, ref_log_probs, config_of())
    assert {k: v for k, v in before.items() if k != "time/prm"} == {k: v for k, v in after.items() if k != "time/prm"}


def test_a_prm_learns_which_responses_are_right(rollout, ref_log_probs):
    """Verdicts of 0 and 1 can be told apart, so the cross-entropy goes well below that of not knowing, ln 2."""
    prm, config, optimizer = tiny_model(), config_of(learning_rate=3e-3), None
    optimizer = model.make_optimizer(prm, config.train, config.prime.learning_rate)
    right = VERDICTS.round()
    start = model.batch_log_probs(prm, rollout, 1.0, 1000)[0]
    batch = dataclasses.replace(rollout, ref_log_probs=start)
    for _ in range(20):
        _, metrics = prime.score_and_learn(prm, optimizer, config, batch, right, PARTS)
    assert metrics["prm/loss"] < 0.3 < math.log(2) and metrics["prm/ranking_accuracy"] == 1


def test_ranking_accuracy_counts_pairs_of_siblings_and_half_a_tie():
    scores = torch.tensor([3.0, 1.0, 1.0, 9.0, 8.0, 7.0])
    verdicts = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # pairs (0, 2) and (1, 2); the second group has none
    assert prime.ranking_accuracy(scores, verdicts, 3) == 0.75
    assert prime.ranking_accuracy(-scores, verdicts, 3) == 0.25
    assert prime.ranking_accuracy(scores, torch.ones(6), 3) is None


def test_a_non_finite_gradient_leaves_the_prm_as_it_was_and_a_step_of_nothing_else_ends_the_run(rollout, ref_log_probs):
    broken = ref_log_probs.clone()
    broken[0, 0] = math.nan
    prm = tiny_model()
    optimizer = model.make_optimizer(prm, config_of().train)
    with pytest.raises(infra.errors.RunStopped, match=r"lower prime\.learning_rate"):
        batch = dataclasses.replace(rollout, ref_log_probs=broken)
        prime.score_and_learn(prm, optimizer, config_of(), batch, VERDICTS, [torch.arange(8)])
    assert all(torch.equal(a, b) for a, b in zip(prm.parameters(), tiny_model().parameters(), strict=True))
    _, _, metrics = learned(rollout, broken, config_of())  # the parts without row 0 are learned from
    assert metrics["prm/refused"] == 1 and math.isfinite(metrics["prm/loss"])


def test_prime_refuses_settings_that_mean_nothing():
    for arguments, words in (
        ({"prime": {"update": "during"}}, "choose after or before"),
        ({"prime": {"learning_rate": 0.0}}, "learning_rate=0.0 must be positive"),
        ({"algorithm": {"advantage": "prime", "beta": 0.0}}, "needs algorithm.beta above 0"),
    ):
        with pytest.raises(infra.errors.BadInput, match=words):
            infra.config.build_config(train.Config, arguments, infra.config.all_keys(train.Config))


def test_the_memory_plan_counts_the_prms_weights_and_moments():
    policy, layers = tiny_model(), []
    work = [Work(100, 50, 100, has_reference=True, learns_beside=there) for there in (False, True)]
    alone, both = (memory_plan(policy.model, layers, model.ModelConfig(), 8, True, each, 2**25) for each in work)
    assert both["peak"] - alone["peak"] == pytest.approx(12 * policy.num_parameters() / 8 / 2**30)


def test_the_memory_plan_counts_keys_and_values_that_are_copied_for_every_head_and_host_memory():
    policy = tiny_model()  # 4 heads of 8 in 2 groups
    work = [Work(100, 50, 100, has_reference=True, repeats_heads=repeats) for repeats in (False, True)]
    once, copied = (memory_plan(policy.model, [], model.ModelConfig(), 1, True, each, 2**25) for each in work)
    name = "sampling: keys and values of all heads"
    assert once[name] == 0 and copied[name] * 2**30 == 2 * (4 * 8) * 2 * 100
    n, settings = policy.num_parameters(), model.ModelConfig(offload_reference=True)
    found = {name: size * 2**30 for name, size in host_plan(policy.model, settings, 8, True, work[0]).items()}
    assert list(found.values()) == pytest.approx([4 * n, 4 * n, 2 * 12 * n / 8, 4 * n / 8])


# --- whole runs ---------------------------------------------------------------------------------------------------

PRIME = ("algorithm.advantage=prime", "prime.learning_rate=1e-3", "train.steps=4", "train.dump_every=2")
PRIME += ("train.save_every=2", "eval.every=4")


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prime") / "run"
    finished(folder, warm, *PRIME)
    return folder


def test_dumped_advantages_are_equation_5_of_the_dumped_log_probs(straight):
    rows = learned_rows(straight)
    assert rows and len(rows) % 4 == 0
    r = [[0.05 * (p - q) for p, q in zip(row["process_log_prob"], row["ref_log_prob"], strict=True)] for row in rows]
    assert max(abs(x) for row in r for x in row) > 1e-3  # the PRM has left the reference
    for i, row in enumerate(rows):
        siblings = [j for j in range(i - i % 4, i - i % 4 + 4) if j != i]
        outcome = row["reward"] - statistics.fmean(rows[j]["reward"] for j in siblings)
        baseline = statistics.fmean(statistics.fmean(r[j]) for j in siblings)
        for t, advantage in enumerate(row["advantage"]):
            assert advantage == pytest.approx(outcome + math.fsum(x - baseline for x in r[i][t:]), abs=1e-5)


def test_prime_has_its_metrics_and_other_estimators_do_not(straight, warm, tmp_path):
    keys = {"prm/loss", "prm/ranking_accuracy", "prm/grad_norm"}
    assert keys <= chaos.metrics(straight)[-1].keys()
    finished(tmp_path / "spro", warm, "train.steps=1")
    assert not [key for key in chaos.metrics(tmp_path / "spro")[-1] if key.startswith("prm/")]


@pytest.mark.parametrize("advantage, update", [("prime", "after"), ("prime_released", "before")])
def test_two_processes_train_a_prm_as_one_does(advantage, update, straight, warm, tmp_path):
    change, one = (f"algorithm.advantage={advantage}", f"prime.update={update}"), straight
    if advantage != "prime":
        one = tmp_path / "one"
        finished(one, warm, *PRIME, *change)
    finished(tmp_path / "two", warm, *PRIME, *change, ranks=2)
    assert_alike(chaos.metrics(one), chaos.metrics(tmp_path / "two"))


def test_a_stop_inside_the_prms_step_and_a_resume_change_nothing(straight, warm, tmp_path):
    folder, go_on = tmp_path / "run", (warm, *PRIME, "resume=true")
    code, words = ran(folder, *go_on, on="optimizer", step=3, n=2, does="SIGTERM")
    assert code == infra.errors.EXIT_STOPPED and "saved after step 3 of 4" in words, words
    finished(folder, *go_on)
    assert chaos.differences(straight, folder) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_inside_the_prms_step_changes_nothing(ranks, straight, warm, tmp_path):
    arguments = (warm, *PRIME)
    assert_a_kill_in_step_4_changes_nothing(straight, tmp_path / "run", arguments, "optimizer", 2, ranks)
