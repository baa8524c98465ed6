"""What step.py asks of a pretrained model: word problems of one length, and response lengths of the model's own."""

import random
from dataclasses import replace

from common import Work

REAL = Work(prompts=4, group_size=4, prompt_tokens=64, new_tokens=96)  # the rest of the shape is the model's
PROMPTS = 64  # different ones
SAMPLED = 32  # responses whose lengths are drawn from
OPENINGS = ("{who} has {a} {things}.", "There are {a} {things} in {who}'s shop.", "{who} starts with {a} {things}.")
EVENTS = (
    "Then {who} buys {b} more.",
    "{b} of them are given away.",
    "A friend brings {b} times as many as that.",
    "On the way home {b} of the {things} are lost.",
    "Each box holds {b}.",
)
QUESTIONS = ("How many {things} are there now?", "How many {things} does {who} have in the end?", "How many are left?")
BRIEF = "Answer in one short sentence."  # without it nearly every response of a small model is cut


def word_problem(draw: random.Random) -> str:
    """A sum told as a story; whether it has an answer is not asked here."""
    names = {"who": draw.choice(("Ann", "Tom", "Maria", "Jun")), "things": draw.choice(("apples", "books", "coins"))}
    lines = [draw.choice(OPENINGS), *draw.sample(EVENTS, draw.randint(0, 3)), draw.choice(QUESTIONS), BRIEF]
    return " ".join(line.format(**names, a=draw.randint(2, 9999), b=draw.randint(2, 999)) for line in lines)


def prompts_of_length(policy, tokens: int) -> tuple[str, ...]:
    """PROMPTS different word problems that have exactly `tokens` tokens as the model is asked them."""
    from data import encode_prompts
    from tasks.problem import Problem

    draw, found = random.Random(0), {}
    for _ in range(100):
        made = [Problem(word_problem(draw), "", "digits") for _ in range(200)]
        kept, ids = encode_prompts(made, policy.tokenizer, 10**6)
        found |= {problem.prompt: None for problem, row in zip(kept, ids, strict=True) if len(row) == tokens}
        if len(found) >= PROMPTS:
            return tuple(list(found)[:PROMPTS])
    raise SystemExit(f"error: in this model's chat template no word problem of ours has {tokens} tokens")


def asked(model_folder: str) -> tuple[tuple[str, ...], Work]:
    """(prompts, the work): the lengths of ragged responses are drawn from those that the model gives them itself."""
    import model
    import sample
    from data import encode_prompts
    from infra.rng import Draw
    from tasks.problem import Problem

    policy = model.load(model_folder)
    prompts = prompts_of_length(policy, REAL.prompt_tokens)
    ids = encode_prompts([Problem(text, "", "digits") for text in prompts[:SAMPLED]], policy.tokenizer, 10**6)[1]
    keys = [(0, Draw.EVALUATE, i) for i in range(len(ids))]
    batch = sample.sample(policy, list(ids), keys, sample.SampleConfig(max_new_tokens=REAL.new_tokens), group_size=1)
    lengths = tuple(sorted(batch.mask.sum(1).tolist()))
    return prompts, replace(REAL, drawn=lengths, stops=tuple(policy.stop_ids))
