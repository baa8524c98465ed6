"""How much memory a run will need, by what needs it, and how much it has used."""

import math
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.checkpoints import FILE_BYTES
from infra.processes import world_size
from infra.sharding import compute_dtype

CARD = 80 * 2**30  # bytes of the GPU that is planned for where there is none
SPARE = 0.2  # of what is free: the allocator's slack, the libraries, the pass of the prompts
# Of a sampled logit: itself, log-prob and probability in fp32, its sum in fp64, what each leaves
LOGIT_BYTES = 28
ON_CPU = 16384  # tokens decoded together: of a model worth the name, more are no faster there


def peak_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Work:
    """What a step asks of each rank."""

    sampled_tokens: int  # tokens of prompts and full-length responses decoded together
    tokens_per_row: int  # of the longest prompt and a full-length response
    trained_tokens: int  # of a micro-batch
    has_reference: bool
    learns_beside: bool = False  # a PRM or a critic
    repeats_heads: bool = False  # whether decoding copies grouped keys and values for every head


def memory_plan(
    model, layers: list, settings, ranks: int, on_gpu: bool, work: Work, logits_at_once: int
) -> dict[str, float]:
    """GiB that each rank will need, by what needs it; and the sum at the worst moment, "peak".

    model: of transformers, maybe on the meta device, for only shapes are read; `layers`: its
    decoder layers; `settings`: the config's block `model`. Activations count what a decoder layer
    of Llama's shape keeps for its backward pass; the allocator's slack and the libraries themselves
    (about 0.4 GiB on a CPU, 0.5 to 1 on a GPU) are not in it.
    """
    shape, n = model.config.get_text_config(), model.num_parameters()
    split = settings.shard or max(1, ranks // settings.replicate)
    compute = compute_dtype(settings, on_gpu).itemsize
    is_split = ranks > 1 or on_gpu
    in_layer = sum(p.numel() for p in layers[0].parameters()) if layers else 0
    # Embedding and head: gathered from the first layer's forward to the backward
    in_root = n - in_layer * len(layers)
    kept = activations_per_token(shape, len(layers), settings.gradient_checkpointing)
    logits = min(work.trained_tokens * shape.vocab_size, logits_at_once)
    always = {
        "weights, fp32, sharded": 4 * n / split,
        "optimizer moments, fp32, sharded": 8 * n / split,
        "reference, fp32, sharded": 4 * n / split
        if work.has_reference and not settings.offload_reference
        else 0,
        "PRM or critic, and moments, fp32, sharded": 12 * n / split
        if work.learns_beside
        else 0,  # its gradients go first
    }
    rows = work.sampled_tokens // work.tokens_per_row
    sampling = {
        "sampling: gathered weights": compute * n if is_split else 0,
        # Room for the longest response, from the start, and once for all the heads that share it
        "sampling: KV cache": cache_bytes(shape, compute) * work.sampled_tokens,
        "sampling: keys and values of all heads": copied_heads(shape)
        * compute
        * work.sampled_tokens
        * work.repeats_heads,
        "sampling: logits": LOGIT_BYTES * shape.vocab_size * rows,
    }
    update = {
        "update: gradients, fp32, sharded": 4 * n / split,
        # Root and two layers in the compute type, their gradients, and the fp32 buffer that reduces
        # the largest.
        "update: gathered root and layers": (2 * compute + 4) * in_root + 4 * compute * in_layer
        if is_split
        else 0,
        "update: activations": kept * work.trained_tokens * compute,
        "update: logits": logits
        * (compute + 4 * 4),  # and log-probs, probabilities and gradients, in fp32
    }
    peak = sum(always.values()) + max(sum(sampling.values()), sum(update.values()))
    return {
        name: size / 2**30 for name, size in {**always, **sampling, **update, "peak": peak}.items()
    }


def cache_bytes(shape, compute: int) -> int:
    """Of a token's keys and values."""
    return 2 * shape.num_hidden_layers * kv_width(shape) * compute


def host_plan(model, settings, ranks: int, on_gpu: bool, work: Work) -> dict[str, float]:
    """GiB of host memory that a rank needs for a while beside its device's, by what needs it.

    Reading a model in shares (infra/pretrained.py) needs a tensor at a time, which is not listed.
    """
    n = model.num_parameters()
    split = settings.shard or max(1, ranks // settings.replicate)
    in_host = {
        "reading a model whose files must be read whole": 4 * n,
        "rank 0: the gathered model, to save it": 4 * n,
    }
    if on_gpu:
        share = (12 + 12 * work.learns_beside) * n / split
        in_host["saving a checkpoint: a file of tensors, twice"] = 2 * min(share, FILE_BYTES)
        if settings.offload_reference and work.has_reference:
            in_host["reference, fp32, sharded, throughout"] = 4 * n / split
    return {name: size / 2**30 for name, size in in_host.items()}


def copied_heads(shape) -> int:
    """Values of a token that transformers makes in the layer at hand, where there is a mask: its
    grouped keys and values, once for every head.
    """
    groups = kv_heads(shape)
    copies = shape.num_attention_heads // groups
    return 2 * copies * kv_width(shape) if copies > 1 else 0


def kv_heads(shape) -> int:
    return getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads


def kv_width(shape) -> int:
    """Values that a token's keys take in one layer, and its values as many."""
    if not getattr(shape, "num_attention_heads", None):  # recurrent
        return 0
    return kv_heads(shape) * (
        getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    )


def activations_per_token(shape, layers: int, recomputes: bool) -> int:
    """Values that are kept of each token for the backward pass, as counted for Qwen2 under sdpa.

    The backward pass adds about a layer's worth; recomputing, it holds three (measured) and one
    value per layer.
    """
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    layer = 11 * shape.hidden_size + 4 * inner
    if recomputes:
        return 3 * layer + shape.num_hidden_layers * shape.hidden_size
    return (layers + 1) * layer


def free_bytes(device: torch.device) -> int:
    """Of this rank's GPU, or its part of what this machine's processes share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:  # not Linux, so nothing tells
        return CARD
    available = 2**10 * int(fields["MemAvailable"].split()[0])
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def tokens_that_fit(shape, compute: int, tokens_per_row: int, free: int, on_gpu: bool) -> int:
    """Tokens of prompts and full-length responses to decode together in `free` bytes: a power of 2,
    so that a little more or less memory chooses the same. `compute`: bytes of a number.
    """
    row = tokens_per_row * cache_bytes(shape, compute) + LOGIT_BYTES * shape.vocab_size
    tokens = max(1, tokens_per_row * int(free * (1 - SPARE) // row))
    tokens = 2 ** (tokens.bit_length() - 1)
    return tokens if on_gpu else min(tokens, ON_CPU)


def planned_machine(config, device: torch.device) -> tuple[int, bool, int]:
    """(ranks, whether they are GPUs, free bytes of each). A dry run of a saved model plans for
    GPUs, wherever it runs.
    """
    ranks = max(world_size(), config.model.shard * config.model.replicate)
    if device.type != "cuda" and config.dry_run and config.model.path:
        return ranks, True, CARD
    return ranks, device.type == "cuda", free_bytes(device)


def batch_tokens(config, model, layers: list, prompts, device: torch.device) -> int:
    """sample.batch_tokens; where that is 0, what fits beside all that a run holds at `device`."""
    if config.sample.batch_tokens:
        return config.sample.batch_tokens
    ranks, on_gpu, free = planned_machine(config, device)
    row = max(map(len, prompts)) + config.sample.max_new_tokens
    nothing = Work(0, row, 0, config.needs_reference, bool(config.learns_beside))
    plan = memory_plan(model, layers, config.model, ranks, on_gpu, nothing, 0)
    held = sum(gib for name, gib in plan.items() if not name.startswith(("update", "peak")))
    free = max(0, free - int(held * 2**30))
    shape = model.config.get_text_config()
    compute = compute_dtype(config.model, on_gpu).itemsize
    return tokens_that_fit(shape, compute, row, free, on_gpu)


def dry_run_report(config, policy, layers: list, prompts, tokens: int) -> str:
    """The first prompts exactly as the model will see them, and the memory plan of each rank.

    `tokens`: decoded together, see `batch_tokens`.
    """
    t, s = config.train, config.sample
    ranks, on_gpu, free = planned_machine(config, policy.device)
    row = max(map(len, prompts)) + s.max_new_tokens
    sampled = t.prompts_per_step * config.samples_per_prompt
    if config.needs_values:  # as many of each response as it has steps, and a token is one at least
        sampled *= config.values.continuations * s.max_new_tokens
    work = Work(
        sampled_tokens=min(max(row, tokens), row * -(-sampled // ranks)),
        tokens_per_row=row,
        trained_tokens=min(max(row, t.micro_batch_tokens), row * -(-t.mini_batch_size // ranks)),
        has_reference=config.needs_reference,
        learns_beside=bool(config.learns_beside),
        repeats_heads=s.decoding != "fast",
    )
    logits = math.inf
    if policy.fast:
        logits = policy.fast.logits_at_once("cuda" if on_gpu else "cpu")
    plan = memory_plan(policy.model, layers, config.model, ranks, on_gpu, work, logits)
    lines = [
        f"prompt {i + 1}: {policy.tokenizer.decode(ids)!r}" for i, ids in enumerate(prompts[:2])
    ]
    kind = "CPU process(es)"
    if on_gpu:
        assumed = "assumed" if policy.device.type != "cuda" else "free"
        kind = f"GPU(s), {free / 2**30:.0f} GiB {assumed}"
    lines.append(f"memory of each of {ranks} {kind}, estimated:")
    lines += [f"  {name:<42} {gib:9.3f} GiB" for name, gib in plan.items()]
    if ranks > 1 or on_gpu:
        lines.append("and of host memory, for a while:")
        in_host = host_plan(policy.model, config.model, ranks, on_gpu, work)
        lines += [f"  {name:<46} {gib:5.3f} GiB" for name, gib in in_host.items()]
    return "\n".join([*lines, "dry run: nothing was written"])
