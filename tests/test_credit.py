"""The ruler for credit: its statistics against all pairs and ranks written out, its table against sums done here."""

import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys

import infra.config
import numpy as np
import pytest
import torch
import yaml
from infra.errors import BadInput
from tools import credit, inspector, report
from tools.credit_models import RunModels

import chaos
from conftest import finished
from test_inspect import LINES, G, run_of, terms


def drawn(seed: int, n: int, kinds: int) -> list[float]:
    """Numbers with ties."""
    return [round(x, 1) for x in random.Random(seed).choices([k / 10 for k in range(kinds)], k=n)]


def auc_by_pairs(scores, right) -> float:
    pairs = [(a, b) for (a, x), (b, y) in itertools.product(zip(scores, right, strict=True), repeat=2) if x and not y]
    return statistics.fmean((a > b) + (a == b) / 2 for a, b in pairs) if pairs else math.nan


def ranks(xs) -> list[float]:
    """1 for the smallest; ties have the mean of the ranks that they take up."""
    return [1 + sum(y < x for y in xs) + (sum(y == x for y in xs) - 1) / 2 for x in xs]


def spearman_by_ranks(xs, ys) -> float:
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        return math.nan
    return statistics.correlation(ranks(xs), ranks(ys))


@pytest.mark.parametrize("kinds", [1, 2, 4, 50])
@pytest.mark.parametrize("seed", range(3))
def test_auc_is_the_share_of_pairs_in_order_with_ties_as_half(seed, kinds):
    scores, right = drawn(seed, 30, kinds), [x > 0 for x in drawn(seed + 9, 30, 2)]
    where, truth = credit.places(scores), np.array(right)
    assert credit.auc(where, truth, np.ones(30)) == pytest.approx(auc_by_pairs(scores, right))
    times = [i % 4 for i in range(30)]  # how often each counts
    repeated = [[x for x, n in zip(xs, times, strict=True) for _ in range(n)] for xs in (scores, right)]
    assert credit.auc(where, truth, np.array(times, dtype=float)) == pytest.approx(auc_by_pairs(*repeated))
    assert math.isnan(credit.auc(where, np.ones(30, dtype=bool), np.ones(30)))


@pytest.mark.parametrize("kinds", [1, 2, 4, 50])
@pytest.mark.parametrize("seed", range(3))
def test_spearman_is_the_correlation_of_mean_ranks(seed, kinds):
    xs, ys = drawn(seed, 30, kinds), drawn(seed + 9, 30, 5)
    where = credit.places(xs), credit.places(ys)
    expected = pytest.approx(spearman_by_ranks(xs, ys), nan_ok=True)
    assert credit.spearman(*where, np.ones(30)) == expected
    times = [i % 4 for i in range(30)]
    repeated = [[x for x, n in zip(zs, times, strict=True) for _ in range(n)] for zs in (xs, ys)]
    expected = pytest.approx(spearman_by_ranks(*repeated), nan_ok=True)
    assert credit.spearman(*where, np.array(times, dtype=float)) == expected


def test_the_bootstrap_draws_whole_groups_with_replacement_and_the_same_every_time():
    clusters = np.array([4, 4, 7, 9, 9, 9])
    draws = credit.resampled(clusters)
    assert draws.shape == (credit.RESAMPLES, 6) and (draws == credit.resampled(clusters)).all()
    assert (draws[:, 0] == draws[:, 1]).all() and (draws[:, 3:] == draws[:, 3:4]).all()
    counts = draws[:, [0, 2, 3]]
    assert (counts.sum(1) == 3).all()
    drawn = {row: (counts == row).all(1).mean() for row in set(map(tuple, counts))}
    for row in itertools.product(range(4), repeat=3):  # the multinomial's probabilities
        if sum(row) == 3:
            chance = math.factorial(3) / math.prod(map(math.factorial, row)) / 27
            assert drawn.get(row, 0.0) == pytest.approx(chance, abs=5 * math.sqrt(chance / len(counts)))


