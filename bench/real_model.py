"""What step.py asks of a pretrained model: word problems of one length, and response lengths of the model's own."""

from dataclasses import replace

from common import Work

REAL = Work(prompts=4, group_size=4, prompt_tokens=64, new_tokens=96)  # the rest of the shape is the model's
PROMPTS = 64  # different ones
SAMPLED = 32  # responses whose lengths are drawn from
BRIEF = "Answer in one short sentence."  # without it a small model rarely stops in time


def prompts_of_length(tokenizer, tokens: int) -> tuple[str, ...]:
    """PROMPTS different word problems that have exactly `tokens` tokens as the model is asked them."""
    from data import encode_prompts
    from infra.rng import Draw, rng_for
    from tasks.problem import Problem
    from tasks.words import story

    random, found = rng_for(0, Draw.PROBLEMS), {}
    for _ in range(100):
        made = [Problem(f"{story(random, 1, 4)} {BRIEF}", "", "digits") for _ in range(200)]
        kept, ids = encode_prompts(made, tokenizer, 10**6)
        found |= {problem.prompt: None for problem, row in zip(kept, ids, strict=True) if len(row) == tokens}
        if len(found) >= PROMPTS:
            return tuple(list(found)[:PROMPTS])
    raise SystemExit(f"error: as this model is asked them, next to no word problem of ours has {tokens} tokens")


def asked(model_folder: str) -> tuple[tuple[str, ...], Work]:
    """(prompts, the work): the lengths of ragged responses are drawn from those that the model gives them itself."""
    import model
    import sample
    from data import encode_prompts
    from infra.rng import Draw
    from tasks.problem import Problem

    policy = model.load(model_folder)
    prompts = prompts_of_length(policy.tokenizer, REAL.prompt_tokens)
    ids = encode_prompts([Problem(text, "", "digits") for text in prompts[:SAMPLED]], policy.tokenizer, 10**6)[1]
    keys = [(0, Draw.EVALUATE, i) for i in range(len(ids))]
    batch = sample.sample(policy, list(ids), keys, sample.SampleConfig(max_new_tokens=REAL.new_tokens), group_size=1)
    lengths = tuple(sorted(batch.mask.sum(1).tolist()))
    return prompts, replace(REAL, drawn=lengths, stops=tuple(policy.stop_ids))
