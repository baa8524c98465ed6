"""A training step of ours beside one of TRL's GRPOTrainer, on the same work: seconds, tokens per second, memory.

    python bench/step.py                                             # ragged and full lengths, 5 pairs each, one core
    python bench/step.py --pairs 1 --lengths ragged                  # quick
    python bench/step.py --best                                      # also: each side's fastest exact fp32 settings
    python bench/step.py --model DIR                                 # a pretrained model, 2 pairs (real_model.py)
    python bench/step.py --stages                                    # what SPRO computes beside GRPO; stage 4's share
    python bench/step.py --ours-only train.old_log_probs=recompute   # without TRL; key=value changes our config
    pip install trl datasets accelerate                              # the peer (measured with trl 1.16.0)

Both sides start from the same model with random weights: fp32, sdpa, micro-batches of 16 rows, no gradient
checkpointing, one optimizer step per step and no pass for old log-probs, a reference each (TRL: beta 0.04). Their
responses have equal lengths, row by row (sides.py): with --model, lengths that the model itself has given. Each side is
a child process, pinned to the same cores and warmed up, that steps when asked: ours, TRL's, ours, TRL's. Seconds are
CPU seconds, which neighbours on the machine change least (on a GPU: wall). A ratio is ours / TRL, the median over the
pairs; that of memory is of the processes' whole peaks, the worse of both lengths. --dtype bfloat16 is for a GPU: both
sides then compute in it over fp32 weights, and ours makes the pass for old log-probs that it needs there.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import common
import real_model
from common import Work
from sides import PIP, PROMPTS, STAGES, Setting, has_trl, measured, side, use_onednn


def summary(answers: dict[str, list[dict]]) -> tuple[list[list], dict[str, dict]]:
    """(table, {quantity: {side: median, "ratio": ...}}) of answers {side: one per step}."""
    clock, figures = int(common.on_gpu()), {}
    quantities = {
        **{
            f"{name}, s": lambda a, name=name: a["stages"].get(name, [0, 0])[clock]
            for name in (*STAGES, "rest", "step")
        },
        "step, s of wall": lambda a: a["stages"]["step"][1],
        "tokens / s": lambda a: a["tokens"] / a["stages"]["step"][clock],
        "peak MiB": lambda a: a["peak"],
        "peak MiB above idle": lambda a: a["peak"] - a["idle"],
    }
    for quantity, of in quantities.items():
        values = {name: [of(answer) for answer in steps] for name, steps in answers.items()}
        figures[quantity] = {name: median(xs) for name, xs in values.items()}
        if len(values) == 2 and all(map(all, values.values())):
            ratios = [a / b for a, b in zip(*values.values(), strict=True)]
            figures[quantity] |= {"ratio": median(ratios), "ratios": ratios}
    lines = [[name, *(row[s] for s in answers), f"{row['ratio']:.3f}" if "ratio" in row else ""]
             for name, row in figures.items()]  # fmt: skip
    return [["", *answers, "ours / TRL" if len(answers) == 2 else ""], *lines], figures


def compare(args, setting: Setting, work: Work, ways: dict[str, dict]) -> dict[str, dict]:
    """Print a table per kind of lengths -> {kind: figures}. ways: {side: its attention and oneDNN settings}."""
    found = {}
    for lengths in ("ragged", "full") if args.lengths == "both" else (args.lengths,):
        one = replace(work, lengths=lengths)
        sides = {name: side(name, replace(setting, **way), one, args.config) for name, way in ways.items()}
        answers = measured(sides, args)
        lines, found[lengths] = summary(answers)
        tokens = median(answer["tokens"] for answer in answers["ours"])
        print(f"\n{lengths}: {tokens:.0f} tokens per step; medians of {args.pairs} steps; {ways}")
        print(common.table(lines), flush=True)
    return found


def fastest(name: str, args, setting: Setting, work: Work) -> dict:
    """The attention and oneDNN settings that take one side the least time for the work, by one step of each."""
    ways = {f"{a}, {on}": {"attention": a, "onednn": on} for a in ("sdpa", "eager") for on in (False, True)}
    trials = {label: side(name, replace(setting, **way), work, args.config) for label, way in ways.items()}
    figures = summary(measured(trials, argparse.Namespace(pairs=1, threads=args.threads)))[1]["step, s"]
    return ways[min(ways, key=lambda label: figures[label])]


def precision(model_folder: str, work: Work) -> dict[str, dict[str, float]]:
    """{way of fp32 products: the largest error of a log-prob, the relative error of a gradient}, against float64."""
    import model
    import torch
    from spro import Batch

    policy, found = model.load(model_folder), {}
    length = work.prompt_tokens + work.new_tokens
    tokens = torch.randint(3, policy.vocab_size, (4, length), generator=torch.manual_seed(0))
    everywhere = torch.ones_like(tokens).bool()
    batch = Batch(tokens=tokens, attention_mask=everywhere, mask=everywhere[:, -work.new_tokens :])
    ways = (("float64", False, torch.float64), ("default", False, torch.float32), ("oneDNN", True, torch.float32))
    for name, onednn, dtype in ways:  # float64 first: the weights then return to fp32 as they were
        use_onednn(onednn)
        log_probs = model.token_log_probs(policy.to(dtype), batch, 1.0).log_probs
        gradients = torch.autograd.grad(log_probs.mean(), list(policy.parameters()))
        found[name] = log_probs.detach().double(), torch.cat([part.double().flatten() for part in gradients])
    use_onednn(False)
    exact, gradient = found.pop("float64")
    return {
        name: {"log-prob": (x - exact).abs().max().item(), "gradient": ((g - gradient).norm() / gradient.norm()).item()}
        for name, (x, g) in found.items()
    }


def stages(args, setting: Setting, work: Work) -> dict:
    """Print what SPRO computes beside GRPO, in token positions by model and stage, and stage 4's share of a step."""
    names = ("spro", "grpo")
    sides = {name: side("ours", setting, work, [f"algorithm.advantage={name}", *args.config]) for name in names}
    answers = measured(sides, args)
    spro, grpo = ({k: n for k, n in steps[-1]["counts"].items() if k != "refused"} for steps in answers.values())
    lines = [[key, n, grpo.get(key, 0), n - grpo.get(key, 0)] for key, n in spro.items()]
    print("\ntoken positions through each model in one step, padding included, counted at its embedding")
    print(common.table([["model, stage", "spro", "grpo", "spro - grpo"], *lines]))
    share = {name: median(a["stages"]["advantage"][0] / a["stages"]["step"][0] for a in steps)
             for name, steps in answers.items()}  # fmt: skip
    more = {key: n - grpo.get(key, 0) for key, n in spro.items() if n != grpo.get(key)}
    one_pass = more == {"reference, log_probs": spro["policy, update"]}  # an update of one epoch passes over all once
    print("SPRO is GRPO and one pass of the reference:", one_pass)
    print("stage 4's share of a step:", ", ".join(f"{name} {part:.2%}" for name, part in share.items()))
    return {"positions": {"spro": spro, "grpo": grpo}, "one_reference_pass": one_pass, "advantage_share": share}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="key=value, for our side")
    parser.add_argument("--model", help="a folder with a pretrained model, instead of random weights")
    parser.add_argument("--pairs", type=int, help="measured steps of each side; default 5, with --model 2")
    parser.add_argument("--lengths", choices=("ragged", "full", "both"), default="both")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of compute on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of each side, and cores")
    parser.add_argument("--best", action="store_true", help="more tables, with each side's fastest exact fp32 settings")
    parser.add_argument("--stages", action="store_true", help="instead: what SPRO computes beside GRPO")
    parser.add_argument("--ours-only", action="store_true", help="without TRL")
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    args.pairs = args.pairs or (2 if args.model else 5)
    return args


