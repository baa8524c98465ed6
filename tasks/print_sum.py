"""The print task: write a program that prints 3+5*2, the smallest task whose reward is to run
what the model wrote.
"""

import math
import re

import numpy as np
from transformers import PreTrainedTokenizerFast

from tasks.chain import chain_prompt
from tasks.characters import character_tokenizer
from tasks.problem import Problem, made_problems

MISREAD = 0.2  # chance per digit or operator that the demonstrator copies another one


def print_solution(prompt: str, noise: np.random.Generator | None = None) -> str:
    """A program that prints what the prompt asks for; the demonstrator misreads."""
    characters = list(prompt.removeprefix("print "))
    for i, character in enumerate(characters if noise else ""):
        if noise.random() < MISREAD:
            characters[i] = str(noise.choice(list("+-*" if character in "+-*" else "0123456789")))
    return f"```python\nprint({''.join(characters)})\n```"


def print_problems(config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Write a program that prints 3+5*2: the smallest task whose reward is to run what the model
    wrote.
    """

    def draw(random: np.random.Generator) -> Problem:
        chain = chain_prompt(random, config.min_steps, config.max_steps)
        sum_ = re.sub("[a-z?]", "", chain)
        value = 0
        for sign, product in re.findall(r"([+-]?)((?:\d\*)*\d)", sum_):
            value += (-1 if sign == "-" else 1) * math.prod(map(int, product.split("*")))
        return Problem(f"print {sum_}", {"inputs": [""], "outputs": [str(value)]}, "code")

    return made_problems(draw, config, seed)


def print_tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer("0123456789+-*()`\n printhoy")
