"""The algorithm core against slow loops written from the equations, in float64, and by exact enumeration."""

import ast
import dataclasses
import doctest
import inspect
import itertools
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import baselines
import pytest
import spro
import torch

G, BETA, LOW, HIGH, MAX_TOKENS = 4, 0.3, 0.2, 0.3, 32
ESTIMATORS = sorted(baselines.ADVANTAGES)
OUTCOME_ONLY = {name for name in ESTIMATORS if not baselines.ADVANTAGES[name].needs}
NO_SUM_OF_TWO_TERMS = {"prime_released", "ppo", "egae", "oracle", "step_oracle", "random_blame"}
BAD = [math.nan, math.inf, -math.inf, 1e9]


def make_batch(seed=0, B=12, T=9):
    """Random ragged responses; the last two columns are padding for all, so at some steps nobody is alive."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T - 2, (B,), generator=g)
    lengths[:2] = torch.tensor([1, T - 2])  # a response of one token, and one that outlives its siblings
    mask = torch.arange(T) < lengths[:, None]
    rewards, (pi, ref, adv) = torch.rand(B, generator=g).double(), torch.randn(3, B, T, generator=g).double()
    old = pi + 0.3 * torch.randn(B, T, generator=g).double()  # some ratios in the clip range, some outside
    line_breaks = torch.rand(B, T, generator=g) < 0.4
    ids = line_breaks.cumsum(1) - line_breaks[:, :1].long()  # lines are runs of tokens, numbered from 0
    w = spro.token_weights(mask, B, int(mask.sum()), "seq-mean-token-mean")
    step_ends = torch.rand(B, T, generator=g) < 0.4
    trace = (step_ends.cumsum(1) - step_ends[:, :1].long()).masked_fill(~mask, -1)  # steps that are verified
    first_wrong = torch.randint(0, 5, (B, 1), generator=g)  # of some, none
    labels = torch.where(trace < first_wrong, 1, torch.where(trace == first_wrong, 0, -1))
    labels = labels.masked_fill(~mask, -1).to(torch.int8)
    luck = torch.rand(B, generator=g).double()
    chances = torch.rand(B, T + 1, generator=g).double()  # of the prefixes where a line begins and the last one ends
    before, after = chances.gather(1, ids), chances.gather(1, ids + 1)
    tokens, told = torch.randint(2, (B, T), generator=g), torch.randn(B, T, generator=g).double()
    values, truncated = torch.randn(B, T, generator=g).double(), torch.rand(B, generator=g) < 0.4  # a critic's
    tensors = {"rewards": rewards, "pi": pi, "ref": ref, "old": old, "adv": adv, "mask": mask, "ids": ids, "w": w}
    tensors |= {"tokens": tokens, "told": told, "values": values, "truncated": truncated}
    tensors |= {"v_star": torch.rand(B, generator=g).double()}
    return SimpleNamespace(**tensors, trace=trace, labels=labels, luck=luck, before=before, after=after)


def change(batch, f):
    """The batch with f applied to copies of its float tensors."""
    items = vars(batch).items()
    return SimpleNamespace(**{k: f(x.clone()) if x.is_floating_point() else x for k, x in items})


def batch_of(b, group_size=G):
    return spro.Batch(
        rewards=b.rewards, log_probs=b.pi, ref_log_probs=b.ref, mask=b.mask, step_ids=b.ids, step_labels=b.labels,
        trace_ids=b.trace, luck=b.luck, values_before=b.before, values_after=b.after, tokens=b.tokens,
        answer_log_probs=b.told, critic_values=b.values, truncated=b.truncated,
        problems=tuple(SimpleNamespace(v_star=v) for v in b.v_star.tolist()),
        group_size=group_size,
    )  # fmt: skip


def estimate(name, b, group_size=G, beta=BETA):
    """Through the door by which training goes."""
    return baselines.advantage(name, batch_of(b, group_size), spro.AlgorithmConfig(beta=beta))


def policy_loss(b):
    loss, stats = spro.policy_loss(b.pi, b.old, b.adv, b.w, LOW, HIGH)
    return torch.stack([loss, *stats.values()])


def outcome_per_token(b):
    return torch.where(b.mask, spro.outcome_advantage(b.rewards, G)[:, None], 0.0)


# Every public function as batch -> tensor, for the properties that all of them have.
CALLS = {
    "outcome_advantage": lambda b: spro.outcome_advantage(b.rewards, G),
    "process_reward": lambda b: torch.where(b.mask, spro.process_reward(b.pi, b.ref, BETA), 0.0),
    "cumulative_process_reward": lambda b: spro.cumulative_process_reward(b.pi, b.mask),
    "masked_step_advantage": lambda b: spro.masked_step_advantage(b.pi, b.mask, G),
    "token_weights": lambda b: spro.token_weights(b.mask, 12, int(b.mask.sum()), "seq-mean-token-mean"),
    "keep_groups": lambda b: spro.keep_groups(b.rewards, G, 0.4, 0.6).double(),
    "policy_loss": policy_loss,
    "kl_estimate": lambda b: torch.stack([spro.kl_estimate(b.pi, b.ref, b.mask, k) for k in spro.KL_ESTIMATORS], 2).sum(
        2
    ),
    **{f"{n}_advantage": lambda b, n=n: estimate(n, b) for n in ESTIMATORS},
}
every_call = pytest.mark.parametrize("name", CALLS)
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
by_token_and_by_line = pytest.mark.parametrize("by_line", [False, True], ids=["token", "line"])


def assert_equal(actual, expected, tol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


# The slow references work on python lists of the live tokens alone, so there is no mask to get wrong.
def ragged(x, mask):
    return [row[live].tolist() for row, live in zip(x, mask, strict=True)]


def padded(rows, T=9):
    return torch.tensor([row + [0.0] * (T - len(row)) for row in rows], dtype=torch.float64)


def slow_outcome(rewards, group_size=G, eps=1e-6):
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    return [(r - statistics.fmean(x)) / (statistics.stdev(x) + eps) for x in groups for r in x]


def slow_cpr(rows):
    return [[math.fsum(row[: t + 1]) for t in range(len(row))] for row in rows]


def slow_msa(cpr):
    def mean_of_living(i, t):
        return statistics.fmean(s[t] for s in cpr[i - i % G : i - i % G + G] if t < len(s))

    return [[x - mean_of_living(i, t) for t, x in enumerate(row)] for i, row in enumerate(cpr)]


def slow_spro(b, beta, by_line):
    log_ratios = ragged(b.pi - b.ref, b.mask)
    steps = ragged(b.ids, b.mask) if by_line else [range(len(row)) for row in log_ratios]
    rewards = [[0.0] * (ids[-1] + 1) for ids in steps]
    for i, ids in enumerate(steps):
        for t, step in enumerate(ids):
            rewards[i][step] += beta * log_ratios[i][t]
    msa, outcome = slow_msa(slow_cpr(rewards)), slow_outcome(b.rewards.tolist())
    return padded([[outcome[i] + msa[i][step] for step in ids] for i, ids in enumerate(steps)])


def siblings(i):
    return range(i - i % G, i - i % G + G)


def others(i):
    return [k for k in siblings(i) if k != i]


def slow_step_terms(rows, ids, rewards):
    """Each ablation's step term from the process rewards of the live tokens, written from its definition."""
    cpr = slow_cpr(rows)

    def minus_mean(values, t, i, among):
        alive = [values[k][t] for k in among if t < len(values[k])]
        return values[i][t] - statistics.fmean(alive) if alive else 0.0

    def terms(f):
        return [[f(i, t) for t in range(len(row))] for i, row in enumerate(rows)]

    past = [[math.fsum(row[:t]) for t in range(len(row))] for row in rows]
    lines = [[math.fsum(x for x, n in zip(row, ns, strict=True) if n <= line) for line in range(ns[-1] + 1)]
             for row, ns in zip(rows, ids, strict=True)]  # fmt: skip
    pools = [statistics.fmean(x for k in siblings(i) for x in cpr[k]) for i in range(len(rows))]
    msa = terms(lambda i, t: minus_mean(cpr, t, i, siblings(i)))
    return {
        "spro_loo": terms(lambda i, t: minus_mean(cpr, t, i, others(i))),
        "spro_local": terms(lambda i, t: minus_mean(rows, t, i, siblings(i))),
        "spro_history": terms(lambda i, t: minus_mean(past, t, i, siblings(i))),
        "spro_pooled": terms(lambda i, t: cpr[i][t] - pools[i]),
        "spro_line": terms(lambda i, t: minus_mean(lines, ids[i][t], i, siblings(i))),
        "spro_posterior": [[x * (rewards[i] > 0.5) for x in row] for i, row in enumerate(msa)],
        "msa_only": msa,
    }


