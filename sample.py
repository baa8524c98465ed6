"""The sampler, on Hugging Face `generate`; as a script, look at what a model writes.

    python sample.py runs/quickstart                    # held-out prompts of a run, with reference and verdict
    python sample.py runs/quickstart "3b+5c*2d-7?"      # your own prompt
    python sample.py path/to/any/hf_model "Once upon"   # any causal LM

Every token is chosen by inverting the cumulative distribution at one uniform number, and that number is a function of
(seed, purpose, prompt position, sibling, token position) alone. So what is sampled does not depend on how prompts are
batched, on which rows have finished, or on how many processes share the work.
"""

import argparse
import json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from data import DataConfig, Draw, Problem, dressed, encode_prompts, load_problems, random_for, require_at_least
from model import ModelConfig, load
from reward import grade
from run import BadInput, choose_threads, command_line, rank, shared


@dataclass
class SampleConfig:
    group_size: int = 8  # G: responses per prompt
    max_new_tokens: int = 110  # a response that has not stopped by then is cut, and counted as truncated
    temperature: float = 1.0  # of the sampled softmax; training scores tokens at the same temperature
    batch_size: int = 128  # responses decoded together, a bound on memory; changes no sample

    def __post_init__(self):
        require_at_least(1, self, "max_new_tokens", "batch_size")
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: a response is compared with its siblings, so at least 2")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive (evaluation is also done greedily)")


