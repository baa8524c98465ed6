"""For the tests that start whole runs: one warm start for all of them, and short ways to start a run and read it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import chaos

# Before torch looks: on a GPU nothing is bitwise, two processes need two of them, and CUDA outlives no fork. On two
# threads sums are rounded otherwise than on one, as the processes that tests start have.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it, and so their children

# With pytest -n 2 --dist loadfile a file goes to one process. A long one begun last would keep one process waiting for
# the other.
LONGEST = ["smollm2", "train", "ranks", "run", "relatives", "bench", "programs", "values", "sweep", "critic", "prime"]
FIRST = [f"test_{name}.py" for name in LONGEST]


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the files of the most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


# One-step chains and short responses: a run takes a second, and rewards, gradients and lengths still vary.
TINY = [
    str(chaos.ROOT / "configs" / "tiny.yaml"),
    *("data.min_steps=1", "data.max_steps=1", "data.train_size=150", "data.held_out_size=16"),
    *("sample.max_new_tokens=14", "eval.prompts=16", "train.learning_rate=3e-4"),
    *("train.warm_start_clean_steps=60", "train.warm_start_noisy_steps=10"),
]


def started(folder: Path, *arguments, ranks: int = 1, **spec):
    """A tiny run into `folder`, under way; `spec` is one of chaos.arm. Its output goes to FOLDER.log."""
    spec = {"run_dir": str(folder), **spec} if spec else None
    log = folder.with_name(f"{folder.name}.log")
    return chaos.start([*TINY, f"run_dir={folder}", *arguments], log, spec, ranks, forked=True)


def ran(folder: Path, *arguments, ranks: int = 1, **spec) -> tuple[int, str]:
    """(exit code, output) of a tiny run into `folder`."""
    code = chaos.exit_code(started(folder, *arguments, ranks=ranks, **spec), timeout=120)
    return code, folder.with_name(f"{folder.name}.log").read_text()


def finished(folder: Path, *arguments, ranks: int = 1) -> str:
    """The output of a tiny run into `folder` that must end well."""
    code, words = ran(folder, *arguments, ranks=ranks)
    assert code == 0, words
    return words


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(f.name for f in (run_dir / "checkpoints").iterdir())


def as_of(step: int, run_dir: Path, copy: Path) -> Path:
    """A copy of a finished run as it stood right after the checkpoint of `step`, metrics of later steps included."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "model")
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(json.loads((checkpoint / "state.json").read_text())["step"]) > step:
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="session")
def killed_in_step_1(tmp_path_factory) -> Path:
    """A run that has its warm start and nothing else, for it was killed while it first sampled. Copy before use."""
    folder = tmp_path_factory.mktemp("warm") / "run"
    code, words = ran(folder, on="generate", step=1, does="kill")
    assert code == -9, words
    return folder


@pytest.fixture(scope="session")
def warm(killed_in_step_1) -> str:
    """The argument that starts a run from the shared warm start."""
    return f"model.path={killed_in_step_1 / 'warm_start' / 'model'}"
