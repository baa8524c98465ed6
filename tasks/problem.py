"""A problem, and how problems are divided into those to train on and those held out: always by a
hash of the prompt.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from infra.errors import BadInput
from infra.rng import Draw, rng_for

MADE = 20_000  # training problems that are made, unless data.train_size says otherwise


@dataclass(frozen=True)
class Problem:
    prompt: str  # the text that the model continues, or the user's turn in a chat
    reference: Any  # the answer as the grader wants it: any JSON value
    grader: str  # a name in rewards.GRADERS
    system: str = ""  # the system's turn in a chat
    solution: str = field(default="", repr=False)  # a right response, where the row has one
    place: str = field(default="", compare=False, repr=False)  # file and row, where it is from one
    v_star: float | None = field(default=None, compare=False, repr=False)  # where a run needs it


def problems_hash(problems: list[Problem]) -> str:
    """sha256 over what a run learns of its problems, in their order; the same on any machine.

    Keys of a reference may come in any order.
    """
    write = json.JSONEncoder(sort_keys=True, default=str).encode
    digest = hashlib.sha256()
    for p in problems:
        digest.update(write([p.prompt, p.system, p.grader, p.reference]).encode() + b"\n")
    return digest.hexdigest()


def made_problems(draw, config, seed: int) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems made by `draw`. A hash of the prompt decides its split: the two
    are disjoint.
    """
    wanted = {False: config.train_size or MADE, True: config.held_out_size}
    found: dict[bool, dict[str, Problem]] = {False: {}, True: {}}
    random = rng_for(seed, Draw.PROBLEMS)
    for _ in range(10 * (wanted[False] + 10 * wanted[True])):
        problem = draw(random)
        held_out = zlib.crc32(problem.prompt.encode()) % 10 == 0
        if len(found[held_out]) < wanted[held_out]:
            found[held_out].setdefault(problem.prompt, problem)
        if all(len(found[split]) == wanted[split] for split in wanted):
            return list(found[False].values()), list(found[True].values())
    raise BadInput(
        f"data.train_size={wanted[False]}, data.held_out_size={wanted[True]}: there are not that "
        f"many different {config.source} problems of {config.min_steps} to {config.max_steps} "
        "steps; ask for fewer, or for longer ones"
    )


def split_problems(
    problems: list[Problem], held_out: list[Problem], config
) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) of the configured sizes, no question in both.

    A hash of the question puts the problems in order; held-out ones come first where they are not
    given. So the split depends neither on the seed nor on the order of a file, and a part of a
    sorted file is a fair sample of it.
    """
    problems, held_out = (
        sorted(part, key=lambda p: zlib.crc32(p.prompt.encode())) for part in (problems, held_out)
    )
    held_out = (held_out or problems)[: config.held_out_size]
    unseen = {problem.prompt for problem in held_out}
    train = [problem for problem in problems if problem.prompt not in unseen]
    if not train:
        raise BadInput(
            f"data: none of {len(problems)} problems is left to train on beside those held out: "
            f"lower data.held_out_size={config.held_out_size}, or set data.held_out_path"
        )
    return train[: config.train_size or None], held_out
