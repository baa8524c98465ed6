"""A*-PO: what its loss is least for, its gradient against loops and by autograd, V* and its file, and whole runs."""

import itertools
import json
import math
from dataclasses import replace

import baselines
import infra.config
import infra.errors
import infra.rng
import model
import pytest
import sample as sampler
import torch
import train
from baselines import a_star
from data import prompt_index
from rewards import Grader, Verdict
from spro import AlgorithmConfig, Batch, token_weights
from tasks.chain import chain_tokenizer
from tasks.problem import Problem
from tools import inspector

import chaos
from conftest import finished, ran
from helpers import PROMPTS, any_model, one_update, tiny_model
from test_ranks import assert_alike

# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_policy_of_least_loss_is_the_soft_optimal_one():
    """All responses of a tabular policy, 3 symbols, at most 3 tokens, 0 stops; beta1 = beta2 and V* exact."""
    beta, source = 0.4, torch.Generator().manual_seed(0)
    sequences = itertools.product(range(3), repeat=3)
    responses = sorted({r[: r.index(0) + 1] if 0 in r else r for r in sequences})
    states = sorted({r[:t] for r in responses for t in range(len(r))})
    mask = torch.tensor([[t < len(r) for t in range(3)] for r in responses])
    state = torch.tensor([[states.index(r[:t]) if t < len(r) else 0 for t in range(3)] for r in responses])
    action = torch.tensor([[*r, 0, 0][:3] for r in responses])
    theta, ref_theta = torch.randn(2, len(states), 3, generator=source).double()
    rewards = torch.rand(len(responses), generator=source).double()

    def log_probs(theta):
        return torch.where(mask, theta.log_softmax(1)[state, action], 0.0)

    ref = log_probs(ref_theta)
    p_ref = ref.sum(1).exp()
    best = p_ref * (rewards / beta).exp()
    v_star = beta * best.sum().log()
    # Responses of any distribution will do; lengths differ, and a response counts once however long it is
    chance = torch.rand(len(responses), generator=source).double() + 0.1
    weights = torch.where(mask, (chance / mask.sum(1))[:, None], 0.0)
    advantages = (rewards - v_star)[:, None].expand(mask.shape)
    batch = Batch(mask=mask, ref_log_probs=ref, advantages=advantages, weights=weights)

    theta.requires_grad_()
    solver = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        value = a_star.regression_loss(log_probs(theta), batch, beta)
        value.backward()
        return value

    solver.step(loss)
    found = log_probs(theta).sum(1).exp().detach()
    assert (found - p_ref).abs().max() > 0.05
    torch.testing.assert_close(found, best / best.sum(), rtol=0, atol=1e-6)


def random_batch(n: int = 9, T: int = 7) -> tuple[torch.Tensor, Batch]:
    source = torch.Generator().manual_seed(1)
    mask = torch.arange(T) < torch.randint(1, T, (n, 1), generator=source)
    log_probs, ref = torch.randn(2, n, T, generator=source).double()
    advantages = torch.randn(n, 1, generator=source).double().expand(n, T)
    weights = token_weights(mask, n, int(mask.sum()), "seq-mean-token-mean")
    return log_probs.requires_grad_(), Batch(mask=mask, ref_log_probs=ref, advantages=advantages, weights=weights)


@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_loss_and_gradient_are_those_of_a_loop_however_the_step_is_split(size):
    beta, (log_probs, batch) = 0.3, random_batch()
    slow = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(batch.mask):
        log_ratio = sum(log_probs[i, t] - batch.ref_log_probs[i, t] for t in range(int(row.sum())))
        slow = slow + (beta * log_ratio - batch.advantages[i, 0]) ** 2 / len(batch)
    (expected,) = torch.autograd.grad(slow, log_probs)
    total = 0.0
    for rows in torch.arange(9).split(size):
        part = batch.select(rows)
        T = int(part.mask.sum(1).max())  # cut to its own longest response
        cut = {name: getattr(part, name)[:, :T] for name in ("mask", "ref_log_probs", "advantages", "weights")}
        loss = a_star.regression_loss(log_probs[rows, :T], replace(part, **cut), beta)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(slow.item(), abs=1e-12)
    torch.testing.assert_close(log_probs.grad, expected, rtol=0, atol=1e-12)
    assert not log_probs.grad[~batch.mask].any() and expected.abs().max() > 1e-2


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9])
def test_padding_and_a_row_of_no_weight_change_nothing_whatever_they_hold(value):
    log_probs, batch = random_batch()
    clean = a_star.regression_loss(log_probs, batch, 0.3)
    dirty = {name: getattr(batch, name).masked_fill(~batch.mask, value) for name in ("ref_log_probs", "advantages")}
    found = a_star.regression_loss(log_probs.masked_fill(~batch.mask, value), replace(batch, **dirty), 0.3)
    assert found.equal(clean) and found.isfinite()
    nothing = replace(batch, weights=torch.zeros_like(batch.weights))
    assert a_star.regression_loss(log_probs, nothing, 0.3).item() == 0


