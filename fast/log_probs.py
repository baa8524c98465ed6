"""Log-probs of response tokens without their logits: [B, T, V] never exists, in neither direction.

The head is applied to response tokens alone, a chunk of logits at a time, and the backward pass
makes each chunk's logits again: four matrix products instead of three.

On a GPU, half precision is multiplied into fp32 without rounding in between, and what is done to a
chunk of logits is compiled into as few passes over them as can be.
"""

import functools

import torch
import torch.nn.functional as F

from fast.shared_prompts import response_states
from infra.processes import print0

# Never more logits than this are held at a time: 64 MiB of them in fp32 on a CPU, where the chunk
# itself and two or three of its size count. On a GPU more, for each chunk reads the whole head and
# adds to the head's whole gradient.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}
HALF = (torch.bfloat16, torch.float16)


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
        log_probs, entropy, normaliser, *kl = (
            hidden.new_empty(len(hidden), dtype=dtype) for _ in range(4 if reference else 3)
        )
        values_of = in_few_passes(values_of_chunk, hidden.device.type)
        ours = hidden, weight, bias
        for here, logits, theirs in _chunks(ours, reference, temperature, vocab_size):
            values = values_of(logits, targets[here], theirs)
            for whole, part in zip((log_probs, entropy, normaliser, *kl), values, strict=True):
                whole[here] = part
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, *kl, *reference)
        ctx.temperature = temperature
        ctx.vocab_size = vocab_size
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy, *kl

    @staticmethod
    def backward(ctx, grad, _, grad_kl=None):
        hidden, weight, bias, targets, normaliser, *rest = ctx.saved_tensors
        kl, *reference = rest or [None]
        temperature, vocab_size = ctx.temperature, ctx.vocab_size
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=grad.dtype)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        gradient_of = in_few_passes(gradient_of_chunk, hidden.device.type)
        ours = hidden, weight, bias
        for here, logits, theirs in _chunks(ours, reference, temperature, vocab_size):
            scale = grad[here, None] / temperature
            of_kl = ()
            if reference:
                of_kl = (theirs, kl[here, None], grad_kl[here, None] / temperature)
            of_logits = gradient_of(
                logits, normaliser[here, None], targets[here, None], scale, hidden.dtype, *of_kl
            )
            torch.mm(of_logits, weight[:vocab_size], out=of_hidden[here])
            _add_product(of_weight[:vocab_size], of_logits.t(), hidden[here])
            if bias is not None:
                of_bias[:vocab_size] += of_logits.sum(0)
        of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, *[None] * (3 + len(reference))


# --- what is done to a chunk of logits ------------------------------------------------------------


def values_of_chunk(logits, targets, theirs=None) -> tuple:
    """logits [n, V], targets [n] -> log-prob of each target, entropy, normaliser [n]; and, given
    the reference's logits, the exact KL.
    """
    largest = logits.amax(-1)
    logits = logits - largest[:, None]
    p = logits.exp()  # not yet normalised
    total = p.sum(-1)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - total.log()
    entropy = total.log() - torch.linalg.vecdot(p, logits) / total
    values = (log_probs, entropy, largest + total.log())
    if theirs is None:
        return values
    gap = logits - theirs.log_softmax(-1)
    return *values, torch.linalg.vecdot(p, gap) / total - total.log()


def gradient_of_chunk(
    logits, normaliser, targets, scale, dtype, theirs=None, kl=None, kl_scale=None
) -> torch.Tensor:
    """What the loss sends to a chunk of logits [n, V], in `dtype`. Everything else is [n, 1].

    scale and kl_scale: what it sends to the target's log-prob and to the KL, over temperature.
    """
    log_p = logits - normaliser
    pull = -scale  # d log-prob = one-hot - softmax
    if theirs is not None:  # d KL = softmax x (log-ratio - KL)
        pull = (log_p - theirs.log_softmax(-1)).sub_(kl).mul_(kl_scale).sub_(scale)
    of_logits = log_p.exp_().mul_(pull)
    # The one-hot, in fp32: at a sure token it all but cancels with the softmax
    of_target = of_logits.gather(-1, targets) + scale
    return of_logits.to(dtype).scatter_(-1, targets, of_target.to(dtype))


@functools.cache
def in_few_passes(body, device_type: str):
    """`body` for a chunk of logits: as written on a CPU, compiled on a GPU, where every operation
    of it would be a pass through memory.
    """
    if device_type != "cuda":
        return body
    ways = [torch.compile(body, dynamic=True)]

    def compiled(*args):
        # Of a view the compiler also knows what it is a part of: other sizes of that, another
        # graph, which takes seconds. Those here are a number a row
        args = [x.clone() if torch.is_tensor(x) and x._is_view() else x for x in args]
        try:
            return ways[-1](*args)
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or none that can
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print0(f"note: log-probs take more passes, torch.compile does not work here: {reason}")
            ways.append(body)
            return body(*args)

    return compiled


# --- products with the head -----------------------------------------------------------------------


def logits_at_once(device_type: str) -> int:
    """How many logits a chunk has at most."""
    return LOGITS_AT_ONCE["cuda" if device_type == "cuda" else "cpu"]


def _chunks(ours, reference, temperature, vocab_size):
    """Yields (slice of rows, their logits, the reference's logits or None).

    ours, reference: hidden [N, H], weight [V, H] and bias [V] or None; `reference` may be empty.
    """
    hidden, *head = ours
    N, most = len(hidden), max(1, logits_at_once(hidden.device.type) // vocab_size)
    parts = -(-N // most)
    for i in range(parts):  # of one size: a last one of a single row would be compiled for anew
        here = slice(N * i // parts, N * (i + 1) // parts)
        theirs = None
        if reference:
            states, *their_head = reference
            theirs = _logits(states[here], *their_head, temperature, vocab_size)
        yield here, _logits(hidden[here], *head, temperature, vocab_size), theirs


def _logits(hidden, weight, bias, temperature, vocab_size) -> torch.Tensor:
    """softmax's argument [n, V], fp32 at least, over the words that there are."""
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    if _multiplies_into_fp32(hidden):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits.div_(temperature)


def _add_product(total, a, b) -> None:
    """total += a @ b, of which `total` is fp32 at least."""
    if _multiplies_into_fp32(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _multiplies_into_fp32(x) -> bool:
    """Whether torch has a product of such matrices that is fp32: on a GPU alone."""
    return x.is_cuda and x.dtype in HALF
