"""Programs as a task: rows as published, and a run whose reward is the sandbox."""

import base64
import json
import pickle
import re
import subprocess
import sys
import zlib
from pathlib import Path

import data
import infra.rng
import pytest
import tasks
import tasks.datasets
import tasks.print_sum
from infra.errors import BadInput
from infra.rng import Draw
from rewards import Grader, RewardConfig, sandbox
from tasks.datasets import read_problems

from helpers import grade_one, jsonl, published

ROOT = Path(__file__).parent.parent


@pytest.fixture
def box():
    try:
        return sandbox.isolation()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))


def score(problem, program: str) -> float | None:
    return grade_one(problem.grader, f"Here it is:\n```python\n{program}\n```", problem.reference).score


def test_humaneval_is_read_as_published_and_its_own_solutions_are_right(box):
    file = published("humaneval/HumanEval.jsonl.gz")
    problems, rows = read_problems("humaneval", str(file)), [row for _, row in tasks.datasets.rows_of(str(file))]
    assert len(problems) == 164
    for i in (0, 32, 53, 163):
        assert problems[i].prompt.count(rows[i]["prompt"]) == 1
        assert score(problems[i], rows[i]["prompt"] + rows[i]["canonical_solution"]) == 1.0
        assert score(problems[i], rows[i]["prompt"] + "    return None\n") == 0.0


def test_leetcode_is_read_as_published_and_graded_by_its_assertions(box):
    problems = read_problems("leetcode", str(published("leetcode/leetcode-test.json")))
    assert len(problems) == 180
    pushes = next(p for p in problems if "def minimumPushes(self, word: str) -> int" in p.prompt)
    body = "class Solution:\n    def minimumPushes(self, word: str) -> int:\n        return "
    assert score(pushes, body + "sum(i // 8 + 1 for i in range(len(word)))") == 1.0
    assert score(pushes, body + "len(word)") == 0.0


def lcb_row(hidden: str, **more) -> dict:
    tests = json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}])
    row = {"question_content": "Add.", "starter_code": "", "public_test_cases": tests, "metadata": "{}"}
    return row | {"private_test_cases": hidden} | more


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize("pack", [lambda text: text, packed], ids=["plain", "packed"])
def test_livecodebench_rows_bring_their_public_and_their_hidden_tests(pack, box, tmp_path):
    hidden = json.dumps([{"input": "5 5\n", "output": "10\n", "testtype": "stdin"}])
    (problem,) = read_problems("livecodebench", jsonl(tmp_path / "lcb.jsonl", [lcb_row(pack(hidden))]))
    assert score(problem, "a, b = map(int, input().split())\nprint(a + b)") == 1.0
    assert score(problem, "input()\nprint(3)") == 0.0  # the public test alone


def test_livecodebench_functions_are_called_by_the_name_in_the_metadata(box, tmp_path):
    case = [{"input": "[1, 2]\n2", "output": "5", "testtype": "functional"}]
    more = {"public_test_cases": json.dumps(case), "metadata": '{"func_name": "weigh"}'}
    row = lcb_row("[]", starter_code="class Solution:\n    def weigh(self, xs, k):\n        ", **more)
    (problem,) = read_problems("livecodebench", jsonl(tmp_path / "lcb.jsonl", [row]))
    assert row["starter_code"] in problem.prompt
    assert score(problem, "class Solution:\n    def weigh(self, xs, k):\n        return sum(xs) + k") == 1.0


def lcb_function(starter: str, given: str, expected: str, tmp_path):
    case = [{"input": given, "output": expected, "testtype": "functional"}]
    name = re.search(r"def (\w+)\(self", starter)[1]
    more = {"public_test_cases": json.dumps(case), "metadata": json.dumps({"func_name": name})}
    row = lcb_row("[]", starter_code=starter, **more)
    return read_problems("livecodebench", jsonl(tmp_path / "lcb.jsonl", [row]))[0]


def eurus_function(program_tests: dict, tmp_path):
    truth = json.dumps(program_tests)
    row = {"ability": "code", "prompt": [{"role": "user", "content": "Q"}], "reward_model": {"ground_truth": truth}}
    return read_problems("eurus", jsonl(tmp_path / "eurus.jsonl", [row]))[0]


STARTER = "class Solution:\n    def f(self, xs: List[str], start: Optional[int] = None) -> Dict[str, int]:\n        "
DEPTH = "class Solution:\n    def f(self, n: int) -> int:\n        "


