"""The benchmarks run as their docstrings say, at their smallest size, and print figures that make sense."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import model
import pytest
import sample
import torch

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


STAGES = {
    *("versions", "attention", "tiny", "decoding", "resume", "options", "memory"),
    *("step_term", "decode_speed", "update_speed", "log_probs", "training_step"),
}


def run(*arguments: str) -> subprocess.Popen:
    line = [sys.executable, *arguments]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start(command: list[str], json_file: Path) -> subprocess.Popen:
    return run(f"bench/{command[0]}", *command[1:], "--json", str(json_file))


def figures_of(process: subprocess.Popen, json_file: Path) -> dict:
    words, _ = process.communicate(timeout=600)
    assert process.returncode == 0, words
    return json.loads(json_file.read_text())


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, dict]:
    """What each benchmark writes to --json; they run at the same time, for nothing is timed here."""
    folder = tmp_path_factory.mktemp("bench")
    files = {name: folder / f"{name}.json" for name in COMMANDS}
    processes = {name: start(command, files[name]) for name, command in COMMANDS.items()}
    files["gpu"], processes["gpu"] = folder / "gpu.json", run("bench/gpu.py", "--rehearse", "--out", str(folder))
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


def test_every_stage_of_the_gpu_program_is_rehearsed_on_a_cpu(figures):
    stages = figures["gpu"]["stages"]
    assert stages.keys() == STAGES
    assert {name: stage["rows"] for name, stage in stages.items() if stage["verdict"] != "PASS"} == {}
    assert all(row["words"] for stage in stages.values() for row in stage["rows"] if row["verdict"] == "SKIP")


def test_a_stage_that_raises_fails_in_one_line_and_the_next_one_runs(tmp_path):
    (tmp_path / "made_up.py").write_text(
        "from gpu_runs import check\n"
        "def raises(bench):\n    yield check('before', True)\n    raise ValueError('first\\nsecond')\n"
        "def fine(bench):\n    yield check('after', True)\n"
    )
    code = (
        f"import sys; sys.path[:0] = ['bench', {str(tmp_path)!r}]; import gpu\n"
        "gpu.STAGES = {name: gpu.Stage(f'made_up.{name}', 1, '') for name in ('raises', 'fine')}\n"
        f"sys.argv = ['gpu.py', '--rehearse', '--out', {str(tmp_path)!r}]; sys.exit(gpu.main())"
    )
    process = run("-c", code)
    words, _ = process.communicate(timeout=60)
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert process.returncode == 1, words
    assert {name: stage["verdict"] for name, stage in stages.items()} == {"raises": "FAIL", "fine": "PASS"}
    assert [row["words"] for row in stages["raises"]["rows"]] == ["", "ValueError: first"]
    assert words.splitlines()[-1].startswith("1 PASS, 1 FAIL, 0 SKIP")


def test_a_forced_length_is_exact_and_the_log_probs_are_of_what_was_written(tmp_path, monkeypatch):
    """A model that would stop at every third token; a plain pass over what it wrote gives the log-probs."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setattr(sample, "InverseCDF", sample.InverseCDF)
    common = importlib.import_module("common")
    work = replace(common.TINY, drawn=(2, 5, 8), stops=tuple(range(10, 100)))
    common.make_model(tmp_path, work)
    policy = model.load(tmp_path)
    policy.stop_ids = list(work.stops)
    common.force_lengths(work)
    prompts, keys = [[5] * work.prompt_tokens, [6] * work.prompt_tokens], [(0, 1, 0), (0, 1, 1)]
    config = sample.SampleConfig(group_size=4, max_new_tokens=work.new_tokens)
    batch = sample.sample(policy, prompts, keys, config)
    first = sample.uniforms([(*key, g) for key in keys for g in range(4)], 1)[:, 0]
    assert batch.mask.sum(1).tolist() == [work.drawn[int(3 * u)] for u in first]
    stopped = torch.isin(batch.tokens[:, batch.prompt_length :], torch.tensor(work.stops)) & batch.mask
    assert stopped.sum(1).tolist() == [1] * 8 and not batch.truncated.any()
    scored = model.batch_log_probs(policy, batch, 1.0, 1000)[0]
    assert torch.allclose(scored, batch.sampler_log_probs, atol=1e-5)


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
