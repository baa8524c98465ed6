"""Where a response ends, and the text that is graded."""

from functools import lru_cache
from itertools import islice

import torch
from transformers import StoppingCriteria

HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of bytes that are no whole character


class EndOfResponse(StoppingCriteria):
    """Which token ends a response: a stop id, or the one in which a stop string ends.

    A string is looked for in the text of the response alone, as it is graded: the prompt does not
    count, and special tokens have no text. It may begin in one token and end in another, or stand
    inside one among other text, and tokens may hold parts of a character.
    """

    def __init__(self, policy, strings: list[str], prompt_length: int):
        self.strings = strings
        self.prompt_length = prompt_length
        self.tokenizer = policy.tokenizer
        self.stop_ids = torch.tensor(policy.stop_ids, device=policy.device)
        if strings:
            last_characters = "".join(sorted({string[-1] for string in strings}))
            may_end, self.silent = look_at_tokens(
                policy.tokenizer, policy.vocab_size, last_characters
            )
            self.may_end = may_end.to(policy.device)
            # A token with text has a byte or more of it. Twice as many, and one, for some
            # tokenizers drop spaces: before a full stop, or of the first token.
            self.window = 2 * max(len(string.encode()) for string in strings) + 1

    def is_stop_id(self, tokens: torch.Tensor) -> torch.Tensor:
        """bool, of the same shape. A CUDA graph may record it; `ends` asks the host."""
        return (tokens[..., None] == self.stop_ids).any(-1)

    def ends(
        self, responses: torch.Tensor, start: int = 0, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Which of the tokens from `start` on end their response. -> bool [b, t - start].

        responses [B, t], without their prompts; rows [b], by default all. The first end in a row is
        right; of what stands behind it nothing is said.
        """
        if rows is None:
            rows = torch.arange(len(responses), device=responses.device)
        new = responses[rows, start:]
        ends = self.is_stop_id(new)
        if not self.strings:
            return ends
        # Few tokens can end a string, so few texts are looked at
        suspects = self.may_end[new].nonzero()
        theirs = suspects[:, 0].unique()
        ids = dict(zip(theirs.tolist(), responses[rows[theirs]].tolist(), strict=True))
        for row, place in suspects.tolist():
            if self.holds_string(ids[row][: start + place + 1]):
                ends[row, place] = True
        return ends

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        responses = input_ids[:, self.prompt_length :]
        return self.ends(responses, responses.shape[1] - 1)[:, 0]

    def holds_string(self, response: list[int]) -> bool:
        """Whether a stop string stands in the last tokens of a response."""
        width = self.window
        while True:
            spoken = (i for i in reversed(response) if i not in self.silent)
            last = list(islice(spoken, width))[::-1]
            text = self.tokenizer.decode(last, skip_special_tokens=True)
            # Bytes that begin amid a character may spoil those behind them: begin earlier
            if not text.startswith(HALF) or len(last) < width:
                return any(string in text for string in self.strings)
            width *= 2

    def text(self, response: list[int]) -> str:
        """The text of a response's ids, cut before the first stop string."""
        text = self.tokenizer.decode(response, skip_special_tokens=True)
        places = [text.find(string) for string in self.strings if string in text]
        return text[: min(places, default=None)]


@lru_cache(maxsize=2)
def look_at_tokens(
    tokenizer, vocab_size: int, last_characters: str
) -> tuple[torch.Tensor, frozenset[int]]:
    """(whether a string that ends in one of these characters may end in each token [V], the tokens
    without text).

    A second for 150,000 tokens, hence kept for the next batch.
    """
    # Twice, for some tokenizers leave out the space before the first token
    texts = [tokenizer.decode([i, i], skip_special_tokens=True) for i in range(vocab_size)]
    signs = {HALF, *last_characters}  # half a character may be the second half of the last one
    may_end = torch.tensor([not signs.isdisjoint(text) for text in texts])
    return may_end, frozenset(i for i, text in enumerate(texts) if not text)
