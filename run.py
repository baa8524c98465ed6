"""What turns a program into a run: its config, its processes, its folder, and checkpoints that survive any kill.

A checkpoint folder is complete or absent: it is written under a temporary name, every file is hashed into a manifest
and flushed to disk, and only then is the folder renamed; older ones are pruned after that. Loading verifies the
manifest, takes the newest checkpoint that holds, and reads tensors (safetensors) and JSON, nothing that can run code.

    runs/NAME/config.yaml            the resolved config, with the command, commit and versions that made it
    runs/NAME/metrics.jsonl          one line per step; step 0 is the evaluation before training
    runs/NAME/samples/step_*.jsonl   whole rollouts, now and then
    runs/NAME/checkpoints/step_*/    shard-*.safetensors (weights and optimizer moments), state.json, manifest.json
    runs/NAME/warm_start/            metrics.jsonl and model/, where the model was built from scratch
    runs/NAME/model/                 the trained model, for `from_pretrained`
    runs/NAME/lock                   held by the process that works here
"""

import argparse
import dataclasses
import difflib
import errno
import faulthandler
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # checkpoints of one process: as meant

EXIT_BAD_INPUT = 2  # the user can mend it
EXIT_FAILED = 1  # the run cannot go on
EXIT_STOPPED = 75  # SIGTERM or Ctrl-C: saved, `resume=true` goes on (EX_TEMPFAIL, "try again later")
UNWRITABLE = tuple(getattr(errno, f"E{name}") for name in ("NOSPC", "DQUOT", "FBIG", "ROFS", "ACCES", "PERM", "IO"))
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # of the driver, a CPU, the libraries
MEMORY_KNOBS = {  # stage -> what makes it need less memory
    "load": "give each GPU less by more of them (model.shard), or set model.offload_reference=true",
    "warm_start": "lower train.micro_batch_tokens",
    "evaluate": "lower sample.batch_tokens",
    "sample": "lower sample.batch_tokens",
    "log_probs": "lower train.micro_batch_tokens",
    "prm": "lower train.micro_batch_tokens",
    "update": "lower train.micro_batch_tokens, or set model.gradient_checkpointing=true",
}
SMALL_MODEL = 2_000_000  # parameters
ABSENT = "no such key"  # a config of another version of this code has keys more or less
LOCK_TRIES = 50  # ten a second: a killed process takes its time to die, and lets go of its run folder only then
CHANGEABLE = (  # what a resumed run may change: keys, or beginnings of keys
    *("run_dir", "resume", "overwrite", "dry_run", "eval."),
    *("model.gradient_checkpointing", "model.offload_reference", "sample.batch_tokens", "train.micro_batch_tokens"),
    *(
        "model.shard",
        "model.replicate",
        "train.steps",
        "train.save_every",
        "train.keep_checkpoints",
        "train.diagnose_every",
        "train.tensorboard",
        "train.dump_every",
        "train.timeout_minutes",
    ),
)


class BadInput(Exception):
    """The user can mend this: its message is one line that says what, where, and what to do instead."""


class RunStopped(Exception):
    """The run cannot go on; the message says why, and what is safe. `code` is the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED):
        super().__init__(message)
        self.code = code


def command_line(main) -> None:
    """Run a script's `main()`; what goes wrong in a foreseen way ends in one line on stderr and an exit code."""
    try:
        main()
    except BadInput as error:
        _end(f"error: {error}", EXIT_BAD_INPUT)
    except RunStopped as stop:
        _end(f"stopped: {stop}", stop.code)
    except torch.OutOfMemoryError as error:  # in no stage of a run
        _end(f"stopped: {told(error)}: take fewer --samples or --max-new-tokens", EXIT_FAILED)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        _end(f"stopped: cannot write: {error}; mend that, then start it again (train.py: resume=true)", EXIT_FAILED)
    if dist.is_initialized():  # only at a good end: after a failure on one rank the others may never come to it
        dist.destroy_process_group()


def _end(message: str, code: int) -> None:
    print(f"[rank {rank()}] {message}" if rank() else message, file=sys.stderr, flush=True)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Whose complaints are one line, as all of ours are."""

    def error(self, message):
        raise BadInput(f"{message} (python {self.prog} --help)")


def told(error: Exception) -> str:
    """The two sentences in which torch says what did not fit into memory; more would be a wall of text."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:2])