def slow_value_terms(before, after):
    """What a step changes of a value, of a best-of-4 prover's, of an entropy-regularized one: eta 1."""

    def term(f):
        return [[f(b) - f(a) for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)]

    return {
        "vine": term(lambda v: v),
        "pav": term(lambda v: 3 * (1 - (1 - v) * (1 - v) * (1 - v) * (1 - v))),
        "er_prm": term(lambda v: math.log((1 - v) * math.exp(0) + v * math.exp(1))),
    }  # fmt: skip


def slow_outcomes(rewards, log_probs):
    """Each baseline's advantage of a response, written from its paper's formula."""
    likelihood = [statistics.fmean(row) for row in log_probs]
    rank = [sum(likelihood[k] < likelihood[i] for k in siblings(i)) for i in range(len(rewards))]
    unlikely = [r * (1 - 0.25 * rank[i] / G) for i, r in enumerate(rewards)]
    equal = [len({rewards[k] for k in siblings(i)}) == 1 for i in range(len(rewards))]
    return {
        "grpo": slow_outcome(rewards),
        "dr_grpo": [r - statistics.fmean(rewards[k] for k in siblings(i)) for i, r in enumerate(rewards)],
        "rloo": [r - statistics.fmean(rewards[k] for k in others(i)) for i, r in enumerate(rewards)],
        "raft": [r if r > 0 else 0.0 for r in rewards],
        "reinforce_rej": [0.0 if equal[i] else 2 * r - 1 for i, r in enumerate(rewards)],
        "unlikeliness": slow_outcome(unlikely),
        "positives": [z if r > 0.5 or z > 0 else 0.0 for r, z in zip(rewards, slow_outcome(rewards), strict=True)],
        "tree_rpo": slow_outcome(rewards),
    }


def slow_lambda_grpo(b):
    """GRPO's advantage over the number of siblings whose response begins with the same tokens."""
    responses, outcome = ragged(b.tokens, b.mask), slow_outcome(b.rewards.tolist())

    def sharing(i, t):
        return sum(responses[k][: t + 1] == responses[i][: t + 1] for k in siblings(i))

    return padded([[outcome[i] / sharing(i, t) for t in range(len(row))] for i, row in enumerate(responses)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("binary", [False, True], ids=["any reward", "right or wrong"])
def test_baselines_and_ablations_match_loops_over_their_definitions(seed, binary):
    b = make_batch(seed)
    if binary:
        b.rewards = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1]).double()
    b.rewards[8:] -= 0.3  # some are negative
    rewards, process = b.rewards.tolist(), ragged(BETA * (b.pi - b.ref), b.mask)
    outcomes = slow_outcomes(rewards, ragged(b.pi, b.mask))
    steps = slow_step_terms(process, ragged(b.ids, b.mask), rewards)
    steps |= slow_value_terms(ragged(b.before, b.mask), ragged(b.after, b.mask))
    assert outcomes.keys() == OUTCOME_ONLY - {"lambda_grpo"} | {"tree_rpo"}
    assert steps.keys() | outcomes.keys() | {"spro"} <= set(ESTIMATORS)
    for name, expected in outcomes.items():
        rows = [[expected[i]] * len(row) for i, row in enumerate(process)]
        assert_equal(estimate(name, b), padded(rows))
    for name, expected in steps.items():
        outcome = [0.0] * 12 if name in ("msa_only", "vine") else outcomes["grpo"]
        assert_equal(estimate(name, b), padded([[outcome[i] + x for x in row] for i, row in enumerate(expected)]))


