"""Whole rollouts on disk, samples/step_*.jsonl: one line per response, with a list of values per
token.

tools/inspector.py reads them.
"""

import json
from pathlib import Path

import torch

from infra.processes import rank

# What the sampler knew, of all responses
SAMPLER = (
    "mask",
    "sampler_log_probs",
    "sampler_entropy",
)


def dump_key(field: str) -> str:
    """The name of a Batch's per-token field in the line of one response: log_probs -> log_prob."""
    return field if field == "entropy" else field.removesuffix("s")


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
                "piece": tokenizer.convert_ids_to_tokens(ids),
                "sampler_log_prob": batch.sampler_log_probs[i, : len(ids)].tolist(),
            }
            if i in place:
                values = {name: getattr(learned, name)[place[i], : len(ids)] for name in per_token}
                line |= {dump_key(name): value.tolist() for name, value in values.items()}
            out.write(json.dumps(line) + "\n")
