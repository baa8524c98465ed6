"""What the stages of gpu.py share: rows of the table, work in processes of its own, and runs of train.py.

The program itself never imports torch. A stage's work is done by processes forked from one that has (tests/chaos.py):
what breaks CUDA in one of them, or hangs, is that one's end alone, and none pays for imports. Where CUDA does not work
in a forked process each is a fresh interpreter instead, which costs seconds apiece.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]
import chaos  # noqa: E402

PASS, FAIL, SKIP, NOTE = "PASS", "FAIL", "SKIP", "note"
NEEDS_GPU = "has no meaning on a CPU"
HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}
# A run of train.py in a second or so, in which rewards, gradients and lengths still vary.
TINY = [
    str(ROOT / "configs" / "tiny.yaml"),
    *("data.min_steps=1", "data.max_steps=1", "data.train_size=150", "data.held_out_size=16", "eval.prompts=16"),
    *("sample.max_new_tokens=14", "train.learning_rate=3e-4", "train.dump_every=1", "overwrite=true"),
    *("train.warm_start_clean_steps=60", "train.warm_start_noisy_steps=10"),
]


@dataclass(frozen=True)
class Bench:
    """What a stage is told."""

    rehearse: bool  # toy sizes, on a CPU
    out: str  # for JSON and logs
    scratch: str  # for models and run folders; deleted at the end
    gpus: str | None = None  # CUDA_VISIBLE_DEVICES as the user has it
    forked: bool = True
    until: float = 0.0  # time.time() at which the stage has had its time

    def left(self) -> float:
        """Seconds of this stage."""
        return max(1.0, self.until - time.time())

    def sized(self, full, toy):
        """The first on a GPU, the second in a rehearsal."""
        return toy if self.rehearse else full


# --- rows of the table --------------------------------------------------------------------------------------------


def row(what: str, verdict: str, words: str = "", **figures) -> dict:
    return {"what": what, "verdict": verdict, "words": words, "figures": figures}


def check(what: str, holds: bool, words: str = "", **figures) -> dict:
    return row(what, PASS if holds else FAIL, words, **figures)


def judge(bench: Bench, what: str, holds: bool, words: str = "", **figures) -> dict:
    """A check of how fast or small something is: in a rehearsal it says nothing."""
    return note(what, words, **figures) if bench.rehearse else check(what, holds, words, **figures)


def note(what: str, words: str = "", **figures) -> dict:
    """Measured, and not judged."""
    return row(what, NOTE, words, **figures)


def skip(what: str, why: str = NEEDS_GPU) -> dict:
    return row(what, SKIP, why)


def one_line(words) -> str:
    """The first line of an error, or the last of a log."""
    lines = str(words).strip().splitlines()
    return lines[0 if isinstance(words, Exception) else -1][:300] if lines else type(words).__name__


def guarded(what: str, work) -> dict:
    """The row that `work()` gives; what it raises is a FAIL with its one line of why."""
    try:
        return work()
    except Exception as error:
        return row(what, FAIL, f"{type(error).__name__}: {one_line(error)}")


# --- processes ----------------------------------------------------------------------------------------------------


def start(bench: Bench, log: Path, work: str, *args, on_gpu: bool = True):
    """A process that calls `work`, as "module.function", its output in `log`; wait with chaos.exit_code."""
    hidden = bench.rehearse or not on_gpu
    if not bench.forked:
        environment = {**os.environ, **chaos.AT_ONCE}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment |= HIDDEN if hidden else shown(bench)
        command = [sys.executable, __file__, work, json.dumps([as_json(arg) for arg in args])]
        with log.open("w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    before = dict(os.environ)
    try:
        return chaos.fork(forked, (work, args, HIDDEN if hidden else shown(bench)), 1, log)
    finally:  # chaos hides the GPU from all that it starts
        os.environ.clear()
        os.environ.update(before)


def shown(bench: Bench) -> dict[str, str]:
    return {} if bench.gpus is None else {"CUDA_VISIBLE_DEVICES": bench.gpus}


def as_json(arg):
    return {"bench": asdict(arg)} if isinstance(arg, Bench) else arg


def forked(work: str, args: tuple, gpus: dict[str, str]) -> None:
    """In the child: nothing has asked for a GPU yet, so the environment still says which are there."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ.update(gpus)
    call(work, args)


def call(work: str, args) -> None:
    module, _, function = work.rpartition(".")
    getattr(import_module(module), function)(*args)