@contextmanager
def enough_memory(stage: str):
    """Where the block runs out of memory, RunStopped names the stage and what makes it need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise RunStopped(
            f"out of memory in stage {stage} ({told(error)}): {MEMORY_KNOBS.get(stage, 'give it less')}; "
            "resume=true goes on from the newest checkpoint"
        ) from error


# --- configuration ------------------------------------------------------------------------------------------------


def all_keys(cls, prefix: str = "") -> list[str]:
    """Every key of a config dataclass, dotted."""
    keys = []
    for name, kind in get_type_hints(cls).items():
        keys += all_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return keys


def nearest_key(key: str, known: list[str]) -> str:
    """The known key that was most likely meant: by its last name, its initials (lr), its block and its spelling."""

    def likeness(candidate: str) -> float:
        (*block, name), (*other_block, other) = key.split("."), candidate.split(".")
        initials = "".join(word[0] for word in other.split("_"))
        spelling = difflib.SequenceMatcher(None, name, other).ratio()
        return max(spelling, 0.9 * (name == initials)) + 0.2 * (block == other_block)

    return max([*known, *{k.split(".")[0] for k in known}], key=likeness)


def typed(value, kind, key):
    """`value` as `kind`, or BadInput. YAML reads 1e-4 as text, so numbers may come as text where a float is due."""
    if get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(kind)):
            return tuple(typed(v, k, key) for v, k in zip(value, get_args(kind), strict=True))
    elif kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    wanted = f"a list of {len(get_args(kind))} numbers" if get_origin(kind) is tuple else f"of type {kind.__name__}"
    raise BadInput(f"config: {key} must be {wanted}, not {value!r}")


def build_config(cls, values, known: list[str], prefix: str = ""):
    """A config dataclass from nested dicts; unknown keys and wrong types raise BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"config: {prefix.rstrip('.')} must hold keys and values, not {values!r}")
    kinds, built = get_type_hints(cls), {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise BadInput(f"config: unknown key {key!r}; the nearest is {nearest_key(key, known)!r}")
        nested = dataclasses.is_dataclass(kinds[name])
        built[name] = build_config(kinds[name], value, known, key + ".") if nested else typed(value, kinds[name], key)
    try:
        return cls(**built)
    except ValueError as error:  # a block's own check of its values
        raise BadInput(f"config: {prefix}{error}") from error


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict:
    """The values of a YAML file over those of its `base`, if it names one: a path from its own folder.

    `heirs` are the files that led here. Raises BadInput on a file that cannot be read, or is its own base.
    """
    chain = " -> ".join(map(str, (*heirs, path)))
    if path.resolve() in [heir.resolve() for heir in heirs]:
        raise BadInput(f"config: {path} is its own base: {chain}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise BadInput(f"config: cannot read {chain}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadInput(f"config: {path} must hold keys and values, not {values!r}")
    base = values.pop("base", "")
    if not isinstance(base, str):
        raise BadInput(f"config: base of {path} must be the path of another YAML, not {base!r}")
    return merged(read_yaml(path.parent / base, (*heirs, path)), values) if base else values


def merged(below, above):
    """`above` over `below`: nested dicts key by key, anything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


def read_config(cls, arguments: list[str], default: Path):
    """`[CONFIG.yaml] [key=value ...]` -> a `cls`: key=value overrides YAML, YAML its `base`, that the fields' defaults.

    Raises BadInput on a file that cannot be read, an unknown key, a wrong type, or what a block says of its own values.
    """
    overrides = [a for a in arguments if "=" in a]
    files = [a for a in arguments if "=" not in a]
    if len(files) > 1 or any(a.startswith(("-", "=")) for a in arguments):
        given = " ".join(arguments)
        raise BadInput(f"usage: [CONFIG.yaml] [key=value ...], no dashes, no spaces around '=', not {given!r}")
    path = Path(files[0]) if files else default
    values = read_yaml(path)
    for override in overrides:
        key, _, text = override.partition("=")
        *blocks, name = key.split(".")
        block = values
        for part in blocks:
            block = block.setdefault(part, {}) if isinstance(block, dict) else None
        if not isinstance(block, dict):
            raise BadInput(f"config: {override!r} goes through something that is no block")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadInput(f"config: cannot read the value of {override!r}") from error
        block[name] = "" if value is None else value
    config = build_config(cls, values, all_keys(cls))
    config.run_dir = config.run_dir or f"runs/{path.stem}"
    return config


def saved_config(folder: Path) -> dict:
    """What a run wrote of its config; {} where the folder holds no run. Raises BadInput where it cannot be read."""
    file = folder / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text()) if file.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return saved if isinstance(saved, dict) and {"run_dir", "algorithm"} <= saved.keys() else {}


def saved_block(cls, config: dict, name: str):
    """Block `name` of a saved config, or its defaults. Raises BadInput where another version of this code wrote it."""
    try:
        return cls(**config.get(name, {}))
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"the run's config.yaml holds a block {name!r} that this version of the code cannot read ({error}): "
            "check out the commit that its first lines name"
        ) from error


def plain(config) -> dict:
    """The config as YAML and JSON can hold it (lists for tuples)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


# --- processes ----------------------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words, file=None) -> None:
    """print, once for all ranks."""
    if rank() == 0:
        print(*words, file=file, flush=True)


def start_processes(timeout_minutes: float) -> torch.device:
    """Join torchrun's processes, if it started this one -> this rank's device: its GPU if there is one, else the CPU.

    On a GPU even a single process forms a group of one, so that FSDP keeps master weights and compute type apart.
    """
    on_gpu, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if on_gpu and local > torch.cuda.device_count():
        raise BadInput(f"{local} processes were started here for {torch.cuda.device_count()} GPU(s): one each, no more")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if on_gpu or not alone:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes, seconds=30), **alone)
    return device


