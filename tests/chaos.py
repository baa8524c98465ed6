"""Kill a training run again and again, and show that nothing of it is lost, doubled or changed.

    python tests/chaos.py --kills 20                     # configs/tiny.yaml on one process
    python tests/chaos.py --kills 20 --ranks 2 --seed 1  # torchrun and its workers die together, as in a power cut
    python tests/chaos.py --kills 8 train.steps=6        # key=value goes to train.py

Runs once undisturbed, and once more while SIGKILL ends it at seeded moments, each time started again by the same
command with resume=true. Then weights, metrics and samples of the two must be equal. The moments lie in the stages of a
step, at the file operations of checkpoints (a kill comes just before one of them), before the first checkpoint, in a
resume, and in the writing of the final model. Exit code 1 if anything differs, or if no kill left half a save behind.

Nothing in the product helps: each process of a run is this file with --child, which wraps some functions of the
product, counts their calls and Python's own audit events of file operations, and then runs train.py's `main`.
"""

import argparse
import atexit
import errno
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from itertools import count, zip_longest
from pathlib import Path

import tqdm
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOISE = ("time/", "memory/", "tokens_per_second")  # beginnings of metrics that no two runs share
SAID = ("resume:", "the warm start of this run")  # what a restart says of what it found
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
# Several processes share few cores; and a GPU is hidden, for what is compared here is bitwise on a CPU alone.
AT_ONCE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

# --- inside a run -------------------------------------------------------------------------------------------------


def die() -> None:
    """SIGKILL every process of this run, torchrun included, as far as possible at once."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun gives each worker a session of its own
        agent = os.getppid()
        for status in Path("/proc").glob("[0-9]*/stat"):
            pid = int(status.parent.name)
            with suppress(OSError):  # others' processes may end while they are looked at
                if int(status.read_text().rsplit(")", 1)[1].split()[1]) == agent and pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
        os.killpg(os.getpgid(agent), signal.SIGKILL)
    os.killpg(0, signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS = {
    "kill": die,
    "hang": lambda: time.sleep(3600),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "disk full": disk_full,
    "small disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
}


def arm(spec: dict) -> None:
    """Let `does` happen in this process at the `n`-th call of `on`, counted from the start of RL step `step`.

    `on` "file" counts file operations below `run_dir` whose path there begins with `part`. With `record`, a path, all
    of them are listed there instead, as [step, path, operation].
    """
    import sample
    import spro
    import torch
    from baselines import supervised
    from infra import dumps, metrics, run_folder
    from infra.processes import rank
    from rewards import Grader

    now = {"step": 0, "calls": 0, "in rmtree of": ""}
    record = Path(f"{spec['record']}{rank()}").open("w") if "record" in spec else None  # noqa: SIM115

    def is_due(what: str) -> bool:
        if what != spec.get("on") or now["step"] < spec.get("step", 0) or rank() != spec.get("rank", 0):
            return False
        now["calls"] += 1
        return now["calls"] == spec.get("n", 1)

    def wrap(owner, name: str, what: str, prepare=lambda *_: None) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            if is_due(what):
                prepare(*args)
                ACTIONS[spec["does"]]()
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def write_half(file: Path, *_) -> None:
        with file.open("a") as out:
            out.write('{"step": ')

    wrap(supervised, "supervised_step", "warm start")
    wrap(sample.InverseCDF, "choose", "generate")
    wrap(Grader, "shaped_rewards", "reward")
    wrap(torch.nn.utils, "clip_grad_norm_", "optimizer")
    wrap(metrics, "check_refused", "update")  # after an optimizer step
    wrap(dumps, "dump_rollout", "samples", write_half)
    wrap(run_folder, "append_line", "metrics", write_half)
    real_sample, real_loss = sample.sample, spro.policy_loss

    def step_begins(policy, prompts, keys, config):  # keys hold the place among all prompts of the run
        now["step"] = keys[0][2] // len(keys) + 1
        return real_sample(policy, prompts, keys, config)

    def loss_with_hook(log_probs, *rest):
        log_probs.register_hook(lambda _: ACTIONS[spec["does"]]() if is_due("backward") else None)
        return real_loss(log_probs, *rest)

    sample.sample, spro.policy_loss = step_begins, loss_with_hook

    def on_event(event: str, args: tuple) -> None:
        if event not in FILE_EVENTS or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        if event == "shutil.rmtree":
            now["in rmtree of"] = path
        if event in ("os.remove", "os.rmdir") and not os.path.isabs(path):  # rmtree names files by directory handles
            path = os.path.join(now["in rmtree of"], path)
        if not path.startswith(spec["run_dir"] + os.sep):
            return
        inside = path[len(spec["run_dir"]) + 1 :]
        if record:
            print(json.dumps([now["step"], inside, event]), file=record, flush=True)
        elif inside.startswith(spec.get("part", "")) and is_due("file"):
            ACTIONS[spec["does"]]()

    if record or spec.get("on") == "file":
        sys.addaudithook(on_event)


def child(spec: dict | None, arguments: list[str]) -> None:
    """One process of a run: arm the spec, then be train.py."""
    sys.path.insert(0, str(ROOT))
    import train
    from infra.processes import command_line

    if spec:
        arm(spec)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    command_line(train.main, train.Config)


# --- starting runs ------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _fork(work) -> int:
    """A child process that does `work()` -> its pid."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _forked(work, args: tuple, ranks: int, log: Path) -> None:
    """What torchrun would do: a process group of `ranks` processes that end when one fails."""
    os.setsid()
    tqdm.tqdm.set_lock(threading.RLock())  # its default lock would outlive a killed process, as a leaked semaphore
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if ranks == 1:
        return work(*args)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    pids = set()
    for rank in range(ranks):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pids.add(_fork(lambda: work(*args)))
    signal.signal(signal.SIGTERM, lambda number, _: [os.kill(pid, number) for pid in pids])
    codes = []
    while pids and not any(codes):
        pid, status = os.wait()
        pids.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
    for _ in range(50):  # the others usually end by themselves, with a word of why
        pids -= {pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.1 if pids else 0)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    sys.exit(next((code for code in codes if code), 0))


