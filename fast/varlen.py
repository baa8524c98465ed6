"""Rows of different lengths end to end in one, without padding: torch's own variable-length
attention, known to transformers' models as "varlen".

Under that name only rows that come packed take it, for they bring `cu_seq_lens_q` along. Whatever
comes with a padding mask or a cache goes to sdpa, as if the name were that.
"""

import importlib.util
import inspect
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "varlen"
HALF = (torch.bfloat16, torch.float16)  # what the kernel computes in
WIDEST_HEAD = 256
# What some models tell their attention, and the kernel here does not know
NOT_KNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")


def can_pack(policy, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for passes of this model: on a GPU, in half precision, with sdpa
    otherwise, and layers that all look back at everything.
    """
    config = policy.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        device.type == "cuda"
        and dtype in HALF
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and config._attn_implementation in ("sdpa", NAME)
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
        and width % 8 == 0
        and width <= WIDEST_HEAD
    )


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*args, **kwargs) -> torch.Tensor | None:
    """sdpa's mask; none for rows that come without one of padding, as packed ones do."""
    unpadded = kwargs.get("attention_mask") is None
    if unpadded and kwargs.get("q_length") == kwargs.get("kv_length"):
        return None
    return sdpa_mask(*args, **kwargs)


def attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs) -> tuple:
    """query [B, H, n, D], key and value [B, Hkv, m, D] -> ([B, n, H, D], None), causal.

    Packed rows: B = 1, and row i is cu_seq_lens_q[i] to cu_seq_lens_q[i + 1]. Raises ValueError
    where the model asks for more than plain causal attention.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if asked := [name for name in NOT_KNOWN if kwargs.get(name) is not None]:
        raise ValueError(f"attention {NAME} knows no {asked[0]}")
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    attend = by_kernel if query.is_cuda else one_by_one
    out = attend(*packed, cu_seq_lens_q, kwargs["max_length_q"], kwargs.get("scaling"))
    return out[None], None


def by_kernel(query, key, value, cu_seq_lens, longest: int, scale: float | None):
    """query [N, H, D], key and value [N, Hkv, D] -> [N, H, D]."""
    from torch.nn.attention import varlen

    # What it is told of has grown from release to release
    known = inspect.signature(varlen.varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None:  # it divides by the root of the width
        query = query * (scale * query.shape[-1] ** 0.5)
    groups = query.shape[1] // key.shape[1]
    if "enable_gqa" in known:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    ends = (cu_seq_lens, cu_seq_lens, longest, longest)
    return varlen.varlen_attn(query, key, value, *ends, **options)


def one_by_one(query, key, value, cu_seq_lens, longest: int, scale: float | None):
    """The same on a CPU, row after row."""
    parts = []
    for start, end in pairwise(cu_seq_lens.tolist()):
        row = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(*row, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
