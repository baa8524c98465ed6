"""Trees: values by enumeration, advantages against a recursion, the luck of every path, and whole runs."""

import itertools
import json
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import baselines
import infra.config
import infra.errors
import pytest
import sample as sampler
import torch
import train
from baselines import tree
from rewards import Grader, Verdict
from spro import AlgorithmConfig, Batch
from tasks.problem import Problem
from tools import inspector

import chaos
from conftest import finished, ran
from helpers import PROMPTS, keys, rows_of, tiny_model
from test_ranks import assert_alike
from test_spro import assert_equal

STOP = 0


def config_of(depth: int, edge: int, limit: int, children: int = 2, **reward) -> train.Config:
    rows = 16 * sum(children**level for level in range(1, depth + 1))
    return train.Config(
        algorithm=AlgorithmConfig(advantage="tree_rpo"),
        sample=train.SampleConfig(group_size=children, max_new_tokens=limit),
        tree=tree.TreeConfig(depth=depth, edge_tokens=edge),
        train=train.TrainConfig(mini_batch_size=rows),
        reward=train.RewardConfig(**reward),
    )


# --- values, by enumeration ---------------------------------------------------------------------------------------


def every_outcome(f):
    """(probability, result) of f(choose) for every way in which its choices can fall; choose(p) -> an index of p."""
    script = []
    while True:
        made = []

        def choose(p, script=script, made=made):
            made.append((script[len(made)] if len(made) < len(script) else 0, p))
            return made[-1][0]

        result = f(choose)
        yield math.prod(p[i] for i, p in made), result
        while made and made[-1][0] == len(made[-1][1]) - 1:
            made.pop()
        if not made:
            return
        script = [i for i, _ in made]
        script[-1] += 1


class Table:
    """A policy with a distribution per prefix; 0 stops. An edge is a token, and any text has a reward."""

    def __init__(self, symbols: int, depth: int):
        source = random.Random(symbols)
        prefixes = [p for n in range(depth + 1) for p in itertools.product(range(symbols), repeat=n)]
        weights = {p: [source.random() + 0.1 for _ in range(symbols)] for p in prefixes}
        self.p = {prefix: [x / sum(row) for x in row] for prefix, row in weights.items()}
        self.reward = {" ".join(map(str, p)): source.random() for p in prefixes}
        self.depth = depth
        self.tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))

    def expected(self, f, prefix=()) -> float:
        """E f(response) of responses that begin so."""
        if len(prefix) == self.depth or STOP in prefix:
            return f(prefix)
        return sum(p * self.expected(f, (*prefix, a)) for a, p in enumerate(self.p[prefix]))

    def value(self, prefix=()) -> float:
        return self.expected(lambda response: self.reward[" ".join(map(str, response))], prefix)

    def sample(self, choose):
        """In place of the sampler, for edges of one token behind a prompt of one."""

        def sampled(_, prompts, keys, config):
            rows = [prompt for prompt in prompts for _ in range(config.group_size)]
            drawn = torch.tensor([[choose(self.p[tuple(row[1:])])] for row in rows])
            tokens = torch.cat([torch.tensor(rows), drawn], 1)
            return Batch(
                tokens=tokens,
                attention_mask=torch.ones_like(tokens, dtype=torch.bool),
                mask=torch.ones_like(drawn, dtype=torch.bool),
                truncated=drawn[:, 0] != STOP,
                group_size=config.group_size,
            )

        return sampled

    def judge(self, answers, _):
        return [(Verdict(self.reward[text], ""), self.reward[text]) for _, text, _ in answers]


@pytest.mark.parametrize("symbols, depth", [(2, 3), (3, 2)])
def test_values_and_metrics_of_trees_are_unbiased(symbols, depth, monkeypatch):
    """All trees of two children, by their probabilities; without its share a leaf's mean would be biased."""
    policy, config = Table(symbols, depth), config_of(depth, 1, depth)
    train_set = [Problem("?", "", "chain")], [[9]]

    def grown(choose):
        monkeypatch.setattr(tree, "sample", policy.sample(choose))
        batch = tree.sample_trees(policy, train_set, [0], [(0, 2, 7)], config)
        return tree.graded(batch, policy, depth)

    total = mean = length = plain = 0.0
    of_first = {a: [0.0, 0.0] for a in range(symbols)}
    for probability, batch in every_outcome(grown):
        total += probability
        said = tree.response_metrics(batch)
        mean += probability * said["reward/mean"]
        length += probability * said["response_length/mean"]
        leaves = [i for i, below in enumerate(tree.children_of(batch)) if not below]
        plain += probability * batch.rewards[leaves].mean().item()
        first, value = int(batch.tokens[0, -1]), batch.rewards[0].item()
        of_first[first][0] += probability
        of_first[first][1] += probability * value
        assert said["reward/mean"] == pytest.approx(batch.rewards[:2].mean().item(), abs=1e-6)
    assert total == pytest.approx(1, abs=1e-12)
    assert mean == pytest.approx(policy.value(), abs=1e-6) and abs(plain - policy.value()) > 1e-3
    assert length == pytest.approx(policy.expected(len), abs=1e-6)
    for first, (chance, weighted) in of_first.items():
        assert weighted / chance == pytest.approx(policy.value((first,)), abs=1e-6)


