"""A real model: SmolLM2-135M-Instruct, with a byte-level tokenizer, a chat template, and a pad that is its stop token.

It is looked for in the folder that SMOLLM2 names, or else in the cache; where it is not, these tests skip. Every size
is as small as the claim allows: a token of this model costs as much as a thousand of the others' tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data import encode_prompts
from model import batch_log_probs, load, plain_log_probs_of_tokens
from sample import SampleConfig, sample
from spro import Batch
from tasks.problem import Problem
from transformers import AutoModelForCausalLM, AutoTokenizer

import chaos
from helpers import jsonl, keys, published, slow_log_probs
from test_ranks import assert_alike

FOLDER = Path(os.environ.get("SMOLLM2") or Path.home() / ".cache" / "spro" / "smollm2")
pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").exists(),
    reason=f"no model in {FOLDER}: python -m tools.smollm2 {FOLDER} makes it, SMOLLM2 names another folder",
)
QUESTIONS = ["What is 3 + 4?", "Say “🌊” — and a word:\n\tsea", "Write two lines that rhyme."]
NOISE = 1e-3  # nats, in fp32: of 30 layers and 49,152 words


@pytest.fixture(scope="module")
def policy():
    return load(FOLDER)


@pytest.fixture(scope="module")
def prompts(policy):
    return [*encode_prompts([Problem(q, None, "") for q in QUESTIONS], policy.tokenizer, 100)[1]]


@pytest.fixture(scope="module")
def alone():
    """(model, tokenizer) as transformers has them, by itself."""
    options = {"dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(FOLDER, **options).eval(), AutoTokenizer.from_pretrained(FOLDER)


@torch.no_grad()
def greedy(model, tokenizer, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own `generate` writes behind a prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return out[0, len(prompt) :].tolist()


def responses(batch: Batch) -> list[list[int]]:
    return [row[m].tolist() for row, m in zip(batch.tokens[:, batch.prompt_length :], batch.mask, strict=True)]


# --- prompts and tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", "Answer in one word — 好."])
def test_a_prompt_is_what_transformers_makes_of_the_chat(system, alone):
    tokenizer = alone[1]
    problems = [Problem(question, None, "", system=system) for question in QUESTIONS]
    for problem, ids in zip(problems, encode_prompts(problems, tokenizer, 200)[1], strict=True):
        turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": problem.prompt}]
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == expected and tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_greedy_responses_are_those_of_transformers_generate(policy, prompts, alone):
    batch = sample(policy, prompts, keys(3), SampleConfig(max_new_tokens=16), group_size=1, temperature=0.0)
    assert responses(batch) == [greedy(*alone, prompt, 16) for prompt in prompts]


# --- log-probs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fast", "plain"])
def sampled(request, policy, prompts):
    """Two responses to two prompts of different lengths."""
    config = SampleConfig(max_new_tokens=12, decoding=request.param)
    return sample(policy, prompts[:2], keys(2), config, group_size=2)


def test_the_sampler_and_training_give_the_log_probs_of_one_plain_forward(sampled, policy):
    log_probs, entropy = batch_log_probs(policy, sampled, 1.0, 4096)  # siblings together, their prompt once
    for i, response in enumerate(responses(sampled)):
        prompt = sampled.tokens[i, : sampled.prompt_length][sampled.attention_mask[i, : sampled.prompt_length]].tolist()
        expected = slow_log_probs(policy, prompt, response, 1.0)
        n = len(response)
        for found in ((log_probs, entropy), (sampled.sampler_log_probs, sampled.sampler_entropy)):
            for values, exact in zip(found, expected, strict=True):
                assert (values[i, :n] - exact).abs().max() < NOISE


def test_gradients_with_shared_prompts_are_those_of_whole_rows(policy, prompts):
    batch = sample(policy, prompts[:1], keys(1), SampleConfig(max_new_tokens=6), group_size=2)
    weights = torch.linspace(-1, 1, batch.mask.numel()).view(batch.mask.shape)
    found = []
    for forward in (policy.token_log_probs, lambda *args: plain_log_probs_of_tokens(policy, *args)):
        log_probs = forward(batch.tokens, batch.attention_mask, batch.mask.shape[1], 1.0)[0]
        found.append(torch.autograd.grad((weights * log_probs).sum(), [*policy.parameters()]))
    shared, whole = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in found)
    assert (shared - whole).norm() < 1e-4 * whole.norm()


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    ask = ["What is 3 + 4? Answer in one sentence, with the number in \\boxed{}.", "What is 🌊?", "Name a colour."]
    problems = [{"prompt": question, "reference": "7", "grader": "number"} for question in ask]
    return jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", problems)


def arguments(model: Path, rows: Path) -> list[str]:
    """Two steps on eight responses each; that are rewarded for being short, so that there is something to learn."""
    return [
        *(str(chaos.ROOT / "configs" / "tiny.yaml"), f"model.path={model}", "model.scratch={}"),
        *("data.source=file", f"data.path={rows}", "data.train_size=0", "data.held_out_size=1", "data.min_steps=1"),
        *("eval.prompts=1", "eval.every=2", "sample.max_new_tokens=10", "sample.group_size=4"),
        *("train.steps=2", "train.prompts_per_step=2", "train.mini_batch_size=8", "train.micro_batch_tokens=256"),
        *("train.learning_rate=1e-5", "train.keep_checkpoints=1", "train.save_every=2", "train.dump_every=1"),
        *("algorithm.keep_accuracy=[0,1]", "reward.overlong_buffer=10"),
    ]


def ran(folder: Path, arguments: list[str], *more, ranks: int = 1, **spec) -> int:
    """The exit code of a run into `folder`."""
    log = folder.with_name(f"{folder.name}.log")
    spec = {"run_dir": str(folder), **spec} if spec else None
    process = chaos.start([*arguments, f"run_dir={folder}", *more], log, spec, ranks, forked=True)
    return chaos.exit_code(process, timeout=900)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """A run on one process, without its checkpoint, which has 1.6 GB."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    assert ran(folder, arguments(FOLDER, rows)) == 0, folder.with_name("run.log").read_text()
    shutil.rmtree(folder / "checkpoints")
    yield folder
    shutil.rmtree(folder)


