"""Dynamic sampling: batches of prompts are sampled until enough groups are kept, and a run stays what it was."""

import json

import data
import infra.config
import infra.errors
import pytest
import train

import chaos
from conftest import checkpoints, finished, ran
from test_ranks import assert_alike

WANTED, REFILLS = 4, 3
REFILL = ("train.steps=5", "train.dump_every=1", "eval.every=5", f"train.max_refills={REFILLS}")
REFILL += ("train.save_every=1", "algorithm.keep_accuracy=[0.01, 0.99]")


@pytest.fixture(scope="module")
def refilled(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refilled") / "run"
    finished(folder, warm, *REFILL)
    return folder


def groups_of(file) -> list[list[dict]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [rows[i : i + 4] for i in range(0, len(rows), 4)]


def is_mixed(group: list[dict]) -> bool:
    return 0 < sum(row["verdict"] for row in group) < 4


def test_batches_are_sampled_until_enough_groups_are_kept_and_the_first_of_those_are_learned_from(refilled):
    rows, full, surplus, refills = chaos.metrics(refilled)[1:], 0, 0, 0
    for row, file in zip(rows, sorted((refilled / "samples").iterdir()), strict=True):
        groups = groups_of(file)
        sampled, mixed = 0, []
        while sampled == 0 or (len(mixed) < WANTED and sampled < (1 + REFILLS) * WANTED):
            mixed += [i for i in range(sampled, sampled + WANTED) if is_mixed(groups[i])]
            sampled += WANTED
        learned = [i for i, group in enumerate(groups) if all("advantage" in sibling for sibling in group)]
        assert len(groups) == row["groups/sampled"] == sampled
        assert learned == mixed[:WANTED] and row["groups/kept"] == len(learned) / sampled
        scores = [sibling["reward"] for group in groups for sibling in group]
        assert row["reward/mean"] == pytest.approx(sum(scores) / len(scores))  # over all that was sampled
        assert row["updates/taken"] == -(-len(learned) * 4 // 8)
        full, surplus, refills = full + (len(mixed) >= WANTED), surplus + (len(mixed) > WANTED), refills + (sampled > 4)
    assert full and surplus and refills  # each has happened


def test_no_prompt_is_skipped_or_sampled_twice(refilled):
    config = infra.config.read_config(train.Config, [str(refilled / "config.yaml")], None)
    problems, _ = data.load_problems(config.data, config.seed)
    asked = [group[0]["prompt"] for file in sorted((refilled / "samples").iterdir()) for group in groups_of(file)]
    state = json.loads((refilled / "checkpoints" / checkpoints(refilled)[-1] / "state.json").read_text())
    assert state["position"] == len(asked) == sum(row["groups/sampled"] for row in chaos.metrics(refilled)[1:])
    indices = [data.prompt_index(place, len(problems), config.seed) for place in range(len(asked))]
    assert asked == [problems[i].prompt for i in indices]


@pytest.mark.parametrize("n", [2, 4, 7])
def test_a_run_stopped_between_refills_goes_on_as_if_nothing_had_been(n, refilled, warm, tmp_path):
    folder, go_on = tmp_path / "run", (warm, *REFILL, "resume=true")
    code, words = ran(folder, *go_on, on="reward", n=n, does="SIGTERM")  # while the n-th batch is graded
    assert code == infra.errors.EXIT_STOPPED, words
    finished(folder, *go_on)
    assert chaos.differences(refilled, folder) == []


def test_two_processes_refill_as_one_does(refilled, warm, tmp_path):
    finished(tmp_path / "two", warm, *REFILL, ranks=2)
    assert_alike(chaos.metrics(refilled), chaos.metrics(tmp_path / "two"))


def test_where_the_first_batch_is_enough_a_refill_changes_nothing(warm, tmp_path):
    for refills in (0, 2):
        finished(tmp_path / str(refills), warm, "train.steps=2", f"train.max_refills={refills}")  # keeps every group
    without, refilling = (chaos.metrics(tmp_path / name) for name in "02")
    assert [row.pop("groups/sampled") for row in refilling[1:]] == [WANTED] * 2
    assert without == refilling