# --- advantages, against a recursion ------------------------------------------------------------------------------


def random_tree(source: random.Random, depth: int, children: int) -> list:
    """Each child is a reward or, above the last level and often, a node: a list of children."""
    return [
        random_tree(source, depth - 1, children) if depth > 1 and source.random() < 0.6 else source.choice([0, 1, 0.3])
        for _ in range(children)
    ]


def value_of(child) -> float:
    return statistics.fmean(map(value_of, child)) if isinstance(child, list) else child


def slow_advantages(node: list, path: tuple, found: dict) -> dict:
    """path of an edge -> (its value, its advantage), node by node."""
    values = list(map(value_of, node))
    std = statistics.stdev(values)
    for g, (child, value) in enumerate(zip(node, values, strict=True)):
        found[(*path, g)] = value, (value - statistics.fmean(values)) / (std + 1e-6) if std else 0.0
        if isinstance(child, list):
            slow_advantages(child, (*path, g), found)
    return found


def batch_of(trees: list, children: int) -> tuple[Batch, dict]:
    """The edges of trees level by level, and what the recursion says of them; a text is a leaf's reward."""
    found = {}
    for position, root in enumerate(trees):
        slow_advantages(root, (position,), found)
    paths = sorted(found, key=lambda path: (len(path), path))
    lengths = torch.tensor([1 + i % 5 for i in range(len(paths))])
    batch = Batch(
        mask=torch.arange(5) < lengths[:, None],
        truncated=torch.zeros(len(paths), dtype=torch.bool),
        texts=tuple(str(found[path][0]) for path in paths),
        problems=(Problem("?", "", "chain"),) * len(paths),
        paths=tuple(paths),
        group_size=children,
    )
    return batch, found


def judge(answers, _):
    return [(Verdict(float(text), ""), float(text)) for _, text, _ in answers]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("children", [2, 3])
def test_advantages_are_those_of_a_recursion_over_nodes(seed, children):
    source = random.Random(seed)
    batch, found = batch_of([random_tree(source, 4, children) for _ in range(3)], children)
    assert max(map(len, found)) > 3 and len({len(path) for path in found}) > 2
    graded = tree.graded(batch, SimpleNamespace(judge=judge), 9)
    values, advantages = torch.tensor([found[path] for path in batch.paths], dtype=torch.float64).T
    assert_equal(graded.rewards.double(), values, 1e-6)
    assert [verdict.score for verdict in graded.verdicts] == pytest.approx(values.tolist(), abs=1e-12)
    exact = baselines.advantage("tree_rpo", replace(graded, rewards=values), AlgorithmConfig())
    assert_equal(exact, torch.where(batch.mask, advantages[:, None], 0.0))


def test_groups_of_little_spread_are_not_learned_from():
    batch, _ = batch_of([[0, 1, 0.3], [0.5, 0.5, 0.5], [0.5, 0.55, 0.6], [0.5, 0.6, 0.7], [0.3, 0.45, 0.5]], 3)
    graded = tree.graded(batch, SimpleNamespace(judge=judge), 9)
    spread = [statistics.stdev(group.tolist()) for group in graded.rewards.view(-1, 3)]
    assert 0 < spread[2] < spread[3] == pytest.approx(0.1) and spread[4] > 0.1
    assert train.groups_to_learn_from(graded, (0, 1)).tolist() == [True, False, False, True, True]


