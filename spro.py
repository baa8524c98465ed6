"""SPRO (arXiv 2507.01551): reward -> advantage -> loss, as pure functions of tensors.

Shapes: `B` = responses = prompts x G, the G siblings of a prompt in adjacent rows; `T` = padded
response length. `mask` [B, T] is bool, true from a response's first token through its stop token.

    the paper                                      here                               shape
    r_o(y_i), outcome reward                       rewards                            [B]
    log pi_theta_old(y_t | x, y_<t)                log_probs                          [B, T]
    log pi_ref(y_t | x, y_<t)                      ref_log_probs                      [B, T]
    r(s_t, a_t) = beta log(pi_theta / pi_ref)      process_reward                     [B, T]
    R~_t = sum_{j<=t} r(s_j, a_j)        (Eq. 11)  cumulative_process_reward ("cpr")  [B, T]
    MSA_{i,t} = R~_{i,t} - masked mean   (Eq. 12)  masked_step_advantage ("msa")      [B, T]
    A_{i,t} = outcome_i + MSA_{i,t}      (Eq. 13)  spro_advantage                     [B, T]
    1 / (N |y_i|), the mean of means     (Eq. 14)  token_weights                      [B, T]
    PPO-clip surrogate                   (Eq. 14)  policy_loss                        scalar

The equations come first, in the paper's order; what they take, a `Batch`, is at the end of the
file. Every function leaves its inputs as they are and computes in fp32 at least: half precision is
raised, float64 stays float64. Masked entries are removed with `where`, for multiplying by a zero
mask would let NaN and inf through.
"""

import functools
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")
PROCESS_DTYPES = ("tf32", "float32", "bfloat16")
NEEDED_FIELDS = {  # what an estimator says it needs -> a field that its batch must have
    "reference": "ref_log_probs",
    "steps": "step_ids",
    "answer": "answer_log_probs",
    "trace": "step_labels",
    "luck": "luck",
    "values": "values_before",
    "critic": "critic_values",
    "truncated": "truncated",
}
MAX_LOG_RATIO = 20.0  # one runaway token must not overflow: inf x 0 would be NaN for the whole step
KL_ESTIMATORS = {  # of KL(policy || reference), from d = log policy - log reference of the token
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: (-d).clamp(max=MAX_LOG_RATIO).exp() - 1 + d,
}


def _knob(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class AlgorithmConfig:
    advantage: str = _knob("spro", "the estimator: a name in baselines.ADVANTAGES")
    beta: float = _knob(0.05, "weight of the log-ratio to the reference; 0 is GRPO, and loads none")
    clip_low: float = _knob(0.2, "PPO clip: the ratio new / old stays above 1 - clip_low")
    clip_high: float = _knob(0.2, "... and below 1 + clip_high")
    loss_weights: str = _knob("seq-mean-token-mean", "how tokens are averaged: WEIGHT_MODES")
    keep_accuracy: tuple[float, float] = _knob((0.0, 1.0), "bounds of a kept group's mean verdict")
    kl_coef: float = _knob(0.0, "times KL(policy || reference) in the loss; below 0: a bonus")
    kl_estimator: str = _knob("exact", "of that KL: exact, or of the sampled token: k1, k2, k3")
    process_dtype: str = _knob(
        "tf32", "of the process reward's log-probs where model.dtype is bfloat16"
    )
    line_end: str = _knob("\n", "text that ends a line, the step of estimators that have steps")
    step_tokens: int = _knob(0, "a step is so many tokens; 0: a line")
    gae_lambda: float = _knob(1.0, "lambda of GAE, for ppo and egae; 1: reward minus value")

    def __post_init__(self):
        low, high = self.keep_accuracy
        if self.loss_weights not in WEIGHT_MODES:
            raise ValueError(
                f"loss_weights={self.loss_weights!r}: choose one of {', '.join(WEIGHT_MODES)}"
            )
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError("clip_low must lie in (0, 1) and clip_high above 0")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"keep_accuracy=[{low}, {high}] must hold 0 <= low <= high <= 1")
        if not math.isfinite(self.kl_coef):
            raise ValueError(f"kl_coef={self.kl_coef} is not a finite number")
        if self.kl_estimator not in ("exact", *KL_ESTIMATORS):
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}: choose one of exact, "
                f"{', '.join(KL_ESTIMATORS)}"
            )
        if self.process_dtype not in PROCESS_DTYPES:
            raise ValueError(
                f"process_dtype={self.process_dtype!r}: choose one of {', '.join(PROCESS_DTYPES)}"
            )
        if not self.line_end:
            raise ValueError("line_end is empty: give the text that ends a line")
        if self.step_tokens < 0:
            raise ValueError(f"step_tokens={self.step_tokens}: give a number of tokens, or 0")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda={self.gae_lambda} must lie in [0, 1]")


