"""Decoding with prompts run once, rows that leave when they have stopped, and room for keys and
values ahead of time.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fast.shared_prompts import cache_is_divisible
from infra.waiting import count

COMPACT_AT = 0.75  # rows that have stopped leave the batch once this part of it or less goes on
ROOM = 64  # tokens that keys and values get room for ahead of time


def can_decode(policy) -> bool:
    """Whether `decode_groups` works for this model."""
    return cache_is_divisible(policy.model)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written into room set aside: DynamicLayer copies them all
    for every new token.
    """

    room = None  # the tensors that self.keys and self.values are the filled part of

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        end = filled + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.grow(key_states, value_states, filled, end + ROOM)
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, filled:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def grow(self, key_states, value_states, filled: int, size: int) -> None:
        """Set room for `size` tokens aside, and move the `filled` ones there."""
        rows, heads, _, width = key_states.shape
        self.room = [
            states.new_empty(rows, heads, size, width) for states in (key_states, value_states)
        ]
        if filled:
            for room, old in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :filled] = old

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def decode_groups(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    prompt_mask=None,
    source=None,
    cache_argument=None,
    **_,
) -> torch.Tensor:
    """A loop for `generate`: prompts [n, P] and their mask -> ids [B, P + T]; row b continues
    prompt source[b].

    Each prompt is run once and its keys and values are repeated for its siblings; whenever a
    quarter of the rows has stopped since the last time, those leave the batch. `logits_processor`
    ends with an InverseCDF of B rows, `stopping_criteria` with an EndOfResponse.
    """
    sampler, end = logits_processor[-1], stopping_criteria[-1]
    mask = prompt_mask
    cache = DynamicCache(config=model.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1][
        source
    ]
    cache.batch_select_indices(source)
    mask = mask[source]
    position = positions[source, -1:]
    P = input_ids.shape[1]
    steps = generation_config.max_new_tokens
    pad = generation_config.pad_token_id
    out = input_ids.new_full((len(source), P + steps), pad)
    out[:, :P] = input_ids[source]
    rows = torch.arange(len(source), device=out.device)
    going = torch.ones_like(source, dtype=torch.bool)
    for step in range(steps):
        chosen = torch.where(going, sampler.choose(logits, rows, step), pad)
        out[rows, P + step] = chosen
        going = going & ~end.ends(out[:, P : P + step + 1], step, rows)[:, 0]
        alive = int(going.sum())
        count("token", step + 1, steps)
        count("alive", alive, len(source))
        if not alive or step + 1 == steps:
            return out[:, : P + step + 1]
        if alive <= COMPACT_AT * len(rows):
            keep = going.nonzero()[:, 0]
            rows, going, chosen, mask, position = (
                x[keep] for x in (rows, going, chosen, mask, position)
            )
            cache.batch_select_indices(keep)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        position = position + 1
        logits = model(
            chosen[:, None], attention_mask=mask, position_ids=position, **options
        ).logits[:, -1]
