"""Token scores against plain forwards, row by row; and models that come from files, good and bad."""

import dataclasses
import json
import shutil
from itertools import pairwise

import infra.checkpoints
import model as model_module
import pytest
import torch
from data import micro_batch_rows
from infra.checkpoints import load_checkpoint, save_checkpoint
from infra.errors import BadInput
from infra.sharding import shard
from model import (
    ModelConfig,
    batch_log_probs,
    build,
    freeze,
    load,
    save,
    token_log_probs,
    weights_hash,
)
from sample import SampleConfig, sample
from spro import Batch
from tasks.chain import chain_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import EOS, LLAMA, PROMPTS, any_model, hf_model, keys, rows_of, saved, slow_log_probs, tiny_model

V = len(chain_tokenizer())
SMALL = {"hidden_size": 32, "intermediate_size": 64}
built = pytest.mark.parametrize("kind", ["qwen2", "llama"])
kinds = pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt"])


@pytest.fixture(scope="module")
def rollout():
    return sample(tiny_model(), PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9))


def log_probs_and_entropy(policy, batch, temperature=1.0):
    return token_log_probs(policy, batch, temperature)[:2]


def values_and_gradients(policy, batch):
    """Log-probs and entropy of the real tokens, and what a loss on them sends to every parameter."""
    policy.zero_grad()
    log_probs, entropy = (x[batch.mask] for x in log_probs_and_entropy(policy, batch, 0.7))
    (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    return [log_probs.detach(), entropy, *(p.grad.clone() for p in policy.parameters())]


PATHS = [model_module.plain_log_probs_of_tokens] + (
    [model_module.fast.log_probs_of_tokens] if model_module.fast else []
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@kinds
def test_log_probs_are_those_of_a_plain_forward_of_each_row(kind, dtype, temperature, path, rollout, tmp_path):
    policy = any_model(kind, tmp_path).to(dtype)
    inputs = (rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
    values = path(policy, *inputs, temperature)[:2]
    assert values[0].dtype == values[1].dtype == dtype and not values[1].requires_grad
    for i, (prompt, response, *_) in enumerate(rows_of(rollout)):
        for x, expected in zip(values, slow_log_probs(policy, prompt, response, temperature), strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(x[i, : len(response)].double(), expected, atol=tolerance, rtol=0)
            assert not x[i, len(response) :].any()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_the_exact_kl_is_the_sum_over_the_whole_vocabulary(path, rollout):
    policy, reference = tiny_model().double(), tiny_model(seed=1).double()
    inputs = (rollout.tokens, rollout.attention_mask, rollout.mask.shape[1])
    states_of = model_module.plain_states_for_kl if path is PATHS[0] else model_module.fast.states_for_kl
    kl = path(policy, *inputs, 0.7, states_of(reference, *inputs))[2]
    for i, (prompt, response, *_) in enumerate(rows_of(rollout)):
        ids = torch.tensor([prompt + response])
        p, q = ((m.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1) for m in (policy, reference))
        torch.testing.assert_close(kl[i, : len(response)], (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-6)
        assert not kl[i, len(response) :].any()


@kinds
def test_gradient_checkpointing_changes_nothing(kind, rollout, tmp_path):
    policy = any_model(kind, tmp_path)  # gpt2 and opt come with dropout, which must be off in every mode
    whole = values_and_gradients(policy, rollout)
    shard(policy, ModelConfig(gradient_checkpointing=True), torch.device("cpu"))
    torch.testing.assert_close(values_and_gradients(policy, rollout), whole, atol=1e-4, rtol=1e-4)


@kinds
def test_what_stands_in_the_padding_changes_nothing(kind, rollout, tmp_path):
    policy, real = any_model(kind, tmp_path), rollout.attention_mask
    garbage = torch.randint(0, V, real.shape, generator=torch.Generator().manual_seed(0))
    dirty = dataclasses.replace(rollout, tokens=rollout.tokens.where(real, garbage))
    values, expected = (log_probs_and_entropy(policy, batch) for batch in (dirty, rollout))
    assert all(a[rollout.mask].equal(b[rollout.mask]) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@kinds
def test_a_whole_batch_has_the_same_log_probs_in_any_micro_batches_and_0_where_masked(
    kind, tokens, rollout, tmp_path, monkeypatch
):
    policy = any_model(kind, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "fast", None)
        direct = log_probs_and_entropy(policy, rollout, 0.7)
    for result, expected in zip(batch_log_probs(policy, rollout, 0.7, tokens), direct, strict=True):
        torch.testing.assert_close(result, expected.detach().where(rollout.mask, 0), atol=1e-4, rtol=0)


@kinds
def test_without_the_folder_fast_everything_works_and_gives_the_same_numbers(kind, rollout, tmp_path, monkeypatch):
    policy = any_model(kind, tmp_path)
    expected = values_and_gradients(policy, rollout), batch_log_probs(policy, rollout, 0.7, 60)
    drawn = sample(policy, PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9))
    monkeypatch.setattr(model_module, "fast", None)
    monkeypatch.setattr("sample.fast", None)
    found = values_and_gradients(policy, rollout), batch_log_probs(policy, rollout, 0.7, 60)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert rows_of(sample(policy, PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9))) == rows_of(drawn)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 100, 10_000])
@pytest.mark.parametrize("n", [0, 1, 4, 23])
def test_micro_batches_hold_every_row_once_within_the_budget(n, tokens, share):
    g = torch.Generator().manual_seed(n)
    texts = ["1" * int(length) for length in torch.randint(0, 30, (n,), generator=g)]
    prompts = [PROMPTS[int(i)] for i in torch.randint(0, 4, (n,), generator=g)]
    rollout = Batch.from_texts([*prompts, PROMPTS[1]], [*texts, "1"], chain_tokenizer()).select(torch.arange(0, n))
    prompt_of = [PROMPTS.index(prompt) for prompt in prompts] if share else None
    parts = [part.tolist() for part in micro_batch_rows(rollout, tokens, prompt_of)]
    assert sorted(i for part in parts for i in part) == list(range(n))
    lengths = [len(text) + 1 for text in texts]

    def size(part):
        distinct = {tuple(prompts[i]) for i in part} if share else part
        return len(distinct) * max(len(prompts[i]) for i in part) + len(part) * max(lengths[i] for i in part)

    assert all(len(part) == 1 or size(part) <= tokens for part in parts)
    assert all(size([*a, b[0]]) > tokens for a, b in pairwise(parts))  # no smaller than need be
    if not share:
        assert [lengths[i] for part in parts for i in part] == sorted(lengths)
    elif tokens == 10_000:  # siblings stay together
        groups = [prompts[i] for part in parts for i in part]
        assert sum(a != b for a, b in pairwise(groups)) == max(0, len({*map(tuple, prompts)}) - 1)


@built
def test_building_depends_on_the_seed_alone_and_touches_no_global_generator(kind):
    config, state = ModelConfig(scratch=SMALL | {"model_type": kind}), torch.random.get_rng_state()
    a, b, c = (build(config, chain_tokenizer(), seed) for seed in (5, 5, 6))
    assert torch.random.get_rng_state().equal(state)
    assert a.config.model_type == kind and not a.model.training and a.model.dtype == torch.float32
    assert a.model.get_output_embeddings().weight is a.model.get_input_embeddings().weight
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(x.equal(y) for x, y in zip(a.parameters(), c.parameters(), strict=True) if x.ndim > 1)
    assert not any(p.requires_grad for p in freeze(a).parameters())


@pytest.mark.parametrize(
    ("scratch", "complaint"),
    [
        ({"hidden_sise": 32}, "qwen2 has no 'hidden_sise'"),
        ({"model_type": "qwen9"}, "cannot build"),
        ({"model_type": "t5"}, "cannot build"),
        ({"hidden_size": 30}, "cannot build"),
        ({"hidden_size": "big"}, "cannot build"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_one_line(scratch, complaint):
    with pytest.raises(BadInput, match=complaint) as error:
        build(ModelConfig(scratch=scratch), chain_tokenizer(), 0)
    assert "\n" not in str(error.value) and "model.scratch" in str(error.value)


def test_a_model_that_cannot_stop_is_refused():
    tokenizer = chain_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="end-of-sequence"):
        build(ModelConfig(scratch=SMALL), tokenizer, 0)


def test_only_stop_and_pad_ids_of_a_shipped_generation_config_take_effect(tmp_path):
    saved(tiny_model(), tmp_path)
    shipped = {"eos_token_id": [30, 7], "temperature": 0.5, "do_sample": True, "top_k": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped))
    settings = load(tmp_path).model.generation_config
    assert settings.eos_token_id == [EOS, 7, 30]  # the tokenizer's too
    assert settings.temperature is settings.do_sample is settings.top_k is None


@pytest.mark.parametrize("tied", [True, False])
@built
def test_a_saved_model_is_the_same_in_plain_transformers_and_here(kind, tied, tmp_path):
    tokens, original = torch.tensor([PROMPTS[1]]), hf_model(kind, **LLAMA, tie_word_embeddings=tied).eval()
    save(load(saved(original, tmp_path / "original")), tmp_path / "again")
    save(load(tmp_path / "again"), tmp_path / "again")  # over itself too
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), load(tmp_path / "again").model):
        assert model(tokens).logits.equal(original(tokens).logits)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@built
def test_the_tokenizer_saved_with_a_model_is_the_one_that_is_loaded(kind, tmp_path):
    tokenizer, known = chain_tokenizer(), "3b+5c*7?b3+5=8;(b3+5=8)c8*7=6;#6"
    save(tiny_model(tokenizer, architecture=kind), tmp_path / "model")
    for text in (known, "3b+5 !\n"):  # the second has characters that the task has not
        assert load(tmp_path / "model").tokenizer(text).input_ids == tokenizer(text).input_ids
    # AutoTokenizer makes a Qwen2Tokenizer of it beside a qwen2 model: the same for all that the task can say.
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(known).input_ids == tokenizer(known).input_ids


BROKEN = {
    "missing": shutil.rmtree,
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "a text file": lambda folder: (shutil.rmtree(folder), folder.write_text("hello\n")),
    "not a language model": lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("tokenizer*")],
    "tokenizer of nothing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_whole_model_is_refused_in_one_line(what, tmp_path):
    folder = saved(tiny_model(), tmp_path / "model")
    BROKEN[what](folder)
    with pytest.raises(BadInput) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


# --- ids that a model does not know -------------------------------------------------------------------------------


def tokenizer_padding_with(token: str):
    tokenizer = chain_tokenizer()
    tokenizer.add_special_tokens({"pad_token": token})
    return tokenizer


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("empty", [False, True], ids=["loaded", "dry run"])
def test_kind_25_a_pad_token_that_the_embedding_does_not_hold_is_refused_at_loading(kind, empty, tmp_path):
    folder = saved(any_model(kind, tmp_path / "plain"), tmp_path / "model", tokenizer_padding_with("<new>"))
    with pytest.raises(BadInput, match=rf"pads with '<new>', id {V}, but .* embedding has {V} rows[^\n]*$"):
        load(folder, empty=empty)
    load(saved(any_model(kind, tmp_path / "plain"), tmp_path / "model", tokenizer_padding_with("+")), empty=empty)


def test_kind_25_an_end_token_that_the_model_cannot_write_ends_nothing(tmp_path):
    folder = saved(tiny_model(), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, V, -1]}))
    assert load(folder).stop_ids == [EOS]
    tokenizer = chain_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(folder)
    for name in ("generation_config.json", "config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"eos_token_id": V}))
    for empty in (False, True):
        with pytest.raises(BadInput, match="end-of-sequence token that the model knows"):
            load(folder, empty=empty)


@pytest.mark.parametrize("size", [1, 5, V - 1])
def test_kind_25_a_model_from_scratch_knows_the_tasks_tokens(size):
    with pytest.raises(BadInput, match=f"vocab_size={size} is less than the {V} tokens"):
        build(ModelConfig(scratch=SMALL | {"vocab_size": size}), chain_tokenizer(), 0)


# --- what of a model is saved -------------------------------------------------------------------------------------

EXPERTS = LLAMA | {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 8}
EXPERTS |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
WITH_BUFFERS = {
    "glm4_moe": EXPERTS | {"head_dim": 8},
    "deepseek_v3": EXPERTS | LATENT | {"num_key_value_heads": 4},
    "dots1": EXPERTS | {"head_dim": 8, "n_shared_experts": 1},
}


def with_router_bias(kind: str):
    """A model of experts whose routers have learned a bias."""
    model = hf_model(kind, **WITH_BUFFERS[kind]).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(2, -2, len(buffer)))
    return model


