"""What the dumps of a run lack, from its models.

The reference's log-probs, those of the policy that is told the answer, verified steps, and Monte-Carlo values.
"""

import json
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import data
import model
import torch
from baselines import answer, needs, steps, traces, values
from baselines.supervised import start_path
from infra.checkpoints import load_policy
from infra.config import all_keys, build_config, saved_config
from infra.errors import BadInput
from infra.rng import Draw
from model import Policy
from rewards import Grader, Verdict
from sample import load_to_sample
from spro import Batch
from tasks import TRACES
from tasks.problem import Problem
from train import Config

from tools import inspector


class RunModels:
    """The models of one run, and the problems that it asked."""

    def __init__(self, run: Path):
        """Raises BadInput where there is no run, or its config cannot be read."""
        saved = saved_config(run)
        if not saved:
            raise BadInput(f"{run} is not a run folder: no config.yaml of a run there")
        self.run = run
        self.config = build_config(Config, saved, all_keys(Config))
        self.grader = Grader(self.config.reward)

    @cached_property
    def start(self) -> Path:
        return Path(start_path(self.config, self.run))

    @cached_property
    def reference(self) -> Policy:
        return self.loaded(self.start)

    @cached_property
    def problems(self) -> dict[str, Problem]:
        """Those that were trained on, by what a dump says of them."""
        problems, _ = data.load_problems(self.config.data, self.config.seed, self.grader)
        return {identity(problem.prompt, problem.reference): problem for problem in problems}

    def loaded(self, path: Path) -> Policy:
        return model.freeze(load_to_sample(path, self.config.model))

    def policy_before(self, step: int) -> Policy:
        """The policy that wrote the responses of a step, or that of the nearest step that was saved, which is said."""
        models = {0: self.start}
        if (self.run / "model").is_dir():
            models[self.config.train.steps] = self.run / "model"
        checkpoints = {int(folder.name[5:]): folder for folder in (self.run / "checkpoints").glob("step_*[0-9]")}
        nearest = min(models | checkpoints, key=lambda number: (abs(number - (step - 1)), number))
        if nearest != step - 1:
            print(
                f"{self.run}: the policy of step {step}'s responses was not saved; taking that after step {nearest}. "
                "train.save_every=1 and train.keep_checkpoints keep all",
                file=sys.stderr,
            )
        if nearest in models:
            return self.loaded(models[nearest])
        policy = self.loaded(self.start)
        load_policy(checkpoints[nearest], policy)
        return policy

    def complete(self, step: int, lines: list[dict], continuations: int) -> None:
        """Add what a step's lines lack, in place: those of whole groups that were learned from, in their order.

        Raises BadInput where a line is no response, but an edge of a tree.
        """
        if not lines:
            return
        if needs(self.config.algorithm.advantage, "tree"):
            name = self.config.algorithm.advantage
            raise BadInput(f"{self.run}: samples of algorithm.advantage={name} are edges, no responses to be valued")
        policy, config = self.policy_before(step), self.config
        batch = self.batch_of(lines, policy)
        how = (config.sample.temperature, config.train.micro_batch_tokens)
        is_compared = "ref_log_prob" not in lines[0]
        is_told = "answer_log_prob" not in lines[0] and self.can_be_told(policy, batch)
        if is_compared or is_told:
            log_probs, _ = model.batch_log_probs(policy, batch, *how)
        if is_compared:
            # Both from here: the dumped ones may be a GPU's, in half precision, and their difference rounding
            ref_log_probs, _ = model.batch_log_probs(self.reference, batch, *how)
            add(lines, ref_log_prob=ref_log_probs, fine_log_prob=log_probs)
        if is_told:
            told = answer.scored(policy, batch, config).answer_log_probs
            add(lines, answer_log_ratio=told - log_probs)
        if "step_label" not in lines[0] and config.data.source in TRACES:  # a dump of an earlier version
            labels, trace_ids = traces.verified(batch, policy.tokenizer, TRACES[config.data.source])
            add(lines, step_label=labels, trace_id=trace_ids)
        if "value_after" not in lines[0]:
            numbers = steps.step_ids(batch, policy.tokenizer, config.algorithm)
            prefixes = sum(len(values.prefixes_of(batch, numbers, row)) for row in range(len(batch)))
            print(
                f"{self.run}, step {step}: {continuations} continuations of up to {prefixes:,} prefixes",
                file=sys.stderr,
            )
            key = (config.seed, Draw.CONTINUE, step)
            before, after, _ = values.continue_prefixes(
                policy, batch, numbers, continuations, config.sample, self.grader, key
            )
            add(lines, step_id=numbers, value_before=before, value_after=after)
        elif continuations != config.values.continuations:
            print(
                f"{self.run}: its dumps have values already, of {config.values.continuations} continuations, not "
                f"{continuations}",
                file=sys.stderr,
            )

    def can_be_told(self, policy: Policy, batch: Batch) -> bool:
        """Whether every answer can stand in front of its prompt. Where not, that is said."""
        try:
            answer.require_answers(self.config, policy, list(batch.problems[:: batch.group_size]))
        except BadInput as error:
            print(f"{self.run}: no scorer `answer`: {error}", file=sys.stderr)
            return False
        return True

    def batch_of(self, lines: list[dict], policy: Policy) -> Batch:
        """The responses behind their prompts, with what was asked and the verdicts. Raises BadInput where a problem is
        not among the run's.
        """
        asked = [self.problems.get(identity(line["prompt"], line["reference"])) for line in lines]
        if None in asked:
            raise BadInput(
                f"{self.run}: the problem {lines[asked.index(None)]['prompt'][:60]!r} is not among those that its "
                "config.yaml gives now: bring back the data"
            )
        G = self.config.sample.group_size
        how = (sys.maxsize, self.config.data.chat_template, policy.known_ids)
        _, prompts = data.encode_prompts(asked[::G], policy.tokenizer, *how)
        verdicts = tuple(Verdict(line["verdict"], line["reason"]) for line in lines)
        batch = replace(inspector.batch_of(lines, G), problems=tuple(asked), verdicts=verdicts)
        return answer.behind(batch, [ids for ids in prompts for _ in range(G)])


def identity(prompt: str, reference) -> str:
    """What tells the problems of a run apart."""
    return json.dumps([prompt, reference], sort_keys=True)


def add(lines: list[dict], **fields: torch.Tensor) -> None:
    """Add to each line its row of every field [B, T], in float64 as the rest of a line is."""
    for i, line in enumerate(lines):
        line |= {name: values[i, : len(line["token_text"])].double() for name, values in fields.items()}
