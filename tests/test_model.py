"""Token scores against plain forwards, row by row; and models that come from files, good and bad."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from helpers import EOS, LLAMA, PROMPTS, any_model, hf_model, keys, rows_of, saved, slow_scores, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as model_module
from infra.errors import BadInput
from model import (
    ModelConfig,
    build,
    frozen,
    load,
    micro_batches,
    rollout_log_probs,
    save,
    shard,
    shares_prompts,
    token_log_probs,
)
from sample import Rollout, SampleConfig, sample
from tasks.chain import chain_tokenizer

V = len(chain_tokenizer())
SMALL = {"hidden_size": 32, "intermediate_size": 64}
built = pytest.mark.parametrize("kind", ["qwen2", "llama"])
kinds = pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt"])


@pytest.fixture(scope="module")
def rollout():
    return sample(tiny_model(), chain_tokenizer(), PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9))


def score(model, rollout, temperature=1.0):
    return token_log_probs(model, rollout.tokens, rollout.attention_mask, rollout.mask.shape[1], temperature)


def scores_and_gradients(model, rollout):
    """The scores of the real tokens, and what a loss on them sends to every parameter."""
    model.zero_grad()
    log_probs, entropy = (x[rollout.mask] for x in score(model, rollout, 0.7))
    (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    return [log_probs.detach(), entropy, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@kinds
def test_scores_are_those_of_a_plain_forward_of_each_row(kind, dtype, temperature, rollout, tmp_path):
    model = any_model(kind, tmp_path).to(dtype)
    scores = score(model, rollout, temperature)
    assert scores[0].dtype == scores[1].dtype == dtype and not scores[1].requires_grad
    for i, (prompt, response, *_) in enumerate(rows_of(rollout)):
        for x, expected in zip(scores, slow_scores(model, prompt, response, temperature), strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 1e-10
            torch.testing.assert_close(x[i, : len(response)].double(), expected, atol=tolerance, rtol=0)


def is_logits(x) -> bool:
    return isinstance(x, torch.Tensor) and x.shape[-1:] == (V,) and x.shape != (32, V)  # not the head's weight


class LargestLogits(TorchDispatchMode):
    """Notes the most logits that any operation made at once, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if is_logits(x):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_chunks_of_the_head_bound_the_logits_and_change_nothing(rows, rollout, monkeypatch):
    model = tiny_model().double()
    whole = scores_and_gradients(model, rollout)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", rows * V + 5)
    kept = []  # for the backward pass, where no chunk may wait for the others
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        score(model, rollout)
    assert kept and not any(is_logits(x) for x in kept)
    with LargestLogits() as largest:
        chunked = scores_and_gradients(model, rollout)
    assert largest.elements == rows * V
    torch.testing.assert_close(chunked, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_the_exact_kl_and_its_gradient_are_those_of_whole_logits_and_never_hold_them(
    kind, rows, rollout, monkeypatch, tmp_path
):
    """gpt2 computes everything in double; qwen2's norms are fp32."""
    policy, reference = any_model(kind, tmp_path / "a").double(), any_model(kind, tmp_path / "b").double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    T, monkey = rollout.mask.shape[1], monkeypatch.setattr
    monkey(model_module, "LOGITS_AT_ONCE", rows * V + 5)
    weights = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(0)).double() * rollout.mask

    def gradient(log_probs, kl):
        policy.zero_grad()
        (weights[0] * log_probs + weights[1] * kl).sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    frozen(reference)
    reference.divisible_cache = False  # another order of tokens than the policy's
    batch = (rollout.tokens, rollout.attention_mask, T)
    with LargestLogits() as largest:
        log_probs, _, kl = token_log_probs(policy, *batch, 0.7, reference)
        found = gradient(log_probs, kl)
    assert largest.elements <= rows * V
    assert all(x.equal(y) for x, y in zip((log_probs, _), token_log_probs(policy, *batch, 0.7), strict=True))
    positions = (rollout.attention_mask.cumsum(1) - 1).clamp(min=0)
    p, q = (
        m(rollout.tokens, attention_mask=rollout.attention_mask, position_ids=positions).logits[:, -T - 1 : -1] / 0.7
        for m in (policy, reference)
    )
    p, q = p.log_softmax(2), q.log_softmax(2)
    expected = torch.where(rollout.mask, (p.exp() * (p - q)).sum(2), 0.0)
    whole = gradient(p.gather(2, rollout.tokens[:, -T:, None])[:, :, 0], expected)
    tolerance = 1e-9 if kind == "gpt2" else 1e-4
    assert expected.max() > 0.01 and not kl[~rollout.mask].any()
    torch.testing.assert_close([kl, *found], [expected, *whole], atol=tolerance, rtol=tolerance)


@kinds
def test_gradient_checkpointing_changes_nothing(kind, rollout, tmp_path):
    model = any_model(kind, tmp_path)  # gpt2 and opt come with dropout, which must be off in every mode
    whole = scores_and_gradients(model, rollout)
    shard(model, ModelConfig(gradient_checkpointing=True), torch.device("cpu"))
    torch.testing.assert_close(scores_and_gradients(model, rollout), whole, atol=1e-4, rtol=1e-4)


