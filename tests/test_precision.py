"""The process reward's log-probs in a finer type than the rest of a run: what a pass is switched to, and back from."""

from dataclasses import replace

import baselines
import infra.sharding
import model
import pytest
import torch
import torch.distributed as dist
import train
from baselines.against_reference import finer_type
from infra import metrics, processes
from infra.precision import computing_in
from infra.sharding import shard, unsharded
from model import ModelConfig
from safetensors.torch import load_file, save_file
from sample import SampleConfig, sample
from spro import AlgorithmConfig, Batch, process_reward
from tasks.chain import chain_tokenizer

import chaos
from helpers import PROMPTS, keys, tiny_model

TEXTS = ["b1+2=3;#3", "#7", "b1+2=4;c4*5=0;d0-1=9;#9", "", "b9*9=1;(b9*9=1)#", "#1"]


def made_up_batch() -> Batch:
    return Batch.from_texts([PROMPTS[i % 3] for i in range(len(TEXTS))], TEXTS, chain_tokenizer())


def gradients(policy, batch) -> dict[str, torch.Tensor]:
    for _, micro in model.micro_batches(policy, batch, 60):
        (model.token_log_probs(policy, micro, 1.0).log_probs * micro.mask).sum().backward()
    found = {name: p.grad.full_tensor() for name, p in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return found


def passes_in_bfloat16(folder) -> None:
    """Scores, gradients and samples of a policy that FSDP2 computes in bfloat16, with finer passes in between."""
    processes.start_processes(timeout_minutes=1)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    infra.sharding.compute_dtype = lambda *_: torch.bfloat16  # as on a GPU
    batch = made_up_batch()
    policy = shard(tiny_model(), ModelConfig(), torch.device("cpu"))
    how = (policy, batch, 1.0, 60)

    def coarse(name) -> dict[str, torch.Tensor]:
        with unsharded(policy):
            drawn = sample(policy, PROMPTS[:2], keys(2), SampleConfig(group_size=2, max_new_tokens=9))
        found = gradients(policy, batch) | {"score": model.batch_log_probs(*how)[0], "drawn": drawn.tokens}
        return {f"{name} {key}": value.contiguous() for key, value in found.items()}

    found = {"fresh": model.batch_log_probs(*how, "float32")[0]}  # FSDP2 has made no pass before this one
    found |= coarse("before")
    for finer in ("float32", "tf32"):
        found[finer] = model.batch_log_probs(*how, finer)[0]
        assert policy.dtype == torch.bfloat16 and torch.get_float32_matmul_precision() == "highest"
    found |= coarse("after")
    try:
        with computing_in(policy, "tf32"):
            raise KeyError
    except KeyError:
        found |= coarse("failed")
    save_file(found, folder / f"rank {processes.rank()}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_finer_scores_are_those_of_an_fp32_model_and_leave_every_other_pass_as_it_was(ranks, tmp_path):
    process = chaos.fork(passes_in_bfloat16, (tmp_path,), ranks, tmp_path / "log")
    assert chaos.exit_code(process, 120) == 0, (tmp_path / "log").read_text()
    expected = model.batch_log_probs(tiny_model(), made_up_batch(), 1.0, 60)[0]
    for rank in range(ranks):
        found = load_file(tmp_path / f"rank {rank}")
        torch.testing.assert_close(found["fresh"], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["float32"], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["tf32"], expected, atol=1e-2, rtol=0)
        assert (found["before score"] - expected).abs().max() > 1e-2  # bfloat16, and so is worth a finer type
        before = {key.removeprefix("before "): value for key, value in found.items() if key.startswith("before")}
        assert len(before) > 20
        for when in ("after", "failed"):
            assert all(found[f"{when} {key}"].equal(value) for key, value in before.items())


def test_without_fsdp_or_in_fp32_nothing_is_switched():
    policy, batch = tiny_model(), made_up_batch()
    plain = model.batch_log_probs(policy, batch, 1.0, 60)
    for finer in (None, "tf32", "float32"):
        again = model.batch_log_probs(policy, batch, 1.0, 60, finer)
        assert all(a.equal(b) for a, b in zip(again, plain, strict=True))


def test_only_estimators_that_read_a_log_ratio_of_the_policy_are_scored_in_a_finer_type():
    policy = tiny_model()
    config = train.Config()
    assert finer_type(config, policy) is None  # fp32 throughout
    policy.dtype = torch.bfloat16
    assert finer_type(config, policy) == "tf32"
    for name in baselines.ADVANTAGES:
        config.algorithm.advantage = name
        reads = baselines.needs(name, "reference") and name != "a_star" and not baselines.needs(name, "prm")
        reads = reads or baselines.needs(name, "answer")
        assert finer_type(config, policy) == ("tf32" if reads else None), name
    config.algorithm.advantage = "spro"
    for given, expected in (("float32", "float32"), ("bfloat16", None)):
        config.algorithm.process_dtype = given
        assert finer_type(config, policy) == expected
    config.algorithm.process_dtype, config.algorithm.beta = "tf32", 0.0
    assert finer_type(config, policy) is None
    with pytest.raises(ValueError, match="process_dtype='fp8'"):
        AlgorithmConfig(process_dtype="fp8")


IN_ADVANTAGE = [n for n in baselines.ADVANTAGES if baselines.needs(n, "reference") and n != "a_star"]


@pytest.mark.parametrize("name", IN_ADVANTAGE)  # the loss of a_star reads it, in the update's own type
def test_the_step_term_is_made_of_the_finer_log_probs_and_the_ratio_of_the_old_ones(name):
    """Log-probs that are noise give the advantage of the finer ones, to the bit; and kl/ref is theirs too."""
    source = torch.Generator().manual_seed(0)
    batch = replace(made_up_batch(), group_size=2, rewards=torch.tensor([1.0, 0, 0, 1, 0.5, 0.5]))
    fine, noise = (torch.randn(2, *batch.mask.shape, generator=source) for _ in range(2))
    lines = torch.zeros(batch.mask.shape, dtype=torch.long)
    batch = replace(batch, ref_log_probs=fine[0], step_ids=lines, entropy=noise[1])
    clean = replace(batch, log_probs=fine[1])
    noisy = replace(batch, log_probs=noise[0], fine_log_probs=fine[1])
    algo = AlgorithmConfig()
    for given in (clean, noisy):
        given = replace(given, advantages=baselines.advantage(name, given, algo))
        outcome = baselines.outcome_term(name, given, algo)
        found = given.advantages, outcome, metrics.token_metrics(replace(given, sampler_log_probs=noise[1]), outcome)
        if given.fine_log_probs is None:
            expected = found
    assert found[0].equal(expected[0])
    assert (outcome is None and expected[1] is None) or outcome.equal(expected[1])
    assert found[2]["kl/ref"] == expected[2]["kl/ref"]
    assert not process_reward(noisy.log_probs, noisy.ref_log_probs, 1.0).equal(fine[1] - fine[0])