@pytest.mark.parametrize("seed", range(3))
def test_lambda_grpo_divides_by_the_siblings_that_share_the_prefix(seed):
    b = make_batch(seed)
    b.tokens[1] = b.tokens[2]  # siblings whose whole common length is shared
    assert_equal(estimate("lambda_grpo", b), slow_lambda_grpo(b))
    assert len(set((estimate("grpo", b) / estimate("lambda_grpo", b))[b.mask].round().tolist())) > 2


def test_dividing_an_advantage_is_dividing_its_tokens_weight():
    """So lambda-GRPO, which weighs a token's loss, can be an estimator."""
    b, n = make_batch(), 3.0
    expected, _ = spro.policy_loss(b.pi, b.old, b.adv, b.w / n, LOW, HIGH)
    assert_equal(spro.policy_loss(b.pi, b.old, b.adv / n, b.w, LOW, HIGH)[0], expected)


def test_the_optimal_advantage_is_the_reward_minus_v_star():
    b = make_batch()
    rows = [
        [r - v for _ in row]
        for r, v, row in zip(b.rewards.tolist(), b.v_star.tolist(), ragged(b.pi, b.mask), strict=True)
    ]
    assert_equal(estimate("a_star", b), padded(rows))


def test_a_group_of_equal_rewards_moves_only_what_has_no_baseline_of_outcomes():
    b = make_batch()
    b.rewards[:] = 0.7
    for name in OUTCOME_ONLY - {"unlikeliness"}:  # which sets siblings with equal rewards apart on purpose
        assert estimate(name, b).any() == (name == "raft"), name
    b.rewards[:] = 0.0
    assert not any(estimate(name, b).any() for name in OUTCOME_ONLY)


def test_of_right_answers_the_likeliest_earns_least():
    b = make_batch()
    b.rewards[:] = torch.tensor([1.0, 1, 1, 0] * 3).double()
    per_token = torch.where(b.mask, b.pi, 0).sum(1) / b.mask.sum(1)
    for group, likelihood in zip(estimate("unlikeliness", b)[:, 0].split(G), per_token.split(G), strict=True):
        assert group[:3].argsort(descending=True).equal(likelihood[:3].argsort()) and group[3] < group[:3].min()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_whose_input_is_missing_says_which(name):
    batch, algo = batch_of(make_batch()), spro.AlgorithmConfig()
    for need, field in spro.NEEDED_FIELDS.items():
        without = dataclasses.replace(batch, **{field: None})
        if baselines.needs(name, need):
            with pytest.raises(ValueError, match=f"{name}_advantage needs {field}"):
                baselines.advantage(name, without, algo)
        else:
            assert baselines.advantage(name, without, algo).equal(baselines.advantage(name, batch, algo))


def test_a_name_that_is_no_estimator_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"algorithm\.advantage='sprou' is not known: choose one of spro, grpo, "):
        baselines.advantage("sprou", batch_of(make_batch()), spro.AlgorithmConfig())


def test_the_door_detaches_and_masks_what_an_estimator_forgot(monkeypatch):
    b = change(make_batch(), lambda x: x.requires_grad_())
    monkeypatch.setitem(baselines.ADVANTAGES, "careless", lambda batch, algo: batch.log_probs * 2)
    found = baselines.advantage("careless", batch_of(b), spro.AlgorithmConfig())
    assert not found.requires_grad and found.equal(torch.where(b.mask, 2 * b.pi.detach(), 0.0))


def test_the_process_reward_of_prime_is_the_prms_where_there_is_one():
    b, batch = make_batch(), batch_of(make_batch())
    other = dataclasses.replace(batch, process_log_probs=b.old)
    algo = spro.AlgorithmConfig(beta=BETA)
    b.pi = b.old
    for name in ("prime", "prime_released"):
        assert baselines.advantage(name, other, algo).equal(estimate(name, b))
        assert not baselines.advantage(name, batch, algo).equal(estimate(name, b))


def test_the_outcome_term_is_the_advantage_without_log_ratios_and_changes_of_value():
    b = make_batch()
    algo, silent = spro.AlgorithmConfig(beta=BETA), make_batch()
    silent.ref, silent.after = silent.pi, silent.before
    silent.told = silent.pi
    for name in ESTIMATORS:
        outcome = baselines.outcome_term(name, dataclasses.replace(batch_of(b), process_log_probs=b.old), algo)
        assert outcome is None if name in NO_SUM_OF_TWO_TERMS else outcome.equal(estimate(name, silent)), name


@pytest.mark.parametrize("group_size", [2, 3, 4, 6])
def test_outcome_is_centred_and_divided_by_unbiased_std_plus_eps(group_size):
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(1)).double()
    for eps in ({}, {"eps": 0.1}):
        expected = torch.tensor(slow_outcome(rewards.tolist(), group_size, **eps), dtype=torch.float64)
        assert_equal(spro.outcome_advantage(rewards, group_size, **eps), expected)
    verdicts = torch.tensor([0, 1, 1] * 4)  # integers will do
    expected = pytest.approx(slow_outcome(verdicts.tolist(), group_size), abs=1e-6)
    assert spro.outcome_advantage(verdicts, group_size).tolist() == expected


