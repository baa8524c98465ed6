"""How much memory a run will need, by what needs it, and how much it has used."""

import resource
import sys
from dataclasses import dataclass

import torch

from infra.processes import world_size


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
    has_prm: bool = False


def memory_plan(
    model, layers: list, settings, ranks: int, on_gpu: bool, work: Work, logits_at_once: int
) -> dict[str, float]:
    """GiB that each rank will need, by what needs it; and the sum at the worst moment, "peak".

    model: of transformers, maybe on the meta device, for only shapes are read; `layers`: its
    decoder layers; `settings`: the config's block `model`. Activations count what a decoder layer
    of Llama's shape keeps for its backward pass; the allocator's slack and the libraries themselves
    (about 0.4 GiB on a CPU, 0.5 to 1 on a GPU) are not in it.
    """
    shape, n = model.config, model.num_parameters()
    split = settings.shard or max(1, ranks // settings.replicate)
    compute = 2 if on_gpu and settings.dtype == "bfloat16" else 4  # bytes
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
        "PRM and its moments, fp32, sharded": 12 * n / split
        if work.has_prm
        else 0,  # its gradients go first
    }
    sampling = {
        "sampling: gathered weights": compute * n if is_split else 0,
        "sampling: KV cache": 2
        * shape.num_hidden_layers
        * kv_width(shape)
        * compute
        * work.sampled_tokens,
        # Logits, log-probs and probabilities in fp32, the cumulative distribution in fp64.
        "sampling: logits": work.sampled_tokens // work.tokens_per_row * shape.vocab_size * 28,
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


def kv_width(shape) -> int:
    """Values that a token's keys take in one layer, and its values as many."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    return heads * (
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


def dry_run_report(config, policy, layers: list, prompts, logits_at_once: int) -> str:
    """The first prompts exactly as the model will see them, and the memory plan of each rank."""
    t, s = config.train, config.sample
    ranks = max(world_size(), config.model.shard * config.model.replicate)
    # A plan for a saved model is one for GPUs
    on_gpu = torch.cuda.is_available() or bool(config.model.path)
    row = max(map(len, prompts)) + s.max_new_tokens
    responses = t.prompts_per_step * s.group_size
    work = Work(
        sampled_tokens=min(max(row, s.batch_tokens), row * -(-responses // ranks)),
        tokens_per_row=row,
        trained_tokens=min(max(row, t.micro_batch_tokens), row * -(-t.mini_batch_size // ranks)),
        has_reference=config.needs_reference,
        has_prm=config.needs_prm,
    )
    plan = memory_plan(policy.model, layers, config.model, ranks, on_gpu, work, logits_at_once)
    lines = [
        f"prompt {i + 1}: {policy.tokenizer.decode(ids)!r}" for i, ids in enumerate(prompts[:2])
    ]
    lines.append(f"memory of each of {ranks} {'GPU' if on_gpu else 'CPU process'}(s), estimated:")
    lines += [f"  {name:<42} {gib:9.3f} GiB" for name, gib in plan.items()]
    return "\n".join([*lines, "dry run: nothing was written"])
