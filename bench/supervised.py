"""A supervised step of ours (a warm start's) beside a plain Hugging Face loop on the same rows, taken in turn.

    python bench/supervised.py                  # a 5M-parameter model with random weights
    python bench/supervised.py --model FOLDER   # yours; python -m tools.smollm2 FOLDER makes one

The rows are word problems with the noisy demonstrator's solutions, in the model's chat template where it has one. The
plain loop pads whole rows and asks the model for its loss; both take the same AdamW steps in fp32. Seconds are CPU
seconds (on a GPU wall), medians over the steps; the losses of both are shown, for they must agree.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import common
from common import TINY, Work


def batches(tokenizer, steps: int, rows: int) -> list[tuple[list, list]]:
    """[(prompts' ids, solutions), ...], a step each."""
    import tasks
    from data import DataConfig, encode_prompts, load_problems
    from infra.rng import Draw, rng_for

    config = DataConfig(source="words", min_steps=2, max_steps=4, train_size=steps * rows, held_out_size=1)
    problems, prompts = encode_prompts(load_problems(config, 0)[0], tokenizer, 512)
    solve = tasks.demonstrator(config)
    texts = [solve(problem, rng_for(0, Draw.DEMONSTRATE, i)) for i, problem in enumerate(problems)]
    parts = [slice(i * rows, (i + 1) * rows) for i in range(steps)]
    return [(list(prompts[part]), texts[part]) for part in parts]


def ours(folder: str):
    """A function that takes one step on (prompts, texts) -> its loss."""
    import model
    from baselines.supervised import supervised_step
    from spro import Batch
    from train import TrainConfig

    settings = TrainConfig()
    policy = model.load(folder)
    optimizer = model.make_optimizer(policy, settings, lr=1e-5)

    def step(prompts, texts) -> float:
        batch = Batch.from_texts(prompts, texts, policy.tokenizer)
        return supervised_step(policy, optimizer, batch, settings)["loss"]

    return policy.tokenizer, step


def plain(folder: str):
    """The like of transformers alone."""
    import torch
    from train import TrainConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = TrainConfig()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    how = {"lr": 1e-5, "betas": settings.adam_betas, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **how, fused=True)

    def step(prompts, texts) -> float:
        solutions = tokenizer(texts, add_special_tokens=False).input_ids
        rows = [prompt + ids + [tokenizer.eos_token_id] for prompt, ids in zip(prompts, solutions, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(mask == 0, -100)
        for label, prompt in zip(labels, prompts, strict=True):
            label[: len(prompt)] = -100
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; default: random weights")
    parser.add_argument("--rows", type=int, default=16, help="solutions a step")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each, after one that does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="next to no work, to try the script")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as made:
        if not args.model:
            common.make_model(Path(made), TINY if args.tiny else Work())
        folder = args.model or made
        (tokenizer, our_step), plain_step = ours(folder), plain(folder)
    seconds, losses = {"ours": [], "plain": []}, {"ours": [], "plain": []}
    for prompts, texts in batches(tokenizer, args.steps + 1, args.rows):
        for name, step in (("ours", our_step), ("plain", plain_step)):
            taken, loss = common.seconds_of(partial(step, prompts, texts))
            seconds[name].append(taken)
            losses[name].append(loss)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    found = {"seconds": medians, "ratio": medians["ours"] / medians["plain"], "losses": losses}
    rows = [["", "ours", "plain", "ours / plain"], ["step, s", *medians.values(), found["ratio"]]]
    rows += [[f"loss {i}", *pair, ""] for i, pair in enumerate(zip(*losses.values(), strict=True))]
    print(common.table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
