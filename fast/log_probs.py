"""Log-probs of response tokens without their logits: [B, T, V] never exists, in neither direction.

The head is applied to response tokens alone, LOGITS_AT_ONCE logits at a time, and the backward pass
makes each chunk's logits again: four matrix products instead of three.
"""

import torch
import torch.nn.functional as F

from fast.shared_prompts import response_states

LOGITS_AT_ONCE = 2**25  # never more than this many logits are held: 128 MiB in fp32


def states_for_kl(policy, tokens, attention_mask, response_length) -> tuple:
    """What `log_probs_of_tokens` needs of a reference for the exact KL: states, their places,
    and the head.
    """
    head = policy.model.get_output_embeddings()
    return *response_states(policy, tokens, attention_mask, response_length), head.weight, head.bias


def log_probs_of_tokens(
    policy, tokens, attention_mask, response_length, temperature, reference=None
) -> tuple:
    """(log_probs, entropy, KL or None) of the last `response_length` tokens [B, T]; see
    model.token_log_probs.
    """
    hidden, rows, steps = response_states(policy, tokens, attention_mask, response_length)
    head = policy.model.get_output_embeddings()
    theirs = ()
    if reference is not None:  # whose pass may have gone through the tokens in another order
        states, their_rows, their_steps, *their_head = reference
        place = torch.empty(len(tokens), response_length, dtype=torch.long, device=tokens.device)
        place[their_rows, their_steps] = torch.arange(len(states), device=tokens.device)
        theirs = (states[place[rows, steps]], *their_head)
    targets = tokens[:, -response_length:][rows, steps]
    values = _TokenLogProbs.apply(
        hidden, head.weight, head.bias, targets, temperature, policy.vocab_size, *theirs
    )
    nothing = values[0].new_zeros(len(tokens), response_length)
    log_probs, entropy, *kl = (nothing.index_put((rows, steps), value) for value in values)
    return log_probs, entropy, kl[0] if kl else None


class _TokenLogProbs(torch.autograd.Function):
    """Log-prob and entropy of each target under softmax(head(hidden) / temperature), a chunk of
    logits at a time.

    Given a reference's states and head too, also the exact KL(policy || reference) at each target's
    place. Gradients of the head are summed over chunks in fp32, or many chunks in bfloat16 would
    round them away.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, vocab_size, *reference):
        """hidden [N, H], weight [V, H], bias [V] or None, targets [N] -> log-probs, entropy, KL
        [N], fp32 at least.

        `reference`: its hidden, weight and bias, without gradient. Without it there is no third
        result.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        normaliser = torch.empty_like(log_probs)
        kl = torch.empty_like(log_probs) if reference else None
        theirs = _logits_by_chunk(*reference, temperature, vocab_size, dtype) if reference else None
        for here, logits in _logits_by_chunk(hidden, weight, bias, temperature, vocab_size, dtype):
            largest = logits.amax(-1)
            p = logits.sub_(largest[:, None]).exp()  # not yet normalised
            total = p.sum(-1)
            log_probs[here] = logits.gather(-1, targets[here, None])[:, 0] - total.log()
            entropy[here] = total.log() - torch.linalg.vecdot(p, logits) / total
            normaliser[here] = largest + total.log()
            if reference:
                gap = logits.sub_(next(theirs)[1].log_softmax(-1))
                kl[here] = torch.linalg.vecdot(p, gap) / total - total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, kl, *reference)
        ctx.temperature = temperature
        ctx.vocab_size = vocab_size
        ctx.mark_non_differentiable(entropy)
        return (log_probs, entropy, kl) if reference else (log_probs, entropy)

    @staticmethod
    def backward(ctx, grad, _, grad_kl=None):
        hidden, weight, bias, targets, normaliser, kl, *reference = ctx.saved_tensors
        temperature, vocab_size = ctx.temperature, ctx.vocab_size
        theirs = (
            _logits_by_chunk(*reference, temperature, vocab_size, grad.dtype) if reference else None
        )
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=grad.dtype)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for here, logits in _logits_by_chunk(
            hidden, weight, bias, temperature, vocab_size, grad.dtype
        ):
            scale = grad[here, None] / temperature
            pull = -scale  # d log-prob = one-hot - softmax
            logits = logits.sub_(normaliser[here, None])
            if reference:  # d KL = softmax x (log-ratio - KL)
                log_ratio = logits - next(theirs)[1].log_softmax(-1)
                pull = (
                    log_ratio.sub_(kl[here, None])
                    .mul_(grad_kl[here, None] / temperature)
                    .sub_(scale)
                )
            of_logits = logits.exp_().mul_(pull)
            of_logits = of_logits.scatter_add_(-1, targets[here, None], scale).to(hidden.dtype)
            torch.mm(of_logits, weight[:vocab_size], out=of_hidden[here])
            if of_weight.dtype == hidden.dtype:
                of_weight[:vocab_size].addmm_(of_logits.t(), hidden[here])
            else:
                of_weight[:vocab_size] += of_logits.t() @ hidden[here]
            if bias is not None:
                of_bias[:vocab_size] += of_logits.sum(0)
        of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, *[None] * (3 + len(reference))


def _logits_by_chunk(hidden, weight, bias, temperature, vocab_size, dtype):
    """Yields (slice of rows, their logits), at most LOGITS_AT_ONCE of them; the receiver may
    overwrite them.
    """
    chunk = max(1, LOGITS_AT_ONCE // vocab_size)
    bias = None if bias is None else bias[:vocab_size]
    for i in range(0, len(hidden), chunk):
        here = slice(i, min(i + chunk, len(hidden)))
        logits = F.linear(hidden[here], weight[:vocab_size], bias).to(dtype)
        yield here, logits if temperature == 1 else logits.div_(temperature)
