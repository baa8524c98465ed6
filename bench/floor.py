"""How much of the machine we use: matmul peak and memory bandwidth, and the share that our passes and decoding reach.

    python bench/floor.py                     # one thread; OMP_NUM_THREADS=8 python bench/floor.py for eight
    python bench/floor.py --hidden 2048 --layers 16

Peaks and passes are measured in the same run. FLOPs come from the model's shape (matrix products only; a backward pass
is two forward passes); decoding's bytes are the weights, read once per token of the batch, and each row's keys and
values. The peak that counts is that of the compute type: fp32 on a CPU, bfloat16 on a GPU. Seconds are CPU seconds
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


def passes(work: Work, device, dtype: str) -> dict[str, dict[str, float]]:
    """{what: seconds, GFLOP and, of decoding, GB}: a micro-batch's passes with no prompt in common, and the sampler."""
    import model
    import sample
    import torch
    from infra.rng import Draw
    from infra.sharding import shard, unsharded
    from spro import Batch

    common.force_lengths(work)
    with tempfile.TemporaryDirectory() as folder:
        common.make_model(Path(folder), work)
        policy = model.load(folder)
    size = 4 if dtype == "float32" else 2
    policy = shard(policy, model.ModelConfig(dtype=dtype), device)
    B, G, P, T = work.rows_per_pass, work.group_size, work.prompt_tokens, work.new_tokens
    tokens = torch.randint(3, work.vocabulary, (B, P + T), device=device)

    def forward():
        everywhere = torch.ones_like(tokens).bool()
        batch = Batch(tokens=tokens, attention_mask=everywhere, mask=everywhere[:, -T:])
        return model.token_log_probs(policy, batch, 1.0).log_probs.mean()

    def decode():
        keys, prompts = [(0, Draw.SAMPLE, i) for i in range(work.prompts)], tokens[: work.prompts, :P].tolist()
        with unsharded(policy):
            sample.sample(policy, prompts, keys, sample.SampleConfig(group_size=G, max_new_tokens=T))

    with torch.no_grad():
        forward_seconds = least(forward)
    once = 1e-9 * flops(work, B * (P + T), (P + T) / 2, B * T)
    rows = work.prompts * G
    context = P + T / 2
    weights = flops(work, 1, 0, 1) / 2
    kv = 2 * work.layers * work.hidden // work.heads * work.kv_heads * context
    written = flops(work, work.prompts * P, P / 2, work.prompts) + flops(work, rows * T, context, rows * T)
    return {
        "forward": {"seconds": forward_seconds, "GFLOP": once},
        "forward + backward": {"seconds": least(lambda: forward().backward()), "GFLOP": 3 * once},
        "decoding": {"seconds": least(decode), "GFLOP": 1e-9 * written, "GB": 1e-9 * size * T * (weights + rows * kv)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=Work.hidden, help="the intermediate size is 3 times as large")
    parser.add_argument("--layers", type=int, default=Work.layers)
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    from infra.processes import start_processes

    device = start_processes(30.0)
    dtype = "bfloat16" if common.on_gpu() else "float32"
    work = (
        replace(TINY, lengths="full")
        if args.tiny
        else replace(Work(lengths="full"), hidden=args.hidden, layers=args.layers, intermediate=3 * args.hidden)
    )
    peak = peaks(256 if args.tiny else 8192 if common.on_gpu() else 1024, device)
    print(common.table([["peak, measured", ""], *([name, value] for name, value in peak.items())]), "\n")
    found, lines = (
        passes(work, device, dtype),
        [["", "seconds", "GFLOP/s", "share of matmul", "GB/s", "share of memory"]],
    )
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
    main()
