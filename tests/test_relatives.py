"""Other papers' estimators that read log-ratios: against loops, by enumeration; their PRMs; whole runs."""

import dataclasses
import itertools
import math
import statistics

import baselines
import data
import infra.config
import infra.errors
import model
import pytest
import spro
import torch
import train
from baselines import answer, prepare, prime, relatives, rto
from tasks.chain import chain_tokenizer
from tasks.problem import Problem

import chaos
from conftest import finished, ran
from helpers import PROMPTS, chat_tokenizer, slow_log_probs, tiny_model
from test_inspect import page_of
from test_prime import PARTS, PRIME, TEXTS, VERDICTS, log_probs_of, slow_sums_of
from test_ranks import assert_alike, learned_rows
from test_spro import (
    BETA,
    G,
    Tabular,
    assert_equal,
    estimate,
    make_batch,
    padded,
    ragged,
    siblings,
    slow_cpr,
    slow_msa,
    slow_outcome,
)

seeds = pytest.mark.parametrize("seed", range(3))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- the advantages, against loops --------------------------------------------------------------------------------


@seeds
def test_prl_subtracts_the_log_ratios_from_the_end_of_a_tokens_step_on(seed):
    b = make_batch(seed)
    outcome, rows = slow_outcome(b.rewards.tolist()), []
    for i, (ratios, ids) in enumerate(zip(ragged(b.pi - b.ref, b.mask), ragged(b.ids, b.mask), strict=True)):
        ends = [max(s for s, step in enumerate(ids) if step == ids[t]) for t in range(len(ids))]
        rows.append([outcome[i] - BETA * math.fsum(ratios[end:]) for end in ends])
    assert_equal(estimate("prl", b), padded(rows))
    assert max(len(ids) - len(set(ids)) for ids in ragged(b.ids, b.mask)) > 1  # steps of several tokens


@seeds
def test_oppo_adds_what_a_token_changes_in_the_belief_in_success_compared_with_siblings(seed):
    b, gains = make_batch(seed), []
    rewards, outcome = b.rewards.tolist(), slow_outcome(b.rewards.tolist())
    for i, sums in enumerate(slow_cpr(ragged(b.told - b.pi, b.mask))):
        right = math.fsum(rewards[k] for k in siblings(i)) + 1
        prior = math.log(right / (G + 2 - right))
        beliefs = [sigmoid(prior), *(sigmoid(prior + x) for x in sums)]
        gains.append([after - before for before, after in itertools.pairwise(beliefs)])
    expected = [[outcome[i] + BETA * x for x in row] for i, row in enumerate(slow_msa(gains))]
    assert_equal(estimate("oppo", b), padded(expected))


@seeds
def test_prime_prefix_adds_the_normalised_differences_still_to_come(seed):
    b, rows = make_batch(seed), []
    r, outcome = ragged(b.pi - b.ref, b.mask), slow_outcome(b.rewards.tolist())
    values = slow_cpr(r)
    for i, row in enumerate(r):
        mean = statistics.fmean(x for k in siblings(i) for x in r[k])
        std = statistics.stdev(x for k in siblings(i) for x in values[k]) + 1e-6
        rows.append([outcome[i] + 0.05 * math.fsum((x - mean) / std for x in row[t:]) for t in range(len(row))])
    assert_equal(estimate("prime_prefix", b), padded(rows))
    assert_equal(estimate("prime_prefix", b, beta=7.0), padded(rows))  # beta is the PRM's alone


@seeds
def test_rto_adds_the_clipped_token_rewards_still_to_come(seed):
    b, rows, outcome = make_batch(seed), [], slow_outcome(make_batch(seed).rewards.tolist())
    for i, ratios in enumerate(ragged(b.pi - b.ref, b.mask)):
        clipped = [min(max(0.04 * x, -0.05), 0.05) for x in ratios]
        rows.append([outcome[i] + math.fsum(clipped[t:]) for t in range(len(ratios))])
    assert_equal(estimate("rto", b, beta=0.04), padded(rows))
    assert 0.05 in {abs(x) for row in ragged((0.04 * (b.pi - b.ref)).clamp(-0.05, 0.05), b.mask) for x in row}


# --- by enumeration -----------------------------------------------------------------------------------------------


def step_term(policy, name):
    return policy.expected_gradient(baselines.ADVANTAGES[name]) - policy.expected_gradient(spro.grpo_advantage)


