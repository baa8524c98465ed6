"""Checkpoints that survive any kill.

A checkpoint folder is complete or absent: it is written under a temporary name, every file is
hashed into a manifest and flushed to disk, by the rank that wrote it, and only then is the folder
renamed; older ones are pruned after that. Loading verifies the manifest, takes the newest
checkpoint that holds, and reads tensors (safetensors) and JSON, nothing that can run code.
"""

import hashlib
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from infra.errors import BadInput, RunStopped
from infra.processes import map_over_ranks, on_first_rank, print0, rank, world_size
from infra.run_folder import (
    flush,
    fresh_folder,
    keep_metrics_through,
    provenance,
    say_rounding,
)
from infra.waiting import stage

# A file of tensors is put together in host memory, beside the tensors that come from a GPU for it
FILE_BYTES = 2**30


@contextmanager
def distributed_or_not():
    """Options of dcp: one process saves and loads alone, as meant, and needs no warning of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": not dist.is_initialized()}


def kept_buffers(model) -> dict[str, torch.Tensor]:
    """The buffers that a model has learned, by name, such as the bias of a router of experts.

    What can be made anew (rotary tables) is not among them.
    """
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def saved_tensors(model) -> dict[str, torch.Tensor]:
    """All that is saved of a model, by name; a tied weight is listed once."""
    return dict(model.named_parameters()) | kept_buffers(model)


def training_tensors(trained: dict) -> dict[str, torch.Tensor]:
    """Weights, buffers and AdamW moments by name, sharing memory with all: the same dict serves
    saving and loading.

    `trained` holds (Policy, optimizer) by name. `named_parameters` lists a tied weight once. Before
    the first optimizer step the moments are made here, as zeros.
    """
    tensors = {}
    for owner, (policy, optimizer) in trained.items():
        for name, parameter in policy.named_parameters():
            name = name_in_files(name)
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors[f"{owner}.model.{name}"] = parameter.detach()
            tensors |= {
                f"{owner}.optimizer.{moment}.{name}": state[moment]
                for moment in ("exp_avg", "exp_avg_sq")
            }
    return tensors | buffer_tensors(trained)


def name_in_files(parameter: str) -> str:
    """A parameter's name without the prefix that a critic's value head does not have."""
    return parameter.removeprefix("model.")


def buffer_tensors(trained: dict) -> dict[str, torch.Tensor]:
    return {
        f"{owner}.model.{name}": buffer
        for owner, (policy, _) in trained.items()
        for name, buffer in kept_buffers(policy.model).items()
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@stage("save")
def save_checkpoint(run: Path, step: int, trained: dict, state: dict, keep: int) -> None:
    """Write checkpoints/step_<step>, then prune to the newest `keep`. All ranks call it; each
    writes its own shard.

    `trained` holds (Policy, optimizer) by name, `state` all else that training needs, as JSON.
    Raises RunStopped if the checkpoint cannot be written (a full disk, say); what was saved before
    is untouched then.
    """
    final = run / "checkpoints" / f"step_{step:06d}"
    if final.exists():  # complete, as its name says
        return
    temporary = final.with_suffix(".tmp")
    try:
        fresh_folder(temporary)
        tensors = training_tensors(trained)
        steps = {
            name: int(next(iter(optimizer.state.values()))["step"])
            for name, (_, optimizer) in trained.items()
        }
        writer = dcp.HuggingFaceStorageWriter(
            str(temporary), fqn_to_index_mapping=file_numbers(tensors), save_distributed=True
        )
        with distributed_or_not() as options:
            dcp.save(tensors, storage_writer=writer, **options)
        manifest = hash_together(temporary)
        state = {**state, "step": step, "adam_steps": steps, "ranks": world_size(), **provenance()}
        on_first_rank(lambda: _publish(temporary, final, state, manifest, keep))
    except (OSError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        on_first_rank(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise RunStopped(
            f"the checkpoint of step {step} could not be written to {final.parent} ({reason}); "
            "older checkpoints are "
            "untouched: make room, then resume=true"
        ) from error


def file_numbers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Which file of a rank each tensor goes to, from 1: a new one is begun past FILE_BYTES of this
    rank's share.
    """
    numbers, size = {}, 0
    for name, tensor in tensors.items():
        size += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        numbers[name] = 1 + (size - 1) // FILE_BYTES if size else 1
    kept = sorted(set(numbers.values()))  # a tensor larger than a file leaves numbers out
    return {name: 1 + kept.index(number) for name, number in numbers.items()}


def hash_together(folder: Path) -> dict[str, dict]:
    """The manifest's entries of all tensors: each rank hashes the files that it wrote, and flushes
    them to disk. All ranks call it; an OSError of one is raised on all.
    """

    def own(_) -> list:
        files = sorted(folder.glob(f"shard-{rank() + 1:05d}-*"))
        try:
            entries = _entries(files)
            for file in files:
                flush(file)
            return [entries]
        except OSError as error:
            return [error]

    entries: dict[str, dict] = {}
    for part in map_over_ranks(own, list(range(world_size()))):
        if isinstance(part, OSError):
            raise part
        entries |= part
    return entries


def _entries(files: list[Path]) -> dict[str, dict]:
    return {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in files}


