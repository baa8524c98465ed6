"""Verified traces: which steps of a written solution are right, up to the first that is wrong."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Step(NamedTuple):
    start: int  # in characters of the response
    end: int
    right: bool | None  # None: not judged


def verified_steps(
    text: str, step: re.Pattern, solution: list[str], repetition: Callable[[str], str]
) -> list[Step]:
    """The steps of a response, in order, and whether each is right.

    step: matches one step after the other, and leaves no text out. solution: the right steps as
    they are written, the answer last. repetition: how a step is written once more.

    - Right is the solution's next step, and the repetition of one that has been written.
    - Any other is the first wrong step, and nothing behind it is judged.
    - A last step that was broken off, and is right as far as it goes, is not judged either.
    - A text that ends before its answer ends wrongly, if nothing was wrong in it: the last step
      then has no characters. It is its end.
    """
    found: list[Step] = []
    written = 0  # steps of the solution that stand in the text by now
    judging = True
    for match in step.finditer(text):
        writing = match.group().strip()
        following = solution[written : written + 1]  # none behind the answer
        repeated = [repetition(earlier) for earlier in solution[:written]]
        broken_off = match.end() == len(text) and any(
            whole.startswith(writing) for whole in following + repeated
        )
        right: bool | None = None
        if judging and writing in following + repeated:
            right = True
            written += writing in following
        elif judging and not broken_off:
            right = judging = False
        found.append(Step(match.start(), match.end(), right))
    if judging and written < len(solution):
        found.append(Step(len(text), len(text), False))
    return found
