"""How much is decoded together: what fits beside all that a run holds, and never more than a config asks for."""

import pytest
import torch
import train
from infra import memory
from infra.sharding import decoder_layers
from sample import SampleConfig, sample

from helpers import PROMPTS, keys, row_log_probs, rows_of, tiny_model

CPU = torch.device("cpu")
GIB = 2**30


def config_of(**model) -> train.Config:
    return train.Config(model=train.ModelConfig(**model), sample=SampleConfig(max_new_tokens=93))


def chosen(config, policy) -> int:
    return memory.batch_tokens(config, policy.model, decoder_layers(policy), PROMPTS, CPU)


def test_a_number_that_is_given_is_taken():
    config = config_of()
    config.sample.batch_tokens = 777
    assert chosen(config, tiny_model()) == 777


def test_a_cpu_decodes_16384_tokens_together_and_less_where_memory_is_short(monkeypatch):
    policy = tiny_model()
    assert chosen(config_of(), policy) == 16384
    monkeypatch.setattr(memory, "free_bytes", lambda _: 3 * 2**20)
    assert chosen(config_of(), policy) < 16384
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    assert chosen(config_of(), policy) == 1  # a row at a time


@pytest.mark.parametrize("free", [2, 16, 24, 80, 141])
def test_what_fits_on_a_gpu_fits_by_the_memory_plan_and_twice_as_much_would_not(free, monkeypatch):
    policy = tiny_model()
    monkeypatch.setattr(memory, "CARD", free * GIB)
    config = config_of(path="some/model", shard=4)
    config.dry_run = True
    tokens = chosen(config, policy)
    assert tokens & (tokens - 1) == 0  # a power of 2

    def needed(tokens: int) -> float:
        """GiB that the plan counts for sampling, weights, moments and reference."""
        work = memory.Work(tokens, 100, 0, has_reference=True)
        plan = memory.memory_plan(policy.model, decoder_layers(policy), config.model, 4, True, work, 0)
        return sum(gib for name, gib in plan.items() if not name.startswith(("update", "peak")))

    assert needed(tokens) < 0.8 * free < 1.01 * needed(2 * tokens + 100)


def test_every_ranks_part_of_a_machines_memory_is_its_own(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory.free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)  # others use this machine too


def test_a_sampler_that_is_told_no_number_draws_what_a_told_one_draws():
    policy = tiny_model()
    batches = [
        sample(policy, PROMPTS, keys(6), SampleConfig(group_size=2, max_new_tokens=9, batch_tokens=n))
        for n in (0, 16384)
    ]
    assert rows_of(batches[0]) == rows_of(batches[1])
    assert all(a.equal(b) for a, b in zip(*map(row_log_probs, batches), strict=True))
