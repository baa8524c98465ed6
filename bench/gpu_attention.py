"""The stage of gpu.py that asks every attention kernel: both directions, padded rows, grouped heads, against fp32."""

import functools
import math
import time

from gpu_runs import Bench, apart, check, guarded, note, skip


def attention(bench: Bench):
    yield from apart(bench, "gpu_attention.attention_here")


def attention_here(bench: Bench):
    """Every kernel that a pass may take, at the length at which cuDNN's is known to fail."""
    import torch

    on_gpu = torch.cuda.is_available()
    for padded in (True, False):
        for low in (False, True):
            case = f"{'left-padded' if padded else 'full rows'}, {'low' if low else 'usual'} scores"
            data = attention_data(bench, padded, low)
            yield guarded(f"sdpa, {case}", functools.partial(kernel, f"sdpa, {case}", None, data))
            for name in ("EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
                if name == "FLASH_ATTENTION" and padded:
                    continue  # knows no mask
                what = f"{name}, {case}"
                yield guarded(what, functools.partial(kernel, what, name, data)) if on_gpu else skip(what)
    for low in (False, True):
        what = f"varlen, rows end to end, {'low' if low else 'usual'} scores"
        yield guarded(what, functools.partial(packed_rows, what, attention_data(bench, True, low)))
    for name in ("EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        what = f"{name}, a new K each time"
        yield guarded(what, functools.partial(new_lengths, what, name)) if on_gpu else skip(what)


def attention_data(bench: Bench, padded: bool, low: bool) -> dict:
    """q, k, v [B, heads, S, 64], their grouped heads repeated, a mask, and an output gradient that is 0 at padding.

    low: the scores are shifted so that every logsumexp is below -88.7.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, heads, kv_heads, S = bench.sized((8, 14, 2, 704), (2, 4, 2, 192))
    draw = torch.Generator(device).manual_seed(0)
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    data = {name: torch.randn(rows, n, S, 64, device=device, generator=draw) for name, n in sizes.items()}
    if low:  # q . k falls by 15.5 x 64 = 992, a score by an eighth of it
        data["q"], data["k"] = data["q"] + 15.5**0.5, data["k"] - 15.5**0.5
    padding = torch.arange(rows, device=device) * (S // (2 * rows)) if padded else torch.zeros(rows, device=device)
    live = torch.arange(S, device=device) >= padding[:, None]
    mask = torch.ones(S, S, dtype=torch.bool, device=device).tril() & live[:, None, None, :]
    gradient = torch.randn(rows, heads, S, 64, device=device, generator=draw) * live[:, None, :, None]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    data = {name: x.to(dtype) for name, x in data.items()}
    return {**data, "mask": mask if padded else None, "live": live, "gradient": gradient.to(dtype)}


def attended(data: dict, dtype, forward) -> list:
    """[output at live places, gradients of q, k and v] of `forward(q, k, v)`, in fp32."""
    import torch

    leaves = [data[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v")]
    groups = leaves[0].shape[1] // leaves[1].shape[1]
    q, k, v = leaves[0], *(x.repeat_interleave(groups, 1) for x in leaves[1:])
    out = forward(q, k, v)
    out.backward(data["gradient"].to(dtype))
    live = torch.where(data["live"][:, None, :, None], out.detach(), 0.0)
    return [live.float(), *(leaf.grad.float() for leaf in leaves)]


def written_out(q, k, v, mask):
    """Attention as its formula, the reference. Rows that see nothing see all alike; their gradient is 0."""
    import torch

    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~(causal if mask is None else mask), -1e30).softmax(-1) @ v


def kernel(what: str, backend: str | None, data: dict) -> dict:
    """One kernel against the formula in fp32. cuDNN's is not judged: it is off, and this says why."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    mask = data["mask"]

    def forward(q, k, v):
        if backend is None:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    right, words = beside_formula(data, forward)
    return note(what, words) if backend == "CUDNN_ATTENTION" else check(what, right, words)


def packed_rows(what: str, data: dict) -> dict:
    """The rows end to end in one, without their padding, by the attention that such rows take."""
    import torch
    from fast import varlen

    live = data["live"]
    lengths = live.sum(1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    attend = varlen.by_kernel if data["q"].is_cuda else varlen.one_by_one

    def forward(q, k, v):
        rows = [x.transpose(1, 2)[live] for x in (q, k, v)]
        out = attend(*rows, ends, int(lengths.max()), None)
        whole = out.new_zeros(*live.shape, *out.shape[1:])
        return whole.index_put(live.nonzero(as_tuple=True), out).transpose(1, 2)

    return check(what, *beside_formula(data, forward))


def beside_formula(data: dict, forward) -> tuple[bool, str]:
    """(whether out and gradients of `forward` are those of the formula in fp32, what was found)."""
    import torch

    found = attended(data, data["q"].dtype, forward)
    exact = attended(data, torch.float32, lambda q, k, v: written_out(q, k, v, data["mask"]))
    finite = all(x.isfinite().all() for x in found)
    off = [((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)]
    errors = ", ".join(f"{x:.1e}" for x in off)
    words = f"{'finite' if finite else 'NOT FINITE'}; relative errors of out, dq, dk, dv: {errors}"
    return finite and max(off) < 0.05, words


def new_lengths(what: str, backend: str) -> dict:
    """Milliseconds of one decoded token's attention at a length never seen before, and at one seen."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def milliseconds(K: int) -> float:
        q = torch.randn(64, 14, 1, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(64, 14, K, 64, device="cuda", dtype=torch.bfloat16)
        mask = torch.ones(64, 1, 1, K, device="cuda", dtype=torch.bool)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with sdpa_kernel(getattr(SDPBackend, backend)):
            scaled_dot_product_attention(q, k, k, attn_mask=mask)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    milliseconds(500)
    first, again = ([milliseconds(K) for K in range(501, 521)] for _ in range(2))
    first, again = sorted(first)[10], sorted(again)[10]
    return note(what, f"{first:.3f} ms, seen before {again:.3f} ms", first=first, again=again)
