"""eval.py on benchmarks: estimators by enumeration, intervals by simulation, and outputs that no kill can spoil."""

import itertools
import json
import math
import random
import statistics
import sys

import data
import eval as eval_module
import infra.config
import pytest
import train
from infra.errors import BadInput
from infra.processes import command_line
from rewards import GRADERS, Grader, Verdict
from rewards.benchmark_metrics import (
    benchmark_metrics,
    equality,
    majority,
    mean_interval,
    pass_at_k,
    wilson_interval,
)
from rewards.worker import VERDICT_SECONDS
from tasks.problem import Problem
from transformers import AutoTokenizer

import chaos
from helpers import jsonl, published, saved_chat_model
from test_data import FILES

ROWS = [{"prompt": f"How much is {i} + {i}?", "reference": str(2 * i), "grader": "odd_length"} for i in range(9)]
TEXTS = [row["prompt"] for row in ROWS]


def odd_length(text: str, reference) -> tuple[float, str]:
    """A verdict that varies, whatever random weights write."""
    return float(len(text) % 2), "by length"


# --- estimators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([i < right for i in range(n)], k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize("votes", [
    [("1", 0.0), ("2", 1.0), ("2", 1.0)],
    [("1", 0.0), ("2", 1.0)],
    [("1", 0.0), ("2", 1.0), ("3", 0.0), (None, 0.0), (None, 0.0)],
    [("1", 0.0), ("1 ", 0.0), ("2", 1.0), ("2", 1.0), ("3", 0.0), ("x", 0.5)],
])  # fmt: skip
def test_the_majoritys_score_is_the_mean_over_random_ways_of_breaking_ties(votes):
    generator, scores = random.Random(0), []
    for _ in range(4000):
        shuffled = generator.sample(votes, len(votes))
        heard = [answer.strip() for answer, _ in shuffled if answer is not None]
        winner = max(heard, key=heard.count)  # the first in the shuffled order among equals
        scores.append(next(score for answer, score in votes if answer is not None and answer.strip() == winner))
    assert majority(votes) == pytest.approx(statistics.mean(scores), abs=0.03)


def test_without_any_answer_the_majority_is_wrong():
    assert majority([(None, 0.0), (None, 0.0)]) == majority([]) == 0.0


