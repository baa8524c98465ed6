"""The sampler, on Hugging Face `generate`; as a script, look at what a model writes.

    python sample.py runs/quickstart                    # a run's held-out prompts, with verdicts
    python sample.py runs/quickstart "3b+5c*2d-7?"      # your own prompt
    python sample.py path/to/any/hf_model "Once upon"   # any causal LM

Every token is chosen by inverting the cumulative distribution at one uniform number, and that
number is a function of (seed, purpose, prompt position, sibling, token position) alone: not of how
prompts are batched, of which rows have finished, or of how many processes share the work. For the
same rows decoded together a sample is the same to the last bit, on a CPU. Other rows beside it
round the distribution otherwise, which moves its bounds: now and then a token flips, and that
response goes on differently. docs/algorithm.md says how often.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from data import DataConfig, apply_prompt, encode_prompts, load_problems
from infra.config import (
    Block,
    all_keys,
    build_config,
    knob,
    override,
    saved_block,
    saved_config,
    setting,
)
from infra.errors import BadInput, Parser, RunStopped
from infra.memory import free_bytes, tokens_that_fit
from infra.processes import choose_threads, command_line, map_over_ranks
from infra.rng import Draw, rng_for
from infra.waiting import count, counted, stage
from model import ModelConfig, Policy, fast, load
from rewards import Grader, RewardConfig
from spro import Batch
from tasks.problem import Problem
from tasks.responses import EndOfResponse

BLOCK = 512  # tokens of a large vocabulary that are summed at once to find the sampled one


@dataclass
class SampleConfig(Block):
    group_size: int = knob(8, "G: responses per prompt")
    max_new_tokens: int = knob(110, "a response that is longer is cut, and counted", least=1)
    stop: list[str] = knob([], "texts that end a response too, and are cut off what is graded")
    temperature: float = knob(1.0, "of the sampled softmax, and of the log-probs in training")
    batch_tokens: int = setting(
        0,
        "tokens of prompts and full responses decoded together; 0: what fits, said at the start",
        least=0,
        rounds=True,
        lowers=dict.fromkeys(
            ("sample", "values", "evaluate"),
            "set sample.batch_tokens below what the start of the run says",
        ),
    )
    decoding: str = knob(
        "fast",
        "fast (the quickest on the device, where fast/ knows the model), plain (the reference)",
        choices=("fast", "plain"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: a response is compared with its siblings, so at "
                "least 2"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be positive (evaluation is also done "
                "greedily)"
            )
        if "" in self.stop:
            raise ValueError(
                f"stop={self.stop} holds an empty text, which would end every response at once"
            )
        if any(re.fullmatch(r"(\\[nrt])+", string) for string in self.stop):
            raise ValueError(
                f"stop={self.stop} holds backslashes and letters, no line ends: write those in "
                """double quotes, and all in single ones: sample.stop='["\\n\\n"]'"""
            )


class InverseCDF(LogitsProcessor):
    """Chooses tokens by inverting the cumulative distribution at the row's uniform of that step.

    uniforms [B, T] in [0, 1). Records log-prob and entropy [B, T] of every choice under
    softmax(logits / temperature), the full softmax, as the loss assumes it. temperature 0 chooses
    the most likely token and records values at 1. As a logits processor it makes `generate`'s
    argmax a sampler: it leaves one token of each row possible.
    """

    def __init__(
        self,
        uniforms: torch.Tensor,
        temperature: float,
        prompt_length: int,
        vocab_size: int | None = None,
    ):
        self.uniforms = uniforms
        self.temperature = temperature
        self.prompt_length = prompt_length
        self.vocab_size = vocab_size  # ids from here on are padding of the head
        self.log_probs = torch.zeros_like(uniforms, dtype=torch.float32)
        self.entropy = torch.zeros_like(uniforms, dtype=torch.float32)

    def choose(self, logits: torch.Tensor, rows: torch.Tensor, step) -> torch.Tensor:
        """logits [b, V] of the rows [b] that write token `step` of their responses, a number or a
        tensor [1] -> ids [b].
        """
        log_p = (logits[:, : self.vocab_size].float() / (self.temperature or 1.0)).log_softmax(-1)
        p = log_p.exp()
        if self.temperature == 0:
            chosen = log_p.argmax(-1, keepdim=True)
        else:
            chosen = invert_cdf(p, self.uniforms[rows, step][:, None])
            # NaN is below nothing. An id that does not exist would be an assert on a GPU: the NaN
            # is recorded instead, and `sample` says it.
            chosen = chosen.clamp(max=p.shape[-1] - 1)
        self.log_probs[rows, step] = log_p.gather(-1, chosen)[:, 0]
        self.entropy[rows, step] = torch.special.entr(p).sum(-1)
        return chosen[:, 0]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        step = input_ids.shape[1] - self.prompt_length
        count("token", step + 1, self.uniforms.shape[1])
        chosen = self.choose(scores, rows, step)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


def invert_cdf(p: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Probabilities [b, V], up to a factor, and uniforms [b, 1] in [0, 1) -> ids [b, 1].

    In float64: 150k fp32 terms would move the later tokens' bounds. And from the right, so that a
    token of probability 0 is never chosen.
    """
    V = p.shape[-1]
    if V <= 32 * BLOCK:
        cdf = p.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(cdf, uniforms * cdf[:, -1:], right=True)
    # A scan over all of a large vocabulary is slow: first which block, then which token inside it
    whole = V // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float64)
    rest = p[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    ends = torch.cat([sums, rest], -1).cumsum(-1)
    point = uniforms * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp(max=ends.shape[-1] - 1)
    ids = block * BLOCK + torch.arange(BLOCK, device=p.device)
    inside = torch.where(ids < V, p.gather(-1, ids.clamp(max=V - 1)), 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    point = point - F.pad(ends, (1, 0)).gather(-1, block)
    # The block's sum may be rounded up beyond the sum of its tokens
    point = point.minimum(inside[:, -1:].nextafter(torch.zeros_like(point)))
    return block * BLOCK + torch.searchsorted(inside, point, right=True)


def uniforms(keys: list[tuple[int, ...]], length: int) -> torch.Tensor:
    """float64 [B, length] in [0, 1): row i is the stream of keys[i]."""
    return torch.from_numpy(np.stack([rng_for(*key).random(length) for key in keys]))


def generation_settings(policy: Policy, config: SampleConfig) -> GenerationConfig:
    """All that steers `generate`. Greedy on purpose: `InverseCDF` has chosen the token already."""
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        eos_token_id=policy.stop_ids,
        pad_token_id=policy.pad_id,
    )


def sample(
    policy: Policy,
    prompts: list[list[int]],
    keys: list[tuple[int, ...]],
    config: SampleConfig,
    group_size: int | None = None,
    temperature: float | None = None,
) -> Batch:
    """`group_size` responses to every prompt, siblings adjacent -> a Batch on CPU.

    keys[i] = (seed, purpose, position) of prompt i; sibling g draws its uniforms from keys[i] +
    (g,). `group_size` and `temperature` (0: greedy) default to the config's. The ranks share the
    rows, and each gets the whole Batch; a sharded policy must be `unsharded`. Raises RunStopped
    where the model gives NaN.
    """
    group_size = config.group_size if group_size is None else group_size
    temperature = config.temperature if temperature is None else temperature
    rows = [
        (prompt, (*key, g))
        for prompt, key in zip(prompts, keys, strict=True)
        for g in range(group_size)
    ]

    def decode(rows) -> list[Batch]:
        # Similar lengths go together; the order is stable, so that siblings stay together too.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        lengths = [len(rows[i][0]) + config.max_new_tokens for i in order]
        parts = []
        together = batch_tokens(policy, config, max(lengths))
        for chosen in counted(rows_at_once(lengths, together), "batch"):
            part_prompts, part_keys = zip(*(rows[order[i]] for i in chosen), strict=True)
            parts.append(_sample_rows(policy, part_prompts, part_keys, config, temperature))
        return [Batch.cat(parts).select(torch.tensor(order).argsort())]

    batch = replace(Batch.cat(map_over_ranks(decode, rows)), group_size=group_size)
    check_numbers(batch)
    return batch


def check_numbers(batch: Batch) -> None:
    """Raises RunStopped, on every rank, where a token was drawn from NaN."""
    # Once for all tokens: to ask at each of them would make a GPU wait for the answer
    broken = batch.sampler_log_probs.isnan().nonzero().tolist()
    if broken:
        row, step = broken[0]
        raise RunStopped(
            f"the model gives NaN, first for token {step + 1} of response {row + 1} of "
            f"{len(batch)}: its weights are broken or overflow in model.dtype; lower "
            "train.learning_rate and go back to an earlier checkpoint, or try model.dtype=float32"
        )


def batch_tokens(policy: Policy, config: SampleConfig, tokens_per_row: int) -> int:
    """Tokens decoded together: config.batch_tokens, or what fits (train.py has chosen before)."""
    if config.batch_tokens:
        return config.batch_tokens
    shape, number = policy.config.get_text_config(), policy.model.dtype.itemsize
    on_gpu = policy.device.type == "cuda"
    return tokens_that_fit(shape, number, tokens_per_row, free_bytes(policy.device), on_gpu)


def rows_at_once(lengths: list[int], max_tokens: int) -> list[range]:
    """Cut rows of ascending lengths into runs of at most `max_tokens`, padding included."""
    parts, start = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > max_tokens:
            parts.append(range(start, end))
            start = end
    return parts


@torch.no_grad()
def _sample_rows(policy: Policy, prompts, keys, config: SampleConfig, temperature: float) -> Batch:
    """One response for each row: its prompt's ids, and the key of its uniforms."""
    P = max(map(len, prompts))
    ids = torch.tensor([[policy.pad_id] * (P - len(prompt)) + prompt for prompt in prompts])
    prompt_mask = torch.tensor(
        [[False] * (P - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    )
    device = policy.device
    sampler = InverseCDF(
        uniforms(keys, config.max_new_tokens).to(device), temperature, P, policy.vocab_size
    )
    end = EndOfResponse(policy, config.stop, P)
    ids_given, mask_given, loop = ids, prompt_mask, {}
    if config.decoding == "fast" and fast and fast.can_decode(policy):
        # Each different prompt once; the loop continues it for every row that has it.
        first, source = fast.first_of_each_prompt(ids, prompt_mask, P)
        ids_given, mask_given = ids[first], prompt_mask[first]
        loop = {"custom_generate": fast.decoding_loop(policy), "source": source.to(device)}
        loop |= {
            "prompt_mask": mask_given.long().to(device),
            "cache_argument": policy.cache_argument,
        }
    tokens = policy.generate(
        ids_given.to(device),
        attention_mask=mask_given.long().to(device),
        generation_config=generation_settings(policy, config),
        # A sharded model is unsharded now, so that ranks need not wait for each other
        synced_gpus=False,
        logits_processor=LogitsProcessorList([sampler]),
        stopping_criteria=StoppingCriteriaList([end]),
        **loop,
    )
    stops = end.ends(tokens[:, P:]).cpu()
    truncated = ~stops.any(1)
    # The token that ends it is inside
    lengths = torch.where(truncated, stops.shape[1], stops.int().argmax(1) + 1)
    T = int(lengths.max())
    mask = torch.arange(T) < lengths[:, None]
    tokens = tokens[:, : P + T].cpu()
    # A loop that looks for stop strings now and then has gone on behind some
    tokens[:, P:].masked_fill_(~mask, policy.pad_id)
    live = [row[:n] for row, n in zip(tokens[:, P:].tolist(), lengths.tolist(), strict=True)]
    return Batch(
        tokens=tokens,
        attention_mask=torch.cat([prompt_mask, mask], 1),
        mask=mask,
        sampler_log_probs=torch.where(mask, sampler.log_probs[:, :T].cpu(), 0.0),
        sampler_entropy=torch.where(mask, sampler.entropy[:, :T].cpu(), 0.0),
        truncated=truncated,
        texts=tuple(map(end.text, live)),
    )


# --- the script -----------------------------------------------------------------------------------


def open_run(path: str) -> tuple[Policy, dict]:
    """(policy, the run's config or {}) of a run folder, or of any causal LM; on a GPU if there
    is one.
    """
    config = saved_config(Path(path))
    if config:
        path = str(Path(path) / "model")
        if not Path(path).is_dir():
            raise BadInput(
                f"{path} is not there: the run's training has not ended; resume=true goes on with "
                "it"
            )
    return load_to_sample(path, saved_block(ModelConfig, config, "model")), config


def load_to_sample(path: str | Path, settings: ModelConfig) -> Policy:
    """The model of a folder or Hub id, as `settings` have it, in one process: on a GPU, in
    model.dtype, if there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flash_on_cpu = device.type == "cpu" and "flash" in settings.attention
    policy = load(path, "sdpa" if flash_on_cpu else settings.attention)
    choose_threads(policy.num_parameters())
    policy.device = device
    policy = policy.to(device)
    if device.type == "cuda":
        dtype = getattr(torch, settings.dtype)
        for parameter in policy.parameters():  # not buffers: rotary tables stay fp32
            parameter.data = parameter.data.to(dtype)
    return policy


def context_of(policy: Policy) -> float:
    """Tokens of prompt and response that the model takes; inf where its config sets no bound."""
    return getattr(policy.config, "max_position_embeddings", None) or math.inf


def context_left(policy: Policy, max_new_tokens: int, max_prompt_tokens: int) -> int:
    """The longest prompt, in tokens, that leaves the model room for a whole response. Raises
    BadInput if none does.
    """
    context = context_of(policy)
    if context <= max_new_tokens:
        raise BadInput(
            f"{max_new_tokens} new tokens leave no room for a prompt in the model's context of "
            f"{context}"
        )
    return min(max_prompt_tokens, context - max_new_tokens)


def held_out_prompts(
    policy: Policy, config: SampleConfig, data_config: DataConfig, seed: int, grader: Grader
) -> tuple[list[Problem], Sequence[list[int]]]:
    """(problems, ids of their prompts): a run's held-out ones that leave room for a response."""
    longest = context_left(policy, config.max_new_tokens, data_config.max_prompt_tokens)
    _, held_out = load_problems(data_config, seed, grader)
    how = (longest, data_config.chat_template, policy.known_ids)
    return encode_prompts(held_out, policy.tokenizer, *how)


def encode_own_prompt(
    text: str, policy: Policy, config: DataConfig, max_new_tokens: int
) -> list[int]:
    """Ids of a prompt that a user typed, asked as the run asked its problems. Raises BadInput
    where that cannot be.
    """
    asked = apply_prompt([Problem(text, None, "")], config)
    how = (sys.maxsize, config.chat_template, policy.known_ids)
    ids = encode_prompts(asked, policy.tokenizer, *how)[1][0]
    if not ids:
        raise BadInput("the prompt is empty, and this model's tokenizer puts no token before it")
    longest = context_left(policy, max_new_tokens, len(ids))
    if len(ids) > longest:
        raise BadInput(
            f"the prompt has {len(ids)} tokens; the model's context leaves room for {longest}"
        )
    unknown = policy.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise BadInput(
            f"the prompt {text!r} has characters that this model's tokenizer does not know"
        )
    return ids


def with_stop_strings(config: SampleConfig, argument: str | None) -> SampleConfig:
    """The config with what --stop says, in the words of `sample.stop=` on train.py's command line.
    Raises BadInput where it is no list of texts.
    """
    if argument is None:
        return config
    values: dict = {}
    override(values, f"stop={argument}", SampleConfig)
    given = build_config(SampleConfig, values, all_keys(SampleConfig), "sample.")
    return replace(config, stop=given.stop)


def parse_arguments():
    parser = Parser(description="Print what a model writes.")
    parser.add_argument("run_or_model", help="a run folder, or a model folder or Hub id")
    parser.add_argument("prompt", nargs="?", help="default: some of the run's held-out prompts")
    parser.add_argument(
        "--samples", type=int, default=4, help="responses to a prompt, or held-out prompts shown"
    )
    parser.add_argument("--temperature", type=float, help="default: the run's; 0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's")
    parser.add_argument("--stop", help="as sample.stop, '[\"\\n\\n\"]'; default: the run's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.temperature or 0, args.seed) < 0:
        raise BadInput("--temperature and --seed must not be negative")
    if args.samples < 1 or (args.max_new_tokens is not None and args.max_new_tokens < 1):
        raise BadInput("--samples and --max-new-tokens must be at least 1")
    return args


def main() -> None:
    args = parse_arguments()
    policy, config = open_run(args.run_or_model)
    settings = saved_block(SampleConfig, config, "sample")
    settings = replace(settings, max_new_tokens=args.max_new_tokens or settings.max_new_tokens)
    settings = with_stop_strings(settings, args.stop)
    data_config = saved_block(DataConfig, config, "data")
    grader = Grader(saved_block(RewardConfig, config, "reward"))
    problems = []
    if args.prompt is not None:
        ids = encode_own_prompt(args.prompt, policy, data_config, settings.max_new_tokens)
        prompts = [ids] * args.samples
    elif config:
        held_out = held_out_prompts(policy, settings, data_config, config["seed"], grader)
        problems, prompts = (part[: args.samples] for part in held_out)
    else:
        raise BadInput(
            f"{args.run_or_model} is not a run folder, so it has no held-out prompts: give a prompt"
        )
    keys = [(args.seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    with stage("sample"):
        batch = sample(policy, prompts, keys, settings, group_size=1, temperature=args.temperature)
    for i, text in enumerate(batch.texts):
        print(f"\n--- {i + 1} of {len(batch)}" + (", cut off" if batch.truncated[i] else ""))
        if problems:
            (verdict,) = grader.grade([(problems[i], text)])
            print(f"prompt     {problems[i].prompt}\nresponse   {text}")
            print(
                f"reference  {problems[i].reference}\nverdict    {verdict.score}: {verdict.reason}"
            )
        else:
            print(f"prompt     {args.prompt}\nresponse   {text}")


if __name__ == "__main__":
    command_line(main)
