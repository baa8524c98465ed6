"""PPO (arXiv 1707.06347) with a critic: a second model that says what the state before each token
is worth, and generalized advantage estimation (GAE, arXiv 1506.02438) from what it says.

The critic is a copy of the model that policy and reference start from, with a value head beside it
and an AdamW of its own. It learns, by squared error, what each state of a response was worth in the
end: the response's reward, for gamma is 1 and nothing is earned before the last token. GRPO and
SPRO have siblings in its place.

EGAE (T-PPO, arXiv 2506.15050) is GAE where the window ends before the response does.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import register_fsdp_forward_method

from baselines.beside import Pass, load_beside, one_pass, step_metrics
from baselines.prime import whitened
from infra.config import Block, knob
from infra.metrics import timed
from infra.processes import all_reduce
from infra.sharding import reshard
from model import Policy, micro_batches
from spro import AlgorithmConfig, Batch, at_least_fp32, estimator, token_weights


@dataclass
class CriticConfig(Block):
    learning_rate: float = knob(
        5e-6,
        "of the critic's own AdamW, constant; this is Open-Reasoner-Zero's, small models need more",
        above=0,
    )
    update: str = knob(
        "after",
        "after: a mini-batch is valued before its critic step (one pass); before: learn, then "
        "value all",
        choices=("after", "before"),
    )


# --- the advantages -------------------------------------------------------------------------------


def gae(values: torch.Tensor, ends: torch.Tensor, mask: torch.Tensor, lam: float) -> torch.Tensor:
    """Generalized advantage estimation, gamma 1: sum over k of lam^k delta_{t+k}, where

        delta_t = V(s_{t+1}) - V(s_t),   and at a response's last token   ends - V(s_t).

    values [B, T], of the state before each token; `ends` [B, 1] or [B, T], read at last tokens:
    what comes of the response, its reward or the value of where it was cut. -> [B, T], 0 where
    masked.

    >>> values, mask = torch.tensor([[0.5, 0.25, 0.75]]), torch.tensor([[True, True, True]])
    >>> gae(values, torch.tensor([[1.0]]), mask, lam=1.0)  # the reward minus each value
    tensor([[0.5000, 0.7500, 0.2500]])
    >>> gae(values, torch.tensor([[1.0]]), mask, lam=0.0)  # what each token changed
    tensor([[-0.2500,  0.5000,  0.2500]])
    """
    goes_on = F.pad(mask[:, 1:], (0, 1))  # a live token comes after this one
    after = torch.where(goes_on, F.pad(values[:, 1:], (0, 1)), ends)
    deltas = torch.where(mask, after - values, 0.0)
    advantages = torch.zeros_like(deltas)
    to_go = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        to_go = deltas[:, t] + lam * to_go
        advantages[:, t] = to_go
    return advantages


@estimator("critic", additive=False)
def ppo_advantage(batch: Batch, algo: AlgorithmConfig):
    """PPO: GAE with the reward at the last token, whitened over all tokens of the step, as verl and
    Open-Reasoner-Zero (arXiv 2503.24290) do it. With lambda 1, the default and theirs, it is
    `r - V(s_t)` before it is whitened.
    """
    values, rewards = at_least_fp32(batch.critic_values), at_least_fp32(batch.rewards)
    return whitened(gae(values, rewards[:, None], batch.mask, algo.gae_lambda), batch.mask)


@estimator("critic", "truncated", additive=False)
def egae_advantage(batch: Batch, algo: AlgorithmConfig):
    """T-PPO's EGAE: `ppo`, but a response that was cut has earned nothing yet. It is worth what the
    critic says of its last state, V(s_l) ~ V(s_{l-1}), so the last token's delta is 0.

    Where no response was cut, this is `ppo`.
    """
    values, rewards = at_least_fp32(batch.critic_values), at_least_fp32(batch.rewards)
    ends = torch.where(batch.truncated[:, None], values, rewards[:, None])
    return whitened(gae(values, ends, batch.mask, algo.gae_lambda), batch.mask)


# --- the critic -----------------------------------------------------------------------------------


class Critic(Policy):
    """A model with a value head beside it: a vector, whose product with the state before a token is
    V(s_t). No bias, as in the heads of transformers' classifiers.

    The head begins at 0: then V is 0 everywhere, and the first advantages are the rewards, with
    nothing random in them. From a random head V would be noise as large as rewards.
    """

    def __init__(self, policy: Policy):
        super().__init__(policy.model, policy.tokenizer)
        self.unread = policy.unread
        width = self.model.get_input_embeddings().weight.shape[1]
        self.value_head = torch.nn.Parameter(torch.zeros(width, device=self.model.device))

    def values(self, tokens, attention_mask, response_length) -> torch.Tensor:
        """V(s_t) of the state before each response token, [B, T], fp32 at least; 0 at padding."""
        self._compare_once()
        states_of = self.fast.response_states if self.fast else plain_states
        with self._training_mode():
            states, rows, steps = states_of(self, tokens, attention_mask, response_length)
        values = at_least_fp32(states) @ at_least_fp32(self.value_head)
        nothing = values.new_zeros(len(tokens), response_length)
        return nothing.index_put((rows, steps), values)


def plain_states(policy: Policy, tokens, attention_mask, response_length) -> tuple:
    """(last hidden states [N, H] before the N response tokens, their rows, their steps): of whole
    rows, by what transformers gives of any model.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    states = policy.model(
        tokens,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=1,
        output_hidden_states=True,
    ).hidden_states[-1]
    rows, steps = attention_mask[:, -response_length:].nonzero(as_tuple=True)
    return states[:, -response_length - 1 : -1][rows, steps], rows, steps


