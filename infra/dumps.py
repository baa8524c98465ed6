"""Whole rollouts on disk, samples/step_*.jsonl: one line per response, with a list of values per
token.

tools/inspector.py reads them.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from infra.processes import rank

# What the sampler knew, of all responses
SAMPLER = (
    "mask",
    "sampler_log_probs",
    "sampler_entropy",
)
REPLACEMENT = "\ufffd"  # what bytes that are no character are read as


def dump_key(field: str) -> str:
    """The name of a Batch's per-token field in the line of one response: log_probs -> log_prob,
    values_after -> value_after.
    """
    return field if field == "entropy" else field.replace("values_", "value_").removesuffix("s")


def token_texts(tokenizer) -> Callable[[list[int]], list[str]]:
    """A function from the ids of a response to the text that each token adds, control tokens
    included.

    Joined, they are the response's text. A token may hold a part of a character alone: the one
    that completes the character has it, those before it have nothing of it.
    """
    # Some tokenizers drop the space in front of a text's first token, so that the others are read
    # behind one more
    other = tokenizer("a", add_special_tokens=False).input_ids[:1]

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cache
    def text_of(ids: tuple[int, ...], is_start: bool) -> str:
        return decode([*ids]) if is_start else decode([*other, *ids]).removeprefix(decode(other))

    def texts_of(ids: list[int]) -> list[str]:
        texts: list[str] = []
        unfinished: tuple[int, ...] = ()  # the tokens of a character that is not complete
        given = 0  # characters of their text that have been given
        for token in ids:
            unfinished += (token,)
            text = text_of(unfinished, is_start=len(unfinished) > len(texts))
            complete = not text.endswith(REPLACEMENT) or len(texts) + 1 == len(ids)
            known = text if complete else text.rstrip(REPLACEMENT)
            texts.append(known[given:])
            unfinished, given = ((), 0) if complete else (unfinished, len(known))
        return texts

    return texts_of


def dump_rollout(file: Path, tokenizer, batch, learned, rows: torch.Tensor) -> None:
    """Write `file`, on rank 0. `learned` is the Batch of those `rows` of `batch` that were learned
    from.

    Every response has what it was asked, what it wrote, the grader's verdict and the reward that
    training uses. Those learned from also have every per-token field of `learned`.
    """
    if rank():
        return
    place = {row: i for i, row in enumerate(rows.tolist())}
    per_token = [
        name
        for name, layout in learned.layouts().items()
        if layout == "step" and name not in SAMPLER
    ]
    texts_of = token_texts(tokenizer)
    with file.open("w", encoding="utf-8") as out:
        for i, (problem, verdict) in enumerate(zip(batch.problems, batch.verdicts, strict=True)):
            ids = batch.tokens[i, batch.prompt_length :][batch.mask[i]].tolist()
            line = {
                "prompt": problem.prompt,
                "reference": problem.reference,
                "text": batch.texts[i],
                "verdict": verdict.score,
                "reward": None if verdict.score is None else batch.rewards[i].item(),
                "reason": verdict.reason,
                "truncated": bool(batch.truncated[i]),
                "group": i // batch.group_size,
                "id": ids,
                "token_text": texts_of(ids),
                "sampler_log_prob": batch.sampler_log_probs[i, : len(ids)].tolist(),
            }
            if problem.v_star is not None:
                line["v_star"] = problem.v_star
            if i in place:
                values = {name: getattr(learned, name)[place[i], : len(ids)] for name in per_token}
                line |= {dump_key(name): value.tolist() for name, value in values.items()}
            out.write(json.dumps(line) + "\n")
