"""Problems as a run meets them: prompts' text and ids, their order, and the order of what is
learned from them.

Where problems come from is tasks/. Nothing here has state: the prompt at position p of a run is a
function of (seed, p), so that the position is all the data state a checkpoint needs.
"""

import math
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from infra.config import Block, knob
from infra.errors import BadInput
from infra.processes import map_over_ranks, print0
from infra.rng import Draw, rng_for
from rewards import Grader
from spro import Batch
from tasks import ASK_FOR_BOX, DEMONSTRATORS, PROMPTS, ROWS, SOURCES
from tasks.chain import LABELS
from tasks.problem import Problem
from tasks.prompts import ControlTokens, prompt_text


def shaping(default, help: str, **rules):
    """A knob that a warm start depends on, as on everything that says which problems there are."""
    return knob(default, help, warm_start=True, **rules)


@dataclass
class DataConfig(Block):
    source: str = shaping("chain", "a name in tasks.SOURCES; for a dataset, the shape of its rows")
    path: str = shaping("", "a file, or NAME[:CONFIG][@SPLIT] on the Hub; reasoning_gym: the task")
    held_out_path: str = shaping("", "the like for evaluation; empty: held_out_size rows of path")
    train_size: int = shaping(0, "training problems, at most; 0: all (made ones: 20,000)", least=0)
    held_out_size: int = shaping(512, "problems that training never sees", least=1)
    prompt: str = shaping("", "text around {question}; empty: the source's own")
    system_prompt: str = shaping("", "empty: the row's own, if it has one")
    chat_template: bool = shaping(True, "use the tokenizer's chat template, where it has one")
    max_prompt_tokens: int = shaping(1024, "longer prompts are left out and counted", least=1)
    min_steps: int = shaping(3, "made tasks: fewest operations in a prompt", least=1)
    max_steps: int = shaping(6, "made tasks: most operations in a prompt")
    repeat_slip: float = shaping(0.12, "chain: chance of a slip per step of a repeating solution")

    def __post_init__(self):
        super().__post_init__()
        if self.source not in SOURCES:
            raise ValueError(
                f"source={self.source!r} is not known: choose one of {', '.join(SOURCES)}"
            )
        is_made, is_dataset = self.source in DEMONSTRATORS, self.source in ROWS
        if is_made == bool(self.path) or (self.held_out_path and not is_dataset):
            raise ValueError(
                f"source={self.source!r} does not go with path={self.path!r}, "
                f"held_out_path={self.held_out_path!r}: "
                f"{', '.join(DEMONSTRATORS)} take neither, reasoning_gym takes the name of a task "
                "as path, a dataset a "
                "file or a name on the Hub"
            )
        if self.prompt and "{question}" not in self.prompt:
            raise ValueError(
                f"prompt={self.prompt!r} must hold the text {{question}}, where each problem's goes"
            )
        if not 0 <= self.repeat_slip <= 1:
            raise ValueError(f"repeat_slip={self.repeat_slip} is a chance, in [0, 1]")
        if not self.min_steps <= self.max_steps <= len(LABELS):
            raise ValueError(
                f"max_steps={self.max_steps} must lie between min_steps and {len(LABELS)}"
            )


AT_ONCE = 10_000  # prompts that the ranks encode and exchange together: some megabytes


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return rng_for(seed, Draw.ORDER, epoch).permutation(size)


def prompt_index(position: int, size: int, seed: int) -> int:
    """Which of `size` training problems stands at `position` of the run: a new permutation for
    every epoch.
    """
    epoch, place = divmod(position, size)
    return int(_permutation(size, seed, epoch)[place])


def mini_batches(n: int, config, step: int) -> list[torch.Tensor]:
    """Row indices of each optimizer step of an RL step: a new shuffle per epoch, cut into about
    equal parts.

    Groups are shuffled, not rows: siblings stay together, so that a pass can run their prompt once.
    """
    groups = torch.arange(n).view(-1, config.sample.group_size)
    parts = max(1, math.ceil(n / config.train.mini_batch_size))
    lists = []
    for epoch in range(config.train.epochs):
        order = rng_for(config.seed, Draw.SHUFFLE, step, epoch).permutation(len(groups))
        lists += [rows for rows in groups[order].flatten().tensor_split(parts) if len(rows)]
    return lists


def micro_batch_rows(
    batch: Batch, max_tokens: int, prompt_of: list[int] | None = None
) -> list[torch.Tensor]:
    """Rows as index lists, each of at most `max_tokens` prompt and response tokens, padding
    included; none is empty.

    Similar lengths go together. Where `prompt_of` says which rows share a prompt, siblings go
    together too, and their prompt counts once.
    """
    lengths = batch.mask.sum(1).tolist()
    prompts = batch.attention_mask[:, : batch.prompt_length].sum(1).tolist()
    group_of = prompt_of or list(range(len(batch)))
    longest: dict[int, int] = defaultdict(int)
    for group, length in zip(group_of, lengths, strict=True):
        longest[group] = max(longest[group], length)

    def size(rows: list[int]) -> int:
        distinct = len({group_of[i] for i in rows})
        return distinct * max(prompts[i] for i in rows) + len(rows) * max(lengths[i] for i in rows)

    lists: list[list[int]] = []
    for i in sorted(
        range(len(batch)), key=lambda i: (longest[group_of[i]], group_of[i], lengths[i])
    ):
        if lists and size([*lists[-1], i]) <= max_tokens:
            lists[-1].append(i)
        else:
            lists.append([i])
    return [torch.tensor(rows, dtype=torch.long) for rows in lists]


