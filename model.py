"""Hugging Face causal LMs: build one from a config block or load one from a folder, score tokens, save.

A model from here behaves the same wherever it came from: fp32, no dropout, a `generation_config` that holds stop and
pad ids and nothing else (sampling settings that a model ships with would silently change what is sampled), and a
method `token_log_probs` on the root module, in which backbone and head run together.
"""

from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from data import BadInput, Draw, random_for, require_at_least

transformers_logging.disable_progress_bar()  # a bar per loaded file would bury the lines that matter

LOGITS_AT_ONCE = 2**24  # token_log_probs never holds more than this many logits: 64 MiB in fp32


@dataclass
class ModelConfig:
    path: str = ""  # folder or Hub id of a saved model; empty: build one from the fields below and warm it up
    architecture: str = "qwen2"  # from scratch: qwen2 or llama
    hidden_size: int = 96  # from scratch
    intermediate_size: int = 192  # from scratch
    num_layers: int = 2  # from scratch
    num_heads: int = 4  # from scratch
    num_kv_heads: int = 2  # from scratch: heads of keys and values
    attention: str = "sdpa"  # attention implementation of transformers: sdpa, eager, flash_attention_2

    def __post_init__(self):
        require_at_least(1, self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        if self.architecture not in ("qwen2", "llama"):
            raise ValueError(f"architecture={self.architecture!r} is not known: choose qwen2 or llama")
        if self.hidden_size % (2 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 2 x num_heads={self.num_heads} (rotary "
                f"embeddings pair dimensions), and num_heads of num_kv_heads={self.num_kv_heads}"
            )


def build(config: ModelConfig, tokenizer, seed: int):
    """A randomly initialised model of the configured size for this tokenizer."""
    hf_config = AutoConfig.for_model(
        config.architecture,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # initialisation is the one user of torch's global generator
        torch.manual_seed(int(random_for(seed, Draw.WEIGHTS).integers(2**31)))
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=config.attention)
    return _prepare(model, tokenizer)


def load(path: str | Path, attention: str = "sdpa"):
    """(model, tokenizer) from a folder or Hub id, in fp32. Raises BadInput where there is no causal LM."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"no causal language model could be loaded from {str(path)!r}: {reason}") from error
    return _prepare(model, tokenizer), tokenizer


def _prepare(model, tokenizer):
    shipped = model.generation_config
    stops: list[int] = []
    for ids in (shipped.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not stops:
        raise BadInput(f"{model.config.model_type}: neither model nor tokenizer names an end-of-sequence token")
    for knob in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, knob, None) not in (None, 1, 1.0):
            raise BadInput(f"{model.config.model_type} transforms its logits ({knob}), which token_log_probs does not")
    stops = sorted(set(stops))
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.shipped_generation_config = shipped
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad)
    model.token_log_probs = MethodType(_token_log_probs, model)
    return model.eval()  # for good: dropout has no place in a ratio of probabilities


def frozen(model):
    """The same model as a reference: no gradients, ever."""
    return model.requires_grad_(False)


def save(model, tokenizer, folder: Path) -> None:
    """Write HF safetensors, config, tokenizer and the generation config the model came with to `folder`."""
    model.save_pretrained(folder)
    # Not through save_pretrained, which refuses some published generation configs as inconsistent.
    model.shipped_generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def _score_tokens(head, hidden, targets, temperature):
    """[N, H], [N] -> log-probs and entropy [N] in fp32 at least; logits [N, V] exist only inside."""
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    with torch.no_grad():
        log_p = logits - normaliser[:, None]
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_probs, entropy


def _token_log_probs(self, tokens, attention_mask, response_length, temperature):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    states = self.base_model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False)[0]
    hidden = states[:, -response_length - 1 : -1].flatten(0, 1)  # the state before each response token
    targets = tokens[:, -response_length:].flatten()
    head = self.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    chunks = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    if torch.is_grad_enabled() and len(chunks) > 1:  # else the backward would hold the logits of every chunk at once
        scored = [checkpoint(_score_tokens, head, h, t, temperature, use_reentrant=False) for h, t in chunks]
    else:
        scored = [_score_tokens(head, h, t, temperature) for h, t in chunks]
    return tuple(torch.cat(part).unflatten(0, (len(tokens), response_length)) for part in zip(*scored, strict=True))


def token_log_probs(
    model, tokens: torch.Tensor, attention_mask: torch.Tensor, response_length: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each of the last `response_length` tokens, and the entropy of the distribution it was drawn from.

    tokens, attention_mask [B, S] (prompts left-padded, responses right-padded) -> log_probs, entropy [B, T] in nats,
    fp32 at least, of softmax(logits / temperature); entropy carries no gradient. Values at padding mean nothing.
    The head is applied to response positions only and to LOGITS_AT_ONCE logits at a time, so that [B, T, V] never
    exists whole, neither in the forward nor in the backward pass.
    """
    return model.token_log_probs(tokens, attention_mask, response_length, temperature)


def micro_batches(lengths: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Split rows into index lists of at most `size`, similar lengths together, so that little is padding."""
    return list(lengths.argsort(stable=True).split(size)) if len(lengths) else []


def scored_micro_batches(model, rollout, temperature: float, size: int):
    """`token_log_probs` of a Rollout, micro-batch by micro-batch: yields (rows, log_probs, entropy).

    Only the first T columns of a micro-batch exist, T being its longest response: index other [B, T] tensors with
    `x[rows, : log_probs.shape[1]]`. One micro-batch's graph can be freed before the next is built.
    """
    for rows in micro_batches(rollout.mask.sum(1), size):
        part = rollout.pick(rows)
        tokens, attention_mask = (x.to(model.device) for x in (part.tokens, part.attention_mask))
        yield rows, *token_log_probs(model, tokens, attention_mask, part.mask.shape[1], temperature)


@torch.no_grad()
def rollout_log_probs(model, rollout, temperature: float, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probs` of a whole Rollout, without gradients -> log_probs, entropy [B, T] on CPU; 0 where masked."""
    log_probs, entropy = torch.zeros(2, *rollout.mask.shape)
    for rows, *scores in scored_micro_batches(model, rollout, temperature, batch_size):
        T = scores[0].shape[1]
        for whole, part in zip((log_probs, entropy), scores, strict=True):
            whole[rows, :T] = torch.where(rollout.mask[rows, :T], part.cpu(), 0.0)
    return log_probs, entropy