# --- reward -> advantage (Eq. 6 to 13) ------------------------------------------------------------


def outcome_advantage(rewards: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """GRPO's outcome term, the first half of Eq. 13: `(r - mean) / (std + eps)` inside each group.

    rewards [B] -> [B]. The std is the unbiased one (ddof 1). A group of equal rewards gives exactly
    0. Raises ValueError if group_size < 2 or does not divide B.
    """
    centred = centred_rewards(rewards, group_size)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + eps)).flatten()


def process_reward(log_probs: Tensor, ref_log_probs: Tensor, beta: float) -> Tensor:
    """What the policy itself says each token was worth (Eq. 6, Prop. 1).

    `beta * (log pi_theta - log pi_ref)`. [B, T], [B, T] -> [B, T]. beta 0 gives 0 even where the
    log-ratio is not finite.
    """
    log_ratio = at_least_fp32(log_probs) - at_least_fp32(ref_log_probs)
    return beta * log_ratio if beta else torch.zeros_like(log_ratio)


def cumulative_process_reward(process_rewards: Tensor, mask: Tensor) -> Tensor:
    """Running sum of the process rewards along each response (Eq. 11); 0 where masked.

    [B, T] -> [B, T]. The paper's R~_t also contains V(s_0), which depends on the prompt alone, so
    that it cancels among siblings.
    """
    running = torch.where(mask, at_least_fp32(process_rewards), 0.0).cumsum(1)
    return torch.where(mask, running, 0.0)


def masked_step_advantage(cpr: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """MSA (Eq. 12): at each step, the CPR minus its mean over the siblings still alive there.

    [B, T] -> [B, T]. The mean includes the response itself; nothing is divided by a std. So at
    every step the living siblings' MSA sum to 0, and a response that is the only one still alive
    has MSA exactly 0: a long tail is driven by the outcome term alone. Raises ValueError if
    group_size < 2 or does not divide B.

    >>> cpr = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.1, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> masked_step_advantage(cpr, mask, group_size=2)  # means over the living: .15, .2, .6
    tensor([[-0.0500,  0.1000,  0.0000],
            [ 0.0500, -0.1000,  0.0000]])
    """
    alive = by_group(mask, group_size)
    grouped = torch.where(alive, by_group(at_least_fp32(cpr), group_size), 0.0)
    step_mean = grouped.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    return torch.where(alive, grouped - step_mean, 0.0).flatten(0, 1)


def estimator(*needs: str, additive: bool = True):
    """Mark `name_advantage(batch, algo)` as an estimator, and say beside it what it needs of a run.

    needs: words of docs/estimators.md, which says what each brings. `additive`: whether it is the
    sum of an outcome term and a step term, which are then logged apart.

    What all estimators have in common is done here once: no gradient flows into an advantage,
    masked tokens have none, and a batch that lacks what is needed is a ValueError.
    """

    def mark(formula):
        @functools.wraps(formula)
        @torch.no_grad()
        def estimate(batch: "Batch", algo: AlgorithmConfig) -> Tensor:
            by_group(batch.mask, batch.group_size)  # raises where siblings do not stand together
            if "reference" in needs and batch.ref_log_probs is None and algo.beta == 0:
                # beta 0 loads no reference
                batch = replace(batch, ref_log_probs=batch.policy_log_probs)
            for need, name in NEEDED_FIELDS.items():
                if need in needs and getattr(batch, name) is None:
                    raise ValueError(f"{formula.__name__} needs {name} in its batch")
            return torch.where(batch.mask, formula(batch, algo), 0.0)

        estimate.needs = frozenset(needs)
        estimate.additive = additive
        return estimate

    return mark


@estimator()
def grpo_advantage(batch, algo):
    """GRPO (arXiv 2402.03300): every token of a response gets its outcome advantage."""
    return outcome_advantage(batch.rewards, batch.group_size)[:, None]


@estimator("reference")
def spro_advantage(batch, algo):
    """SPRO (Eq. 13): the outcome advantage plus the Masked Step Advantage.

    With beta 0, and as long as policy and reference are equal, this is GRPO, bitwise. A group of
    equal rewards has outcome 0 but, unlike in GRPO, still a step term: whether such groups are used
    is `keep_accuracy`'s choice.
    """
    process_rewards = process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta)
    cpr = cumulative_process_reward(process_rewards, batch.mask)
    msa = masked_step_advantage(cpr, batch.mask, batch.group_size)
    return outcome_advantage(batch.rewards, batch.group_size)[:, None] + msa