@pytest.mark.parametrize("n, right", [(1, 1), (7, 0), (30, 11), (500, 500), (500, 371)])
def test_for_one_answer_per_problem_the_interval_is_wilsons(n, right):
    expected = (right / n, *wilson_interval(right, n))
    assert mean_interval([1.0] * right + [0.0] * (n - right)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("problems, samples", [(30, 1), (30, 16), (200, 4)])
@pytest.mark.parametrize("a, b", [(0.5, 0.5), (0.2, 1.8), (4.0, 1.0)])  # of the Beta that problems' rates come from
def test_the_interval_covers_the_mean_over_such_problems_at_about_its_rate(problems, samples, a, b):
    generator, covered, runs = random.Random(0), 0, 800
    for _ in range(runs):
        rates = [generator.betavariate(a, b) for _ in range(problems)]
        means = [sum(generator.random() < rate for _ in range(samples)) / samples for rate in rates]
        _, low, high = mean_interval(means)
        covered += low <= a / (a + b) <= high
    assert 0.9 < covered / runs < 0.985  # a skewed 30 problems are the worst: 0.92; the bootstrap has 0.91 there


def test_metrics_are_means_over_the_problems_all_of_whose_responses_have_a_verdict():
    generator, rows = random.Random(0), []
    for problem, sample in itertools.product(range(12), range(4)):
        answer = generator.choice(["1", "2", None])
        row = {
            "problem": problem,
            "sample": sample,
            "text": f"so \\boxed{{{answer}}}" if answer else "hm",
            "reason": "r",
        }
        row |= {
            "score": float(answer == "1"),
            "length": generator.randrange(5, 50),
            "truncated": generator.random() < 0.3,
        }
        rows.append(row | ({"score": None} if generator.random() < 0.1 else {}))
    groups = [[row for row in rows if row["problem"] == problem] for problem in range(12)]
    graded = [group for group in groups if all(row["score"] is not None for row in group)]
    assert 4 < len(graded) < 12
    metrics = benchmark_metrics(rows)
    means = {name: value[0] for name, value in metrics.items()}
    assert list(means) == ["accuracy", "pass@2", "pass@4", "maj@4", "length, tokens", "cut off"]
    assert means["accuracy"] == pytest.approx(statistics.mean(statistics.mean(r["score"] for r in g) for g in graded))
    for k in (2, 4):
        tries = [[any(r["score"] for r in s) for s in itertools.combinations(g, k)] for g in graded]
        assert means[f"pass@{k}"] == pytest.approx(statistics.mean(map(statistics.mean, tries)))
    lengths = [statistics.mean(row["length"] for row in group) for group in graded]
    half = 1.96 * statistics.stdev(lengths) / math.sqrt(len(graded))
    mean = statistics.mean(lengths)
    assert metrics["length, tokens"] == pytest.approx((mean, mean - half, mean + half))
    assert means["cut off"] == pytest.approx(statistics.mean(row["truncated"] for group in graded for row in group))
    with pytest.raises(BadInput, match="no response has a verdict"):
        benchmark_metrics([row | {"score": None} for row in rows])


def test_without_boxes_there_is_no_vote_and_one_sample_has_neither_vote_nor_pass_at_k():
    row = {"problem": 0, "text": "print(1)", "score": 0.5, "reason": "", "length": 3, "truncated": False}
    assert list(benchmark_metrics([row, row])) == ["accuracy", "pass@2", "length, tokens", "cut off"]
    assert benchmark_metrics([row])["accuracy"][0] == 0.5 and "pass@1" not in benchmark_metrics([row])


def responses(problem: int, scores: list, texts=(), **more) -> list[dict]:
    texts = texts or [""] * len(scores)
    row = {"problem": problem, "reference": "1", "grader": "odd", "reason": "out of memory", "length": 9} | more
    return [row | {"text": t, "score": s, "truncated": False} for t, s in zip(texts, scores, strict=True)]


@pytest.mark.parametrize("rows, left_out, expected", [
    (responses(0, [1.0] * 4) + responses(1, [0.0, 0.0, None, None]), 1, {"accuracy": 1, "pass@2": 1, "pass@4": 1}),
    (responses(0, [1.0, 0.0, 0.0, 0.0]) + responses(1, [None] * 4), 1, {"accuracy": 0.25, "pass@2": 0.5, "pass@4": 1}),
    (responses(0, [0.0] * 2) + responses(1, [1, None]) + responses(2, [1, 0]), 1, {"pass@2": 0.5, "accuracy": 0.25}),
    (responses(0, [1.0]) + responses(1, [None]) + responses(2, [None]), 2, {"accuracy": 1}),
    (responses(0, [1.0, 1.0]) + responses(1, [0.0]), 1, {"accuracy": 1, "pass@2": 1}),  # the last one was cut short
    (responses(0, [1.0, 0.0]) + responses(1, [0.0, 0.0]), 0, {"accuracy": 0.25, "pass@2": 0.5}),
])  # fmt: skip
def test_kind_19_the_figures_of_a_row_are_of_one_set_of_problems(rows, left_out, expected):
    means = {name: value[0] for name, value in benchmark_metrics(rows).items()}
    assert {name: mean for name, mean in means.items() if name in expected} == pytest.approx(expected)
    assert means.keys() - expected.keys() == {"length, tokens", "cut off"}
    settings = {"benchmark": "file", "samples": 4, "temperature": 1.0}
    words = f"file, n = {len({row['problem'] for row in rows}) - left_out}"
    words += f", {left_out} left out: responses without a verdict" if left_out else ""
    assert f"| {words} |" in eval_module.table_row(settings, rows)


def test_kind_19_where_every_problem_has_a_fault_there_is_no_row():
    rows = responses(0, [1.0, None]) + responses(1, [None, 0.0])
    with pytest.raises(BadInput, match=r"^no response has a verdict, or none[^\n]*out of memory$"):
        benchmark_metrics(rows)


VOTES = [  # grader, reference, right answers, wrong answers, maj@n
    ("math", "0.5", [r"\frac12", "0.5", "1/2"], ["3", "3"], 1.0),
    ("number", "0.5", [r"\frac12", "0.5", "1/2"], ["3", "3"], 1.0),
    ("math", "x+1", ["x+1", "1+x"], ["2", "2", r"\sqrt{4}"], 0.0),
    ("math", "x+1", ["x+1", "1+x"], ["x-1", "-1+x", "2"], 0.5),  # a tie
    ("math", "(1,2)", ["(1,2)", "(1, 2)"], ["(2,1)", "(1,1)", "2"], 1.0),
    ("number", "7", ["7"], ["1,234", "1234.0", "5"], 0.0),
    ("number", "7", ["7"], ["12, 34", "1234", "5"], 0.25),  # two numbers, and one
    ("math", "1,3", ["1,3"], [r"\{2,3\}", "3,2", "2, 3"], 0.0),
    ("math", {"answer": "5", "unit": "m"}, ["5", r"5\text{ m}", "5.0"], ["6", "6", r"7"], 1.0),
    ("number", "5", ["5"], ["2", "0", "no"], 0.25),
    ("math", "5", [], ["2", "2.0", "no"], 0.0),
    ("boxed", "5", ["1/2", "0.5"], [], 1.0),
    ("odd", "5", ["1/2", "0.5"], ["3", "3"], 0.0),  # a grader that knows no equality: spellings vote
]


@pytest.mark.parametrize("grader, reference, right, wrong, expected", VOTES)
def test_kind_18_equal_answers_vote_together(grader, reference, right, wrong, expected):
    answers, scores = right + wrong, [1.0] * len(right) + [0.0] * len(wrong)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(answers)), len(answers))
        texts = [rf"so \boxed{{{answers[i]}}}" for i in order]
        rows = responses(0, [scores[i] for i in order], texts, grader=grader, reference=reference)
        assert benchmark_metrics(rows)[f"maj@{len(rows)}"][0] == pytest.approx(expected)


