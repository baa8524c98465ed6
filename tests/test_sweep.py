"""The sweep runner: real runs that are cut and continued, and what it does with runs that fail or are still alive."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import infra.errors
import pytest
import yaml
from infra.config import read_config
from infra.errors import BadInput
from tools import sweep
from train import Config

import chaos
from conftest import TINY

ENV = os.environ | chaos.AT_ONCE
QUICK = [*TINY[1:], "train.steps=6", "eval.every=3"]


def configs(folder: Path) -> list[str]:
    for name in ("spro", "grpo"):
        (folder / f"{name}.yaml").write_text(f"base: {TINY[0]}\nalgorithm: {{advantage: {name}}}\n")
    return [str(folder / f"{name}.yaml") for name in ("spro", "grpo")]


def command(folder: Path, *more: str) -> list[str]:
    out = str(folder / "out")
    return [
        sys.executable,
        "-m",
        "tools.sweep",
        *configs(folder),
        *QUICK,
        "--out",
        out,
        "--jobs",
        "2",
        "--seeds",
        "2",
        *more,
    ]


def states(out: Path) -> dict[str, float]:
    """When each file of the runs was last written."""
    return {str(file): file.stat().st_mtime for file in out.rglob("*") if file.is_file()}


def test_a_sweep_that_is_cut_goes_on_and_a_finished_one_is_left_alone(tmp_path):
    out = tmp_path / "out"
    cut = subprocess.Popen(command(tmp_path), cwd=chaos.ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    while not any(len(file.read_text().splitlines()) > 3 for file in out.glob("*/*/metrics.jsonl")):
        assert cut.poll() is None, cut.stderr.read()
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    assert cut.wait(60) == infra.errors.EXIT_STOPPED and "the same command goes on" in cut.stderr.read()
    assert not list(out.glob("*/warm0-seed1/model"))  # the second seed had not begun, and nothing runs on

    whole = subprocess.run(command(tmp_path), cwd=chaos.ROOT, env=ENV, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    folders = sorted(str(folder.parent.relative_to(out)) for folder in out.glob("*/warm0-*/model"))
    assert folders == [f"{name}/warm0-seed{seed}" for name in ("grpo", "spro") for seed in (0, 1)]
    starts = set()
    for folder in folders:
        rows = [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text().splitlines()]
        config = yaml.safe_load((out / folder / "config.yaml").read_text())
        assert [row["step"] for row in rows] == list(range(7)) and config["algorithm"]["advantage"] in folder
        assert config["seed"] == int(folder[-1])
        starts.add(config["model"]["path"])
    assert len(starts) == 1 and Path(*starts).exists()

    before = states(out)
    again = subprocess.run(command(tmp_path), cwd=chaos.ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0 and "4 runs" in again.stdout and ", 0 of them to be made" in again.stdout
    assert states(out) == before


def planned(folder: Path, *overrides: str, pairs=((0, 0), (1, 1000))):
    return sweep.plan(sweep.rows_of(configs(folder), [*QUICK, *overrides], None), folder / "out", list(pairs))


def path_of(arguments: list[str]) -> str:
    return next(a for a in arguments if a.startswith("model.path="))


def test_configs_of_one_task_share_a_warm_start_and_each_task_has_its_own(tmp_path):
    runs, starts = planned(tmp_path)
    assert len(runs) == 4 and len(starts) == 2 == len({path_of(arguments) for arguments in runs.values()})
    assert {folder[-6:].split("-")[-1] for folder in starts} == {"seed0", "seed1"}
    for folder, arguments in runs.items():
        assert path_of(arguments).split("-seed")[1][0] == folder.split("warm")[-1][0]
    assert planned(tmp_path, "algorithm.beta=0.1")[1].keys() == starts.keys()
    assert not planned(tmp_path, "data.max_steps=2")[1].keys() & starts.keys()
    assert not planned(tmp_path, "train.warm_start_noisy_steps=11")[1].keys() & starts.keys()


def test_a_config_with_a_model_starts_from_that(tmp_path):
    runs, starts = planned(tmp_path, "model.path=mine")
    assert not starts and {path_of(arguments) for arguments in runs.values()} == {"model.path=mine"}


def test_a_mistake_is_found_before_anything_runs(monkeypatch, tmp_path):
    for wrong in ([], [TINY[0], TINY[0]], [TINY[0], "--seeds", "0"], [TINY[0], "--seeds", "1001"], [TINY[0], "beta=1"]):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "train.steps=1", *wrong, "--out", str(tmp_path / "out")])
        with pytest.raises(BadInput):
            sweep.main()
    assert not (tmp_path / "out").exists()


def stub(monkeypatch, script: str) -> None:
    """In place of train.py: a shell script, of the folder $0."""
    real = subprocess.Popen
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda c, **how: real(["sh", "-c", script, c[-1][8:]], **how))


def test_a_failed_run_is_named_with_its_last_words_and_the_rest_go_on(monkeypatch, tmp_path, capsys):
    stub(monkeypatch, "echo at work; case $0 in *2) echo error: no luck >&2; exit 2;; esac; touch $0")
    folders = {str(tmp_path / f"run{i}"): [] for i in range(5)}
    assert sweep.run_all(dict(folders), 2, "runs") == 1
    assert f"failed: {tmp_path}/run2: error: no luck (exit code 2)" in capsys.readouterr().err
    assert [Path(folder).exists() for folder in folders] == [True, True, False, True, True]


def test_never_more_runs_at_a_time_than_told(monkeypatch, tmp_path):
    stub(monkeypatch, "cd $(dirname $0); touch live$$; ls live* | wc -l >> most; sleep 0.3; rm live$$")
    assert sweep.run_all({str(tmp_path / f"run{i}"): [] for i in range(5)}, 2, "runs") == 0
    assert {int(n) for n in (tmp_path / "most").read_text().split()} == {1, 2}


def test_a_run_that_an_earlier_sweep_left_alive_is_not_started_twice(tmp_path, capsys):
    folder, arguments = tmp_path / "run", [*TINY, "resume=true", "train.warm_start_clean_steps=100000"]
    alive = sweep.start(str(folder), arguments)
    try:
        while not (folder / "lock").exists() or not (folder / "lock").read_text():
            assert alive.poll() is None, Path(f"{folder}.log").read_text()
            time.sleep(0.05)
        assert sweep.run_all({str(folder): arguments}, 1, "runs") == 1
        assert f"failed: {folder}: " in capsys.readouterr().err  # with the last line of the log that both write to
        assert f"is in use by process {alive.pid}" in Path(f"{folder}.log").read_text()
    finally:
        alive.kill()
        alive.wait()


def test_further_warm_starts_come_from_other_seeds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "plan", lambda rows, out, pairs: asked.append(pairs) or ({}, {}))
    for more in ([], ["--first-warm-start", "7"]):
        monkeypatch.setattr(sys, "argv", ["sweep", *configs(tmp_path), "--warm-starts", "2", "--seeds", "2", *more])
        sweep.main()
    assert asked == [[(0, 0), (1, 1000), (0, 1), (1, 1001)], [(7, 7000), (8, 8000), (7, 7001), (8, 8001)]]
    monkeypatch.setattr(sys, "argv", ["sweep", *configs(tmp_path), "--first-warm-start", "-1"])
    with pytest.raises(BadInput, match="--first-warm-start -1"):
        sweep.main()


def test_every_config_runs_with_every_value_from_the_same_warm_start(tmp_path):
    rows = sweep.rows_of(configs(tmp_path), ["train.steps=6"], "train.learning_rate=1e-4,3e-4")
    assert [*rows] == ["spro-1e-4", "spro-3e-4", "grpo-1e-4", "grpo-3e-4"]
    runs, warm_starts = sweep.plan(rows, tmp_path / "out", [(0, 0)])
    assert len(warm_starts) == 1
    for name, arguments in zip(rows, runs.values(), strict=True):
        config = read_config(Config, arguments, None)
        estimator, _, rate = name.partition("-")
        assert config.algorithm.advantage == estimator and config.train.learning_rate == float(rate)
        assert config.train.steps == 6
    for overrides, over in ((["seed=3"], None), ([], "seed=1,2"), ([], "run_dir=a,b"), (["resume=true"], None)):
        with pytest.raises(BadInput, match="a sweep gives every run its own"):
            sweep.rows_of(configs(tmp_path), overrides, over)
    with pytest.raises(BadInput, match=r"--over train\.learning_rate: give KEY=VALUE"):
        sweep.rows_of(configs(tmp_path), [], "train.learning_rate")
