"""The chain task, which a 170k-parameter model learns on a CPU: a chain of labelled operations
modulo 10.

A prompt is evaluated from left to right; a solution writes one labelled step per operation:

    prompt    3b+5c*2d-7?
    solution  b3+5=8;c8*2=6;d6-7=9;#9

The demonstrator is noisy: it slips, it has a misconception about large products (so that even
greedy decoding errs), and it repeats some steps in brackets, which carries no information. RL has
accuracy to gain and length to lose.
"""

import re

import numpy as np
from transformers import PreTrainedTokenizerFast

from tasks.characters import character_tokenizer
from tasks.problem import Problem, made_problems
from tasks.traces import Step, verified_steps

LABELS = "bcdefghijklmnopqrstuvwxyz"
SLIP = 0.12  # chance per step that the demonstrator's result is off by one
MISCONCEPTION = 0.6  # chance that a product of two digits >= 6 comes out one too high
# Chance of repeating a step; a demonstration draws one of these for all its steps
REPEATS = (
    0.0,
    0.5,
    1.0,
)
_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_QUESTION = re.compile(r"[0-9](?:[a-z][-+*][0-9])+\?")
_STEP = re.compile(r"\s*#[0-9]?|[^;)#]*[;)]|[^;)#]+")  # the answer, or what a ; or a bracket ends


def chain_solution(
    prompt: str, noise: np.random.Generator | None = None, repeat_slip: float = SLIP
) -> str:
    """The written solution of a chain prompt: right and concise, or with the demonstrator's noise.

    A wrong result is carried on into the following steps, as a person's would be. Where it repeats
    steps, the demonstrator slips with chance `repeat_slip` per step: it sets how length and being
    right go together.
    """
    value, lines = int(prompt[0]), []
    repeat = noise.choice(REPEATS) if noise else 0.0
    slip = repeat_slip if repeat else SLIP
    for label, operator, digit in re.findall(r"([a-z])([-+*])(\d)", prompt):
        result = _OPERATIONS[operator](value, int(digit)) % 10
        if (
            noise
            and operator == "*"
            and min(value, int(digit)) >= 6
            and noise.random() < MISCONCEPTION
        ):
            result = (result + 1) % 10
        if noise and noise.random() < slip:
            result = (result + noise.choice((-1, 1))) % 10
        step = f"{label}{value}{operator}{digit}={result}"
        lines.append(step + ";" + (f"({step})" if noise and noise.random() < repeat else ""))
        value = result
    return "".join(lines) + f"#{value}"


def chain_trace(prompt: str, text: str) -> list[Step]:
    """Which steps of a response are right: `b3+5=8;`, a repetition `(b3+5=8)`, the answer `#9`.

    Whatever text stands around the question in the prompt.
    """
    question = _QUESTION.findall(prompt)[-1]
    solution = _STEP.findall(chain_solution(question))
    return verified_steps(text, _STEP, solution, lambda step: f"({step.removesuffix(';')})")


def chain_prompt(random: np.random.Generator, min_steps: int, max_steps: int) -> str:
    length = random.integers(min_steps, max_steps + 1)
    operators, digits = random.choice(list(_OPERATIONS), length), random.integers(0, 10, length + 1)
    return (
        str(digits[0])
        + "".join(f"{LABELS[i]}{operators[i]}{digits[i + 1]}" for i in range(length))
        + "?"
    )


def chain_problems(config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) chain problems."""

    def draw(random: np.random.Generator) -> Problem:
        prompt = chain_prompt(random, config.min_steps, config.max_steps)
        return Problem(prompt, chain_solution(prompt)[-1], "chain")

    return made_problems(draw, config, seed)


def chain_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer("0123456789+-*=;#?()" + LABELS)
