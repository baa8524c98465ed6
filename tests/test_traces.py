"""Verified traces: which steps of a response are right, against arithmetic done here, and which tokens are theirs."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import train
from baselines import prepare, traces
from data import DataConfig, load_problems
from infra.rng import Draw, rng_for
from spro import AlgorithmConfig, Batch
from tasks import TRACES
from tasks.chain import chain_solution, chain_tokenizer, chain_trace
from tasks.problem import Problem
from tasks.words import words_solution, words_trace

from helpers import chat_tokenizer
from test_words import told_steps

CHAIN = "3b+5c*2d-7?"  # b3+5=8;c8*2=6;d6-7=9;#9
STORY = "Mia has 12 shells. She buys 5 more. She gives 3 to Tom. How many shells does Mia have now?"
MARKS = {"+": True, "-": False, "?": None}
CHAIN_CASES = {  # the steps of a response, each behind its mark: + right, - the first wrong one, ? not judged
    "the solution": "+b3+5=8; +c8*2=6; +d6-7=9; +#9",
    "with repetitions": "+b3+5=8; +(b3+5=8) +c8*2=6; +(b3+5=8) +(c8*2=6) +d6-7=9; +#9",
    "a slip that is carried on": "+b3+5=8; -c8*2=7; ?d7-7=0; ?#0",
    "a repetition that is none": "+b3+5=8; -(b3+5=7) ?c8*2=6; ?d6-7=9; ?#9",
    "a repetition of what has not been written": "-(b3+5=8) ?b3+5=8; ?#9",
    "a repetition without its brackets": "+b3+5=8; -b3+5=8; ?c8*2=6;",
    "a step left out": "+b3+5=8; -d8-7=1; ?#1",
    "the answer at once": "-#9",
    "a wrong answer": "+b3+5=8; +c8*2=6; +d6-7=9; -#8",
    "text behind the answer": "+b3+5=8; +c8*2=6; +d6-7=9; +#9 -;",
    "a second answer": "+b3+5=8; +c8*2=6; +d6-7=9; +#9 -#9",
    "no end of a step": "+b3+5=8; -c8*2=6(c8*2=6) ?#6",
    "an answer amid a step": "+b3+5=8; -c8* ?#9",
    "nothing": "-",
    "an early end": "+b3+5=8; +c8*2=6; -",
    "an early end amid a right step": "+b3+5=8; ?c8*2 -",
    "an early end amid a repetition": "+b3+5=8; ?(b3+ -",
    "an early end amid a wrong step": "+b3+5=8; -c8*3",
    "an answer without its digit": "+b3+5=8; +c8*2=6; +d6-7=9; ?# -",
}
WORDS_CASES = {
    "the solution": ["+12 + 5 = 17\n", "+17 - 3 = 14\n", "+The answer is \\boxed{14}."],
    "with a check": ["+12 + 5 = 17\n", "+Check: 12 + 5 = 17\n", "+17 - 3 = 14\n", "+The answer is \\boxed{14}."],
    "a check of the line before the last": ["+12 + 5 = 17\n", "+17 - 3 = 14\n", "+Check: 12 + 5 = 17\n", "-"],
    "a check that is wrong": ["+12 + 5 = 17\n", "-Check: 12 + 5 = 18\n", "?17 - 3 = 14"],
    "a check of nothing": ["-Check: 12 + 5 = 17\n", "?12 + 5 = 17"],
    "spaces and empty lines": ["+ \n12 + 5 = 17 \n\n", "+17 - 3 = 14\n  ", "+The answer is \\boxed{14}.\n"],
    "other words": ["-First, 12 + 5 = 17.\n", "?17 - 3 = 14"],
    "a slip": ["+12 + 5 = 17\n", "-17 - 3 = 15\n", "?The answer is \\boxed{15}."],
    "another sentence behind the answer": ["+12 + 5 = 17\n", "+17 - 3 = 14\n", "+The answer is \\boxed{14}.\n", "-Bye"],
    "an early end": ["+12 + 5 = 17\n", "?17 - 3", "-"],
    "an early end behind a line": ["+12 + 5 = 17\n", "+17 - 3 = 14", "-"],
    "nothing": ["-"],
}


def seen(steps, text: str) -> list[tuple[str, bool | None]]:
    """The text and the judgement of each step, which together must be the whole response."""
    assert "".join(text[step.start : step.end] for step in steps) == text
    return [(text[step.start : step.end], step.right) for step in steps]


@pytest.mark.parametrize("case", CHAIN_CASES)
def test_steps_of_a_chain_are_right_up_to_the_first_wrong_one(case):
    expected = [(step[1:], MARKS[step[0]]) for step in CHAIN_CASES[case].split()]
    text = "".join(step for step, _ in expected)
    assert seen(chain_trace(CHAIN, text), text) == expected
    assert chain_trace(f"Solve 1b+1?\n{CHAIN} Step by step.", text) == chain_trace(CHAIN, text)


@pytest.mark.parametrize("case", WORDS_CASES)
def test_lines_of_a_word_problem_are_right_up_to_the_first_wrong_one(case):
    expected = [(line[1:], MARKS[line[0]]) for line in WORDS_CASES[case]]
    text = "".join(line for line, _ in expected)
    assert seen(words_trace(STORY, text), text) == expected


def first_slip(source: str, prompt: str, text: str) -> int | None:
    """Where in the demonstrator's text the first wrong line begins, walking along its lines with arithmetic alone."""
    if source == "chain":
        value, changes = int(prompt[0]), [f"v{x}" for x in re.findall(r"[-+*]\d", prompt)]
        text = re.sub(r"\([^)]*\)", lambda match: " " * len(match[0]), text)  # repetitions
        lines = re.finditer(r"[^; ]+", text)
    else:
        value, changes = int(re.match(r"\w+ has (\d+) ", prompt)[1]), told_steps(prompt)
        lines = (line for line in re.finditer(r"[^\n]+", text) if not line[0].startswith("Check"))
    for line in lines:
        if changes:
            value = int(eval(changes.pop(0), {"v": value})) % (10 if source == "chain" else 1000)
        if int(re.findall(r"\d+", line[0])[-1]) != value:
            return line.start()
    return None


