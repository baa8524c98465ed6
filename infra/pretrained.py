"""Models as others saved them: a folder or a Hub id, read whole or share by share.

Where the ranks split the weights, none needs them all: the model is made on the meta device, shapes
without memory, split, and each rank reads its share of every tensor straight from the safetensors
files. That needs files that name the model's tensors as the model does. transformers renames and
joins the tensors of some checkpoints while it loads them: those are read whole, as is every other
format.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from infra.checkpoints import saved_tensors
from infra.errors import BadInput, is_out_of_memory
from infra.processes import print0

NONE_IF_MISSING = {"_raise_exceptions_for_missing_entries": False}  # of cached_file
UNREADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)


def read_model(path: str | Path, attention: str, empty: bool = False, in_shares: bool = False):
    """(model, tokenizer, None or the folder of what is still unread) of a folder or Hub id, in
    fp32.

    `empty`: config.json and the tokenizer alone, and the model on the meta device. `in_shares`: the
    same where its files can be read share by share, once it is split (`read_shares`); elsewhere all
    of it now, with a line that says why. Raises BadInput where there is no whole causal LM.
    """
    require_model(path)
    attention = attention_made_with(attention)
    # A mistyped path brings a dozen lines of retries
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # A bar per loaded file would bury the lines that matter
    transformers_logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": attention}
    unread, lacking = None, []
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = read_tokenizer(path)
        if empty or in_shares:
            model = empty_model(path, config, options)
        if in_shares and not empty:
            unread = folder_to_share(path, model)
        if not empty and unread is None:
            model, found = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, **options
            )
            lacking = sorted(found["missing_keys"])
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = (
            "" if Path(path).is_dir() else "there is no such folder here, and the Hub gave none: "
        )
        where += (
            ""
            if attention == "sdpa"
            else f"with model.attention={attention} (sdpa works anywhere): "
        )
        raise BadInput(
            f"no causal language model could be loaded from {str(path)!r}: {where}{reason}"
        ) from error
    if lacking:  # transformers would draw them at random
        raise BadInput(
            f"{str(path)!r} lacks {len(lacking)} of its model's tensors, such as {lacking[0]!r}: "
            "save the whole model there"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BadInput(f"{str(path)!r} has a model but no tokenizer: save the tokenizer beside it")
    return model, tokenizer, unread


def attention_made_with(attention: str) -> str:
    """auto begins as sdpa; infra.sharding.shard may go on from there."""
    return "sdpa" if attention == "auto" else attention


def require_model(path: str | Path) -> None:
    """Raises BadInput where a path can be no model's."""
    if (Path(path) / "config.yaml").exists() and (Path(path) / "checkpoints").exists():
        raise BadInput(
            f"{str(path)!r} is a run folder: did you mean {str(Path(path) / 'model')!r}?"
        )
    if not Path(path).is_dir() and (
        Path(path).is_absolute() or len(Path(path).parts) > 2 or Path(path).exists()
    ):
        raise BadInput(
            f"{str(path)!r} is neither a folder with a model nor a Hub id (NAME or "
            "ORGANISATION/NAME)"
        )


def read_tokenizer(path: str | Path):
    # AutoTokenizer would replace a generic tokenizer by the usual one of the model's type
    # (Qwen2's, say).
    generic = get_tokenizer_config(path).get("tokenizer_class") in (
        "TokenizersBackend",
        "PreTrainedTokenizerFast",
    )
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)


def empty_model(path: str | Path, config, options: dict):
    """The model on the meta device, with the generation config that it came with."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:  # an old model: config.json holds what there is
        model.generation_config = GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True
        )
    return model.eval()


# --- share by share -------------------------------------------------------------------------------


def folder_to_share(path: str | Path, model) -> Path | None:
    """The folder from which each rank can read its share of `model`; None, and a line that says
    why, where all of it must be read at once.
    """
    files = safetensors_files(path)
    why = why_not_in_shares(files, model)
    if why is None:
        return files[0].parent
    print0(f"{path}: every rank reads the whole model into host memory, for {why}")
    return None


def safetensors_files(path: str | Path) -> list[Path]:
    """The model's safetensors files, from the Hub if they are not here; none where it has others.

    As transformers looks for them: one file, or those that an index lists.
    """
    if single := cached_file(path, "model.safetensors", **NONE_IF_MISSING):
        return [Path(single)]
    index = cached_file(path, "model.safetensors.index.json", **NONE_IF_MISSING)
    if index is None:
        return []
    return sorted(map(Path, get_checkpoint_shard_files(path, index)[0]))


def why_not_in_shares(files: list[Path], model) -> str | None:
    """What keeps `files` from being read tensor by tensor into `model`; None if nothing does."""
    if not files:
        return "it has no safetensors files"
    # Those beside them would be read too
    others = set(files[0].parent.glob("*.safetensors")) - set(files)
    if others:
        return f"its folder holds other safetensors files too ({min(others).name})"
    stored: dict[str, tuple] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118  (it is no dict)
                stored[name] = tuple(content.get_slice(name).get_shape())
    wanted = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
    different = sorted(name for name, _ in wanted.items() ^ stored.items())
    if different:
        return f"its files do not name the tensors as the model does ({different[0]})"
    return None


class OneByOne(dcp.HuggingFaceStorageReader):
    """Opens a file for one tensor at a time: while it is open, what has been read of it counts as
    memory of this process.
    """

    def read_data(self, plan, planner):
        for item in plan.items:
            super().read_data(replace(plan, items=[item]), planner)
        return super().read_data(replace(plan, items=[]), planner)


def read_shares(model, folder: Path) -> None:
    """Fill a model that has memory but no values: each rank reads its share of every tensor.

    Values of another type are converted one by one. All ranks call it.
    """
    model.tie_weights()
    tensors = {name: tensor.detach() for name, tensor in saved_tensors(model).items()}
    dcp.load(tensors, storage_reader=OneByOne(str(folder)))
    # What is not saved is made anew, such as rotary tables: transformers does so wherever it has
    # not been told that a tensor has its values.
    for tensor in saved_tensors(model).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


def stored_tensors(
    folder: Path, like: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all of `like`, in its order and types, one at a time from the files."""
    place = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            place |= dict.fromkeys(content.keys(), file)
    for name, tensor in like.items():
        with safe_open(place[name], framework="pt") as content:
            yield name, content.get_tensor(name).to(tensor.dtype)
