"""fast/ against the plain paths of model.py and sample.py: the same numbers, and what makes them sooner."""

import contextlib
import dataclasses
import inspect
import itertools

import fast
import fast.decode
import fast.grouped_attention
import fast.log_probs
import fast.recorded
import fast.shared_prompts
import fast.varlen
import model as model_module
import pytest
import torch
import train
from data import micro_batch_rows
from infra import console
from infra.errors import BadInput
from infra.sharding import FORWARD_METHODS
from model import (
    ModelConfig,
    Policy,
    batch_log_probs,
    build,
    freeze,
    load,
    plain_log_probs_of_tokens,
    plain_states_for_kl,
    token_log_probs,
)
from sample import SampleConfig, sample
from spro import Batch
from tasks.chain import chain_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import LLAMA, PROMPTS, any_model, hf_model, keys, row_log_probs, rows_of, saved, slow_log_probs, tiny_model

V = len(chain_tokenizer())
KINDS = ("qwen2", "llama", "gpt2", "opt")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def rollout():
    return sample(tiny_model(), PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9))


def inputs_of(batch):
    return batch.tokens, batch.attention_mask, batch.mask.shape[1]


def values_and_gradients(policy, batch, forward=None, temperature=0.7):
    """Log-probs and entropy of the real tokens, and what a loss on them sends to every parameter."""
    policy.zero_grad()
    forward = forward or fast.log_probs_of_tokens
    log_probs, entropy, _ = forward(policy, *inputs_of(batch), temperature)
    log_probs, entropy = log_probs[batch.mask], entropy[batch.mask]
    (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
    return [log_probs.detach(), entropy, *(p.grad.clone() for p in policy.parameters())]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@kinds
def test_the_fast_log_probs_and_gradients_are_those_of_the_plain_path(kind, temperature, rollout, tmp_path):
    policy = any_model(kind, tmp_path).double()
    fast_values = values_and_gradients(policy, rollout, temperature=temperature)
    plain_values = values_and_gradients(policy, rollout, plain_log_probs_of_tokens, temperature)
    tolerance = 1e-10 if kind in ("gpt2", "opt") else 1e-5  # Llama-like models normalise in fp32 whatever their type
    torch.testing.assert_close(fast_values, plain_values, atol=tolerance, rtol=tolerance)


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
    policy = tiny_model().double()
    whole = values_and_gradients(policy, rollout)
    monkeypatch.setitem(fast.log_probs.LOGITS_AT_ONCE, "cpu", rows * V + 5)
    kept = []  # for the backward pass, where no chunk may wait for the others
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        token_log_probs(policy, rollout, 1.0)
    assert kept and not any(is_logits(x) for x in kept)
    with LargestLogits() as largest:
        chunked = values_and_gradients(policy, rollout)
    tokens = int(rollout.mask.sum())
    parts = -(-tokens // rows)
    assert largest.elements == -(-tokens // parts) * V <= rows * V
    torch.testing.assert_close(chunked, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 15, 50])
def test_chunks_are_of_one_size_so_that_none_is_a_single_row_left_over(n, monkeypatch):
    """A single row would be compiled for by itself on a GPU: seconds."""
    monkeypatch.setitem(fast.log_probs.LOGITS_AT_ONCE, "cpu", 7 * V)
    states, head = torch.randn(n, 4), torch.randn(V, 4)
    chunks = list(fast.log_probs._chunks((states, head, None), (), 1.0, V))
    sizes = [len(logits) for _, logits, _ in chunks]
    assert sum(sizes) == n and len(sizes) == -(-n // 7)
    assert not sizes or max(sizes) - min(sizes) <= 1
    logits = torch.cat([logits for _, logits, _ in chunks]) if chunks else states.new_empty(0, V)
    torch.testing.assert_close(logits, states @ head.t())


def into_fp32(a, b, out_dtype):
    """torch.mm on a GPU, by its checks in aten/src/ATen/native/cuda/Blas.cpp: exact here."""
    assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
    return (a.double() @ b.double()).float()


def added_in_fp32(total, a, b, *, out_dtype, out):
    """torch.addmm there, in place."""
    assert out is total and total.dtype == torch.float32
    return total.add_(into_fp32(a, b, out_dtype))


@pytest.mark.parametrize("with_bias", [False, True])
def test_on_a_gpu_the_heads_products_of_bfloat16_are_rounded_to_fp32_alone(with_bias, monkeypatch):
    """Against float64 on the same bfloat16 states and head: log-probs are off by fp32's rounding, not bfloat16's."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 16, generator=g).bfloat16(), torch.randn(V + 3, 16, generator=g).bfloat16()
    bias, targets = torch.randn(V + 3, generator=g).bfloat16(), torch.randint(V, (30,), generator=g)
    loss_weights = torch.linspace(-1, 1, 30)

    def values(dtype):
        given = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, *([bias] if with_bias else []))]
        found = fast.log_probs._TokenLogProbs.apply(*given[:2], given[2] if with_bias else None, targets, 0.7, V)
        (found[0] * loss_weights).sum().backward()
        return *(x.detach().double() for x in found), *(x.grad.double() for x in given)

    monkeypatch.setitem(fast.log_probs.LOGITS_AT_ONCE, "cpu", 7 * V)
    exact, rounded = values(torch.float64), values(torch.bfloat16)
    mm = torch.mm
    monkeypatch.setattr(fast.log_probs, "_multiplies_into_fp32", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **how: into_fp32(a, b, **how) if "out_dtype" in how else mm(a, b, **how)
    )
    monkeypatch.setattr(torch, "addmm", added_in_fp32)
    found = values(torch.bfloat16)
    torch.testing.assert_close(found[:2], exact[:2], atol=1e-5, rtol=1e-5)
    assert (rounded[0] - exact[0]).abs().max() > 1e-3
    torch.testing.assert_close(found[2:], exact[2:], atol=0.1, rtol=1e-2)  # they are given in bfloat16


@pytest.mark.parametrize("kl", [False, True])
def test_what_a_gpu_compiles_is_one_graph_and_gives_what_is_written(kl, monkeypatch):
    """By dynamo and functionalisation, without a code generator: that takes a compiler and half a minute."""
    g = torch.Generator().manual_seed(0)
    graphs, compile_for_gpu = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_for_gpu(f, fullgraph=True, backend=backend, **how))
    fast.log_probs.in_few_passes.cache_clear()
    values_of, gradient_of = (
        fast.log_probs.in_few_passes(body, "cuda")
        for body in (fast.log_probs.values_of_chunk, fast.log_probs.gradient_of_chunk)
    )
    for n, first, of in ((5, 0, 5), (3, 0, 3), (5, 0, 13), (5, 5, 13), (3, 10, 13)):  # rows, of so many
        here = slice(first, first + n)
        logits, theirs, targets = (*torch.randn(2, n, V, generator=g), torch.randint(V, (of,), generator=g)[here])
        given, theirs = logits.clone(), theirs if kl else None
        values = fast.log_probs.values_of_chunk(logits, targets, theirs)
        torch.testing.assert_close(values_of(logits, targets, theirs), values, atol=0, rtol=0)
        assert logits.equal(given)  # a write to them would be one more pass
        normaliser, scale, of_theirs = torch.empty(of), torch.full((of,), 0.7), torch.full((of,), 0.3)
        normaliser[here] = values[2]
        of_kl = (theirs, values[3][:, None], of_theirs[here, None] / 0.9) if kl else ()
        how = (normaliser[here, None], targets[:, None], scale[here, None] / 0.9, torch.bfloat16, *of_kl)
        assert gradient_of(logits, *how).equal(fast.log_probs.gradient_of_chunk(logits, *how)) and logits.equal(given)
    assert len(graphs) == 2  # one of each, whatever the chunks are parts of
    fast.log_probs.in_few_passes.cache_clear()


def test_where_torch_compile_does_not_work_the_run_goes_on_as_written_and_says_so_once(monkeypatch, capsys):
    def failing(body, **_):
        def compiled(*_):
            raise torch._dynamo.exc.BackendCompilerFailed(compiled, RuntimeError("no C compiler"), None)

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    fast.log_probs.in_few_passes.cache_clear()
    logits, targets = torch.randn(3, V), torch.tensor([0, 1, 2])
    values_of = fast.log_probs.in_few_passes(fast.log_probs.values_of_chunk, "cuda")
    for _ in range(2):
        expected = fast.log_probs.values_of_chunk(logits, targets)
        torch.testing.assert_close(values_of(logits, targets), expected, atol=0, rtol=0)
    assert capsys.readouterr().out.count("torch.compile does not work here") == 1
    fast.log_probs.in_few_passes.cache_clear()


def two_models(kind, tmp_path):
    """A policy and a frozen reference that differ, in double."""
    policy, reference = any_model(kind, tmp_path / "a").double(), any_model(kind, tmp_path / "b").double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy, freeze(reference)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_the_exact_kl_and_its_gradient_are_those_of_whole_logits_and_never_hold_them(
    kind, rows, rollout, monkeypatch, tmp_path
):
    """gpt2 computes everything in double; qwen2's norms are fp32."""
    policy, reference = two_models(kind, tmp_path)
    monkeypatch.setitem(fast.log_probs.LOGITS_AT_ONCE, "cpu", rows * V + 5)
    weights = torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(0)).double() * rollout.mask

    def gradient(log_probs, kl):
        policy.zero_grad()
        (weights[0] * log_probs + weights[1] * kl).sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    with monkeypatch.context() as patch:
        patch.setattr(fast.shared_prompts, "cache_is_divisible", lambda _: False)  # another order than the policy's
        states = fast.states_for_kl(reference, *inputs_of(rollout))
    with LargestLogits() as largest:
        log_probs, _, kl = fast.log_probs_of_tokens(policy, *inputs_of(rollout), 0.7, states)
        found = gradient(log_probs, kl)
    assert largest.elements <= rows * V
    assert log_probs.equal(token_log_probs(policy, rollout, 0.7).log_probs)
    expected = plain_log_probs_of_tokens(
        policy, *inputs_of(rollout), 0.7, plain_states_for_kl(reference, *inputs_of(rollout))
    )
    whole = gradient(expected[0], expected[2])
    tolerance = 1e-9 if kind == "gpt2" else 1e-4
    assert expected[2].max() > 0.01 and not kl[~rollout.mask].any()
    torch.testing.assert_close([kl, *found], [expected[2], *whole], atol=tolerance, rtol=tolerance)


WINDOW = {"sliding_window": 5, "head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt", "mistral", "gemma3_text"])
def test_a_prompt_run_once_for_its_siblings_gives_the_log_probs_and_gradients_of_rows_in_full(
    kind, tmp_path, monkeypatch
):
    windows = {"mistral": WINDOW, "gemma3_text": WINDOW | LAYERS}
    if kind in windows:  # layers that forget what is further back than their window
        policy = load(saved(hf_model(kind, **LLAMA, **windows[kind]), tmp_path))
    else:
        policy = any_model(kind, tmp_path)
    policy, g = policy.double(), torch.Generator().manual_seed(0)
    texts = ["".join("0123456789+-"[i] for i in torch.randint(0, 12, (n,), generator=g)) for n in (0, 1, 3, 7, 12, 19)]
    batch = Batch.from_texts([PROMPTS[i % 4] for i in (0, 1, 0, 2, 0, 1)], texts, chain_tokenizer())
    assert fast.shares_prompts(policy)
    shared = values_and_gradients(policy, batch)
    monkeypatch.setattr(fast.shared_prompts, "cache_is_divisible", lambda _: False)
    # Llama-like models normalise in fp32 whatever their type; gpt2 and opt are double throughout.
    tolerance = 1e-10 if kind in ("gpt2", "opt") else 1e-5
    torch.testing.assert_close(shared, values_and_gradients(policy, batch), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("kind", "attention"), [("qwen2", "sdpa"), ("llama", "sdpa"), *((kind, "varlen") for kind in KINDS)]
)
def test_rows_packed_into_one_without_padding_give_the_log_probs_and_gradients_of_rows_in_full(
    kind, attention, rollout, monkeypatch, tmp_path
):
    """With sdpa transformers masks the rows from each other by their positions; with varlen nothing is masked."""
    policy = any_model(kind, tmp_path)
    plain = values_and_gradients(policy, rollout, plain_log_probs_of_tokens)
    fast.varlen.register()
    policy.config._attn_implementation = attention
    monkeypatch.setattr(fast.shared_prompts, "packs_rows", lambda _: True)
    assert not fast.shares_prompts(policy)
    sizes = []
    hook = policy.model.base_model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    packed = values_and_gradients(policy, rollout)
    hook.remove()
    assert sizes == [(1, rollout.attention_mask.sum())]
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=1e-4)


