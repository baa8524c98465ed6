"""Runs of several configs over warm starts and seeds, as `train.py` processes, a few at a time.

    python -m tools.sweep CONFIG.yaml [CONFIG.yaml ...] --seeds 5 --warm-starts 2 --jobs 2 --out runs/sweep [KEY=VALUE]

tools/report.py reads what comes out.

A run's folder is OUT/<config>/warm<W>-seed<S>, what it says goes to ....log beside it. With --over KEY=A,B every config
runs with each of these values, in OUT/<config>-<value>; a value holds no comma. Every config runs every (W, S),
so that runs can be compared in pairs; S counts from 1000 W. Configs that agree in model, data and warm-start settings
share a warm start of seed W, in OUT/warm_starts; a config that has none starts from its model.path. The same command
again leaves finished runs alone and goes on with cut ones; Ctrl-C makes the runs under way save and stop.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

from infra.config import changes, flat, keys_where, read_config, saved_config, to_dict
from infra.errors import EXIT_STOPPED, BadInput, Parser, RunStopped
from infra.processes import command_line
from tqdm import tqdm
from train import Config

OWN = ("seed", "run_dir", "resume", "overwrite")  # keys of a run that the sweep decides
SEEDS_APART = 1000  # from the seeds of one warm start to those of the next


def finished(config: Config) -> bool:
    """Whether the run has all its steps and its model. One made with another config has not: train.py refuses it."""
    folder = Path(config.run_dir)
    try:
        steps = json.loads((folder / "metrics.jsonl").read_text().strip().split("\n")[-1])["step"]
        changed = changes(saved_config(folder), config)
    except (OSError, ValueError, LookupError, BadInput):
        return False
    return not changed and steps == config.train.steps and (folder / "model").exists()


def rows_of(files: list[str], overrides: list[str], over: str | None) -> dict[str, list[str]]:
    """{name: arguments of train.py} of what is compared: the configs, or with `over` each with each of its values.

    Raises BadInput where a key is one that the sweep itself gives every run.
    """
    for argument in (*overrides, *filter(None, [over])):
        if (key := argument.split("=")[0]) in OWN:
            raise BadInput(f"{argument}: a sweep gives every run its own {key}; leave it out")
    if over is None:
        return {Path(file).stem: [file, *overrides] for file in files}
    key, _, values = over.partition("=")
    if not values:
        raise BadInput(f"--over {over}: give KEY=VALUE,VALUE,...")
    return {
        f"{Path(file).stem}-{value}": [file, *overrides, f"{key}={value}"]
        for file in files
        for value in values.split(",")
    }


def plan(rows: dict[str, list[str]], out: Path, pairs: list[tuple[int, int]]) -> tuple[dict, dict]:
    """The runs to be made, {folder: arguments of train.py}, and the like of the warm starts that these need."""
    runs, warm_starts = {}, {}
    decisive = tuple(keys_where(Config, "warm_start"))
    for (warm, seed), name in ((pair, name) for pair in pairs for name in rows):
        folder, arguments = str(out / name / f"warm{warm}-seed{seed}"), [*rows[name], f"seed={seed}"]
        config = read_config(Config, arguments, None)
        if config.warms_up:
            settings = {key: value for key, value in flat(to_dict(config)).items() if key.startswith(decisive)}
            start = out / "warm_starts" / f"{zlib.crc32(json.dumps(settings).encode()):08x}-seed{warm}"
            model = f"{start}/warm_start/model"
            if not Path(model).exists():
                warm_starts[str(start)] = [*rows[name], f"seed={warm}", "train.steps=1", "overwrite=true"]
            arguments += [f"model.path={model}", "train.warm_start=scratch"]
            config = read_config(Config, arguments, None)
        config.run_dir = folder
        if not finished(config):
            runs[folder] = [*arguments, "resume=true"]
    return runs, warm_starts if runs else {}


def start(folder: str, arguments: list[str]) -> subprocess.Popen:
    """train.py, under way; it refuses a folder in which one that an earlier sweep left alive is still at work."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        command = [sys.executable, str(Path(__file__).parent.parent / "train.py"), *arguments, f"run_dir={folder}"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def run_all(waiting: dict[str, list[str]], jobs: int, what: str) -> int:
    """Runs {folder: arguments}, `jobs` at a time -> how many failed, each named on stderr."""
    bar, running, failed = tqdm(total=len(waiting), desc=what), {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = next(iter(waiting))
                running[folder] = start(folder, waiting.pop(folder))
            for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                bar.update()
                if code := running.pop(folder).returncode:
                    failed += 1
                    said = Path(f"{folder}.log").read_text(errors="replace").split("\n")
                    last_words = next(filter(str.strip, reversed(said)), "")
                    tqdm.write(f"failed: {folder}: {last_words} (exit code {code})", file=sys.stderr)
            time.sleep(0.1)
    finally:  # stopped: each run ends its step and saves
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        bar.close()
    return failed


def main() -> None:
    parser = Parser(prog="-m tools.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="CONFIG.yaml | key=value")
    parser.add_argument("--seeds", type=int, default=5, help="runs of a config from each warm start (5)")
    parser.add_argument("--warm-starts", type=int, default=1, help="warm starts, each from its own seed (1)")
    parser.add_argument(
        "--first-warm-start", type=int, default=0, help="their first seed: rates chosen on some hold on others (0)"
    )
    parser.add_argument("--over", metavar="KEY=A,B,...", help="each config with each value: <config>-<value>")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="the folder of the runs (runs/sweep)")
    args = parser.parse_intermixed_args()
    files, overrides = ([a for a in args.arguments if ("=" in a) == given] for given in (False, True))
    if not files or len({Path(file).stem for file in files}) < len(files):
        raise BadInput("give at least one config, each under another file name: folders are named after them")
    if min(args.seeds, args.warm_starts, args.jobs) < 1 or args.seeds > SEEDS_APART:
        raise BadInput(f"--seeds, --warm-starts and --jobs must be at least 1, and --seeds at most {SEEDS_APART}")
    if args.first_warm_start < 0:
        raise BadInput(f"--first-warm-start {args.first_warm_start}: a seed is 0 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warm_starts = range(args.first_warm_start, args.first_warm_start + args.warm_starts)
    pairs = [(w, SEEDS_APART * w + s) for s in range(args.seeds) for w in warm_starts]
    rows = rows_of(files, overrides, args.over)
    runs, starts = plan(rows, args.out, pairs)
    print(f"{len(pairs) * len(rows)} runs in {args.out}, {len(runs)} of them to be made", flush=True)
    try:  # where a warm start failed, so will the runs that need it, and name it
        failed = run_all(starts, args.jobs, "warm starts") + run_all(runs, args.jobs, "runs")
    except KeyboardInterrupt:
        raise RunStopped("what was under way is saved; the same command goes on", EXIT_STOPPED) from None
    if failed:
        raise RunStopped(f"{failed} failed; the same command goes on where they stand")


if __name__ == "__main__":
    command_line(main)