def choose_threads(num_parameters: int) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS says otherwise.

    Its matrices are too small to share: on an idle machine a second thread gains little, and where another process
    takes a core the threads spin at their barriers (100 quickstart steps measured: 37 s with one thread, 154 with two).
    """
    if num_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def watch(timeout_minutes: float) -> None:
    """From now, unless called again in time, have every rank print where it stands: a hang must explain itself.

    It only prints. A run hung in a collective ends when that collective has waited for timeout_minutes and 30 seconds.
    """
    faulthandler.dump_traceback_later(timeout_minutes * 60)


def shared(work, items: list) -> list:
    """`work(items)`, a list of results, divided among the ranks by contiguous slices; every rank gets them all."""
    if world_size() == 1:
        return work(items)
    bounds = [len(items) * r // world_size() for r in range(world_size() + 1)]
    mine = items[bounds[rank()] : bounds[rank() + 1]]
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, work(mine) if mine else [])
    return [result for part in parts for result in part]


def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """`tensor`, reduced over all ranks in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op)
    return tensor


def on_first_rank(work):
    """`work()` on rank 0 alone, while the others wait -> its result on every rank, or its error on every rank."""
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (BadInput, RunStopped, OSError) as caught:
            error = caught
    if world_size() > 1:
        outcome = [result, error]
        dist.broadcast_object_list(outcome)
        result, error = outcome
    if error is not None:
        raise error
    return result


_signals: list[float] = []  # when they came


def catch_signals() -> None:
    """From now SIGTERM and Ctrl-C ask the run to stop at the next safe place; a second one ends it at once."""

    def note(number, _frame):
        if _signals and time.monotonic() - _signals[0] > 2:  # torchrun passes on what the terminal has sent already
            os._exit(128 + number)
        _signals.append(time.monotonic())
        if rank() == 0:  # not print: the signal may have come in the middle of one
            os.write(2, f"{signal.Signals(number).name}: stopping at the next safe place\n".encode())

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)


def stop_requested() -> bool:
    """Whether any rank was asked to stop; all ranks call it together and agree."""
    return bool(all_reduce(torch.tensor(len(_signals))))


# --- the run folder -----------------------------------------------------------------------------------------------


