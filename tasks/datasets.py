"""Published datasets and your own files: one function a dataset, from a row as published to a
Problem.

Training sources and benchmarks share them.
"""

import base64
import gzip
import io
import json
import math
import pickle
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from infra.errors import BadInput, optional
from infra.processes import print0
from rewards.answers import last_box
from tasks.problem import Problem, split_problems


def file_row(row: dict) -> Problem:
    """Your own rows: `prompt`, `reference`, and `grader` unless reward.grader names one for all;
    `solution` for a warm start.
    """
    solution = row.get("solution") or ""
    if not isinstance(solution, str):
        raise ValueError("its solution is no text")
    return Problem(row["prompt"], row["reference"], row.get("grader", ""), solution=solution)


def gsm8k_row(row: dict) -> Problem:
    """openai/gsm8k: the solution's last line is `#### N`, and <<48/2=24>> are a calculator's.

    As a demonstration it goes without these, and ends in the box that prompts ask for.
    """
    steps, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("no '####' before the answer")
    answer = answer.strip()
    solution = f"{re.sub('<<.*?>>', '', steps)}The answer is \\boxed{{{answer}}}."
    return Problem(row["question"], answer, "number", solution=solution)


def aimo_row(row: dict) -> Problem:
    """AI-MO/aimo-validation-aime and -amc, whose answers are text ("025") and floats (142.0)."""
    answer = float(row["answer"])
    if not math.isfinite(answer):
        raise ValueError("its answer is no finite number")
    return Problem(
        row.get("question") or row["problem"],
        str(int(answer) if answer.is_integer() else answer),
        "number",
    )


def aime24_row(row: dict) -> Problem | None:
    return aimo_row(row) if "2024_AIME" in row["url"] else None


def math500_row(row: dict) -> Problem:
    """PRIME's file (`expected_answer`) and HuggingFaceH4/MATH-500 (`answer`)."""
    return Problem(row["problem"], row.get("expected_answer") or row["answer"], "math")


def minerva_row(row: dict) -> Problem:
    """Minerva's file, and Hendrycks' MATH: the answer is boxed at the end of the solution."""
    solution = row["solution"]
    return Problem(row["problem"], last_box(solution), "math", solution=solution)


def olympiadbench_row(row: dict) -> Problem:
    """`error` is a tolerance; a multiple answer is one text of several values."""
    if not isinstance(row["final_answer"], list):
        raise ValueError("its final_answer is no list")
    reference = {
        "answer": ", ".join(row["final_answer"]),
        "multiple": row["is_multiple_answer"],
        "tolerance": float(row["error"]) if row["error"] else None,
        "unit": row["unit"],
    }
    return Problem(
        "\n\n".join(filter(None, (row.get("context"), row["question"]))), reference, "math"
    )


def eurus_row(row: dict) -> Problem:
    """PRIME-RL/Eurus-2-RL-Data: a chat, and LaTeX (maths) or a JSON text of test cases (code)."""
    *system, user = row["prompt"]
    if user["role"] != "user" or [turn["role"] for turn in system] not in ([], ["system"]):
        raise ValueError("its prompt is not one user's turn after at most one system's turn")
    truth, code = row["reward_model"]["ground_truth"], {"math": False, "code": True}[row["ability"]]
    # The same text in every row: keep it once
    told = sys.intern(system[0]["content"]) if system else ""
    return Problem(
        user["content"], json.loads(truth) if code else truth, "code" if code else "math", told
    )


def eurus_math_row(row: dict) -> Problem | None:
    return eurus_row(row) if row["ability"] == "math" else None


def humaneval_row(row: dict) -> Problem:
    """openai/human-eval: the response repeats the function and completes it."""
    tests = {
        "script": f"{row['test']}\ncheck({row['entry_point']})\n",
        "entry_point": row["entry_point"],
    }
    question = f"Complete this function:\n\n```python\n{row['prompt']}```"
    return Problem(question, tests | {"prelude": row["prompt"]}, "code")


LEETCODE_IMPORTS = """\
import bisect, functools, heapq, itertools, math
from collections import *
from typing import *
"""


