"""PPO and EGAE against loops in float64, the critic against responses valued one by one, and whole runs."""

import dataclasses
import doctest
import itertools
import math
import statistics

import infra.config
import infra.errors
import model
import pytest
import torch
import train
from baselines import advantage, critic
from baselines.prepare import prepared
from safetensors import safe_open
from spro import AlgorithmConfig, Batch
from tasks.chain import chain_tokenizer

import chaos
from conftest import finished
from helpers import PROMPTS, any_model, tiny_model
from test_inspect import page_of
from test_ranks import assert_a_kill_in_step_4_changes_nothing, assert_alike, learned_rows
from test_spro import assert_equal, batch_of, make_batch, padded, ragged

# --- the advantages -----------------------------------------------------------------------------------------------


def slow_gae(values: list[list[float]], rewards: list[float], cut: list[bool], lam: float) -> list[list[float]]:
    """Each advantage as its own sum of deltas; of a response that was cut V(s_l) is V(s_{l-1}) and no reward comes."""
    rows = []
    for V, r, is_cut in zip(values, rewards, cut, strict=True):
        n = len(V)
        V = [*V, V[n - 1] if is_cut else 0.0]
        reward = [0.0] * (n - 1) + [0.0 if is_cut else r]
        deltas = [reward[t] + V[t + 1] - V[t] for t in range(n)]
        rows.append([math.fsum(lam**k * deltas[t + k] for k in range(n - t)) for t in range(n)])
    return rows


def slow_whitened(rows: list[list[float]]) -> list[list[float]]:
    tokens = [x for row in rows for x in row]
    mean, scale = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    return [[(x - mean) / scale for x in row] for row in rows]


@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("name", ["ppo", "egae"])
@pytest.mark.parametrize("seed", range(3))
def test_ppo_and_egae_match_a_double_loop_over_deltas(seed, name, lam):
    b = make_batch(seed)
    cut = b.truncated.tolist() if name == "egae" else [False] * 12
    assert 1 < b.truncated.sum() < 11
    expected = slow_gae(ragged(b.values, b.mask), b.rewards.tolist(), cut, lam)
    rewards = b.rewards[:, None]
    ends = torch.where(torch.tensor(cut)[:, None], b.values, rewards)
    assert_equal(critic.gae(b.values, ends, b.mask, lam), padded(expected))
    found = advantage(name, batch_of(b), AlgorithmConfig(gae_lambda=lam))
    assert_equal(found, padded(slow_whitened(expected)))


def test_egae_is_ppo_where_no_response_was_cut_and_differs_where_one_was():
    b, algo = make_batch(), AlgorithmConfig(gae_lambda=0.95)
    assert not advantage("egae", batch_of(b), algo).equal(advantage("ppo", batch_of(b), algo))
    b.truncated[:] = False
    assert advantage("egae", batch_of(b), algo).equal(advantage("ppo", batch_of(b), algo))


def test_egae_does_not_see_the_reward_of_a_response_that_was_cut():
    b, other = make_batch(), make_batch()
    other.rewards[b.truncated] += 5
    assert advantage("egae", batch_of(b), AlgorithmConfig()).equal(
        advantage("egae", batch_of(other), AlgorithmConfig())
    )


def test_docstring_examples_hold():
    result = doctest.testmod(critic)
    assert result.attempted > 0 and result.failed == 0


# --- the critic ---------------------------------------------------------------------------------------------------

TEXTS = ["b1+2=3;#3", "#7", "b1+2=4;c4*5=0;d0-1=9;#9", "", "b9*9=1;(b9*9=1)#", "b1+2=3;#4", "#1", "b5+5=0;#0"]
REWARDS = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.3, 0.0, -0.5, 1.0])  # shaped ones may leave [0, 1]
CUT = torch.tensor([False, False, True, False, True, False, False, False])
PARTS = [torch.tensor([4, 5, 6, 7]), torch.tensor([0, 1, 2, 3])]