def test_equal_rewards_give_exactly_zero_outcome():
    # In fp32 seven rewards of 0.7 miss their own mean, and the tiny std would blow that up to 0.06.
    assert spro.outcome_advantage(torch.full((7,), 0.7), 7).tolist() == [0.0] * 7
    for value, n in itertools.product((0.1, 1 / 3, -0.9), range(2, 18)):
        for rewards in (torch.full((2 * n,), value), torch.full((2 * n,), value).double()):
            assert not spro.outcome_advantage(rewards, n).any()
    mixed = spro.outcome_advantage(torch.tensor([0.7, 0.7, 0.7, 0.0, 1.0, 1.0]), 3).tolist()
    assert mixed == pytest.approx([0, 0, 0, *slow_outcome([0.0, 1.0, 1.0], 3)], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@by_token_and_by_line
def test_advantage_matches_a_loop_over_equations_11_to_13(seed, by_line):
    b = make_batch(seed)
    assert len({row[-1] for row in ragged(b.ids, b.mask)[:G]}) > 1  # siblings differ in their number of lines
    assert_equal(estimate("spro_line" if by_line else "spro", b), slow_spro(b, BETA, by_line))
    cpr = slow_cpr(ragged(b.pi, b.mask))
    assert_equal(spro.cumulative_process_reward(b.pi, b.mask), padded(cpr))
    assert_equal(spro.masked_step_advantage(padded(cpr), b.mask, G), padded(slow_msa(cpr)))
    b.mask = torch.arange(9).expand(12, 9) < 1  # every response is one token long
    assert_equal(estimate("spro_line" if by_line else "spro", b), slow_spro(b, BETA, by_line))


def test_two_siblings_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    cpr = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.1, -7.0]], dtype=torch.float64)
    expected = torch.tensor([[-0.05, 0.1, 0.0], [0.05, -0.1, 0.0]], dtype=torch.float64)
    assert_equal(spro.masked_step_advantage(cpr, mask, 2), expected)
    # The same from Eq. 13: log-ratios are the CPR's increments over beta; equal rewards leave the step term.
    log_ratio = torch.tensor([[0.2, 0.4, 0.6], [0.4, -0.2, 9.0]], dtype=torch.float64)
    ref = torch.full((2, 3), -1.5, dtype=torch.float64)
    batch = spro.Batch(rewards=torch.ones(2), log_probs=ref + log_ratio, ref_log_probs=ref, mask=mask, group_size=2)
    assert_equal(spro.spro_advantage(batch, spro.AlgorithmConfig(beta=0.5)), expected)


def test_step_advantages_sum_to_zero_over_living_siblings_and_a_lone_survivor_has_exactly_zero():
    b = make_batch()
    msa, alive = spro.masked_step_advantage(b.pi, b.mask, G), b.mask.unflatten(0, (-1, G)).sum(1)
    assert_equal(msa.unflatten(0, (-1, G)).sum(1), torch.zeros(3, 9).double())
    alone = b.mask & (alive == 1).repeat_interleave(G, 0)
    assert alone.any() and not msa[alone].any() and msa[b.mask & ~alone].all()
    assert torch.equal(estimate("spro", b)[alone], outcome_per_token(b)[alone])


def test_step_term_is_linear_in_beta_and_free_of_the_prompts_value():
    b = make_batch()
    unit = estimate("spro", b, beta=1.0) - outcome_per_token(b)
    for beta in (-2.0, 0.05, 3.0):
        assert_equal(estimate("spro", b, beta=beta), outcome_per_token(b) + beta * unit)
    v0 = torch.tensor([5.0, -3.0, 11.0]).repeat_interleave(G)[:, None]  # V(s_0) of each group's prompt
    assert_equal(*(spro.masked_step_advantage(cpr, b.mask, G) for cpr in (b.pi + v0, b.pi)))


def test_a_shared_prefix_has_equal_cpr_and_no_step_advantage():
    b, shared = make_batch(), torch.arange(9) < 3
    mask = b.mask | shared
    cpr = spro.cumulative_process_reward(torch.where(shared, b.pi[:1], b.pi), mask)
    assert torch.equal(cpr[:, :3], cpr[:1, :3].expand(12, 3)) and not torch.equal(cpr[0], cpr[1])
    assert_equal(spro.masked_step_advantage(cpr, mask, G)[:, :3], torch.zeros(12, 3).double())


@every_estimator
def test_advantages_permute_with_siblings(name):
    b, order = make_batch(), torch.tensor([2, 0, 3, 1, 4, 5, 7, 6, 11, 10, 9, 8])
    shuffled = SimpleNamespace(**{k: x[order] for k, x in vars(b).items()})
    assert_equal(estimate(name, shuffled), estimate(name, b)[order])


@by_token_and_by_line
def test_beta_zero_is_grpo_and_so_is_a_policy_equal_to_the_reference(by_line):
    b, name = make_batch(), "spro_line" if by_line else "spro"
    grpo = outcome_per_token(b)
    assert torch.equal(estimate("grpo", b), grpo)
    b.pi[1, :4], b.ref[1, 1:5] = torch.tensor([math.nan, math.inf, -math.inf, 0.0]), -math.inf  # live tokens
    assert b.mask[1, :5].all() and torch.equal(estimate(name, b, beta=0.0), grpo)
    assert not spro.process_reward(b.pi, b.ref, 0.0).any()
    b.ref = None  # beta 0 loads no reference
    assert torch.equal(estimate(name, b, beta=0.0), grpo)
    b = make_batch()
    b.ref = b.pi.clone()
    assert torch.equal(estimate(name, b), grpo)


def test_a_group_of_equal_rewards_has_no_outcome_but_a_step_term():
    b = make_batch()
    msa = estimate("spro", b) - outcome_per_token(b)
    b.rewards[:] = 0.7
    assert not estimate("grpo", b).any() and msa.abs().max() > 0.1
    assert_equal(estimate("spro", b), msa)


