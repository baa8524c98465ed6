"""Several processes: they compute what one computes, save what one can load, and cannot wait for each other in vain."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import data
import infra.checkpoints
import infra.errors
import infra.processes
import model
import pytest
import torch
import train
from baselines.diagnostics import compare_gradients
from data import encode_prompts
from infra.sharding import shard, unsharded
from model import ModelConfig
from safetensors.torch import load_file, save_file
from sample import SampleConfig, sample
from spro import Batch
from tasks.chain import chain_tokenizer
from tasks.problem import Problem

import chaos
from conftest import TINY, as_of, checkpoints, finished, ran, started
from helpers import PROMPTS, keys, one_update, saved, tiny_model
from test_model import router_bias, with_router_bias

# --- one step, by hand --------------------------------------------------------------------------------------------

LAYOUTS = {  # of two processes; the single one computes the first
    "one process": ModelConfig(),
    "sharded": ModelConfig(shard=2),
    "replicated": ModelConfig(replicate=2),
    "sharded, recomputing": ModelConfig(gradient_checkpointing=True),
}


def gradients(layout: str, micro_batch_tokens: int) -> dict[str, torch.Tensor]:
    """Every gradient and statistic of one policy update on a made-up batch, and the batch that it sampled before.

    Nine responses of different lengths: in micro-batches of 1, two processes have 5 and 4, so one pass is for nothing.
    """
    found = {}
    policy = shard(tiny_model(), LAYOUTS[layout], torch.device("cpu"))
    with unsharded(policy):
        sampled = sample(policy, PROMPTS[:2], keys(2), SampleConfig(group_size=3, max_new_tokens=40))
    texts = ["b1+2=3;#3", "#7", "b1+2=4;c4*5=0;d0-1=9;#9", "", "b9*9=1;(b9*9=1)#", "#1", "b1", "#", "b2+2=4;#4"]
    batch = Batch.from_texts([PROMPTS[i] for i in (0, 1, 1, 0, 5, 2, 2, 1, 0)], texts, chain_tokenizer())
    log_probs, _ = model.batch_log_probs(policy, batch, 1.0, micro_batch_tokens)

    policy = shard(tiny_model().double(), LAYOUTS[layout], torch.device("cpu"))  # fp32's noise exceeds 1e-6
    source, shape = torch.Generator().manual_seed(0), batch.mask.shape
    with torch.no_grad():
        old = model.token_log_probs(tiny_model(), batch, 1.0).log_probs
    old += 0.2 * torch.randn(shape, generator=source)  # so that some ratios are clipped
    advantages = torch.randn(shape, generator=source).masked_fill(~batch.mask, 0)
    batch = replace(batch, log_probs=old, ref_log_probs=old - 0.5)

    config = train.Config()
    config.sample.group_size = 3
    config.train.micro_batch_tokens = micro_batch_tokens
    reference = model.freeze(tiny_model(seed=1).double())
    reference = shard(reference, LAYOUTS[layout], torch.device("cpu"))
    for kl_coef, estimator in ((0.0, "exact"), (0.3, "exact"), (0.3, "k3")):
        config.algorithm.kl_coef, config.algorithm.kl_estimator = kl_coef, estimator
        given, row = one_update(policy, config, batch, advantages, reference)
        stats = {key: row[key] for key in ("loss", "kl/old", "clip_fraction", "ratio/max", "kl/loss") if key in row}
        found |= {f"{kl_coef} {estimator} {name}": gradient for name, gradient in given.items()}
        found |= {f"{kl_coef} {estimator} {key}": torch.tensor(value).double() for key, value in stats.items()}
    both = replace(batch, advantages=advantages + advantages.roll(1, 0).masked_fill(~batch.mask, 0))
    compared = compare_gradients(policy, config, both, advantages)
    found |= {key: torch.tensor(value, dtype=torch.float64) for key, value in compared.items()}
    found |= {"sampled tokens": sampled.tokens, "sampled mask": sampled.mask, "log-probs": log_probs}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def gradients_of_ranks(folder) -> None:
    infra.processes.start_processes(timeout_minutes=1)
    for layout in list(LAYOUTS)[1:]:
        for tokens in (1, 1000):
            save_file(gradients(layout, tokens), folder / f"{layout}, {tokens}, rank {infra.processes.rank()}")


@pytest.fixture(scope="module")
def one():
    return gradients("one process", 1000)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """The folder in which two processes have left their `gradients`, for each layout and micro-batch budget."""
    folder = tmp_path_factory.mktemp("gradients")
    process = chaos.fork(gradients_of_ranks, (folder,), 2, folder / "log")
    assert chaos.exit_code(process, 120) == 0, (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
def test_two_processes_have_the_gradients_the_losses_and_the_samples_of_one(layout, micro_batch_tokens, one, of_ranks):
    lengths = one["sampled mask"].sum(1)
    assert {"gradient/cosine", "gradient/norm_ratio", "0.3 exact kl/loss"} < one.keys()
    assert lengths[:3].max() != lengths[3:].max()  # one process has sampled its rows before the other has
    for rank in range(2):
        two = load_file(of_ranks / f"{layout}, {micro_batch_tokens}, rank {rank}")
        assert two.keys() == one.keys()
        for name, expected in one.items():
            if name.startswith("sampled"):
                assert torch.equal(two[name], expected)
            else:
                assert (two[name] - expected).norm() <= 1e-6 * expected.norm(), name


def encoded_prompts() -> list:
    """Prompts of many lengths, some of them too long, one with a control token in its text."""
    texts = [f"{i}b+{i % 7}c*2?" * (1 + i % 5) for i in range(23)] + ["3b<eos>+5?"]
    problems = [Problem(text, "1", "chain") for text in texts]
    fitting, ids = encode_prompts(problems, chain_tokenizer(), limit=40)
    return [[problem.prompt for problem in fitting], list(ids)]


def encode_in_parts(folder) -> None:
    infra.processes.start_processes(timeout_minutes=1)
    data.AT_ONCE = 9
    (folder / str(infra.processes.rank())).write_text(json.dumps(encoded_prompts()))
    with pytest.raises(infra.errors.BadInput, match="this is not the model's tokenizer"):  # on both: neither waits
        encode_prompts([Problem("3b+5?", "8", "chain")], chain_tokenizer(), 40, known_ids=5)


def test_two_processes_encode_half_of_the_prompts_each_and_have_those_of_one(tmp_path, capsys):
    expected, said = encoded_prompts(), capsys.readouterr().out
    code = chaos.exit_code(chaos.fork(encode_in_parts, (tmp_path,), 2, tmp_path / "log"), 60)
    assert code == 0 and "left out" in said and (tmp_path / "log").read_text() == said
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [expected, expected]


# --- sampling while the weights are gathered ----------------------------------------------------------------------


def samples_as_weights_change(policy) -> dict[str, torch.Tensor]:
    """What the policy samples before and after each of two changes of its weights."""
    found = {}
    for change in range(3):
        with unsharded(policy):
            batch = sample(policy, PROMPTS, keys(6), SampleConfig(group_size=3, max_new_tokens=20))
            if policy.twin:
                weight = policy.twin[0].get_input_embeddings().weight
                lent = policy.model.get_input_embeddings().weight
                assert weight.data_ptr() == lent.data_ptr(), "the twin has weights of its own"
        found |= {f"tokens {change}": batch.tokens, f"log-probs {change}": batch.sampler_log_probs}
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
    return found


def samples_of_ranks(folder) -> None:
    infra.processes.start_processes(timeout_minutes=1)
    for layout in ("sharded", "replicated"):
        policy = shard(tiny_model(), LAYOUTS[layout], torch.device("cpu"))
        passes, lent = [], []
        policy.model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))  # noqa: B023
        with unsharded(policy):
            lent += [weight.untyped_storage() for weight in policy.twin[0].parameters()]
            assert all(storage.size() for storage in lent)
        if layout == "sharded":
            assert not any(storage.size() for storage in lent), "the weights stay gathered"
        save_file(samples_as_weights_change(policy), folder / f"{layout}, rank {infra.processes.rank()}")
        assert not passes, "a layer of FSDP's has run"
        assert not policy.twin and all(type(p).__name__ == "DTensor" for p in policy.parameters())


def test_a_sharded_policy_samples_by_a_twin_of_its_gathered_weights_what_one_process_samples(tmp_path):
    process = chaos.fork(samples_of_ranks, (tmp_path,), 2, tmp_path / "log")
    assert chaos.exit_code(process, 120) == 0, (tmp_path / "log").read_text()
    expected = samples_as_weights_change(tiny_model())
    assert not expected["tokens 0"].equal(expected["tokens 1"])
    for layout in ("sharded", "replicated"):
        for rank in range(2):
            found = load_file(tmp_path / f"{layout}, rank {rank}")
            for name, values in expected.items():
                assert found[name].shape == values.shape, name
                torch.testing.assert_close(found[name], values, atol=1e-5, rtol=0)


# --- whole runs ---------------------------------------------------------------------------------------------------

LOSS_LIKE = (
    "loss",
    "kl/",
    "grad_norm",
    "clip_fraction",
    "advantage/step_abs",
    "gradient/",
)  # differences of almost equal numbers
COUNTED = ("step", "reward/", "groups/", "response_length/", "eval/", "updates/")


def assert_alike(one: list[dict], two: list[dict]) -> None:
    """Equal up to fp32 noise, and exactly equal in what is counted."""
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for expected, row in zip(one, two, strict=True):
        assert expected.keys() == row.keys()
        for key in expected.keys() - {"sampler_gap"}:  # which is noise itself
            exact, rtol = key.startswith(COUNTED), 1e-3 if key.startswith(LOSS_LIKE) else 1e-4
            close = pytest.approx(expected[key], rel=0 if exact else rtol, abs=0 if exact else 1e-6)
            assert row[key] == close, f"step {row['step']}: {key}"


def learned_rows(run_dir) -> list[dict]:
    """The lines of step 4's dump that were learned from."""
    rows = [json.loads(line) for line in (run_dir / "samples" / "step_000004.jsonl").read_text().splitlines()]
    return [row for row in rows if "advantage" in row]