def test_a_leaf_without_a_verdict_drops_its_group_and_those_above_it():
    batch, _ = batch_of([[[0, 1], [[1, 0], 0.3]], [0, 1]], 2)

    def faulty(answers, _):
        judged = judge(answers, _)
        place = next(i for i, (_, text, _) in enumerate(answers) if text == "0.3")
        judged[place] = Verdict(None, "fault"), math.nan
        return judged

    graded = tree.graded(batch, SimpleNamespace(judge=faulty), 9)
    groups = [path[:-1] for path in batch.paths[::2]]
    kept = train.groups_to_learn_from(graded, (0, 1)).tolist()
    assert {group for group, is_kept in zip(groups, kept, strict=True) if not is_kept} == {(0,), (0, 1)}
    said = tree.response_metrics(graded)
    # Shares of the leaves with a verdict: 1/4, 1/4, 1/8, 1/8 in the one tree, 1/2, 1/2 in the other
    assert said["reward/faults"] == 1 and said["reward/mean"] == pytest.approx(0.875 / 1.75)


# --- sampling -----------------------------------------------------------------------------------------------------

PROBLEMS = [Problem(f"{i}b+1?", "1", "chain") for i in range(3)]
KEYS = keys(3)


@pytest.fixture(scope="module")
def grown():
    """Trees of a random model, depth 3, three children a node; some edges stop, some are cut at the limit."""
    policy = tiny_model()
    return policy, tree.sample_trees(policy, (PROBLEMS, PROMPTS), [0, 1, 2], KEYS, config_of(3, 4, 11, children=3))


def test_an_edge_follows_its_parent_and_only_one_that_was_cut_goes_on(grown):
    policy, batch = grown
    rows = dict(zip(batch.paths, rows_of(batch), strict=True))
    assert len(rows) == len(batch) and len(batch) % 3 == 0
    parents = {path[:-1] for path in rows}
    stopped = 0
    for path, (prompt, response, text, truncated) in rows.items():
        root, depth = PROMPTS[path[0]], len(path) - 1
        before, above, _, _ = rows.get(path[:-1], (root, [], "", False))
        ended = response[-1] in policy.stop_ids
        assert prompt == before + above and prompt[: len(root)] == root
        assert len(response) == (4, 4, 3)[depth - 1] or (ended and len(response) < 4)
        assert (path in parents) == (not ended and depth < 3) and truncated == (not ended and depth == 3)
        assert text == policy.tokenizer.decode(prompt[len(root) :] + response, skip_special_tokens=True)
        stopped += ended and depth < 3
    assert 0 < stopped < len(parents)
    for i in range(0, len(batch), 3):
        assert [path[-1] for path in batch.paths[i : i + 3]] == [0, 1, 2]
        assert len({path[:-1] for path in batch.paths[i : i + 3]}) == 1


def test_no_two_paths_share_their_luck(grown):
    _, batch = grown
    streams = sampler.uniforms([(0, 2, *path) for path in batch.paths], 3).tolist()
    assert len(set(map(tuple, streams))) == len(batch)
    zeros = [(0, 2, 5, *[0] * depth) for depth in range(1, 6)]  # which numpy might take for padding
    assert len(set(map(tuple, sampler.uniforms(zeros, 3).tolist()))) == 5


def test_the_keys_of_the_sampler_are_the_paths(monkeypatch):
    asked, real = [], tree.sample

    def noted(policy, prompts, keys, config):
        asked.append(keys)
        return real(policy, prompts, keys, config)

    monkeypatch.setattr(tree, "sample", noted)
    config = config_of(3, 4, 11, children=3)
    batch = tree.sample_trees(tiny_model(), (PROBLEMS, PROMPTS), [2, 0], [(5, 2, 8), (5, 2, 9)], config)
    given = [(*key[2:], g) for level in asked for key in level for g in range(3)]
    assert given == list(batch.paths) and all(key[:2] == (5, 2) for level in asked for key in level)
    assert {problem for path, problem in zip(batch.paths, batch.problems, strict=True) if path[0] == 8} == {PROBLEMS[2]}


def test_the_first_edges_begin_as_whole_responses_do(grown):
    """A run of trees and one of whole responses with the same seed meet the same luck."""
    policy, batch = grown
    whole = sampler.sample(policy, PROMPTS[:3], KEYS, train.SampleConfig(group_size=3, max_new_tokens=11))
    for (_, edge, _, _), (_, response, _, _) in zip(rows_of(batch)[:9], rows_of(whole), strict=True):
        assert edge == response[:4]


def test_leaves_are_graded_as_whole_responses_are(grown):
    """By their text and length from the prompt: the overlong penalty counts all of their tokens."""
    _, batch = grown
    grader, lengths = Grader(train.RewardConfig(overlong_buffer=5)), tree.written_lengths(batch)
    graded = tree.graded(batch, grader, 11)
    for i, below in enumerate(tree.children_of(batch)):
        if below:
            continue
        prompt, response, _, _ = rows_of(batch)[i]
        assert lengths[i] == len(prompt) + len(response) - len(PROMPTS[batch.paths[i][0]])
        penalty = min(max((lengths[i] - 6) / 5, 0), 1)
        score = grader.grade_one("chain", batch.texts[i], "1").score
        assert graded.verdicts[i].score == score and graded.rewards[i].item() == pytest.approx(score - penalty)


