"""After TreeRPO (arXiv 2506.05183): a tree of responses to every prompt, and groups of the children
of one node.

From every node `sample.group_size` children are drawn, each an edge of at most `tree.edge_tokens`
tokens, down to `tree.depth` edges. A child that stops is a leaf, and is worth its reward; any other
node is worth the mean of its children. That is an unbiased estimate of the policy's expected reward
from there on, whatever stops early.

A row of the Batch is an edge: its prompt is all that stands before it, its siblings are the other
children of the same node, its reward is what its end is worth. From stage 3 on nothing else knows
of trees.

Chosen here, not checked against the authors' code: the last edge goes on to sample.max_new_tokens,
the advantage is GRPO's z-score, and it is the std in this that must reach MIN_SPREAD.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean

import torch

import baselines
from infra.config import Block, knob
from infra.processes import map_over_ranks
from model import Policy
from rewards import Grader, Verdict
from sample import sample
from spro import Batch, by_group, estimator, outcome_advantage
from tasks.problem import Problem

MIN_SPREAD = 0.1  # unbiased std of a group's values, below which it is dropped: the paper's number


@dataclass
class TreeConfig(Block):
    depth: int = knob(3, "tree_rpo: edges from the prompt to the deepest leaf", least=1)
    edge_tokens: int = knob(
        384, "of an edge, at most; the last one goes on to sample.max_new_tokens", least=1
    )


def is_chosen(config) -> bool:
    """Whether a run samples trees."""
    return baselines.needs(config.algorithm.advantage, "tree")


def samples_per_prompt(config) -> int:
    """Rows that a step samples of every prompt: responses, or as many edges as a tree can have."""
    depth = config.tree.depth if is_chosen(config) else 1
    return sum(config.sample.group_size**level for level in range(1, depth + 1))


def check(config) -> None:
    """ValueError where other blocks do not go with a run's tree."""
    if not is_chosen(config):
        return
    depth, edge, limit = config.tree.depth, config.tree.edge_tokens, config.sample.max_new_tokens
    name = f"algorithm.advantage={config.algorithm.advantage}"
    if (depth - 1) * edge >= limit:
        at_most = (limit - 1) // (depth - 1)
        shorter = f"lower tree.edge_tokens to at most {at_most}, or tree.depth"
        raise ValueError(
            f"tree.depth={depth}: {depth - 1} edges of tree.edge_tokens={edge} leave nothing of "
            f"sample.max_new_tokens={limit} for the last: "
            f"{shorter if at_most else f'lower tree.depth to at most {limit}'}"
        )
    if config.sample.stop:
        raise ValueError(
            f"{name} takes no sample.stop={config.sample.stop}: such a text may begin in one edge "
            "and end in the next"
        )
    if config.train.max_refills:
        raise ValueError(
            f"{name} takes no train.max_refills={config.train.max_refills}: how many groups a "
            "prompt has depends on its tree; set it to 0"
        )


# --- the advantage --------------------------------------------------------------------------------


@estimator("tree")
def tree_rpo_advantage(batch, algo):
    """After TreeRPO: GRPO's advantage, of an edge among the edges that leave the same node."""
    return outcome_advantage(batch.rewards, batch.group_size)[:, None]


def differ_enough(batch: Batch) -> torch.Tensor:
    """Which groups' values are spread enough to be learned from; with a NaN none. bool [B / G]."""
    return by_group(batch.rewards.double(), batch.group_size).std(1) > MIN_SPREAD - 1e-6


# --- stage 1: a tree is sampled -------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Where edges begin, or one ends."""

    key: tuple[int, ...]  # of its random numbers: (seed, purpose, *path)
    problem: Problem
    prompt: list[int]
    written: list[int]  # ids from the prompt to here

    @property
    def path(self) -> tuple[int, ...]:
        """(position of the prompt, sibling, sibling, ...)"""
        return self.key[2:]


def sample_trees(
    policy: Policy, train_set, chosen: list[int], keys: list[tuple[int, ...]], config
) -> Batch:
    """A tree from each chosen prompt -> a Batch of edges on CPU, level by level, siblings adjacent.

    train_set: (problems, prompts); keys[i] = (seed, purpose, position) of the i-th chosen one. The
    path from the prompt is a part of the sampler's keys: no two edges share their luck, and that of
    an edge depends on nothing else that is sampled. `paths` are those of the edges' ends, `texts`
    all that is written from the prompt to there. A sharded policy must be `unsharded`.
    """
    problems, prompts = train_set
    nodes = [Node(key, problems[i], prompts[i], []) for key, i in zip(keys, chosen, strict=True)]
    levels = []
    for depth in range(1, config.tree.depth + 1):
        limit, is_last = config.tree.edge_tokens, depth == config.tree.depth
        if is_last:
            limit = config.sample.max_new_tokens - (depth - 1) * limit
        so_far = [node.prompt + node.written for node in nodes]
        keys = [node.key for node in nodes]
        edges = sample(policy, so_far, keys, replace(config.sample, max_new_tokens=limit))
        ends = ends_of(nodes, edges)
        levels.append(with_ends(edges, ends, policy.tokenizer, is_last))
        nodes = [end for end, cut in zip(ends, edges.truncated.tolist(), strict=True) if cut]
        if not nodes:
            break
    return Batch.cat(levels)