def apart(bench: Bench, work: str, *args):
    """The rows that the generator `work(bench, *args)` gives in a process of its own; those from before its end too."""
    name = work.rpartition(".")[2]
    file, log = Path(bench.out, f"{name}.rows"), Path(bench.out, f"{name}.log")
    file.unlink(missing_ok=True)
    process = start(bench, log, "gpu_runs.write_rows", str(file), work, bench, *args)
    try:
        code, why = chaos.exit_code(process, bench.left()), None
    except AssertionError:
        code, why = 1, "took more than the time it has"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    yield from found
    if code:
        yield row("the process", FAIL, why or f"exit code {code}: {one_line(log.read_text())}")
    elif not any(one["verdict"] == FAIL for one in found):
        log.unlink()


def write_rows(file: str, work: str, *args) -> None:
    """In the child: append each row to `file` as soon as it is there."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # as every script of this project starts: infra/processes.py
    module, _, function = work.rpartition(".")
    with open(file, "a") as out:
        for one in getattr(import_module(module), function)(*args):
            print(json.dumps(one), file=out, flush=True)


# --- runs of train.py ---------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of train.py, under way or ended."""

    folder: Path
    log: Path
    process: object
    bench: Bench

    def ended(self, code: int = 0) -> "Run":
        """Wait for its end. Raises RuntimeError where it did not end with `code`."""
        found = chaos.exit_code(self.process, self.bench.left())
        if found != code:
            raise RuntimeError(f"{self.folder.name} ended with code {found}: {one_line(self.words())}")
        return self

    def words(self) -> str:
        return self.log.read_text()

    def metrics(self) -> list[dict]:
        return chaos.metrics(self.folder)

    def texts(self) -> list[str]:
        files = sorted((self.folder / "samples").glob("step_*.jsonl"))
        return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def train(bench: Bench, name: str, *arguments: str, on_gpu: bool = True, starved: str = "") -> Run:
    """Start train.py with TINY and `arguments`; `starved`: the stage in which it shall run out of memory."""
    folder, log = Path(bench.scratch, name), Path(bench.scratch, f"{name}.log")
    line = [*TINY, f"run_dir={folder}", *arguments]
    return Run(folder, log, start(bench, log, "gpu_runs.train_main", line, starved, on_gpu=on_gpu), bench)


def train_main(arguments: list[str], starved: str) -> None:
    """In the child: be train.py."""
    import train
    from infra.processes import command_line

    if starved:
        starve(train, starved)
    sys.argv = [str(ROOT / "train.py"), *arguments]
    command_line(train.main, train.Config)


def starve(train, stage: str) -> None:
    """Let the allocator refuse whatever goes beyond the memory that is held when `stage` begins."""
    import torch

    owner, name = {"sample": (train.sample, "sample"), "update": (train.model, "token_log_probs")}[stage]
    inner = getattr(owner, name)

    def with_nothing_left(*args, **kwargs):
        if stage == "sample" or torch.is_grad_enabled():
            take_memory_away()
        return inner(*args, **kwargs)

    setattr(owner, name, with_nothing_left)


def take_memory_away() -> None:
    """From now on no new memory: of the GPU beyond what the allocator holds, or of addresses on a CPU."""
    import ctypes
    import resource

    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed would be used again
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))


def warm_start(bench: Bench) -> str:
    """The argument that starts a run from one warm start, made on a CPU and shared by all stages."""
    model = Path(bench.scratch, "warm", "warm_start", "model")
    if not model.exists():
        train(bench, "warm", "train.steps=1", on_gpu=False).ended()
    return f"model.path={model}"


def far_apart(run: Run, other: Run, tolerance: float) -> list[str]:
    """The metrics of two runs that differ by more than `tolerance`, relative where they are above 1."""
    found = []
    for one, two in zip(run.metrics(), other.metrics(), strict=True):
        for key in one | two:
            a, b = one.get(key, math.nan), two.get(key, math.nan)
            if not abs(a - b) <= tolerance * max(1.0, abs(a)):  # NaN is far from everything
                found.append(f"step {one['step']}: {key} {a:.6g} / {b:.6g}")
    return found


if __name__ == "__main__":  # a child that is a fresh interpreter
    sys.modules["gpu_runs"] = sys.modules["__main__"]
    given = [Bench(**arg["bench"]) if isinstance(arg, dict) else arg for arg in json.loads(sys.argv[2])]
    call(sys.argv[1], given)
