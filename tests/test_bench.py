"""The benchmarks run as their docstrings say, at their smallest size, and print figures that make sense."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HAS_TRL = all(map(importlib.util.find_spec, ("trl", "datasets", "accelerate")))
COMMANDS = {
    "step": ["step.py", "--tiny", "--ours-only", "--pairs", "1", "--lengths", "ragged"],
    "logprob_memory": ["logprob_memory.py", "--tiny"],
    "precision": ["precision.py", "--tiny"],
    "floor": ["floor.py", "--tiny"],
    "supervised": ["supervised.py", "--tiny", "--steps", "1"],
    "scaling": ["scaling.py", "--tiny", "--steps", "1"],
}


def start(command: list[str], json_file: Path) -> subprocess.Popen:
    line = [sys.executable, f"bench/{command[0]}", *command[1:], "--json", str(json_file)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def figures_of(process: subprocess.Popen, json_file: Path) -> dict:
    words, _ = process.communicate(timeout=240)
    assert process.returncode == 0, words
    return json.loads(json_file.read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, dict]:
    """What each benchmark writes to --json; they run at the same time, for nothing is timed here."""
    folder = tmp_path_factory.mktemp("bench")
    files = {name: folder / f"{name}.json" for name in COMMANDS}
    processes = {name: start(command, files[name]) for name, command in COMMANDS.items()}
    return {name: figures_of(process, files[name]) for name, process in processes.items()}


def test_a_step_is_divided_into_stages_that_add_up(figures):
    stages = {name: row["ours"] for name, row in figures["step"]["default"]["ragged"].items() if name.endswith(", s")}
    whole = stages.pop("step, s")
    assert all(stages[f"{name}, s"] > 0 for name in ("sample", "log_probs", "advantage", "update"))
    assert sum(stages.values()) == pytest.approx(whole)


def test_scoring_by_chunks_gives_the_values_and_gradients_of_the_plain_way(figures):
    errors = figures["logprob_memory"]["errors"]
    assert errors["log-prob"] < 1e-5 and errors["entropy, relative"] < 1e-5 and errors["gradient, relative"] < 1e-4


def test_the_finer_the_type_the_less_noise_in_a_log_ratio(figures):
    noise = {name: row["per token"] for name, row in figures["precision"].items()}
    assert noise["float32"] < noise["TF32"] / 10 < noise["bfloat16"] / 30 < noise["true"] / 2


def test_no_pass_exceeds_the_measured_peak(figures):
    passes = figures["floor"]["passes"]
    assert passes.keys() == {"forward", "forward + backward", "decoding"}
    assert all(0 < row["share of matmul"] < 1 for row in passes.values())


def test_full_responses_are_as_long_as_they_were_forced_to_be(figures):
    assert figures["scaling"]["tiny"]["tokens"] == 2 * 2 * 8


def test_a_supervised_step_has_the_loss_of_a_plain_hugging_face_loop_step_for_step(figures):
    losses = figures["supervised"]["losses"]
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-5) and len(losses["ours"]) == 2


def test_step_names_the_pip_command_where_trl_is_missing(tmp_path):
    if HAS_TRL:
        pytest.skip("TRL is installed")
    process = start(["step.py", "--tiny"], tmp_path / "figures.json")
    words, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "pip install trl" in words and len(words.splitlines()) == 1


def test_both_sides_sample_the_same_number_of_tokens(tmp_path):
    if not HAS_TRL:
        pytest.skip("TRL is not installed: pip install trl datasets accelerate")
    file = tmp_path / "figures.json"
    found = figures_of(start(["step.py", "--tiny", "--pairs", "1"], file), file)  # a difference ends it with an error
    assert found["ratios"].keys() == {"ragged", "full", "memory"}