def test_groups_are_kept_by_mean_reward_with_both_bounds_inside():
    rewards = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, math.nan, 1]]).flatten()
    bounds = {(0, 1): [1, 1, 1, 1, 0], (0.01, 0.99): [0, 1, 1, 0, 0], (1 / 3, 1 / 3): [0, 1, 0, 0, 0]}
    for (low, high), kept in bounds.items():
        assert spro.keep_groups(rewards, 3, low, high).tolist() == [bool(k) for k in kept]


def test_lines_of_one_token_each_are_tokens():
    b = make_batch()
    b.ids = torch.arange(9).expand(12, 9)
    assert torch.equal(estimate("spro_line", b), estimate("spro", b))


def test_wrong_group_sizes_weight_modes_and_configs_raise():
    b, calls = make_batch(), []
    for size in (0, 1, 5):
        calls += [("group", lambda n=n, size=size: estimate(n, b, size)) for n in ESTIMATORS]
        calls += [("group", lambda size=size: spro.outcome_advantage(b.rewards, size))]
        calls += [("group", lambda size=size: spro.keep_groups(b.rewards, size, 0, 1))]
        calls += [("group", lambda size=size: spro.masked_step_advantage(b.pi, b.mask, size))]
    for mode, message in (("mean", "token-mean"), ("seq-mean-token-sum-norm", "max_tokens")):
        calls += [(message, lambda mode=mode: spro.token_weights(b.mask, 12, 50, mode))]
    wrong = {"loss_weights": ["?"], "clip_low": [0, 1], "clip_high": [0], "line_end": [""], "step_tokens": [-1]}
    wrong |= {"kl_coef": [math.nan, math.inf], "kl_estimator": ["k4"]}
    wrong["keep_accuracy"] = [(-0.1, 1), (0, 1.1), (0.6, 0.4)]
    for key, value in ((key, value) for key, values in wrong.items() for value in values):
        calls += [(key, lambda key=key, value=value: spro.AlgorithmConfig(**{key: value}))]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


@every_call
@pytest.mark.parametrize("value", BAD)
def test_padding_changes_nothing_whatever_it_holds_and_however_long(name, value):
    b = make_batch()
    dirty = change(b, lambda x: x.masked_fill(~b.mask, value) if x.ndim == 2 else x)
    dirty.w, dirty.ids = b.w, b.ids.masked_fill(~b.mask, 10**9)  # weight 0 is what tells the loss of padding
    dirty.labels, dirty.trace = b.labels.masked_fill(~b.mask, 0), b.trace.masked_fill(~b.mask, 10**9)
    dirty.tokens = b.tokens.masked_fill(~b.mask, 10**9)
    clean = CALLS[name](b)
    assert clean.isfinite().all() and torch.equal(CALLS[name](dirty), clean)
    wide = {k: torch.cat([x, x[:, -2:]], 1) if x.ndim == 2 else x for k, x in vars(dirty).items()}
    wide = CALLS[name](SimpleNamespace(**wide))
    if wide.ndim == 2:
        assert not wide[:, 9:].any() and not clean[~b.mask].any()
    assert_equal(wide[:, :9] if wide.ndim == 2 else wide, clean)


@pytest.mark.parametrize("value", BAD)
def test_gradient_flows_through_live_log_probs_only(value):
    b, grads = make_batch(), []
    for fill in (0.0, value):
        x = change(b, lambda x, fill=fill: x.masked_fill(~b.mask, fill) if x.ndim == 2 else x)
        x = change(x, lambda x: x.requires_grad_())
        loss, stats = spro.policy_loss(x.pi, x.old, x.adv, b.w, LOW, HIGH)
        loss.backward()
        assert x.old.grad is None and x.adv.grad is None and not any(s.requires_grad for s in stats.values())
        grads.append(x.pi.grad)
    assert torch.equal(*grads) and grads[1][b.mask].any() and not grads[1][~b.mask].any()


def test_masked_entries_inside_a_response_are_skipped():
    rewards, mask = torch.tensor([[1.0, math.nan, 2.0]]), torch.tensor([[True, False, True]])
    assert spro.cumulative_process_reward(rewards, mask).tolist() == [[1.0, 0.0, 3.0]]


@every_call
def test_inputs_are_never_mutated(name):
    b = make_batch()
    before = {k: (x.clone(), x._version) for k, x in vars(b).items()}  # the version counts in-place writes
    CALLS[name](b)
    assert all(torch.equal(x, before[k][0]) and x._version == before[k][1] for k, x in vars(b).items())


@every_call
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_and_float64_stays(name, half):
    low = change(make_batch(), lambda x: x.to(half))
    out, exact = CALLS[name](low), CALLS[name](change(low, torch.Tensor.double))
    assert exact.dtype == torch.float64
    assert out.dtype == (torch.float64 if name in ("token_weights", "keep_groups") else torch.float32)
    assert_equal(out.double(), exact, 1e-5)  # sums in half precision would be off by 1e-3


@every_estimator
def test_advantages_are_detached(name):
    b = change(make_batch(), lambda x: x.requires_grad_())
    assert not estimate(name, b).requires_grad