@pytest.mark.parametrize("stop", [False, True], ids=["fixed length", "variable length"])
def test_prl_descends_the_kl_of_whole_responses_and_spro_ascends_one_of_single_tokens(stop):
    """With steps of one token its expected gradient is exactly -beta grad KL(pi || ref) of whole responses."""
    policy = Tabular(2, stop)
    log_pi, log_ref = (
        torch.where(policy.mask, policy.log_probs(x), 0.0).sum(1) for x in (policy.theta, policy.ref_theta)
    )
    kl = (log_pi.exp() * (log_pi - log_ref)).sum()
    expected = -BETA * torch.autograd.grad(kl, policy.theta)[0]
    assert expected.abs().max() > 1e-3
    assert_equal(step_term(policy, "prl"), expected, 1e-10)
    assert cosine(step_term(policy, "prl"), step_term(policy, "spro")) < 0
    policy.tokens_per_step = 3  # longer steps spare a token what lies between it and its step's end
    assert (step_term(policy, "prl") - expected).abs().max() > 1e-3


def cosine(a, b) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def test_the_accumulated_ratio_is_bayes_posterior_over_prior():
    """P(success | prefix) / P(success), by sums over all responses, where the policy knows what success tells it."""
    policy = Tabular(2, stop=True)
    batch = spro.Batch(
        mask=policy.mask, log_probs=policy.log_probs(policy.theta.detach()), answer_log_probs=policy.told_log_probs()
    )
    evidence = relatives.answer_evidence(batch)
    prior = (policy.prob * policy.rewards).sum()
    for i, t in policy.mask.nonzero().tolist():
        prefix = policy.action[i, : t + 1]
        same = (policy.action[:, : t + 1] == prefix).all(1) & policy.mask[:, t]
        posterior = (policy.prob * policy.rewards)[same].sum() / policy.prob[same].sum()
        assert evidence[i, t].exp().item() == pytest.approx((posterior / prior).item(), rel=1e-10)


def test_differences_of_the_exact_posterior_are_the_policy_gradient_of_success_and_levels_are_too():
    """What a level adds to its difference depends on the past alone: a baseline, as in SPRO."""
    policy = Tabular(2)
    success = (torch.where(policy.mask, policy.log_probs(policy.theta), 0.0).sum(1).exp() * policy.rewards).sum()
    expected = torch.autograd.grad(success, policy.theta)[0]
    assert expected.abs().max() > 1e-3

    def posterior(batch):
        return relatives.answer_evidence(batch).exp() * (policy.prob * policy.rewards).sum()

    def difference(batch, _):
        values = posterior(batch)
        return values.diff(dim=1, prepend=(policy.prob * policy.rewards).sum().expand(len(values), 1))

    for advantage in (difference, lambda batch, _: posterior(batch)):
        assert_equal(policy.expected_gradient(advantage), expected, 1e-10)
    assert policy.variance(difference) < policy.variance(lambda batch, _: posterior(batch))


def test_oppo_pushes_towards_success():
    policy = Tabular(3)
    success = (torch.where(policy.mask, policy.log_probs(policy.theta), 0.0).sum(1).exp() * policy.rewards).sum()
    assert cosine(step_term(policy, "oppo"), torch.autograd.grad(success, policy.theta)[0]) > 0.9


def test_the_future_of_a_penalty_is_noisier_than_the_tokens_own_share():
    policy = Tabular(2)
    policy.rewards[:] = 1  # no outcome: the step terms alone
    variance = {name: policy.variance(baselines.ADVANTAGES[name]) for name in ("prl", "spro", "spro_local")}
    assert variance["prl"] > variance["spro"] > variance["spro_local"]


# --- what the PRMs learn by ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollout() -> spro.Batch:
    batch = spro.Batch.from_texts([PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, TEXTS, chain_tokenizer())
    batch = dataclasses.replace(batch, group_size=4)
    return dataclasses.replace(batch, ref_log_probs=model.batch_log_probs(tiny_model(seed=1), batch, 1.0, 1000)[0])


def config_of(name: str, beta: float, micro_batch_tokens: int = 1000) -> train.Config:
    return train.Config(
        algorithm=train.AlgorithmConfig(advantage=name, beta=beta),
        sample=train.SampleConfig(group_size=4),
        prime=prime.PrimeConfig(learning_rate=1e-3),
        train=train.TrainConfig(micro_batch_tokens=micro_batch_tokens),
    )


def stepped(name: str, rollout, beta: float, parts, micro_batch_tokens: int = 1000) -> tuple:
    """(gradients of the last PRM step, metrics) of a PRM that starts as `tiny_model`, by way of `prepared`."""
    config, prm, gradients = config_of(name, beta, micro_batch_tokens), tiny_model(), {}
    config.data.source = "file"  # whose steps nothing verifies
    optimizer = model.make_optimizer(prm, config.train, config.prime.learning_rate)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in prm.named_parameters() if p.grad is not None})
    )
    trained = {"policy": (prm, None), "prm": (prm, optimizer)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prime, "MAX_GRAD_NORM", 1e9)
        _, metrics = prepare.prepared(rollout, VERDICTS, trained, config, parts, 1, None)
    return gradients, metrics