def test_kind_18_what_stands_behind_the_marks_of_gsm8k_votes_too():
    texts = ["#### 18", r"\boxed{18}", "so\n#### 18.0", r"\boxed{7}", "#### 7", "no answer"]
    rows = responses(0, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], texts, grader="number", reference="18")
    assert benchmark_metrics(rows)["maj@6"][0] == 1.0


def test_kind_18_no_comparison_is_made_that_could_not_change_who_wins():
    def never(one, other):
        raise AssertionError

    assert majority([("1", 1.0), ("1.0", 1.0), ("2", 0.0), ("3", 0.0), ("1/1", 1.0)], never) == 1.0
    assert majority([("1", 0.0), ("2", 0.0), ("3", 0.0)], never) == 0.0
    assert majority([("1", 1.0), ("2", 1.0)], never) == 1.0
    compared = []
    votes = [("1", 1.0)] * 3 + [(str(i), 0.0) for i in range(2, 15)]
    assert majority(votes, lambda *pair: compared.append(pair)) == 1.0 and len(compared) == 13 * 12 / 2


def test_kind_18_answers_whose_comparison_takes_too_long_are_compared_no_more(monkeypatch):
    asked = []

    def slow(self, name, text, reference):
        asked.append((text, reference))
        return Verdict(0.0, "took longer", VERDICT_SECONDS)

    monkeypatch.setattr(Grader, "grade_one", slow)
    votes = [("1", 1.0)] + [(f"{i}^x", 0.0) for i in range(15)]
    assert majority(votes, equality("math", "1")) == pytest.approx(1 / 16) and len(asked) <= 8


# --- the script ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_chat_model(tmp_path_factory.mktemp("model"), TEXTS)


