"""Does it work on this GPU, and how fast? One program, at most 9 minutes on one card, and one table of all it finds.

    python bench/gpu.py                                  # every stage; exit code 1 if one fails
    python bench/gpu.py --only versions,attention,tiny   # about 3 minutes; --list says what there is
    python bench/gpu.py --rehearse                       # on a CPU at toy size: that the program itself works
    pip install trl datasets accelerate                  # then, as a second call:
    python bench/gpu.py --peer                           # a step of ours beside one of TRL's, both in bfloat16

Models have random weights in the shape of Qwen2.5-0.5B and 1.5B, sharpened to an entropy of 2 nats; no network is
needed. Every stage is guarded: what goes wrong in one is its FAIL, and the next one runs. OUT/gpu.json is written after
each; a log stays beside it where something failed. The checks are in
gpu_attention.py and gpu_checks.py, the measurements in gpu_speed.py.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import gpu_runs
from gpu_runs import FAIL, NOTE, PASS, SKIP, Bench, chaos, guarded, one_line, row, skip

MINUTES = 9
SLACK = 2.5  # of a stage's seconds, after which it is stopped
REHEARSED_SECONDS = 120  # of any stage


@dataclass(frozen=True)
class Stage:
    work: str  # "module.generator of rows"
    seconds: int  # that it should take on an H100
    about: str


STAGES = {
    "versions": Stage("gpu_checks.versions", 15, "what is installed, sdpa's order, process group, machine's peaks"),
    "attention": Stage(
        "gpu_attention.attention", 30, "each kernel, both directions, padded, against fp32; ms per new K"
    ),
    "tiny": Stage("gpu_checks.tiny", 60, "3 steps of train.py: CPU, GPU in fp32, GPU in bf16"),
    "decoding": Stage("gpu_checks.decoding", 40, "every way to decode: the same tokens; graphs, launches, waits"),
    "resume": Stage("gpu_checks.resume", 50, "4 steps against 2 and 2 more: deterministic, then by default"),
    "options": Stage("gpu_checks.options", 50, "PRIME, PPO, KL, checkpointing, offload, diagnosis: CPU against GPU"),
    "memory": Stage("gpu_checks.memory", 15, "out of memory while sampling, while updating: the right word"),
    "step_term": Stage("gpu_speed.step_term", 30, "noise of SPRO's step term by the type that scores it"),
    "decode_speed": Stage("gpu_speed.decode_speed", 100, "0.5B at 64 to 512 rows, 1.5B: share of the byte floor"),
    "update_speed": Stage("gpu_speed.update_speed", 60, "16k tokens in both directions: MFU, dearest kernels"),
    "log_probs": Stage("gpu_speed.log_probs", 20, "log-probs at 152k words beside full logits: memory, ms"),
    "training_step": Stage("gpu_speed.training_step", 60, "train.py, 0.5B, 64 x 8 x 256 ragged: seconds a stage"),
}
PEER = {"peer": Stage("gpu_speed.peer", 200, "the same step beside TRL's GRPOTrainer, bf16")}


def rows_of(stage: Stage, bench: Bench):
    """A stage's rows; it ends with a FAIL where it raises."""
    module, _, function = stage.work.rpartition(".")
    try:
        yield from getattr(import_module(module), function)(bench)
    except (Exception, AssertionError) as error:
        yield row("the stage", FAIL, f"{type(error).__name__}: {one_line(error)}")


def verdict_of(rows: list[dict]) -> str:
    """Of a stage: FAIL if any row is, SKIP if nothing was tried."""
    verdicts = {one["verdict"] for one in rows}
    return FAIL if FAIL in verdicts else PASS if verdicts & {PASS, NOTE} else SKIP


def run_stages(stages: dict[str, Stage], bench: Bench) -> dict[str, dict]:
    """{stage: verdict, seconds, rows}; said and written as they come."""
    found, began = {}, time.time()
    for name, stage in stages.items():
        start = time.time()
        left = 60 * MINUTES - (start - began)
        seconds = REHEARSED_SECONDS if bench.rehearse else min(SLACK * stage.seconds, left)
        print(f"\n{name}: {stage.about}", flush=True)
        rows = []
        if seconds < min(stage.seconds, 10):
            rows.append(skip("the stage", f"no time left of {MINUTES} minutes: --only {name}"))
        else:
            for one in rows_of(stage, replace(bench, until=start + seconds)):
                rows.append(one)
                print(f"  {one['verdict']}  {one['what']}: {one['words']}", flush=True)
        found[name] = {"verdict": verdict_of(rows), "seconds": time.time() - start, "rows": rows}
        file = Path(bench.out, "gpu.json")
        file.write_text(json.dumps({"command": " ".join(sys.argv), "stages": found}, indent=1))
    return found


def print_table(found: dict[str, dict]) -> None:
    """A line per row under a line per stage, and the sum of it."""
    print("\n" + "=" * 100)
    for name, stage in found.items():
        print(f"{stage['verdict']}  {name}, {stage['seconds']:.0f} s")
        for one in stage["rows"]:
            print(f"      {one['verdict']}  {one['what']}: {one['words']}")
    counts = {verdict: sum(s["verdict"] == verdict for s in found.values()) for verdict in (PASS, FAIL, SKIP)}
    seconds = sum(stage["seconds"] for stage in found.values())
    print(f"\n{', '.join(f'{n} {verdict}' for verdict, n in counts.items())}; {seconds:.0f} s")


def with_gpu(bench: Bench) -> Bench:
    """The bench with the way of starting processes in which a GPU works. Ends the program where none does."""
    bench = replace(bench, until=time.time() + 60)
    for way in (bench, replace(bench, forked=False)):
        log = Path(bench.scratch, "probe.log")
        found = guarded("", lambda way=way, log=log: chaos.exit_code(gpu_runs.start(way, log, "gpu_checks.probe"), 60))
        if found == 0:
            return way
    sys.exit(f"error: no GPU that torch can use here ({one_line(log.read_text())}): --rehearse runs it all on a CPU")


def chosen(args) -> dict[str, Stage]:
    """The stages to run, in their order."""
    if args.peer:
        return PEER
    names = args.only.split(",") if args.only else list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        sys.exit(f"error: there is no stage {unknown[0]!r}: --list says which there are")
    return {name: stage for name, stage in STAGES.items() if name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/gpu", help="folder for gpu.json and the logs of what failed")
    parser.add_argument("--only", metavar="STAGE[,STAGE]", help="these stages")
    parser.add_argument("--list", action="store_true", help="say what stages there are, and end")
    parser.add_argument("--rehearse", action="store_true", help="every stage at toy size, on a CPU")
    parser.add_argument("--peer", action="store_true", help="instead: beside TRL")
    args = parser.parse_args()
    if args.list:
        for name, stage in {**STAGES, **PEER}.items():
            print(f"{name:14} {stage.seconds:4} s  {stage.about}")
        return 0
    # Whether there is a GPU is asked of the driver's library: to ask CUDA itself would break it for forked children
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args.rehearse, args.out, scratch, os.environ.get("CUDA_VISIBLE_DEVICES"))
        found = run_stages(chosen(args), bench if args.rehearse else with_gpu(bench))
    print_table(found)
    return int(any(stage["verdict"] == FAIL for stage in found.values()))


if __name__ == "__main__":
    sys.exit(main())
