"""Memory and time of scoring responses under a large vocabulary: model.token_log_probs against the plain way.

    python bench/logprob_memory.py       # 4 x 1024 response tokens; vocabulary and width of Qwen2.5-0.5B
    OMP_NUM_THREADS=8 python bench/logprob_memory.py

The plain way keeps the logits of all response tokens and takes log_softmax, gather and entropy of them. Each way runs
forward and backward in a fresh process of its own; its memory is the peak above what it held before, so the gradients
(of the tied embedding: vocabulary x hidden x 4 bytes) count for both. Values and gradients are compared. Seconds are
CPU seconds of one thread, unless OMP_NUM_THREADS says otherwise (on a GPU: wall).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import common
from common import TINY, Work

LARGE = Work(vocabulary=152_064, hidden=896, layers=1, heads=14, kv_heads=2, intermediate=1024, prompt_tokens=16)
LARGE = replace(LARGE, prompts=4, group_size=1, new_tokens=1024)
WAYS = ("full logits", "token_log_probs")


def score(policy, way: str, tokens, new_tokens: int):
    """tokens [B, S] -> log-probs and entropy [B, new_tokens] at temperature 1."""
    import model
    import torch
    from spro import Batch

    mask = torch.ones_like(tokens)
    if way == "token_log_probs":
        batch = Batch(tokens=tokens, attention_mask=mask.bool(), mask=mask.bool()[:, -new_tokens:])
        return model.token_log_probs(policy, batch, 1.0)[:2]
    logits = policy.model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=new_tokens + 1).logits[:, :-1]
    log_p = logits.float().log_softmax(-1)
    log_probs = log_p.gather(-1, tokens[:, -new_tokens:, None])[..., 0]
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_probs, entropy


def on_device(policy, dtype: str):
    """The policy on the GPU, if there is one, its weights in `dtype`; not sharded."""
    import torch

    policy.device = torch.device("cuda" if common.on_gpu() else "cpu")
    policy.to(policy.device)
    for parameter in policy.parameters():  # not buffers: rotary tables stay fp32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return policy


def measured(policy, way: str, work: Work) -> tuple[dict[str, float], tuple, dict]:
    """({"MiB": ..., "seconds": ...}, values, gradients by name) of scoring the work's responses in both directions."""
    import torch

    draw = torch.Generator().manual_seed(0)
    rows = work.prompts * work.group_size
    tokens = torch.randint(3, work.vocabulary, (rows, work.prompt_tokens + work.new_tokens), generator=draw)
    weights = torch.randn(rows, work.new_tokens, generator=draw).to(policy.device)
    tokens = tokens.to(policy.device)

    def forward_and_backward(tokens, weights):
        values = score(policy, way, tokens, weights.shape[1])
        (values[0] * weights).sum().backward()
        return values

    forward_and_backward(tokens[:, : work.prompt_tokens + 2], weights[:, :2])  # start-up is not measured
    policy.zero_grad(set_to_none=True)
    common.reset_peak()
    before = common.memory()[0]
    seconds, values = common.seconds_of(lambda: forward_and_backward(tokens, weights))
    figures = {"MiB": common.memory()[1] - before, "seconds": seconds}
    gradients = {name: parameter.grad.cpu() for name, parameter in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return figures, tuple(value.detach().cpu() for value in values), gradients


def differences(plain: tuple, ours: tuple) -> dict[str, float]:
    """The largest ones between two ways, each (values, gradients): of log-probs, and relative of the others."""
    ((plain_log_probs, plain_entropy), of_plain), ((log_probs, entropy), of_ours) = plain, ours
    norm = sum(g.double().norm() ** 2 for g in of_plain.values()) ** 0.5
    off = sum((of_ours[name].double() - g.double()).norm() ** 2 for name, g in of_plain.items()) ** 0.5
    return {
        "log-prob": (log_probs - plain_log_probs).abs().max().item(),
        "entropy, relative": ((entropy - plain_entropy) / plain_entropy).abs().max().item(),
        "gradient, relative": (off / norm).item(),
    }


def measure(folder: str, way: str, work: Work, dtype: str) -> None:
    """In its own process: print {"MiB": ..., "seconds": ...}, save values and gradients to `folder`."""
    import model
    import torch

    figures, *found = measured(on_device(model.load(folder), dtype), way, work)
    print(json.dumps(figures))
    torch.save(found, Path(folder) / f"{way}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and passes")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # with --folder: the child process
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = TINY if args.tiny else LARGE
    if args.way:
        return measure(args.folder, args.way, work, args.dtype)
    import torch

    with tempfile.TemporaryDirectory() as folder:
        common.make_model(Path(folder), work, tied=True)
        child = [sys.executable, __file__, "--dtype", args.dtype, "--folder", folder]
        child += ["--tiny"] if args.tiny else []
        found = {way: json.loads(subprocess.check_output([*child, "--way", way]).splitlines()[-1]) for way in WAYS}
        errors = differences(*(torch.load(Path(folder) / f"{way}.pt") for way in WAYS))
    ratios = {key: found[WAYS[1]][key] / found[WAYS[0]][key] for key in ("MiB", "seconds")}
    responses = f"{work.prompts * work.group_size} x {work.new_tokens}"
    print(f"{responses} response tokens, {work.vocabulary} words, {args.dtype}")
    rows = [[key, *(found[way][key] for way in WAYS), ratios[key]] for key in ratios]
    print(common.table([["", *WAYS, "ratio"], *rows]))
    print("largest differences between the two ways:", errors)
    if args.json:
        Path(args.json).write_text(json.dumps({"ways": found, "ratios": ratios, "errors": errors}, indent=1))
    disagree = max(errors["log-prob"], errors["entropy, relative"]) > 1e-5 or errors["gradient, relative"] > 1e-4
    if args.dtype == "float32" and disagree:
        sys.exit("error: the two ways disagree by more than 1e-5 in a value or 1e-4 in the gradient")
    return None


if __name__ == "__main__":
    from infra.processes import command_line

    command_line(main)  # which chooses attention as training does
