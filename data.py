"""Problems as a run meets them: the config, the prompts' text and ids, and their order.

Where problems come from is tasks/. Nothing here has state: the prompt at position p of a run is a function of
(seed, p), so that the position is all the data state a checkpoint needs.
"""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from infra.config import require_at_least
from infra.errors import BadInput
from infra.processes import say
from infra.rng import Draw, random_for
from rewards import Grader
from tasks import ASK_FOR_BOX, DEMONSTRATORS, PROMPTS, ROWS, SOURCES
from tasks.chain import LABELS
from tasks.problem import Problem


@dataclass
class DataConfig:
    source: str = "chain"  # where problems come from: a name in SOURCES; for a dataset, the shape of its rows
    path: str = ""  # .jsonl, .json or .parquet file, or NAME[:CONFIG][@SPLIT] on the Hub; reasoning_gym: the task
    held_out_path: str = ""  # the like for evaluation; empty: held_out_size problems of `path`, never trained on
    train_size: int = 0  # training problems, at most; 0: all of a dataset (20,000 of those that are made)
    held_out_size: int = 512  # problems that training never sees, for evaluation
    prompt: str = ""  # text around {question}; empty: the source's own, which asks for a \boxed{} answer in maths
    system_prompt: str = ""  # empty: the row's own, if it has one
    chat_template: bool = True  # speak to the model in its tokenizer's chat template, where it has one
    max_prompt_tokens: int = 1024  # longer prompts are left out and counted, never cut
    min_steps: int = 3  # chain: fewest operations in a prompt
    max_steps: int = 6  # chain: most operations in a prompt
    repeat_slip: float = 0.12  # chain: chance of a slip per step where the demonstrator repeats steps; SLIP elsewhere

    def __post_init__(self):
        require_at_least(0, self, "train_size")
        require_at_least(1, self, "held_out_size", "min_steps", "max_prompt_tokens")
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is not known: choose one of {', '.join(SOURCES)}")
        own, rows = self.source in DEMONSTRATORS, self.source in ROWS
        if own == bool(self.path) or (self.held_out_path and not rows):
            raise ValueError(
                f"source={self.source!r} does not go with path={self.path!r}, held_out_path={self.held_out_path!r}: "
                f"{', '.join(DEMONSTRATORS)} take neither, reasoning_gym takes the name of a task as path, a dataset a "
                "file or a name on the Hub"
            )
        if self.prompt and "{question}" not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} must hold the text {{question}}, where each problem's goes")
        if not 0 <= self.repeat_slip <= 1:
            raise ValueError(f"repeat_slip={self.repeat_slip} is a chance, in [0, 1]")
        if not self.min_steps <= self.max_steps <= len(LABELS):
            raise ValueError(f"max_steps={self.max_steps} must lie between min_steps and {len(LABELS)}")


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return random_for(seed, Draw.ORDER, epoch).permutation(size)


def index_at(position: int, size: int, seed: int) -> int:
    """Which of `size` training problems stands at `position` of the run: a new permutation for every epoch."""
    epoch, place = divmod(position, size)
    return int(_permutation(size, seed, epoch)[place])


def require_graders(problems: list[Problem], grader: Grader) -> None:
    """Raises BadInput where a problem's grader is not known, or what it needs is not installed."""
    for name in {grader.name_for(problem) for problem in problems}:
        try:
            grader.require(name, "reward.grader" if grader.config.grader else "the rows' grader")
        except ValueError as error:
            raise BadInput(f"data: {error}; reward.grader names one for all rows") from error


def dressed(problems: list[Problem], config: DataConfig) -> list[Problem]:
    """The problems as they are asked: the prompt's text around the question, the config's system prompt if it has one.

    `{question}` is found by plain search, not str.format: prompts and questions are full of braces.
    """
    around = config.prompt or PROMPTS.get(config.source, ASK_FOR_BOX)
    before, _, after = around.partition("{question}")
    return [replace(p, prompt=before + p.prompt + after, system=config.system_prompt or p.system) for p in problems]


def load_problems(config: DataConfig, seed: int, grader: Grader | None = None) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of `config.source`, as they are asked, each with a grader that works here.

    Raises BadInput where the source does not have that many or cannot be read, or a grader is not known.
    """
    train, held_out = SOURCES[config.source](config, seed)
    require_graders(train + held_out, grader or Grader())
    return dressed(train, config), dressed(held_out, config)


def prompt_text(problem: Problem, tokenizer, chat_template: bool) -> str:
    """What the model continues: with `chat_template` the chat up to where its turn begins, else the plain text.

    A system prompt goes in front of the prompt where there is no template, or where the template has no system's turn.
    """
    together = f"{problem.system}\n\n{problem.prompt}" if problem.system else problem.prompt
    if not chat_template:
        return together

    def chat(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    if problem.system:
        with suppress(Exception):  # templates without a system's turn raise, each in its own way
            text = chat(("system", problem.system), ("user", problem.prompt))
            if problem.system.strip() in text:  # or leave it out without a word
                return text
    return chat(("user", together))


class TokenIds(Sequence):
    """Reads as a list of lists of ids, and takes 4 bytes an id: half a million prompts in lists would take 15 GiB."""

    def __init__(self, rows: list[array]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return TokenIds(self.rows[i]) if isinstance(i, slice) else self.rows[i].tolist()


def encode_prompts(
    problems: list[Problem], tokenizer, limit: int, chat_template: bool = True
) -> tuple[list[Problem], TokenIds]:
    """The problems whose prompts fit into `limit` tokens, and those prompts' ids; the others are counted, not cut.

    With `chat_template`, in the tokenizer's chat template if it has one, which writes its own begin token then.
    """
    chat = chat_template and bool(tokenizer.chat_template)
    fitting, rows = [], []
    for start in range(0, len(problems), 1000):
        part = problems[start : start + 1000]
        texts = [prompt_text(problem, tokenizer, chat) for problem in part]
        for problem, ids in zip(part, tokenizer(texts, add_special_tokens=not chat).input_ids, strict=True):
            if len(ids) <= limit:
                fitting.append(problem)
                rows.append(array("i", ids))
    if not fitting:
        raise BadInput(
            f"all {len(problems)} prompts are longer than {limit} tokens: raise data.max_prompt_tokens, or, where the "
            "model's context is the limit, lower sample.max_new_tokens"
        )
    if len(fitting) < len(problems):
        say(f"data: left out {len(problems) - len(fitting)} of {len(problems)} prompts, longer than {limit} tokens")
    return fitting, TokenIds(rows)
