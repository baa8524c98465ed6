"""SPRO (arXiv 2507.01551): reward -> advantage -> loss, as pure functions of tensors.

Shapes: `B` = responses = prompts x G, the G siblings of a prompt in adjacent rows; `T` = padded response length.
`mask` [B, T] is bool and true from a response's first token through its stop token.

    the paper                                      here                               shape
    r_o(y_i), outcome reward                       rewards                            [B]
    log pi_theta_old(y_t | x, y_<t)                old_log_probs (log_probs in 1-4)   [B, T]
    log pi_ref(y_t | x, y_<t)                      ref_log_probs                      [B, T]
    r(s_t, a_t) = beta log(pi_theta / pi_ref)      process_reward                     [B, T]
    R~_t = sum_{j<=t} r(s_j, a_j)        (Eq. 11)  cumulative_process_reward ("cpr")  [B, T]
    MSA_{i,t} = R~_{i,t} - masked mean   (Eq. 12)  masked_step_advantage              [B, T]
    A_{i,t} = outcome_i + MSA_{i,t}      (Eq. 13)  spro_advantage                     [B, T]
    1 / (N |y_i|), the mean of means     (Eq. 14)  token_weights                      [B, T]
    PPO-clip surrogate                   (Eq. 14)  policy_loss                        scalar

Every function leaves its inputs as they are and computes in fp32 at least (half precision is raised, float64 stays
float64). Masked entries are removed with `where`: multiplying by a zero mask would let NaN and inf through.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class AlgorithmConfig:
    advantage: str = "spro"  # the estimator: a name in ADVANTAGES
    beta: float = 0.05  # weight of the log-ratio to the reference; 0 is GRPO and loads no reference
    clip_low: float = 0.2  # PPO clip: the ratio stays above 1 - clip_low
    clip_high: float = 0.2  # ... and below 1 + clip_high
    loss_weights: str = "seq-mean-token-mean"  # how tokens are averaged: a mode of token_weights
    keep_accuracy: tuple[float, float] = (0.0, 1.0)  # update on groups whose mean verdict lies in [low, high]
    kl_coef: float = 0.0  # adds kl_coef x KL(policy || reference) per token to the loss; negative: a bonus
    kl_estimator: str = "exact"  # exact: over the whole vocabulary; of the sampled token: a name in KL_ESTIMATORS
    line_end: str = "\n"  # text that ends a line, the step of spro_line; ";" in the chain task

    def __post_init__(self):
        low, high = self.keep_accuracy
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"advantage={self.advantage!r} is not known: choose one of {', '.join(ADVANTAGES)}")
        if self.loss_weights not in WEIGHT_MODES:
            raise ValueError(f"loss_weights={self.loss_weights!r}: choose one of {', '.join(WEIGHT_MODES)}")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError("clip_low must lie in (0, 1) and clip_high above 0")
        if not 0 <= low <= high <= 1:
            raise ValueError(f"keep_accuracy=[{low}, {high}] must hold 0 <= low <= high <= 1")
        if not math.isfinite(self.kl_coef):
            raise ValueError(f"kl_coef={self.kl_coef} is not a finite number")
        if self.kl_estimator not in ("exact", *KL_ESTIMATORS):
            raise ValueError(f"kl_estimator={self.kl_estimator!r}: choose one of exact, {', '.join(KL_ESTIMATORS)}")
        if not self.line_end:
            raise ValueError("line_end is empty: give the text that ends a line")


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _by_group(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """View [B, ...] as [B / G, G, ...]; siblings are adjacent rows."""
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a response is compared with its siblings, so at least 2")
    if x.shape[0] % group_size:
        raise ValueError(f"{x.shape[0]} responses do not divide into groups of {group_size}")
    return x.reshape(-1 if len(x) else 0, group_size, *x.shape[1:])


def _centred(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """`r - mean` inside each group, [B] -> [B / G, G]; exactly 0 in a group of equal rewards, by a test for equality.

    In floating point seven rewards of 0.7 do not have mean 0.7, and dividing by their tiny std would blow that up.
    """
    grouped = _by_group(_at_least_fp32(rewards), group_size)
    all_equal = (grouped == grouped[:, :1]).all(1, keepdim=True)
    return torch.where(all_equal, 0.0, grouped - grouped.mean(1, keepdim=True))


def outcome_advantage(rewards: torch.Tensor, group_size: int, eps: float = 1e-6) -> torch.Tensor:
    """GRPO's outcome term, the first half of Eq. 13: `(r - mean) / (std + eps)` inside each group.

    rewards [B] -> [B]. The std is the unbiased one (ddof 1). A group of equal rewards gives exactly 0.
    Raises ValueError if group_size < 2 or does not divide B.
    """
    centred = _centred(rewards, group_size)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + eps)).flatten()


def process_reward(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, beta: float) -> torch.Tensor:
    """What the policy itself says each token was worth: `beta * (log pi_theta - log pi_ref)` (Eq. 6, Prop. 1).

    [B, T], [B, T] -> [B, T]. beta 0 gives 0 even where the log-ratio is not finite.
    """
    log_ratio = _at_least_fp32(log_probs) - _at_least_fp32(ref_log_probs)
    return beta * log_ratio if beta else torch.zeros_like(log_ratio)


def cumulative_process_reward(process_rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Running sum of the process rewards along each response (Eq. 11); 0 where masked. [B, T] -> [B, T].

    The paper's R~_t also contains V(s_0), which depends on the prompt alone, so that it cancels among siblings.
    """
    running = torch.where(mask, _at_least_fp32(process_rewards), 0.0).cumsum(1)
    return torch.where(mask, running, 0.0)