def test_the_loop_takes_the_gradient_of_the_regression_in_any_micro_batches(tmp_path):
    beta, policy = 0.2, any_model("gpt2", tmp_path).double()  # which norms in float64 too
    reference = model.freeze(tiny_model(seed=1).double())
    texts = ["b1+2=3;#3", "#7", "b1+2=4;c4*5=0;d0-1=9;#9", "", "b9*9=1;(b9*9=1)#", "#1"]
    batch = Batch.from_texts([PROMPTS[i] for i in (0, 0, 1, 1, 5, 5)], texts, chain_tokenizer())
    old, ref = (
        model.token_log_probs(m, batch, 1.0).log_probs.detach() for m in (tiny_model(seed=2).double(), reference)
    )
    problems = (Problem("?", "", "chain", v_star=0.5),) * 6
    advantages = torch.tensor([0.4, -0.6, 0.1, -0.2, 0.8, -0.1]).double()[:, None].expand(batch.mask.shape)
    batch = replace(batch, log_probs=old, ref_log_probs=ref, problems=problems)

    log_ratio = (torch.where(batch.mask, model.token_log_probs(policy, batch, 1.0).log_probs - ref, 0.0)).sum(1)
    loss = (beta * log_ratio - advantages[:, 0]).square().mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    for tokens in (1, 60, 1000):
        config = train.Config(
            algorithm=AlgorithmConfig(advantage="a_star", beta=beta),
            sample=train.SampleConfig(group_size=2),
            train=train.TrainConfig(micro_batch_tokens=tokens),
        )
        found, row = one_update(policy, config, batch, advantages, reference)
        found = torch.cat([gradient.flatten() for gradient in found.values()])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-10) and expected.abs().max() > 1e-3


# --- V* -----------------------------------------------------------------------------------------------------------


def slow_v_star(rewards: list[float], beta: float) -> float:
    found = [r for r in rewards if not math.isnan(r)]
    return beta * math.log(math.fsum(math.exp(r / beta) for r in found) / len(found))


def test_v_star_is_the_soft_maximum_of_the_references_rewards():
    rewards = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1], [0.3, math.nan, 1, 0.5], [1, 1, 1, 1]])
    for beta in (0.1, 0.5, 7.0):
        expected = [slow_v_star(row.tolist(), beta) for row in rewards.double()]
        assert a_star.optimal_values(rewards, beta).tolist() == pytest.approx(expected, abs=1e-7)
    mixed = rewards[1:2]
    # Between the mean, where beta is large, and the largest, where it is small
    limits = [a_star.optimal_values(mixed, beta).item() for beta in (1e3, 1e-3)]
    assert limits == pytest.approx([0.5, 1.0], abs=1e-3)


PROBLEMS = [Problem(f"{i}b+{i % 4}?", str(i % 3), "chain") for i in range(6)]
STATE = {"start_hash": "of the reference", "problems": {"training": "of the problems"}}


def config_of(steps: int, samples: int = 3) -> train.Config:
    return train.Config(
        algorithm=AlgorithmConfig(advantage="a_star", beta=1e-3),
        sample=train.SampleConfig(group_size=2, max_new_tokens=8),
        a_star=a_star.AStarConfig(samples=samples),
        train=train.TrainConfig(steps=steps, prompts_per_step=2, mini_batch_size=4),
    )


