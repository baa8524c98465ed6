"""Decoding on a GPU: the step that makes a token of every row is recorded once and then replayed.

A step of a large model launches a thousand kernels, most of them shorter than their launch; as a
CUDA graph they are one launch. So every tensor of the step has its place for good: keys and values
have room for the longest response from the start, and what changes from token to token is written
in place. On a CPU the same step runs as it is, and there it is tested.
"""

import functools
import sys

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from fast.decode import decode_groups
from fast.grouped_attention import grouped_attention
from infra.errors import first_sentences, is_out_of_memory
from infra.processes import print0
from infra.waiting import count

PROMPT_TOKENS = 2**15  # of prompts that are run together
# Attention reads a multiple of this many columns. For each further one the step is recorded anew,
# which is as dear as some ten steps; with fewer columns that would happen more often.
COLUMNS = 256
# Tokens between two looks at which rows go on: for a look the GPU must be waited for
LOOK_EVERY = 16
FEWEST_ROWS = 16  # fewer rows are no faster
unrecordable: list[str] = []  # why the step could not be recorded; then it is not tried again


def decoding_loop(policy):
    """The loop for `generate` that is the quickest on the policy's device."""
    # flash_attention_2 asks how many tokens each row has, which cannot be recorded
    asks = "flash" in policy.config._attn_implementation
    records = policy.device.type == "cuda" and not asks
    loop = decode_recorded if records else decode_groups

    @functools.wraps(loop)
    def decode(model, *args, **options):
        with grouped_attention(model):
            return loop(model, *args, **options)

    return decode


class Room(StaticLayer):
    """Keys and values of one layer [R, heads, L, width], all in place: the first `width` columns
    are read, and `column`, a tensor [1] that all layers share, is written next.
    """

    def __init__(self, keys, values, column):
        super().__init__(keys.shape[2])
        self.keys, self.values = keys, values
        self.column = column
        self.width = keys.shape[2]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> torch.Tensor:
        return self.column