@pytest.mark.parametrize(("source", "solve"), [("chain", chain_solution), ("words", words_solution)])
def test_the_demonstrators_first_slip_is_found_and_its_right_texts_have_none(source, solve):
    slips = 0
    for i, problem in enumerate(load_problems(DataConfig(source=source, train_size=200), 0)[0]):
        right = solve(problem.prompt)
        assert all(mark for _, mark in seen(TRACES[source](problem.prompt, right), right))
        text = solve(problem.prompt, rng_for(0, Draw.DEMONSTRATE, i))
        steps = TRACES[source](problem.prompt, text)
        marks = [mark for _, mark in seen(steps, text)]
        slip = first_slip(source, problem.prompt, text)
        if slip is None:
            assert all(marks)
            continue
        first = marks.index(False)
        assert steps[first].start == slip and all(marks[:first]) and set(marks[first + 1 :]) <= {None}
        slips += 1
    assert 40 < slips < 160


# --- on tokens ----------------------------------------------------------------------------------------------------


def traced(texts: list[str], tokenizer, prompt: str, source: str, truncated: bool = False):
    """(the texts of the tokens, labels, numbers) of each response; a truncated one has no stop token."""
    batch = Batch.from_texts([[1]] * len(texts), texts, tokenizer)
    batch = dataclasses.replace(batch, problems=(Problem(prompt, "", source),) * len(texts))
    if truncated:
        last = batch.mask & ~torch.nn.functional.pad(batch.mask, (0, 1))[:, 1:]
        batch = dataclasses.replace(batch, mask=batch.mask & ~last, truncated=~batch.truncated)
    labels, numbers = traces.verified(batch, tokenizer, TRACES[source])
    assert labels.dtype == torch.int8 and (labels[~batch.mask] == -1).all() and (numbers[~batch.mask] == -1).all()
    rows = zip(batch.tokens[:, 1:], batch.mask, labels, numbers, strict=True)
    return [
        ([tokenizer.decode([i]) for i in row[live].tolist()], mine[live].tolist(), ids[live].tolist())
        for row, live, mine, ids in rows
    ]


@pytest.mark.parametrize("case", CHAIN_CASES)
def test_a_character_is_a_token_and_the_stop_token_belongs_to_the_step_that_it_ends(case):
    pieces = [(step[1:], {"+": 1, "-": 0, "?": -1}[step[0]]) for step in CHAIN_CASES[case].split()]
    labels = [label for text, label in pieces for _ in text]
    numbers = [number for number, (text, _) in enumerate(pieces) for _ in text]
    text = "".join(text for text, _ in pieces)
    ((_, found, places),) = traced([text], chain_tokenizer(), CHAIN, "chain")
    assert found == [*labels, pieces[-1][1]] and places == [*numbers, len(pieces) - 1]
    if text:  # cut off: it did not end, and so did not end wrongly
        ((_, found, places),) = traced([text], chain_tokenizer(), CHAIN, "chain", truncated=True)
        assert found == labels and places == numbers


