"""A model that the ranks split is read by each of them share by share, and is the model that is read whole."""

import resource
from pathlib import Path

import huggingface_hub
import infra.processes
import model
import pytest
import torch
from infra.errors import BadInput
from infra.sharding import shard
from model import ModelConfig, load, weights_hash
from safetensors.torch import load_file, save_file
from spro import Batch
from tasks.chain import chain_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import chaos
from helpers import LLAMA, PROMPTS, SIZES, hf_model, saved
from test_model import with_router_bias


def saved_as(kind: str, folder: Path) -> Path:
    """A model in one of the ways in which models are published."""
    if kind == "glm4_moe":
        return saved(with_router_bias(kind), folder)
    if kind in SIZES:
        return saved(hf_model(kind, **SIZES[kind]), folder)
    if kind == "scaled logits":
        return saved(hf_model("granite", **LLAMA, logits_scaling=3.0), folder)
    if kind == "long context":  # whose rotary tables are no plain ones
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
        return saved(hf_model("qwen2", **LLAMA, rope_parameters=scaling), folder)
    made = hf_model("llama", **LLAMA, tie_word_embeddings=kind in ("tied", "a copy of the head"))
    made.generation_config.eos_token_id = [2, 7]
    if kind == "bfloat16":
        made = made.to(torch.bfloat16)
    saved(made, folder)
    if kind == "several files":
        (folder / "model.safetensors").unlink()
        made.save_pretrained(folder, max_shard_size="20KB")
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(made.state_dict(), folder / "pytorch_model.bin")
    tensors = load_file(folder / "model.safetensors") if kind in RENAMED else None
    if kind == "no prefix":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if kind == "a copy of the head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if kind == "another file":
        save_file(tensors, folder / "consolidated.safetensors")
    if tensors:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


RENAMED = {
    "no prefix": "do not name the tensors as the model does",
    "a copy of the head": "do not name the tensors as the model does (lm_head.weight)",
    "another file": "holds other safetensors files too (consolidated.safetensors)",
}
READ_WHOLE = RENAMED | {
    "bin": "it has no safetensors files",
    "glm4_moe": "do not name the tensors as the model does (model.layers.1.mlp.experts.0.",
}
KINDS = ("tied", "untied", "bfloat16", "several files", "long context", *SIZES, "scaled logits", *READ_WHOLE)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_same(one, two) -> None:
    """Two policies: the same tensors to the last bit, buffers that nobody saves too, and the same settings."""
    for way in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(one.model, way)()), dict(getattr(two.model, way)())
        assert list(expected) == list(found)
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype and whole(tensor).equal(whole(found[name])), name
    tied = [p.model.get_output_embeddings().weight is p.model.get_input_embeddings().weight for p in (one, two)]
    assert tied[0] == tied[1] and one.stop_ids == two.stop_ids and one.pad_id == two.pad_id
    assert one.config.to_dict() == two.config.to_dict()
    assert one.shipped_generation_config.to_dict() == two.shipped_generation_config.to_dict()


def read_both_ways(folders: dict[str, Path]) -> None:
    device = infra.processes.start_processes(timeout_minutes=2)
    batch = Batch.from_texts([PROMPTS[1], PROMPTS[0]], ["b1+2=3;#3", "#7"], chain_tokenizer())
    for kind, folder in folders.items():
        infra.processes.print0(f"{kind}:")
        one, two = load(folder), load(folder, in_shares=True)
        assert (two.unread is None) == (kind in READ_WHOLE), kind
        assert weights_hash(one) == weights_hash(two), kind
        one, two = (shard(policy, ModelConfig(), device) for policy in (one, two))
        assert all(isinstance(parameter, DTensor) for parameter in two.parameters())
        assert_same(one, two)
        with torch.no_grad():
            values = [model.token_log_probs(policy, batch, 1.0).log_probs for policy in (one, two)]
        assert torch.equal(*values), (kind, values)
        assert one.has_plain_head == two.has_plain_head == (kind != "scaled logits"), kind


@pytest.fixture(scope="module")
def read_by_two(tmp_path_factory) -> dict[str, str]:
    """What two processes have said while they compared both ways, by kind; nothing may differ."""
    folder = tmp_path_factory.mktemp("models")
    folders = {kind: saved_as(kind, folder / kind) for kind in KINDS}
    code = chaos.exit_code(chaos.fork(read_both_ways, (folders,), 2, folder / "log"), 200)
    words = (folder / "log").read_text()
    assert code == 0, words
    return {kind: words.split(f"{kind}:\n")[1].split(":\n")[0] for kind in folders}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in READ_WHOLE])
def test_a_model_read_in_shares_is_the_model_read_whole(kind, read_by_two):
    assert "into host memory" not in read_by_two[kind]


@pytest.mark.parametrize("kind", READ_WHOLE)
def test_what_cannot_be_read_in_shares_is_read_whole_and_one_line_says_why(kind, read_by_two):
    said = [line for line in read_by_two[kind].splitlines() if "into host memory" in line]
    assert len(said) == 1 and READ_WHOLE[kind] in said[0]


def test_a_model_that_scales_its_logits_is_found_out_at_its_first_pass(read_by_two):
    assert read_by_two["scaled logits"].count("log-probs of this model by the plain path") == 1


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("in_shares", [False, True])
def test_a_model_that_lacks_a_tensor_is_refused_in_one_line(name, in_shares, tmp_path, capsys):
    folder = saved_as("untied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=rf"lacks 1 of its model's tensors, such as '{name}'[^\n]*$"):
        load(folder, in_shares=in_shares)


def test_a_tensor_of_another_shape_is_refused_in_one_line(tmp_path):
    folder = saved_as("untied", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(5)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"no causal language model could be loaded from [^\n]*$"):
        load(folder, in_shares=True)


def test_a_hub_id_is_read_in_shares_from_where_the_hub_put_it(tmp_path, monkeypatch):
    commit, cache = "1" * 40, tmp_path / "models--someone--model"
    folder = saved_as("several files", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    policy = load("someone/model", in_shares=True)
    assert policy.unread == folder and policy.model.device.type == "meta"
    assert weights_hash(policy) == weights_hash(load(folder))


def peak_of_loading(folder: Path, in_shares: bool, log: Path) -> None:
    device = infra.processes.start_processes(timeout_minutes=2)
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard(load(folder, in_shares=in_shares), ModelConfig(), device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle
    (log / f"{in_shares}{infra.processes.rank()}").write_text(str(used))


def test_reading_in_shares_takes_less_than_half_of_the_memory(tmp_path):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=30000, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = saved(made, tmp_path / "model")
    for in_shares in (False, True):
        work = (folder, in_shares, tmp_path)
        assert chaos.exit_code(chaos.fork(peak_of_loading, work, 2, tmp_path / "log"), 100) == 0
    for rank in range(2):
        old, new = (int((tmp_path / f"{way}{rank}").read_text()) for way in (False, True))
        assert new < old / 2