def pairs() -> list[tuple[int, int]]:
    return [(i, j) for i in range(8) for j in range(8) if i // 4 == j // 4 and VERDICTS[i] > VERDICTS[j]]


def slow_loss(name: str, log_probs, rollout, beta: float) -> torch.Tensor:
    """The mini-batch's loss, one prefix or one pair after the other. log_probs: of each response's tokens."""
    ref = [row[live].double() for row, live in zip(rollout.ref_log_probs, rollout.mask, strict=True)]
    rewards = [beta * (pi.double() - r) for pi, r in zip(log_probs, ref, strict=True)]
    if name == "rto":
        gaps = [rewards[i].sum() - rewards[j].sum() for i, j in pairs()]
        return torch.stack([-gap.sigmoid().log() for gap in gaps]).mean()
    losses = []
    for row, verdict in zip(rewards, VERDICTS.double(), strict=True):
        v = [row[: t + 1].mean() for t in range(len(row))]
        right, wrong = ([(sign * x - 5).sigmoid().log() for x in v] for sign in (1, -1))
        losses.append(torch.stack([-verdict * a - (1 - verdict) * b for a, b in zip(right, wrong, strict=True)]).mean())
    return torch.stack(losses).mean()


def slow_gradients(name: str, rollout, beta: float) -> tuple[dict, float]:
    """By autograd through one plain forward pass of each response."""
    prm, log_probs = tiny_model(), []
    for ids, attended, mask in zip(rollout.tokens, rollout.attention_mask, rollout.mask, strict=True):
        P, n = len(attended) - len(mask), int(mask.sum())
        prompt, response = ids[:P][attended[:P]], ids[P : P + n]
        logits = prm.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs.append(logits.log_softmax(-1)[torch.arange(n), response])
    loss = slow_loss(name, log_probs, rollout, beta)
    loss.backward()
    return {n: p.grad for n, p in prm.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 1000])