@pytest.mark.parametrize(
    ("starter", "body", "given", "expected"),
    [
        (STARTER, "return dict(Counter(xs))", '["a", "b", "a"]', '{"a": 2, "b": 1}'),
        (STARTER, "d = defaultdict(int)\n        d['a'] += len(xs)\n        return d", '["a", "b"]', '{"a": 2}'),
        (STARTER, "return {xs[0]: math.gcd(12, 18) + pow(2, 5, 7) + heapq.heappop([5, 7])}", '["a"]', '{"a": 15}'),
        (STARTER, "return {k: len(list(g)) for k, g in groupby(xs)}", '["a", "a"]', '{"a": 2}'),
        (DEPTH, "return 0 if n == 0 else 1 + self.f(n - 1)", "45000", "45000"),
        (
            DEPTH,
            "@cache\n        def g(i):\n            return i and 1 + g(i - 1)\n        return g(n)",
            "20000",
            "20000",
        ),
        # Names of the usual imports are the program's own all the same
        (DEPTH.replace("f(", "search("), "return n + bisect_left([1, 2], 2)", "1", "2"),
        (DEPTH.replace("f(", "permutations("), "return len(list(permutations(range(n))))", "4", "24"),
    ],
)
def test_kind_15_functions_find_the_usual_imports_and_room_for_deep_recursion(
    starter, body, given, expected, box, tmp_path
):
    problem = lcb_function(starter, given, expected, tmp_path)
    assert score(problem, starter + body) == 1.0
    assert score(problem, f"from __future__ import annotations\n{starter}{body}") == 1.0
    assert score(problem, starter + "return None") == 0.0


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("def count(xs: List[int]) -> int:\n    return len(deque(xs))", 1.0),
        ("def count(xs):\n    return reduce(lambda a, b: a + 1, xs, 0)", 1.0),
        ("from math import *\ndef count(xs):\n    return int(sqrt(len(xs) ** 2))", 1.0),
        ("Counter = len\ndef count(xs):\n    return Counter(xs)", 1.0),  # its own name wins
        ("def other(xs):\n    return len(xs)", 0.0),  # itertools.count is none of it
        ("def count(xs):\n    return no_such_name(xs)", 0.0),
        ("def count(xs):\n    return count(xs)", 0.0),  # endless
    ],
)
def test_kind_15_functions_of_eurus_have_them_too(program, right, box, tmp_path):
    problem = eurus_function({"fn_name": "count", "inputs": ["[3, 4]"], "outputs": ["2"]}, tmp_path)
    assert score(problem, program) == right


class Opens:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


@pytest.mark.parametrize("hidden", ["not base64", base64.b64encode(b"not packed").decode()])
def test_hidden_tests_that_cannot_be_unpacked_are_named_in_one_line(hidden, tmp_path):
    with pytest.raises(BadInput, match="line 1 is no 'livecodebench' row"):
        read_problems("livecodebench", jsonl(tmp_path / "lcb.jsonl", [lcb_row(hidden)]))


def test_packed_tests_can_run_no_code(tmp_path):
    row = lcb_row(packed(Opens(tmp_path / "made")))
    with pytest.raises(BadInput, match="not text alone"):
        read_problems("livecodebench", jsonl(tmp_path / "lcb.jsonl", [row]))
    assert not (tmp_path / "made").exists()


def test_the_print_task_asks_for_what_python_prints(box):
    config = data.DataConfig(source="print", min_steps=1, max_steps=6, train_size=300, held_out_size=20)
    train, held_out = data.load_problems(config, 0, Grader())
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    for problem in train:
        assert problem.reference == {"inputs": [""], "outputs": [str(eval(problem.prompt.removeprefix("print ")))]}
    tokenizer = tasks.TOKENIZERS["print"]()
    clean = tasks.print_sum.print_solution(train[0].prompt)
    assert grade_one("code", clean, train[0].reference).score == 1.0
    ids = tokenizer(train[0].prompt + clean).input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids[1:]) == train[0].prompt + clean


def test_the_demonstrator_misreads_at_its_rate_and_always_writes_a_program():
    copied = total = 0
    for i in range(2000):
        wrong = tasks.print_sum.print_solution("print 7*3-2", infra.rng.rng_for(0, Draw.DEMONSTRATE, i))
        read = re.fullmatch(r"```python\nprint\((\d[-+*]\d[-+*]\d)\)\n```", wrong)[1]
        copied += sum(a == b for a, b in zip(read, "7*3-2", strict=True))
        total += 5
    expected = 1 - tasks.print_sum.MISREAD * (3 * 9 / 10 + 2 * 2 / 3) / 5  # a misread sign may be the same one
    assert abs(copied / total - expected) < 0.015


def test_training_runs_with_the_sandbox_as_its_reward(box, tmp_path):
    small = ["train.steps=2", "train.warm_start_clean_steps=60", "train.warm_start_noisy_steps=10", "eval.prompts=8"]
    small += ["train.prompts_per_step=2", "train.mini_batch_size=8", "data.train_size=50", "data.held_out_size=8"]
    command = [sys.executable, "train.py", "configs/print.yaml", *small, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "programs run in a bubblewrap sandbox" in done.stdout
    assert all(row["reward/faults"] == 0 and 0 < row["time/verdict_max"] <= row["time/reward"] for row in rows[1:])
    reasons = [json.loads(s)["reason"] for s in (tmp_path / "run/samples/step_000002.jsonl").read_text().splitlines()]
    assert len(reasons) == 16 and all(re.match("AC|WA|CE|RE|no program", reason) for reason in reasons)


def test_without_a_sandbox_training_on_programs_is_refused_before_it_starts(tmp_path, monkeypatch):
    def isolation(unsafe=False):
        if not unsafe:
            raise sandbox.SandboxError("bubblewrap is not installed")

    monkeypatch.setattr(sandbox, "isolation", isolation)
    config = data.DataConfig(source="print", min_steps=1, max_steps=3, train_size=20, held_out_size=5)
    with pytest.raises(BadInput, match=r"not installed.*reward\.allow_unsafe_code_execution=true"):
        data.load_problems(config, 0, Grader())
    data.load_problems(config, 0, Grader(RewardConfig(allow_unsafe_code_execution=True, grader="code")))
