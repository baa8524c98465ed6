"""How much of the machine we use: matmul peak and memory bandwidth, and the share that our passes and decoding reach.

    python bench/floor.py                     # one thread; OMP_NUM_THREADS=8 python bench/floor.py for eight
    python bench/floor.py --hidden 896 --intermediate 4864 --layers 24 --heads 14 --kv-heads 2 --vocabulary 151936 \\
        --rows 256 --length 192 --dtype bfloat16            # Qwen2.5-0.5B's shape, on a GPU

Peaks and passes are measured in the same run. FLOPs come from the model's shape (matrix products only; a backward pass
is two forward passes); decoding's bytes are the weights, read once per token of the batch, and each row's keys and
values. The peak that counts is that of the compute type: fp32 on a CPU, --dtype on a GPU. Seconds are CPU seconds
(on a GPU wall), the least of three.
"""

import argparse
import functools
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
from common import TINY, Work


def least(work, times: int = 3) -> float:
    """Seconds of `work()`, the least of `times`, after one that does not count."""
    return min([common.seconds_of(work)[0] for _ in range(times + 1)][1:])


def peaks(size: int, device) -> dict[str, float]:
    """GFLOP/s of size^3 matrix products by type, and GB/s of copying 256 MiB (read and written)."""
    import torch

    source, target = torch.ones(2, 2**26, device=device)
    found = {"memory, GB/s": 2e-9 * 4 * len(source) / least(lambda: target.copy_(source))}
    for name in ("float32", "bfloat16"):
        a, out = torch.randn(2, size, size, device=device).to(getattr(torch, name))
        seconds = least(functools.partial(torch.mm, a, a, out=out))
        found[f"{name} matmul, GFLOP/s"] = 2e-9 * size**3 / seconds
    return found


def flops(work: Work, tokens: int, context: float, scored: int) -> float:
    """Of a forward pass of `tokens` that each attend to `context` others on average, with logits for `scored`."""
    kv = work.hidden // work.heads * work.kv_heads
    layer = 2 * work.hidden**2 + 2 * work.hidden * kv + 3 * work.hidden * work.intermediate
    attention = 2 * context * work.hidden
    return 2 * (tokens * work.layers * (layer + attention) + scored * work.vocabulary * work.hidden)


def load_policy(folder: str, dtype: str, device):
    """The model of a folder as train.py has it: on the device, sharded where there is a process group."""
    import model
    from infra.sharding import shard

    return shard(model.load(folder), model.ModelConfig(dtype=dtype), device)


def scoring(policy, work: Work) -> dict[str, dict[str, float]]:
    """{pass: seconds, GFLOP} of a micro-batch of full rows with no prompt in common, forward and with backward."""
    import model
    import torch
    from spro import Batch

    B, P, T = work.rows_per_pass, work.prompt_tokens, work.new_tokens
    tokens = torch.randint(3, work.vocabulary, (B, P + T), device=policy.device)
    everywhere = torch.ones_like(tokens).bool()
    batch = Batch(tokens=tokens, attention_mask=everywhere, mask=everywhere[:, -T:])

    def forward():
        return model.token_log_probs(policy, batch, 1.0).log_probs.mean()

    with torch.no_grad():
        forward_seconds = least(forward)
    once = 1e-9 * flops(work, B * (P + T), (P + T) / 2, B * T)
    both_seconds = least(lambda: forward().backward())
    policy.zero_grad(set_to_none=True)
    return {
        "forward": {"seconds": forward_seconds, "GFLOP": once},
        "forward + backward": {"seconds": both_seconds, "GFLOP": 3 * once},
    }