def masked_step_advantage(cpr: torch.Tensor, mask: torch.Tensor, group_size: int) -> torch.Tensor:
    """MSA (Eq. 12): at each step, the CPR minus its mean over the siblings still alive there. [B, T] -> [B, T].

    The mean includes the response itself; nothing is divided by a std. So at every step the living siblings' MSA sum
    to 0, and a response that is the only one still alive has MSA exactly 0: a long tail is driven by the outcome
    term alone. Raises ValueError if group_size < 2 or does not divide B.

    >>> cpr = torch.tensor([[0.1, 0.3, 0.6], [0.2, 0.1, 0.0]])
    >>> mask = torch.tensor([[True, True, True], [True, True, False]])
    >>> masked_step_advantage(cpr, mask, group_size=2)  # means over the living: .15, .2, .6
    tensor([[-0.0500,  0.1000,  0.0000],
            [ 0.0500, -0.1000,  0.0000]])
    """
    alive = _by_group(mask, group_size)
    grouped = torch.where(alive, _by_group(_at_least_fp32(cpr), group_size), 0.0)
    step_mean = grouped.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    return torch.where(alive, grouped - step_mean, 0.0).flatten(0, 1)


def _step_term(process_rewards, mask, group_size, step_ids):
    """MSA of the CPR, with a token or (step_ids given) a longer segment as the step. [B, T] -> [B, T]."""
    if step_ids is None:
        return masked_step_advantage(cumulative_process_reward(process_rewards, mask), mask, group_size)
    # One column per step: a segment's reward is the sum over its tokens, and all its tokens share its advantage.
    ids = torch.where(mask, step_ids, 0)
    shape = (len(mask), int(ids.max()) + 1 if ids.numel() else 1)
    rewards = torch.where(mask, process_rewards, 0.0)
    segment_rewards = rewards.new_zeros(shape).scatter_add(1, ids, rewards)
    segment_mask = torch.zeros(shape, dtype=torch.int, device=mask.device).scatter_add(1, ids, mask.int()) > 0
    segment_msa = _step_term(segment_rewards, segment_mask, group_size, None)
    return torch.where(mask, segment_msa.gather(1, ids), 0.0)


def grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """GRPO (arXiv 2402.03300): every token of a response gets its outcome advantage; detached, 0 where masked.

    Takes what `spro_advantage` takes and reads rewards [B] and mask [B, T] alone. -> [B, T].
    """
    outcome = outcome_advantage(rewards.detach(), group_size)
    return torch.where(mask, outcome[:, None], 0.0)


def spro_advantage(
    rewards: torch.Tensor,
    log_probs: torch.Tensor,
    ref_log_probs: torch.Tensor,
    mask: torch.Tensor,
    group_size: int,
    beta: float,
    step_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """SPRO (Eq. 13): the outcome advantage plus the Masked Step Advantage; detached, 0 where masked.

    rewards [B]; log_probs, ref_log_probs, mask [B, T] -> [B, T]. `log_probs` are those of the policy that sampled.
    `step_ids` [B, T] numbers each response's steps from 0 where a step is longer than a token (a line, say): log-ratios
    are then summed per step, and every token gets its step's advantage. None: each token is its own step.

    With beta 0, and as long as policy and reference are equal, this is GRPO, bitwise. A group of equal rewards has
    outcome 0 but, unlike in GRPO, still a step term: whether such groups are used is `keep_accuracy`'s explicit choice.
    Raises ValueError if group_size < 2 or does not divide B.
    """
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    process_rewards = process_reward(log_probs.detach(), ref_log_probs.detach(), beta)
    return outcome + _step_term(process_rewards, mask, group_size, step_ids)


def keep_groups(rewards: torch.Tensor, group_size: int, low: float, high: float) -> torch.Tensor:
    """Which groups are learned from: those whose mean reward lies in [low, high]. rewards [B] -> bool [B / G].

    A NaN reward (a response without a verdict) drops its group. [0, 1] keeps all groups, the all-right and all-wrong
    ones too, where SPRO still has a step term; [0.01, 0.99] drops just those (of 0/1 rewards, with G up to 100); PRIME
    (arXiv 2502.01456) uses [0.2, 0.8].
    """
    mean = _by_group(rewards.double(), group_size).mean(1)
    return (mean > low - 1e-6) & (mean < high + 1e-6)  # fp32 rewards: 0.8 is 0.80000001


# --- baselines and ablations: each takes what `spro_advantage` takes; detached, 0 where masked -------------------


def dr_grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """Dr. GRPO (arXiv 2503.20783): `r - mean`, no std. Its loss is loss_weights=seq-mean-token-sum-norm."""
    return torch.where(mask, _centred(rewards.detach(), group_size).flatten()[:, None], 0.0)


def rloo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): r minus the mean of the *other* siblings, which is `(r - mean) x G / (G - 1)`."""
    centred = dr_grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    return centred * (group_size / (group_size - 1))


def raft_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """RAFT++ (arXiv 2504.11343): `max(r, 0)`, right answers alone, no baseline; ratio and clip as everywhere here."""
    positive = _by_group(_at_least_fp32(rewards.detach()), group_size).clamp(min=0)
    return torch.where(mask, positive.flatten()[:, None], 0.0)


def reinforce_rej_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """Reinforce-Rej (arXiv 2504.11343): the reward itself, groups of equal rewards rejected.

    `2 r - 1`, so that wrong answers push: with 0/1 rewards the raw r would be RAFT++ on fewer groups.
    """
    mixed = _centred(rewards.detach(), group_size).any(1).repeat_interleave(group_size)
    signed = torch.where(mixed, 2 * _at_least_fp32(rewards.detach()) - 1, 0.0)
    return torch.where(mask, signed[:, None], 0.0)


RANK_PENALTY = 0.25  # beta_rank of the unlikeliness reward, as its authors' code has it


def unlikeliness_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """The unlikeliness reward (arXiv 2506.02355): GRPO on `r x (1 - RANK_PENALTY x rank / G)`.

    rank 0 .. G - 1 orders siblings by the mean log-prob of their tokens, the likeliest last: of the right answers the
    one that the policy finds likeliest earns least, so that rare ones are not unlearned.
    """
    total = torch.where(mask, _at_least_fp32(log_probs.detach()), 0.0).sum(1)
    likelihood = _by_group(total / mask.sum(1).clamp(min=1), group_size)
    rank = likelihood.argsort(stable=True).argsort().flatten()
    r = _at_least_fp32(rewards)
    return grpo_advantage(r - r * rank * (RANK_PENALTY / group_size), log_probs, ref_log_probs, mask, group_size, beta)


def spro_loo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """SPRO with the mean over the *other* living siblings: MSA x n / (n - 1), n alive; 0 for one that lives alone."""
    msa = msa_only_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    n = _by_group(mask, group_size).sum(1).repeat_interleave(group_size, 0)
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    return outcome + msa * n / (n - 1).clamp(min=1)


def spro_local_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """SPRO without the sum of Eq. 11: MSA of the current token's process reward alone."""
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    now = process_reward(log_probs.detach(), ref_log_probs.detach(), beta)
    return outcome + masked_step_advantage(now, mask, group_size)


