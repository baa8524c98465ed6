"""A prompt is run once, and its keys and values serve its siblings; rows are packed where attention
can tell them apart.

Every function here gives the hidden states [N, H] before the N response tokens of a batch, and each
token's row and step in [B, T].
"""

import copy

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fast import varlen

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache
# In which the responses of a micro-batch run, by length: fewer pad more, more start more
PASSES = 4


def shares_prompts(policy) -> bool:
    """Whether a forward pass runs a prompt once for all its siblings: needs keys and values that
    rows can share.

    Not while activations are recomputed, for transformers then keeps no keys and values, nor where
    rows are packed.
    """
    recomputes = policy.recomputes and torch.is_grad_enabled()
    return cache_is_divisible(policy.model) and not packs_rows(policy) and not recomputes


def cache_is_divisible(model) -> bool:
    """Whether rows of the model's cache can be repeated, picked and grown: recurrent and other
    states need not be, nor layers that keep such beside keys and values.
    """
    return all(type(layer) in KEYS_AND_VALUES for layer in DynamicCache(config=model.config).layers)


def packs_rows(policy) -> bool:
    """Whether the attention has kernels for rows of different lengths, end to end in one, and for
    the type that a pass computes in.
    """
    attention = policy.model.config._attn_implementation
    if attention == varlen.NAME:
        return policy.device.type == "cuda" and policy.dtype in varlen.HALF
    return "flash" in attention


def first_of_each_prompt(tokens, attention_mask, P: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens, attention_mask [B, >= P] -> (one row of each of the n different prompts [n], each
    row's prompt [B]).
    """
    mask = attention_mask[:, :P]
    _, source = torch.cat([tokens[:, :P] * mask, mask], 1).unique(dim=0, return_inverse=True)
    first = torch.empty(int(source.max()) + 1, dtype=torch.long, device=source.device)
    return first.scatter_(0, source, torch.arange(len(source), device=source.device)), source


def prompt_numbers(policy, batch) -> list[int] | None:
    """Which of the different prompts each row has, where a pass runs each of them once; else
    None.
    """
    if not len(batch) or not shares_prompts(policy):
        return None
    return first_of_each_prompt(batch.tokens, batch.attention_mask, batch.prompt_length)[1].tolist()


def response_states(policy, tokens, attention_mask, response_length):
    """States, rows and steps of a batch, by whichever way is quickest for this model."""
    if shares_prompts(policy):
        return _states_of_groups(policy, tokens, attention_mask, response_length)
    if packs_rows(policy):
        return states_of_packed_rows(policy, tokens, attention_mask, response_length)
    return states_of_rows(policy, tokens, attention_mask, response_length)


def states_of_rows(policy, tokens, attention_mask, response_length):
    """Every row in full."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    backbone = policy.model.base_model
    states = backbone(
        tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False
    )[0]
    rows, steps = attention_mask[:, -response_length:].nonzero(as_tuple=True)
    return states[rows, steps + tokens.shape[1] - response_length - 1], rows, steps


def states_of_packed_rows(policy, tokens, attention_mask, response_length):
    """Without padding: rows end to end in one, which variable-length attention tells apart by
    where each begins.
    """
    rows, columns = attention_mask.nonzero(as_tuple=True)
    positions = (attention_mask.cumsum(1) - 1)[rows, columns]
    lengths = attention_mask.sum(1)
    begins = F.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    options = {
        "position_ids": positions[None],
        "use_cache": False,
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    states = policy.model.base_model(tokens[rows, columns][None], **options)[0][0]
    steps = columns - (tokens.shape[1] - response_length)
    responses = (steps >= 0).nonzero()[:, 0]
    return states[responses - 1], rows[responses], steps[responses]


def _states_of_groups(policy, tokens, attention_mask, response_length):
    """Each different prompt once: its siblings continue from its keys and values.

    The gradient flows back through those into the prompt. The responses go in PASSES passes of
    similar length.
    """
    backbone = policy.model.base_model
    P = tokens.shape[1] - response_length
    first, source = first_of_each_prompt(tokens, attention_mask, P)
    prompts = tokens[first, :P]
    prompt_mask = attention_mask[first, :P]
    cache = DynamicCache(config=policy.model.config)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    options = {"position_ids": positions, policy.cache_argument: cache, "use_cache": True}
    states = [backbone(prompts, attention_mask=prompt_mask, **options)[0][source, -1]]
    rows = [torch.arange(len(tokens), device=tokens.device)]
    steps = [torch.zeros_like(source)]
    lengths = attention_mask[:, P:].sum(1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    passes = 1 if isinstance(policy, FSDPModule) else PASSES
    for part in lengths.argsort(stable=True).tensor_split(passes):
        if not len(part):
            continue
        end = P + max(1, int(lengths[part].max()) - 1)  # nothing is predicted from the last token
        theirs = copy.copy(cache)
        theirs.layers = [copy.copy(layer) for layer in cache.layers]
        theirs.batch_select_indices(source[part])
        options = {
            "position_ids": positions[part, P:end],
            policy.cache_argument: theirs,
            "use_cache": True,
        }
        out = backbone(tokens[part, P:end], attention_mask=attention_mask[part, :end], **options)[0]
        row, step = attention_mask[part, P + 1 : end + 1].nonzero(as_tuple=True)
        states.append(out[row, step])
        rows.append(part[row])
        steps.append(step + 1)
    return torch.cat(states), torch.cat(rows), torch.cat(steps)