class Tabular:
    """A policy of one row of logits per prefix, and every group it can sample.

    With 3 symbols and at most 3 tokens 15 responses if token 0 stops, else 27. Ordered groups of G responses, each
    weighted by its probability: siblings are independent draws. All expectations are exact sums.
    """

    def __init__(self, group_size, stop=False, vocabulary=3, length=3, seed=None):
        steps = range(length)
        sequences = itertools.product(range(vocabulary), repeat=length)
        responses = sorted({r[: r.index(0) + 1] if stop and 0 in r else r for r in sequences})
        self.states = sorted({r[:t] for r in responses for t in range(len(r))})
        self.number = {s: i for i, s in enumerate(self.states)}
        self.mask = torch.tensor([[t < len(r) for t in steps] for r in responses])
        self.state = torch.tensor([[self.number.get(r[:t], 0) for t in steps] for r in responses])
        self.action = torch.tensor([[*r, *[0] * length][:length] for r in responses])
        g = torch.Generator().manual_seed(group_size if seed is None else seed)
        theta, self.ref_theta = torch.randn(2, len(self.states), vocabulary, generator=g).double()
        self.theta, self.rewards = theta.requires_grad_(), torch.rand(len(responses), generator=g).double()
        self.group_size, self.tokens_per_step = group_size, 1
        self.groups = torch.cartesian_prod(*[torch.arange(len(responses))] * group_size)
        self.rows = self.groups.flatten()
        self.prob = torch.where(self.mask, self.log_probs(theta.detach()), 0.0).sum(1).exp()
        self.group_prob = self.prob[self.groups].prod(1)

    def log_probs(self, theta):
        return theta.log_softmax(1)[self.state, self.action]

    def advantages(self, advantage, ref_theta):
        """Of every row of every group."""
        old, ref = (self.log_probs(x)[self.rows] for x in (self.theta.detach(), ref_theta))
        batch = spro.Batch(
            tokens=self.action[self.rows],
            rewards=self.rewards[self.rows],
            log_probs=old,
            ref_log_probs=ref,
            mask=self.mask[self.rows],
            step_ids=torch.arange(self.mask.shape[1]).expand(len(self.rows), -1) // self.tokens_per_step,
            answer_log_probs=self.told_log_probs()[self.rows],
            group_size=self.group_size,
        )
        return advantage(batch, spro.AlgorithmConfig(beta=BETA))

    def told_log_probs(self):
        """P(token | prefix, success) of the responses' tokens, where a response succeeds with the chance `rewards`.

        What the policy says once it is told, if it knows what that means. Each chance is a sum over responses.
        """
        joint, told = self.prob * self.rewards, torch.zeros(self.mask.shape).double()
        for i, t in self.mask.nonzero().tolist():
            with_prefix = (self.state[:, t] == self.state[i, t]) & self.mask[:, t]
            with_token = with_prefix & (self.action[:, t] == self.action[i, t])
            told[i, t] = (joint[with_token].sum() / joint[with_prefix].sum()).log()
        return told

    def expected_gradient(self, advantage, ref_theta=None):
        """Of the surrogate, on-policy and summed over tokens."""
        weights = (self.group_prob / self.group_size).repeat_interleave(self.group_size)[:, None] * self.mask[self.rows]
        advantages = self.advantages(advantage, self.ref_theta if ref_theta is None else ref_theta)
        pi = self.log_probs(self.theta)[self.rows]
        loss, _ = spro.policy_loss(pi, pi, advantages, weights, LOW, HIGH)
        return torch.autograd.grad(-loss, self.theta)[0]

    def variance(self, advantage):
        """Trace of the covariance of one group's gradient estimate."""
        symbols = self.theta.shape[1]
        # d log pi / d logits
        score = torch.eye(symbols).double()[self.action] - self.theta.detach().softmax(1)[self.state]
        pushes = self.advantages(advantage, self.ref_theta)[:, :, None] * score[self.rows] / self.group_size
        of_group = torch.arange(len(self.groups)).repeat_interleave(self.group_size)
        gradient = torch.zeros(len(self.groups), len(self.states), symbols).double()
        gradient.index_put_((of_group[:, None], self.state[self.rows]), pushes, accumulate=True)
        mean = torch.einsum("g,gsa->sa", self.group_prob, gradient)
        torch.testing.assert_close(mean, self.expected_gradient(advantage), rtol=0, atol=1e-12)
        return (self.group_prob * (gradient - mean).square().sum((1, 2))).sum().item()

    def kl_gradient(self, factors):
        """sum_t factors[t] x E_{s_t}[grad KL(pi(.|s_t) || ref(.|s_t))], the distribution of states held fixed."""
        pi, objective = self.theta.detach().softmax(1), 0.0
        for s in self.states:
            reach = math.prod(pi[self.number[s[:j]], s[j]] for j in range(len(s)))
            log_pi, log_ref = (x[self.number[s]].log_softmax(0) for x in (self.theta, self.ref_theta))
            objective += factors[len(s)] * reach * (log_pi.exp() * (log_pi - log_ref)).sum()
        return torch.autograd.grad(objective, self.theta)[0]


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("stop", [False, True], ids=["fixed length", "variable length"])
def test_expected_gradient_of_the_step_term_pushes_away_from_the_reference(group_size, stop):
    """On-policy, unclipped and summed over tokens, the exact expected gradient of the step term is

        beta * sum_t E[(n_t - 1) / n_t | alive at t] * E_{s_t}[grad KL(pi(.|s_t) || ref(.|s_t))]

    with the distribution of states held fixed and n_t siblings alive (G of them where nothing stops early):
    past log-ratios are a baseline and cancel, and the mean that is subtracted contains the response itself.
    """
    policy, factors = Tabular(group_size, stop), []
    for t in range(3):
        p, others = float(policy.prob[policy.mask[:, t]].sum()), group_size - 1
        # The chance that k of the other siblings are alive, where n_t = k + 1.
        chance = [math.comb(others, k) * p**k * (1 - p) ** (others - k) for k in range(group_size)]
        factors.append(BETA * sum(c * k / (k + 1) for k, c in enumerate(chance)))
        assert stop or factors[t] == pytest.approx(BETA * (group_size - 1) / group_size)
    grpo, expected = policy.expected_gradient(spro.grpo_advantage), policy.kl_gradient(factors)
    assert expected.abs().max() > 1e-3
    assert_equal(policy.expected_gradient(spro.spro_advantage) - grpo, expected, 1e-10)
    assert torch.equal(policy.expected_gradient(spro.spro_advantage, policy.theta.detach()), grpo)  # pi = ref