def row_by_row(query, key, value, ends, keys_end, longest, _, scale):
    """Causal attention written out: [N, H, D] of rows that end where `ends` says, each head with keys of its own."""
    assert query.shape[1] == key.shape[1] and ends.dtype == torch.int32 and ends.equal(keys_end)
    assert longest == ends.diff().max()
    out = torch.empty_like(query)
    for start, end in itertools.pairwise(ends.tolist()):
        for i in range(start, end):
            weights = (torch.einsum("hd,khd->hk", query[i], key[start : i + 1]) * scale).softmax(-1)
            out[i] = torch.einsum("hk,khd->hd", weights, value[start : i + 1])
    return out


def of_torch_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return row_by_row(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def of_torch_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa == (q.shape[1] > k.shape[1])
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return row_by_row(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale)


@pytest.mark.parametrize("kernel", [of_torch_2_11, of_torch_2_13])
@pytest.mark.parametrize("heads", [2, 4])
def test_the_kernel_is_asked_for_plain_causal_attention_of_each_row(kernel, heads, monkeypatch):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 9, 8, generator=g) for n in (4, heads, heads))
    begins, module = torch.tensor([0, 2, 3, 9], dtype=torch.int32), torch.nn.Module()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(fast.varlen, "one_by_one", fast.varlen.by_kernel)  # as on a GPU
    asked = {"cu_seq_lens_q": begins, "max_length_q": 6, "scaling": 0.3, "dropout": 0.0}
    found, _ = fast.varlen.attention(module, query, key, value, None, **asked, sliding_window=None)
    module.num_key_value_groups = 4 // heads
    for start, end in ((0, 2), (2, 3), (3, 9)):
        row = (x[:, :, start:end] for x in (query, key, value))
        expected, _ = fast.varlen.attention(module, *row, None, scaling=0.3, is_causal=True)  # sdpa
        torch.testing.assert_close(found[:, start:end], expected)
    for refused in ({"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}):
        with pytest.raises(ValueError, match=next(iter(refused))):
            fast.varlen.attention(module, query, key, value, None, **asked, **refused)


def test_under_the_name_varlen_what_is_padded_or_has_a_cache_is_as_with_sdpa(rollout):
    policy = tiny_model(architecture="llama")
    expected, drawn = values_and_gradients(policy, rollout), draw(policy)
    fast.varlen.register()
    policy.config._attn_implementation = "varlen"
    assert fast.shares_prompts(policy)  # on a CPU rows are not packed
    torch.testing.assert_close(values_and_gradients(policy, rollout), expected, atol=0, rtol=0)
    for decoding in ("fast", "plain"):
        assert_same(draw(policy, decoding=decoding), drawn)


GPU = torch.device("cuda")


def test_only_layers_that_look_back_at_everything_are_packed_and_only_in_half_precision_on_a_gpu(tmp_path):
    policy = tiny_model()
    assert fast.can_pack(policy, GPU, torch.bfloat16)
    assert not fast.can_pack(policy, GPU, torch.float32)
    assert not fast.can_pack(policy, torch.device("cpu"), torch.bfloat16)
    for kind, sizes in (("mistral", WINDOW), ("gemma3_text", WINDOW | LAYERS)):
        windowed = load(saved(hf_model(kind, **LLAMA, **sizes), tmp_path / kind))
        assert not fast.can_pack(windowed, GPU, torch.bfloat16)
    policy.config._attn_implementation = "eager"
    assert not fast.can_pack(policy, GPU, torch.bfloat16)


@pytest.mark.parametrize("name", FORWARD_METHODS)
def test_what_fsdp_gathers_weights_for_has_something_to_be_moved_to_the_gpu(name):
    """FSDP2 moves the arguments of the root's pass to a GPU, and fails where there are none; on a CPU it does not."""
    _, *arguments = inspect.signature(getattr(Policy, name)).parameters.values()
    assert arguments and arguments[0].default is arguments[0].empty


def test_a_model_that_mixes_packed_rows_up_goes_on_with_padded_ones_and_says_so(monkeypatch, capsys):
    policy = tiny_model()
    policy.pack_rows(*fast.two_rows(policy))
    assert policy.config._attn_implementation == "varlen" and not capsys.readouterr().out
    policy.config._attn_implementation = "sdpa"
    as_one_row = fast.varlen.one_by_one
    monkeypatch.setattr(
        fast.varlen, "one_by_one", lambda q, k, v, ends, *rest: as_one_row(q, k, v, ends[[0, -1]], *rest)
    )
    policy.pack_rows(*fast.two_rows(policy))
    assert policy.config._attn_implementation == "sdpa" and "rows are padded" in capsys.readouterr().out
    monkeypatch.setattr(fast.varlen, "one_by_one", None)
    with pytest.raises(BadInput, match=r"set model\.attention=sdpa"):
        policy.pack_rows(*fast.two_rows(policy))


def test_siblings_go_into_one_micro_batch_where_a_pass_runs_their_prompt_once(monkeypatch):
    policy, texts = tiny_model(), ["1" * n for n in (9, 2, 5, 8, 1, 7)]
    batch = Batch.from_texts([PROMPTS[i] for i in (0, 1, 0, 1, 0, 1)], texts, chain_tokenizer())
    assert fast.prompt_numbers(policy, batch) in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0])
    (rows,) = micro_batch_rows(batch, 10_000, fast.prompt_numbers(policy, batch))
    assert [i % 2 for i in rows.tolist()] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    monkeypatch.setattr(fast.shared_prompts, "cache_is_divisible", lambda _: False)
    assert fast.prompt_numbers(policy, batch) is None


