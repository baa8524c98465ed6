"""Word problems, for a model that knows English: a short story, one operation a sentence.

    prompt    Mia has 12 shells. She buys 5 more. She gives 3 to Tom. How many shells does Mia have?
    solution  12 + 5 = 17
              17 - 3 = 14
              The answer is \\boxed{14}.

A story can be read back (`operations`), so there is a right line for every step of a solution. The
demonstrator is noisy: it slips, and it writes some lines twice, which carries no information. RL
has accuracy to gain and length to lose.
"""

import operator
import re
from functools import cache

import numpy as np

from tasks.problem import Problem, made_problems
from tasks.traces import Step, verified_steps

PEOPLE = (
    *(f"{name} She her" for name in ("Mia", "Ann", "Zoe", "Ivy", "Ruth", "Nora", "Lily", "Emma")),
    *(f"{name} He him" for name in ("Tom", "Raj", "Leo", "Sam", "Ben", "Omar", "Paul", "Max")),
)
THINGS = ("apples", "pens", "coins", "books", "cards", "eggs", "shells", "stamps", "keys", "cups")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
SENTENCES = (  # what happens, its operation, and the number where the text does not say it
    ("{He} buys {n} more.", "+", None),
    ("{He} finds {n} more.", "+", None),
    ("{friend} gives {him} {n}.", "+", None),
    ("{He} gives {n} to {friend}.", "-", None),
    ("{He} loses {n}.", "-", None),
    ("{He} sells {n}.", "-", None),
    ("Then {name} doubles the number of {things}.", "*", 2),
    ("Then {name} triples the number of {things}.", "*", 3),
    ("{He} gives half of them away.", "/", 2),
    ("{He} shares them equally among {n} boxes and keeps one box.", "/", None),
)
LARGEST = 20  # number of things at any time
MOST_CHANGE = 5  # that are added or taken away at once
SLIP = 0.15  # chance per line that the demonstrator's result is off by one
REPEATS = (0.0, 0.5)  # chance of writing a line twice; a demonstration draws one of these
_LINE = re.compile(r"\s*\S[^\n]*\s*")  # with the empty lines behind it


def operand(sign: str, value: int, random: np.random.Generator) -> int | None:
    """A number for the next sentence, such that the story goes on with 2..LARGEST things, if there
    is one.
    """
    choices = {
        "+": range(2, min(MOST_CHANGE, LARGEST - value) + 1),
        "-": range(2, min(MOST_CHANGE, value - 2) + 1),
        "*": [n for n in (2, 3) if value * n <= LARGEST],
        "/": [n for n in (2, 3, 4) if value % n == 0 and value // n >= 2],
    }[sign]
    return int(random.choice(choices)) if len(choices) else None


def story(random: np.random.Generator, min_steps: int, max_steps: int) -> str:
    person, friend = random.choice(len(PEOPLE), 2, replace=False)
    name, he, him = PEOPLE[person].split()
    words = {"name": name, "He": he, "him": him, "friend": PEOPLE[friend].split()[0]}
    words["things"] = str(random.choice(THINGS))
    value = int(random.integers(3, 13))
    told = [f"{name} has {value} {words['things']}."]
    steps = int(random.integers(min_steps, max_steps + 1))
    while len(told) <= steps:
        text, sign, fixed = SENTENCES[random.integers(len(SENTENCES))]
        n = operand(sign, value, random)
        if n is None or fixed not in (None, n):
            continue
        told.append(text.format(n=n, **words))
        value = OPERATIONS[sign](value, n)
    return " ".join([*told, f"How many {words['things']} does {name} have now?"])


@cache
def pattern(sentence: str) -> re.Pattern:
    """Finds a sentence of a story, and its number as the group "n"."""
    text = re.escape(sentence).replace(r"\{n\}", r"(?P<n>\d+)")
    return re.compile(re.sub(r"\\{\w+\\}", r"\\w+", text))


def operations(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """(the number at the start, [(sign, number), ...]) of a story, whatever text stands around
    it.
    """
    start = re.search(r"\w+ has (\d+) \w+\.", prompt)
    found = []
    for sentence, sign, fixed in SENTENCES:
        for match in pattern(sentence).finditer(prompt, start.end()):
            found.append((match.start(), sign, fixed or int(match["n"])))
    return int(start[1]), [(sign, n) for _, sign, n in sorted(found)]


def words_solution(prompt: str, noise: np.random.Generator | None = None) -> str:
    """The written solution of a story: right and concise, or with the demonstrator's noise.

    A wrong result is carried on into the following lines, as a person's would be.
    """
    value, steps = operations(prompt)
    repeat = noise.choice(REPEATS) if noise else 0.0
    lines = []
    for sign, n in steps:
        result = OPERATIONS[sign](value, n)
        if noise and noise.random() < SLIP:
            result += int(noise.choice((-1, 1)))
        line = f"{value} {sign} {n} = {result}"
        lines += [line, f"Check: {line}"] if noise and noise.random() < repeat else [line]
        value = result
    return "\n".join([*lines, f"The answer is \\boxed{{{value}}}."])


def words_trace(prompt: str, text: str) -> list[Step]:
    """Which lines of a response are right: the solution's, or `Check:` and one of them again."""
    solution = words_solution(prompt).split("\n")
    return verified_steps(text, _LINE, solution, lambda line: f"Check: {line}")


def words_problems(config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) word problems."""

    def draw(random: np.random.Generator) -> Problem:
        prompt = story(random, config.min_steps, config.max_steps)
        start, steps = operations(prompt)
        for sign, n in steps:
            start = OPERATIONS[sign](start, n)
        return Problem(prompt, str(start), "number")

    return made_problems(draw, config, seed)