def test_the_interval_holds_95_percent_of_the_draws_and_a_draw_without_a_value_is_left_out():
    weights = np.arange(201.0)[:, None] * np.ones(3)
    assert credit.with_interval(lambda w: w[0], weights) == (1.0, 5.0, 195.0)
    assert credit.with_interval(lambda w: math.nan if w[0] > 100 else w[0], weights) == (1.0, 2.5, 97.5)
    assert all(map(math.isnan, credit.with_interval(lambda w: math.nan, weights)))


# --- the table ----------------------------------------------------------------------------------------------------


def traced(lines: list[dict], seed: int) -> list[dict]:
    """Dumped lines of learned groups with steps of 1 to 3 tokens: verified ones, and ones with Monte-Carlo values."""
    draw, out = random.Random(seed), []
    for line in lines:
        n = len(line["token_text"])
        numbers = [k for k in range(n) for _ in range(draw.randint(1, 3))][:n]
        first_wrong = draw.randint(0, 3)
        labels = [1 if k < first_wrong else 0 if k == first_wrong else -1 for k in numbers]
        values = [round(draw.random(), 1) for _ in range(n + 1)]
        line = line | {"step_label": labels, "trace_id": numbers, "step_id": numbers}
        line |= {"value_before": [values[k] for k in numbers], "value_after": [values[k + 1] for k in numbers]}
        line |= {name: [-draw.expovariate(1) for _ in range(n)] for name in ("process_log_prob", "answer_log_prob")}
        out.append(line)
    return out


def scores_by_hand(line: dict, values: dict, tokens: list[int]) -> dict[str, float]:
    def total(name, minus=None):
        return sum(line[name][t] - (line[minus][t] if minus else 0) for t in tokens)

    return {
        "log-ratio": sum(values["log_ratio"][t] for t in tokens),
        "CPR": values["cpr"][tokens[-1]],
        "MSA": values["msa"][tokens[-1]],
        "log-prob": total("log_prob"),
        "entropy": -max(line["entropy"][t] for t in tokens),
        "step term": statistics.fmean(values["advantage"][t] - values["outcome"][t] for t in tokens),
        "advantage": statistics.fmean(values["advantage"][t] for t in tokens),
        "PRM": total("process_log_prob", "ref_log_prob"),
        "answer": total("answer_log_prob", "log_prob"),
    }


def steps_by_hand(lines: list[dict]) -> list[tuple[dict, int, float, dict]]:
    """(scores, label, Monte-Carlo advantage, its response) of every step of a dump."""
    found = []
    for start in range(0, len(lines), G):
        siblings = lines[start : start + G]
        for line, values in zip(siblings, terms(siblings), strict=True):
            for number in sorted(set(line["trace_id"])):
                tokens = [t for t, k in enumerate(line["trace_id"]) if k == number]
                gain = line["value_after"][tokens[0]] - line["value_before"][tokens[0]]
                found.append((scores_by_hand(line, values, tokens), line["step_label"][tokens[0]], gain, line))
    return found


def cells_of(text: str) -> list[dict[str, str]]:
    """The rows of every table as column -> cell."""
    found, names = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            names = None
        elif names is None:
            names = cells
        elif "---" not in cells[0]:
            found.append(dict(zip(names, cells, strict=True)))
    return found


def complete(folder, lines, seed: int, step: int = 3, **algorithm):
    """A run folder that tools.report reads too."""
    run_of(folder, lines, step, **algorithm)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"seed": seed, "train": {"steps": step}}))
    return folder


def within_by_hand(lines: list[dict], name: str) -> float:
    """The chance that a right step has a larger score than the wrong one of its own response, ties half."""
    won = pairs = 0
    for start in range(0, len(lines), G):
        for line in lines[start : start + G]:
            siblings = lines[start : start + G]
            scored = [step for step in steps_by_hand(siblings) if step[3] is line]
            for wrong, label, _, _ in scored:
                for right, other, _, _ in scored:
                    if (label, other) == (0, 1):
                        pairs += 1
                        won += (right[name] > wrong[name]) + 0.5 * (right[name] == wrong[name])
    return won / pairs