@pytest.fixture
def evaluated(model, tmp_path, monkeypatch, capsys):
    """(output file, *flags) -> what eval.py prints; in this process, which has the grader `odd_length`."""
    monkeypatch.setitem(GRADERS, "odd_length", odd_length)
    monkeypatch.setattr(eval_module, "ROWS_AT_ONCE", 6)
    rows = jsonl(tmp_path / "rows.jsonl", ROWS)

    def run(output, *flags: str) -> str:
        capsys.readouterr()
        flags = flags or ("--samples", "3", "--temperature", "1", "--max-new-tokens", "8")
        arguments = [str(model), "--benchmark", "file", "--data", rows, *flags, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
        eval_module.main()
        return capsys.readouterr().out

    return run


def read(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_response_is_saved_with_its_verdict_and_the_row_says_what_they_add_up_to(evaluated, tmp_path):
    printed = evaluated(tmp_path / "out.jsonl")
    settings, *rows = read(tmp_path / "out.jsonl")
    assert [(row["problem"], row["sample"]) for row in rows] == list(itertools.product(range(9), range(3)))
    assert len({row["text"] for row in rows}) > 20 and settings["settings"]["first_prompt"].endswith("assistant\n")
    for row in rows:
        asked = ROWS[row["problem"]]
        assert (row["prompt"], row["reference"]) == (asked["prompt"], asked["reference"])
        assert (row["score"], row["reason"]) == odd_length(row["text"], "") and 1 <= row["length"] <= 8
    *_, header, rule, cells = printed.splitlines()
    assert header.startswith("| command | benchmark | samples | accuracy | pass@2 | pass@3 |") and set(rule) <= set(
        "| -"
    )
    assert header.count("|") == cells.count("|")
    accuracy, low, high = mean_interval([statistics.mean(r["score"] for r in rows[i : i + 3]) for i in range(0, 27, 3)])
    assert f"| file, n = 9 | 3 at T=1 | {accuracy:.3f} ({low:.3f} to {high:.3f}) |" in cells


def test_an_evaluation_that_was_killed_goes_on_where_it_stood(evaluated, tmp_path):
    evaluated(tmp_path / "straight.jsonl")
    whole = (tmp_path / "straight.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (
        b"".join(lines[:12]),
        b"".join(lines[:14])[:-5],
        lines[0],
        whole,
    ):  # in a problem, in a line, before all
        (tmp_path / "cut.jsonl").write_bytes(kept)
        printed = evaluated(tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
    assert "9 done" in printed


@pytest.mark.parametrize("samples", [1, 3])
def test_kind_29_a_killed_evaluation_samples_the_same_lots_and_so_ends_with_the_same_file(
    samples, evaluated, tmp_path, monkeypatch
):
    """Cut anywhere, also within a lot: what is decoded together is what the straight one decodes together."""
    monkeypatch.setattr(eval_module, "ROWS_AT_ONCE", 4 * samples)
    together, plain = [], eval_module.sample
    monkeypatch.setattr(eval_module, "sample", lambda *args: together.append(args[2]) or plain(*args))
    flags = ("--samples", str(samples), "--temperature", "1", "--max-new-tokens", "6")
    evaluated(tmp_path / "straight.jsonl", *flags)
    whole, straight = (tmp_path / "straight.jsonl").read_bytes(), [*together]
    assert [len(keys) for keys in straight] == [4, 4, 1]
    lines = whole.splitlines(keepends=True)
    for problems in range(10):
        together.clear()
        (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[: 1 + problems * samples]))
        evaluated(tmp_path / "cut.jsonl", *flags)
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
        assert together == straight[problems // 4 :] if problems < 9 else not together


CHANGED = {
    "a reference": [*ROWS[:8], ROWS[8] | {"reference": "0"}],
    "a prompt": [*ROWS[:8], ROWS[8] | {"prompt": "How much is it?"}],
    "their number": ROWS[:8],
    "their order": [ROWS[0], *ROWS[:0:-1]],
    "a grader": [ROWS[0] | {"grader": "chain"}, *ROWS[1:]],
}


@pytest.mark.parametrize("what", CHANGED)
def test_kind_23_outputs_never_mix_two_data_sets(what, evaluated, tmp_path):
    flags = ("--limit", "5", "--max-new-tokens", "3")
    evaluated(tmp_path / "out.jsonl", *flags)
    before = (tmp_path / "out.jsonl").read_bytes()
    jsonl(tmp_path / "rows.jsonl", CHANGED[what])
    with pytest.raises(BadInput, match=r"holds another evaluation \(problems: [^\n]*choose another --output$"):
        evaluated(tmp_path / "out.jsonl", "--limit", "9", "--max-new-tokens", "3")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    jsonl(tmp_path / "rows.jsonl", ROWS)
    assert "5 done" in evaluated(tmp_path / "out.jsonl", "--limit", "9", "--max-new-tokens", "3")


def test_kind_23_outputs_of_an_earlier_version_go_on_and_are_said_not_to_have_been_compared(evaluated, tmp_path):
    flags = ("--max-new-tokens", "3")
    evaluated(tmp_path / "out.jsonl", "--limit", "5", *flags)
    header, *rows = read(tmp_path / "out.jsonl")
    del header["settings"]["problems"]
    jsonl(tmp_path / "out.jsonl", [header, *rows])
    printed = evaluated(tmp_path / "out.jsonl", *flags)
    assert "an earlier version began it, so could not be compared: problems" in printed and "5 done" in printed
    assert "could not be compared" not in evaluated(tmp_path / "out.jsonl", *flags)


@pytest.mark.parametrize("text", ["End with #### and the number.", "yes", "two\n\nlines: 'x'", "1e3", '"a" # b'])
def test_kind_21_a_text_of_training_is_what_the_scripts_flags_give(text, evaluated, model, tmp_path):
    prompt = f"{text} {{question}}"
    flags = ("--system-prompt", text, "--prompt", prompt, "--limit", "1", "--max-new-tokens", "2")
    evaluated(tmp_path / "out.jsonl", *flags)
    arguments = [f"data.system_prompt={text}", f"data.prompt={prompt}"]
    config = infra.config.read_config(train.Config, arguments, train.DEFAULT_CONFIG).data
    asked = data.apply_prompt([Problem(ROWS[0]["prompt"], "0", "odd_length")], config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = data.encode_prompts(asked, tokenizer, 500)[1][0]
    assert read(tmp_path / "out.jsonl")[0]["settings"]["first_prompt"] == tokenizer.decode(ids)


def test_outputs_of_another_evaluation_or_model_are_never_mixed_or_overwritten(evaluated, model, tmp_path):
    evaluated(tmp_path / "out.jsonl", "--limit", "2", "--max-new-tokens", "4")
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(BadInput, match=r"max_new_tokens: 4 -> 5.*choose another --output"):
        evaluated(tmp_path / "out.jsonl", "--limit", "2", "--max-new-tokens", "5")
    with pytest.raises(BadInput, match="grader='oracle' is not known"):
        evaluated(tmp_path / "out.jsonl", "--limit", "2", "--max-new-tokens", "4", "--grader", "oracle")
    with pytest.raises(BadInput, match="first_prompt"):
        evaluated(tmp_path / "out.jsonl", "--limit", "2", "--max-new-tokens", "4", "--plain")
    (model / "later").touch()  # the folder has been written to again
    with pytest.raises(BadInput, match="model_saved"):
        evaluated(tmp_path / "out.jsonl", "--limit", "2", "--max-new-tokens", "4")
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    with pytest.raises(BadInput, match=r"mine\.jsonl cannot be read as outputs"):
        evaluated(tmp_path / "mine.jsonl", "--max-new-tokens", "4")


def test_saved_outputs_are_graded_again_without_a_model_and_the_differences_are_listed(
    evaluated, tmp_path, monkeypatch, capsys
):
    evaluated(tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")[1:]
    monkeypatch.setattr(eval_module, "open_run", None)
    for grader, differing in (("odd_length", []), ("boxed", [row for row in rows if row["score"]])):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--regrade", str(tmp_path / "out.jsonl"), "--grader", grader])
        eval_module.main()
        *listed, summary, _, _, cells = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in listed] == [
            f"problem {row['problem']}, sample {row['sample']}" for row in differing
        ]
        assert summary.startswith(f"{len(differing)} of 27 verdicts differ") and "| file, n = 9 |" in cells
    assert "| 0.000 (0.000 to" in cells  # no text holds a box


@pytest.mark.parametrize("flags", [
    (), ("m", "--benchmark", "file"), ("m", "--data", "rows.jsonl"),
    ("m", "--benchmark", "file", "--data", "rows.jsonl", "--samples", "2"),
    ("m", "--benchmark", "file", "--data", "rows.jsonl", "--limit", "0"), ("--regrade", "nowhere.jsonl"),
])  # fmt: skip
def test_flags_that_do_not_go_together_are_refused_in_one_line(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags])
    with pytest.raises(BadInput, match=r"^[^\n]+$"):
        eval_module.main()


@pytest.mark.parametrize("shape", FILES)
def test_each_benchmark_runs_from_its_published_file(shape, model, tmp_path, monkeypatch, capsys):
    arguments = [str(model), "--benchmark", shape, "--data", str(published(FILES[shape][0])), "--limit", "2"]
    arguments += ["--max-new-tokens", "4", "--grader", "boxed", "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
    eval_module.main()
    _, *rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 2 and all(r"\boxed{}" in row["prompt"] for row in rows)
    assert f"| {shape}, n = 2 | greedy | 0.000" in capsys.readouterr().out


# --- several processes, whole runs --------------------------------------------------------------------------------


def called(main, arguments: list[str]) -> None:
    """`main` as a script with these arguments, in a process that has the grader `odd_length`."""
    GRADERS["odd_length"] = odd_length
    sys.argv = ["script", *arguments]
    command_line(main)


def finished(main, arguments: list[str], ranks: int, log) -> str:
    code = chaos.exit_code(chaos.fork(called, (main, arguments), ranks, log), 120)
    assert code == 0, log.read_text()
    return log.read_text()


def test_two_processes_share_an_evaluation_and_save_what_one_does(evaluated, model, tmp_path):
    evaluated(tmp_path / "one.jsonl")
    arguments = [str(model), "--benchmark", "file", "--data", str(tmp_path / "rows.jsonl"), "--samples", "3"]
    arguments += ["--temperature", "1", "--max-new-tokens", "8", "--output", str(tmp_path / "two.jsonl")]
    finished(eval_module.main, arguments, 2, tmp_path / "log")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_a_chat_model_trains_on_gsm8k_on_two_processes_and_its_run_can_be_evaluated(tmp_path, monkeypatch, capsys):
    questions, held_out = published("gsm8k/train.jsonl"), published("gsm8k/test.jsonl")
    texts = [json.loads(line)["question"] for line in questions.read_text().splitlines()[:300]]
    said = finished(train.main, [
        f"run_dir={tmp_path / 'run'}", f"model.path={saved_chat_model(tmp_path / 'model', texts)}",
        "data.source=gsm8k", f"data.path={questions}", f"data.held_out_path={held_out}", "reward.grader=odd_length",
        "train.steps=3", "train.prompts_per_step=4", "train.mini_batch_size=8", "train.micro_batch_tokens=1024",
        "sample.group_size=4", "sample.max_new_tokens=16", "eval.prompts=4",
    ], 2, tmp_path / "log")  # fmt: skip
    assert "7473 training prompts" in said and "chat template, no system prompt; stop <|im_end|>" in said
    steps = read(tmp_path / "run" / "metrics.jsonl")[1:]
    assert len(steps) == 3 and any(0 < step["reward/mean"] < 1 for step in steps)
    assert all(step["updates/refused"] == 0 for step in steps)
    (dump, *_) = sorted((tmp_path / "run" / "samples").iterdir())
    assert all(row["prompt"].endswith(r"\boxed{}.") for row in read(dump))
    monkeypatch.setitem(GRADERS, "odd_length", odd_length)
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "run"), "--limit", "3"])
    eval_module.main()
    assert "n = 3" in capsys.readouterr().out