@dataclass(frozen=True)
class Rollout:
    """B responses of a padded length T behind their prompts; the G siblings of a prompt are adjacent rows.

    All masks come from lengths, never from comparing ids with pad or eos: a prompt may hold either of them.
    """

    tokens: torch.Tensor  # [B, S] ids: prompts padded on the left, responses (the last T columns) on the right
    attention_mask: torch.Tensor  # [B, S] bool: false on padding
    mask: torch.Tensor  # [B, T] bool: true from a response's first token through its stop token
    sampler_log_probs: torch.Tensor  # [B, T] fp32, as the sampler drew them; 0 where masked
    truncated: torch.Tensor  # [B] bool: the response never stopped
    texts: tuple[str, ...]  # [B] the responses, without special tokens

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device) -> "Rollout":
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "texts"}
        return replace(self, **tensors)

    def rows(self, i: int, j: int) -> "Rollout":
        """Rows i to j, padding as it is."""
        return self.at(torch.arange(len(self))[i:j])

    def at(self, rows: torch.Tensor) -> "Rollout":
        """The given rows in the given order, padding as it is."""
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "texts"}
        return Rollout(**tensors, texts=tuple(self.texts[i] for i in rows.tolist()))

    def pick(self, rows: torch.Tensor) -> "Rollout":
        """The given rows in the given order, cut to the longest prompt and the longest response among them."""
        picked = self.at(rows)
        T, prompts = self.mask.shape[1], picked.attention_mask[:, : -self.mask.shape[1]]
        left = prompts.shape[1] - max(prompts.sum(1).tolist(), default=1)
        right = T - max(picked.mask.sum(1).tolist(), default=1)
        width = picked.tokens.shape[1] - right
        return replace(
            picked,
            tokens=picked.tokens[:, left:width],
            attention_mask=picked.attention_mask[:, left:width],
            mask=picked.mask[:, : T - right],
            sampler_log_probs=picked.sampler_log_probs[:, : T - right],
        )

    @staticmethod
    def cat(parts: list["Rollout"]) -> "Rollout":
        """The parts' rows one after the other, all padded to the longest prompt and the longest response."""
        T = max(part.mask.shape[1] for part in parts)
        P = max(part.tokens.shape[1] - part.mask.shape[1] for part in parts)

        def padded(part, name):
            x, right = getattr(part, name), T - part.mask.shape[1]
            left = P - (part.tokens.shape[1] - part.mask.shape[1]) if name in ("tokens", "attention_mask") else 0
            return F.pad(x, (left, right))

        wide = ("tokens", "attention_mask", "mask", "sampler_log_probs")
        return Rollout(
            **{name: torch.cat([padded(part, name) for part in parts]) for name in wide},
            truncated=torch.cat([part.truncated for part in parts]),
            texts=tuple(text for part in parts for text in part.texts),
        )

    @staticmethod
    def of_texts(prompts: list[list[int]], texts: list[str], tokenizer) -> "Rollout":
        """Given responses, each ended by the stop token, behind their prompts: supervised data in a rollout's shape."""
        responses = [[*tokenizer(t, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for t in texts]
        P, T = max(map(len, prompts)), max(map(len, responses))
        tokens = torch.zeros(len(texts), P + T, dtype=torch.long)
        attention_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            here = slice(P - len(prompt), P + len(response))
            tokens[i, here], attention_mask[i, here] = torch.tensor(prompt + response), True
        mask = attention_mask[:, P:]
        return Rollout(
            tokens, attention_mask, mask, torch.zeros(mask.shape), torch.zeros(len(texts)).bool(), tuple(texts)
        )


class InverseCDF(LogitsProcessor):
    """Makes `generate`'s argmax a sampler: leaves one token of each row possible, the one that its uniform points at.

    uniforms [B, T] in [0, 1). Records the log-prob of every chosen token under softmax(logits / temperature), the full
    softmax, as the loss assumes it. temperature 0 chooses the most likely token and records its log-prob at 1.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_length: int, vocabulary: int | None = None):
        self.uniforms, self.temperature, self.prompt_length = uniforms, temperature, prompt_length
        self.vocabulary = vocabulary  # ids from here on are padding of the head
        self.log_probs = torch.zeros_like(uniforms, dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        log_p = (scores[:, : self.vocabulary].float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature == 0:
            chosen = log_p.argmax(-1, keepdim=True)
        else:
            cdf = log_p.double().exp().cumsum(-1)  # double: 150k fp32 terms would move the later tokens' bounds
            point = self.uniforms[:, step, None] * cdf[:, -1:]
            chosen = torch.searchsorted(cdf, point, right=True)  # right: never a token of probability 0
        self.log_probs[:, step] = log_p.gather(-1, chosen)[:, 0]
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def uniforms(keys: list[tuple[int, ...]], length: int) -> torch.Tensor:
    """float64 [B, length] in [0, 1): row i is the stream of keys[i] = (seed, purpose, position, sibling)."""
    return torch.from_numpy(np.stack([random_for(*key).random(length) for key in keys]))


@torch.no_grad()
def _sample_batch(model, tokenizer, prompts, keys, max_new_tokens, temperature) -> Rollout:
    P = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (P - len(prompt)) + prompt for prompt in prompts])
    prompt_mask = torch.tensor([[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    sampler = InverseCDF(uniforms(keys, max_new_tokens).to(model.compute_device), temperature, P, model.vocabulary)
    out = model.generate(
        ids.to(model.compute_device),
        attention_mask=prompt_mask.long().to(model.compute_device),
        generation_config=generation_settings(model, max_new_tokens),
        synced_gpus=False,  # a sharded model is gathered, so that ranks need not wait for each other
        logits_processor=LogitsProcessorList([sampler]),
    ).cpu()
    responses = out[:, P:]
    T = responses.shape[1]
    stops = torch.isin(responses, torch.tensor(model.generation_config.eos_token_id))
    truncated = ~stops.any(1)
    lengths = torch.where(truncated, T, stops.int().argmax(1) + 1)
    mask = torch.arange(T) < lengths[:, None]
    return Rollout(
        tokens=out,
        attention_mask=torch.cat([prompt_mask, mask], 1),
        mask=mask,
        sampler_log_probs=torch.where(mask, sampler.log_probs[:, :T].cpu(), 0.0),
        truncated=truncated,
        texts=tuple(
            tokenizer.decode(row[:n], skip_special_tokens=True)
            for row, n in zip(responses.tolist(), lengths.tolist(), strict=True)
        ),
    )


def generation_settings(model, max_new_tokens: int) -> GenerationConfig:
    """All that steers `generate`. Greedy on purpose: `InverseCDF` has then chosen the token already."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )


def sample(
    model,
    tokenizer,
    prompts: list[list[int]],
    keys: list[tuple[int, ...]],
    config: SampleConfig,
    group_size: int | None = None,
    temperature: float | None = None,
) -> Rollout:
    """`group_size` responses to every prompt, siblings adjacent -> Rollout of len(prompts) x group_size rows, on CPU.

    keys[i] = (seed, purpose, position) of prompt i; sibling g draws its uniforms from keys[i] + (g,). `group_size` and
    `temperature` (0: greedy) default to the config's. The ranks share the rows, and each gets the whole Rollout; a
    sharded model must be `gathered`.
    """
    group_size = config.group_size if group_size is None else group_size
    temperature = config.temperature if temperature is None else temperature
    rows = [(prompt, (*key, g)) for prompt, key in zip(prompts, keys, strict=True) for g in range(group_size)]

    def decode(rows) -> list[Rollout]:
        batches = (zip(*rows[i : i + config.batch_size], strict=True) for i in range(0, len(rows), config.batch_size))
        return [_sample_batch(model, tokenizer, *batch, config.max_new_tokens, temperature) for batch in batches]

    return Rollout.cat(shared(decode, rows))


def dump_rollout(file: Path, tokenizer, rollout: Rollout, group_size: int, asked, verdicts, rows, per_token) -> None:
    """Write samples/step_*.jsonl, on rank 0: one line per response, with a list of values per token.

    asked, verdicts [B]: the problem and the verdict of each response. `per_token` maps names to [len(rows), T] tensors
    that exist only for the rows of the rollout that were learned from, those of the kept groups.
    """
    if rank():
        return
    place = {row: i for i, row in enumerate(rows.tolist())}
    with file.open("w") as out:
        for i, (problem, verdict) in enumerate(zip(asked, verdicts, strict=True)):
            ids = rollout.tokens[i, -rollout.mask.shape[1] :][rollout.mask[i]].tolist()
            line = {
                "prompt": problem.prompt,
                "reference": problem.reference,
                "text": rollout.texts[i],
                "reward": verdict.score,
                "reason": verdict.reason,
                "truncated": bool(rollout.truncated[i]),
                "group": i // group_size,
                "id": ids,
                "piece": tokenizer.convert_ids_to_tokens(ids),
                "sampler_log_prob": rollout.sampler_log_probs[i, : len(ids)].tolist(),
            }
            if i in place:
                line |= {name: values[place[i], : len(ids)].tolist() for name, values in per_token.items()}
            out.write(json.dumps(line) + "\n")


# --- the script ---------------------------------------------------------------------------------------------------


def open_run(path: str):
    """(model, tokenizer, the run's config or {}) of a run folder, or of any causal LM; on a GPU if there is one."""
    file, config = Path(path) / "config.yaml", {}
    if file.exists():
        config, path = yaml.safe_load(file.read_text()), str(Path(path) / "model")
        if not Path(path).is_dir():
            raise BadInput(f"{path} is not there: the run's training has not ended; resume=true goes on with it")
    settings = ModelConfig(**config.get("model", {}))
    model, tokenizer = load(path, settings.attention)
    choose_threads(model.num_parameters())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.compute_device = device
    return model.to(device, getattr(torch, settings.dtype) if device.type == "cuda" else None), tokenizer, config


def context_left(model, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt, in tokens, that leaves the model room for a whole response. Raises BadInput if none does."""
    context = getattr(model.config, "max_position_embeddings", None) or max_prompt_tokens + max_new_tokens
    if context <= max_new_tokens:
        raise BadInput(f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {context}")
    return min(max_prompt_tokens, context - max_new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what a model writes.")
    parser.add_argument("run_or_model", help="a run folder, or a model folder or Hub id")
    parser.add_argument("prompt", nargs="?", help="default: some of the run's held-out prompts")
    parser.add_argument("--samples", type=int, default=4, help="responses to a prompt, or held-out prompts shown")
    parser.add_argument("--temperature", type=float, help="default: the run's; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer, config = open_run(args.run_or_model)
    settings = SampleConfig(**config.get("sample", {}))
    if (args.temperature or 0) < 0 or args.samples < 1 or (args.max_new_tokens or 1) < 1:
        raise BadInput("--temperature must not be negative, --samples and --max-new-tokens must be at least 1")
    settings = replace(settings, max_new_tokens=args.max_new_tokens or settings.max_new_tokens)
    data_config = DataConfig(**config.get("data", {}))

    if args.prompt is not None:  # asked as the run asked its problems
        asked = dressed([Problem(args.prompt, None, "")], data_config)
        prompts = encode_prompts(asked, tokenizer, sys.maxsize, data_config.chat_template)[1] * args.samples
        problems = []
        longest = context_left(model, settings.max_new_tokens, len(prompts[0]))
        if len(prompts[0]) > longest:
            raise BadInput(f"the prompt has {len(prompts[0])} tokens; the model's context leaves room for {longest}")
        if not prompts[0]:
            raise BadInput("the prompt is empty, and this model's tokenizer puts no token before it")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompts[0]:
            raise BadInput(f"the prompt {args.prompt!r} has characters that this model's tokenizer does not know")
    elif config:
        limit = context_left(model, settings.max_new_tokens, data_config.max_prompt_tokens)
        held_out = load_problems(data_config, config["seed"], config["reward"]["grader"])[1]
        encoded = encode_prompts(held_out, tokenizer, limit, data_config.chat_template)
        problems, prompts = (part[: args.samples] for part in encoded)
    else:
        raise BadInput(f"{args.run_or_model} is not a run folder, so it has no held-out prompts: give a prompt")
    keys = [(args.seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    rollout = sample(model, tokenizer, prompts, keys, settings, group_size=1, temperature=args.temperature)
    for i, text in enumerate(rollout.texts):
        print(f"\n--- {i + 1} of {len(rollout)}" + (", cut off" if rollout.truncated[i] else ""))
        if problems:
            (verdict,) = grade([(problems[i], text)], config["reward"]["grader"])
            print(f"prompt     {problems[i].prompt}\nresponse   {text}")
            print(f"reference  {problems[i].reference}\nverdict    {verdict.score}: {verdict.reason}")
        else:
            print(f"prompt     {args.prompt}\nresponse   {text}")


if __name__ == "__main__":
    command_line(main)
