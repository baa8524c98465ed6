"""Is there more where training went? Accuracy of softmax(z + gamma (z - z_ref)), from a run's policy and reference.

    python -m tools.extrapolate RUN ... [--gammas=-0.5,0,0.5,1,2] [--limit N]

RUN is a run folder, or a folder with runs in it.

z are the policy's logits and z_ref its reference's: gamma 0 is the policy, -1 the reference, and above 0 decoding goes
on along log pi - log pi_ref, the direction of the process reward. Held-out prompts of the run, at its own temperature
and greedily, each with the same luck for every gamma. 95 % intervals are Wilson's, over prompts. (After "On the
direction of RLVR updates", arXiv 2603.22117.)
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import math
from dataclasses import replace
from pathlib import Path

import torch
from eval import evaluate
from infra.errors import BadInput, Parser
from infra.processes import command_line
from model import Policy
from rewards.benchmark_metrics import wilson_interval
from sample import batch_tokens, held_out_prompts
from transformers import LogitsProcessor, LogitsProcessorList

from tools import report
from tools.credit_models import RunModels

GAMMAS = "-0.5,0,0.25,0.5,1,2"


class Extrapolate(LogitsProcessor):
    """Moves the policy's logits [b, V] away from those that the reference gives for the same text, gamma times."""

    def __init__(self, reference: Policy, attention_mask: torch.Tensor, gamma: float):
        self.reference, self.attention_mask, self.gamma = reference, attention_mask, gamma
        self.cache = None  # of the reference, over the tokens that it has read

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        ref_logits = self.reference_logits(input_ids)
        return logits + self.gamma * (logits - ref_logits.to(logits))

    @torch.no_grad()
    def reference_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        width = input_ids.shape[1]
        written = width - self.attention_mask.shape[1]  # rows that have ended get padding, which nobody reads
        mask = torch.nn.functional.pad(self.attention_mask, (0, written), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        unread = input_ids if self.cache is None else input_ids[:, -1:]
        out = self.reference.model(
            input_ids=unread,
            attention_mask=mask,
            position_ids=positions[:, -unread.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **{self.reference.cache_argument: self.cache},
        )
        self.cache = getattr(out, self.reference.cache_argument)
        return out.logits[:, -1]


class ExtrapolatedModel:
    """Generates as the policy does, but from extrapolated logits."""

    def __init__(self, policy: Policy, reference: Policy, gamma: float):
        self.policy, self.reference, self.gamma = policy, reference, gamma

    def generate(self, ids, *, attention_mask, logits_processor, **how) -> torch.Tensor:
        moved = Extrapolate(self.reference, attention_mask, self.gamma)
        chosen = LogitsProcessorList([moved, *logits_processor])  # first move, then choose
        return self.policy.model.generate(ids, attention_mask=attention_mask, logits_processor=chosen, **how)


def evaluated(models: RunModels, gammas: list[float], limit: int | None) -> list[dict[str, float]]:
    """The `eval/*` metrics of a finished run's held-out prompts for each gamma.

    Raises BadInput where the run has no trained model, or fewer prompts than the limit.
    """
    config = models.config
    if not (models.run / "model").is_dir():
        raise BadInput(f"{models.run}/model is not there: the run's training has not ended")
    policy = models.loaded(models.run / "model")
    problems, prompts = held_out_prompts(policy, config.sample, config.data, config.seed, models.grader)
    n = min(config.eval.prompts, len(prompts)) if limit is None else limit
    if not 1 <= n <= len(prompts):
        raise BadInput(f"--limit {n}: the run has {len(prompts)} held-out prompts")
    # Half of what fits, for the reference keeps as much; and in the loop that takes other logits processors
    longest = max(map(len, prompts[:n])) + config.sample.max_new_tokens
    together = batch_tokens(policy, config.sample, longest) // 2
    how = replace(config.sample, decoding="plain", batch_tokens=max(together, longest))
    rows = []
    for gamma in gammas:
        policy.twin = [ExtrapolatedModel(policy, models.reference, gamma)]
        rows.append(evaluate(policy, problems[:n], prompts[:n], how, models.grader, config.seed))
    return rows


def main() -> None:
    parser = Parser(prog="-m tools.extrapolate", description="Accuracy beyond the policy, along its log-ratio.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run, or a folder with runs")
    parser.add_argument("--gammas", default=GAMMAS, help=f"as --gammas=A,B,... ({GAMMAS})")
    parser.add_argument("--limit", type=int, help="held-out prompts of a run (its eval.prompts)")
    args = parser.parse_args()
    try:
        gammas = [float(text) for text in args.gammas.split(",")]
    except ValueError:
        raise BadInput(f"--gammas={args.gammas}: give numbers with commas between them") from None
    if not all(map(math.isfinite, gammas)):
        raise BadInput(f"--gammas={args.gammas}: give finite numbers")
    runs = report.find_runs(args.runs)
    if not runs:
        raise BadInput(report.no_run_in(args.runs))
    print(f"| run | T | n | {' | '.join(f'{gamma:g}' for gamma in gammas)} |")
    print("| --- " * (3 + len(gammas)) + "|")
    for run in runs:
        models = RunModels(run)
        rows = evaluated(models, gammas, args.limit)
        for temperature, key in ((models.config.sample.temperature, "eval/accuracy"), (0, "eval/accuracy_greedy")):
            cells = [with_interval(row[key], row["eval/n"]) for row in rows]
            what = f"{run.parent.name}/{run.name} | {temperature:g} | {rows[0]['eval/n']}"
            print(f"| {what} | {' | '.join(cells)} |", flush=True)


def with_interval(accuracy: float, n: int) -> str:
    low, high = wilson_interval(round(accuracy * n), n)
    return f"{accuracy:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    command_line(main)