def dumped(folder: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def test_a_run_learns_from_every_response_with_a_gap_that_is_noise(run):
    rows = chaos.metrics(run)[1:]
    assert all(row["groups/kept"] == 1 and row["grad_norm"] > 0.1 and row["sampler_gap"] < NOISE for row in rows)
    assert rows[0]["kl/ref"] == 0 and rows[1]["kl/ref"] != 0


def test_the_texts_of_a_dumps_tokens_join_to_what_was_graded(run, policy):
    lines = dumped(run, 1) + dumped(run, 2)
    for line in lines:
        assert "".join(line["token_text"]) == policy.tokenizer.decode(line["id"])
        assert "".join(line["token_text"]).replace("<|im_end|>", "") == line["text"]
        assert not set("".join(line["token_text"])) & set("ĠĊ")
        assert len({len(line[name]) for name in ("id", "token_text", "log_prob", "ref_log_prob", "advantage")}) == 1
    assert {line["truncated"] for line in lines} == {True, False}


def test_the_inspector_shows_a_run_as_it_was_written(run):
    command = [sys.executable, "-m", "tools.inspector", str(run), "--group", "1"]
    done = subprocess.run(command, cwd=chaos.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "check     ✓" in done.stdout, done.stderr
    for line in dumped(run, 2)[4:]:
        assert all(word in done.stdout for word in re.findall("[A-Za-z]+", line["text"]))


# --- runs of its first layers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(rows, tmp_path_factory) -> list[str]:
    """Arguments of a run of the first five layers of thirty: a kill and two processes are no matter of depth.

    What these write is no language, and does not end: "a" ends it.
    """
    folder = tmp_path_factory.mktemp("shallow") / "model"
    AutoModelForCausalLM.from_pretrained(FOLDER, num_hidden_layers=5).save_pretrained(folder)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(folder)
    return [*arguments(folder, rows), "sample.stop=[a]"]


@pytest.fixture(scope="module")
def shallow_run(shallow, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shallow") / "run"
    assert ran(folder, shallow) == 0, folder.with_name("run.log").read_text()
    assert all(row["grad_norm"] > 0.1 for row in chaos.metrics(folder)[1:])
    return folder


def test_a_run_killed_in_its_second_step_ends_as_if_nothing_had_been(shallow_run, shallow, tmp_path):
    again = (*shallow, "train.save_every=1", "resume=true")
    assert ran(tmp_path / "run", [*again], on="backward", step=2, does="kill") == -9
    assert ran(tmp_path / "run", [*again]) == 0, (tmp_path / "run.log").read_text()
    assert "going on after step 1" in (tmp_path / "run.log").read_text()
    assert chaos.differences(shallow_run, tmp_path / "run") == []


def test_two_processes_have_the_metrics_of_one(shallow_run, shallow, tmp_path):
    """One step. A process samples its own rows alone, which rounds otherwise: about one token in a thousand flips."""
    code = ran(tmp_path / "run", shallow, "train.steps=1", ranks=2)
    assert code == 0, (tmp_path / "run.log").read_text()
    one, two = chaos.metrics(shallow_run)[:2], chaos.metrics(tmp_path / "run")
    two[1] = {key: value for key, value in two[1].items() if not key.startswith("eval/")}  # of its last step
    pairs = zip(dumped(shallow_run, 1), dumped(tmp_path / "run", 1), strict=True)
    flipped = sum(here["id"] != there["id"] for here, there in pairs)
    assert flipped <= 1
    if flipped:
        pytest.skip("on this kind of CPU rounding flips a token, and so what is learned from")
    assert_alike(one, two)


def test_the_saved_model_answers_alike_in_transformers_alone(run, prompts, alone):
    trained = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    moved = [(a - b).abs().max() for a, b in zip(trained.parameters(), alone[0].parameters(), strict=True)]
    assert max(moved) > 1e-6  # it is the trained one
    policy = load(run / "model")
    batch = sample(policy, prompts, keys(3), SampleConfig(max_new_tokens=16), group_size=1, temperature=0.0)
    assert responses(batch) == [greedy(trained, tokenizer, prompt, 16) for prompt in prompts]
    assert trained.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_an_evaluation_on_gsm8k_writes_what_transformers_writes(alone, tmp_path):
    data = published("gsm8k/test.jsonl")
    command = [sys.executable, "eval.py", str(FOLDER), "--benchmark", "gsm8k", "--data", str(data), "--limit", "3"]
    command += ["--max-new-tokens", "20", "--output", str(tmp_path / "out.jsonl")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=chaos.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "gsm8k, n = 3" in done.stdout, done.stderr
    model, tokenizer = alone
    for row in [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()[1:]]:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row["text"] == tokenizer.decode(greedy(model, tokenizer, prompt, 20), skip_special_tokens=True)
        assert row["length"] == 20 and row["truncated"]