def require_graders(problems: list[Problem], grader: Grader) -> None:
    """Raises BadInput where a problem's grader is not known, or what it needs is not installed."""
    for name in {grader.name_for(problem) for problem in problems}:
        try:
            grader.require(name, "reward.grader" if grader.config.grader else "the rows' grader")
        except ValueError as error:
            raise BadInput(f"data: {error}; reward.grader names one for all rows") from error


def check_references(problems: list[Problem], grader: Grader) -> None:
    """Raises BadInput where a problem's grader cannot read its reference: no answer could be right.

    The line names file and row.
    """
    for problem in problems:
        try:
            grader.check(problem)
        except ValueError as error:
            raise BadInput(
                f"data: {problem.place or repr(problem.prompt[:80])}: {error}; mend that row or "
                "take it out, or choose another grader"
            ) from error


def apply_prompt(problems: list[Problem], config: DataConfig) -> list[Problem]:
    """The problems as they are asked: the prompt's text around the question, the config's system
    prompt if it has one.

    `{question}` is found by plain search, not str.format: prompts and questions are full of braces.
    """
    around = config.prompt or PROMPTS.get(config.source, ASK_FOR_BOX)
    before, _, after = around.partition("{question}")
    return [
        replace(p, prompt=before + p.prompt + after, system=config.system_prompt or p.system)
        for p in problems
    ]


def load_problems(
    config: DataConfig, seed: int, grader: Grader | None = None
) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of `config.source`, as they are asked, each with a grader that
    works here.

    Raises BadInput where the source does not have that many or cannot be read, or a grader is not
    known or cannot read a reference.
    """
    train, held_out = SOURCES[config.source](config, seed)
    grader = grader or Grader()
    require_graders(train + held_out, grader)
    check_references(train + held_out, grader)
    return apply_prompt(train, config), apply_prompt(held_out, config)


class TokenIds(Sequence):
    """Reads as a list of lists of ids, and takes 4 bytes an id: half a million prompts in lists
    would take 15 GiB.
    """

    def __init__(self, rows: list[array]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        return TokenIds(self.rows[i]) if isinstance(i, slice) else self.rows[i].tolist()


def encoded(
    problems: list[Problem], tokenizer, chat_template: bool = True
) -> Iterator[tuple[bool, array | None]]:
    """Of each problem, in their order: whether it holds control tokens, and its prompt's ids, None
    where there is no way to read those as text. The ranks share the work, and each gets all.
    """
    chat = chat_template and bool(tokenizer.chat_template)
    control = ControlTokens(tokenizer, chat)

    def encode(part: list[Problem]) -> list[tuple[bool, array | None]]:
        texts = [prompt_text(problem, tokenizer, chat) for problem in part]
        found = []
        for problem, ids in zip(
            part, tokenizer(texts, add_special_tokens=not chat).input_ids, strict=True
        ):
            is_held = control.are_in(problem)
            ids = control.ids_as_text(problem) if is_held else ids
            found.append((is_held, None if ids is None else array("i", ids)))
        return found

    for start in range(0, len(problems), AT_ONCE):
        yield from map_over_ranks(encode, problems[start : start + AT_ONCE])


def encode_prompts(
    problems: list[Problem],
    tokenizer,
    limit: int,
    chat_template: bool = True,
    known_ids: int = sys.maxsize,
) -> tuple[list[Problem], TokenIds]:
    """The problems whose prompts fit into `limit` tokens, and those prompts' ids; the others are
    counted, not cut. The ranks share the work, and each gets all ids.

    With `chat_template`, in the tokenizer's chat template if it has one, which writes its own begin
    token then. Control tokens in a problem's text are text. From `known_ids` on the model has no
    embedding: BadInput.
    """
    fitting, rows = [], []
    as_text = unsound = 0
    pairs = zip(problems, encoded(problems, tokenizer, chat_template), strict=True)
    for problem, (is_held, ids) in pairs:
        as_text += is_held
        if ids is None:
            unsound += 1
        elif len(ids) <= limit:
            require_known(ids, known_ids, tokenizer)
            fitting.append(problem)
            rows.append(ids)
    say_left_out(len(problems), len(fitting), as_text, unsound, limit)
    return fitting, TokenIds(rows)


def require_known(ids: Sequence[int], known_ids: int, tokenizer) -> None:
    """Raises BadInput where the tokenizer writes ids that the model has no embedding for."""
    if (largest := max(ids, default=0)) >= known_ids:
        raise BadInput(
            f"data: a prompt holds {tokenizer.convert_ids_to_tokens(largest)!r}, id {largest}, but "
            f"the model's embedding has {known_ids} rows: this is not the model's tokenizer"
        )


def say_left_out(n: int, fitting: int, as_text: int, unsound: int, limit: int) -> None:
    """What has become of `n` prompts, if not all are as usual. BadInput where none is left."""
    too_long = n - fitting - unsound
    unreadable = "hold control tokens that this tokenizer cannot read as text"
    if unsound == n:
        raise BadInput(f"data: all {n} prompts {unreadable}")
    if not fitting:
        raise BadInput(
            f"all {n} prompts are longer than {limit} tokens: raise data.max_prompt_tokens, or, "
            "where the model's context is the limit, lower sample.max_new_tokens"
        )
    if too_long:
        print0(f"data: left out {too_long} of {n} prompts, longer than {limit} tokens")
    if unsound:
        print0(f"data: left out {unsound} of {n} prompts, which {unreadable}")
    if as_text > unsound:
        print0(f"data: {as_text - unsound} of {n} prompts hold control tokens, read as text")