def test_tokens_of_several_characters_belong_to_the_step_of_their_last():
    """Whatever the tokenizer cuts: each token against the characters that it holds, one by one."""
    straddling = 0
    tokenizer = chat_tokenizer(["= 17\n17 - 3 = 14\nThe answer is \\boxed{14}.", "7\n1", "\n\n1", " \n12"] * 50, 400)
    tokenizer.add_tokens(["7\n17", "7\nThe"])
    texts = ["".join(line[1:] for line in lines) for lines in WORDS_CASES.values()]
    for text, (pieces, labels, _) in zip(texts, traced(texts, tokenizer, STORY, "words"), strict=True):
        of_character = [None] * len(text)
        for step in words_trace(STORY, text):
            of_character[step.start : step.end] = [step.right] * (step.end - step.start)
        place = 0
        for piece, label in zip(pieces[:-1], labels[:-1], strict=True):
            held = of_character[place : place + len(piece)]
            assert label == {True: 1, False: 0, None: -1}[held[-1]]
            straddling += len(set(held)) > 1
            place += len(piece)
        assert place == len(text)
    assert straddling > 1


def test_control_tokens_and_parts_of_characters_stand_in_their_step():
    tokenizer = chat_tokenizer(["12 + 5 = 17"])
    start, eos = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer.eos_token_id
    line, emoji = (tokenizer(text).input_ids for text in ("12 + 5 = 17\n", "🙂"))
    ids = [*line[:3], start, *line[3:], *emoji, eos]
    assert len(emoji) > 1
    batch = Batch(
        tokens=torch.tensor([[0, *ids]]),
        attention_mask=torch.ones(1, len(ids) + 1).bool(),
        mask=torch.ones(1, len(ids)).bool(),
        truncated=torch.tensor([False]),
        texts=("12 + 5 = 17\n🙂",),
        problems=(Problem(STORY, "14", "number"),),
    )
    labels, numbers = traces.verified(batch, tokenizer, words_trace)
    assert labels[0].tolist() == [1] * (len(line) + 1) + [0] * (len(emoji) + 1)
    assert numbers[0].tolist() == [0] * (len(line) + 1) + [1] * (len(emoji) + 1)


def test_what_a_stop_string_cuts_off_is_not_judged_and_ends_the_last_step():
    tokenizer = chat_tokenizer(["12 + 5 = 17"])
    graded = "12 + 5 = 17\n17 - 3 = 14\nThe answer is \\boxed{14}."
    batch = Batch.from_texts([[1]], [graded + "\nQ: and"], tokenizer)
    batch = dataclasses.replace(batch, texts=(graded,), problems=(Problem(STORY, "14", "number"),))
    assert set(traces.verified(batch, tokenizer, words_trace)[0][0].tolist()) == {1}
    early = dataclasses.replace(batch, texts=("12 + 5 = 17\n",))
    labels = traces.verified(early, tokenizer, words_trace)[0][0].tolist()
    n = len(tokenizer("12 + 5 = 17\n").input_ids)
    assert labels == [1] * n + [0] * (len(labels) - n)


# --- in a run -----------------------------------------------------------------------------------------------------


def prepared(source: str, advantage: str, seed: int = 0, step: int = 1):
    config = SimpleNamespace(
        seed=seed,
        algorithm=AlgorithmConfig(advantage=advantage),
        data=SimpleNamespace(source=source),
        train=SimpleNamespace(epochs=1),
        learns_beside=None,
    )
    batch = Batch.from_texts([[1]] * 2, ["b3+5=8;c8*2=6;d6-7=9;#9", "#9"], chain_tokenizer())
    batch = dataclasses.replace(batch, problems=(Problem(CHAIN, "9", "chain"),) * 2, group_size=2)
    policy = SimpleNamespace(tokenizer=chain_tokenizer())
    return prepare.prepared(batch, None, {"policy": (policy, None)}, config, [], step, None)[0]


def test_every_run_of_a_task_with_a_trace_has_its_labels_and_luck_is_there_where_it_is_needed():
    assert prepared("print", "grpo").step_labels is None
    batch = prepared("chain", "grpo")
    assert batch.luck is None and batch.step_labels[:, :3].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.trace_ids[0][batch.mask[0]].tolist() == [0] * 7 + [1] * 7 + [2] * 7 + [3] * 3
    lucks = [prepared("chain", "random_blame", seed, step).luck for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert lucks[0].equal(lucks[1]) and all((luck >= 0).all() and (luck < 1).all() for luck in lucks)
    assert len({tuple(luck.tolist()) for luck in lucks}) == 3


@pytest.mark.parametrize("name", ["oracle", "random_blame", "posterior_grpo"])
def test_an_estimator_that_reads_a_trace_is_refused_where_the_task_has_none(name):
    with pytest.raises(ValueError, match=f"{name} reads .* data.source='print' .*: choose one of chain, words"):
        train.Config(data=DataConfig(source="print"), algorithm=AlgorithmConfig(advantage=name))
    train.Config(data=DataConfig(source="chain"), algorithm=AlgorithmConfig(advantage=name))
    train.Config(data=DataConfig(source="print"), algorithm=AlgorithmConfig(advantage="positives"))