@pytest.mark.parametrize("stop", [False, True], ids=["fixed length", "variable length"])
def test_of_the_optimal_policy_the_sum_is_the_value_of_the_prefix(stop):
    """docs/algorithm.md: R~_t = V*(s_t+1) - V*(s_0), with V* the soft value by backward induction from the rewards."""
    policy = Tabular(2, stop)
    responses = [tuple(row[:n]) for row, n in zip(policy.action.tolist(), policy.mask.sum(1).tolist(), strict=True)]
    reward = dict(zip(responses, policy.rewards.tolist(), strict=True))
    ref = policy.ref_theta.log_softmax(1)
    symbols = range(ref.shape[1])

    def value(prefix: tuple) -> float:
        if prefix in reward:
            return reward[prefix]
        chances = ref[policy.number[prefix]].exp().tolist()
        return BETA * math.log(sum(chances[a] * math.exp(value((*prefix, a)) / BETA) for a in symbols))

    optimal = torch.zeros_like(ref)
    for prefix, number in policy.number.items():
        for a in symbols:
            optimal[number, a] = ref[number, a] + (value((*prefix, a)) - value(prefix)) / BETA
    assert_equal(optimal.exp().sum(1), torch.ones(len(optimal)).double(), 1e-12)  # it is a policy
    rewards = spro.process_reward(policy.log_probs(optimal), policy.log_probs(policy.ref_theta), BETA)
    cpr = spro.cumulative_process_reward(rewards, policy.mask)
    for response, row in zip(responses, cpr, strict=True):
        for t in range(len(response)):
            assert row[t].item() == pytest.approx(value(response[: t + 1]) - value(()), abs=1e-10)


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_sum_over_the_past_adds_variance_and_no_gradient(group_size):
    """At fixed length spro and spro_local push alike, spro_loo by G / (G - 1) more, and spro_history not at all."""
    policy, part = Tabular(group_size), (group_size - 1) / group_size
    expected = policy.kl_gradient([BETA] * 3)
    for name, factor in (("spro", part), ("spro_loo", 1), ("spro_local", part), ("spro_history", 0)):
        step_term = policy.expected_gradient(baselines.ADVANTAGES[name]) - policy.expected_gradient(spro.grpo_advantage)
        assert_equal(step_term, factor * expected, 1e-10)
    variance = {
        name: policy.variance(baselines.ADVANTAGES[name]) for name in ("spro", "spro_local", "msa_only", "grpo")
    }
    assert variance["spro"] > 1.001 * variance["spro_local"] and variance["msa_only"] > 0
    policy.rewards[:] = 1  # no outcome: the step terms alone
    alone = {name: policy.variance(baselines.ADVANTAGES[name]) for name in ("spro", "spro_local", "spro_history")}
    assert alone["spro"] == pytest.approx(variance["msa_only"], rel=1e-9)
    assert alone["spro"] > 1.1 * alone["spro_local"] and alone["spro_history"] > 0


def test_kl_estimates_are_those_of_the_scalar_formulas_and_finite_at_any_log_ratio():
    b = make_batch()
    formulas = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}
    assert formulas.keys() == spro.KL_ESTIMATORS.keys()
    for name, formula in formulas.items():
        expected = padded([[formula(d) for d in row] for row in ragged(b.pi - b.ref, b.mask)])
        assert_equal(spro.kl_estimate(b.pi, b.ref, b.mask, name), expected)
        far = torch.tensor([[-200.0, 200.0]]).requires_grad_()
        kl = spro.kl_estimate(far, torch.zeros(1, 2), torch.ones(1, 2).bool(), name)
        assert kl.isfinite().all() and torch.autograd.grad(kl.sum(), far)[0].isfinite().all()


def test_kl_estimates_have_the_values_and_the_gradients_in_expectation_that_their_docstring_says():
    g = torch.Generator().manual_seed(0)
    theta, q = (
        torch.randn(5, generator=g).double().requires_grad_(),
        torch.randn(5, generator=g).double().log_softmax(0),
    )

    p = theta.log_softmax(0)
    kl, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
    of_kl, of_reverse = (torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (kl, reverse))
    gradients = {"k1": torch.zeros(5).double(), "k2": of_kl, "k3": of_reverse}
    for name, gradient in gradients.items():
        estimates = spro.kl_estimate(theta.log_softmax(0)[None], q[None], torch.ones(1, 5).bool(), name)[0]
        probabilities = theta.detach().softmax(0)  # of the samples, which carry no gradient
        assert_equal(torch.autograd.grad((probabilities * estimates).sum(), theta)[0], gradient)
        if name != "k2":
            assert_equal((probabilities * estimates).sum(), kl)


def test_a_kl_bonus_on_grpo_is_spro_local_in_expectation():
    """kl_coef = -beta (G - 1) / G, exact, gives GRPO the expected gradient of spro_local: on-policy, fixed length."""
    policy, kl_coef = Tabular(3), -BETA * 2 / 3
    pi, ref = (x.log_softmax(1)[policy.state] for x in (policy.theta, policy.ref_theta))
    exact = (pi.exp() * (pi - ref)).sum(2)  # [B, T], where the states are those of the sampled responses
    bonus = -(policy.prob[:, None] * kl_coef * exact).sum()
    grpo = policy.expected_gradient(spro.grpo_advantage) + torch.autograd.grad(bonus, policy.theta)[0]
    assert_equal(grpo, policy.expected_gradient(baselines.ablations.spro_local_advantage), 1e-10)


@pytest.mark.parametrize("mode", spro.WEIGHT_MODES)
def test_token_weights_match_their_averages_however_the_step_is_split(mode):
    b = make_batch()
    rows = ragged(b.pi, b.mask)
    N, tokens = len(rows), sum(map(len, rows))
    expected = {
        "seq-mean-token-mean": [[1 / len(row) / N for _ in row] for row in rows],
        "token-mean": [[1 / tokens for _ in row] for row in rows],
        "seq-mean-token-sum-norm": [[1 / (N * MAX_TOKENS) for _ in row] for row in rows],
    }[mode]
    for size in (1, 2, 5, N):  # each micro-batch is cut to its own longest response: T must not matter
        masks = [mask[:, : mask.sum(1).max()] for mask in b.mask.split(size)]
        weights = [spro.token_weights(mask, N, tokens, mode, MAX_TOKENS) for mask in masks]
        assert_equal(torch.cat([padded(w.tolist()) for w in weights]), padded(expected))
        total = sum(w.sum().item() for w in weights)
        assert total == pytest.approx(tokens / (N * MAX_TOKENS) if "norm" in mode else 1, abs=1e-12)