def decoding(policy, work: Work, value_bytes: int, times: int = 3) -> dict[str, float]:
    """seconds, GFLOP and GB (at `value_bytes` a weight, key or value) of sampling the work's responses, all full."""
    import sample
    import torch
    from infra.rng import Draw
    from infra.sharding import unsharded

    P, T, rows = work.prompt_tokens, work.new_tokens, work.prompts * work.group_size
    prompts = torch.randint(3, work.vocabulary, (work.prompts, P)).tolist()
    keys = [(0, Draw.SAMPLE, i) for i in range(work.prompts)]
    config = sample.SampleConfig(group_size=work.group_size, max_new_tokens=T, batch_tokens=rows * (P + T))

    def decode():
        with unsharded(policy):
            sample.sample(policy, prompts, keys, config)

    context = P + T / 2
    weights = flops(work, 1, 0, 1) / 2
    kv = 2 * work.layers * work.hidden // work.heads * work.kv_heads * context
    written = flops(work, work.prompts * P, P / 2, work.prompts) + flops(work, rows * T, context, rows * T)
    read = value_bytes * T * (weights + rows * kv)
    return {"seconds": least(decode, times), "GFLOP": 1e-9 * written, "GB": 1e-9 * read}


def passes(work: Work, device, dtype: str) -> dict[str, dict[str, float]]:
    """{what: seconds, GFLOP and, of decoding, GB}."""
    common.force_lengths(work)
    with tempfile.TemporaryDirectory() as folder:
        common.make_model(Path(folder), work)
        policy = load_policy(folder, dtype, device)
    return {**scoring(policy, work), "decoding": decoding(policy, work, 4 if dtype == "float32" else 2)}


def parse_arguments() -> tuple[argparse.Namespace, Work]:
    base = Work(lengths="full")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=base.hidden)
    parser.add_argument("--intermediate", type=int, help="default: 3 x hidden")
    parser.add_argument("--layers", type=int, default=base.layers)
    parser.add_argument("--heads", type=int, default=base.heads)
    parser.add_argument("--kv-heads", type=int, default=base.kv_heads)
    parser.add_argument("--vocabulary", type=int, default=base.vocabulary)
    parser.add_argument("--rows", type=int, default=64, help="decoded together, 8 to a prompt; a pass scores a quarter")
    parser.add_argument("--prompt", type=int, default=base.prompt_tokens, help="tokens of each prompt")
    parser.add_argument("--length", type=int, default=base.new_tokens, help="tokens of each response")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of compute on a GPU")
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.tiny:
        return args, replace(TINY, lengths="full")
    if args.rows % base.group_size:
        parser.error(f"--rows {args.rows}: give a multiple of {base.group_size}, the rows to a prompt")
    shape = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "kv_heads", "vocabulary")}
    rows = {"prompts": args.rows // base.group_size, "rows_per_pass": max(1, args.rows // 4)}
    lengths = {"prompt_tokens": args.prompt, "new_tokens": args.length}
    return args, replace(base, intermediate=args.intermediate or 3 * args.hidden, **shape, **rows, **lengths)


def main() -> None:
    args, work = parse_arguments()
    from infra.processes import start_processes

    device = start_processes(30.0)
    dtype = args.dtype if common.on_gpu() else "float32"
    peak = peaks(256 if args.tiny else 8192 if common.on_gpu() else 1024, device)
    print(common.table([["peak, measured", ""], *([name, value] for name, value in peak.items())]), "\n")
    found = passes(work, device, dtype)
    lines = [["", "seconds", "GFLOP/s", "share of matmul", "GB/s", "share of memory"]]
    for name, row in found.items():
        speed, flow = row["GFLOP"] / row["seconds"], row.get("GB", 0) / row["seconds"]
        row |= {
            "share of matmul": speed / peak[f"{dtype} matmul, GFLOP/s"],
            "share of memory": flow / peak["memory, GB/s"],
        }
        cells = [f"{row['share of matmul']:.0%}", *([flow, f"{row['share of memory']:.0%}"] if flow else ["", ""])]
        lines.append([name, row["seconds"], speed, *cells])
    print(common.table(lines))
    if args.json:
        Path(args.json).write_text(json.dumps({"peak": peak, "passes": found}, indent=1))


if __name__ == "__main__":
    from infra.processes import command_line

    command_line(main)  # which chooses attention as training does