def decode_recorded(
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
    """A loop for `generate`, like `decode_groups`: prompts [n, P] and their mask -> ids [B, P + T];
    row b continues prompt source[b]. `logits_processor` ends with an InverseCDF of B rows,
    `stopping_criteria` with an EndOfResponse.
    """
    how = (logits_processor[-1], stopping_criteria[-1], generation_config)
    rows = Rows(model, cache_argument, *how)
    rows.start(input_ids, prompt_mask, source)
    responses = rows.decode()
    return torch.cat([input_ids[source], responses], 1)


class Rows:
    """The rows that are decoded together, R of B, with all that goes on from token to token."""

    def __init__(self, model, cache_argument: str, sampler, end, generation_config):
        self.model = model
        self.cache_argument = cache_argument
        self.sampler = sampler
        self.end = end
        self.T = generation_config.max_new_tokens
        self.pad = generation_config.pad_token_id

    def start(self, prompts, prompt_mask, source) -> None:
        """Run each prompt once, and lay out keys, values and all else for its rows."""
        B, P = len(source), prompts.shape[1]
        L = rounded_up(P + self.T, 64)
        self.P, self.L = P, L
        device = prompts.device
        self.rows = torch.arange(B, device=device)
        self.going = torch.ones_like(source, dtype=torch.bool)
        self.mask = torch.zeros(B, L, dtype=prompt_mask.dtype, device=device)
        self.mask[:, :P] = prompt_mask[source]
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        self.position = positions[source, -1:]
        self.column = torch.full((1,), P, device=device)
        # Not a scalar: as an index that would be asked for its value
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.longest = torch.zeros(1, dtype=torch.long, device=device)
        self.out = prompts.new_full((B, self.T), self.pad)
        self.layers: list[Room] = []
        for part in torch.arange(len(prompts), device=device).split(max(1, PROMPT_TOKENS // P)):
            cache = DynamicCache(config=self.model.config)
            cache.layers = [DynamicLayer() for _ in cache.layers]  # whole, a sliding window's too
            options = {self.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
            options |= {"attention_mask": prompt_mask[part], "position_ids": positions[part]}
            logits = self.model(prompts[part], **options).logits[:, -1]
            if not self.layers:
                self.logits = logits.new_empty(B, logits.shape[-1])
                self.layers = [self.room(B, layer) for layer in cache.layers]
            theirs = ((source >= part[0]) & (source <= part[-1])).nonzero()[:, 0]
            of_prompt = source[theirs] - part[0]
            self.logits[theirs] = logits[of_prompt]
            for room, layer in zip(self.layers, cache.layers, strict=True):
                room.keys[theirs, :, :P] = layer.keys[of_prompt]
                room.values[theirs, :, :P] = layer.values[of_prompt]
        self.cache = cache
        self.cache.layers = self.layers

    def room(self, B: int, layer) -> Room:
        # Zeros, for what a masked place holds is multiplied by a weight of 0, and 0 x NaN is NaN
        empty = [
            states.new_zeros(B, states.shape[1], self.L, states.shape[3])
            for states in (layer.keys, layer.values)
        ]
        return Room(*empty, self.column)

    def step(self) -> None:
        """Choose a token for each row by the last logits, and make the next ones. All in place, and
        without a question that a GPU would have to be waited for.
        """
        chosen = self.sampler.choose(self.logits, self.rows, self.token)
        chosen = torch.where(self.going, chosen, self.pad)
        self.out[self.rows, self.token] = chosen
        self.longest += self.going.any()
        self.going &= ~self.end.is_stop_id(chosen)
        self.mask.index_fill_(1, self.column, 1)
        self.position += 1
        width = self.layers[0].width
        logits = self.model(
            chosen[:, None],
            attention_mask=self.mask[:, :width],
            position_ids=self.position,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: self.cache},
        ).logits
        self.logits.copy_(logits[:, -1])
        self.column += 1
        self.token += 1

    def decode(self) -> torch.Tensor:
        """Until all rows have stopped, or are T tokens long -> ids [B, <= T]."""
        done = looked_at = 0
        while done < self.T:
            width = min(self.L, rounded_up(self.P + done + 1, COLUMNS))
            for layer in self.layers:
                layer.width = width
            end = min(self.T, width - self.P)
            again = None  # the memory of the last graph is free for the next one
            if end - done == 1:  # not worth a recording
                self.step()
            else:
                again = recorded(self.step, self.column.device)  # which makes a step
            done += 1
            while done < end:
                steps = min(LOOK_EVERY, end - done)
                for _ in range(steps):
                    again()
                done += steps
                self.look_for_strings(looked_at, done)
                looked_at = done
                alive = int(self.going.sum())
                count("token", done, self.T)
                count("alive", alive, len(self.out))
                if not alive:
                    return self.out[:, : int(self.longest)]
                if len(self.rows) > FEWEST_ROWS and alive <= len(self.rows) // 2:
                    self.keep(max(FEWEST_ROWS, 2 ** (alive - 1).bit_length()))
                    break
        return self.out[:, : int(self.longest)]

    def look_for_strings(self, start: int, stop: int) -> None:
        """Rows in whose tokens start..stop a stop string ended go on no longer. What they wrote
        behind it is masked in the end.
        """
        if self.end.strings:
            self.going &= ~self.end.ends(self.out[:, :stop], start, self.rows).any(1)

    def keep(self, n: int) -> None:
        """The rows that go on, and as many of the others as make n."""
        kept = (~self.going).long().argsort(stable=True)[:n]
        for name in ("rows", "going", "mask", "position", "logits"):
            setattr(self, name, getattr(self, name)[kept])
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]


def rounded_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def recorded(step, device: torch.device):
    """Make `step` once, then record it -> what makes it again: the CUDA graph's replay. Where there
    is no GPU, or it cannot be recorded, the step itself.
    """
    if device.type != "cuda":
        step()
        return step
    # On the stream that records: libraries make their workspaces at the first call
    stream, now = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        step()
    now.wait_stream(stream)
    if unrecordable:
        return step
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: a process group's own thread may look at its events meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        unrecordable.append(first_sentences(error))
        print0(
            f"decoding is slower: its step cannot be recorded as a CUDA graph ({unrecordable[0]})",
            file=sys.stderr,
        )
        return step
    return graph.replay
