"""The sampler against slow loops and plain forwards; every mask is recounted by hand."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from infra.errors import RunStopped
from infra.rng import Draw
from infra.sharding import shard
from model import ModelConfig, batch_log_probs, load, save, token_log_probs
from sample import InverseCDF, SampleConfig, sample, uniforms
from spro import Batch
from tasks.chain import chain_tokenizer

from helpers import (
    EOS,
    PROMPTS,
    any_model,
    keys,
    row_log_probs,
    rows_of,
    slow_log_probs,
    tiny_model,
)

CONFIG = SampleConfig(group_size=16, max_new_tokens=12, temperature=0.7)
pads = pytest.mark.parametrize("pad_is_eos", [False, True])


def tokenizer_where(pad_is_eos):
    tokenizer = chain_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def draw(model, prompts=PROMPTS, at=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return sample(model, prompts, at or keys(len(prompts)), config)


def assert_same(a, b):
    assert rows_of(a) == rows_of(b)
    for x, y in zip(row_log_probs(a), row_log_probs(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def rollout(model):
    """Rows that stop at once, later and never, behind prompts of 1 to 7 tokens that hold pad, eos and unk."""
    rollout = draw(model)
    lengths = rollout.mask.sum(1)
    assert (lengths == 1).any() and rollout.truncated.any() and ((lengths > 1) & (lengths < 12)).any()
    return rollout


@pads
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_sampler_and_training_agree_on_every_log_prob(kind, pad_is_eos, tmp_path):
    tokenizer = tokenizer_where(pad_is_eos)
    model = any_model(kind, tmp_path, tokenizer)
    rollout = draw(model)
    assert (rollout.mask.sum(1) == 1).any() and rollout.truncated.any()
    log_probs, _ = batch_log_probs(model, rollout, CONFIG.temperature, 32)
    assert (log_probs - rollout.sampler_log_probs).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 1.7])
def test_log_probs_are_those_of_the_whole_softmax_at_the_temperature_and_0_is_greedy_at_1(model, temperature):
    rollout = sample(model, PROMPTS, keys(6), CONFIG, 4, temperature)
    for (prompt, response, *_), log_probs in zip(rows_of(rollout), row_log_probs(rollout), strict=True):
        expected, _ = slow_log_probs(model, prompt, response, temperature or 1.0)
        torch.testing.assert_close(log_probs.double(), expected, atol=1e-4, rtol=0)
        choices = model.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        assert temperature or response == choices
    for (prompt, response, *_), found in zip(rows_of(rollout), rollout.sampler_entropy, strict=True):
        _, expected = slow_log_probs(model, prompt, response, temperature or 1.0)
        torch.testing.assert_close(found[: len(response)].double(), expected, atol=1e-4, rtol=0)


@pads
@pytest.mark.parametrize("stops", [[EOS], [EOS, 7, 30], [11]])
def test_masks_hold_the_prompt_and_end_with_the_first_stop_token_or_else_the_row_is_truncated(stops, pad_is_eos):
    tokenizer, ends = tokenizer_where(pad_is_eos), set()
    model = tiny_model(tokenizer)
    model.stop_ids = stops
    rollout = draw(model)
    T = rollout.mask.shape[1]
    P = rollout.tokens.shape[1] - T
    for i, row in enumerate(rollout.tokens[:, P:].tolist()):
        places, before = [t for t, token in enumerate(row) if token in stops], len(PROMPTS[i // 16])
        length = places[0] + 1 if places else T
        assert rollout.mask[i].tolist() == [True] * length + [False] * (T - length)
        assert rollout.attention_mask[i].tolist() == [False] * (P - before) + [True] * before + rollout.mask[i].tolist()
        assert bool(rollout.truncated[i]) == (not places) and (rollout.sampler_log_probs[i, length:] == 0).all()
        assert rollout.texts[i] == "".join(t for t in tokenizer.convert_ids_to_tokens(row[:length]) if len(t) == 1)
        ends |= {row[length - 1]} if places else {None}
    assert ends == {None, *stops}  # all cases came up, the one of a row that never stops too


def test_siblings_are_adjacent_and_differ_and_do_not_depend_on_their_number(model, rollout):
    rows = rows_of(rollout)
    assert [row[0] for row in rows] == [prompt for prompt in PROMPTS for _ in range(16)]
    assert all(len({tuple(row[1]) for row in rows[i : i + 16]}) > 8 for i in range(0, len(rows), 16))
    assert rows_of(draw(model, group_size=4)) == [row for i, row in enumerate(rows) if i % 16 < 4]


@pytest.mark.parametrize("decoding", ["fast", "plain"])
@pytest.mark.parametrize(("tokens", "order"), [(1, [3, 1]), (50, [4, 0, 5, 1, 3, 2]), (9999, [5, 2]), (70, [1])])
def test_no_sample_depends_on_batches_decoding_or_company(tokens, order, decoding, model, rollout):
    at, changes = [keys(6)[i] for i in order], {"batch_tokens": tokens, "decoding": decoding}
    part = draw(model, prompts=[PROMPTS[i] for i in order], at=at, **changes)
    assert_same(part, rollout.select(torch.cat([torch.arange(16) + 16 * i for i in order])))


def test_every_part_of_a_key_changes_the_draws_and_nothing_else_does(model, rollout):
    base = (3, int(Draw.SAMPLE), 5, 2)
    others = [(4, 2, 5, 2), (3, int(Draw.EVALUATE), 5, 2), (3, 2, 6, 2), (3, 2, 5, 3), (3, 2, 2, 5)]
    rows = uniforms([base, *others], 50)
    assert len(rows[:, 0].unique()) == 6 and rows.dtype == torch.float64 and ((rows >= 0) & (rows < 1)).all()
    assert rows[0].equal(uniforms([others[0], base], 80)[1, :50])
    for at in (keys(6, seed=1), keys(6, purpose=Draw.EVALUATE)):
        assert sum(a == b for a, b in zip(rows_of(draw(model, at=at)), rows_of(rollout), strict=True)) < 48


def test_generation_settings_that_a_model_ships_with_change_no_sample_and_survive_saving(tmp_path):
    clean = tiny_model()
    save(clean, tmp_path / "model")
    poison = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "num_beams": 3}
    poison |= {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 6, "max_length": 9}
    poison |= {"suppress_tokens": [5, 6, 7, 8], "begin_suppress_tokens": [EOS], "bad_words_ids": [[14], [15]]}
    poison |= {"forced_eos_token_id": 20, "exponential_decay_length_penalty": [1, 2.0], "eos_token_id": [EOS]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(poison))
    model = load(tmp_path / "model")
    assert_same(draw(model), draw(clean))
    save(model, tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: kept.get(key) for key in poison} == poison


def test_a_training_pass_with_gradient_checkpointing_changes_no_later_sample():
    model, tokens = tiny_model(), torch.tensor([PROMPTS[1]])
    shard(model, ModelConfig(gradient_checkpointing=True), torch.device("cpu"))
    before = draw(model)
    everywhere = torch.ones_like(tokens).bool()
    batch = Batch(tokens=tokens, attention_mask=everywhere, mask=everywhere[:, -3:])
    token_log_probs(model, batch, 1.0).log_probs.sum().backward()
    assert_same(draw(model), before)


def choose(logits, u, temperature=1.0):
    """The tokens that InverseCDF leaves possible as the second ones, and the log-probs it records for them."""
    u = torch.as_tensor(u, dtype=torch.float64)
    processor = InverseCDF(torch.stack([1 - u, u], 1), temperature, prompt_length=3)
    left = processor(torch.zeros(len(logits), 4, dtype=torch.long), logits)
    assert (left.isfinite().sum(-1) == 1).all() and (processor.log_probs[:, 0] == 0).all()
    return left.argmax(-1), processor.log_probs[:, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_token_is_the_one_that_a_slow_inverse_cdf_finds(temperature):
    g = torch.Generator().manual_seed(0)
    logits, u = 3 * torch.randn(2000, 30, generator=g), torch.rand(2000, generator=g, dtype=torch.float64)
    tokens, log_probs = choose(logits, u, temperature)
    for row, point, token, log_prob in zip(logits.tolist(), u.tolist(), tokens.tolist(), log_probs, strict=True):
        weights, below, expected = [math.exp(x / temperature) for x in row], 0.0, 0
        while (below + weights[expected]) / sum(weights) <= point:
            below, expected = below + weights[expected], expected + 1
        assert token == expected
        assert log_prob.item() == pytest.approx(math.log(weights[expected] / sum(weights)), abs=1e-5)


@pytest.mark.parametrize(("u", "expected"), [(0.0, [1, 2]), (5e-324, [1, 2]), (0.5, [3, 2]), (1 - 2**-53, [3, 2])])
def test_a_token_of_probability_0_is_never_chosen(u, expected):
    never = -torch.inf
    logits = torch.tensor([[never, 0.0, -1e9, 1.0, never], [-1e9, never, 0.3, never, -1e9]]).repeat(50, 1)
    tokens, log_probs = choose(logits + torch.linspace(-80, 80, 100)[:, None], [u] * 100)  # many roundings of the sum
    assert log_probs.isfinite().all() and tokens.tolist() == expected * 50


def test_a_large_vocabulary_is_searched_as_by_a_loop_over_all_of_it_in_float64():
    """Runs of tokens of probability 0, some of whole blocks of 512, and a last block that is not full."""
    g = torch.Generator().manual_seed(0)
    logits, u = 4 * torch.randn(40, 151_936, generator=g), torch.rand(40, generator=g, dtype=torch.float64)
    logits[10:20, 1000:30_000] = -torch.inf
    logits[20:30, 3000:] = -torch.inf
    logits[30:, :151_800] = -torch.inf
    u[[0, 10, 20, 30]], u[[9, 19, 29, 39]] = 0.0, 1 - 2**-53
    tokens, log_probs = choose(logits, u)
    probabilities = logits.log_softmax(-1).exp().double()
    for p, point, token, log_prob in zip(probabilities, u.tolist(), tokens.tolist(), log_probs, strict=True):
        cdf = list(itertools.accumulate(p.tolist()))
        assert token == next(i for i, end in enumerate(cdf) if end > point * cdf[-1])
        assert log_prob.item() == pytest.approx(p[token].log().item(), abs=1e-5)


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-53])
def test_in_a_large_vocabulary_too_a_token_of_probability_0_is_never_chosen(u):
    """One possible token, at any place of a block, its probability rounded in many ways."""
    places = [0, 1, 511, 512, 1000, 49_151, 151_551, 151_552, 151_935]
    logits = torch.full((len(places), 151_936), -torch.inf)
    logits[range(len(places)), places] = torch.linspace(-80, 80, len(places))
    assert choose(logits, [u] * len(places))[0].tolist() == places


def test_draws_are_distributed_as_the_softmax():
    logits = torch.linspace(-3, 1, 20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    n, p = 20_000, (logits.double() / 0.8).softmax(-1)
    u = uniforms([(0, int(Draw.SAMPLE), i // 100, i % 100) for i in range(n // 10)], 10).flatten()
    counts = choose(logits.repeat(n, 1), u, 0.8)[0].bincount(minlength=20)
    assert ((counts - n * p) ** 2 / (n * p)).sum() < 50  # chi-square of 19 degrees: more with probability 1e-4


@pytest.mark.parametrize("decoding", ["fast", "plain"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_nan_is_said_with_the_token_where_it_began(temperature, decoding):
    model, (prompt,) = tiny_model(), [p for p in PROMPTS if len(p) == 7]

    def broken_from_the_8th_token_on(_, args, kwargs, output):
        late = kwargs["position_ids"][:, -output.logits.shape[1] :] >= 7
        output.logits = output.logits.masked_fill(late[..., None], math.nan)

    model.model.register_forward_hook(broken_from_the_8th_token_on, with_kwargs=True)
    config = dataclasses.replace(CONFIG, decoding=decoding)
    words = r"^the model gives NaN, first for token 2 of response \d+ of 16: [^\n]*model.dtype=float32$"
    with pytest.raises(RunStopped, match=words):
        sample(model, [prompt], keys(1), config, temperature=temperature)
