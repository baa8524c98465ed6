"""The sampler, on Hugging Face `generate`; as a script, look at what a model writes.

    python sample.py runs/quickstart                    # held-out prompts of a run, with reference and verdict
    python sample.py runs/quickstart "3b+5c*2d-7?"      # your own prompt
    python sample.py path/to/any/hf_model "Once upon"   # any causal LM

Every token is chosen by inverting the cumulative distribution at one uniform number, and that number is a function of
(seed, purpose, prompt position, sibling, token position) alone. So what is sampled does not depend on how prompts are
batched, on which rows have finished, or on how many processes share the work.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import json
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from data import DataConfig, dressed, encode_prompts, load_problems
from infra.config import require_at_least, saved_block, saved_config
from infra.errors import BadInput, Parser
from infra.processes import choose_threads, command_line, rank, shared
from infra.rng import Draw, random_for
from model import ModelConfig, first_of_each_prompt, load
from rewards import Grader, RewardConfig
from tasks.problem import Problem

COMPACT_AT = 0.75  # rows that have stopped leave the batch when no more than this part of it goes on
ROOM = 64  # tokens that keys and values get room for ahead of time
DECODING = ("fast", "plain", "static")


@dataclass
class SampleConfig:
    group_size: int = 8  # G: responses per prompt
    max_new_tokens: int = 110  # a response that has not stopped by then is cut, and counted as truncated
    temperature: float = 1.0  # of the sampled softmax; training scores tokens at the same temperature
    batch_tokens: int = 16384  # tokens of prompts and full-length responses decoded together: memory; changes no sample
    decoding: str = "fast"  # fast, plain (transformers' own loop, the reference) or static (compiled on a GPU)

    def __post_init__(self):
        require_at_least(1, self, "max_new_tokens", "batch_tokens")
        if self.decoding not in DECODING:
            raise ValueError(f"decoding={self.decoding!r} is not known: choose one of {', '.join(DECODING)}")
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
    sampler_entropy: torch.Tensor  # [B, T] fp32, of the distribution that each token was drawn from; 0 where masked
    truncated: torch.Tensor  # [B] bool: the response never stopped
    texts: tuple[str, ...]  # [B] the responses, without special tokens

    def __len__(self) -> int:
        return len(self.texts)

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
            sampler_entropy=picked.sampler_entropy[:, : T - right],
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

        wide = ("tokens", "attention_mask", "mask", "sampler_log_probs", "sampler_entropy")
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
        mask, truncated = attention_mask[:, P:], torch.zeros(len(texts), dtype=torch.bool)
        return Rollout(tokens, attention_mask, mask, *torch.zeros(2, *mask.shape), truncated, tuple(texts))


class InverseCDF(LogitsProcessor):
    """Chooses each row's next token by inverting the cumulative distribution at the row's uniform of that step.

    uniforms [B, T] in [0, 1). Records log-prob and entropy [B, T] of every choice under softmax(logits / temperature),
    the full softmax, as the loss assumes it. temperature 0 chooses the most likely token and records values at 1.
    As a logits processor it makes `generate`'s argmax a sampler: it leaves one token of each row possible.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_length: int, vocabulary: int | None = None):
        self.uniforms, self.temperature, self.prompt_length = uniforms, temperature, prompt_length
        self.vocabulary = vocabulary  # ids from here on are padding of the head
        self.log_probs, self.entropy = (torch.zeros_like(uniforms, dtype=torch.float32) for _ in range(2))

    def choose(self, scores: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """logits [b, V] of the rows [b] of the batch, about to write token `step` of their responses -> ids [b]."""
        log_p = (scores[:, : self.vocabulary].float() / (self.temperature or 1.0)).log_softmax(-1)
        p = log_p.exp()
        if self.temperature == 0:
            chosen = log_p.argmax(-1, keepdim=True)
        else:
            cdf = p.cumsum(-1, dtype=torch.float64)  # 150k fp32 terms would move the later tokens' bounds
            point = self.uniforms[rows, step, None] * cdf[:, -1:]
            chosen = torch.searchsorted(cdf, point, right=True)  # right: never a token of probability 0
        self.log_probs[rows, step] = log_p.gather(-1, chosen)[:, 0]
        self.entropy[rows, step] = torch.special.entr(p).sum(-1)
        return chosen[:, 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        chosen = self.choose(scores, rows, input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, written into room set aside: DynamicLayer copies them all for every new token."""

    room = None  # the tensors that self.keys and self.values are the filled part of

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        end = filled + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            rows, heads, _, width = key_states.shape
            self.room = [states.new_empty(rows, heads, end + ROOM, width) for states in (key_states, value_states)]
            if filled:
                for room, old in zip(self.room, (self.keys, self.values), strict=True):
                    room[:, :, :filled] = old
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, filled:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def decode_groups(
    model, input_ids, logits_processor, stopping_criteria, generation_config, prompt_mask=None, source=None, **_
) -> torch.Tensor:
    """A loop for `generate`: prompts [n, P] and their mask -> ids [B, P + T]; row b continues prompt source[b].

    Each prompt is run once and its keys and values are repeated for its siblings; whenever a quarter of the rows has
    stopped since the last time, those leave the batch. `logits_processor` ends with an InverseCDF of B rows.
    """
    sampler, mask = logits_processor[-1], prompt_mask
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {model.cache_argument: cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids, attention_mask=mask, position_ids=positions, **options).logits[:, -1][source]
    cache.batch_select_indices(source)
    mask, position = mask[source], positions[source, -1:]
    P, steps = input_ids.shape[1], generation_config.max_new_tokens
    out = input_ids.new_full((len(source), P + steps), generation_config.pad_token_id)
    out[:, :P] = input_ids[source]
    stops = torch.tensor(generation_config.eos_token_id, device=out.device)
    rows, going = torch.arange(len(source), device=out.device), torch.ones_like(source, dtype=torch.bool)
    for step in range(steps):
        chosen = torch.where(going, sampler.choose(logits, rows, step), generation_config.pad_token_id)
        out[rows, P + step] = chosen
        going = going & ~torch.isin(chosen, stops)
        alive = int(going.sum())
        if not alive or step + 1 == steps:
            return out[:, : P + step + 1]
        if alive <= COMPACT_AT * len(rows):
            keep = going.nonzero()[:, 0]
            rows, going, chosen, mask, position = (x[keep] for x in (rows, going, chosen, mask, position))
            cache.batch_select_indices(keep)
        mask, position = torch.cat([mask, mask.new_ones(len(rows), 1)], 1), position + 1
        logits = model(chosen[:, None], attention_mask=mask, position_ids=position, **options).logits[:, -1]


def uniforms(keys: list[tuple[int, ...]], length: int) -> torch.Tensor:
    """float64 [B, length] in [0, 1): row i is the stream of keys[i] = (seed, purpose, position, sibling)."""
    return torch.from_numpy(np.stack([random_for(*key).random(length) for key in keys]))


@torch.no_grad()
def _sample_batch(model, tokenizer, prompts, keys, config: SampleConfig, temperature: float) -> Rollout:
    P, fast = max(map(len, prompts)), config.decoding == "fast" and model.divisible_cache
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (P - len(prompt)) + prompt for prompt in prompts])
    prompt_mask = torch.tensor([[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    device = model.compute_device
    sampler = InverseCDF(uniforms(keys, config.max_new_tokens).to(device), temperature, P, model.vocabulary)
    first, source = first_of_each_prompt(ids, prompt_mask, P) if fast else (torch.arange(len(ids)), None)
    once = prompt_mask[first].long().to(device)
    out = model.generate(
        ids[first].to(device),
        attention_mask=once,
        generation_config=generation_settings(model, config),
        synced_gpus=False,  # a sharded model is gathered, so that ranks need not wait for each other
        logits_processor=LogitsProcessorList([sampler]),
        **({"custom_generate": decode_groups, "prompt_mask": once, "source": source.to(device)} if fast else {}),
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
        sampler_entropy=torch.where(mask, sampler.entropy[:, :T].cpu(), 0.0),
        truncated=truncated,
        texts=tuple(
            tokenizer.decode(row[:n], skip_special_tokens=True)
            for row, n in zip(responses.tolist(), lengths.tolist(), strict=True)
        ),
    )


def generation_settings(model, config: SampleConfig) -> GenerationConfig:
    """All that steers `generate`. Greedy on purpose: `InverseCDF` has then chosen the token already."""
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        cache_implementation="static" if config.decoding == "static" else None,
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
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # stable: siblings stay together
        parts, start = [], 0
        for end in range(1, len(rows) + 1):
            longest = len(rows[order[min(end, len(rows) - 1)]][0]) + config.max_new_tokens
            if end == len(rows) or (end + 1 - start) * longest > config.batch_tokens:
                batch = zip(*(rows[i] for i in order[start:end]), strict=True)
                parts.append(_sample_batch(model, tokenizer, *batch, config, temperature))
                start = end
        return [Rollout.cat(parts).at(torch.tensor(order).argsort())]

    return Rollout.cat(shared(decode, rows))


def line_ids(tokens: torch.Tensor, mask: torch.Tensor, tokenizer, line_end: str) -> torch.Tensor:
    """The number of the line that each token of a response belongs to, from 0. tokens, mask [B, T] -> int64 [B, T].

    A line ends with the token in which the last character of `line_end` stands, whatever else that token holds, be it
    a second line end; so several tokens may make one line end, and the numbers leave none out.
    """
    distinct, piece_of = tokens.unique(return_inverse=True)
    pieces = [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in distinct.tolist()]
    breaks = torch.zeros_like(mask)
    for i, row in enumerate(piece_of.tolist()):
        row = [pieces[piece] for piece, live in zip(row, mask[i].tolist(), strict=True) if live]
        ends = np.cumsum([len(piece) for piece in row])  # where in the text each token ends
        found = [match.end() for match in re.finditer(re.escape(line_end), "".join(row))]
        breaks[i, np.searchsorted(ends, found)] = True
    return breaks.cumsum(1) - breaks.long()


def dump_rollout(
    file: Path, tokenizer, rollout: Rollout, group_size: int, asked, verdicts, rewards, rows, per_token
) -> None:
    """Write samples/step_*.jsonl, on rank 0: one line per response, with a list of values per token.

    asked, verdicts, rewards [B]: of each response the problem, the verdict, and the reward as shaped for training.
    `per_token` maps names to [len(rows), T] tensors that exist only for the rows of the rollout that were learned from,
    those of the kept groups.
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
                line["shaped_reward"] = rewards[i].item()
                line |= {name: values[place[i], : len(ids)].tolist() for name, values in per_token.items()}
            out.write(json.dumps(line) + "\n")


# --- the script ---------------------------------------------------------------------------------------------------


def open_run(path: str):
    """(model, tokenizer, the run's config or {}) of a run folder, or of any causal LM; on a GPU if there is one."""
    config = saved_config(Path(path))
    if config:
        path = str(Path(path) / "model")
        if not Path(path).is_dir():
            raise BadInput(f"{path} is not there: the run's training has not ended; resume=true goes on with it")
    settings = saved_block(ModelConfig, config, "model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flash_on_cpu = device.type == "cpu" and "flash" in settings.attention
    model, tokenizer = load(path, "sdpa" if flash_on_cpu else settings.attention)
    choose_threads(model.num_parameters())
    model.compute_device = device
    model = model.to(device)
    for parameter in model.parameters() if device.type == "cuda" else ():  # not buffers: rotary tables must stay fp32
        parameter.data = parameter.data.to(getattr(torch, settings.dtype))
    return model, tokenizer, config


def context_left(model, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt, in tokens, that leaves the model room for a whole response. Raises BadInput if none does."""
    context = getattr(model.config, "max_position_embeddings", None) or max_prompt_tokens + max_new_tokens
    if context <= max_new_tokens:
        raise BadInput(f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of {context}")
    return min(max_prompt_tokens, context - max_new_tokens)


def main() -> None:
    parser = Parser(description="Print what a model writes.")
    parser.add_argument("run_or_model", help="a run folder, or a model folder or Hub id")
    parser.add_argument("prompt", nargs="?", help="default: some of the run's held-out prompts")
    parser.add_argument("--samples", type=int, default=4, help="responses to a prompt, or held-out prompts shown")
    parser.add_argument("--temperature", type=float, help="default: the run's; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.temperature or 0, args.seed) < 0 or min(args.samples, args.max_new_tokens or 1) < 1:
        raise BadInput("--temperature and --seed must not be negative, --samples, --max-new-tokens must be at least 1")
    model, tokenizer, config = open_run(args.run_or_model)
    settings = saved_block(SampleConfig, config, "sample")
    settings = replace(settings, max_new_tokens=args.max_new_tokens or settings.max_new_tokens)
    data_config = saved_block(DataConfig, config, "data")
    grader = Grader(saved_block(RewardConfig, config, "reward"))

    if args.prompt is not None:  # asked as the run asked its problems
        asked = dressed([Problem(args.prompt, None, "")], data_config)
        prompts = [*encode_prompts(asked, tokenizer, sys.maxsize, data_config.chat_template)[1]] * args.samples
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
        held_out = load_problems(data_config, config["seed"], grader)[1]
        encoded = encode_prompts(held_out, tokenizer, limit, data_config.chat_template)
        problems, prompts = (part[: args.samples] for part in encoded)
    else:
        raise BadInput(f"{args.run_or_model} is not a run folder, so it has no held-out prompts: give a prompt")
    keys = [(args.seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    rollout = sample(model, tokenizer, prompts, keys, settings, group_size=1, temperature=args.temperature)
    for i, text in enumerate(rollout.texts):
        print(f"\n--- {i + 1} of {len(rollout)}" + (", cut off" if rollout.truncated[i] else ""))
        if problems:
            (verdict,) = grader.grade([(problems[i], text)])
            print(f"prompt     {problems[i].prompt}\nresponse   {text}")
            print(f"reference  {problems[i].reference}\nverdict    {verdict.score}: {verdict.reason}")
        else:
            print(f"prompt     {args.prompt}\nresponse   {text}")


if __name__ == "__main__":
    command_line(main)
