"""Whether the fast log-probs are those of a model's own logits.

They take the head over the states of the base model for these. Some models scale or cap what the
head gives, or feed it something else. And whether rows without padding give the states of rows
with it, which not every model's attention need do.
"""

import torch

from fast import varlen
from fast.log_probs import log_probs_of_tokens
from fast.shared_prompts import states_of_packed_rows, states_of_rows
from infra.errors import BadInput
from infra.processes import all_reduce, print0

# Nats. Rounding in fp32 stays below a tenth of it, in bfloat16 (sharded, on a GPU) below a fifth.
TOLERANCE, IN_HALF = 1e-3, 0.5
# Of states, relative to their size; two rows that see each other differ by about 1
OF_STATES, OF_STATES_IN_HALF = 1e-3, 0.1


def two_rows(policy) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and attention mask [2, 4] to try a model with; the second row is padded."""
    tokens = torch.linspace(0, policy.vocab_size - 1, 8, device=policy.device).long().view(2, 4)
    mask = torch.tensor([[True] * 4, [False] + [True] * 3], device=policy.device)
    return tokens, mask


@torch.no_grad()
def agrees(policy, plain_log_probs_of_tokens) -> bool:
    """Whether both ways give the same, by two rows of four tokens, one of them padded.

    That the logits are the head's output is asked to the last bit: a cap is not to be overlooked
    because the logits of a fresh model are small.
    """
    head = policy.model.get_output_embeddings()
    if head is None:
        return False
    tokens, mask = two_rows(policy)
    made: list = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: made.append(output))
        for module in (head, policy.model)
    ]
    config, attention = policy.model.config, policy.model.config._attn_implementation
    # Which runs on a GPU alone, and the weights are in host memory yet
    if "flash" in attention and policy.device.type == "cpu":
        config._attn_implementation = "eager"
    try:
        plain = plain_log_probs_of_tokens(policy, tokens, mask, 2, 1.0)[0]
        *of_head, output = made
        if len(of_head) != 1 or not of_head[0].equal(output.logits):
            return False
        fast = log_probs_of_tokens(policy, tokens, mask, 2, 1.0)[0]
    except Exception:  # a model that one of them cannot run: each fails in its own way
        return False
    finally:
        config._attn_implementation = attention
        for hook in hooks:
            hook.remove()
    tolerance = IN_HALF if output.logits.dtype.itemsize == 2 else TOLERANCE
    return torch.allclose(fast, plain, rtol=0, atol=tolerance)


@torch.no_grad()
def pack_rows(policy, tokens, attention_mask) -> None:
    """Set the policy's attention to "varlen", if with it the model gives these rows, end to end in
    one, the states that it gives them one above the other; or leave it, and say so.

    All ranks call it. Raises BadInput where the model cannot run it at all.
    """
    config, attention = policy.model.config, policy.model.config._attn_implementation
    varlen.register()
    config._attn_implementation = varlen.NAME
    rows = tokens, attention_mask, 2
    try:
        packed, padded = states_of_packed_rows(policy, *rows)[0], states_of_rows(policy, *rows)[0]
    except (RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"model.attention=auto: this model cannot score rows without padding ({reason}); set "
            f"model.attention={attention}"
        ) from error
    tolerance = OF_STATES_IN_HALF if packed.dtype in varlen.HALF else OF_STATES
    alike = torch.tensor(int((packed - padded).norm() <= tolerance * padded.norm()))
    if not all_reduce(alike, torch.distributed.ReduceOp.MIN):
        config._attn_implementation = attention
        print0(f"note: rows are padded, {attention} attention: the model mixes packed ones up")