# --- decoding -----------------------------------------------------------------------------------------------------

CONFIG = SampleConfig(group_size=16, max_new_tokens=12, temperature=0.7)


def draw(policy, **changes):
    return sample(policy, PROMPTS, keys(len(PROMPTS)), dataclasses.replace(CONFIG, **changes))


def model_to_sample(kind: str, folder):
    if kind == "mistral":  # each layer sees 5 tokens back
        return load(saved(hf_model(kind, **LLAMA, sliding_window=5, head_dim=8), folder))
    return any_model(kind, folder)


def assert_same(a, b):
    assert rows_of(a) == rows_of(b)
    for x, y in zip(row_log_probs(a), row_log_probs(b), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt", "mistral"])
def test_the_fast_sampler_draws_the_tokens_of_the_plain_one(kind, tmp_path, monkeypatch):
    """Rows that stop at their first token, later and never, behind ragged prompts, in batches that split groups."""
    policy = model_to_sample(kind, tmp_path)
    monkeypatch.setattr(fast.decode, "ROOM", 8)
    changes = {"max_new_tokens": 30, "group_size": 5, "batch_tokens": 7 * 37}
    plain, quick = (draw(policy, decoding=decoding, **changes) for decoding in ("plain", "fast"))
    assert_same(quick, plain)
    torch.testing.assert_close(quick.sampler_entropy, plain.sampler_entropy, atol=1e-4, rtol=0)
    lengths = quick.mask.sum(1)
    assert quick.truncated.any() and (lengths == 1).any() and (~quick.truncated & (lengths > 1)).any()


def test_each_prompt_is_run_once_and_stopped_rows_leave_the_batch():
    policy, sizes = tiny_model(), []
    with torch.no_grad():
        handle = policy.model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
        rollout = draw(policy)
        handle.remove()
    lengths, alive = rollout.mask.sum(1).tolist(), 96
    assert sizes[0] == (6, 7)  # 6 prompts, padded to the longest
    for step, (rows, new) in enumerate(sizes[1:], 1):
        going = sum(length > step for length in lengths)
        alive = going if going <= 0.75 * alive else alive
        assert (rows, new) == (alive, 1)
    assert len(sizes) == 12


def test_a_model_whose_states_rows_cannot_share_is_sampled_plainly(monkeypatch):
    policy = tiny_model()
    expected = draw(policy)
    monkeypatch.setattr(fast.decode, "cache_is_divisible", lambda _: False)
    monkeypatch.setattr(fast, "decoding_loop", None)
    assert_same(draw(policy), expected)


# --- decoding as on a GPU: keys and values in place, and a step that can be recorded ----------------------------------


def tensors_of(rows) -> list[torch.Tensor]:
    """All that a step may change."""
    holders = [rows, rows.sampler, *rows.layers]
    return [x for holder in holders for x in vars(holder).values() if isinstance(x, torch.Tensor)]


def recorded_as_on_a_gpu(step, device):
    """A step is made, and made again to be recorded, when nothing is computed; the graph is the step itself."""
    step()
    before = [x.clone() for x in tensors_of(step.__self__)]
    step()
    for x, old in zip(tensors_of(step.__self__), before, strict=True):
        x.copy_(old)
    return step


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Sizes so small that rows leave, columns grow and prompts come in several lots."""
    for name, value in {"COLUMNS": 8, "LOOK_EVERY": 3, "FEWEST_ROWS": 2, "PROMPT_TOKENS": 8}.items():
        monkeypatch.setattr(fast.recorded, name, value)
    monkeypatch.setattr(fast.recorded, "recorded", recorded_as_on_a_gpu)
    monkeypatch.setattr(fast, "decoding_loop", lambda policy: fast.recorded.decode_recorded)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "opt", "mistral"])
def test_the_sampler_of_a_gpu_draws_the_tokens_of_the_plain_one(kind, tmp_path, as_on_a_gpu):
    policy = model_to_sample(kind, tmp_path)
    changes = {"max_new_tokens": 30, "group_size": 5}
    plain, quick = (draw(policy, decoding=decoding, **changes) for decoding in ("plain", "fast"))
    assert_same(quick, plain)
    torch.testing.assert_close(quick.sampler_entropy, plain.sampler_entropy, atol=1e-4, rtol=0)
    assert quick.truncated.any() and (quick.mask.sum(1) == 1).any()


def test_the_sampler_of_a_gpu_ends_at_stop_strings_as_the_plain_one(as_on_a_gpu):
    policy, stop = tiny_model(), ["1", "2", "b3", ";c"]
    changes = {"max_new_tokens": 30, "group_size": 5, "stop": stop}
    plain, quick = (draw(policy, decoding=decoding, **changes) for decoding in ("plain", "fast"))
    assert_same(quick, plain)
    assert quick.mask.sum() < draw(policy, **changes | {"stop": []}).mask.sum()


def test_rows_leave_by_halves_and_columns_grow_by_units(as_on_a_gpu, monkeypatch):
    """Each of which is one more recording, so both are coarse."""
    policy, sizes = tiny_model(), []
    keep = fast.recorded.Rows.keep
    recorded = fast.recorded.recorded

    def noted(step, device):
        sizes.append((len(step.__self__.rows), step.__self__.layers[0].width))
        return recorded(step, device)

    monkeypatch.setattr(fast.recorded, "recorded", noted)
    monkeypatch.setattr(fast.recorded.Rows, "keep", lambda rows, n: (keep(rows, n), sizes.append(n)))
    draw(policy, max_new_tokens=60)
    rows = [size for size in sizes if isinstance(size, int)]
    assert rows and all(n & (n - 1) == 0 for n in rows) and rows == sorted(rows, reverse=True)
    widths = [size[1] for size in sizes if isinstance(size, tuple)]
    assert widths == sorted(widths) and set(widths) <= {8 * i for i in range(10)}  # at most 7 + 60, rounded up


@pytest.mark.parametrize("vocabulary", [V, 20_000])
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mistral"])
def test_a_recorded_step_asks_the_device_for_nothing(kind, vocabulary, tmp_path, as_on_a_gpu, monkeypatch):
    """Made on meta tensors, which have no values to be asked for: on a GPU an answer cannot be recorded."""
    sizes = LLAMA | {"sliding_window": 5, "head_dim": 8} if kind == "mistral" else LLAMA
    model = hf_model(kind, **({} if kind == "gpt2" else sizes))
    model.resize_token_embeddings(vocabulary)
    policy = model_module.Policy(model, chain_tokenizer())
    made = []

    def on_meta(step, device):
        rows = step.__self__
        step()  # by values, once
        for holder in (rows, rows.sampler, rows.end, *rows.layers):
            for name, x in vars(holder).items():
                if isinstance(x, torch.Tensor):
                    setattr(holder, name, x.to("meta"))
        for layer in rows.layers:
            layer.column = rows.column
        rows.model.to("meta")
        rows.sampler.vocab_size = vocabulary
        step()
        made.append(rows.logits.shape)
        raise StopIteration

    monkeypatch.setattr(fast.recorded, "recorded", on_meta)
    with pytest.raises(StopIteration):
        draw(policy)
    assert made == [(96, vocabulary)]


def test_a_step_that_cannot_be_recorded_is_said_once_and_made_without(monkeypatch, capsys):
    class Graph:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing. More. And more")

        __exit__ = wait_stream = lambda *_: None

    class Stream(contextlib.nullcontext):
        wait_stream = lambda *_: None  # noqa: E731

    for name, stand_in in {"Stream": Stream, "stream": Stream, "current_stream": Stream, "graph": Graph}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(fast.recorded, "unrecordable", [])
    steps = []
    for _ in range(2):
        again = fast.recorded.recorded(lambda: steps.append(1), torch.device("cuda"))
        again()
    assert len(steps) == 4
    assert capsys.readouterr().err == (
        "decoding is slower: its step cannot be recorded as a CUDA graph "
        "(CUDA error: operation not permitted when stream is capturing. More)\n"
    )


# --- query heads that share keys and values --------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize(("heads", "shared", "tokens"), [(8, 2, 1), (9, 3, 1), (4, 4, 1), (8, 2, 3)])
def test_grouped_attention_is_a_softmax_over_the_keys_that_heads_share(heads, shared, tokens, mask):
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, t, 8, generator=g) for n, t in ((heads, tokens), (shared, 6), (shared, 6)))
    seen = torch.rand(2, 1, tokens, 6, generator=g) < 0.6
    seen[..., 0] = True
    if mask == "none":
        seen = torch.arange(6) <= torch.arange(tokens)[:, None] if tokens > 1 else torch.ones(tokens, 6).bool()
        seen = seen.expand(2, 1, tokens, 6)
    given = {"none": None, "bool": seen, "added": torch.where(seen, 0.0, -torch.inf)}[mask]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // shared, True
    states, _ = fast.grouped_attention.attend(module, query, key, value, given, scaling=0.3, dropout=0.0)
    assert states.shape == (2, tokens, heads, 8)
    for row in range(2):
        for head in range(heads):
            k, v = key[row, head * shared // heads], value[row, head * shared // heads]
            scores = (0.3 * query[row, head] @ k.T).masked_fill(~seen[row, 0], -torch.inf)
            torch.testing.assert_close(states[row, :, head], scores.softmax(-1) @ v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_model_that_decodes_by_grouped_attention_draws_the_same_tokens(kind, tmp_path, monkeypatch):
    policy, calls = any_model(kind, tmp_path), []
    expected = draw(policy)
    attend = fast.grouped_attention.attend
    monkeypatch.setattr(fast.grouped_attention, "attend", lambda *a, **k: (calls.append(1), attend(*a, **k))[1])
    monkeypatch.delattr(fast.grouped_attention.sdpa_attention, "pack_gqa", raising=False)  # as before 5.23
    assert_same(draw(policy), expected)
    assert calls and policy.config._attn_implementation == "sdpa"


def test_the_core_takes_the_fast_path_where_there_is_one():
    assert model_module.fast is fast


# --- models whose logits are not their head over their states -------------------------------------------------------

TRANSFORMING = {
    "granite": LLAMA | {"logits_scaling": 8.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "gemma2": LLAMA | {"head_dim": 8, "final_logit_softcapping": 1.0},
    "recurrent_gemma": LLAMA | {"lru_width": 32, "num_hidden_layers": 3, "logits_soft_cap": 1.0},
    "falcon_h1": LLAMA
    | {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}
    | {"mamba_n_groups": 1, "mamba_d_state": 8},
}
PLAIN_TWINS = {
    "granite": {"logits_scaling": 1.0},
    "cohere": {"logit_scale": 1.0},
    "gemma2": {"final_logit_softcapping": None},
    "falcon_h1": {"lm_head_multiplier": 1.0},
}


@pytest.mark.parametrize("kind", TRANSFORMING)
def test_kind_27_a_model_that_transforms_its_logits_is_sampled_and_trained_by_those(kind, tmp_path):
    policy = load(saved(hf_model(kind, **TRANSFORMING[kind]), tmp_path), attention="eager")
    assert not policy.has_plain_head and policy.fast is None
    prompts = [PROMPTS[1], PROMPTS[1][::-1]]  # of one length: padding is another matter for recurrent models
    rollout = sample(policy, prompts, keys(2), SampleConfig(group_size=4, max_new_tokens=6))
    log_probs, entropy = batch_log_probs(policy, rollout, 1.0, 10_000)
    assert (log_probs - rollout.sampler_log_probs).abs().max() < 1e-4
    for i, (prompt, response, *_) in enumerate(rows_of(rollout)):
        expected, of_entropy = slow_log_probs(policy, prompt, response, 1.0)
        torch.testing.assert_close(log_probs[i, : len(response)].double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(entropy[i, : len(response)].double(), of_entropy, atol=1e-4, rtol=0)
    reference = freeze(load(tmp_path, attention="eager"))
    kl = token_log_probs(policy, rollout, 1.0, reference).kl
    assert kl.abs().max() < 1e-6 and not reference.has_plain_head


@pytest.mark.parametrize("kind", PLAIN_TWINS)
def test_kind_27_the_same_model_without_its_knob_takes_the_fast_path(kind, tmp_path):
    policy = load(saved(hf_model(kind, **TRANSFORMING[kind] | PLAIN_TWINS[kind]), tmp_path), attention="eager")
    assert policy.has_plain_head and policy.fast is model_module.fast


def test_kind_27_a_cap_is_seen_though_a_fresh_models_logits_are_far_below_it():
    scratch = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "model_type": "gemma2",
        "head_dim": 8,
        "final_logit_softcapping": 30.0,
    }
    assert not build(ModelConfig(scratch=scratch, attention="eager"), chain_tokenizer(), 0).has_plain_head


def test_kind_27_a_head_that_reads_something_else_is_seen():
    model = tiny_model().model
    model.lm_head.register_forward_pre_hook(lambda _, states: (2 * states[0],))
    assert not model_module.Policy(model, chain_tokenizer()).has_plain_head


def test_kind_27_the_start_of_a_run_names_the_path(tmp_path):
    for kind, fields in (("granite", TRANSFORMING["granite"]), ("llama", LLAMA)):
        policy = load(saved(hf_model(kind, **fields), tmp_path / kind))
        config = train.Config()
        said = console.describe(config, policy, [], 0, None, {}, 1)
        assert ("log-probs by the plain path" in said) == (kind == "granite")
