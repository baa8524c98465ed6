"""What a compute type does to a log-ratio: the policy's to a reference that it has hardly left, token by token, summed.

    python bench/precision.py                       # a random model of 5M parameters, on a CPU in seconds
    python bench/precision.py --model DIR           # a saved model; 135M parameters take some minutes on a CPU

The model samples 4 responses of 384 tokens. The policy is the model with every weight moved up or down by 8e-6, about
what AdamW does in 16 steps at 5e-7; the reference is the model. Both are scored in float64, which gives the true
log-ratio, and in each type, whose difference to the true one is its noise. In nats; the last column is beta (0.05)
times the largest sum, what Masked Step Advantage is given for nothing. On a CPU TF32 is emulated: what goes into a
matrix product is rounded to its 10 bits of mantissa. On a GPU it is the GPU's own.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path

import common
from common import TINY, Work

BETA = 0.05
PROMPTS = ("Natalia sold 48 clips in April and half as many in May. How many in all?", "The capital of France is")
WAYS = {  # type of weights and activations, logits made in fp32, products in TF32
    "bfloat16": ("bfloat16", False, False),
    "bfloat16, logits in fp32": ("bfloat16", True, False),
    "float16": ("float16", False, False),
    "TF32": ("float32", False, True),
    "float32": ("float32", False, False),
}


def rounded_to_tf32(x):
    """fp32 with 10 bits of mantissa: to the nearest, ties away from zero, as the hardware's conversion."""
    import torch

    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def with_tf32_products():
    """Within it, fp32 matrix products and attention get rounded factors."""
    import torch
    from torch.overrides import TorchFunctionMode

    functions = torch.nn.functional
    factors = {functions.linear: 2, torch.matmul: 2, torch.Tensor.matmul: 2, functions.scaled_dot_product_attention: 3}

    class RoundedFactors(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            n = factors.get(function, 0)
            rounded = [rounded_to_tf32(x) if x.dtype == torch.float32 else x for x in args[:n]]
            return function(*rounded, *args[n:], **(kwargs or {}))

    return RoundedFactors()


def scored(policy, batch, dtype: str, fp32_logits: bool, tf32: bool):
    """Log-probs [B, T] of the responses, float64, by a copy of the policy that computes in `dtype`."""
    import torch

    model = copy.deepcopy(policy.model).to(getattr(torch, dtype))
    on_gpu = common.on_gpu()
    if tf32 and on_gpu:
        torch.set_float32_matmul_precision("high")
    try:
        with torch.no_grad(), with_tf32_products() if tf32 and not on_gpu else torch.no_grad():
            positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            inputs = {"attention_mask": batch.attention_mask, "position_ids": positions, "use_cache": False}
            states = model.base_model(batch.tokens, **inputs)[0][:, batch.prompt_length - 1 : -1]
            head = model.get_output_embeddings()
            logits = states.float() @ head.weight.float().T if fp32_logits else head(states)
    finally:
        torch.set_float32_matmul_precision("highest")
    logits = logits[..., : policy.vocab_size]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return log_p.gather(-1, batch.tokens[:, batch.prompt_length :, None])[..., 0].double()


def sampled(policy, new_tokens: int, group_size: int):
    """Responses of `new_tokens` to each prompt, as the policy itself writes them."""
    import sample

    prompts = [policy.tokenizer(text).input_ids for text in PROMPTS]
    policy.stop_ids = policy.model.generation_config.eos_token_id = [policy.vocab_size]  # none is drawn: all are full
    keys = [(0, 0, i) for i in range(len(prompts))]
    config = sample.SampleConfig(group_size=group_size, max_new_tokens=new_tokens)
    return sample.sample(policy, prompts, keys, config)


def moved(policy, by: float):
    """A copy of the policy with every weight `by` higher or lower."""
    import torch

    other, draw = copy.deepcopy(policy), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            up = torch.randint(2, parameter.shape, generator=draw).to(parameter)
            parameter.add_((2 * up - 1) * by)
    return other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a saved model; without it a random one")
    parser.add_argument("--new-tokens", type=int, default=384, help="of each of the 4 responses")
    parser.add_argument("--update", type=float, default=8e-6, help="by which each weight is moved")
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import model
    import torch

    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            common.make_model(Path(folder), TINY if args.tiny else Work(), tied=True)
        reference = model.load(args.model or folder)
    reference.device = torch.device("cuda" if common.on_gpu() else "cpu")
    reference.to(reference.device)
    batch = sampled(reference, 8 if args.tiny else args.new_tokens, group_size=2).to(reference.device)
    policy = moved(reference, args.update)

    def log_ratio(*way):
        found = scored(policy, batch, *way) - scored(reference, batch, *way)
        return torch.where(batch.mask, found, 0.0)

    true = log_ratio("float64", False, False)
    figures = {"true": {"per token": true[batch.mask].std().item(), "largest sum": largest_sum(true)}}
    for name, way in WAYS.items():
        noise = log_ratio(*way) - true
        figures[name] = {"per token": noise[batch.mask].std().item(), "largest sum": largest_sum(noise)}
    print(
        f"{reference.num_parameters():,} parameters, {int(batch.mask.sum())} tokens, weights moved by {args.update:g}"
    )
    rows = [[name if name == "true" else f"noise of {name}", *row.values(), BETA * row["largest sum"]]
            for name, row in figures.items()]  # fmt: skip
    print(common.table([["log-ratio, nats", *figures["true"], "x beta"], *rows]))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


def largest_sum(log_ratio) -> float:
    """The furthest from 0 that the sum along a response gets. [B, T]"""
    return log_ratio.cumsum(1).abs().max().item()


if __name__ == "__main__":
    main()
