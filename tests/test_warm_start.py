"""Supervised learning before RL, of any model, on whatever has solutions: made tasks, datasets, a user's rows."""

import json
import shutil

import pytest
import torch
import train
from baselines import supervised
from data import DataConfig, load_problems
from infra.config import read_config
from infra.errors import BadInput
from rewards import Grader
from safetensors.torch import load_file
from tools import sweep
from transformers import AutoModelForCausalLM, AutoTokenizer

import chaos
from conftest import finished
from helpers import jsonl, published, saved_chat_model

WORDS = ["How much is", "plus", "The answer is \\boxed{}.", "0123456789"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return saved_chat_model(tmp_path_factory.mktemp("model") / "chat", WORDS)


def rows(n: int) -> list[dict]:
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)][:n]
    return [
        {
            "prompt": f"How much is {a} plus {b}?",
            "reference": str(a + b),
            "grader": "number",
            "solution": f"\\boxed{{{a + b}}}",
        }
        for a, b in sums
    ]


def arguments(model, file: str, **changes) -> list[str]:
    """Of a short run on the rows of a file, from a warm start on their solutions."""
    settings = {
        "model.path": model,
        "data.source": "file",
        "data.path": file,
        "data.held_out_size": 8,
        "data.train_size": 0,
        "sample.max_new_tokens": 8,
        "eval.prompts": 8,
        "train.steps": 1,
        "train.warm_start": "always",
        "train.warm_start_clean_steps": 30,
        "train.warm_start_noisy_steps": 0,
        "train.warm_start_batch_size": 8,
        "train.warm_start_learning_rate": 3e-3,
    }
    return [f"{key}={value}" for key, value in (settings | changes).items()]