def ends_of(nodes: list[Node], edges: Batch) -> list[Node]:
    """Where the edges end that were sampled from these nodes."""
    responses = edges.tokens[:, edges.prompt_length :]
    ends = []
    for i, (response, mask) in enumerate(zip(responses, edges.mask, strict=True)):
        node, sibling = nodes[i // edges.group_size], i % edges.group_size
        written = node.written + response[mask].tolist()
        ends.append(replace(node, key=(*node.key, sibling), written=written))
    return ends


def with_ends(edges: Batch, ends: list[Node], tokenizer, is_last: bool) -> Batch:
    """The edges with what there is to know of their ends. Only on the last level one is truncated:
    before, it goes on.
    """
    return replace(
        edges,
        paths=tuple(end.path for end in ends),
        problems=tuple(end.problem for end in ends),
        texts=tuple(tokenizer.decode(end.written, skip_special_tokens=True) for end in ends),
        truncated=edges.truncated & is_last,
    )


# --- stage 2: leaves are graded, and nodes are the means of their children ------------------------


def graded(batch: Batch, grader: Grader, max_new_tokens: int) -> Batch:
    """The edges with the verdicts and rewards of their ends; the ranks share the grading.

    A leaf is judged as a whole response is, by all that is written from the prompt to it. A leaf
    without a verdict leaves none to the nodes above it.
    """
    lengths = written_lengths(batch)
    children = children_of(batch)
    leaves = [i for i in range(len(batch)) if not children[i]]
    answers = [(batch.problems[i], batch.texts[i], lengths[i]) for i in leaves]
    judged = map_over_ranks(lambda part: grader.judge(part, max_new_tokens), answers)
    values = dict(zip(leaves, judged, strict=True))
    for i in reversed(range(len(batch))):  # from the deepest level up
        if children[i]:
            values[i] = mean_of([values[child] for child in children[i]])
    verdicts, rewards = zip(*(values[i] for i in range(len(batch))), strict=True)
    return replace(batch, verdicts=verdicts, rewards=torch.tensor(rewards))


def mean_of(children: list[tuple[Verdict, float]]) -> tuple[Verdict, float]:
    """(verdict, reward) of a node: the means of its children's."""
    scores = [verdict.score for verdict, _ in children]
    mean = None if None in scores else fmean(scores)
    verdict = Verdict(mean, f"the mean of {len(children)} ways to go on")
    return verdict, fmean(reward for _, reward in children)


def children_of(batch: Batch) -> list[list[int]]:
    """The rows of the edges that leave the end of each edge."""
    row = {path: i for i, path in enumerate(batch.paths)}
    children = [[] for _ in batch.paths]
    for path, i in row.items():
        if path[:-1] in row:
            children[row[path[:-1]]].append(i)
    return children


def written_lengths(batch: Batch) -> list[int]:
    """Tokens from the prompt to the end of each edge."""
    lengths: dict[tuple, int] = defaultdict(int)
    for path, length in zip(batch.paths, batch.mask.sum(1).tolist(), strict=True):
        lengths[path] = lengths[path[:-1]] + length
    return [lengths[path] for path in batch.paths]


# --- stage 6: what is said of a step --------------------------------------------------------------


def response_metrics(batch: Batch) -> dict[str, float]:
    """The metrics of whole responses, which are a tree's leaves, in place of those of its edges; {}
    where rows are no edges.

    A leaf counts as often as plain sampling would come by it, 1 / G for every edge of its path: one
    that stops early is alone where others are many, and a plain mean would be of long ones.
    """
    if batch.paths is None:
        return {}
    is_leaf = torch.tensor([not children for children in children_of(batch)])
    depths = torch.tensor([len(path) - 1 for path in batch.paths])[is_leaf].double()
    lengths = torch.tensor(written_lengths(batch))[is_leaf].double()
    rewards = batch.rewards[is_leaf].double()
    counts = batch.group_size**-depths
    metrics = {
        "reward/faults": int(rewards.isnan().sum()),
        "response_length/mean": mean(lengths, counts),
        "response_length/max": int(lengths.max()),
        "response_length/truncated": mean(batch.truncated[is_leaf].double(), counts),
    }
    found = ~rewards.isnan()
    if found.any():
        rewards, counts = rewards[found], counts[found]
        metrics["reward/mean"] = mean(rewards, counts)
        metrics["reward/std"] = mean((rewards - metrics["reward/mean"]).square(), counts) ** 0.5
    return metrics


def mean(values: torch.Tensor, counts: torch.Tensor) -> float:
    """Where each of the values counts so often."""
    return ((counts * values).sum() / counts.sum()).item()
