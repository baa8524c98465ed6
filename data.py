"""Where prompts come from: problems with a checkable answer, and the order in which a run meets them.

A source is a function in SOURCES that returns (train problems, held-out problems). A published dataset is one function
in ROWS, from a row as published to a Problem: training sources and benchmarks share them. Nothing here has state: the
prompt at position p of a run is a function of (seed, p), so that the position is all the data state a checkpoint needs,
and every random draw of the project comes from `random_for(seed, purpose, ...)`.

The built-in source "chain" is a task that a 170k-parameter model learns on a CPU. A prompt is a chain of labelled
operations, evaluated from left to right modulo 10; a solution writes one labelled step per operation:

    prompt    3b+5c*2d-7?
    solution  b3+5=8;c8*2=6;d6-7=9;#9

The demonstrator is noisy: it slips, it has a misconception about large products (so that even greedy decoding errs),
and it repeats some steps in brackets, which carries no information. RL has accuracy to gain and length to lose.
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
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reward import check_grader, last_box
from run import BadInput, say


def require_at_least(least: int, config, *names: str) -> None:
    """For the checks of config blocks: ValueError names the first field below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


@dataclass
class DataConfig:
    source: str = "chain"  # where problems come from: a name in SOURCES; for a dataset, the shape of its rows
    path: str = ""  # .jsonl, .json or .parquet file, or NAME[:CONFIG][@SPLIT] on the Hub; reasoning_gym: the task
    held_out_path: str = ""  # the like for evaluation; empty: held_out_size problems of `path`, never trained on
    train_size: int = 0  # training problems, at most; 0: all of a dataset (20,000 of those that are made)
    held_out_size: int = 512  # problems that training never sees, for evaluation
    prompt: str = ""  # text around {question}; empty: the source's own, which asks for a \boxed{} answer in maths
    system_prompt: str = ""  # empty: the row's own, if it has one
    chat_template: bool = True  # speak to the model in its tokenizer's chat template, where it has one
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted, never cut
    min_steps: int = 3  # chain: fewest operations in a prompt
    max_steps: int = 6  # chain: most operations in a prompt
    repeat_slip: float = 0.12  # chain: chance of a slip per step where the demonstrator repeats steps; SLIP elsewhere

    def __post_init__(self):
        require_at_least(0, self, "train_size")
        require_at_least(1, self, "held_out_size", "min_steps", "max_prompt_tokens")
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is not known: choose one of {', '.join(SOURCES)}")
        own, rows = self.source in DEMONSTRATORS, self.source in ROWS
        if own == bool(self.path) or (self.held_out_path and not rows):
            raise ValueError(
                f"source={self.source!r} does not go with path={self.path!r}, held_out_path={self.held_out_path!r}: "
                f"{', '.join(DEMONSTRATORS)} take neither, reasoning_gym takes the name of a task as path, a dataset a "
                "file or a name on the Hub"
            )
        if self.prompt and "{question}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} must hold the text {{question}}, where each problem's goes")
        if not 0 <= self.repeat_slip <= 1:
            raise ValueError(f"repeat_slip={self.repeat_slip} is a chance, in [0, 1]")
        if not self.min_steps <= self.max_steps <= len(LABELS):
            raise ValueError(f"max_steps={self.max_steps} must lie between min_steps and {len(LABELS)}")


class Draw(IntEnum):
    """What a random number is for. Each purpose has its own stream, so that none can disturb another."""

    PROBLEMS = 0
    ORDER = 1
    SAMPLE = 2
    SHUFFLE = 3
    EVALUATE = 4
    DEMONSTRATE = 5
    WEIGHTS = 6


def random_for(seed: int, purpose: Draw, *index: int) -> np.random.Generator:
    """The generator of one purpose and place: the same arguments give the same numbers on any machine and rank."""
    return np.random.default_rng([seed, purpose, *index])


@dataclass(frozen=True)
class Problem:
    prompt: str  # the text that the model continues, or the user's turn in a chat
    reference: Any  # the answer as the grader wants it: any JSON value
    grader: str  # a name in reward.GRADERS
    system: str = ""  # the system's turn in a chat


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return random_for(seed, Draw.ORDER, epoch).permutation(size)


