"""What a model is asked: a problem in a chat template, in which only the template steers."""

import re
from contextlib import suppress
from dataclasses import replace

from tasks.problem import Problem


def prompt_text(problem: Problem, tokenizer, chat_template: bool) -> str:
    """What the model continues.

    With `chat_template` it is the chat up to where the model's turn begins, else the plain text. A
    system prompt goes in front of the prompt where there is no template, or where the template
    has no system's turn.
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


class ControlTokens:
    """The tokens of a tokenizer that steer: they end turns, responses and texts.

    In a problem's text they are text; only a chat template and the tokenizer itself may write them.
    """

    def __init__(self, tokenizer, chat_template: bool):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = special.keys() - {tokenizer.unk_token_id}
        # Longest first, as the tokenizer finds them, with the spaces that they swallow
        tokens = sorted(special.values(), key=lambda token: -len(token.content))
        self.texts = [token.content for token in tokens]
        self.starts = {text[:2] for text in self.texts}
        alternatives = [
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
            for token in tokens
        ]
        self.pattern = re.compile(f"({'|'.join(alternatives)})")

    def are_in(self, problem: Problem) -> bool:
        together = problem.system + problem.prompt
        # A tokenizer may have thousands, of a few kinds
        if not any(start in together for start in self.starts):
            return False
        return any(text in together for text in self.texts)

    def ids_as_text(self, problem: Problem) -> list[int] | None:
        """Ids of a prompt whose text holds control tokens, read as ordinary text; None where this
        tokenizer has no way to say so.

        A harmless text takes their place while the template is applied. What it wrote of them is
        then what there is, and all between is encoded as text. The ids of the harmless prompt must
        come out as those of the usual way, or cutting changes what is cut.
        """
        problem_text = problem.system + problem.prompt
        mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in problem_text)
        harmless = {text: f"{mark}{i}{mark}" for i, text in enumerate(self.texts)}
        disguised = replace(
            problem,
            prompt=_replaced(problem.prompt, harmless),
            system=_replaced(problem.system, harmless),
        )
        asked = prompt_text(disguised, self.tokenizer, self.chat_template)
        pieces = self.pattern.split(asked)  # every second one is a control token
        original = {stand_in: text for text, stand_in in harmless.items()}
        revealed = [_replaced(piece, original) for piece in pieces]
        ids, usual = self._ids_of_pieces(revealed), self._ids(asked)
        own = sum(i in self.ids for i in usual)
        is_sound = self._ids_of_pieces(pieces) == usual and sum(i in self.ids for i in ids) == own
        return ids if is_sound else None

    def _ids_of_pieces(self, pieces: list[str]) -> list[int]:
        return [i for k, piece in enumerate(pieces) for i in self._ids(piece, as_text=k % 2 == 0)]

    def _ids(self, text: str, as_text: bool = False) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=not self.chat_template, split_special_tokens=as_text
        ).input_ids


def _replaced(text: str, by: dict[str, str]) -> str:
    for old, new in by.items():
        text = text.replace(old, new)
    return text
