"""Decoding along the log-ratio: at gamma -1 it is the reference, at 0 the policy, and between a mixture of logits."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from infra.errors import BadInput
from infra.rng import Draw
from rewards import Verdict
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


@pytest.mark.parametrize("gamma", [-1.0, -0.5, 0.5, 2.0])
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


def test_at_0_accuracies_are_those_of_the_runs_last_evaluation(run, models):
    (row,) = extrapolate.evaluated(models, [0.0], None)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/n"] == 16 and last["eval/accuracy"] > 0
    assert row == {key: last[key] for key in row}


def test_a_run_with_fewer_held_out_prompts_than_it_would_evaluate_has_all_of_them(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"] |= {"max_steps": 2, "max_prompt_tokens": 6}  # of which some are too long
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    (row,) = extrapolate.evaluated(RunModels(copy), [0.0], None)
    assert 0 < row["eval/n"] < 16 == config["eval"]["prompts"]


def test_a_graders_fault_is_no_wrong_answer(run, tmp_path, monkeypatch):
    models = RunModels(run)
    (before,) = extrapolate.evaluated(models, [0.5], None)
    grade = models.grader.grade
    faulty = Verdict(None, "broken")
    monkeypatch.setattr(models.grader, "grade", lambda answers: [faulty] * 3 + grade(answers)[3:])
    (after,) = extrapolate.evaluated(models, [0.5], None)
    assert before["eval/n"] == 16 and after["eval/n"] == 13


def test_the_table_has_a_row_for_each_run_and_a_column_for_each_gamma(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["extrapolate", str(run.parent), "--gammas=-1,0.5", "--limit", "8"])
    extrapolate.main()
    head, _, sampled, greedy = capsys.readouterr().out.splitlines()
    assert head == "| run | T | n | -1 | 0.5 |" and sampled.count("|") == greedy.count("|") == 6
    assert f"/{run.name} | 1 | 8 |" in sampled and f"/{run.name} | 0 | 8 |" in greedy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gammas=1,x"], "give numbers with commas"),
        (["--gammas=1,nan"], "give finite numbers"),
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
        extrapolate.evaluated(RunModels(tmp_path), [0.0], None)


def test_a_folder_without_a_run_is_refused(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["extrapolate", str(run / "model")])
    with pytest.raises(BadInput, match="no run in "):
        extrapolate.main()
    with pytest.raises(BadInput, match="is not a run folder"):
        RunModels(run / "model")