@kinds
def test_what_stands_in_the_padding_changes_nothing(kind, rollout, tmp_path):
    model, real = any_model(kind, tmp_path), rollout.attention_mask
    garbage = torch.randint(0, V, real.shape, generator=torch.Generator().manual_seed(0))
    scores = token_log_probs(model, rollout.tokens.where(real, garbage), real, rollout.mask.shape[1], 1.0)
    assert all(a[rollout.mask].equal(b[rollout.mask]) for a, b in zip(scores, score(model, rollout), strict=True))


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
@kinds
def test_a_whole_rollout_is_scored_alike_in_any_micro_batches_and_0_where_masked(kind, tokens, rollout, tmp_path):
    model = any_model(kind, tmp_path)
    plain, model.divisible_cache = model.divisible_cache, False
    direct = score(model, rollout, 0.7)
    model.divisible_cache = plain
    for result, expected in zip(rollout_log_probs(model, rollout, 0.7, tokens), direct, strict=True):
        torch.testing.assert_close(result, expected.detach().where(rollout.mask, 0), atol=1e-4, rtol=0)


WINDOW = {"sliding_window": 5, "head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt", "mistral", "gemma3_text"])
def test_a_prompt_run_once_for_its_siblings_gives_the_scores_and_gradients_of_rows_in_full(kind, tmp_path):
    windows = {"mistral": WINDOW, "gemma3_text": WINDOW | LAYERS}
    if kind in windows:  # layers that forget what is further back than their window
        model = load(saved(hf_model(kind, **LLAMA, **windows[kind]), tmp_path))[0]
    else:
        model = any_model(kind, tmp_path)
    model, g = model.double(), torch.Generator().manual_seed(0)
    texts = ["".join("0123456789+-"[i] for i in torch.randint(0, 12, (n,), generator=g)) for n in (0, 1, 3, 7, 12, 19)]
    rollout = Rollout.of_texts([PROMPTS[i % 4] for i in (0, 1, 0, 2, 0, 1)], texts, chain_tokenizer())
    assert shares_prompts(model)
    shared = scores_and_gradients(model, rollout)
    model.divisible_cache = False
    # Llama-like models normalise in fp32 whatever their type; gpt2 and opt are double throughout.
    tolerance = 1e-10 if kind in ("gpt2", "opt") else 1e-5
    torch.testing.assert_close(shared, scores_and_gradients(model, rollout), atol=tolerance, rtol=tolerance)


@built
def test_rows_packed_into_one_without_padding_give_the_scores_and_gradients_of_rows_in_full(kind, rollout):
    model = tiny_model(architecture=kind)
    model.packs_rows = True  # as with a variable-length kernel on a GPU; sdpa masks the rows from each other instead
    assert not shares_prompts(model)
    sizes = []
    model.base_model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    packed = scores_and_gradients(model, rollout)
    assert sizes == [(1, rollout.attention_mask.sum())]
    model.packs_rows = model.divisible_cache = False
    torch.testing.assert_close(packed, scores_and_gradients(model, rollout), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 100, 10_000])
@pytest.mark.parametrize("n", [0, 1, 4, 23])
def test_micro_batches_hold_every_row_once_within_the_budget(n, tokens, share):
    g = torch.Generator().manual_seed(n)
    texts = ["1" * int(length) for length in torch.randint(0, 30, (n,), generator=g)]
    prompts = [PROMPTS[int(i)] for i in torch.randint(0, 4, (n,), generator=g)]
    rollout = Rollout.of_texts([*prompts, PROMPTS[1]], [*texts, "1"], chain_tokenizer()).at(torch.arange(0, n))
    parts = [part.tolist() for part in micro_batches(rollout, tokens, share)]
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
    assert a.config.model_type == kind and not a.training and a.dtype == torch.float32
    assert a.get_output_embeddings().weight is a.get_input_embeddings().weight
    assert all(x.equal(y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(x.equal(y) for x, y in zip(a.parameters(), c.parameters(), strict=True) if x.ndim > 1)
    assert not any(p.requires_grad for p in frozen(a).parameters())


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


def test_a_model_that_cannot_stop_or_transforms_its_logits_is_refused(tmp_path):
    tokenizer = chain_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="end-of-sequence"):
        build(ModelConfig(scratch=SMALL), tokenizer, 0)
    with pytest.raises(BadInput, match="logits_scaling"):
        load(saved(hf_model("granite", **LLAMA, logits_scaling=8.0), tmp_path))


def test_only_stop_and_pad_ids_of_a_shipped_generation_config_take_effect(tmp_path):
    saved(tiny_model(), tmp_path)
    shipped = {"eos_token_id": [30, 7], "temperature": 0.5, "do_sample": True, "top_k": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(shipped))
    settings = load(tmp_path)[0].generation_config
    assert settings.eos_token_id == [EOS, 7, 30]  # the tokenizer's too
    assert settings.temperature is settings.do_sample is settings.top_k is None


@pytest.mark.parametrize("tied", [True, False])
@built
def test_a_saved_model_is_the_same_in_plain_transformers_and_here(kind, tied, tmp_path):
    tokens, original = torch.tensor([PROMPTS[1]]), hf_model(kind, **LLAMA, tie_word_embeddings=tied).eval()
    save(*load(saved(original, tmp_path / "original")), tmp_path / "again")
    save(*load(tmp_path / "again"), tmp_path / "again")  # over itself too
    for model in (AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), load(tmp_path / "again")[0]):
        assert model(tokens).logits.equal(original(tokens).logits)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@built
def test_the_tokenizer_saved_with_a_model_is_the_one_that_is_loaded(kind, tmp_path):
    tokenizer, known = chain_tokenizer(), "3b+5c*7?b3+5=8;(b3+5=8)c8*7=6;#6"
    save(tiny_model(architecture=kind), tokenizer, tmp_path / "model")
    for text in (known, "3b+5 !\n"):  # the second has characters that the task has not
        assert load(tmp_path / "model")[1](text).input_ids == tokenizer(text).input_ids
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