@pytest.mark.parametrize("name, beta", [("rto", 0.3), ("prime_prefix", 10.0)])
def test_a_prms_loss_and_gradient_are_those_of_a_loop_however_the_mini_batch_is_split(
    name, beta, micro_batch_tokens, rollout
):
    gradients, metrics = stepped(name, rollout, beta, [torch.arange(8)], micro_batch_tokens)
    expected, loss = slow_gradients(name, rollout, beta)
    assert metrics["prm/loss"] == pytest.approx(loss, rel=1e-4) and gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (gradients[parameter] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, parameter


def test_a_pair_is_in_one_mini_batch_even_where_mini_batches_cut_groups(rollout):
    cut = [torch.tensor([4, 5, 6]), torch.tensor([7, 0, 1]), torch.tensor([2, 3])]
    assert [rows.tolist() for rows in rto.whole_groups(cut, 4)] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert [rows.tolist() for rows in rto.whole_groups([torch.arange(8)], 4)] == [list(range(8))]
    assert rto.whole_groups([], 4) == []
    gradients, whole = stepped("rto", rollout, 0.3, cut)
    expected, parts = stepped("rto", rollout, 0.3, PARTS)
    assert whole["prm/loss"] == parts["prm/loss"] and all(gradients[n].equal(g) for n, g in expected.items())


def test_without_a_pair_the_dpo_loss_is_zero_and_equal_sums_know_nothing():
    sums = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert rto.dpo_loss(sums, torch.ones(4), 2) == 0
    assert rto.dpo_loss(0 * sums, torch.tensor([1.0, 0.0, 0.0, 1.0]), 2).item() == pytest.approx(math.log(2))
    assert rto.dpo_loss(sums, torch.tensor([1.0, 0.0, 1.0, 1.0]), 2).item() == pytest.approx(-math.log(sigmoid(3.0)))


def test_what_a_prm_that_knows_nothing_loses_is_as_the_pages_say(rollout):
    at_start = dataclasses.replace(rollout, ref_log_probs=log_probs_of(tiny_model(), rollout))
    assert max(map(abs, slow_sums_of(at_start.ref_log_probs, at_start.ref_log_probs, rollout.mask))) == 0
    for name, beta, loss in (("prime_prefix", 10.0, 5.007), ("rto", 0.05, 0.693)):
        assert stepped(name, at_start, beta, [torch.arange(8)])[1]["prm/loss"] == pytest.approx(loss, abs=1e-3)


# --- the prompt that tells the answer -----------------------------------------------------------------------------


def told_batch(tokenizer, prompts: list[str], source: str, texts: list[str]):
    problems = [Problem(prompt, "8", "number") for prompt in prompts]
    config = train.Config(algorithm=train.AlgorithmConfig(advantage="oppo"), sample=train.SampleConfig(group_size=2))
    config.data.source = source
    _, ids = data.encode_prompts(problems, tokenizer, 1000)
    rows = [i for i in range(len(prompts)) for _ in range(2)]
    batch = spro.Batch.from_texts([ids[i] for i in rows], texts, tokenizer)
    return config, dataclasses.replace(batch, group_size=2, problems=tuple(problems[i] for i in rows))


def test_the_answers_log_probs_are_those_behind_a_prompt_with_the_answer_in_front():
    policy = tiny_model()
    config, batch = told_batch(policy.tokenizer, ["3b+5?", "1b+2c+5?"], "chain", ["b3+5=8;#8", "#8", "b1+2=3;", ""])
    batch = dataclasses.replace(batch, log_probs=model.batch_log_probs(policy, batch, 1.0, 1000)[0])
    trained, rows = {"policy": (policy, None)}, [torch.arange(4)]
    found, _ = prepare.prepared(batch, VERDICTS[:4], trained, config, rows, 1, None)
    for i, problem in enumerate(batch.problems):
        prompt = policy.tokenizer(f"#8;{problem.prompt}").input_ids
        response = batch.tokens[i, batch.prompt_length :][batch.mask[i]].tolist()
        expected = slow_log_probs(policy, prompt, response, 1.0)[0]
        torch.testing.assert_close(found.answer_log_probs[i][batch.mask[i]].double(), expected, rtol=0, atol=1e-4)
    assert found.fine_log_probs is None and not found.answer_log_probs[~batch.mask].any()
    assert (found.answer_log_probs - batch.log_probs).abs().max() > 0.1


def test_elsewhere_a_sentence_tells_it_through_the_chat_template_and_control_tokens_are_text():
    question = "What is 3 + 5? <|im_end|>"
    tokenizer = chat_tokenizer([question, "The answer to what follows is 8."])
    (problem,) = answer.told([Problem(question, 8, "number")], "gsm8k")
    ((is_held, ids),) = data.encoded([problem], tokenizer)
    told = "<|im_start|>user\nThe answer to what follows is 8.\n\nWhat is 3 + 5? <|im_end|><|im_end|>\n"
    assert is_held and tokenizer.decode(ids) == told + "<|im_start|>assistant\n"
    assert list(ids).count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # the template's


PROGRAM = Problem("print 3", {"inputs": [""], "outputs": ["3"]}, "code", place="p.jsonl, line 7")


@pytest.mark.parametrize(
    "problem, words",
    [
        (PROGRAM, "the reference of p.jsonl, line 7 is a dict, no text or number"),
        (Problem("3b+5?", ["8"], "chain"), "the reference of '3b+5?' is a list"),
        (Problem("3b+5?" * 201, "8", "chain"), "has 1009 tokens of 1008"),
    ],
)
def test_an_answer_that_cannot_be_told_is_refused_at_the_start(problem, words):
    config = train.Config(algorithm=train.AlgorithmConfig(advantage="oppo"))
    config.sample.max_new_tokens = 16
    problems = [Problem("3b+5?", 8, "chain"), problem]
    with pytest.raises(infra.errors.BadInput) as error:
        prepare.require_what_is_needed(config, tiny_model(), problems)
    assert words in str(error.value) and "\n" not in str(error.value)
    config.algorithm.advantage = "grpo"
    prepare.require_what_is_needed(config, tiny_model(), problems)


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_of_oppo_needs_no_reference_and_dumps_what_its_advantage_is_made_of(warm, tmp_path):
    change = (*PRIME, "algorithm.advantage=oppo", "algorithm.beta=1")
    finished(tmp_path / "run", warm, *change)
    rows = learned_rows(tmp_path / "run")
    assert page_of(tmp_path / "run")["check"].startswith("✓")
    assert rows and "ref_log_prob" not in rows[0] and chaos.metrics(tmp_path / "run")[-1]["advantage/step_abs"] > 0
    for first in range(0, len(rows), 4):
        group, gains = rows[first : first + 4], []
        right = math.fsum(row["reward"] for row in group) + 1
        for row in group:
            sums = slow_cpr([[a - p for a, p in zip(row["answer_log_prob"], row["log_prob"], strict=True)]])[0]
            beliefs = [right / 6, *(sigmoid(math.log(right / (6 - right)) + x) for x in sums)]
            gains.append([after - before for before, after in itertools.pairwise(beliefs)])
        for row, own in zip(group, gains, strict=True):
            same = len({r["reward"] for r in group}) == 1
            outcome = [0.0 if same else slow_outcome([r["reward"] for r in group])[group.index(row)]] * len(own)
            means = [statistics.fmean(g[t] for g in gains if t < len(g)) for t in range(len(own))]
            expected = [o + x - mean for o, x, mean in zip(outcome, own, means, strict=True)]
            assert row["advantage"] == pytest.approx(expected, abs=1e-4)


def assert_a_kill_and_two_processes_change_nothing(change: tuple[str, ...], tmp_path, n: int) -> list[dict]:
    """The kill is at optimizer step n of step 4. -> the metrics.

    Mini-batches cut groups where some are not kept, and micro-batches part siblings.
    """
    change += ("train.mini_batch_size=16", "train.prompts_per_step=8", "train.save_every=3")
    change += ("algorithm.keep_accuracy=[0.01,0.99]",)
    one, again = tmp_path / "one", tmp_path / "again"
    finished(one, *change)
    code, words = ran(again, *change, on="optimizer", step=4, n=n, does="kill")
    assert code == -9, words
    assert "going on after step 3" in finished(again, *change, "resume=true")
    assert chaos.differences(one, again) == []
    finished(tmp_path / "two", *change, ranks=2)
    assert_alike(chaos.metrics(one), chaos.metrics(tmp_path / "two"))
    assert page_of(one)["check"].startswith("✓")
    return chaos.metrics(one)


@pytest.mark.parametrize("name, beta", [("prime_prefix", 10), ("rto", 0.05)])
def test_a_kill_and_two_processes_change_nothing(name, beta, warm, tmp_path):
    change = (warm, *PRIME, f"algorithm.advantage={name}", f"algorithm.beta={beta}")
    metrics = assert_a_kill_and_two_processes_change_nothing(change, tmp_path, n=2)
    assert metrics[-1]["prm/loss"] != metrics[1]["prm/loss"]


@pytest.mark.parametrize("name", ["posterior_grpo", "lambda_grpo", "egae", "oppo", "step_oracle"])
def test_nor_where_no_prm_learns(name, warm, tmp_path):
    change = (warm, *PRIME, f"algorithm.advantage={name}", "critic.learning_rate=1e-3")
    metrics = assert_a_kill_and_two_processes_change_nothing(change, tmp_path, n=1)
    assert metrics[-1]["grad_norm"] > 0
    if name == "egae":
        assert metrics[-1]["critic/loss"] != metrics[1]["critic/loss"]


@pytest.mark.parametrize("name", ["prl", "lambda_grpo"])
def test_the_inspector_recomputes_what_a_run_dumped(name, warm, tmp_path):
    finished(tmp_path / "run", warm, *PRIME, f"algorithm.advantage={name}", "algorithm.step_tokens=4")
    assert page_of(tmp_path / "run")["check"].startswith("✓")
    if name == "prl":
        assert {n for row in learned_rows(tmp_path / "run") for n in row["step_id"]} >= {0, 1}


def test_an_ablation_config_of_each_trains_it():
    for name in ("prl", "oppo", "prime_prefix", "lambda_grpo", "rto"):
        file = chaos.ROOT / "configs" / "ablations" / f"{name}.yaml"
        config = infra.config.read_config(train.Config, [str(file)], None)
        assert config.algorithm.advantage == name and config.algorithm.line_end == ";"
