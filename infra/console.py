"""What a run prints: what is about to run, a line per step, and what has come of it."""

from pathlib import Path

import torch

from infra.processes import world_size
from infra.sharding import compute_dtype, will_pack

PROGRESS = (  # label, metric, width, digits
    ("reward", "reward/mean", 5, 3),
    ("kept", "groups/kept", 4, 2),
    ("length", "response_length/mean", 6, 1),
    ("entropy", "entropy", 6, 4),
    ("kl/ref", "kl/ref", 7, 4),
    ("|step|", "advantage/step_abs", 6, 4),
    ("clip", "clip_fraction", 6, 4),
    ("grad", "grad_norm", 5, 2),
)


def progress_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One aligned line of the metrics that tell whether a run is well."""
    cells = [f"step {step:>{len(str(steps))}}/{steps}"]
    for label, key, width, digits in PROGRESS:
        cells.append(
            f"{label} {metrics[key]:{width}.{digits}f}"
            if key in metrics
            else f"{label} {'-':>{width}}"
        )
    return "  ".join([*cells, f"{metrics['time/step']:.2f} s"])


def programs_line(problems: list, grader) -> str:
    """What programs run in, where any is graded; else nothing."""
    graded = "code" in {grader.name_for(problem) for problem in problems}
    return f"; programs run in {grader.isolation()}" if graded else ""


def values_line(config) -> tuple[str, ...]:
    """How often prefixes are continued, where the estimator needs their values."""
    if not config.needs_values:
        return ()
    tokens = config.algorithm.step_tokens
    continuations = config.values.continuations
    budget = continuations * config.train.prompts_per_step * config.samples_per_prompt
    if tokens:
        step = f"stretch of {tokens} tokens"
        stretches = -(-config.sample.max_new_tokens // tokens)
        at_most = f"{budget * stretches:,} a step"
    else:
        step = "line"
        at_most = f"{budget:,} a step for every line that responses have"
    return (
        f"values   {continuations} continuations from the beginning of every {step} "
        f"of every response that is learned from: at most {at_most}",
    )


def tree_line(config) -> tuple[str, ...]:
    """What a sample is, where that is an edge of a tree."""
    G, tree, limit = config.sample.group_size, config.tree, config.sample.max_new_tokens
    if config.samples_per_prompt == G:
        return ()
    return (
        f"tree     a sample is an edge: {G} children a node, depth {tree.depth}, at most "
        f"{tree.edge_tokens} tokens an edge, the last to token {limit}; there are fewer where "
        "texts end early",
    )


def describe(
    config, policy, problems: list, n_held_out: int, grader, generation: dict, batch_tokens: int
) -> str:
    """What is about to run, with the batch arithmetic and the `generation` settings that are
    really in force. `batch_tokens`: decoded together.
    """
    t, s, a = config.train, config.sample, config.algorithm
    tokenizer = policy.tokenizer
    samples = config.samples_per_prompt
    responses = t.prompts_per_step * samples
    beta = f", beta {a.beta:g}" if config.reads_reference else ""
    kl = f", kl_coef {a.kl_coef:g} ({a.kl_estimator})" if a.kl_coef else ""
    chat = (
        "chat template" if config.data.chat_template and tokenizer.chat_template else "plain text"
    )
    system = "with a" if any(problem.system for problem in problems) else "no"
    stops = " ".join(tokenizer.convert_ids_to_tokens(policy.stop_ids))
    strings = "".join(f" or at {string!r}" for string in s.stop)
    dtype = compute_dtype(config.model, policy.device.type == "cuda")
    attention = policy.config._attn_implementation
    if will_pack(policy, config.model, policy.device):
        attention = "varlen"  # for what is scored; for what is sampled as before
    # Then logits are no head over states, as fast/ takes them
    plain = "" if policy.has_plain_head is not False else "; log-probs by the plain path"
    refills = f", at most {t.max_refills} refill(s)" if t.max_refills else ""
    lines = (
        f"{a.advantage}{beta}{kl}, seed {config.seed}, into {config.run_dir}",
        f"model    {config.model.path or 'from scratch'}: {policy.config.model_type}, "
        f"{policy.num_parameters():,} "
        f"parameters; {world_size()} x {policy.device.type}, {torch.get_num_threads()} threads "
        "each",
        f"data     {config.data.source}: {len(problems)} training prompts, {n_held_out} held out "
        "for evaluation"
        f"{programs_line(problems, grader)}",
        f"prompts  {chat}, {system} system prompt; stop {stops} {policy.stop_ids}{strings}, pad "
        f"{policy.pad_id}; {str(dtype).removeprefix('torch.')}, {attention} attention{plain}",
        f"step     {t.prompts_per_step} prompts x {samples} samples = {responses} responses = "
        f"{responses // t.mini_batch_size} optimizer steps in micro-batches of at most "
        f"{t.micro_batch_tokens} tokens; "
        f"{t.epochs} epoch(s); keeping groups of accuracy {list(a.keep_accuracy)}{refills}",
        f"sampler  softmax at temperature {s.temperature:g} over the whole vocabulary; at most "
        f"{batch_tokens:,} tokens decoded together; generate: {generation}",
        *values_line(config),
        *tree_line(config),
    )
    return "\n".join(lines)


def summary(config, folder: Path, state: dict, seconds: float) -> str:
    """The end of a run: what it began with, what it reached, and where to look."""
    first, last = state["before"], state["after"] or state["before"]
    rows = (
        (f"held-out accuracy, T={config.sample.temperature:g}", "eval/accuracy", ".3f"),
        ("held-out accuracy, greedy", "eval/accuracy_greedy", ".3f"),
        ("response length, tokens", "eval/response_length", ".1f"),
    )
    lines = [f"\ndone in {seconds:.0f} s: {folder}"]
    for name, key, form in rows:
        lines.append(f"  {name:<26} {first[key]:{form}} -> {last[key]:{form}}")
    lines.append(
        f"  {'best accuracy':<26} {state['best']['eval/accuracy']:.3f} at step "
        f"{state['best']['step']}"
    )
    lines.append(
        f"the model is in {folder / 'model'}; look at what it writes: python sample.py {folder}"
    )
    return "\n".join(lines)