def config_of(update="after", micro_batch_tokens=1000, learning_rate=1e-3, advantage="egae") -> train.Config:
    return train.Config(
        data=train.DataConfig(source="print"),  # whose steps nobody verifies: these batches answer no problem
        algorithm=AlgorithmConfig(advantage=advantage),
        sample=train.SampleConfig(group_size=4),
        critic=critic.CriticConfig(learning_rate=learning_rate, update=update),
        train=train.TrainConfig(micro_batch_tokens=micro_batch_tokens),
    )


def batch_of_texts(texts=TEXTS, rewards=REWARDS, cut=CUT, prompts=PROMPTS[:1] * 4 + PROMPTS[1:2] * 4) -> Batch:
    batch = Batch.from_texts(prompts, texts, chain_tokenizer())
    return dataclasses.replace(batch, rewards=rewards, truncated=cut, group_size=4)


def with_head(policy, scale: float = 0.1) -> critic.Critic:
    """A critic whose head says something from the start."""
    made = critic.Critic(policy)
    torch.nn.init.normal_(made.value_head, std=scale, generator=torch.Generator().manual_seed(7))
    return made


def learned(config, made=None, parts=PARTS, batch=None, ended=~CUT):
    """(critic, values, metrics) of one call."""
    made = made or with_head(tiny_model())
    optimizer = model.make_optimizer(made, config.train, config.critic.learning_rate)
    batch = batch or batch_of_texts()
    return made, *critic.value_and_learn(made, optimizer, config, batch, ended, parts)


@torch.no_grad()
def slow_values(made, batch) -> torch.Tensor:
    """V before every response token: the head times what the model's own head is fed, a response at a time."""
    found = torch.zeros(batch.mask.shape)
    fed = []
    hook = made.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: fed.append(given[0]))
    for i, (ids, attended, mask) in enumerate(zip(batch.tokens, batch.attention_mask, batch.mask, strict=True)):
        P, n = len(attended) - len(mask), int(mask.sum())
        prompt = ids[:P][attended[:P]]
        made.model(torch.cat([prompt, ids[P : P + n]])[None])
        states = fed.pop()[0]
        found[i, :n] = states[len(prompt) - 1 : len(prompt) - 1 + n] @ made.value_head
    hook.remove()
    return found


@pytest.mark.parametrize("is_plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "opt"])
def test_a_value_is_the_head_times_the_state_before_a_token_for_any_model(kind, is_plain, tmp_path):
    made, batch = with_head(any_model(kind, tmp_path)), batch_of_texts()
    if is_plain:
        made.has_plain_head = False
    expected = slow_values(made, batch)
    assert (expected[batch.mask].std() > 0.05) and not expected[~batch.mask].any()
    for tokens in (1, 40, 1000):
        torch.testing.assert_close(critic.batch_values(made, batch, tokens), expected, rtol=0, atol=1e-4)


def test_a_critic_begins_at_zero_and_without_a_gradient_of_its_models():
    made, batch = critic.Critic(tiny_model()), batch_of_texts()
    values = critic.values_of(made, batch)
    assert not values.any()
    (values[batch.mask] - 1).square().sum().backward()
    gradients = [parameter.grad for parameter in made.model.parameters() if parameter.grad is not None]
    assert made.value_head.grad.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 1000])
def test_the_critics_loss_is_the_squared_error_over_the_tokens_of_responses_that_ended(micro_batch_tokens):
    batch = batch_of_texts()
    start = slow_values(with_head(tiny_model()), batch).tolist()
    lengths = batch.mask.sum(1).tolist()
    seen = [(start[i][t], REWARDS[i].item()) for i in range(8) if not CUT[i] for t in range(lengths[i])]
    _, values, metrics = learned(config_of(micro_batch_tokens=micro_batch_tokens), parts=[torch.arange(8)])
    torch.testing.assert_close(values, torch.tensor(start), rtol=0, atol=1e-4)
    assert metrics["critic/loss"] == pytest.approx(statistics.fmean((v - r) ** 2 for v, r in seen), rel=1e-3)
    left = statistics.variance(r - v for v, r in seen) / statistics.variance(r for _, r in seen)
    assert metrics["critic/explained_variance"] == pytest.approx(1 - left, abs=1e-3)