def spro_history_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """What spro_local leaves out: MSA of the sum over the *earlier* tokens, j < t, a baseline in expectation."""
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    cpr = cumulative_process_reward(process_reward(log_probs.detach(), ref_log_probs.detach(), beta), mask)
    return outcome + masked_step_advantage(torch.nn.functional.pad(cpr, (1, -1)), mask, group_size)


def spro_pooled_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """SPRO with PRIME's grouping (arXiv 2502.01456): the CPR minus its mean over all steps of all siblings."""
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    cpr = cumulative_process_reward(process_reward(log_probs.detach(), ref_log_probs.detach(), beta), mask)
    tokens = _by_group(mask, group_size).sum((1, 2)).clamp(min=1)
    mean = _by_group(cpr, group_size).sum((1, 2)) / tokens
    return outcome + torch.where(mask, cpr - mean.repeat_interleave(group_size)[:, None], 0.0)


def spro_line_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """SPRO with a line as the step: `step_ids` [B, T] numbers each response's lines. Raises ValueError without them."""
    if step_ids is None:
        raise ValueError("spro_line needs step_ids: the number of each token's line")
    return spro_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids)


def msa_only_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """The step term without the outcome: Eq. 12 alone, which never sees a reward."""
    return _step_term(process_reward(log_probs.detach(), ref_log_probs.detach(), beta), mask, group_size, None)


def spro_posterior_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """SPRO with the step term of right answers (r > 0.5) alone, after Posterior-GRPO (arXiv 2508.05170).

    The mean is still over all living siblings: right answers are compared with the wrong ones too.
    """
    outcome = grpo_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    msa = msa_only_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta)
    return outcome + torch.where(rewards.detach()[:, None] > 0.5, msa, 0.0)


def _to_go(rewards: torch.Tensor) -> torch.Tensor:
    """Reverse running sum along each response: the sum over s >= t. [B, T] -> [B, T]."""
    return rewards.flip(1).cumsum(1).flip(1)