def index_at(position: int, size: int, seed: int) -> int:
    """Which of `size` training problems stands at `position` of the run: a new permutation for every epoch."""
    epoch, place = divmod(position, size)
    return int(_permutation(size, seed, epoch)[place])


MADE = 20_000  # training problems that chain and reasoning_gym make unless data.train_size says otherwise


# --- the chain task -----------------------------------------------------------------------------------------------

LABELS = "bcdefghijklmnopqrstuvwxyz"
SLIP = 0.12  # chance per step that the demonstrator's result is off by one
MISCONCEPTION = 0.6  # chance that a product of two digits >= 6 comes out one too high
REPEATS = (0.0, 0.5, 1.0)  # chance of repeating a step; a demonstration draws one of these for all its steps

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def chain_solution(prompt: str, noise: np.random.Generator | None = None, repeat_slip: float = SLIP) -> str:
    """The written solution of a chain prompt: right and concise, or with the demonstrator's noise.

    A wrong result is carried on into the following steps, as a person's would be. Where it repeats steps, the
    demonstrator slips with chance `repeat_slip` per step: it sets how length and being right go together.
    """
    value, lines = int(prompt[0]), []
    repeat = noise.choice(REPEATS) if noise else 0.0
    slip = repeat_slip if repeat else SLIP
    for label, operator, digit in re.findall(r"([a-z])([-+*])(\d)", prompt):
        result = _OPERATIONS[operator](value, int(digit)) % 10
        if noise and operator == "*" and min(value, int(digit)) >= 6 and noise.random() < MISCONCEPTION:
            result = (result + 1) % 10
        if noise and noise.random() < slip:
            result = (result + noise.choice((-1, 1))) % 10
        step = f"{label}{value}{operator}{digit}={result}"
        lines.append(step + ";" + (f"({step})" if noise and noise.random() < repeat else ""))
        value = result
    return "".join(lines) + f"#{value}"


def _chain_prompt(random: np.random.Generator, min_steps: int, max_steps: int) -> str:
    length = random.integers(min_steps, max_steps + 1)
    operators, digits = random.choice(list(_OPERATIONS), length), random.integers(0, 10, length + 1)
    return str(digits[0]) + "".join(f"{LABELS[i]}{operators[i]}{digits[i + 1]}" for i in range(length)) + "?"


def chain_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) chain problems."""

    def draw(random: np.random.Generator) -> Problem:
        prompt = _chain_prompt(random, config.min_steps, config.max_steps)
        return Problem(prompt, chain_solution(prompt)[-1], "chain")

    return _different(draw, config, seed)


def _different(draw, config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems made by `draw`. A hash of the prompt decides its split: the two are disjoint."""
    wanted = {False: config.train_size or MADE, True: config.held_out_size}
    found: dict[bool, dict[str, Problem]] = {False: {}, True: {}}
    random = random_for(seed, Draw.PROBLEMS)
    for _ in range(10 * (wanted[False] + 10 * wanted[True])):
        problem = draw(random)
        held_out = zlib.crc32(problem.prompt.encode()) % 10 == 0
        if len(found[held_out]) < wanted[held_out]:
            found[held_out].setdefault(problem.prompt, problem)
        if all(len(found[split]) == wanted[split] for split in wanted):
            return list(found[False].values()), list(found[True].values())
    raise BadInput(
        f"data.train_size={wanted[False]}, data.held_out_size={wanted[True]}: there are not that many different "
        f"{config.source} problems of {config.min_steps} to {config.max_steps} steps; ask for fewer, or for longer ones"
    )


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character; `<bos>` goes in front of a prompt, `<eos>` ends a response."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = special + list(characters)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def chain_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer("0123456789+-*=;#?()" + LABELS)


# --- the print task -----------------------------------------------------------------------------------------------

MISREAD = 0.2  # chance per digit or operator that the demonstrator copies another one


def print_solution(prompt: str, noise: np.random.Generator | None = None) -> str:
    """A program that prints what the prompt asks for; the demonstrator misreads."""
    characters = list(prompt.removeprefix("print "))
    for i, character in enumerate(characters if noise else ""):
        if noise.random() < MISREAD:
            characters[i] = str(noise.choice(list("+-*" if character in "+-*" else "0123456789")))
    return f"```python\nprint({''.join(characters)})\n```"