def test_every_cell_is_the_statistic_of_the_steps_of_all_seeds(tmp_path):
    dumps = {seed: traced(LINES[G:], seed) for seed in range(2)}
    for seed, lines in dumps.items():
        complete(tmp_path / f"seed{seed}", [*LINES[:G], *lines], seed)
    complete(tmp_path / "other", traced(LINES[G:], 7), 0, advantage="spro_local")
    text = credit.tables(credit.gathered([tmp_path], None), None)
    assert re.findall(r"^(\S+), (\d) runs?: (\w+)", text, re.M) == [
        (name, n, kind) for name, n in (("spro_local", "1"), ("spro", "2")) for kind in ("AUC", "AUC", "Spearman")
    ]
    overall, within, spearman = cells_of(text)[3:]
    steps = [step for lines in dumps.values() for step in steps_by_hand(lines)]
    judged = [(scores, label == 1) for scores, label, *_ in steps if label >= 0]
    right = [is_right for _, is_right in judged]
    assert overall["steps"] == f"{sum(right)} right, {len(right) - sum(right)} wrong" and overall["step"] == "3"
    assert spearman["steps"] == str(len(steps))
    for row in (overall, within, spearman):
        assert [*row] == ["step", "steps", *credit.SCORERS]
    both = [line for lines in dumps.values() for line in lines]
    for name in credit.SCORERS:
        expected = {
            "overall": auc_by_pairs([scores[name] for scores, _ in judged], right),
            "within": within_by_hand(both, name),
            "spearman": spearman_by_ranks([scores[name] for scores, *_ in steps], [gain for _, _, gain, _ in steps]),
        }
        for kind, row in (("overall", overall), ("within", within), ("spearman", spearman)):
            value, low, high = map(float, re.findall(r"-?[\d.]+", row[name]))
            assert value == pytest.approx(expected[kind], abs=0.006), (kind, name)
            assert low <= value <= high and low < high


def test_the_last_row_is_of_all_steps_but_the_first_together(tmp_path):
    dumps = {step: traced(LINES[G:], step) for step in (1, 10, 20)}
    for step, lines in dumps.items():
        complete(tmp_path / "run", lines, 0, step=step)
    rows = cells_of(credit.tables(credit.gathered([tmp_path], None), None))
    assert [row["step"] for row in rows] == ["1", "10", "20", "later"] * 3
    steps = [step for number in (10, 20) for step in steps_by_hand(dumps[number])]
    judged = [(scores["MSA"], label == 1) for scores, label, *_ in steps if label >= 0]
    expected = auc_by_pairs(*zip(*judged, strict=True))
    value, low, high = map(float, re.findall(r"-?[\d.]+", rows[3]["MSA"]))
    assert value == pytest.approx(expected, abs=0.006) and low < value < high
    # Groups of one number at two steps are two groups of other prompts
    found = credit.gathered([tmp_path], None)["spro, 1 run"]["auc"]
    assert len(set(credit.later(found).groups)) == len(set(found[10].groups)) + len(set(found[20].groups))


def test_an_auc_within_responses_does_not_see_which_response_is_wrong(tmp_path):
    """A score that is the same all over a response tells wrong responses from right ones, and no place in them."""
    lines = traced(LINES[G:], 0)
    for number, line in enumerate(lines):
        steps = len(line["log_prob"])
        line["log_prob"] = [-1.0 if number % 2 else -2.0] * steps
        line["trace_id"] = line["step_id"] = list(range(steps))
        line["step_label"] = [1] * steps if number % 2 else [1] + [0] + [-1] * (steps - 2)
    complete(tmp_path / "run", lines, 0)
    rows = cells_of(credit.tables(credit.gathered([tmp_path], None), None))
    assert float(rows[0]["log-prob"][:4]) > 0.8
    assert "log-prob" not in rows[1]  # equal everywhere, as a scorer that says nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_one_advantage_tie_however_long_they_are(dtype):
    """The mean of three times 0.1 is not that of seven times 0.1, to the last bit."""
    steps = [torch.full((tokens,), 0.1, dtype=dtype) for tokens in range(1, 200)]
    assert len({step.mean().item() for step in steps}) > 1
    for scorer in ("advantage", "step term"):
        _, mean = credit.SCORERS[scorer]
        assert len({mean(credit.rounded(step)).item() for step in steps}) == 1