def valued(folder, steps: int, state=STATE, grader=None, policy=None) -> list:
    train_set = (PROBLEMS, PROMPTS)
    return a_star.with_values(config_of(steps), folder, policy or tiny_model(), train_set, grader or Grader(), state)[0]


def reward_of(text: str) -> float:
    """Such as a random model earns too."""
    return len(text) % 3 / 2


class Lengths(Grader):
    def judge(self, answers, limit):
        return [(Verdict(reward_of(text), ""), reward_of(text)) for _, text, _ in answers]


def test_v_star_is_made_of_the_prompts_that_a_run_meets_once_and_never_again(tmp_path, monkeypatch):
    monkeypatch.setattr(a_star, "restart_watchdog", lambda _: None)
    file = tmp_path / "v_star.jsonl"
    given = {"policy": tiny_model(), "grader": Lengths()}
    first = valued(tmp_path, 2, **given)
    met = [prompt_index(p, 6, 0) for p in range(4)]
    assert [i for i, problem in enumerate(first) if problem.v_star is not None] == sorted(met)
    for i in met:  # the reference's own responses, drawn and graded here once more
        keys = [(0, int(infra.rng.Draw.V_STAR), i)]
        texts = sampler.sample(given["policy"], [PROMPTS[i]], keys, config_of(2).sample, group_size=3).texts
        assert first[i].v_star == pytest.approx(slow_v_star(list(map(reward_of, texts)), 0.5), abs=1e-9)
    assert len({first[i].v_star for i in met}) > 1
    lines = file.read_text()
    again = valued(tmp_path, 2, **given)
    assert lines.count("\n") == 2 and file.read_text() == lines
    assert [problem.v_star for problem in again] == [problem.v_star for problem in first]
    # More steps meet more prompts; the second epoch meets none that is new
    more = valued(tmp_path, 7, **given)
    assert all(problem.v_star is not None for problem in more) and file.read_text().startswith(lines)
    assert file.read_text().count("\n") == 3
    assert [more[i].v_star for i in met] == [first[i].v_star for i in met]


def test_a_line_cut_short_and_those_of_another_reference_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(a_star, "restart_watchdog", lambda _: None)
    file = tmp_path / "v_star.jsonl"
    first = [problem.v_star for problem in valued(tmp_path, 3)]
    whole = file.read_text()
    file.write_text(whole[:-9])
    assert [problem.v_star for problem in valued(tmp_path, 3)] == first and file.read_text() == whole
    for changed in (STATE | {"start_hash": "of another"}, STATE | {"problems": {"training": "others"}}):
        valued(tmp_path, 3, changed)
        assert len({line["of"]["reference"] for line in map(json.loads, file.read_text().splitlines())}) == 1
        assert file.read_text() != whole and file.read_text().count("\n") == 3


def test_a_prompt_without_any_verdict_ends_the_run_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(a_star, "restart_watchdog", lambda _: None)

    class Faulty(Grader):
        def judge(self, answers, limit):
            return [(Verdict(None, "out of order"), math.nan) for _ in answers]

    with pytest.raises(
        infra.errors.RunStopped, match=r"no response of the reference to training prompt .* out of order"
    ):
        valued(tmp_path, 1, grader=Faulty())


def test_a_run_without_an_end_asks_for_the_prompts_that_there_are():
    """However many steps are configured: as soon as every prompt is met, no step meets a new one."""
    config = train.Config()
    config.train.steps, config.train.prompts_per_step = 10**12, 4
    found = a_star.new_prompts(config, 10, {3})
    assert sorted(i for chosen in found for i in chosen) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_problem_without_v_star_is_a_value_error():
    batch = Batch(mask=torch.ones(2, 3, dtype=torch.bool), group_size=2, rewards=torch.tensor([0.0, 1.0]))
    batch = replace(batch, ref_log_probs=torch.zeros(2, 3))
    for problems in (None, (Problem("?", "1", "number"),) * 2):
        with pytest.raises(ValueError, match="a_star_advantage needs v_star in its problems"):
            baselines.advantage("a_star", replace(batch, problems=problems), AlgorithmConfig())


def test_other_estimators_make_no_v_star(tmp_path):
    train_set = (PROBLEMS, PROMPTS)
    assert a_star.with_values(train.Config(), tmp_path, None, train_set, Grader(), STATE) is train_set
    assert not list(tmp_path.iterdir())