def print_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Write a program that prints 3+5*2: the smallest task whose reward is to run what the model wrote."""

    def draw(random: np.random.Generator) -> Problem:
        chain = _chain_prompt(random, config.min_steps, config.max_steps)
        sum_ = re.sub("[a-z?]", "", chain)
        value = 0
        for sign, product in re.findall(r"([+-]?)((?:\d\*)*\d)", sum_):
            value += (-1 if sign == "-" else 1) * math.prod(map(int, product.split("*")))
        return Problem(f"print {sum_}", {"inputs": [""], "outputs": [str(value)]}, "code")

    return _different(draw, config, seed)


def print_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer("0123456789+-*()`\n printhoy")


# --- published datasets, a row each -------------------------------------------------------------------------------


def file_row(row: dict) -> Problem:
    """Your own rows: `prompt`, `reference`, and `grader` unless reward.grader names one for all."""
    return Problem(row["prompt"], row["reference"], row.get("grader", ""))


def gsm8k_row(row: dict) -> Problem:
    """openai/gsm8k: the solution's last line is `#### N`."""
    _, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("no '####' before the answer")
    return Problem(row["question"], answer.strip(), "number")


def aimo_row(row: dict) -> Problem:
    """AI-MO/aimo-validation-aime and -amc, whose answers are text ("025") and floats (142.0)."""
    answer = float(row["answer"])
    return Problem(row.get("question") or row["problem"], str(int(answer) if answer.is_integer() else answer), "number")


def aime24_row(row: dict) -> Problem | None:
    return aimo_row(row) if "2024_AIME" in row["url"] else None


def math500_row(row: dict) -> Problem:
    """PRIME's file (`expected_answer`) and HuggingFaceH4/MATH-500 (`answer`)."""
    return Problem(row["problem"], row.get("expected_answer") or row["answer"], "math")


def minerva_row(row: dict) -> Problem:
    """Minerva's file, and Hendrycks' MATH: the answer is boxed at the end of the solution."""
    return Problem(row["problem"], last_box(row["solution"]), "math")


def olympiadbench_row(row: dict) -> Problem:
    """`error` is a tolerance; a multiple answer is one text of several values."""
    reference = {
        "answer": ", ".join(row["final_answer"]),
        "multiple": row["is_multiple_answer"],
        "tolerance": float(row["error"]) if row["error"] else None,
        "unit": row["unit"],
    }
    return Problem("\n\n".join(filter(None, (row.get("context"), row["question"]))), reference, "math")


def eurus_row(row: dict) -> Problem:
    """PRIME-RL/Eurus-2-RL-Data: a chat, and LaTeX (maths) or a JSON text of test cases (code)."""
    *system, user = row["prompt"]
    if user["role"] != "user" or [turn["role"] for turn in system] not in ([], ["system"]):
        raise ValueError("its prompt is not one user's turn after at most one system's turn")
    truth, code = row["reward_model"]["ground_truth"], {"math": False, "code": True}[row["ability"]]
    told = sys.intern(system[0]["content"]) if system else ""  # the same text in every row: keep it once
    return Problem(user["content"], json.loads(truth) if code else truth, "code" if code else "math", told)


def eurus_math_row(row: dict) -> Problem | None:
    return eurus_row(row) if row["ability"] == "math" else None


def humaneval_row(row: dict) -> Problem:
    """openai/human-eval: the response repeats the function and completes it."""
    tests = {"script": f"{row['test']}\ncheck({row['entry_point']})\n", "entry_point": row["entry_point"]}
    question = f"Complete this function:\n\n```python\n{row['prompt']}```"
    return Problem(question, tests | {"prelude": row["prompt"]}, "code")


LEETCODE_IMPORTS = "import bisect, functools, heapq, itertools, math\nfrom collections import *\nfrom typing import *\n"


def leetcode_row(row: dict) -> Problem:
    """DeepSeek-Coder's LeetCode set; what stands between statement and solution (list nodes) is there for both."""
    helpers = row["prompt"].rpartition('"""')[2].partition("class Solution")[0]
    tests = {"script": row["test"], "entry_point": "Solution", "prelude": LEETCODE_IMPORTS + helpers}
    return Problem(row["prompt_sft"], tests, "code")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it holds {module}.{name}, not text alone")


