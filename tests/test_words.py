"""Word problems: stories, their right solutions and the noisy ones, each against arithmetic done here."""

import re
from collections import Counter

import infra.rng
import numpy as np
import pytest
import tasks.words
from data import DataConfig, load_problems
from infra.rng import Draw
from rewards import Grader
from tasks.words import story, words_solution

WORDS = DataConfig(source="words", min_steps=2, max_steps=4, train_size=300, held_out_size=60)
LINE = re.compile(r"(?:Check: )?(\d+) ([-+*/]) (\d+) = (\d+)")


def told_steps(prompt: str) -> list[str]:
    """What each sentence between the first and the question does to the number, as a Python expression of v.

    Read by its verb alone, unlike the templates in tasks/words.py.
    """
    expressions = []
    for sentence in prompt.split(". ")[1:-1]:
        number = (re.findall(r"\d+", sentence) or [""])[0]
        if "doubles" in sentence or "triples" in sentence:
            expressions.append("v*2" if "doubles" in sentence else "v*3")
        elif "half" in sentence or "shares" in sentence:
            expressions.append(f"v/{number or 2}")
        else:
            gains = re.search(r"buys|finds|gives (her|him) ", sentence)
            expressions.append(f"v{'+' if gains else '-'}{number}")
    return expressions


def test_the_reference_is_what_the_story_says_and_numbers_stay_small():
    train, held_out = load_problems(WORDS, 0)
    steps, verbs = Counter(), Counter()
    for problem in train + held_out:
        value = int(re.match(r"\w+ has (\d+) ", problem.prompt)[1])
        expressions = told_steps(problem.prompt)
        for expression in expressions:
            value = eval(expression, {"v": value})
            assert value == int(value) and 2 <= value <= tasks.words.LARGEST
            verbs[expression[1]] += 1
        assert problem.reference == str(int(value))
        steps[len(expressions)] += 1
    assert set(steps) == {2, 3, 4} and set(verbs) == set("+-*/")
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}


def test_the_right_solution_has_one_right_line_for_each_sentence_and_is_graded_right():
    grader = Grader()
    for problem in load_problems(WORDS, 1)[0]:
        text = words_solution(problem.prompt)
        value, lines = int(re.match(r"\w+ has (\d+) ", problem.prompt)[1]), text.split("\n")
        assert len(lines) == len(told_steps(problem.prompt)) + 1
        for line, expression in zip(lines, told_steps(problem.prompt), strict=False):
            left, _, _, right = LINE.fullmatch(line).groups()
            assert int(left) == value
            value = int(eval(expression, {"v": value}))
            assert int(right) == value
        assert grader.grade_one("number", text, problem.reference).score == 1.0


def test_text_around_a_story_does_not_change_how_it_is_read():
    for seed in range(20):
        told = story(np.random.default_rng(seed), 2, 4)
        around = f"Solve this.\n{told}\nOne line a step, please, e.g. 3 + 4 = 7."
        assert words_solution(around) == words_solution(told)


def test_the_demonstrator_slips_by_one_carries_it_on_and_writes_some_lines_twice():
    slips, twice = Counter(), Counter()
    for i, problem in enumerate(load_problems(WORDS, 0)[0]):
        value, previous, repeated = int(re.match(r"\w+ has (\d+) ", problem.prompt)[1]), "", 0
        text = words_solution(problem.prompt, infra.rng.rng_for(0, Draw.DEMONSTRATE, i))
        lines = text.split("\n")
        for line in lines[:-1]:
            if line.startswith("Check: "):
                assert line == f"Check: {previous}"
                repeated += 1
                continue
            left, sign, number, result = LINE.fullmatch(line).groups()
            assert int(left) == value  # a wrong result goes on
            right = int(eval(f"{left} {sign.replace('/', '//')} {number}"))
            slips[int(result) - right] += 1
            value, previous = int(result), line
        assert lines[-1] == f"The answer is \\boxed{{{value}}}."
        twice["steps"] += len(lines) - 1 - repeated
        twice["repeated"] += repeated
    n = sum(slips.values())
    for slip, rate in {0: 1 - tasks.words.SLIP, 1: tasks.words.SLIP / 2, -1: tasks.words.SLIP / 2}.items():
        assert slips[slip] / n == pytest.approx(rate, abs=5 * (rate * (1 - rate) / n) ** 0.5)
    assert twice["repeated"] / twice["steps"] == pytest.approx(0.25, abs=0.06)  # half of them, of every second text