# --- the config, and whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({"algorithm": {"beta": 0.0}}, "advantage=a_star needs algorithm.beta above 0: it is beta2"),
        ({"algorithm": {"clip_high": 0.28}}, "takes no algorithm.clip_high=0.28"),
        ({"algorithm": {"loss_weights": "token-mean"}}, "takes no algorithm.loss_weights=token-mean"),
        ({"algorithm": {"kl_coef": 0.1}}, "takes no algorithm.kl_coef=0.1"),
        ({"algorithm": {"process_dtype": "float32"}}, "takes no algorithm.process_dtype=float32"),
        ({"train": {"max_refills": 1}}, "takes no train.max_refills=1: V* is made before RL"),
        ({"a_star": {"samples": 0}}, "samples=0 must be at least 1"),
        ({"a_star": {"beta": 0.0}}, "beta=0.0 must be positive"),
    ],
)
def test_what_the_regression_does_not_have_is_refused(blocks, words):
    values = blocks | {"algorithm": {"advantage": "a_star", "beta": 1e-3} | blocks.get("algorithm", {})}
    with pytest.raises(infra.errors.BadInput) as error:
        infra.config.build_config(train.Config, values, infra.config.all_keys(train.Config))
    assert words in str(error.value) and "\n" not in str(error.value)


A_STAR = ("algorithm.advantage=a_star", "algorithm.beta=0.01", "a_star.samples=3", "train.steps=4", "eval.every=4")
A_STAR += ("train.save_every=2", "train.dump_every=4", "train.micro_batch_tokens=2000")


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("a_star") / "run"
    return folder, finished(folder, warm, *A_STAR)


def test_dumped_advantages_are_rewards_minus_the_v_star_of_the_run_folder(straight, capsys):
    folder, said = straight
    assert "a_star, beta 0.01" in said and "V*: 3 responses of the reference to each of 16 prompts" in said
    lines = [json.loads(line) for line in (folder / "v_star.jsonl").read_text().splitlines()]
    known = {v for line in lines for v in line["v_star"]}
    rows = [json.loads(line) for line in (folder / "samples" / "step_000004.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and len(lines) == 4
    assert all(3 * 4 < line["tokens"] <= 3 * 4 * 14 for line in lines)  # 3 responses to each of 4 prompts
    for row in rows:
        assert row["v_star"] in known
        assert row["advantage"] == pytest.approx([row["reward"] - row["v_star"]] * len(row["id"]), abs=1e-6)
    inspector.show(inspector.parser().parse_args([str(folder)]))
    assert "✓ advantages recomputed" in " ".join(capsys.readouterr().out.split())
    assert all(0 < row["loss"] < 2 and "kl/ref" in row for row in chaos.metrics(folder)[1:])


def test_two_processes_fit_as_one_does(straight, warm, tmp_path):
    finished(tmp_path / "two", warm, *A_STAR, ranks=2)
    assert_alike(chaos.metrics(straight[0]), chaos.metrics(tmp_path / "two"))
    assert (tmp_path / "two" / "v_star.jsonl").read_text() == (straight[0] / "v_star.jsonl").read_text()


@pytest.mark.parametrize("n, words", [(3, "each of 8 prompts"), (7, "going on after step 2")], ids=["V*", "step 3"])
def test_a_kill_while_v_star_is_made_or_later_changes_nothing(n, words, straight, warm, tmp_path):
    folder, go_on = tmp_path / "run", (warm, *A_STAR, "resume=true")
    code, said = ran(folder, *go_on, on="reward", n=n, does="kill")
    assert code == -9, said
    assert words in finished(folder, *go_on)
    assert chaos.differences(straight[0], folder) == []
    assert (folder / "v_star.jsonl").read_text() == (straight[0] / "v_star.jsonl").read_text()


def test_a_signal_while_v_star_is_made_stops_the_run_and_keeps_what_is_made(warm, tmp_path):
    code, words = ran(tmp_path / "run", warm, *A_STAR, on="reward", n=2, does="SIGTERM")
    assert code == infra.errors.EXIT_STOPPED and "told to stop while V* was made; resume=true goes on" in words, words
    assert (tmp_path / "run" / "v_star.jsonl").read_text().count("\n") == 2