def test_a_scorer_that_is_not_dumped_or_silent_has_no_column(tmp_path):
    lines = traced(LINES[G:], 0)
    outcomes = [values["outcome"] for start in range(0, len(lines), G) for values in terms(lines[start : start + G])]
    for line, outcome in zip(lines, outcomes, strict=True):
        line["advantage"] = outcome
        for name in ("ref_log_prob", "process_log_prob", "answer_log_prob", "value_before", "value_after"):
            del line[name]
    complete(tmp_path / "run", lines, 0, advantage="grpo")
    overall, within = cells_of(credit.tables(credit.gathered([tmp_path], None), None))
    assert [*overall] == ["step", "steps", "log-prob", "entropy", "advantage"]
    assert [*within] == ["step", "steps", "log-prob", "entropy"]  # GRPO's advantage is one number for a response


def test_rounding_of_the_dumped_advantages_is_no_step_term(tmp_path):
    """At the first step policy and reference are equal, and training's advantages are float32."""
    first = traced(LINES[G:], 0)
    for line in first:
        line["ref_log_prob"] = line["log_prob"]
    for start in range(0, len(first), G):
        for line, values in zip(first[start : start + G], terms(first[start : start + G]), strict=True):
            line["advantage"] = np.float32(values["outcome"]).tolist()
    complete(tmp_path / "run", first, 0, step=1)
    complete(tmp_path / "run", traced(LINES[G:], 1), 0, step=10)
    rows = cells_of(credit.tables(credit.gathered([tmp_path], None), None))
    assert [row["step"] for row in rows] == ["1", "10"] * 3
    for row in (rows[0], rows[2]):
        assert all(row[name] == "0.50 [0.50, 0.50]" for name in ("log-ratio", "CPR", "MSA", "step term"))
    assert rows[1]["step term"] != "0.50 [0.50, 0.50]" and rows[4]["step term"] == "-"


def test_every_table_is_drawn_and_the_step_terms_of_several_configs_together(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for step in (1, 10):
        complete(tmp_path / "run", traced(LINES[G:], step), 0, step=step)
    monkeypatch.setattr(credit, "RESAMPLES", 20)  # for speed: what is drawn is not looked at
    arguments = ["credit", "--out", str(tmp_path / "out"), str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", arguments)
    credit.main()
    of_one = {f"{kind}-spro-1-run.svg" for kind in ("auc", "within", "spearman")}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*of_one, "credit.md"}
    svg = (tmp_path / "out" / "auc-spro-1-run.svg").read_text()
    assert all(f">{name}<" in svg for name in credit.SCORERS)
    assert (tmp_path / "out" / "credit.md").read_text() == capsys.readouterr().out

    complete(tmp_path / "other", traced(LINES[G:], 7), 0, step=20, advantage="spro_local")
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "other")])
    credit.main()
    drawn = {file.name for file in (tmp_path / "out").iterdir()} - of_one - {"credit.md"}
    of_other = {f"{kind}-spro_local-1-run.svg" for kind in ("auc", "within", "spearman")}
    assert drawn == {*of_other, "auc-step-term.svg", "within-step-term.svg"}
    svg = (tmp_path / "out" / "auc-step-term.svg").read_text()
    assert ">spro, 1 run<" in svg and ">spro_local, 1 run<" in svg