# --- the config, and whole runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, words",
    [
        ({}, "2 edges of tree.edge_tokens=384 leave nothing of sample.max_new_tokens=110 for the last: "
             "lower tree.edge_tokens to at most 54, or tree.depth"),
        ({"tree": {"depth": 5, "edge_tokens": 1}, "sample": {"max_new_tokens": 3}}, "lower tree.depth to at most 3"),
        ({"tree": {"edge_tokens": 30}, "sample": {"stop": ["\n"]}}, "may begin in one edge and end in the next"),
        ({"tree": {"edge_tokens": 30}, "train": {"max_refills": 2}}, "takes no train.max_refills=2"),
        ({"tree": {"depth": 0}}, "depth=0 must be at least 1"),
        ({"tree": {"edge_tokens": 30}, "train": {"mini_batch_size": 100}}, "16 prompts x 584 samples = 9344 responses"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_tree_is_refused(blocks, words):
    values = {"algorithm": {"advantage": "tree_rpo"}} | blocks
    with pytest.raises(infra.errors.BadInput) as error:
        infra.config.build_config(train.Config, values, infra.config.all_keys(train.Config))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_other_estimators_do_not_look_at_the_tree():
    config = train.Config(sample=train.SampleConfig(stop=["\n"]))
    assert config.samples_per_prompt == config.sample.group_size == 8


RUN = ("train.steps=4", "train.save_every=2", "train.dump_every=4", "eval.every=4", "train.micro_batch_tokens=2000")
TREE = (*RUN, "algorithm.advantage=tree_rpo", "sample.group_size=2", "tree.edge_tokens=4", "train.mini_batch_size=28")


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "run"
    return folder, finished(folder, warm, *TREE)


def test_a_dumped_edge_holds_its_tokens_and_the_text_from_the_prompt(straight):
    folder, said = straight
    assert "4 prompts x 14 samples = 56 responses = 2 optimizer steps" in said
    assert "a sample is an edge: 2 children a node, depth 3, at most 4 tokens an edge, the last to token 14" in said
    rows = [json.loads(line) for line in (folder / "samples" / "step_000004.jsonl").read_text().splitlines()]
    assert len(rows) % 2 == 0 and len({row["prompt"] for row in rows}) == 4
    assert max(len(row["token_text"]) for row in rows) <= 6
    assert all("".join(row["token_text"]).removesuffix("<eos>") in row["text"] for row in rows)
    means = [row for row in rows if row["reason"] == "the mean of 2 ways to go on"]
    assert means and any(len(row["text"]) > 8 for row in rows)
    last = chaos.metrics(folder)[-1]
    assert last["response_length/max"] > 6 and last["response_length/mean"] > 4


def test_the_inspector_recomputes_what_training_used(straight, capsys):
    inspector.show(inspector.parser().parse_args([str(straight[0])]))
    said = " ".join(capsys.readouterr().out.split())  # its lines are broken for a terminal
    assert "✓ advantages recomputed from rewards and log-probs are those of training" in said


def test_two_processes_grow_the_trees_of_one(straight, warm, tmp_path):
    finished(tmp_path / "two", warm, *TREE, ranks=2)
    assert_alike(chaos.metrics(straight[0]), chaos.metrics(tmp_path / "two"))


def test_a_kill_between_sampling_and_grading_a_tree_changes_nothing(straight, warm, tmp_path):
    folder, go_on = tmp_path / "run", (warm, *TREE, "resume=true")
    code, words = ran(folder, *go_on, on="reward", n=3, does="kill")
    assert code == -9, words
    assert "going on after step 2" in finished(folder, *go_on)
    assert chaos.differences(straight[0], folder) == []


def test_a_tree_of_one_edge_is_grpo_on_mixed_groups(warm, tmp_path):
    finished(tmp_path / "tree", warm, *RUN, "algorithm.advantage=tree_rpo", "tree.depth=1")
    finished(tmp_path / "grpo", warm, *RUN, "algorithm.advantage=grpo", "algorithm.keep_accuracy=[0.01,0.99]")
    one, other = (
        [
            {k: v for k, v in row.items() if not k.startswith((*chaos.NOISE, "reward/std"))}
            for row in chaos.metrics(tmp_path / name)
        ]
        for name in ("tree", "grpo")
    )
    assert one == other