def test_by_default_a_mini_batch_is_valued_by_the_critic_as_it_stands_before_its_own_step():
    batch = batch_of_texts()
    made, values, _ = learned(config_of())
    after_one, _, _ = learned(config_of(), parts=PARTS[:1])
    for rows, scorer in ((PARTS[0], with_head(tiny_model())), (PARTS[1], after_one)):
        torch.testing.assert_close(values[rows], slow_values(scorer, batch)[rows], rtol=0, atol=1e-4)
    assert (values - slow_values(made, batch)).abs().max() > 1e-3  # the steps have moved it


def test_before_values_with_the_critic_that_has_taken_all_its_steps():
    made, values, before = learned(config_of("before"))
    torch.testing.assert_close(values, slow_values(made, batch_of_texts()), rtol=0, atol=1e-4)
    _, _, after = learned(config_of())
    assert {k: v for k, v in before.items() if k != "time/critic"} == {
        k: v for k, v in after.items() if k != "time/critic"
    }


def test_a_critic_learns_the_expected_reward_of_every_prefix():
    """Of all 8 words of three symbols, each as likely: V of a prefix is the mean reward of the words that go on so."""
    words = ["".join(symbols) for symbols in itertools.product("12", repeat=3)]
    rewards = [0.0, 1.0, 0.25, 0.5, 1.0, 1.0, 0.0, 0.75]

    def expected(prefix: str) -> float:
        return statistics.fmean(r for word, r in zip(words, rewards, strict=True) if word.startswith(prefix))

    exact = torch.tensor([[expected(word[:t]) for t in range(4)] for word in words])
    batch = batch_of_texts(words, torch.tensor(rewards), torch.zeros(8, dtype=torch.bool), PROMPTS[:1] * 8)
    config, made = config_of(), critic.Critic(tiny_model())
    optimizer = model.make_optimizer(made, config.train)
    for step in range(150):
        model.set_learning_rate(optimizer, 1e-2 * (1 - step / 150))
        arguments = (config, batch, torch.ones(8, dtype=torch.bool), [torch.arange(8)])
        values, metrics = critic.value_and_learn(made, optimizer, *arguments)
    assert batch.mask.all()
    torch.testing.assert_close(values, exact, rtol=0, atol=2e-3)
    errors = (torch.tensor(rewards)[:, None] - exact).square()
    assert metrics["critic/loss"] == pytest.approx(errors.mean().item(), abs=1e-3)  # no smaller one is possible


@pytest.mark.parametrize("name", ["ppo", "egae"])
def test_a_critic_moves_itself_and_nothing_of_the_policy(name):
    config = config_of(advantage=name)
    policy, made = tiny_model(), with_head(tiny_model())
    trained = {
        "policy": (policy, model.make_optimizer(policy, config.train)),
        "critic": (made, model.make_optimizer(made, config.train, 1e-3)),
    }
    batch, _ = prepared(batch_of_texts(), REWARDS, trained, config, PARTS, 1, None)
    found = advantage(name, batch, config.algorithm)
    assert found.any() and not found.requires_grad and not batch.critic_values.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), tiny_model().parameters(), strict=True))
    moved = zip(made.parameters(), with_head(tiny_model()).parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def test_the_critic_of_ppo_learns_from_responses_that_were_cut_and_that_of_egae_does_not():
    found = {}
    for name in ("ppo", "egae"):
        config, made = config_of(advantage=name), with_head(tiny_model())
        trained = {"policy": (tiny_model(), None), "critic": (made, model.make_optimizer(made, config.train, 1e-3))}
        batch = dataclasses.replace(batch_of_texts(), truncated=torch.ones(8, dtype=torch.bool))
        _, metrics = prepared(batch, REWARDS, trained, config, PARTS, 1, None)
        found[name] = metrics["critic/loss"]
    assert found["ppo"] > 0.1 and found["egae"] == 0


def test_a_non_finite_gradient_leaves_the_critic_as_it_was_and_a_step_of_nothing_else_ends_the_run():
    broken = batch_of_texts(rewards=torch.where(torch.arange(8) == 0, math.nan, REWARDS))
    made = with_head(tiny_model())
    with pytest.raises(infra.errors.RunStopped, match=r"lower critic\.learning_rate"):
        learned(config_of(), made, parts=[torch.arange(8)], batch=broken)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), with_head(tiny_model()).parameters(), strict=True))
    _, _, metrics = learned(config_of(), batch=broken)  # the part without row 0 is learned from
    assert metrics["critic/refused"] == 1 and math.isfinite(metrics["critic/loss"])


