"""Where prompts come from: problems with a checkable answer, and the order in which a run meets them.

A source is a function in SOURCES that returns (train problems, held-out problems). Nothing here has state: the prompt
at position p of a run is a function of (seed, p), so that the position is all the data state a checkpoint needs, and
every random draw of the project comes from `random_for(seed, purpose, ...)`.

The built-in source "chain" is a task that a 170k-parameter model learns on a CPU. A prompt is a chain of labelled
operations, evaluated from left to right modulo 10; a solution writes one labelled step per operation:

    prompt    3b+5c*2d-7?
    solution  b3+5=8;c8*2=6;d6-7=9;#9

The demonstrator is noisy: it slips, it has a misconception about large products (so that even greedy decoding errs),
and it repeats some steps in brackets, which carries no information. RL has accuracy to gain and length to lose.
"""

import re
import zlib
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from run import BadInput, say


def require_at_least(least: int, config, *names: str) -> None:
    """For the checks of config blocks: ValueError names the first field below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


@dataclass
class DataConfig:
    source: str = "chain"  # where problems come from: a name in SOURCES
    train_size: int = 20_000  # training problems to make; a run passes over them in a new order every epoch
    held_out_size: int = 512  # problems that training never sees, for evaluation
    min_steps: int = 3  # chain: fewest operations in a prompt
    max_steps: int = 6  # chain: most operations in a prompt
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted, never cut

    def __post_init__(self):
        require_at_least(1, self, "train_size", "held_out_size", "min_steps", "max_prompt_tokens")
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is not known: choose one of {', '.join(SOURCES)}")
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
    prompt: str  # the text that the model continues
    reference: str  # the answer, as the grader wants it
    grader: str  # a name in reward.GRADERS


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return random_for(seed, Draw.ORDER, epoch).permutation(size)


def index_at(position: int, size: int, seed: int) -> int:
    """Which of `size` training problems stands at `position` of the run: a new permutation for every epoch."""
    epoch, place = divmod(position, size)
    return int(_permutation(size, seed, epoch)[place])


# --- the chain task -----------------------------------------------------------------------------------------------

LABELS = "bcdefghijklmnopqrstuvwxyz"
SLIP = 0.12  # chance per step that the demonstrator's result is off by one
MISCONCEPTION = 0.6  # chance that a product of two digits >= 6 comes out one too high
REPEATS = (0.0, 0.5, 1.0)  # chance of repeating a step; a demonstration draws one of these for all its steps

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def chain_solution(prompt: str, noise: np.random.Generator | None = None) -> str:
    """The written solution of a chain prompt: right and concise, or with the demonstrator's noise.

    A wrong result is carried on into the following steps, as a person's would be.
    """
    value, lines = int(prompt[0]), []
    repeat = noise.choice(REPEATS) if noise else 0.0
    for label, operator, digit in re.findall(r"([a-z])([-+*])(\d)", prompt):
        result = _OPERATIONS[operator](value, int(digit)) % 10
        if noise and operator == "*" and min(value, int(digit)) >= 6 and noise.random() < MISCONCEPTION:
            result = (result + 1) % 10
        if noise and noise.random() < SLIP:
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
    """(train, held-out) chain problems. A hash of the prompt decides its split, so that the two are always disjoint."""
    wanted = {False: config.train_size, True: config.held_out_size}
    found: dict[bool, dict[str, Problem]] = {False: {}, True: {}}
    random = random_for(seed, Draw.PROBLEMS)
    for _ in range(10 * (config.train_size + 10 * config.held_out_size)):
        prompt = _chain_prompt(random, config.min_steps, config.max_steps)
        held_out = zlib.crc32(prompt.encode()) % 10 == 0
        if len(found[held_out]) < wanted[held_out] and prompt not in found[held_out]:
            found[held_out][prompt] = Problem(prompt, chain_solution(prompt)[-1], "chain")
        if all(len(found[split]) == wanted[split] for split in wanted):
            return list(found[False].values()), list(found[True].values())
    raise BadInput(
        f"data.train_size={config.train_size}, data.held_out_size={config.held_out_size}: there are not that many "
        f"different chains of {config.min_steps} to {config.max_steps} steps; ask for fewer, or for longer chains"
    )


def chain_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `<bos>` goes in front of a prompt, `<eos>` ends a response."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = special + list("0123456789+-*=;#?()" + LABELS)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


SOURCES = {"chain": chain_problems}
DEMONSTRATORS = {"chain": chain_solution}  # (prompt, noise or None) -> text: for the warm start of a new model


def load_problems(config: DataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of `config.source`. Raises BadInput where it does not have that many."""
    return SOURCES[config.source](config, seed)


def encode_prompts(problems: list[Problem], tokenizer, limit: int) -> tuple[list[Problem], list[list[int]]]:
    """The problems whose prompts fit into `limit` tokens, and those prompts' ids; the others are counted, not cut."""
    ids = tokenizer([problem.prompt for problem in problems]).input_ids
    fitting = [i for i, prompt in enumerate(ids) if len(prompt) <= limit]
    if not fitting:
        raise BadInput(f"all {len(problems)} prompts are longer than {limit} tokens: raise data.max_prompt_tokens")
    if len(fitting) < len(problems):
        say(f"data: left out {len(problems) - len(fitting)} of {len(problems)} prompts, longer than {limit} tokens")
    return [problems[i] for i in fitting], [ids[i] for i in fitting]