def assert_a_kill_in_step_4_changes_nothing(straight, folder, arguments, on: str, n: int, ranks: int = 1) -> None:
    """A run into `folder`, killed at the n-th moment `on` of step 4, goes on after step 2 and ends as `straight`."""
    code, words = ran(folder, *arguments, "resume=true", ranks=ranks, on=on, step=4, n=n, does="kill")
    assert code == -9, words
    assert "going on after step 2" in finished(folder, *arguments, "resume=true", ranks=ranks)
    if ranks == 1:
        assert chaos.differences(straight, folder) == []
    else:
        assert_alike(chaos.metrics(straight), chaos.metrics(folder))


def texts(run_dir) -> list[str]:
    files = sorted((run_dir / "samples").iterdir())
    return [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]


def save_sharded(start, folder) -> None:
    """A model whose buffers training has moved, sharded; saved, put into a checkpoint, and brought back from it."""
    device = infra.processes.start_processes(timeout_minutes=5)
    policies = [shard(model.load(start), ModelConfig(), device) for _ in range(2)]
    optimizers = [model.make_optimizer(policy, train.TrainConfig()) for policy in policies]
    first, second = ({"policy": pair} for pair in zip(policies, optimizers, strict=True))
    router_bias(policies[0].model)[0].add_(0.5)
    model.save(policies[0], folder / "model")
    infra.checkpoints.save_checkpoint(folder, 1, first, {}, keep=1)
    infra.checkpoints.load_checkpoint(folder / "checkpoints" / "step_000001", second)
    assert router_bias(policies[1].model)[0].equal(router_bias(policies[0].model)[0])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_kind_26_a_sharded_model_keeps_its_buffers(kind, ranks, tmp_path):
    original = with_router_bias(kind)
    start, log = saved(original, tmp_path / "start"), tmp_path / "log"
    assert chaos.exit_code(chaos.fork(save_sharded, (start, tmp_path / "run"), ranks, log), 120) == 0, log.read_text()
    router_bias(original)[0].add_(0.5)
    again, tokens = model.load(tmp_path / "run" / "model"), torch.tensor([PROMPTS[1]])
    assert router_bias(again.model)[0].equal(router_bias(original)[0])
    assert again.model(tokens).logits.equal(original(tokens).logits)