def test_a_loaded_model_learns_the_solutions_of_a_users_rows_and_rl_starts_from_what_it_learned(chat_model, tmp_path):
    file = jsonl(tmp_path / "sums.jsonl", rows(48))
    words = finished(tmp_path / "run", *arguments(chat_model, file))
    assert "40 of 40 problems of data.source=file have a solution" in words
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/warm_start/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]

    # The loss said is the mean over the tokens of the taught texts, the stop token included, of a model that is
    # transformers' own.
    problems = load_problems(DataConfig(source="file", path=file, held_out_size=8), 0, Grader())[0]
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    loaded = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    first = [problems[int(i)] for i in first_positions(len(problems), 8)]
    total, count = 0.0, 0
    for problem in first:
        turn = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        response = [*tokenizer(problem.solution).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_p = logits[:, : len(tokenizer)].log_softmax(-1)  # the head's further rows are padding
        total -= log_p[range(len(response)), response].sum().item()
        count += len(response)
    assert losses[0] == pytest.approx(total / count, rel=1e-5)

    # Reference and policy are the warm start's model: their log-probs are equal before the first update.
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["kl/ref"] == 0.0
    taught = load_file(tmp_path / "run" / "warm_start" / "model" / "model.safetensors")
    given = load_file(chat_model / "model.safetensors")
    assert taught.keys() == given.keys() and not all(taught[key].equal(given[key]) for key in taught)


def first_positions(size: int, n: int):
    from infra.rng import Draw, rng_for

    return rng_for(0, Draw.ORDER, 0).permutation(size)[:n]


def test_a_finished_warm_start_of_a_loaded_model_is_kept_and_another_run_starts_from_it(chat_model, tmp_path):
    file = jsonl(tmp_path / "sums.jsonl", rows(48))
    short = arguments(chat_model, file, **{"train.warm_start_clean_steps": 3})
    finished(tmp_path / "run", *short)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    words = finished(tmp_path / "again", *short, "resume=true")
    assert "the warm start of this run is finished and kept" in words
    assert not chaos.differences(tmp_path / "run", tmp_path / "again")
    start = f"model.path={tmp_path / 'run' / 'warm_start' / 'model'}"
    words = finished(tmp_path / "other", *short, start, "train.warm_start=scratch")
    assert "warm start" not in words and not (tmp_path / "other" / "warm_start").exists()
    assert not chaos.differences(tmp_path / "run", tmp_path / "other")


def config_of(chat_model, file: str, **changes):
    return read_config(train.Config, arguments(chat_model, file, **changes), train.DEFAULT_CONFIG)


def taught(config, tokenizer):
    problems = load_problems(config.data, 0, Grader(config.reward))[0]
    return supervised.demonstrated(config, (problems, [[1]] * len(problems)), tokenizer)


def test_only_problems_whose_solution_a_response_has_room_for_are_taught(chat_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    given = rows(20)
    del given[3]["solution"]
    given[4]["solution"] = None
    given[5]["solution"] *= 9
    config = config_of(
        chat_model, jsonl(tmp_path / "sums.jsonl", given), **{"data.held_out_size": 1, "eval.prompts": 1}
    )
    train_problems = load_problems(config.data, 0, Grader(config.reward))[0]
    problems, prompts = taught(config, tokenizer)
    wanted = [p for p in train_problems if p.solution and len(tokenizer(p.solution).input_ids) < 8]
    assert problems == wanted and len(prompts) == len(wanted) < len(train_problems)


@pytest.mark.parametrize(
    ("solution", "changes", "words"),
    [
        ("", {}, "0 of 12 problems of data.source=file have a solution of at most sample.max_new_tokens=8"),
        ("\\boxed{1} " * 9, {}, "0 of 12 problems"),
        ("1", {"train.warm_start_noisy_steps": 5}, "train.warm_start_noisy_steps=5: set it to 0"),
    ],
)
def test_a_warm_start_that_has_nothing_to_learn_from_is_refused_before_anything_is_written(
    chat_model, tmp_path, solution, changes, words
):
    given = [row | {"solution": solution} for row in rows(20)]
    config = config_of(chat_model, jsonl(tmp_path / "sums.jsonl", given), **changes)
    with pytest.raises(BadInput) as error:
        taught(config, AutoTokenizer.from_pretrained(chat_model))
    assert words in str(error.value)


def test_a_solution_that_is_no_text_is_named_with_its_place(tmp_path):
    file = jsonl(
        tmp_path / "sums.jsonl",
        [*rows(3), {"prompt": "1?", "reference": "1", "grader": "number", "solution": ["a", "b"]}],
    )
    with pytest.raises(BadInput, match=r"line 4.*solution is no text"):
        load_problems(DataConfig(source="file", path=file, held_out_size=1), 0, Grader())


def test_gsm8ks_own_solutions_are_graded_right_as_demonstrations():
    config = DataConfig(source="gsm8k", path=str(published("gsm8k/train.jsonl")), held_out_size=1)
    grader = Grader()
    problems = load_problems(config, 0, grader)[0]
    for problem in problems:
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert grader.grade_one("number", problem.solution, problem.reference).score == 1.0, problem.solution


def test_a_sweep_warms_a_loaded_model_up_once_for_all_its_configs(chat_model, tmp_path):
    file = jsonl(tmp_path / "sums.jsonl", rows(48))
    settings = arguments(chat_model, file)
    files = []
    for name in ("spro", "grpo"):
        (tmp_path / f"{name}.yaml").write_text(f"algorithm: {{advantage: {name}}}\n")
        files.append(str(tmp_path / f"{name}.yaml"))
    runs, warm_starts = sweep.plan(sweep.rows_of(files, settings, None), tmp_path / "out", [(0, 0), (0, 1)])
    assert len(runs) == 4 and len(warm_starts) == 1
    (start,) = warm_starts
    for chosen in runs.values():
        config = read_config(train.Config, chosen, None)
        assert config.model.path == f"{start}/warm_start/model" and not config.warms_up
    (made,) = (read_config(train.Config, chosen, None) for chosen in warm_starts.values())
    assert made.warms_up and made.model.path == str(chat_model)
