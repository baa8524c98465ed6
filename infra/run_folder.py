"""A run's folder: made or reopened under a lock, with the config, command and versions that made
it.

In runs/NAME:

    config.yaml           the resolved config, with the command, commit and versions that made it
    metrics.jsonl         one line per step; step 0 is the evaluation before training
    samples/step_*.jsonl  whole rollouts, now and then
    checkpoints/step_*/   shard-*.safetensors (weights and optimizer moments), state.json and
                          manifest.json
    warm_start/           metrics.jsonl and model/, where there was a warm start
    v_star.jsonl          optimal values of prompts, with algorithm.advantage=a_star
    model/                the trained model, for `from_pretrained`
    lock                  held by the process that works here
"""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from infra.config import ABSENT, changes, saved_config, to_dict
from infra.errors import BadInput
from infra.processes import on_first_rank, print0, rank

# Ten a second: a killed process takes its time to die, and lets go of its run folder only then
LOCK_TRIES = 50


def provenance() -> dict[str, str]:
    """What made a run: the command, the commit of this code, and the versions it ran with."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    # A line break in an argument would end the comment that this is written as
    command = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(sys.argv))
    return {"command": command, "commit": commit or "unknown", **packages}


def say_rounding(changed: str) -> None:
    """`changed`: `key: before -> now, ...` of what rounds sums otherwise; empty if nothing."""
    if changed:
        print0(
            f"resume: {changed}: sums are rounded otherwise from here on, so a token flips now and "
            "then and its response goes on differently; in bfloat16 soon"
        )


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
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


def take_lock(lock: Path, what: str) -> None:
    """Lock a file while this process lives, instead of the one before; the kernel lets go of it at
    any kind of end.

    Raises BadInput where another process holds it. Where the file system knows no locks there is
    none.
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
                raise BadInput(
                    f"{what} is in use by {holder}: wait for it, stop it, or choose another"
                ) from error
            time.sleep(0.1)
        except OSError:
            return
    _locks.append(file)
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)


def open_run_folder(config) -> Path:
    """Make or reopen `run_dir` and write config.yaml there. All ranks call it.

    Raises BadInput if the folder is in use (and neither resume nor overwrite was given), belongs to
    a process that still runs, is no run folder, holds the model to start from (and overwrite was
    given), cannot be written, is not seen by all ranks, or holds a run whose config differs in a
    key that matters.
    """
    run = on_first_rank(lambda: _open_run_folder(config))
    if not (run / "config.yaml").exists():
        raise BadInput(
            f"run_dir {run} is not the same folder on all nodes: put it on a shared file system"
        )
    return run


def _open_run_folder(config) -> Path:
    run = Path(config.run_dir)
    file, header = run / "config.yaml", ""
    try:
        # A folder that was killed before it had its config.yaml holds nothing: it counts as empty.
        in_use = run.is_dir() and any(
            path.name not in ("config.yaml.tmp", "lock") for path in run.iterdir()
        )
        saved = saved_config(run)
        if in_use and not saved:
            raise BadInput(
                f"run_dir {run} is not a run folder (no config.yaml of a run): choose another "
                "run_dir=..."
            )
        if in_use and not (config.resume or config.overwrite):
            raise BadInput(
                f"run_dir {run} is in use: give resume=true, overwrite=true or another run_dir=..."
            )
        run.mkdir(parents=True, exist_ok=True)
        take_lock(run / "lock", f"run_dir {run}")
        if in_use and config.resume:
            header = "".join(
                line + "\n" for line in file.read_text().splitlines() if line.startswith("# ")
            )
            if diff := changes(saved, config):
                if ABSENT in diff:
                    raise BadInput(
                        f"run_dir {run} was made by another version of this code ({diff}): check "
                        "out the commit that "
                        f"{file} names, or start another run"
                    )
                raise BadInput(
                    f"run_dir {run} was made with another config ({diff}): undo that, or start "
                    "another run"
                )
            say_rounding(changes(saved, config, "rounds"))
        elif in_use:
            if run.resolve() in Path(config.model.path).resolve().parents:
                raise BadInput(
                    f"overwrite=true would delete model.path, which lies in run_dir {run}"
                )
            # Away in one move: half a deletion would be no run
            doomed = run.with_name(f"{run.name}.overwritten")
            shutil.rmtree(doomed, ignore_errors=True)
            run.rename(doomed)
            shutil.rmtree(doomed)
            run.mkdir(parents=True)
            take_lock(run / "lock", f"run_dir {run}")
        header += "".join(f"# {key}: {value}\n" for key, value in provenance().items())
        _write_atomically(file, header + yaml.safe_dump(to_dict(config), sort_keys=False))
        for folder in ("samples", "checkpoints"):
            (run / folder).mkdir(exist_ok=True)
    except OSError as error:
        raise BadInput(f"run_dir {run} cannot be used: {error}") from error
    return run


def keep_metrics_through(run: Path, step: int) -> list[dict]:
    """Drop what metrics.jsonl says of later steps than `step` -> the rows kept."""
    return keep_rows(run / "metrics.jsonl", lambda row: row["step"] <= step)


def keep_rows(file: Path, is_kept: Callable[[dict], bool]) -> list[dict]:
    """Drop the other rows of a file of JSON lines, and a last line cut short -> the rows kept. All
    ranks call it.
    """
    return on_first_rank(lambda: _keep_rows(file, is_kept))


def _keep_rows(file: Path, is_kept: Callable[[dict], bool]) -> list[dict]:
    rows = []
    for line in file.read_text().split("\n") if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    rows = [row for row in rows if is_kept(row)]
    _write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
