"""Verified steps on tokens: which tokens of a response belong to a right step, which to the first
wrong one.

A task says it in characters (tasks.TRACES).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch

from infra.dumps import token_texts
from spro import Batch
from tasks.traces import Step

LABELS = {True: 1, False: 0, None: -1}


def verified(
    batch: Batch, tokenizer, trace: Callable[[str, str], list[Step]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, numbers) of the verified steps that the response tokens belong to, both [B, T].

    labels, int8: 1 in a right step, 0 in the first wrong one, -1 where nothing is judged. numbers,
    int64: of each response's steps, from 0; -1 where there is none.

    A token that holds parts of two steps belongs to the later one. A stop token belongs to the step
    that it ends; where it ends a response too early, it is a wrong step of its own. A response that
    was cut off did not end: it may have no wrong step.
    """
    labels = torch.full(batch.mask.shape, LABELS[None], dtype=torch.int8)
    numbers = torch.full(batch.mask.shape, -1)
    texts_of = token_texts(tokenizer)
    # What is graded has no text of theirs
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    responses = batch.tokens[:, batch.prompt_length :]
    for i, problem in enumerate(batch.problems):
        ids = responses[i][batch.mask[i]].tolist()
        texts = [
            "" if token in special else text for token, text in zip(ids, texts_of(ids), strict=True)
        ]
        graded = batch.texts[i]
        if not "".join(texts).startswith(graded):  # a tokenizer that tidies spaces in whole texts
            graded = "".join(texts)
        steps = [
            step
            for step in trace(problem.prompt, graded)
            if step.start < step.end or not batch.truncated[i]
        ]
        for number, (step, tokens) in enumerate(tokens_of(steps, texts, len(graded))):
            labels[i, tokens], numbers[i, tokens] = LABELS[step.right], number
    return labels, numbers


def tokens_of(steps: list[Step], texts: list[str], length: int) -> Iterator[tuple[Step, slice]]:
    """Each step with its tokens, of a response of `length` characters with these texts of tokens.

    A token without text belongs to the step that it stands in. What stands behind the last
    character belongs to the step that ends there.
    """
    ends = list(accumulate(map(len, texts)))
    starts = [end - len(text) for end, text in zip(ends, texts, strict=True)]
    reaches = [max(end, start + 1) for start, end in zip(starts, ends, strict=True)]
    for step in steps:
        first = min(bisect_right(reaches, step.start), len(texts) - 1)
        last = len(texts) if step.end == length else bisect_left(starts, step.end)
        yield step, slice(first, last)