def leetcode_row(row: dict) -> Problem:
    """DeepSeek-Coder's LeetCode set; what stands between statement and solution (list nodes) is
    there for both.
    """
    helpers = row["prompt"].rpartition('"""')[2].partition("class Solution")[0]
    tests = {
        "script": row["test"],
        "entry_point": "Solution",
        "prelude": LEETCODE_IMPORTS + helpers,
    }
    return Problem(row["prompt_sft"], tests, "code")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not text alone")


def livecodebench_row(row: dict) -> Problem:
    """livecodebench/code_generation_lite: public and hidden tests, the latter packed (read
    without any class).
    """
    hidden, metadata = (
        row.get("private_test_cases") or "[]",
        json.loads(row.get("metadata") or "{}"),
    )
    if not hidden.lstrip().startswith("["):
        hidden = _PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(hidden)))).load()
    tests = {"tests": json.loads(row["public_test_cases"]) + json.loads(hidden)}
    if metadata.get("func_name"):
        tests["fn_name"] = metadata["func_name"]
    start = (
        f"\n\nBegin with:\n\n```python\n{row['starter_code']}\n```"
        if row.get("starter_code")
        else ""
    )
    return Problem(row["question_content"] + start, tests, "code")


ROWS = {  # shape of a dataset -> (row as published) -> Problem; None: a row that is not of this set
    "file": file_row,
    "gsm8k": gsm8k_row,
    "math500": math500_row,
    "aime": aimo_row,
    "aime24": aime24_row,
    "amc": aimo_row,
    "minerva": minerva_row,
    "olympiadbench": olympiadbench_row,
    "eurus": eurus_row,
    "eurus_math": eurus_math_row,
    "humaneval": humaneval_row,
    "leetcode": leetcode_row,
    "livecodebench": livecodebench_row,
}


def rows_of(path: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .jsonl, .json or .parquet file, or of NAME[:CONFIG][@SPLIT] on the Hub
    (split: train).
    """
    place, suffix = path, Path(path).suffix
    try:
        if suffix == ".jsonl" or path.endswith(".jsonl.gz"):
            with (gzip.open if suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    place = f"{path}, line {number}"
                    if line.strip():
                        yield place, json.loads(line)
            return
        if suffix == ".json":
            text = Path(path).read_text(encoding="utf-8")
            try:
                rows = json.loads(text)
            except json.JSONDecodeError:  # a line each, in spite of the name
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if isinstance(rows, dict):  # columns, as pandas writes them: {name: {row: value}}
                rows = [
                    {name: rows[name][key] for name in rows} for key in next(iter(rows.values()))
                ]
        elif suffix == ".parquet":
            batches = optional("pyarrow.parquet", "pyarrow").ParquetFile(path).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
        else:
            if Path(path).is_file():
                raise ValueError("a file of another kind")
            name, _, split_name = path.partition("@")
            name, _, subset = name.partition(":")
            hub = optional("datasets", "datasets")
            try:
                rows = hub.load_dataset(name, subset or None, split=split_name or "train")
            except hub.exceptions.DatasetsError as error:
                raise ValueError(error) from error
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", row
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
    ) as error:
        raise BadInput(
            f"data: cannot read {place} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); it must be a "
            ".jsonl, .json or .parquet file, or NAME[:CONFIG][@SPLIT] of a dataset on the Hub"
        ) from error


def read_problems(shape: str, path: str) -> list[Problem]:
    """All problems of a dataset whose rows have this shape, in its order. Raises BadInput on a
    row that has another.
    """
    problems, others = [], 0
    for place, row in rows_of(path):
        try:
            problem = ROWS[shape](row)
            if problem and not (isinstance(problem.prompt, str) and problem.prompt.strip()):
                raise ValueError("its prompt is no text")
            if problem and problem.reference in (None, ""):
                raise ValueError("its reference is empty")
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            zlib.error,
            pickle.UnpicklingError,
        ) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(
                f"data: {place} is no {shape!r} row ({why}): mend it, or choose another source"
            ) from error
        if problem:
            problems.append(replace(problem, place=place))
        else:
            others += 1
    if others:
        print0(f"data: {others} of {others + len(problems)} rows of {path} are not of {shape!r}")
    if not problems:
        raise BadInput(f"data: {path} has no {shape!r} rows")
    return problems


def dataset_problems(config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of a published dataset or of your own file."""
    held_out = read_problems(config.source, config.held_out_path) if config.held_out_path else []
    return split_problems(read_problems(config.source, config.path), held_out, config)
