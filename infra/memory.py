"""How much memory a run will need, by what needs it, and how much it has used."""

import resource
import sys

import torch


def memory_plan(
    model,
    config,
    ranks: int,
    on_gpu: bool,
    sampled_tokens: int,
    tokens_per_row: int,
    trained_tokens: int,
    has_reference: bool,
    has_prm: bool,
    logits_at_once: int,
) -> dict[str, float]:
    """GiB that each rank will need, by what needs it. The model may be on the meta device: only shapes are read.

    Activations count what a decoder layer of Llama's shape keeps for its backward pass; the allocator's slack and the
    libraries themselves (about 0.4 GiB on a CPU, 0.5 to 1 on a GPU) are not in it.
    """
    c, n, split = model.config, model.num_parameters(), config.shard or max(1, ranks // config.replicate)
    compute = 2 if on_gpu and config.dtype == "bfloat16" else 4
    is_split = ranks > 1 or on_gpu
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    in_layer = sum(p.numel() for p in layers[0].parameters()) if layers else 0
    in_root = n - in_layer * len(layers)  # embedding and head: gathered from the first layer's forward to the backward
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    kv_width = heads * (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    inner = getattr(c, "intermediate_size", None) or 4 * c.hidden_size
    layer = 11 * c.hidden_size + 4 * inner  # values kept per token, as counted for Qwen2 under sdpa
    # The backward pass adds about a layer's worth; recomputing, it holds three (measured) and one value per layer.
    layers_kept, inputs_kept = (3, c.num_hidden_layers) if config.gradient_checkpointing else (len(layers) + 1, 0)
    kept = layers_kept * layer + inputs_kept * c.hidden_size
    logits = min(trained_tokens * c.vocab_size, logits_at_once)
    always = {
        "weights, fp32, sharded": 4 * n / split,
        "optimizer moments, fp32, sharded": 8 * n / split,
        "reference, fp32, sharded": 4 * n / split if has_reference and not config.offload_reference else 0,
        "PRM and its moments, fp32, sharded": 12 * n / split if has_prm else 0,  # its gradients go before the policy's
    }
    sampling = {
        "sampling: gathered weights": compute * n if is_split else 0,
        "sampling: KV cache": 2 * c.num_hidden_layers * kv_width * compute * sampled_tokens,
        # Scores, log-probs and probabilities in fp32, the cumulative distribution in fp64.
        "sampling: logits": sampled_tokens // tokens_per_row * c.vocab_size * 28,
    }
    update = {
        "update: gradients, fp32, sharded": 4 * n / split,
        # Root and two layers in the compute type, their gradients, and the fp32 buffer that reduces the largest.
        "update: gathered root and layers": (2 * compute + 4) * in_root + 4 * compute * in_layer if is_split else 0,
        "update: activations": kept * trained_tokens * compute,
        "update: logits": logits * (compute + 4 * 4),  # and log-probs, probabilities and gradients, in fp32
    }
    peak = sum(always.values()) + max(sum(sampling.values()), sum(update.values()))
    return {name: size / 2**30 for name, size in {**always, **sampling, **update, "peak": peak}.items()}


def peak_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