def fork(work, args: tuple, ranks: int, log: Path):
    """Start `work(*args)` on `ranks` processes forked from one that has imported torch already: in no time.

    Otherwise the like of torchrun: a group of processes with its environment variables; their output goes to `log`.
    """
    os.environ |= AT_ONCE | {"PYTHONPATH": str(ROOT)}
    log.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "transformers.models.qwen2.modeling_qwen2"])
    process = context.Process(target=_forked, args=(work, args, ranks, log))
    process.start()
    atexit.register(kill, process)  # or Python would wait at its end for what a failed test has left running
    return process


def start(arguments: list[str], log: Path, spec: dict | None = None, ranks: int = 1, forked: bool = False):
    """Start train.py with `arguments` on `ranks` processes; wait with `exit_code`."""
    if forked:
        return fork(child, (spec, arguments), ranks, log)
    command = [sys.executable, __file__, "--child", json.dumps(spec), *arguments]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command[1:1] = torchrun
    with log.open("w") as out:
        environment = os.environ | AT_ONCE
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def kill(process) -> None:
    """SIGKILL what `start` or `fork` began, if it has not ended."""
    if (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None:
        os.killpg(process.pid, signal.SIGKILL)


def exit_code(process, timeout: float = 600) -> int:
    """Wait for what `start` or `fork` began; past the timeout it is killed, which is an AssertionError."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
    else:
        process.join(timeout)
        if process.exitcode is not None:
            return process.exitcode
    kill(process)
    raise AssertionError(f"a run had not ended after {timeout} s")


# --- comparing runs -----------------------------------------------------------------------------------------------


def metrics(run_dir: Path) -> list[dict]:
    """The rows of metrics.jsonl without what no two runs share."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NOISE)} for row in rows]


def differences(straight: Path, other: Path) -> list[str]:
    """Where two finished runs differ, though they should agree to the last bit."""
    found = []
    for name in ["model/model.safetensors", *sorted(f"samples/{f.name}" for f in (straight / "samples").iterdir())]:
        if not (other / name).exists() or (straight / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs or is missing")
    expected, rows = metrics(straight), metrics(other)
    if [row["step"] for row in rows] != list(range(len(expected))):
        found.append(f"metrics.jsonl has the steps {[row['step'] for row in rows]}")
    for one, two in zip(expected, rows, strict=False):
        if json.dumps(one) != json.dumps(two):
            keys = [key for key in one | two if json.dumps(one.get(key)) != json.dumps(two.get(key))]
            found.append(f"metrics.jsonl, step {one['step']}: {', '.join(keys)}")
    if {f.name for f in (straight / "samples").iterdir()} != {f.name for f in (other / "samples").iterdir()}:
        found.append("samples/ has other files")
    return found


def left_behind(run_dir: Path) -> list[str]:
    """The traces of a checkpoint save that did not end."""
    folder, config = run_dir / "checkpoints", run_dir / "config.yaml"
    if not folder.exists() or not config.exists():
        return []
    names = sorted(f.name for f in folder.iterdir())
    whole = [name for name in names if (folder / name / "manifest.json").exists() and not name.endswith(".tmp")]
    keep = yaml.safe_load(config.read_text())["train"]["keep_checkpoints"]
    return [name for name in names if name not in whole] + [f"{name} not pruned" for name in whole[:-keep]]


# --- the plan and its execution -----------------------------------------------------------------------------------


def save_kills(n: int, events: list[list], dice: random.Random) -> list[dict]:
    """`n` moments in the checkpoint saves that `events`, one list per rank, tell of; half of them after the rename."""
    specs: dict[bool, dict[str, list]] = {False: {}, True: {}}  # renamed already? -> operation -> when it happens
    last = max(step for step, *_ in events[0])
    for rank, seen in enumerate(events):
        calls: Counter = Counter()
        for step, path, event in seen:
            if step and path.startswith("checkpoints"):
                renamed, operation = calls[step, "os.rename"] > 0, f"{event} {path.removeprefix('checkpoints/')}"
                calls.update([step, (step, event)])
                spec = {"on": "file", "part": "checkpoints", "step": step, "n": calls[step], "rank": rank}
                place = specs[renamed].setdefault(re.sub(r"step_\d+", "", operation), [])
                place.append({**spec, "moment": f"before {operation}"})

    def spread(by_operation: dict[str, list], first: str) -> list[dict]:  # each operation once before any comes twice
        operations = sorted(dice.sample(sorted(by_operation), len(by_operation)), key=lambda name: first not in name)
        queues = [dice.sample(by_operation[name], len(by_operation[name])) for name in operations]
        return [spec for turn in zip_longest(*queues) for spec in turn if spec]

    after: dict[int, dict] = {}  # the rename has made progress: one such kill per save, and none at the last
    for spec in spread(specs[True], "os.remove"):
        if spec["step"] < last and len(after) < n // 2:
            after.setdefault(spec["step"], spec)
    return spread(specs[False], "os.rename")[: n - len(after)] + list(after.values())


def plan(kills: int, ranks: int, events: list[list], seed: int) -> list[dict]:
    """Specs for `arm`, in an order in which each can happen: no kill comes at an earlier step than the one before."""
    dice = random.Random(seed)
    steps = max(step for step, *_ in events[0])
    dumps = sorted({step for step, path, _ in events[0] if path.startswith("samples/")} - {0})
    opening = [path for step, path, _ in events[0] if not step]

    n = dice.randint(1, sum(path.startswith("config.yaml") for path in opening))
    early = [{"on": "file", "part": "config.yaml", "n": n, "moment": "before config.yaml exists"}]
    if any(path.startswith("warm_start") for path in opening):
        written = sum(path.startswith("warm_start/model") for path in opening)
        n = dice.randint(2, written)
        early += [{"on": "warm start", "n": dice.randint(2, 40), "moment": "in the warm start"}]
        early += [{"on": "file", "part": "warm_start/model", "n": n, "moment": "writing the warm start's model"}]
    early += [{"on": "generate", "n": dice.randint(1, 20), "moment": "in the first evaluation"}]
    early += [{"on": "reward", "step": 1, "moment": "in the first step's reward"}]
    chosen = sorted(dice.sample(range(len(early)), min(len(early), max(1, kills // 5))))
    early = [early[i] for i in chosen]

    closing = [(path, event) for step, path, event in events[0] if step == steps and path.startswith("model")]
    final = [
        {"on": "file", "part": "model", "n": i + 1, "moment": f"before {closing[i][1]} {closing[i][0]}"}
        for i in dice.sample(range(len(closing)), max(1, kills // 7))
    ]
    saves = save_kills(kills * 2 // 5, events, dice)
    kinds = ["backward", "generate", "reward", "metrics", "update", "samples", "optimizer", "resume"]
    stages = []
    for i in range(kills - len(early) - len(final) - len(saves)):
        on = kinds[i % len(kinds)]
        spec = {"on": on, "moment": f"in {on}", "step": dice.randint(1, steps - 1)}
        if on in ("metrics", "samples"):  # rank 0 writes them
            spec |= {"moment": f"half a line of {on}", "step": dice.choice(dumps) if on == "samples" else spec["step"]}
        elif on == "resume":  # step 0: what a process does before its first step
            spec |= {"on": "file", "part": "metrics.jsonl", "n": 2, "at": spec["step"], "step": 0}
        else:
            spec |= {"rank": dice.randrange(ranks), "n": dice.randint(1, 8) if on == "generate" else 1}
        stages.append(spec)
    middle = sorted(saves + stages, key=lambda spec: spec.get("at", spec["step"]))
    return [{"does": "kill", **spec} for spec in (*early, *middle, *final)]


def chaos(folder: Path, kills: int, ranks: int, seed: int, arguments: list[str], forked: bool = False) -> list[str]:
    """Straight run and killed run in `folder` -> what is wrong, nothing if all is well. Prints one line per kill."""
    began, straight, killed = time.perf_counter(), folder / "straight", folder / "killed"
    spec = {"record": str(folder / "events"), "run_dir": str(straight)}
    code = exit_code(start([*arguments, f"run_dir={straight}"], folder / "straight.log", spec, ranks, forked))
    if code:
        return [f"the straight run ended with code {code}: {(folder / 'straight.log').read_text()[-2000:]}"]
    events = [
        [json.loads(line) for line in (folder / f"events{rank}").read_text().splitlines()] for rank in range(ranks)
    ]
    inside, line, traces = 0, "", []
    specs = plan(kills, ranks, events, seed)
    for number in count(1):
        log = folder / f"attempt_{number}.log"
        spec = specs[number - 1] | {"run_dir": str(killed)} if number <= len(specs) else None
        code = exit_code(start([*arguments, f"run_dir={killed}", "resume=true"], log, spec, ranks, forked))
        words = log.read_text()
        if line:
            said = [text.replace(f"{killed}/", "") for text in words.splitlines() if text.startswith(SAID)]
            print(f"{line} | restart: {'; '.join(said) or 'nothing to resume'}", flush=True)
        if spec is None and code == 0:
            break
        if spec is None or code != -signal.SIGKILL:
            wanted = "finish" if spec is None else f"be killed {spec['moment']}"
            return [f"attempt {number} should {wanted}, but ended with code {code}: {words[-2000:]}"]
        file, known, traces = killed / "metrics.jsonl", traces, left_behind(killed)
        new = [trace for trace in traces if trace.endswith(".tmp") or trace not in known]  # a resume removes *.tmp
        inside += bool(new) and spec.get("part") == "checkpoints"
        reached = max(0, file.read_text().count("\n") - 1) if file.exists() else 0
        line = f"kill {number:2}, rank {spec.get('rank', 0)}, {reached:2} steps logged, {spec['moment']}"
        line += f", leaving {', '.join(new)}" if new else ""
    faults = differences(straight, killed)
    faults += [] if inside else ["no kill left half a save behind, so this proves nothing"]
    verdict = "DIFFER" if faults else "are equal"
    print(
        f"{len(specs)} kills on {ranks} rank(s), {inside} of them inside a checkpoint save, in "
        f"{time.perf_counter() - began:.0f} s: weights, metrics and samples {verdict}",
        flush=True,
    )
    return faults


def draw(folder: Path, file: Path) -> None:
    """Reward per step of both runs, the killed one dashed on top, and a mark where it went on after a kill."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "chaos"  # the same data make the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    for name, style in (
        ("straight", {"color": "0.75", "lw": 5}),
        ("killed", {"color": "black", "lw": 1.2, "ls": "--"}),
    ):
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()][1:]
        label = "undisturbed" if name == "straight" else "killed and resumed"
        axes.plot([row["step"] for row in rows], [row["reward/mean"] for row in rows], label=label, **style)
    logs = "".join(log.read_text() for log in folder.glob("attempt_*.log"))
    steps = [int(step) for step in re.findall(r"going on after step (\d+)", logs)]
    axes.plot(steps, [0] * len(steps), "^", color="tab:red", clip_on=False, label="resumed after a kill")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.15))
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(json.loads(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description="Kill a training run again and again, and compare.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--figure", type=Path, help="draw the two runs' rewards over each other (needs matplotlib)")
    parser.add_argument("overrides", nargs="*", help="key=value, for train.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        arguments = [str(ROOT / "configs" / "tiny.yaml"), *args.overrides]
        faults = chaos(Path(folder), args.kills, args.ranks, args.seed, arguments)
        if args.figure and not faults:
            draw(Path(folder), args.figure)
    for fault in faults:
        print(f"FAULT: {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