def _publish(temporary: Path, final: Path, state: dict, manifest: dict, keep: int) -> None:
    state_file = temporary / "state.json"
    state_file.write_text(json.dumps(state, indent=1))
    manifest = dict(sorted((manifest | _entries([state_file])).items()))
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    # A checkpoint must not outlive the rows of its steps
    metrics = final.parent.parent / "metrics.jsonl"
    for path in (
        state_file,
        temporary / "manifest.json",
        temporary,
        *([metrics] if metrics.exists() else []),
    ):
        flush(path)
    os.replace(temporary, final)
    flush(final.parent)
    for old in (*sorted(final.parent.glob("step_*[0-9]"))[:-keep], *final.parent.glob("damaged_*")):
        try:
            shutil.rmtree(old)
        except OSError as error:
            print0(f"an old checkpoint could not be deleted: {error}")


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None if nothing is. All ranks call
    it and share the hashing.
    """
    hashes, fault = on_first_rank(lambda: _promised(checkpoint))

    def faults(part: list[tuple[str, str]]) -> list[str | None]:
        return [_fault_of_file(checkpoint / name, sha256) for name, sha256 in part]

    return fault or next(filter(None, map_over_ranks(faults, hashes)), None)


def _promised(checkpoint: Path) -> tuple[list[tuple[str, str]], str | None]:
    """(name, sha256) of every file in the manifest, and what is wrong without reading them."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if "state.json" not in manifest:
            return [], "manifest.json does not list state.json"
        for name, expected in manifest.items():
            file = checkpoint / name
            if not file.exists():
                return [], f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return [], f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        return [(name, expected["sha256"]) for name, expected in manifest.items()], None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [], f"manifest.json cannot be read ({type(error).__name__})"


def _fault_of_file(file: Path, sha256: str) -> str | None:
    try:
        is_same = _sha256(file) == sha256
    except OSError as error:
        return f"{file.name} cannot be read ({error})"
    return None if is_same else f"{file.name} has another sha256 than when it was written"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that holds; damaged newer ones are named and set aside. All ranks
    call it.
    """
    for checkpoint in on_first_rank(lambda: _candidates(run / "checkpoints")):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        on_first_rank(partial(_set_aside, checkpoint, fault))
    return None


def _candidates(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first; what a kill left half-written is deleted."""
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    return sorted(folder.glob("step_*[0-9]"), reverse=True)


def _set_aside(checkpoint: Path, fault: str) -> None:
    print0(f"resume: {checkpoint} is damaged: {fault}; setting it aside and trying the one before")
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def load_checkpoint(checkpoint: Path, trained: dict) -> dict:
    """Fill models and optimizers in place, on any number of ranks -> the `state` that was saved
    beside them.
    """
    state = json.loads((checkpoint / "state.json").read_text())
    read_tensors(checkpoint, training_tensors(trained), trained)
    for name, (_, optimizer) in trained.items():
        for moments in optimizer.state.values():
            moments["step"].fill_(state["adam_steps"][name])
    return state


def load_policy(checkpoint: Path, policy) -> None:
    """Fill a policy's weights and buffers in place, and leave the rest of a checkpoint unread.
    Raises BadInput where the checkpoint is damaged.
    """
    if fault := fault_of(checkpoint):
        raise BadInput(f"{checkpoint} is damaged: {fault}")
    trained = {"policy": (policy, None)}
    weights = {
        f"policy.model.{name_in_files(name)}": parameter.detach()
        for name, parameter in policy.named_parameters()
    }
    read_tensors(checkpoint, weights | buffer_tensors(trained), trained)


def read_tensors(checkpoint: Path, tensors: dict[str, torch.Tensor], trained: dict) -> None:
    """Fill these tensors in place with those of their names."""
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    # An earlier version saved no buffers: they stay as the model that the run starts from has them
    for name in buffer_tensors(trained).keys() - reader.read_metadata().state_dict_metadata.keys():
        del tensors[name]
    with distributed_or_not() as options:
        dcp.load(tensors, storage_reader=reader, **options)


def resume(
    wanted: bool,
    folder: Path,
    trained: dict,
    start_hash: str | None,
    problems: dict[str, str] | None = None,
) -> dict:
    """The state to go on from, all that is not a tensor: of the newest checkpoint that holds, else
    of the start.

    Fills `trained`, (Policy, optimizer) by name, and cuts metrics.jsonl back to where that state
    stands. `wanted`: the user has asked to resume, and is told where there is nothing to go on
    from. Raises BadInput where the model that the run started from, by its `start_hash`, or its
    `problems`, {which: hash}, are others now.
    """
    state = {"step": 0, "position": 0, "refused_in_a_row": 0, "start_hash": start_hash}
    state |= {"before": None, "after": None, "best": None}
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        check_problems(folder, checkpoint, problems or {})
        state |= load_checkpoint(checkpoint, trained)
        if state["start_hash"] != start_hash:
            raise BadInput(
                f"the model that {folder} started from has changed on disk: bring it back, or "
                "start anew"
            )
        print0(f"resume: going on after step {state['step']}, from {checkpoint}")
        ranks = state.get("ranks", world_size())  # an earlier version did not say
        say_rounding(f"ranks: {ranks} -> {world_size()}" if ranks != world_size() else "")
    elif wanted:
        print0("resume: no valid checkpoint yet, so RL starts over")
    keep_metrics_through(folder, state["step"] if checkpoint else -1)
    return state | {"problems": problems or state.get("problems")}


def check_problems(folder: Path, checkpoint: Path, problems: dict[str, str]) -> None:
    """Raises BadInput where a run's problems, {which: hash}, are not those that it began with."""
    before = json.loads((checkpoint / "state.json").read_text()).get("problems")
    if before is None:
        print0(
            "resume: an earlier version wrote this checkpoint and kept no hash of the problems: "
            "whether they are the same could not be compared"
        )
        return
    changed = [which for which in problems if problems[which] != before.get(which)]
    if changed:
        raise BadInput(
            f"the {' and '.join(changed)} problems of {folder} have changed since it began (their "
            "texts, references, number or order): bring them back, or start another run"
        )
