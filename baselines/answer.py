"""What the policy says of its responses once it is told the answer: OPPO's second pass.

The answer stands in front of the prompt, in the words of `tasks.ANSWERS`. This takes a model that
understands them: one that has only ever seen its task's own prompts does not.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F

import model
import sample
import tasks
from baselines.against_reference import finer_type
from data import encoded, require_known
from infra.errors import BadInput, enough_memory
from model import Policy
from spro import Batch
from tasks.problem import Problem


def told(problems: Iterable[Problem], source: str) -> list[Problem]:
    """The problems as they are asked, with each one's answer in front."""
    words = tasks.ANSWERS.get(source, tasks.TELL_ANSWER)
    return [
        replace(p, prompt=words.replace("{answer}", str(p.reference)) + p.prompt) for p in problems
    ]


def require_answers(config, policy: Policy, problems: list[Problem]) -> None:
    """Raises BadInput where a problem's answer is no text or number, or makes its prompt too long
    or unreadable. Encodes all prompts once more; all ranks call it.
    """
    needing = f"algorithm.advantage={config.algorithm.advantage}"
    for problem in problems:
        if not isinstance(problem.reference, str | int | float):
            raise BadInput(
                f"{needing} tells the model the answer, but the reference of "
                f"{problem.place or repr(problem.prompt[:80])} is a "
                f"{type(problem.reference).__name__}, no text or number: choose another estimator "
                "or data.source"
            )
    # The context is all that limits them, for they are only read
    limit = sample.context_left(policy, config.sample.max_new_tokens, sys.maxsize)
    known = told(problems, config.data.source)
    prompts = encoded(known, policy.tokenizer, config.data.chat_template)
    for problem, (_, ids) in zip(problems, prompts, strict=True):
        if ids is None or len(ids) > limit:
            why = "cannot be read as text" if ids is None else f"has {len(ids)} tokens of {limit}"
            raise BadInput(
                f"{needing}: with its answer in front, the prompt of "
                f"{problem.place or repr(problem.prompt[:80])} {why}: take it out, or lower "
                "data.max_prompt_tokens or sample.max_new_tokens"
            )
        require_known(ids, policy.known_ids, policy.tokenizer)


def behind(batch: Batch, prompts: list[list[int]]) -> Batch:
    """The batch's responses behind other prompts' ids, one for each row."""
    longest = max(map(len, prompts), default=0)
    tokens = F.pad(batch.tokens[:, batch.prompt_length :], (longest, 0))
    attention_mask = F.pad(batch.mask, (longest, 0))
    for i, prompt in enumerate(prompts):
        here = slice(longest - len(prompt), longest)
        tokens[i, here] = torch.tensor(prompt, dtype=tokens.dtype)
        attention_mask[i, here] = True
    return replace(batch, tokens=tokens, attention_mask=attention_mask)


@enough_memory("log_probs")
def scored(policy: Policy, batch: Batch, config) -> Batch:
    """The batch with the policy's log-probs of its responses behind prompts that tell the answer,
    and with those behind the usual prompts in the same type, where `log_probs` are in a coarser
    one.
    """
    asked = told(batch.problems[:: batch.group_size], config.data.source)
    prompts = encoded(asked, policy.tokenizer, config.data.chat_template)
    rows = [ids.tolist() for _, ids in prompts for _ in range(batch.group_size)]
    how = (config.sample.temperature, config.train.micro_batch_tokens, finer_type(config, policy))
    fine_log_probs = batch.fine_log_probs
    if how[-1] and fine_log_probs is None:
        fine_log_probs, _ = model.batch_log_probs(policy, batch, *how)
    answer_log_probs, _ = model.batch_log_probs(policy, behind(batch, rows), *how)
    return replace(batch, answer_log_probs=answer_log_probs, fine_log_probs=fine_log_probs)