def router_bias(model) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("kind", WITH_BUFFERS)
def test_kind_26_what_a_model_keeps_in_buffers_is_saved_and_loaded(kind, tmp_path):
    original, tokens = with_router_bias(kind), torch.tensor([PROMPTS[1]])
    policy = load(saved(original, tmp_path / "original"))
    save(policy, tmp_path / "again")
    again = load(tmp_path / "again")
    assert len(router_bias(again.model)) == 1 and router_bias(again.model)[0].equal(router_bias(original)[0])
    for model in (policy.model, again.model, AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()):
        assert model(tokens).logits.equal(original(tokens).logits)
    assert weights_hash(again) == weights_hash(policy)
    before, other = original(tokens).logits, router_bias(again.model)[0]
    other.neg_()
    assert weights_hash(again) != weights_hash(policy)
    assert not again.model(tokens).logits.equal(before)  # or nothing above would have shown it


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", WITH_BUFFERS)
def test_kind_26_a_buffer_that_training_moved_comes_back_from_a_checkpoint(kind, tmp_path):
    folder = saved(with_router_bias(kind), tmp_path / "model")
    trained = {"policy": (policy := load(folder), torch.optim.AdamW(policy.parameters()))}
    router_bias(policy.model)[0].add_(0.5)
    moved = router_bias(policy.model)[0].clone()
    save_checkpoint(tmp_path, 1, trained, {}, keep=2)
    again = {"policy": (policy := load(folder), torch.optim.AdamW(policy.parameters()))}
    load_checkpoint(tmp_path / "checkpoints" / "step_000001", again)
    assert router_bias(policy.model)[0].equal(moved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_kind_26_a_checkpoint_of_an_earlier_version_has_no_buffers_and_leaves_them(tmp_path, monkeypatch):
    folder = saved(with_router_bias("glm4_moe"), tmp_path / "model")
    trained = {"policy": (policy := load(folder), torch.optim.AdamW(policy.parameters()))}
    with monkeypatch.context() as patch:
        patch.setattr(infra.checkpoints, "kept_buffers", lambda model: {})
        save_checkpoint(tmp_path, 1, trained, {}, keep=2)
    before = router_bias(policy.model)[0].clone()
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    load_checkpoint(tmp_path / "checkpoints" / "step_000001", trained)
    assert router_bias(policy.model)[0].equal(before) and policy.model.lm_head.weight.any()