# The part of the table that stands here; baselines.ADVANTAGES is the whole.
ADVANTAGES = {"spro": spro_advantage, "grpo": grpo_advantage}


# --- advantage -> loss (Eq. 14) -------------------------------------------------------------------


def token_weights(
    mask: Tensor,
    num_responses: int,
    num_tokens: int,
    mode: str,
    max_tokens: int | None = None,
) -> Tensor:
    """Each token's weight in the loss, fixed before the first backward of an optimizer step.

    mask [B, T] -> float64 [B, T], 0 where masked. `num_responses` and `num_tokens` count the whole
    optimizer step, over all its micro-batches and ranks; that is why no split of the step can
    change its gradient.

    - "seq-mean-token-mean": 1 / (num_responses x own length), the paper's Eq. 14
    - "token-mean": 1 / num_tokens (DAPO, arXiv 2503.14476)
    - "seq-mean-token-sum-norm": 1 / (num_responses x max_tokens) (Dr. GRPO, arXiv 2503.20783),
      where max_tokens is the sampler's limit, never the padded length T

    The first two sum to 1 over the step, the last does not.

    Raises ValueError on an unknown mode, or if the last mode lacks max_tokens.
    """
    if mode == "seq-mean-token-mean":
        denominator = num_responses * mask.sum(1, keepdim=True).clamp(min=1)
    elif mode == "token-mean":
        denominator = torch.tensor(num_tokens, device=mask.device)
    elif mode == "seq-mean-token-sum-norm":
        if not max_tokens:
            raise ValueError(
                "seq-mean-token-sum-norm divides by max_tokens: pass the sampler's max_new_tokens"
            )
        denominator = torch.tensor(num_responses * max_tokens, device=mask.device)
    else:
        raise ValueError(f"unknown loss weights {mode!r}: choose one of {', '.join(WEIGHT_MODES)}")
    return torch.where(mask, 1.0 / denominator.double(), 0.0)


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Eq. 14) as a weighted sum over tokens; all arguments [B, T].

    `min(ratio x A, clip(ratio, 1 - clip_low, 1 + clip_high) x A)`, negated; tokens of weight 0 are
    removed whatever they hold. Returns the scalar loss and detached stats, each a weighted sum too,
    so that all of them add over micro-batches and ranks: `kl/old` (k1, old minus new),
    `clip_fraction` (tokens where the clip binds). `ratio/max` alone is reduced by max. Gradients
    flow through `log_probs` only.
    """
    live = weights != 0
    log_probs = at_least_fp32(log_probs)
    old_log_probs = at_least_fp32(old_log_probs.detach())
    advantages = torch.where(live, at_least_fp32(advantages.detach()), 0.0)
    weights = weights.to(log_probs.dtype)

    log_ratio = torch.where(live, log_probs - old_log_probs, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    with torch.no_grad():
        stats = {
            "kl/old": -(weights * log_ratio).sum(),
            "clip_fraction": (weights * (clipped < unclipped)).sum(),
            "ratio/max": torch.cat([ratio[live], ratio.new_zeros(1)]).max(),  # of no tokens: 0
        }
    return loss, stats


# --- around the equations -------------------------------------------------------------------------


def keep_groups(rewards: Tensor, group_size: int, low: float, high: float) -> Tensor:
    """Which groups are learned from: those whose mean reward lies in [low, high].

    rewards [B] -> bool [B / G]. A NaN reward (a response without a verdict) drops its group. [0, 1]
    keeps all groups, the all-right and all-wrong ones too, where SPRO still has a step term; [0.01,
    0.99] drops just those (of 0/1 rewards, with G up to 100); PRIME (arXiv 2502.01456) uses [0.2,
    0.8].
    """
    mean = by_group(rewards.double(), group_size).mean(1)
    return (mean > low - 1e-6) & (mean < high + 1e-6)  # fp32 rewards: 0.8 is 0.80000001


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, name: str) -> Tensor:
    """The estimator `name` of each token's KL to the reference; 0 where masked. [B, T] -> [B, T].

    On-policy k1 and k3 have the KL as their mean, k3 with less variance. Gradients flow through
    `log_probs`, and theirs are another matter: in expectation k1's is 0, k2's the KL's, and k3's
    that of KL(reference || policy).
    """
    log_ratio = at_least_fp32(log_probs) - at_least_fp32(ref_log_probs.detach())
    return KL_ESTIMATORS[name](torch.where(mask, log_ratio, 0.0))


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision and integers raised to fp32; fp32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def by_group(x: Tensor, group_size: int) -> Tensor:
    """View [B, ...] as [B / G, G, ...]; siblings are adjacent rows. ValueError if it cannot be."""
    if group_size < 2:
        raise ValueError(
            f"group_size is {group_size}: a response is compared with its siblings, so at least 2"
        )
    if x.shape[0] % group_size:
        raise ValueError(f"{x.shape[0]} responses do not divide into groups of {group_size}")
    return x.reshape(-1 if len(x) else 0, group_size, *x.shape[1:])


def centred_rewards(rewards: Tensor, group_size: int) -> Tensor:
    """`r - mean` inside each group, [B] -> [B / G, G]; exactly 0 in a group of equal rewards.

    By a test for equality: in floating point seven rewards of 0.7 do not have mean 0.7, and
    dividing by their tiny std would blow that up.
    """
    grouped = by_group(at_least_fp32(rewards), group_size)
    all_equal = (grouped == grouped[:, :1]).all(1, keepdim=True)
    return torch.where(all_equal, 0.0, grouped - grouped.mean(1, keepdim=True))


# --- the object that flows through a step ---------------------------------------------------------

ROW, STEP, POSITION = "row", "step", "position"


def per_row():
    """A field with one entry per response: a tensor [B, ...] or a tuple of B things."""
    return field(default=None, metadata={"layout": ROW})


def per_step():
    """A field with one entry per response token: a tensor [B, T]."""
    return field(default=None, metadata={"layout": STEP})


def per_position():
    """A field with one entry per token of prompt and response: a tensor [B, P + T]."""
    return field(default=None, metadata={"layout": POSITION})


@dataclass(frozen=True)
class Batch:
    """What one RL step learns from: B responses behind their prompts, siblings adjacent.

    It begins as the sampler's rollout, and each stage of train.py adds its fields with `replace`;
    none writes into what an earlier one made. A field that no stage has set is None. A new field is
    one line here, which says how it is laid out, and one assignment where it is made: every
    operation below goes over all fields.

    All masks come from lengths, never from comparing ids with pad or eos: a prompt may hold either.
    """

    # 1. Sample: prompts are padded on the left, responses (the last T positions) on the right.
    tokens: Tensor | None = per_position()  # ids
    attention_mask: Tensor | None = per_position()  # bool, false on padding
    mask: Tensor | None = per_step()  # bool, true from the first token through the stop token
    sampler_log_probs: Tensor | None = per_step()  # as the sampler drew them; 0 where masked
    sampler_entropy: Tensor | None = per_step()  # nats, of what it drew from; 0 where masked
    truncated: Tensor | None = per_row()  # bool, the response never stopped
    texts: tuple[str, ...] | None = per_row()  # the responses, without special tokens
    problems: tuple | None = per_row()  # what was asked
    paths: tuple | None = per_row()  # of edges of a tree: (prompt's place, sibling, sibling, ...)
    # 2. Reward
    verdicts: tuple | None = per_row()  # of the grader; one that failed has no score
    rewards: Tensor | None = per_row()  # scores as shaped for training; NaN without a verdict
    # 3. Log-probs
    log_probs: Tensor | None = per_step()  # of the policy that sampled: the loss's "old" ones
    entropy: Tensor | None = per_step()  # nats
    ref_log_probs: Tensor | None = per_step()  # None without a reference
    fine_log_probs: Tensor | None = per_step()  # log_probs in ref_log_probs' type, if it is finer
    # 4. Advantage
    process_log_probs: Tensor | None = per_step()  # of a PRM; None: the policy is its own
    step_ids: Tensor | None = per_step()  # numbers each response's steps from 0
    step_labels: Tensor | None = per_step()  # 1 in a right step, 0 in the first wrong one, else -1
    trace_ids: Tensor | None = per_step()  # numbers the steps that have these labels; -1 in none
    luck: Tensor | None = per_row()  # uniform in [0, 1)
    values_before: Tensor | None = per_step()  # chance of success at the start of a token's step
    values_after: Tensor | None = per_step()  # ... and at its end
    answer_log_probs: Tensor | None = per_step()  # of the policy, behind a prompt with the answer
    critic_values: Tensor | None = per_step()  # a critic's, of the state before each token
    advantages: Tensor | None = per_step()
    # 5. Update
    weights: Tensor | None = per_step()  # float64, in the optimizer step; 0 where masked

    group_size: int = 1  # G

    def __len__(self) -> int:
        """B"""
        return len(self.mask)

    @property
    def policy_log_probs(self) -> Tensor:
        """The policy's, as far as they are compared with the reference's. [B, T]"""
        return self.log_probs if self.fine_log_probs is None else self.fine_log_probs

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.tokens.shape[1] - self.mask.shape[1]

    def layouts(self) -> dict[str, str]:
        """name -> layout of every field that is set and has rows."""
        rowed = [f for f in fields(self) if "layout" in f.metadata]
        return {f.name: f.metadata["layout"] for f in rowed if getattr(self, f.name) is not None}

    def select(self, rows: Tensor) -> "Batch":
        """The given rows in the given order, padding as it is."""
        chosen = {}
        for name in self.layouts():
            values = getattr(self, name)
            if isinstance(values, Tensor):
                chosen[name] = values[rows]
            else:
                chosen[name] = tuple(values[i] for i in rows.tolist())
        return replace(self, **chosen)

    def trim(self) -> "Batch":
        """Without columns that are padding in every row; one of each kind stays in any case."""
        P = self.prompt_length
        longest_prompt = max(1, *self.attention_mask[:, :P].sum(1).tolist(), 0)
        longest_response = max(1, *self.mask.sum(1).tolist(), 0)
        if longest_prompt == P and longest_response == self.mask.shape[1]:
            return self
        columns = {
            STEP: slice(0, longest_response),
            POSITION: slice(P - longest_prompt, P + longest_response),
        }
        trimmed = {}
        for name, layout in self.layouts().items():
            if layout in columns:
                trimmed[name] = getattr(self, name)[:, columns[layout]]
        return replace(self, **trimmed)

    def to(self, device: torch.device) -> "Batch":
        """The same with all its tensors on `device`."""
        tensors = {name: getattr(self, name) for name in self.layouts()}
        moved = {name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @staticmethod
    def cat(parts: list["Batch"]) -> "Batch":
        """The parts' rows one after the other, padded to the longest prompt and response."""
        layouts = parts[0].layouts()
        if any(part.layouts() != layouts for part in parts):
            raise ValueError("the parts do not have the same fields: a stage has run on some alone")
        P = max(part.prompt_length for part in parts)
        T = max(part.mask.shape[1] for part in parts)

        def padded(part: "Batch", name: str) -> Tensor:
            left = P - part.prompt_length if layouts[name] == POSITION else 0
            return F.pad(getattr(part, name), (left, T - part.mask.shape[1]))

        joined = {}
        for name, layout in layouts.items():
            if layout != ROW:
                joined[name] = torch.cat([padded(part, name) for part in parts])
            elif isinstance(getattr(parts[0], name), Tensor):
                joined[name] = torch.cat([getattr(part, name) for part in parts])
            else:
                joined[name] = tuple(value for part in parts for value in getattr(part, name))
        return replace(parts[0], **joined)

    @staticmethod
    def from_texts(prompts: list[list[int]], texts: list[str], tokenizer: Any) -> "Batch":
        """Given responses, each ended by the stop token, behind their prompts' ids."""
        as_text = {"add_special_tokens": False, "split_special_tokens": True}
        ids = tokenizer(list(texts), **as_text).input_ids
        responses = [[*response, tokenizer.eos_token_id] for response in ids]
        P, T = max(map(len, prompts)), max(map(len, responses))
        tokens = torch.zeros(len(texts), P + T, dtype=torch.long)
        attention_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            here = slice(P - len(prompt), P + len(response))
            tokens[i, here] = torch.tensor(prompt + response)
            attention_mask[i, here] = True
        return Batch(
            tokens=tokens,
            attention_mask=attention_mask,
            mask=attention_mask[:, P:],
            truncated=torch.zeros(len(texts), dtype=torch.bool),
            texts=tuple(texts),
        )
