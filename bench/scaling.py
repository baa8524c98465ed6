"""What a training step of ours costs against response length, group size and model size: one is varied at a time.

    python bench/scaling.py
    python bench/scaling.py --steps 3 train.old_log_probs=recompute   # key=value changes our config

All responses are `length` tokens long; 8 prompts of 96 tokens; otherwise the work and the seconds are step.py's.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import common
from common import TINY, Work
from sides import PROMPTS, Setting, measured, side
from step import summary

BASE = Work(group_size=4, new_tokens=128, lengths="full")
POINTS = {
    "length 64": {"new_tokens": 64},
    "length 128": {},
    "length 256": {"new_tokens": 256},
    "length 512": {"new_tokens": 512},
    "G 2": {"group_size": 2, "rows_per_pass": 8},
    "G 8": {"group_size": 8},
    "G 16": {"group_size": 16},
    "hidden 128": {"hidden": 128, "intermediate": 384},
    "hidden 512": {"hidden": 512, "intermediate": 1536},
    "12 layers": {"layers": 12},
}
SHOWN = ("sample", "log_probs", "update", "rest", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", help="key=value, for our side")
    parser.add_argument(
        "--steps", dest="pairs", type=int, default=2, help="measured steps per point, after one that does not count"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    points = {"tiny": {}} if args.tiny else POINTS
    base = replace(TINY, lengths="full") if args.tiny else BASE
    found = {}
    lines = [["", "parameters", "tokens", *(f"{stage}, s" for stage in SHOWN), "tokens / s", "peak MiB"]]
    for name, change in points.items():
        work = replace(base, **change)
        with tempfile.TemporaryDirectory() as folder:
            parameters = common.make_model(Path(folder), work)
            setting = Setting(folder, folder, tuple(common.texts(PROMPTS, work.prompt_tokens)))
            answers = measured({"ours": side("ours", setting, work, args.config)}, args)
        figures = summary(answers)[1]
        row = {stage: figures[f"{stage}, s"]["ours"] for stage in SHOWN}
        row |= {"tokens / s": figures["tokens / s"]["ours"], "peak MiB": figures["peak MiB"]["ours"]}
        found[name] = {"parameters": parameters, "tokens": answers["ours"][-1]["tokens"], **row}
        lines.append([name, f"{parameters / 1e6:.1f} M", found[name]["tokens"], *row.values()])
        print(f"{name}: {row['step']:.2f} s per step", flush=True)
    print()
    print(common.table(lines))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