def save_in_small_files(start, folder) -> None:
    """A checkpoint of many files, hashed by the two processes and verified by them; each lists what it has hashed."""
    device = infra.processes.start_processes(timeout_minutes=5)
    policies = [shard(model.load(start), ModelConfig(), device) for _ in range(2)]
    first, second = ({"policy": (policy, model.make_optimizer(policy, train.TrainConfig()))} for policy in policies)
    with torch.no_grad():
        policies[0].model.lm_head.weight.mul_(2)
    hashed, real = [], infra.checkpoints._sha256
    infra.checkpoints._sha256 = lambda file: hashed.append(file.name) or real(file)
    infra.checkpoints.FILE_BYTES = 20_000
    infra.checkpoints.save_checkpoint(folder, 1, first, {}, keep=1)
    written = list(hashed)
    infra.checkpoints.load_checkpoint(infra.checkpoints.newest_checkpoint(folder), second)
    both = zip(policies[0].parameters(), policies[1].parameters(), strict=True)
    assert all(one.to_local().equal(two.to_local()) for one, two in both)
    (folder / f"hashed{infra.processes.rank()}").write_text(json.dumps([written, hashed[len(written) :]]))


def test_each_process_hashes_the_files_that_it_wrote_and_verifies_its_part(tmp_path):
    start, log = saved(tiny_model(architecture="llama"), tmp_path / "start"), tmp_path / "log"
    assert chaos.exit_code(chaos.fork(save_in_small_files, (start, tmp_path), 2, log), 120) == 0, log.read_text()
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = sorted(file.name for file in checkpoint.iterdir() if file.name != "manifest.json")
    assert list(manifest) == names and len(names) > 10
    for name, entry in manifest.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert len(content) < 60_000
    parts = [json.loads((tmp_path / f"hashed{rank}").read_text()) for rank in range(2)]
    for rank, (written, _) in enumerate(parts):
        assert [name for name in written if name != "state.json"] == [n for n in names if f"shard-0000{rank + 1}" in n]
    verified = [name for _, part in parts for name in part]
    assert sorted(verified) == names and abs(len(parts[0][1]) - len(parts[1][1])) <= 1