def load_critic(path, config, device: torch.device) -> tuple[Critic, torch.optim.Optimizer]:
    """(critic, its optimizer), sharded, from the model that policy and reference start from."""
    critic, optimizer = load_beside(path, config, device, config.critic.learning_rate, Critic)
    register_fsdp_forward_method(critic, "values")
    with torch.no_grad():  # where each rank read its share, nothing was read for the head
        critic.value_head.zero_()
    return critic, optimizer


def values_of(critic: Critic, batch: Batch) -> torch.Tensor:
    """V(s_t) of a Batch on the critic's device, [B, T]."""
    return critic.values(batch.tokens, batch.attention_mask, batch.mask.shape[1])


@torch.no_grad()
def batch_values(critic: Critic, batch: Batch, max_tokens: int) -> torch.Tensor:
    """The same of a whole Batch, [B, T] on CPU; the ranks share the rows."""
    values = torch.zeros(batch.mask.shape)
    for rows, part in micro_batches(critic, batch, max_tokens):
        values[rows, : part.mask.shape[1]] = values_of(critic, part)[: len(rows)].cpu().float()
    reshard(critic)
    return all_reduce(values)


def squared_error(critic: Critic, ended: torch.Tensor, chosen: torch.Tensor, mini: Batch) -> Pass:
    """The critic's pass over the mini-batch of the rows `chosen`, with its loss: (V(s_t) -
    reward)^2, a mean over the tokens of those of its responses that have `ended` ([B], of all
    rows).

    The reward is the Monte-Carlo return of each of a response's states. There is no clip around
    older values, nor a half in front.
    """
    live = mini.mask & ended[chosen][:, None]
    weights = token_weights(live, len(mini), int(live.sum()), "token-mean")

    def run_pass(rows, part):
        values = values_of(critic, part)
        weight = torch.zeros_like(values)
        weight[: len(rows)] = weights[rows, : values.shape[1]].to(weight)
        errors = values - part.rewards[:, None].to(values)
        return values, (weight * errors.square()).sum()

    return run_pass


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float | None:
    """1 - Var(return - value) / Var(return): 1 where the critic knows all, 0 where it knows no more
    than a constant does. [N], [N]. None where all returns are equal.
    """
    values, returns = values.double(), returns.double()
    if not (returns != returns[:1]).any():
        return None
    return (1 - (returns - values).var() / returns.var()).item()


def value_and_learn(
    critic: Critic,
    optimizer,
    config,
    batch: Batch,
    ended: torch.Tensor,
    mini_batches: list[torch.Tensor],
) -> tuple[torch.Tensor, dict[str, float]]:
    """V(s_t) of a step's responses [B, T], for the advantage, while the critic takes a step on each
    mini-batch.

    ended [B]: whose reward is known. `mini_batches` are lists of rows, together all rows once.
    Returns metrics too; the explained variance is that of the values before the respective step.
    Raises RunStopped where every step was refused.
    """
    metrics: dict[str, float] = {}
    pass_on = partial(squared_error, critic, ended)
    with timed(metrics, "time/critic"):
        values, steps = one_pass(
            critic, optimizer, config, batch, mini_batches, pass_on, config.train.max_grad_norm
        )
        live = batch.mask & ended[:, None]
        explained = explained_variance(values[live], batch.rewards[:, None].expand_as(values)[live])
        if config.critic.update == "before":
            values = batch_values(critic, batch, config.train.micro_batch_tokens)
    metrics |= step_metrics("critic", steps, "critic.learning_rate")
    if explained is not None:
        metrics["critic/explained_variance"] = explained
    return values, metrics
