"""The report, on made-up runs whose numbers are known: every cell against a sum written out, and what it leaves out."""

import io
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import infra.config
import numpy as np
import pytest
import train
import yaml
from tools import report

import chaos

STEPS = 10


def made(folder: Path, accuracy, warm: str = "", seed: int = 0, rows: int = STEPS + 1, **algorithm) -> Path:
    """A run folder of `rows` rows; `accuracy` is a function of the step, evaluated at every fifth."""
    config = infra.config.to_dict(train.Config(seed=seed, run_dir=str(folder)))
    config["train"]["steps"], config["model"]["path"] = STEPS, warm
    config["algorithm"] |= {"advantage": "grpo", **algorithm}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(rows):
            row = {"step": step, "entropy": 0.1 / (step + 1), "response_length/mean": 50.0, "time/step": 2.0}
            row["tokens_per_second"] = 50_000.0 + seed  # 100,000 a step, and 2 more for each seed
            row = row if step else {"step": 0}
            if step % 5 == 0:
                row |= {"eval/accuracy": accuracy(step), "eval/response_length": 60.0 - step}
                row |= {"eval/response_length_right": 50.0 - 2 * step}
            out.write(json.dumps(row) + "\n")
    return folder


def swept(out: Path, gain: float = 0.1) -> Path:
    """A sweep of grpo and spro, three seeds from each of two warm starts; spro is better by `gain` and noise."""
    for warm in (0, 1):
        for i in range(3):
            start, seed = f"{out}/warm_starts/abc-seed{warm}/warm_start/model", 1000 * warm + i
            for name, more in (("grpo", 0.0), ("spro", gain + 0.01 * (i - 1) + 0.02 * warm)):
                folder = out / name / f"warm{warm}-seed{seed}"
                made(
                    folder,
                    lambda t, m=more, i=i: 0.4 + (0.03 * t + 0.01 * i + m if t else 0),
                    start,
                    seed,
                    advantage=name,
                )
    made(out / "warm_starts" / "abc-seed0", lambda t: 0.0)
    return out