def provenance() -> dict[str, str]:
    """What made a run: the command, the commit of this code, and the versions it ran with."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"command": " ".join(sys.argv), "commit": commit or "unknown", **packages}


def flat(config: dict, prefix: str = "") -> dict:
    """Nested blocks as one dict with dotted keys."""
    items: dict = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return items


FREE_BLOCKS = ("model.scratch.", "reward.bonus.")  # whose keys are the user's: one that is missing is no other version


def changes(saved: dict, config: dict) -> str:
    """`key: before -> now, ...` of what a resumed run may not change; empty if nothing."""
    sides, diff = (flat(saved), flat(config)), []
    for key in sides[0] | sides[1]:
        before, now = (side.get(key, None if key.startswith(FREE_BLOCKS) else ABSENT) for side in sides)
        if before != now and not key.startswith(CHANGEABLE):
            diff.append(f"{key}: {before} -> {now}")
    return ", ".join(diff)


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    _flush(temporary)
    os.replace(temporary, file)


def fresh_folder(folder: Path) -> None:
    """Make an empty folder, whatever an earlier attempt left there. All ranks call it."""

    def make():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    on_first_rank(make)


def append_line(file: Path, row: dict) -> None:
    """Append one JSON line, on rank 0."""
    if rank() == 0:
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")


_locks: list = []  # the open file of the lock that this process holds


def hold(lock: Path, what: str) -> None:
    """Lock a file while this process lives, instead of the one before; the kernel lets go of it at any kind of end.

    Raises BadInput where another process holds it. Where the file system knows no locks there is none.
    """
    while _locks:
        _locks.pop().close()
    file = lock.open("a+")
    for tries_left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if not tries_left:
                file.seek(0)
                holder = file.read() or "another process"
                raise BadInput(f"{what} is in use by {holder}: wait for it, stop it, or choose another") from error
            time.sleep(0.1)
        except OSError:
            return
    _locks.append(file)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)


def open_run_folder(config: dict) -> Path:
    """Make or reopen `run_dir` and write config.yaml there. All ranks call it.

    Raises BadInput if the folder is in use (and neither resume nor overwrite was given), belongs to a process that
    still runs, is no run folder, holds the model to start from (and overwrite was given), cannot be written, is not
    seen by all ranks, or holds a run whose config differs in a key that matters.
    """
    run = on_first_rank(lambda: _open_run_folder(config))
    if not (run / "config.yaml").exists():
        raise BadInput(f"run_dir {run} is not the same folder on all nodes: put it on a shared file system")
    return run


def _open_run_folder(config: dict) -> Path:
    run, file, header = Path(config["run_dir"]), Path(config["run_dir"]) / "config.yaml", ""
    try:
        # A folder that was killed before it had its config.yaml holds nothing: it counts as empty.
        in_use = run.is_dir() and any(path.name not in ("config.yaml.tmp", "lock") for path in run.iterdir())
        saved = saved_config(run)
        if in_use and not saved:
            raise BadInput(f"run_dir {run} is not a run folder (no config.yaml of a run): choose another run_dir=...")
        if in_use and not (config["resume"] or config["overwrite"]):
            raise BadInput(f"run_dir {run} is in use: give resume=true, overwrite=true or another run_dir=...")
        run.mkdir(parents=True, exist_ok=True)
        hold(run / "lock", f"run_dir {run}")
        if in_use and config["resume"]:
            header = "".join(line + "\n" for line in file.read_text().splitlines() if line.startswith("# "))
            if diff := changes(saved, config):
                if ABSENT in diff:
                    raise BadInput(
                        f"run_dir {run} was made by another version of this code ({diff}): check out the commit that "
                        f"{file} names, or start another run"
                    )
                raise BadInput(f"run_dir {run} was made with another config ({diff}): undo that, or start another run")
        elif in_use:
            if run.resolve() in Path(config["model"]["path"]).resolve().parents:
                raise BadInput(f"overwrite=true would delete model.path, which lies in run_dir {run}")
            doomed = run.with_name(f"{run.name}.overwritten")  # away in one move: half a deletion would be no run
            shutil.rmtree(doomed, ignore_errors=True)
            run.rename(doomed)
            shutil.rmtree(doomed)
            run.mkdir(parents=True)
            hold(run / "lock", f"run_dir {run}")
        header += "".join(f"# {key}: {value}\n" for key, value in provenance().items())
        _write_atomically(file, header + yaml.safe_dump(config, sort_keys=False))
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"run_dir {run} cannot be used: {error}") from error
    return run


def keep_metrics_through(run: Path, step: int) -> list[dict]:
    """Drop what metrics.jsonl says of later steps than `step`, and a last line cut short -> the rows kept."""
    return on_first_rank(lambda: _keep_metrics_through(run / "metrics.jsonl", step))


def _keep_metrics_through(file: Path, step: int) -> list[dict]:
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    rows = [row for row in rows if row["step"] <= step]
    _write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


# --- checkpoints --------------------------------------------------------------------------------------------------


def training_tensors(trained: dict) -> dict[str, torch.Tensor]:
    """Weights and AdamW moments by name, sharing memory with both: the same dict serves saving and loading.

    `trained` holds (model, optimizer) by name. `named_parameters` lists a tied weight once. Before the first optimizer
    step the moments are made here, as zeros.
    """
    tensors = {}
    for owner, (model, optimizer) in trained.items():
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors[f"{owner}.model.{name}"] = parameter.detach()
            tensors |= {f"{owner}.optimizer.{moment}.{name}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return tensors


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(run: Path, step: int, trained: dict, state: dict, keep: int) -> None:
    """Write checkpoints/step_<step>, then prune to the newest `keep`. All ranks call it; each writes its own shard.

    `trained` holds (model, optimizer) by name, `state` all else that training needs, as JSON. Raises RunStopped if the
    checkpoint cannot be written (a full disk, say); what was saved before is untouched then.
    """
    final = run / "checkpoints" / f"step_{step:06d}"
    if final.exists():  # complete, as its name says
        return
    temporary = final.with_suffix(".tmp")
    try:
        fresh_folder(temporary)
        tensors = training_tensors(trained)
        steps = {name: int(next(iter(optimizer.state.values()))["step"]) for name, (_, optimizer) in trained.items()}
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
        state = {**state, "step": step, "adam_steps": steps, **provenance()}
        on_first_rank(lambda: _publish(temporary, final, state, keep))
    except (OSError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise RunStopped(
            f"the checkpoint of step {step} could not be written to {final.parent} ({reason}); older checkpoints are "
            "untouched: make room, then resume=true"
        ) from error


def _publish(temporary: Path, final: Path, state: dict, keep: int) -> None:
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    files = sorted(temporary.iterdir())
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    metrics = final.parent.parent / "metrics.jsonl"  # a checkpoint must not outlive the rows of its steps
    for path in (*files, temporary / "manifest.json", temporary, *([metrics] if metrics.exists() else [])):
        _flush(path)
    os.replace(temporary, final)
    _flush(final.parent)
    for old in (*sorted(final.parent.glob("step_*[0-9]"))[:-keep], *final.parent.glob("damaged_*")):
        try:
            shutil.rmtree(old)
        except OSError as error:
            say(f"an old checkpoint could not be deleted: {error}")


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None if nothing is."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if "state.json" not in manifest:
            return "manifest.json does not list state.json"
        for name, expected in manifest.items():
            file = checkpoint / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that holds; damaged newer ones are named and set aside. All ranks call it."""
    return on_first_rank(lambda: _newest_checkpoint(run / "checkpoints"))


def _newest_checkpoint(folder: Path) -> Path | None:
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    for checkpoint in sorted(folder.glob("step_*[0-9]"), reverse=True):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        say(f"resume: {checkpoint} is damaged: {fault}; setting it aside and trying the one before")
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    return None


def load_checkpoint(checkpoint: Path, trained: dict) -> dict:
    """Fill models and optimizers in place, on any number of ranks -> the `state` that was saved beside them."""
    state = json.loads((checkpoint / "state.json").read_text())
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(training_tensors(trained), storage_reader=reader, no_dist=not dist.is_initialized())
    for name, (_, optimizer) in trained.items():
        for moments in optimizer.state.values():
            moments["step"].fill_(state["adam_steps"][name])
    return state
