"""Decoding along the log-ratio: at gamma -1 it is the reference, at 0 the policy, and between a mixture of logits."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from infra.errors import BadInput
from infra.rng import Draw
from sample import sample
from tools import extrapolate
from tools.credit_models import RunModels

from conftest import finished


@pytest.fixture(scope="module")
def run(tmp_path_factory, warm):
    folder = tmp_path_factory.mktemp("extrapolate") / "grpo"
    finished(folder, warm, "train.steps=4", "train.learning_rate=1e-3", "algorithm.advantage=grpo")
    return folder


@pytest.fixture(scope="module")
def models(run):
    return RunModels(run)


def prompts_of(policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of different lengths, padded on the left as the sampler does, and their mask."""
    rows = [policy.tokenizer(text).input_ids for text in ("3b+5?", "3b+5c*2?")]
    width = max(map(len, rows))
    ids = torch.tensor([[policy.pad_id] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize("gamma", [-1.0, -0.5, 0.0, 0.5, 2.0])
def test_logits_are_moved_by_gamma_at_every_token(run, models, gamma):
    """Against whole forward passes of both models over each row by itself, without padding or cache."""
    policy, reference = models.loaded(run / "model"), models.reference
    ids, mask = prompts_of(policy)
    moved = extrapolate.Extrapolate(reference, mask, gamma)
    for token in (7, 9, 4):
        width = ids.shape[1] - mask.shape[1]
        whole = torch.nn.functional.pad(mask, (0, width), value=1).bool()
        rows = [row[live][None] for row, live in zip(ids, whole, strict=True)]
        z, z_ref = (torch.cat([m.model(row).logits[:, -1] for row in rows]).double() for m in (policy, reference))
        found = moved(ids, z.float())
        assert torch.allclose(found.double(), z + gamma * (z - z_ref), atol=1e-4)
        ids = torch.cat([ids, torch.full((2, 1), token)], 1)


def test_at_0_it_answers_as_the_policy_and_at_minus_1_as_the_reference(run, models):
    policy, reference = models.loaded(run / "model"), models.reference
    ids, mask = prompts_of(policy)
    prompts = [row[live.bool()].tolist() for row, live in zip(ids, mask, strict=True)]
    how = replace(models.config.sample, decoding="plain")
    keys = [(0, Draw.EVALUATE, i) for i in range(2)]
    own, of_reference = (sample(each, prompts, keys, how, group_size=8).texts for each in (policy, reference))
    assert own != of_reference
    for gamma, expected in ((0.0, own), (-1.0, of_reference)):
        policy.twin = [extrapolate.ExtrapolatedModel(policy, reference, gamma)]
        assert sample(policy, prompts, keys, how, group_size=8).texts == expected


def test_right_answers_are_counted_as_the_run_counted_its_own(run, models):
    """At gamma 0: those of the run's last evaluation."""
    right, n = extrapolate.right_answers(models, [0.0], None)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert n == last["eval/n"] == 16 and right[0] > 0 and right == [round(last["eval/accuracy"] * n)]


def test_the_table_has_a_row_for_each_run_and_a_column_for_each_gamma(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extrapolate", str(run), "--gammas=-1,0.5", "--limit", "8"])
    extrapolate.main()
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| run | n | -1 | 0.5 |" and row.count("|") == 5 and f"/{run.name} | 8 |" in row


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gammas=1,x"], "give numbers with commas"),
        (["--limit", "0"], "the run has 16 held-out prompts"),
        (["--limit", "17"], "the run has 16 held-out prompts"),
    ],
)
def test_what_cannot_be_is_refused(run, arguments, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["extrapolate", str(run), *arguments])
    with pytest.raises(BadInput, match=words):
        extrapolate.main()


def test_a_run_that_has_not_ended_is_refused(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(BadInput, match="training has not ended"):
        extrapolate.right_answers(RunModels(tmp_path), [0.0], None)