def test_more_step_terms_than_a_figure_has_styles_are_drawn_in_several(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"method {k}, 1 run" for k in range(len(report.STYLES) + 2)]
    credit.draw_step_terms("auc", {name: {1: (0.5, 0.4, 0.6), 10: (0.6, 0.5, 0.7)} for name in names}, tmp_path)
    drawn = [(tmp_path / file).read_text() for file in ("auc-step-term.svg", "auc-step-term-2.svg")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auc-step-term-2.svg", "auc-step-term.svg"]
    assert all(sum(f">{name}<" in svg for svg in drawn) == 1 for name in names)


def test_runs_that_tell_nothing_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no run in "):
        credit.gathered([tmp_path], None)
    complete(tmp_path / "run", LINES, 0)
    with pytest.raises(BadInput, match="no dump of these runs has a step_label or a value_after"):
        credit.gathered([tmp_path], None)


def test_a_runs_dumps_are_measured_from_the_command_line(tmp_path, warm):
    finished(tmp_path / "run", warm, "train.steps=2", "train.dump_every=1", "algorithm.advantage=oracle")
    script = [sys.executable, "-m", "tools.credit", str(tmp_path / "run")]
    done = subprocess.run(script, cwd=chaos.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("oracle, 1 run: AUC") == 2
        and [row["step"] for row in cells_of(done.stdout)] == ["1", "2"] * 2
    )


# --- with the runs' models ----------------------------------------------------------------------------------------

ALL_KEPT = ["train.steps=3", "train.dump_every=1", "train.save_every=1", "train.keep_checkpoints=9"]


def dumped(folder, step: int) -> list[dict]:
    """The lines of a step's responses that were learned from."""
    text = (folder / "samples" / f"step_{step:06d}.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "advantage" in line]


def completed(folder, continuations: int, step: int, *without: str) -> list[dict]:
    """A step's lines as the run's models complete them, after some of their keys have been taken out."""
    _, _, groups = inspector.read_step(folder, step)
    lines = [line for siblings in groups.values() for line in siblings if "advantage" in line]
    for line in lines:
        for key in without:
            del line[key]
    RunModels(folder).complete(step, lines, continuations)
    return lines


@pytest.fixture(scope="module")
def vine(tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("credit") / "vine"
    finished(folder, warm, *ALL_KEPT, "algorithm.advantage=vine", "values.continuations=3", "algorithm.line_end=;")
    return folder


@pytest.mark.parametrize("step", [1, 2, 3])
def test_values_made_afterwards_are_those_that_training_had(vine, step):
    """The policy that wrote the step, the same luck: bit for bit what the run itself found."""
    lines = completed(vine, 3, step, "value_before", "value_after", "step_id")
    expected = dumped(vine, step)
    assert lines
    for key in ("value_before", "value_after", "step_id"):
        assert [line[key].tolist() for line in lines] == [line[key] for line in expected], key


def test_steps_verified_afterwards_are_those_that_training_had(vine):
    """As for dumps of a version that did not verify steps."""
    lines = completed(vine, 3, 2, "step_label", "trace_id")
    expected = dumped(vine, 2)
    for key in ("step_label", "trace_id"):
        assert [line[key].tolist() for line in lines] == [line[key] for line in expected]
    assert {0, 1} <= {label for line in expected for label in line["step_label"]}


def test_log_probs_made_afterwards_are_those_that_training_had(tmp_path, warm):
    finished(tmp_path / "spro", warm, *ALL_KEPT)
    for step in (1, 3):
        lines = completed(tmp_path / "spro", 1, step, "ref_log_prob")
        assert lines
        for line, expected in zip(lines, dumped(tmp_path / "spro", step), strict=True):
            assert line["ref_log_prob"].tolist() == pytest.approx(expected["ref_log_prob"], abs=1e-5)
    finished(tmp_path / "oppo", warm, *ALL_KEPT, "algorithm.advantage=oppo")
    lines = completed(tmp_path / "oppo", 1, 3, "answer_log_prob")
    assert lines
    for line, expected in zip(lines, dumped(tmp_path / "oppo", 3), strict=True):
        ratio = [a - b for a, b in zip(expected["answer_log_prob"], expected["log_prob"], strict=True)]
        assert line["answer_log_ratio"].tolist() == pytest.approx(ratio, abs=1e-5)


def test_a_policy_that_was_not_saved_is_replaced_by_the_nearest_one_and_that_is_said(vine, tmp_path, capsys):
    copy = shutil.copytree(vine, tmp_path / "copy")
    models = RunModels(copy)
    models.policy_before(3)
    assert capsys.readouterr().err == ""
    for step in (1, 2):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:06d}")
    taken = models.policy_before(3)
    assert "the policy of step 3's responses was not saved; taking that after step 3" in capsys.readouterr().err
    last = models.loaded(copy / "model")
    assert all(torch.equal(a, b) for a, b in zip(taken.parameters(), last.parameters(), strict=True))


def test_a_run_of_grpo_gets_all_tables_and_all_that_its_models_say(tmp_path, warm):
    finished(tmp_path / "run", warm, *ALL_KEPT, "algorithm.advantage=grpo", "algorithm.line_end=;")
    script = [sys.executable, "-m", "tools.credit", str(tmp_path / "run"), "--continuations", "2"]
    done = subprocess.run(script, cwd=chaos.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    asked = re.findall(r"step (\d): 2 continuations of up to ([\d,]+) prefixes", done.stderr)
    lines = [
        sum(line["text"].count(";") + (line["text"][-1:] != ";") for line in dumped(tmp_path / "run", k))
        for k in (1, 2, 3)
    ]
    assert asked == [(str(k), f"{n:,}") for k, n in zip((1, 2, 3), lines, strict=True)]
    of_steps = cells_of(done.stdout)
    assert [row["step"] for row in of_steps] == ["1", "2", "3", "later"] * 3
    overall, spearman = of_steps[:3], of_steps[8:11]
    for row in (*overall, *spearman):
        assert {"log-ratio", "CPR", "MSA", "log-prob", "entropy", "answer"} <= row.keys()
    # At the first step policy and reference are equal, so that MSA is 0 everywhere; at the third they are not
    assert overall[0]["MSA"] == "0.50 [0.50, 0.50]" and spearman[0]["MSA"] == "-" != spearman[2]["MSA"]


def test_the_reference_and_the_policy_are_scored_alike(tmp_path, warm):
    """As after a GPU's run in half precision: its dumped log-probs are rounded, the reference's made here are not."""
    finished(tmp_path / "run", warm, *ALL_KEPT, "algorithm.advantage=grpo")
    file = tmp_path / "run" / "samples" / "step_000003.jsonl"
    exact = [line["log_prob"] for line in dumped(tmp_path / "run", 3)]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        if "log_prob" in row:
            row["log_prob"] = torch.tensor(row["log_prob"]).bfloat16().tolist()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = completed(tmp_path / "run", 1, 3)
    inspector.with_terms(lines, infra.config.saved_config(tmp_path / "run"))
    assert lines
    for line, log_probs in zip(lines, exact, strict=True):
        log_ratio = [p - q for p, q in zip(log_probs, line["ref_log_prob"].tolist(), strict=True)]
        assert line["values"]["log_ratio"].tolist() == pytest.approx(log_ratio, abs=1e-5)


def test_values_of_another_number_of_continuations_are_kept_and_that_is_said(vine, capsys):
    lines = completed(vine, 64, 2)
    assert [line["value_after"].tolist() for line in lines] == [line["value_after"] for line in dumped(vine, 2)]
    assert "its dumps have values already, of 3 continuations, not 64" in capsys.readouterr().err


def test_models_of_other_problems_or_of_a_tree_are_refused(vine, tmp_path):
    copy = shutil.copytree(vine, tmp_path / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"seed": config["seed"] + 1}))
    with pytest.raises(BadInput, match=r"is not among those that its config\.yaml gives now"):
        completed(copy, 1, 2, "value_before", "value_after")
    config["algorithm"]["advantage"], config["tree"]["edge_tokens"] = "tree_rpo", 4
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(BadInput, match="edges"):
        completed(copy, 1, 2)
    (copy / "checkpoints" / "step_000001" / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="step_000001 is damaged"):
        RunModels(copy).policy_before(2)


def test_a_run_whose_models_are_of_no_use_is_left_out_and_the_others_are_not(vine, tmp_path, capsys):
    for name in ("sound", "tree"):
        shutil.copytree(vine, tmp_path / name)
    config = yaml.safe_load((tmp_path / "tree" / "config.yaml").read_text())
    config["algorithm"]["advantage"], config["tree"]["edge_tokens"] = "tree_rpo", 4
    (tmp_path / "tree" / "config.yaml").write_text(yaml.safe_dump(config))
    found = credit.gathered([tmp_path], 3)
    assert {name: bool(kinds["auc"]) for name, kinds in found.items()} == {
        "vine, 1 run": True,
        "tree_rpo, 1 run": False,
    }
    said = capsys.readouterr().err
    assert "left out, from here on: " in said and "are edges, no responses to be valued" in said


def test_no_continuations_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["credit", str(tmp_path), "--continuations", "0"])
    with pytest.raises(BadInput, match="--continuations 0: give a number from 1 on"):
        credit.main()