def _mean_of_others(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Leave-one-out mean over the siblings. [B] -> [B]."""
    grouped = _by_group(x, group_size)
    return ((grouped.sum(1, keepdim=True) - grouped) / (group_size - 1)).flatten()


def _process_rewards_and_means(log_probs, ref_log_probs, mask, beta):
    """Process rewards, 0 where masked [B, T], and their mean over each response's tokens [B]."""
    process_rewards = torch.where(mask, process_reward(log_probs.detach(), ref_log_probs.detach(), beta), 0.0)
    return process_rewards, process_rewards.sum(1) / mask.sum(1).clamp(min=1)


def prime_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """PRIME (arXiv 2502.01456, Eq. 5, gamma 1); detached, 0 where masked. rewards [B]; others [B, T] -> [B, T].

    `log_probs` are the PRM's (prime.py). Outcome and process reward are each compared with the mean of the siblings,
    itself left out: r_i - mean_j r_j, plus the sum over s >= t of (process reward - mean_j of length-averaged process
    rewards). A token is the step, whatever `step_ids` says.

    >>> log_ratio = torch.tensor([[0.1, 0.3], [0.4, 0.0]])  # mean over tokens .2, .4; the second has one token
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> prime_advantage(torch.tensor([1.0, 0.0]), log_ratio, torch.zeros(2, 2), mask, group_size=2, beta=1.0)
    tensor([[ 0.6000,  0.9000],
            [-0.8000,  0.0000]])
    """
    rewards = _at_least_fp32(rewards.detach())
    outcome = rewards - _mean_of_others(rewards, group_size)
    process_rewards, means = _process_rewards_and_means(log_probs, ref_log_probs, mask, beta)
    to_go = _to_go(torch.where(mask, process_rewards - _mean_of_others(means, group_size)[:, None], 0.0))
    return torch.where(mask, outcome[:, None] + to_go, 0.0)


def prime_released_advantage(rewards, log_probs, ref_log_probs, mask, group_size, beta, step_ids=None) -> torch.Tensor:
    """PRIME as its released code computes it, which is not Eq. 5; arguments and result as for `prime_advantage`.

    The log-ratios, without beta, are divided by the largest |sum over s >= t| of the batch + 1e-6; the leave-one-out is
    K/(K-1) r - sum_j mean_j / (K-1), which is Eq. 5's plus (r - own mean) / (K-1); outcome and process returns add
    one to one, and the sum is whitened over all tokens of the batch: (A - mean) / sqrt(unbiased variance + 1e-8).
    """
    log_ratio, means = _process_rewards_and_means(log_probs, ref_log_probs, mask, 1.0)
    largest = torch.cat([_to_go(log_ratio).abs()[mask], log_ratio.new_zeros(1)]).max() + 1e-6  # of no tokens: 0
    K, rewards = group_size, _at_least_fp32(rewards.detach())
    baseline = _by_group(means, K).sum(1).repeat_interleave(K) / (K - 1)
    process_returns = _to_go(torch.where(mask, K / (K - 1) * log_ratio - baseline[:, None], 0.0)) / largest
    returns = (rewards - _mean_of_others(rewards, K))[:, None] + process_returns
    live = returns[mask]
    variance = (live - live.mean()).square().sum() / max(1, len(live) - 1)
    return torch.where(mask, (returns - live.mean()) * (variance + 1e-8).rsqrt(), 0.0)


ADVANTAGES = {
    "spro": spro_advantage,
    "grpo": grpo_advantage,
    "dr_grpo": dr_grpo_advantage,
    "rloo": rloo_advantage,
    "raft": raft_advantage,
    "reinforce_rej": reinforce_rej_advantage,
    "unlikeliness": unlikeliness_advantage,
    "spro_loo": spro_loo_advantage,
    "spro_local": spro_local_advantage,
    "spro_history": spro_history_advantage,
    "spro_pooled": spro_pooled_advantage,
    "spro_line": spro_line_advantage,
    "spro_posterior": spro_posterior_advantage,
    "msa_only": msa_only_advantage,
    "prime": prime_advantage,
    "prime_released": prime_released_advantage,
}
# Estimators that never read the reference: a run with one of them loads none.
OUTCOME_ONLY = frozenset({"grpo", "dr_grpo", "rloo", "raft", "reinforce_rej", "unlikeliness"})
BY_LINE = frozenset({"spro_line"})  # estimators that need step_ids
NOT_ADDITIVE = frozenset({"prime_released"})  # estimators that are no sum of an outcome and a step term
NEEDS_PRM = frozenset({"prime", "prime_released"})  # estimators whose log_probs are those of PRIME's PRM (prime.py)

WEIGHT_MODES = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")


def token_weights(
    mask: torch.Tensor, num_responses: int, num_tokens: int, mode: str, max_tokens: int | None = None
) -> torch.Tensor:
    """Each token's weight in the loss, fixed before the first backward of an optimizer step.

    mask [B, T] -> float64 [B, T], 0 where masked. `num_responses` and `num_tokens` count the whole optimizer step, over
    all its micro-batches and ranks; that is why no split of the step can change its gradient.

    - "seq-mean-token-mean": 1 / (num_responses x own length), the paper's Eq. 14. Sums to 1 over the step.
    - "token-mean": 1 / num_tokens (DAPO, arXiv 2503.14476). Sums to 1 over the step.
    - "seq-mean-token-sum-norm": 1 / (num_responses x max_tokens) (Dr. GRPO, arXiv 2503.20783), where max_tokens is the
      sampler's limit, never the padded length T. Does not sum to 1.

    Raises ValueError on an unknown mode, or if the last mode lacks max_tokens.
    """
    if mode == "seq-mean-token-mean":
        denominator = num_responses * mask.sum(1, keepdim=True).clamp(min=1)
    elif mode == "token-mean":
        denominator = torch.tensor(num_tokens, device=mask.device)
    elif mode == "seq-mean-token-sum-norm":
        if not max_tokens:
            raise ValueError("seq-mean-token-sum-norm divides by max_tokens: pass the sampler's max_new_tokens")
        denominator = torch.tensor(num_responses * max_tokens, device=mask.device)
    else:
        raise ValueError(f"unknown loss weights {mode!r}: choose one of {', '.join(WEIGHT_MODES)}")
    return torch.where(mask, 1.0 / denominator.double(), 0.0)


MAX_LOG_RATIO = 20.0  # one runaway token must not overflow: the gradient of inf x 0 would be NaN for the whole step


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate (Eq. 14) as a weighted sum over tokens; all arguments [B, T].

    `min(ratio x A, clip(ratio, 1 - clip_low, 1 + clip_high) x A)`, negated; tokens of weight 0 are removed whatever
    they hold. Returns the scalar loss and detached stats, each a weighted sum too, so that all of them add over
    micro-batches and ranks: `kl/old` (k1, old minus new), `clip_fraction` (tokens where the clip binds). `ratio/max`
    alone is reduced by max. Gradients flow through `log_probs` only.
    """
    live = weights != 0
    new, old, A = (_at_least_fp32(x) for x in (log_probs, old_log_probs.detach(), advantages.detach()))
    weights, A = weights.to(new.dtype), torch.where(live, A, 0.0)
    log_ratio = torch.where(live, new - old, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped, clipped = ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    with torch.no_grad():
        stats = {
            "kl/old": -(weights * log_ratio).sum(),
            "clip_fraction": (weights * (clipped < unclipped)).sum(),
            "ratio/max": torch.cat([ratio[live], ratio.new_zeros(1)]).max(),  # of no tokens: 0
        }
    return loss, stats


KL_ESTIMATORS = {  # of KL(policy || reference), from d = log policy - log reference of the sampled token
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: (-d).clamp(max=MAX_LOG_RATIO).exp() - 1 + d,
}


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    """The estimator `name` of each token's KL to the reference; 0 where masked. [B, T] -> [B, T].

    On-policy k1 and k3 have the KL as their mean, k3 with less variance. Gradients flow through `log_probs`, and theirs
    are another matter: in expectation k1's is 0, k2's the KL's, and k3's that of KL(reference || policy).
    """
    d = _at_least_fp32(log_probs) - _at_least_fp32(ref_log_probs.detach())
    return KL_ESTIMATORS[name](torch.where(mask, d, 0.0))