def livecodebench_row(row: dict) -> Problem:
    """livecodebench/code_generation_lite: public and hidden tests, the latter packed (read without any class)."""
    hidden, metadata = row.get("private_test_cases") or "[]", json.loads(row.get("metadata") or "{}")
    if not hidden.lstrip().startswith("["):
        hidden = _PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(hidden)))).load()
    tests = {"tests": json.loads(row["public_test_cases"]) + json.loads(hidden)}
    if metadata.get("func_name"):
        tests["fn_name"] = metadata["func_name"]
    start = f"\n\nBegin with:\n\n```python\n{row['starter_code']}\n```" if row.get("starter_code") else ""
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
ASK_FOR_PROGRAM = "{question}\n\nPut the whole program, imports included, in one block that begins with ```python."
ASK_FOR_BOX = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {  # what stands around the question, where it is not ASK_FOR_BOX
    **dict.fromkeys(("humaneval", "leetcode", "livecodebench"), ASK_FOR_PROGRAM),
    **dict.fromkeys(("chain", "print", "file", "eurus", "eurus_math"), "{question}"),  # these say it themselves
}


def optional(module: str, package: str):
    """A module that only some runs need. Raises BadInput with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise BadInput(f"{package} is needed here and not installed: pip install {package}") from error


def rows_of(path: str) -> Iterator[tuple[str, dict]]:
    """(place, row) of a .jsonl, .json or .parquet file, or of NAME[:CONFIG][@SPLIT] on the Hub (split: train)."""
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
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            if isinstance(rows, dict):  # columns, as pandas writes them: {name: {row: value}}
                rows = [{name: rows[name][key] for name in rows} for key in next(iter(rows.values()))]
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
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise BadInput(
            f"data: cannot read {place} ({type(error).__name__}: {' '.join(str(error).split())[:200]}); it must be a "
            ".jsonl, .json or .parquet file, or NAME[:CONFIG][@SPLIT] of a dataset on the Hub"
        ) from error


def read_problems(shape: str, path: str) -> list[Problem]:
    """All problems of a dataset whose rows have this shape, in its order. Raises BadInput on a row that has another."""
    problems, others = [], 0
    for place, row in rows_of(path):
        try:
            problem = ROWS[shape](row)
            if problem and not (isinstance(problem.prompt, str) and problem.prompt.strip()):
                raise ValueError("its prompt is no text")
            if problem and problem.reference in (None, ""):
                raise ValueError("its reference is empty")
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error, pickle.UnpicklingError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"data: {place} is no {shape!r} row ({why}): mend it, or choose another source") from error
        problems.append(problem) if problem else (others := others + 1)
    if others:
        say(f"data: {others} of {others + len(problems)} rows of {path} are not of {shape!r}")
    if not problems:
        raise BadInput(f"data: {path} has no {shape!r} rows")
    return problems


def require_graders(problems: list[Problem], grader: str) -> None:
    """Raises BadInput where a problem's grader, or `grader` for all of them, is not known or not installed."""
    for name in {grader} if grader else {problem.grader for problem in problems}:
        try:
            check_grader(name, "the rows' grader")
        except ValueError as error:
            raise BadInput(f"data: {error}; reward.grader names one for all rows") from error


def dressed(problems: list[Problem], config: DataConfig) -> list[Problem]:
    """The problems as they are asked: the prompt's text around the question, the config's system prompt if it has one.

    `{question}` is found by plain search, not str.format: prompts and questions are full of braces.
    """
    around = config.prompt or PROMPTS.get(config.source, ASK_FOR_BOX)
    before, _, after = around.partition("{question}")
    return [replace(p, prompt=before + p.prompt + after, system=config.system_prompt or p.system) for p in problems]


# --- sources ------------------------------------------------------------------------------------------------------


def split(problems: list[Problem], held_out: list[Problem], config: DataConfig) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) of the configured sizes, no question in both.

    A hash of the question puts the problems in order; held-out ones come first where they are not given. So the split
    depends neither on the seed nor on the order of a file, and a part of a sorted file is a fair sample of it.
    """
    problems, held_out = (sorted(part, key=lambda p: zlib.crc32(p.prompt.encode())) for part in (problems, held_out))
    held_out = (held_out or problems)[: config.held_out_size]
    unseen = {problem.prompt for problem in held_out}
    train = [problem for problem in problems if problem.prompt not in unseen]
    if not train:
        raise BadInput(
            f"data: none of {len(problems)} problems is left to train on beside those held out: lower "
            f"data.held_out_size={config.held_out_size}, or set data.held_out_path"
        )
    return train[: config.train_size or None], held_out


def dataset_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of a published dataset or of your own file."""
    held_out = read_problems(config.source, config.held_out_path) if config.held_out_path else []
    return split(read_problems(config.source, config.path), held_out, config)