@pytest.mark.parametrize("advantage", [2.0, -3.0, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0])
def test_clipping_matches_the_scalar_formula(advantage, ratio):
    new = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    old, one = new.detach() - math.log(ratio), torch.ones_like(new).detach()
    loss, stats = spro.policy_loss(new, old, advantage * one, 0.25 * one, LOW, HIGH)
    # The clip binds where it lowers the surrogate: above for a good token, below for a bad one.
    binds, bound = (ratio > 1.3, 1.3) if advantage > 0 else (advantage < 0 and ratio < 0.8, 0.8)
    assert loss.item() == pytest.approx(-0.25 * advantage * (bound if binds else ratio), abs=1e-12)
    slope = 0 if binds else pytest.approx(-0.25 * advantage * ratio, abs=1e-12)
    assert torch.autograd.grad(loss, new)[0].item() == slope
    got = [stats[k].item() for k in ("clip_fraction", "kl/old", "ratio/max")]
    assert got == pytest.approx([0.25 * binds, -0.25 * math.log(ratio), ratio], abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_loss_and_stats_match_a_loop_and_add_over_micro_batches(size):
    b = make_batch()
    loss = kl = clipped = highest = 0.0
    columns = (x[b.mask].tolist() for x in (b.pi, b.old, b.adv, b.w))
    for new, old, advantage, weight in zip(*columns, strict=True):
        ratio = math.exp(new - old)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)
        loss, kl, highest = loss - weight * surrogate, kl + weight * (old - new), max(highest, ratio)
        clipped += weight * (surrogate != ratio * advantage)
    assert 0.1 < clipped < 0.9
    rows = torch.arange(12).split(size)
    parts = [spro.policy_loss(*(x[i] for x in (b.pi, b.old, b.adv, b.w)), LOW, HIGH) for i in rows]
    sums = sum(torch.stack([part, stats["kl/old"], stats["clip_fraction"]]) for part, stats in parts)
    assert sums.tolist() == pytest.approx([loss, kl, clipped], abs=1e-12)
    assert max(s["ratio/max"].item() for _, s in parts) == pytest.approx(highest, abs=1e-12)


@pytest.mark.parametrize("mode", spro.WEIGHT_MODES)
def test_micro_batch_split_and_row_order_do_not_change_the_gradient(mode):
    b, g = make_batch(), torch.Generator().manual_seed(2)
    tokens, params = torch.randint(7, (12, 10), generator=g), torch.randn(2, 7, 7, generator=g).double()
    params.requires_grad_()

    def token_log_probs(tokens):  # a bigram model with one hidden layer
        logits = torch.tanh(params[0][tokens[:, :-1]]) @ params[1]
        return logits.log_softmax(2).gather(2, tokens[:, 1:, None]).squeeze(2)

    old = token_log_probs(tokens).detach() + b.old - b.pi  # off-policy, so that some tokens are clipped
    b.pi, pi = old, b.pi
    advantages = estimate("spro", b)
    b.pi = pi

    def gradient(size, order):
        params.grad = None
        for rows in order.split(size):
            T = b.mask[rows].sum(1).max()  # a micro-batch is cut to its own longest response
            weights = spro.token_weights(b.mask[rows, :T], 12, int(b.mask.sum()), mode, MAX_TOKENS)
            new = token_log_probs(tokens[rows, : T + 1])
            spro.policy_loss(new, old[rows, :T], advantages[rows, :T], weights, LOW, HIGH)[0].backward()
        return params.grad

    whole = gradient(12, torch.arange(12))
    assert whole.abs().max() > 1e-3
    for size, order in itertools.product((1, 2, 5, 12), (torch.arange(12), torch.randperm(12, generator=g))):
        assert_equal(gradient(size, order), whole, 1e-10)


def test_the_core_imports_torch_alone_and_every_function_of_the_algorithm_is_in_calls():
    tree = ast.parse(Path(spro.__file__).read_text())
    imported = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert "torch" in imported and {name.split(".")[0] for name in imported} <= {"torch", *sys.stdlib_module_names}
    helpers = {"estimator", "at_least_fp32", "by_group", "centred_rewards", "per_row", "per_step", "per_position"}
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
    assert functions - helpers <= set(CALLS) and helpers <= functions


@every_estimator
def test_an_estimator_takes_batch_and_algo_and_reads_the_reference_where_it_says_so(name):
    assert list(inspect.signature(baselines.ADVANTAGES[name]).parameters) == ["batch", "algo"]
    b, no_reference = make_batch(), make_batch()
    no_reference.ref[:] = math.nan
    ignores = torch.equal(estimate(name, no_reference), estimate(name, b))
    assert ignores != (baselines.needs(name, "reference") and name != "a_star")  # whose loss reads it


@every_estimator
def test_an_estimator_is_its_formula_in_a_few_lines(name):
    function = ast.parse(inspect.getsource(baselines.ADVANTAGES[name])).body[0]
    docstring, *formula = function.body
    assert isinstance(docstring.value, ast.Constant)
    assert len(formula) <= (10 if name == "prime_released" else 6)  # which follows the released code's detours


def test_names_a_config_can_choose_exist():
    assert {"spro", "grpo"} == set(spro.ADVANTAGES) < set(ESTIMATORS) and {"grpo"} <= OUTCOME_ONLY
    config = spro.AlgorithmConfig()
    assert config.advantage in ESTIMATORS and config.loss_weights in spro.WEIGHT_MODES


def test_docstring_examples_hold():
    for module in (spro, baselines.prime):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0
