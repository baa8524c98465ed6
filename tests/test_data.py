"""The chain task against an evaluator written from its description; the order of prompts; the tokenizer."""

import random
from collections import Counter

import pytest
from helpers import BOS, UNK
from transformers import AutoTokenizer

import data
from data import DataConfig, Draw, Problem, chain_solution, chain_tokenizer, encode_prompts, index_at, load_problems
from run import BadInput

SMALL = DataConfig(train_size=800, held_out_size=100)


def steps_of(prompt: str) -> list[tuple[str, str, int]]:
    """(label, operator, digit) of every operation of "3b+5c*2?", by counting characters."""
    assert prompt[0].isdigit() and prompt[-1] == "?" and len(prompt) % 3 == 2
    return [(prompt[i], prompt[i + 1], int(prompt[i + 2])) for i in range(1, len(prompt) - 1, 3)]


def apply(value: int, operator: str, digit: int) -> int:
    return {"+": value + digit, "-": value - digit, "*": value * digit}[operator] % 10


def test_splits_depend_on_the_seed_alone_and_are_disjoint_under_all_seeds():
    assert load_problems(SMALL, 3) == load_problems(SMALL, 3) != load_problems(SMALL, 4)
    train, held_out = ([problem.prompt for problem in part] for part in load_problems(SMALL, 0))
    assert (len(set(train)), len(set(held_out))) == (800, 100) and {len(steps_of(p)) for p in train} == {3, 4, 5, 6}
    assert all("bcdefg".startswith("".join(label for label, *_ in steps_of(prompt))) for prompt in train)
    few = DataConfig(train_size=200, held_out_size=20, min_steps=1, max_steps=1)  # of 300 possible prompts
    train, held_out = zip(*(load_problems(few, seed) for seed in range(3)), strict=True)
    assert not {p.prompt for part in train for p in part} & {p.prompt for part in held_out for p in part}


@pytest.mark.parametrize("sizes", [(320, 1), (1, 60)])
def test_more_problems_than_there_are_is_bad_input(sizes):
    with pytest.raises(BadInput, match=f"train_size={sizes[0]}, .*held_out_size={sizes[1]}[^\\n]*$"):
        load_problems(DataConfig(train_size=sizes[0], held_out_size=sizes[1], min_steps=1, max_steps=1), 0)


@pytest.mark.parametrize("field", ["train_size=-1", "held_out_size=0", "min_steps=0", "max_steps=2", "max_steps=26"])
def test_impossible_sizes_are_refused_by_name(field):
    name, value = field.split("=")
    with pytest.raises(ValueError, match=field):
        DataConfig(**{name: int(value)})


def test_every_epoch_is_a_different_permutation_and_no_position_depends_on_what_was_asked_before():
    in_order = [index_at(p, 50, 7) for p in range(200)]
    epochs = [in_order[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert [index_at(p, 50, 8) for p in range(50)] not in epochs
    for position in random.Random(0).sample(range(200), 200):
        data._permutation.cache_clear()
        assert index_at(position, 50, 7) == in_order[position]


def test_references_and_clean_solutions_are_what_the_description_says():
    assert chain_solution("3b+5c*2d-7?") == "b3+5=8;c8*2=6;d6-7=9;#9"
    for problem in load_problems(SMALL, 0)[0]:
        value, expected = int(problem.prompt[0]), ""
        for label, operator, digit in steps_of(problem.prompt):
            result = apply(value, operator, digit)
            expected, value = expected + f"{label}{value}{operator}{digit}={result};", result
        assert chain_solution(problem.prompt) == expected + f"#{value}"
        assert (problem.reference, problem.grader) == (str(value), "chain")


def assert_rates(counts: Counter, rates: dict[int, float]):
    n = sum(counts.values())
    assert set(counts) <= set(rates) and sum(rates.values()) == pytest.approx(1)
    assert all(abs(counts[case] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 for case, p in rates.items())


def test_noisy_demonstrations_err_and_repeat_at_their_rates_and_carry_errors_on():
    errors, repeats = {False: Counter(), True: Counter()}, Counter()
    config = DataConfig(train_size=5000, held_out_size=1, min_steps=4, max_steps=4)
    for i, prompt in enumerate(problem.prompt for problem in load_problems(config, 0)[0]):
        text, value = chain_solution(prompt, data.random_for(0, Draw.DEMONSTRATE, i)), int(prompt[0])
        repeats[text.count("(")] += 1
        for label, operator, digit in steps_of(prompt):
            start = f"{label}{value}{operator}{digit}="
            assert text.startswith(start)  # on from the previous result, right or wrong
            result = int(text[len(start)])
            text = text.removeprefix(f"{start}{result};").removeprefix(f"({start}{result})")
            large_product = operator == "*" and value >= 6 and digit >= 6
            errors[large_product][(result - apply(value, operator, digit)) % 10] += 1
            value = result
        assert text == f"#{value}"
    s, m, coin = data.SLIP, data.MISCONCEPTION, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16]
    assert_rates(errors[False], {0: 1 - s, 1: s / 2, 9: s / 2})  # a slip is off by one, either way
    large = {0: (1 - m) * (1 - s) + m * s / 2, 1: m * (1 - s) + (1 - m) * s / 2, 2: m * s / 2, 9: (1 - m) * s / 2}
    assert_rates(errors[True], large)  # one too high by misconception, and then a slip as well
    assert data.REPEATS == (0.0, 0.5, 1.0)  # one of these for all four steps of a demonstration
    assert_rates(repeats, {k: ((k == 0) + coin[k] + (k == 4)) / 3 for k in range(5)})


def test_text_survives_the_tokenizer_and_the_tokenizer_survives_saving(tmp_path):
    tokenizer = chain_tokenizer()
    for i, problem in enumerate(load_problems(SMALL, 0)[0][:200]):
        text = chain_solution(problem.prompt, data.random_for(0, Draw.DEMONSTRATE, i))
        ids, prompt = tokenizer(text, add_special_tokens=False).input_ids, tokenizer(problem.prompt).input_ids
        assert len(ids) == len(text) and UNK not in ids and tokenizer.decode(ids) == text
        assert prompt[0] == BOS and tokenizer.decode(prompt, skip_special_tokens=True) == problem.prompt
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert same("3a? é").input_ids == [BOS, 7, UNK, 20, UNK, UNK]
        assert same.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert same.special_tokens_map == tokenizer.special_tokens_map


def test_prompts_that_are_too_long_are_left_out_whole_and_counted(capsys):
    tokenizer = chain_tokenizer()
    problems = [Problem(prompt, "8", "chain") for prompt in ("3b+5?", "3b+5c*2?", "4b+5?")]
    kept, prompts = encode_prompts(problems, tokenizer, limit=6)  # the begin token counts
    assert kept == [problems[0], problems[2]] and prompts == [tokenizer(p.prompt).input_ids for p in kept]
    assert "left out 1 of 3 prompts" in capsys.readouterr().out
    assert encode_prompts(problems, tokenizer, limit=9)[0] == problems and not capsys.readouterr().out
    with pytest.raises(BadInput, match="max_prompt_tokens"):
        encode_prompts(problems, tokenizer, limit=5)