def asked(args, folder: str) -> tuple[Setting, Work]:
    """Model, prompts and the shape of the work; a model with random weights is made in `folder`."""
    if args.model:
        prompts, work = real_model.asked(args.model)
        print(f"prompts of {work.prompt_tokens} tokens; lengths of ragged responses are drawn from {work.drawn}")
        return Setting(folder, args.model, prompts, args.dtype), work
    work = common.TINY if args.tiny else Work()
    common.make_model(Path(folder), work)
    return Setting(folder, folder, tuple(common.texts(PROMPTS, work.prompt_tokens)), args.dtype), work


def main() -> None:
    args = parse_arguments()
    names = ("ours",) if args.ours_only or args.stages else ("ours", "TRL")
    if "TRL" in names and not has_trl():
        sys.exit(f"error: TRL is not installed: {PIP}, or give --ours-only")
    figures: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        setting, work = asked(args, folder)
        if args.stages:
            figures["stages"] = stages(args, setting, work)
        else:
            figures["default"] = compare(args, setting, work, {name: {} for name in names})
        if args.best and not args.stages:
            figures["precision"] = precision(setting.model, work)
            print("\nerrors against float64, largest of a log-prob and relative of a gradient:", figures["precision"])
            ways = {name: fastest(name, args, setting, work) for name in names}
            figures["best"] = compare(args, setting, work, ways)
    if "TRL" in names:
        ratios = {kind: found["step, s"]["ratio"] for kind, found in figures["default"].items()}
        ratios["memory"] = max(found["peak MiB"]["ratio"] for found in figures["default"].values())
        figures["ratios"] = ratios
        print("\nours / TRL:", ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
