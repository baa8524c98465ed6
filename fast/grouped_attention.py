"""Attention of one new token a row to keys and values that its query heads share, without copying
those once for each head.

transformers from 5.23 on does it itself where a mask is given. Before, every layer copied all keys
and values for every token: with 7 heads on each, seven times the memory traffic of decoding.
"""

from contextlib import contextmanager

import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.masking_utils import sdpa_mask

from fast import varlen

NAME = "grouped sdpa"


@contextmanager
def grouped_attention(model):
    """While it lasts, a model whose attention is sdpa decodes by `attend`, where transformers would
    copy. So does one that packs the rows that it scores: the rows that it samples are padded.
    """
    config, attention = model.config, model.config._attn_implementation
    if attention not in ("sdpa", varlen.NAME):
        yield
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    copies = not hasattr(sdpa_attention, "pack_gqa")
    config._attn_implementation = NAME if copies else "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = attention


def attend(module, query, key, value, attention_mask, **options):
    """query [B, heads, T, width], key and value [B, shared heads, K, width], a mask that the heads
    share [B, 1, T, K] (bool, or added) or None -> ([B, T, heads, width], None).
    """
    B, heads, T, width = query.shape
    shared = key.shape[1]
    if T > 1 or heads == shared or options.get("position_bias") is not None:
        return sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
    # The heads that share keys take the place of the tokens: all of them see the same
    query = query.reshape(B, shared, heads // shared, width)
    states = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return states.reshape(B, 1, heads, -1), None
