"""What the tests share: tiny models whose context matters, and the slow way to score one response."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import train
from infra.rng import Draw
from model import ModelConfig, Policy, build, load
from rewards import Grader, Verdict
from tasks.chain import chain_tokenizer
from tasks.problem import Problem
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = range(4)  # of the chain tokenizer
PROMPTS = [[BOS, 7], [BOS, 9, 24, 5, 14, 30, 22], [BOS, EOS, 8, EOS], [PAD, PAD, 30], [EOS], [BOS, 40, UNK]]
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2},
}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}


def sharpened(model):
    """Bigger weights: a fresh model's distributions are so flat that a wrong context or position would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def tiny_model(tokenizer=None, seed: int = 0, architecture: str = "qwen2"):
    config = ModelConfig(scratch={"model_type": architecture, "hidden_size": 32, "intermediate_size": 64})
    return sharpened(build(config, tokenizer or chain_tokenizer(), seed))


def hf_model(kind: str, **fields):
    """A model that this project did not build, straight from transformers."""
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    heads = {} if kind == "gpt2" else {"num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=len(chain_tokenizer()), **ids, **heads, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sharpened(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def saved(model, folder, tokenizer=None):
    """A Policy, or a model of transformers, saved as the latter does it."""
    (model.model if isinstance(model, Policy) else model).save_pretrained(folder)
    (tokenizer or chain_tokenizer()).save_pretrained(folder)
    return folder


def any_model(kind: str, folder, tokenizer=None):
    """gpt2 and opt have absolute positions and dropout, unlike what `build` makes."""
    if kind not in SIZES:
        return tiny_model(tokenizer, architecture=kind)
    return load(saved(hf_model(kind, **SIZES[kind]), folder, tokenizer))


PUBLISHED = Path(os.environ.get("BENCHMARK_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def published(name: str) -> Path:
    """A benchmark's file as published; the test is skipped where it is not on this machine."""
    if not (PUBLISHED / name).exists():
        pytest.skip(f"{PUBLISHED / name} is not there: set BENCHMARK_DATA to a folder with the published files")
    return PUBLISHED / name


def chat_tokenizer(texts: list[str], vocabulary: int = 600, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned from `texts`, with Qwen's special tokens and its kind of chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def saved_chat_model(folder: Path, texts: list[str], template: str | None = CHATML) -> Path:
    """A random Qwen2 of two layers in `folder`, with a tokenizer learned from `texts`: what a Hub model looks like."""
    tokenizer = chat_tokenizer(texts, template=template)
    config = AutoConfig.for_model(
        "qwen2", **LLAMA | {"hidden_size": 64}, num_attention_heads=4, vocab_size=len(tokenizer) + 21,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return saved(model, folder, tokenizer)


def grade_one(name: str, text: str, reference) -> Verdict:
    """A verdict of the grader `name`, as the defaults have it."""
    return Grader().grade_one(name, text, reference)


def jsonl(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def keys(n: int, seed: int = 0, purpose: int = Draw.SAMPLE):
    return [(seed, int(purpose), i) for i in range(n)]


def rows_of(rollout) -> list[tuple]:
    """(prompt, response, text, truncated) of every row, padding removed: what must survive any regrouping."""
    T = rollout.mask.shape[1]
    parts = zip(rollout.tokens, rollout.attention_mask, rollout.mask, rollout.texts, rollout.truncated, strict=True)
    return [(x[:-T][a[:-T]].tolist(), x[-T:][m].tolist(), text, bool(cut)) for x, a, m, text, cut in parts]


def row_log_probs(rollout) -> list[torch.Tensor]:
    return [x[m] for x, m in zip(rollout.sampler_log_probs, rollout.mask, strict=True)]


@torch.no_grad()
def slow_log_probs(policy, prompt: list[int], response: list[int], temperature: float):
    """(log-prob of each response token, entropy at it): one plain forward of the one row, no padding, no chunks."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    p = logits.double().softmax(-1)
    return p.log()[torch.arange(len(response)), response], -(p * p.log()).sum(-1)


def verdicts_for(batch) -> tuple[Verdict, ...]:
    """Right and wrong in turn: what the loop wants to see of a batch whose advantages are given."""
    return tuple(Verdict(float(i % 2), "made up") for i in range(len(batch)))


def one_update(policy, config, batch, advantages, reference=None, folder: Path | None = None):
    """train.py's own loop, for one step on a given batch -> (every gradient before clipping, the row of metrics).

    batch: with `log_probs` (the old ones) and, where the config asks for them, `ref_log_probs`. The stages before the
    update give back what is given here; everything from the update on is train.py's. No weight moves.
    """
    scores = torch.tensor([verdict.score for verdict in verdicts_for(batch)])
    problems = batch.problems or (Problem("?", "", "chain"),) * len(batch)
    given = replace(batch, problems=problems, verdicts=verdicts_for(batch), rewards=scores)
    given = replace(given, sampler_log_probs=batch.log_probs, group_size=config.sample.group_size)
    found, rows = {}, []

    def note_gradients(_, max_norm):
        for name, parameter in policy.named_parameters():
            gradient = parameter.grad
            found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        return 1.0

    class Done(Exception):
        pass

    def note_row(_, row):
        rows.append(row)
        raise Done

    def given_log_probs(model, learned, *_):
        chosen = learned.ref_log_probs if model is reference else learned.log_probs
        return chosen, torch.zeros_like(learned.log_probs)

    replaced = [
        (train, "sample_prompts", lambda *_: given),
        (train, "grade_batch", lambda batch, *_: batch),
        (train, "evaluate", lambda *_: {"eval/accuracy": 0.0}),
        (train.model, "batch_log_probs", given_log_probs),
        (train, "prepared", lambda learned, *_: (learned, {})),
        (train.model, "set_learning_rate", lambda *_: None),  # it stays 0
        (train.baselines, "advantage", lambda name, learned, algo: advantages[: len(learned)]),
        (train.baselines, "outcome_term", lambda *_: None),
        (train.sharding, "clip_gradients", note_gradients),
        (train.dumps, "dump_rollout", lambda *_: None),
        (train.run_folder, "append_line", note_row),
        (train.processes, "restart_watchdog", lambda *_: None),
    ]
    state = {"step": 0, "position": 0, "refused_in_a_row": 0, "before": {}, "best": {"eval/accuracy": 1.0}}
    trained = {"policy": (policy, train.model.make_optimizer(policy, config.train))}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, stand_in in replaced:
            patch.setattr(owner, name, stand_in)
        with pytest.raises(Done):
            train.train(config, Path(), trained, reference, None, None, None, state)
    return found, rows[0]