def reasoning_gym_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems of the reasoning-gym task that data.path names; the reference is the entry that its scorer wants."""
    gym, size = optional("reasoning_gym", "reasoning-gym"), (config.train_size or MADE) + config.held_out_size
    try:
        entries = list(gym.create_dataset(config.path, seed=seed, size=size))
    except (ValueError, TypeError, AssertionError) as error:
        raise BadInput(f"data.path={config.path!r} is no reasoning-gym task that works by name ({error})") from error
    return split([Problem(entry["question"], entry, "reasoning_gym") for entry in entries], [], config)


SOURCES = {"chain": chain_problems, "print": print_problems, "reasoning_gym": reasoning_gym_problems}
SOURCES |= dict.fromkeys(ROWS, dataset_problems)
# For the warm start of a new model: (prompt, noise or None) -> text, and the tokenizer of such texts.
DEMONSTRATORS = {"chain": chain_solution, "print": print_solution}
TOKENIZERS = {"chain": chain_tokenizer, "print": print_tokenizer}


def demonstrator(config: DataConfig):
    """(prompt, noise or None) -> text, of the source's demonstrator with the config's settings."""
    settings = {"repeat_slip": config.repeat_slip} if config.source == "chain" else {}
    return partial(DEMONSTRATORS[config.source], **settings)


def load_problems(config: DataConfig, seed: int, grader: str = "") -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of `config.source`, as they are asked. `grader`: reward.grader.

    Raises BadInput where the source does not have that many or cannot be read, or a grader is not known.
    """
    train, held_out = SOURCES[config.source](config, seed)
    require_graders(train + held_out, grader)
    return dressed(train, config), dressed(held_out, config)


# --- prompts ------------------------------------------------------------------------------------------------------


def prompt_text(problem: Problem, tokenizer, chat_template: bool) -> str:
    """What the model continues: with `chat_template` the chat up to where its turn begins, else the plain text.

    A system prompt goes in front of the prompt where there is no template, or where the template has no system's turn.
    """
    together = f"{problem.system}\n\n{problem.prompt}" if problem.system else problem.prompt
    if not chat_template:
        return together

    def chat(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    if problem.system:
        with suppress(Exception):  # templates without a system's turn raise, each in its own way
            text = chat(("system", problem.system), ("user", problem.prompt))
            if problem.system.strip() in text:  # or leave it out without a word
                return text
    return chat(("user", together))


class TokenIds(Sequence):
    """Reads as a list of lists of ids, and takes 4 bytes an id: half a million prompts in lists would take 15 GiB."""

    def __init__(self, rows: list[array]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return TokenIds(self.rows[i]) if isinstance(i, slice) else self.rows[i].tolist()


def encode_prompts(
    problems: list[Problem], tokenizer, limit: int, chat_template: bool = True
) -> tuple[list[Problem], TokenIds]:
    """The problems whose prompts fit into `limit` tokens, and those prompts' ids; the others are counted, not cut.

    With `chat_template`, in the tokenizer's chat template if it has one, which writes its own begin token then.
    """
    chat = chat_template and bool(tokenizer.chat_template)
    fitting, rows = [], []
    for start in range(0, len(problems), 1000):
        part = problems[start : start + 1000]
        texts = [prompt_text(problem, tokenizer, chat) for problem in part]
        for problem, ids in zip(part, tokenizer(texts, add_special_tokens=not chat).input_ids, strict=True):
            if len(ids) <= limit:
                fitting.append(problem)
                rows.append(array("i", ids))
    if not fitting:
        raise BadInput(
            f"all {len(problems)} prompts are longer than {limit} tokens: raise data.max_prompt_tokens, or, where the "
            "model's context is the limit, lower sample.max_new_tokens"
        )
    if len(fitting) < len(problems):
        say(f"data: left out {len(problems) - len(fitting)} of {len(problems)} prompts, longer than {limit} tokens")
    return fitting, TokenIds(rows)