def test_settings_of_a_critic_that_mean_nothing_are_refused():
    for arguments, words in (
        ({"critic": {"update": "during"}}, "choose after or before"),
        ({"critic": {"learning_rate": 0.0}}, "learning_rate=0.0 must be positive"),
        ({"algorithm": {"gae_lambda": 1.5}}, r"gae_lambda=1.5 must lie in \[0, 1\]"),
    ):
        with pytest.raises(infra.errors.BadInput, match=words):
            infra.config.build_config(train.Config, arguments, infra.config.all_keys(train.Config))


# --- whole runs ---------------------------------------------------------------------------------------------------

PPO = ("algorithm.advantage=ppo", "critic.learning_rate=1e-3", "algorithm.gae_lambda=0.95", "train.steps=4")
PPO += ("train.dump_every=2", "train.save_every=2", "eval.every=4")


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    finished(folder, warm, *PPO)
    return folder


def assert_dumped_advantages_are_gae_of_dumped_values(run, is_egae: bool) -> None:
    rows = learned_rows(run)
    values, rewards = [row["critic_value"] for row in rows], [row["reward"] for row in rows]
    cut = [is_egae and row["truncated"] for row in rows]
    assert rows and max(abs(v) for row in values for v in row) > 1e-2  # the critic has learned something
    for row, expected in zip(rows, slow_whitened(slow_gae(values, rewards, cut, 0.95)), strict=True):
        assert row["advantage"] == pytest.approx(expected, abs=1e-4)
    page = page_of(run)
    assert page["check"].startswith("✓") and "critic_value" in page["views"]


def test_dumped_advantages_are_gae_of_the_dumped_values_and_the_critic_is_in_the_checkpoint(straight):
    assert_dumped_advantages_are_gae_of_dumped_values(straight, is_egae=False)
    keys = {"critic/loss", "critic/explained_variance", "critic/grad_norm", "critic/refused"}
    assert keys <= chaos.metrics(straight)[-1].keys()
    files = (straight / "checkpoints" / "step_000004").glob("*.safetensors")
    names = {name for file in files for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118  (no dict)
    assert {"critic.model.value_head", "critic.optimizer.exp_avg.value_head"} <= names


@pytest.mark.parametrize("name, update", [("ppo", "after"), ("egae", "before")])
def test_two_processes_train_a_critic_as_one_does(name, update, straight, warm, tmp_path):
    change, one = (f"algorithm.advantage={name}", f"critic.update={update}"), straight
    if name != "ppo":
        one = tmp_path / "one"
        finished(one, warm, *PPO, *change)
        assert_dumped_advantages_are_gae_of_dumped_values(one, is_egae=True)
    finished(tmp_path / "two", warm, *PPO, *change, ranks=2)
    assert_alike(chaos.metrics(one), chaos.metrics(tmp_path / "two"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_inside_the_critics_step_changes_nothing(ranks, straight, warm, tmp_path):
    arguments = (warm, *PPO)
    assert_a_kill_in_step_4_changes_nothing(straight, tmp_path / "run", arguments, "optimizer", 2, ranks)