@pytest.fixture(scope="module")
def hanging(warm, tmp_path_factory):
    """A run whose second process never comes back from grading, started early: it has to give up by itself."""
    folder = tmp_path_factory.mktemp("hanging") / "run"
    return started(folder, warm, "train.timeout_minutes=0.1", ranks=2, rank=1, on="reward", step=1, does="hang"), folder


@pytest.fixture(scope="module")
def alone(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    finished(folder, warm, "train.keep_checkpoints=9")
    return folder


@pytest.fixture(scope="module")
def together(warm, tmp_path_factory, hanging):
    """The run of `alone` on two processes, by torchrun itself."""
    folder = tmp_path_factory.mktemp("together") / "run"
    arguments = [*TINY, f"run_dir={folder}", warm, "train.keep_checkpoints=9"]
    code = chaos.exit_code(chaos.start(arguments, folder.with_name("run.log"), ranks=2))
    assert code == 0, folder.with_name("run.log").read_text()
    return folder


def test_two_processes_have_the_metrics_and_the_texts_of_one(alone, together):
    assert_alike(chaos.metrics(alone), chaos.metrics(together))
    assert texts(alone) == texts(together)
    assert len(list((together / "checkpoints" / "step_000010").glob("*.safetensors"))) == 2


def test_a_checkpoint_of_two_processes_goes_on_on_one(alone, together, warm, tmp_path):
    folder = as_of(4, together, tmp_path / "run")
    said = finished(folder, warm, "resume=true")
    assert "going on after step 4" in said and said.count("ranks: 2 -> 1: sums are rounded otherwise") == 1
    assert_alike(chaos.metrics(alone), chaos.metrics(folder))


def test_a_checkpoint_of_one_process_goes_on_on_two(alone, warm, tmp_path):
    folder = as_of(4, alone, tmp_path / "run")
    assert "going on after step 4" in finished(folder, warm, "resume=true", ranks=2)
    assert_alike(chaos.metrics(alone), chaos.metrics(folder))


def test_recomputing_activations_changes_no_metric(alone, warm, tmp_path):
    finished(tmp_path / "run", warm, "model.gradient_checkpointing=true", ranks=2)
    assert_alike(chaos.metrics(alone), chaos.metrics(tmp_path / "run"))


def test_a_kl_term_and_compared_gradients_are_those_of_one_process(warm, tmp_path):
    extras = ("algorithm.kl_coef=0.05", "train.diagnose_every=2", "train.steps=4")
    for ranks in (1, 2):
        finished(tmp_path / str(ranks), warm, *extras, ranks=ranks)
    one, two = (chaos.metrics(tmp_path / name) for name in "12")
    assert_alike(one, two)
    assert all("kl/loss" in row for row in one[1:]) and {"gradient/cosine", "gradient/norm_ratio"} <= one[4].keys()


def test_a_model_whose_first_pass_is_an_update_is_compared_there(warm, tmp_path):
    """The sampler's log-probs are kept and there is no reference: nothing is scored before the first gradient."""
    extras = ("train.old_log_probs=sampler", "algorithm.advantage=grpo", "train.steps=3")
    for ranks in (1, 2):
        finished(tmp_path / str(ranks), warm, *extras, ranks=ranks)
    assert_alike(*(chaos.metrics(tmp_path / name) for name in "12"))


def test_two_nodes_that_each_hold_a_copy_train_as_one_process_does(alone, warm, tmp_path):
    """Two torchruns on the loopback device, three steps."""
    meet, running = str(chaos.free_port()), []
    for node in "01":
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", node]
        command += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", meet]
        command += [str(chaos.ROOT / "train.py"), *TINY, f"run_dir={tmp_path / 'run'}", warm]
        with (tmp_path / f"log{node}").open("w") as out:
            options = {"stdout": out, "stderr": out, "env": os.environ | chaos.AT_ONCE, "start_new_session": True}
            running.append(subprocess.Popen([*command, "train.steps=3", "model.replicate=2"], **options))
    codes = [chaos.exit_code(process, 120) for process in running]
    assert codes == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert_alike(chaos.metrics(alone)[:3], chaos.metrics(tmp_path / "run")[:3])
    assert chaos.metrics(tmp_path / "run")[3]["step"] == 3 and checkpoints(tmp_path / "run")


def test_a_layout_that_does_not_fit_the_processes_is_refused_in_one_line(warm, tmp_path):
    code, words = ran(tmp_path / "run", warm, "model.shard=3", ranks=2)
    said = [line for line in words.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(said) == 1 and "model.shard=3" in said[0] and "Traceback" not in words, words


def test_a_signal_to_one_process_stops_both_and_they_go_on_as_if_nothing_had_been(together, warm, tmp_path):
    folder, arguments = tmp_path / "run", (warm, "resume=true", "train.save_every=100")
    code, words = ran(folder, *arguments, ranks=2, rank=1, on="backward", step=3, does="SIGTERM")
    assert code == infra.errors.EXIT_STOPPED and "saved after step 3 of 10" in words, words
    finished(folder, *arguments, ranks=2)
    assert chaos.differences(together, folder) == []


def test_a_full_disk_on_one_process_ends_both_with_one_line_and_loses_nothing(warm, tmp_path):
    code, words = ran(tmp_path / "run", warm, ranks=2, rank=1, on="reward", step=4, does="small disk")
    said = [line for line in words.splitlines() if line.startswith("stopped: ")]
    assert code == infra.errors.EXIT_FAILED and len(said) == 1 and "Traceback" not in words, words
    assert "the checkpoint of step 4 could not be written" in said[0] and "File too large" in said[0]
    assert checkpoints(tmp_path / "run") == ["step_000002"]
    assert infra.checkpoints.newest_checkpoint(tmp_path / "run").name == "step_000002"


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_any_moment_change_nothing(ranks, warm, tmp_path):
    assert chaos.chaos(tmp_path, kills=5, ranks=ranks, seed=ranks, arguments=[*TINY, warm], forked=True) == []


def test_a_process_that_hangs_has_every_process_show_where_it_stands_and_ends_the_run(hanging):
    process, folder = hanging
    code = chaos.exit_code(process, 90)
    words = folder.with_name("run.log").read_text()
    assert code != 0 and words.count("Timeout (0:00:06)!") >= 2, words
    # Both write into one log at the same time, piece by piece: a function's name is such a piece
    dumps = words.split("Timeout (0:00:06)!", 1)[1]
    assert "counted" in dumps  # the one that hangs, in the wrapped grader
    assert "all_gather_object" in dumps and "map_over_ranks" in dumps  # the one that waits for it