def reported(*arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the script, run in this process."""
    out, words, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(words):
        patch.setattr(sys, "argv", ["report", *map(str, arguments)])
        try:
            report.main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), words.getvalue()


def cells(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_every_cell_is_the_sum_written_out(tmp_path):
    code, text, words = reported(swept(tmp_path / "out"), "--threshold", "0.6")
    assert (code, words) == (0, "")
    rows = cells(text)
    assert list(rows) == ["grpo", "spro"]  # the baseline first, and no warm start among them
    final = [0.7 + 0.01 * i for i in (0, 1, 2)] * 2
    area = [0.625 + 0.01 * i for i in (0, 1, 2)] * 2
    crossing = [5 + 5 * (0.05 - 0.01 * i) / 0.15 for i in (0, 1, 2)] * 2  # from .55 + .01 i at 5 to .70 + .01 i at 10

    def spread(values, digits):
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    entropy = statistics.mean(0.1 / (step + 1) for step in range(6, 11))
    tokens = [(1e6 + 20 * seed) / 1e3 for seed in (0, 1, 2, 1000, 1001, 1002)]
    # Accuracy rises by .15 from step 5 to 10; the run of seed 0 has the fewest tokens, and ends at them
    equal = [last - 0.15 * (1 - 1000 / all_of_it) * 2 for last, all_of_it in zip(final, tokens, strict=True)]
    assert rows["grpo"] == [
        *("6", spread(final, 3), "-", spread(area, 3), "-", spread(crossing, 1), "-"),
        *(f"{entropy:.4f} ± 0.0000", "50.0 ± 0.0", "30.0 ± 0.0"),
        *(spread(tokens, 0), spread(equal, 3), "20 ± 0"),
    ]
    assert "| k tokens | at 1000 k |" in text
    gains = {w: [0.1 + 0.01 * (i - 1) + 0.02 * w for i in range(3)] for w in (0, 1)}
    means = [statistics.mean(gains[w]) for w in gains]
    variance = statistics.pvariance(means) / 2 + sum(statistics.pvariance(gains[w]) / 3 for w in gains) / 4
    width = 2.571 * math.sqrt(variance * 6 / 5)  # Student's t at 5 degrees of freedom
    assert rows["spro"][2] == f"+0.110 [{0.11 - width:+.3f}, {0.11 + width:+.3f}]"
    theirs = [5 * (0.2 / (0.15 + 0.01 * i + gain)) for g in gains.values() for i, gain in enumerate(g)]
    assert rows["spro"][6] == f"{sum(crossing) / sum(theirs):.2f}"
    assert "- spro: algorithm.advantage: grpo -> spro" in text


def test_a_threshold_that_some_runs_never_reach_says_how_many_did(tmp_path):
    for seed, top in enumerate((0.9, 0.9, 0.5)):
        made(tmp_path / f"run{seed}", lambda t, top=top: top * t / STEPS, seed=seed)
    assert cells(reported(tmp_path)[1])["grpo"][5] == f"{10 * 0.8 / 0.9:.1f} ± 0.0 (2 of 3)"
    assert cells(reported(tmp_path, "--threshold", "0.95")[1])["grpo"][5] == "- (0 of 3)"
    assert math.isnan(report.steps_to(0.5, [(0, 0.1), (5, 0.3)])) and report.steps_to(0.5, [(0, 0.6), (5, 0.3)]) == 0


def rate(W: int, S: int, effect: float, times: int = 1000) -> float:
    """How often the interval holds the true mean difference, 0.3."""
    random, held = np.random.default_rng(1), 0
    for _ in range(times):
        pairs = 0.3 + random.standard_normal((W, S)) + effect * random.standard_normal((W, 1))
        _, low, high = report.interval({str(w): list(row) for w, row in enumerate(pairs)})
        held += low <= 0.3 <= high
    return held / times


@pytest.mark.parametrize(
    "W, S, effect, stated",
    [(1, 3, 0, 0.95), (1, 10, 0, 0.95), (2, 5, 0, 0.97), (2, 5, 0.5, 0.91), (5, 2, 0.5, 0.96), (10, 1, 0.5, 0.94)],
)
def test_the_interval_covers_at_the_rate_that_its_docstring_states(W, S, effect, stated):
    assert rate(W, S, effect) == pytest.approx(stated, abs=0.025)  # a standard error of 0.007 on both sides


def test_the_interval_of_one_warm_start_is_students_and_the_same_runs_differ_by_nothing():
    d = [0.1, 0.4, 0.2, 0.2]
    half = 3.182 * statistics.stdev(d) / 2
    assert report.interval({"a": d}) == pytest.approx((0.225, 0.225 - half, 0.225 + half))
    assert report.interval({str(i): [x] for i, x in enumerate(d)}) == pytest.approx((0.225, 0.225 - half, 0.225 + half))
    assert report.interval({"a": [0.0] * 5}) == (0, 0, 0) and report.interval({"a": [0.3]}) is None
    for df, exact in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)):
        assert report.t_quantile(df) == pytest.approx(exact, rel=0.005)


def test_runs_are_paired_by_warm_start_and_seed_also_where_the_baseline_made_its_own(tmp_path):
    for seed in (0, 1):
        made(tmp_path / f"spro{seed}", lambda t, s=seed: 0.5 + 0.2 * s, seed=seed, advantage="spro")
        start = f"{tmp_path}/spro{seed}/warm_start/model"
        made(tmp_path / f"grpo{seed}", lambda t, s=seed: 0.4 + 0.2 * s, start, seed)
    made(tmp_path / "grpo7", lambda t: 0.0, "elsewhere/warm_start/model", 0)  # same seed, another warm start: no twin
    assert cells(reported(tmp_path)[1])["spro"][2] == "+0.100 [+0.100, +0.100]"
    assert cells(reported(tmp_path, "--baseline", "spro")[1])["grpo"][2] == "-0.100 [-0.100, -0.100]"


def test_groups_are_named_by_what_differs_and_never_merged_when_something_does(tmp_path):
    made(tmp_path / "a", lambda t: 0.5)
    made(tmp_path / "b", lambda t: 0.5, seed=1)
    made(tmp_path / "c", lambda t: 0.5, advantage="spro")
    made(tmp_path / "d", lambda t: 0.5, advantage="spro", beta=0.1)
    rows = cells(reported(tmp_path)[1])
    assert {name: row[0] for name, row in rows.items()} == {"grpo": "2", "spro, beta 0.05": "1", "spro, beta 0.1": "1"}
    made(tmp_path / "sweep" / "long_config" / "warm0-seed0", lambda t: 0.5)
    made(tmp_path / "sweep" / "base" / "warm0-seed0", lambda t: 0.5)
    assert {"long_config", "base", "grpo"} < cells(reported(tmp_path)[1]).keys()


def test_a_broken_run_is_named_with_file_and_line_and_the_rest_are_reported(tmp_path):
    made(tmp_path / "good", lambda t: 0.5)
    for name, damage in (
        ("broken", lambda lines: [*lines[:3], '{"st', *lines[3:]]),
        ("short", lambda lines: lines[:2] + lines[3:]),
    ):
        file = made(tmp_path / name, lambda t: 0.9, seed=1) / "metrics.jsonl"
        file.write_text("\n".join(damage(file.read_text().splitlines())) + "\n")
    made(tmp_path / "unfinished", lambda t: 0.9, seed=2, rows=7)
    with (made(tmp_path / "alive", lambda t: 0.9, seed=3, rows=7) / "metrics.jsonl").open("a") as out:
        out.write('{"step": 7, "entr')
    copy = made(tmp_path / "copy", lambda t: 0.5)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.yaml").write_text("[1")
    code, text, words = reported(tmp_path)
    assert code == 0 and cells(text)["grpo"][:2] == ["1 (+5 left out)", "0.500"]
    assert f"{tmp_path}/broken/metrics.jsonl:4: not a line of JSON" in words
    assert f"{tmp_path}/short/metrics.jsonl:3: not the row of step 2" in words
    for name in ("unfinished", "alive"):
        assert f"{tmp_path}/{name}: unfinished, at step 6 of 10" in words
    assert f"{copy.with_name('good')}: the same config, warm start and seed as {copy}" in words
    assert f"{tmp_path}/odd/config.yaml: " in words and "Traceback" not in words


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_kind_24_a_line_separator_inside_a_metric_is_no_end_of_its_row(separator, tmp_path):
    file = made(tmp_path / "run", lambda t: 0.5) / "metrics.jsonl"
    rows = [json.loads(line) | {"note": f"a{separator}b"} for line in file.read_text().split("\n")[:-1]]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert report.read_rows(file) == (rows, "")
    with file.open("a") as out:
        out.write('{"step": 11, "entr')  # is being written
    assert report.read_rows(file) == (rows, "")


def test_a_method_whose_runs_all_broke_off_still_has_a_row(tmp_path):
    made(tmp_path / "a", lambda t: 0.5)
    made(tmp_path / "b", lambda t: 0.5, advantage="spro", rows=3)
    assert cells(reported(tmp_path)[1])["spro"][:2] == ["0 (+1 left out)", "-"]


def test_bad_input_is_one_line_and_code_2(tmp_path):
    made(tmp_path / "a", lambda t: 0.5)
    made(tmp_path / "b" / "c", lambda t: 0.5, rows=3)
    for arguments in ([tmp_path / "none"], [tmp_path / "a", "--baseline", "ppo"], [tmp_path / "b"]):
        code, _, words = reported(*arguments)
        assert code == 2 and words.splitlines()[-1].startswith("error: ") and "Traceback" not in words


def test_figures_are_drawn_of_what_there_is_and_many_groups_are_divided(tmp_path):
    pytest.importorskip("matplotlib")
    out = swept(tmp_path / "out")
    code, text, _ = reported(out, "--figures", tmp_path / "figures", "--output", tmp_path / "deep" / "table.md")
    assert code == 0 and (tmp_path / "deep" / "table.md").read_text() == text
    names = {"accuracy-steps", "accuracy-seconds", "accuracy-tokens", "entropy", "length"}  # there are no gradient/*
    assert {f.name for f in (tmp_path / "figures").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    runs = [report.read_run(folder) for folder in report.find_runs([out / "spro"])]
    middle = report.curve(runs, "eval/accuracy", "response tokens sampled")[1]
    accuracies = [0.55 + 0.01 * i + 0.1 + 0.01 * (i - 1) + 0.02 * w for w in (0, 1) for i in range(3)]
    assert middle == pytest.approx(
        [
            statistics.mean(5 * (100_000 + 2 * run.seed) for run in runs),
            statistics.mean(accuracies),
            statistics.stdev(accuracies),
        ]
    )
    groups = report.grouped(runs)
    many = {f"method {i}": groups["spro"] for i in range(10)}
    assert any("entropy-2.png" in file for file in report.draw(many, tmp_path / "many"))


def test_a_sparkline_rises_with_its_values_and_fits():
    assert report.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert report.sparkline([0, 0, 7, 7], 2) == "▁█" and report.sparkline([3, 3], 9) == "▄▄"
    assert report.sparkline([], 5) == report.sparkline([math.nan], 5) == ""


def test_the_live_view_shows_what_runs_and_ends_quietly(tmp_path):
    made(tmp_path / "done", lambda t: 0.5)
    made(tmp_path / "alive", lambda t: 0.1 * t, seed=1, rows=7)
    made(tmp_path / "new", lambda t: 0.5, seed=2, rows=0)
    runs = [report.read_run(folder) for folder in report.find_runs([tmp_path])]
    lines = report.view(runs, 100, 40).splitlines()
    assert lines[0].startswith("3 runs, 1 finished") and len(lines) == 5 and max(map(len, lines)) <= 100
    assert "alive" in lines[1] and "6/10" in lines[1] and "accuracy 0.5" in lines[1] and "accuracy ▁█" in lines[2]
    assert "warming up" in lines[3]
    command = [sys.executable, "-m", "tools.report", str(tmp_path), "--watch", "0.2"]
    watching = subprocess.Popen(command, cwd=chaos.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "3 runs" in watching.stdout.readline()
    time.sleep(0.3)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(10) == 0 and watching.stderr.read() == ""


def test_accuracy_at_equal_tokens_counts_continuations_and_what_is_sampled_before_rl(tmp_path):
    made(tmp_path / "plain", lambda t: 0.1 * t / STEPS)
    costly = made(tmp_path / "costly", lambda t: 0.1 * t / STEPS, advantage="vine")
    rows = [json.loads(line) for line in (costly / "metrics.jsonl").read_text().splitlines()]
    (costly / "metrics.jsonl").write_text(
        "".join(json.dumps(row | ({"values/tokens": 100_000} if row["step"] else {})) + "\n" for row in rows)
    )
    early = made(tmp_path / "early", lambda t: 0.1 * t / STEPS, advantage="a_star")
    (early / "v_star.jsonl").write_text('{"tokens": 100000}\n{"tokens": 400000}\n')
    rows = cells(reported(tmp_path)[1])
    assert [rows[name][10:12] for name in ("grpo", "vine", "a_star")] == [
        ["1000", "0.100"],
        ["2000", "0.050"],
        ["1500", "0.050"],
    ]
    assert math.isnan(report.accuracy_at(400_000, report.read_run(early)))
