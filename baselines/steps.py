"""Responses cut into steps: lines, or every so many tokens."""

import re

import numpy as np
import torch

from infra.processes import print0
from spro import AlgorithmConfig, Batch


def step_ids(batch: Batch, tokenizer, algo: AlgorithmConfig) -> torch.Tensor:
    """The number of the step that each response token belongs to, from 0. -> int64 [B, T].

    A step is `algo.step_tokens` tokens, or, where that is 0, a line. The numbers leave none out.
    """
    if algo.step_tokens:
        places = torch.arange(batch.mask.shape[1]) // algo.step_tokens
        return places.expand(batch.mask.shape).contiguous()
    return line_ids(batch, tokenizer, algo.line_end)


def line_ids(batch: Batch, tokenizer, line_end: str) -> torch.Tensor:
    """The number of the line that each response token belongs to, from 0. -> int64 [B, T].

    A line ends with the token in which the last character of `line_end` stands, whatever else that
    token holds, be it a second line end; so several tokens may make one line end, and the numbers
    leave none out. Where no response holds `line_end`, that is said.
    """
    responses = batch.tokens[:, batch.prompt_length :]
    distinct, piece_of = responses.unique(return_inverse=True)
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in distinct.tolist()]
    breaks = torch.zeros_like(batch.mask)
    for i, row in enumerate(piece_of.tolist()):
        row = [
            pieces[piece] for piece, live in zip(row, batch.mask[i].tolist(), strict=True) if live
        ]
        ends = np.cumsum([len(piece) for piece in row])  # where in the text each token ends
        found = [match.end() for match in re.finditer(re.escape(line_end), "".join(row))]
        breaks[i, np.searchsorted(ends, found)] = True
    ids = breaks.cumsum(1) - breaks.long()
    if not ids.any():
        print0(
            f"note: no response of this step holds algorithm.line_end={line_end!r}: each is one "
            "line"
        )
    return ids
