"""Verdicts: right, wrong, and the third one, that nothing can be said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rewards import ATTEMPTS, GRADERS, grade_chain

from helpers import grade_one

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("texts", "score", "reason"),
    [
        (["b3+5=8;#8", "#8", "#7#8", "b3+5=9;#8"], 1.0, "right"),  # the answer alone is judged
        (["#7", "#8#7", "b3+5=8;#0"], 0.0, "answered"),
        (["", "8", "#", "#88", "#-8", "# 8", "#8;", "#8 ", "#8\n", "#8\n#", "#8<eos>"], 0.0, "no answer"),
    ],
)
def test_the_chain_grader_wants_one_digit_behind_a_hash_at_the_very_end(texts, score, reason):
    for text in texts:
        verdict = grade_one("chain", text, "8")
        assert (verdict.score, verdict.reason) == grade_chain(text, "8"), text
        assert verdict.score == score and verdict.reason.startswith(reason), text


def test_a_reference_that_is_a_number_counts_like_its_digits():
    assert grade_one("chain", "b1+1=2;#2", 2).score == 1.0 and grade_one("chain", "b1+1=2;#2", 3).score == 0.0


@pytest.mark.parametrize("crashes", [0, ATTEMPTS - 1, ATTEMPTS, 100])
def test_a_grader_that_raises_is_tried_again_and_then_it_is_a_fault_without_a_score(crashes, monkeypatch):
    calls = []

    def grader(*arguments):
        calls.append(arguments)
        if len(calls) <= crashes:
            raise OSError("disk on fire")
        return 0.25, "fine"

    monkeypatch.setitem(GRADERS, "shaky", grader)
    verdict = grade_one("shaky", "text", "reference")
    assert calls == [("text", "reference")] * min(crashes + 1, ATTEMPTS)
    assert verdict.score == (0.25 if crashes < ATTEMPTS else None) and verdict.seconds >= 0
    assert verdict.reason == "fine" if crashes < ATTEMPTS else "OSError: disk on fire" in verdict.reason


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.5, 2.0, "1"], ids=str)
def test_a_score_that_is_no_number_from_0_to_1_is_a_fault(score, monkeypatch):
    monkeypatch.setitem(GRADERS, "odd", lambda text, reference: (score, "fine"))
    assert grade_one("odd", "text", "reference").score is None


def script(*arguments, stdin: bytes = b""):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in any UTF-8 locale but C.UTF-8
    command = [sys.executable, "-m", "rewards", *arguments]
    result = subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, env=environment)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_the_script_writes_one_verdict_per_line_in_order():
    rows = [{"text": f"#{i % 7}", "reference": str(i % 5)} for i in range(40)]
    rows += [{"text": "\ud800#8", "reference": "9"}, {"text": "\u2028é#8", "reference": "8"}]  # half a surrogate pair
    code, out, err = script("chain", stdin="".join(json.dumps(row) + "\n" for row in rows).encode())
    assert code == 0, err.splitlines()[-1]
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert [v["score"] for v in verdicts] == [float(row["text"][-1] == row["reference"]) for row in rows]
    assert all(set(v) == {"score", "reason", "seconds"} for v in verdicts)


MALFORMED = {
    "empty": b"",
    "no JSON": b"#8",
    "no object": b"[1, 2]",
    "a number": b"8",
    "no reference": b'{"text": "#8"}',
    "text is null": b'{"text": null, "reference": "8"}',
    "reference is a list": b'{"text": "#8", "reference": [8]}',
    "reference is true": b'{"text": "#8", "reference": true}',
    "no UTF-8": b'{"text": "\xff", "reference": "8"}',
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_line_is_a_fault_and_not_a_wrong_answer(what):
    good = b'{"text": "#8", "reference": "8", "more": 1}'
    code, out, err = script("chain", stdin=b"\n".join([good, MALFORMED[what], good]))
    assert code == 0, err.splitlines()[-1]
    assert [json.loads(line)["score"] for line in out.splitlines()] == [1.0, None, 1.0]


@pytest.mark.parametrize(
    ("grader", "good", "bad"),
    [
        (
            "number",
            ["7", 7, {"answer": "7"}],
            [["7"], {"answer": ["7"]}, float("nan"), None, {"answer": {"7": 7}}, "$$"],
        ),
        ("math", ["7", 7.0, {"answer": 7}], [["7"], {"answer": ["7"]}, float("inf"), {"answer": "7", "unit": []}]),
        ("chain", ["7", 7], [["7"], {"answer": "7"}, float("nan"), 7.0, True]),
        ("boxed", ["7", ["7"], None], []),
    ],
)
def test_kind_13_a_reference_that_the_grader_cannot_read_is_a_fault_and_not_a_wrong_answer(grader, good, bad):
    if grader == "math":
        pytest.importorskip("math_verify")
    rows = [{"text": r"\boxed{7} or #7", "reference": reference} for reference in good + bad]
    code, out, err = script(grader, stdin="".join(json.dumps(row) + "\n" for row in rows).encode())
    assert code == 0, err.splitlines()[-1]
    assert [json.loads(line)["score"] for line in out.splitlines()] == [1.0] * len(good) + [None] * len(bad)


@pytest.mark.parametrize("arguments", [[], ["nobody"], ["chain", "chain"]], ids=str)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments):
    code, out, err = script(*arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and "chain" in err


def test_verdicts_need_no_torch():
    command = [sys.executable, "-c", "import rewards, sys; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
