"""Whether the fast log-probs are those of a model's own logits.

They take the head over the states of the base model for these. Some models scale or cap what the
head gives, or feed it something else.
"""

import torch

from fast.log_probs import log_probs_of_tokens

TOLERANCE = 1e-3  # nats; rounding in fp32 stays below a tenth of it


@torch.no_grad()
def agrees(policy, plain_log_probs_of_tokens) -> bool:
    """Whether both ways give the same, by two rows of four tokens, one of them padded.

    That the logits are the head's output is asked to the last bit: a cap is not to be overlooked
    because the logits of a fresh model are small.
    """
    head = policy.model.get_output_embeddings()
    if head is None:
        return False
    tokens = torch.linspace(0, policy.vocab_size - 1, 8).long().view(2, 4)
    mask = torch.tensor([[True] * 4, [False] + [True] * 3])
    made: list = []
    hooks = [
        module.register_forward_hook(lambda _, __, output: made.append(output))
        for module in (head, policy.model)
    ]
    config, attention = policy.model.config, policy.model.config._attn_implementation
    if "flash" in attention:  # runs on a GPU alone, and the weights are in host memory yet
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
    return torch.allclose(fast, plain, rtol=0, atol=TOLERANCE)
