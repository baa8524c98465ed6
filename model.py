"""Hugging Face causal LMs: build one from a config block or load one from a folder, shard it, score tokens, save.

A model from here behaves the same wherever it came from: fp32 weights, no dropout, a `generation_config` that holds
stop and pad ids and nothing else (sampling settings that a model ships with would silently change what is sampled),
and a method `token_log_probs` on the root module, in which backbone and head run together.

Under torchrun, FSDP2 keeps 1/shard of the weights, gradients and optimizer moments of every decoder layer and of the
root (embedding, head) on each rank, in fp32. A layer is gathered, in the compute type, just for its forward and its
backward; for sampling the whole model is gathered once per rollout (`gathered`).
"""

import copy
import hashlib
import inspect
import logging
import shutil
import warnings
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from infra.config import require_at_least
from infra.errors import BadInput, RunStopped, enough_memory
from infra.processes import all_reduce, on_first_rank, rank, world_size
from infra.rng import Draw, random_for

logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # or a mistyped path brings a dozen lines of retries
transformers_logging.disable_progress_bar()  # a bar per loaded file would bury the lines that matter

LOGITS_AT_ONCE = 2**25  # token_log_probs never holds more than this many logits: 128 MiB in fp32
PASSES = 4  # in which token_log_probs runs the responses of a micro-batch, by length: fewer pad more, more start more

SCRATCH = {  # the model that is built when model.path names none: 170k parameters
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


@dataclass
class ModelConfig:
    path: str = ""  # folder or Hub id of a saved model; empty: build one and warm it up
    scratch: dict = field(default_factory=dict)  # from scratch: keys of a transformers config that differ from SCRATCH
    attention: str = "sdpa"  # attention implementation of transformers: sdpa, eager, flash_attention_2
    dtype: str = "bfloat16"  # of compute on a GPU: bfloat16 or float32; master weights and reductions are always fp32
    gradient_checkpointing: bool = False  # keep one activation per layer and recompute the rest in the backward pass
    offload_reference: bool = False  # keep the reference's weights in host memory (GPU runs)
    shard: int = 0  # ranks that split a copy of the weights; 0: all of them
    replicate: int = 1  # copies of the weights (HSDP): with several nodes, shard inside a node, replicate across

    def __post_init__(self):
        require_at_least(0, self, "shard")
        require_at_least(1, self, "replicate")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={self.dtype!r} is not known: choose bfloat16 or float32")


def build(config: ModelConfig, tokenizer, seed: int):
    """A randomly initialised model of `config.scratch` for this tokenizer. Raises BadInput where there is no such."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings, known = SCRATCH | config.scratch, {}
    try:
        known = AutoConfig.for_model(settings["model_type"]).to_dict()
        hf_config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **ids, **settings})
        with torch.device("meta"):  # shapes alone: do they fit together?
            AutoModelForCausalLM.from_config(hf_config)(torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # each architecture checks its sizes in its own way
        reason = str(error).strip().splitlines()[0]
        raise BadInput(f"model.scratch={config.scratch}: transformers cannot build that: {reason}") from error
    if unknown := sorted(settings.keys() - known.keys() - {"model_type"}):
        raise BadInput(f"model.scratch: {settings['model_type']} has no {unknown[0]!r}")
    with torch.random.fork_rng(devices=[]):  # initialisation is the one user of torch's global generator
        torch.manual_seed(int(random_for(seed, Draw.WEIGHTS).integers(2**31)))
        try:
            options = {"dtype": torch.float32, "attn_implementation": config.attention}
            model = AutoModelForCausalLM.from_config(hf_config, **options)
        except (ImportError, ValueError) as error:
            raise BadInput(
                f"model.attention={config.attention}: {str(error).splitlines()[0]} (sdpa works anywhere)"
            ) from error
    return _prepare(model, tokenizer)


def load(path: str | Path, attention: str = "sdpa", empty: bool = False):
    """(model, tokenizer) from a folder or Hub id, in fp32. Raises BadInput where there is no causal LM.

    `empty`: read config.json and the tokenizer alone and make the model on the meta device, shapes without memory.
    """
    if (Path(path) / "config.yaml").exists() and (Path(path) / "checkpoints").exists():
        raise BadInput(f"{str(path)!r} is a run folder: did you mean {str(Path(path) / 'model')!r}?")
    if not Path(path).is_dir() and (Path(path).is_absolute() or len(Path(path).parts) > 2 or Path(path).exists()):
        raise BadInput(f"{str(path)!r} is neither a folder with a model nor a Hub id (NAME or ORGANISATION/NAME)")
    options = {"dtype": torch.float32, "attn_implementation": attention}
    try:
        hf_config = AutoConfig.from_pretrained(path)
        # AutoTokenizer would replace a generic tokenizer by the usual one of the model's type (Qwen2's, say).
        generic = get_tokenizer_config(path).get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)
        if empty:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(hf_config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "" if Path(path).is_dir() else "there is no such folder here, and the Hub gave none: "
        where += "" if attention == "sdpa" else f"with model.attention={attention} (sdpa works anywhere): "
        raise BadInput(f"no causal language model could be loaded from {str(path)!r}: {where}{reason}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise BadInput(f"{str(path)!r} has a model but no tokenizer: save the tokenizer beside it")
    return _prepare(model, tokenizer), tokenizer


def _prepare(model, tokenizer):
    shipped = model.generation_config
    stops: list[int] = []
    for ids in (shipped.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not stops:
        raise BadInput(f"{model.config.model_type}: neither model nor tokenizer names an end-of-sequence token")
    for knob in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, knob, None) not in (None, 1, 1.0):
            raise BadInput(f"{model.config.model_type} transforms its logits ({knob}), which token_log_probs does not")
    stops = sorted(set(stops))
    pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.shipped_generation_config = shipped
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad)
    model.token_log_probs = MethodType(_token_log_probs, model)
    model.response_states = MethodType(_response_states, model)
    # Rows of the head beyond the last id in use are padding: never sampled, and in no softmax.
    model.vocabulary = 1 + max(pad, *stops, *tokenizer.get_vocab().values())
    model.packs_rows = "flash" in model.config._attn_implementation  # variable-length kernels
    model.compute_device, model.recomputes = torch.device("cpu"), False  # until `shard` decides
    signature = inspect.signature(type(model).forward).parameters
    model.cache_argument = "cache" if "cache" in signature else "past_key_values"  # renamed in transformers 5.24
    # Rows of such a cache can be repeated, picked and grown; the states of recurrent and other layers need not be.
    model.divisible_cache = all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers)
    for module in model.modules():  # dropout has no place in a ratio of probabilities
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # the rates that modules pass to functions
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.eval()


def frozen(model):
    """The same model as a reference: no gradients, ever."""
    return model.requires_grad_(False)


def weights_hash(model) -> str:
    """sha256 over names and values of all weights of a model that is not sharded: says which reference a run has."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(model, tokenizer, folder: Path) -> None:
    """Write HF safetensors, config, tokenizer and the generation config the model came with to `folder`.

    All ranks call it: weights are gathered one by one, and only rank 0 holds them all, in host memory. The folder
    appears when it is complete.
    """
    whole = {}
    for name, parameter in model.named_parameters():  # a tied weight is listed once
        tensor = parameter.detach().full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        if rank() == 0:
            whole[name] = tensor.cpu()
    on_first_rank(lambda: _write_model(model, whole, tokenizer, folder))


def _write_model(model, weights, tokenizer, folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
    except SafetensorError as error:  # its I/O errors are no OSErrors
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunStopped(f"the model could not be written to {folder}: {error}; make room, then resume=true") from error
    # Not through save_pretrained, which refuses some published generation configs as inconsistent.
    model.shipped_generation_config.to_json_file(temporary / "generation_config.json")
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# --- sharding -----------------------------------------------------------------------------------------------------


def shard_size(config: ModelConfig) -> int:
    """Ranks that split one copy of the weights. Raises BadInput if shard x replicate is not the number of ranks."""
    split = config.shard or world_size() // config.replicate
    if split * config.replicate != world_size():
        raise BadInput(
            f"model.shard={config.shard} x model.replicate={config.replicate} does not make the {world_size()} ranks "
            "of this run"
        )
    return split


@enough_memory("load")
def shard(model, config: ModelConfig, device: torch.device, offload: bool = False):
    """Put the model on `device`, its weights split over the ranks by FSDP2 wherever there is a process group.

    Every rank comes with the whole model in host memory and leaves with its share. `offload` keeps that share in host
    memory (the reference's option).
    """
    model.compute_device = device  # where inputs go: the weights may be offloaded
    if config.gradient_checkpointing:
        with warnings.catch_warnings():  # the name is deprecated in the newest transformers, its successor not in older
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.recomputes = True
    split = shard_size(config)
    if not dist.is_initialized():
        return model.to(device)
    sizes, names = (split,), ("shard",)
    if config.replicate > 1:
        sizes, names = (config.replicate, split), ("replicate", "shard")
    on_gpu = device.type == "cuda"
    options = {
        "mesh": init_device_mesh(device.type, sizes, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.dtype) if on_gpu else None, reduce_dtype=torch.float32
        ),
        "offload_policy": CPUOffloadPolicy() if offload and on_gpu else OffloadPolicy(),
    }
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):  # transformers' name for a decoder layer's class
            fully_shard(module, **options)
    fully_shard(model, **options)
    for name in ("token_log_probs", "response_states"):
        register_fsdp_forward_method(model, name)
    return model


@contextmanager
def gathered(model):
    """Whole weights on every rank, for generation: gathered once here, not once per token.

    Costs the whole model in the compute type beside this rank's shards, until the block is left. While it lasts a
    forward pass needs no other rank, so ranks may run different numbers of them and cannot wait for each other: rows
    may stop at different lengths. All ranks must enter and leave together. Does nothing to a model not sharded.
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not model, recurse=False)  # FSDP2's own defaults
            module.reshard()


class _ScoreTokens(torch.autograd.Function):
    """Log-prob and entropy of each target under softmax(head(hidden) / temperature), LOGITS_AT_ONCE logits at a time.

    Given a reference's states and head too, also the exact KL(policy || reference) at each target's place.
    The backward pass makes each chunk's logits again: four matrix products instead of three, but [N, V] never exists.
    Gradients of the head are summed over chunks in fp32, or many chunks in bfloat16 would round them away.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, vocabulary, *reference):
        """hidden [N, H], weight [V, H], bias [V] or None, targets [N] -> log-probs, entropy, KL [N], fp32 at least.

        `reference`: its hidden, weight and bias, without gradient. Without it there is no third result.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy, normaliser = (torch.empty(len(hidden), dtype=dtype, device=hidden.device) for _ in range(3))
        kl = torch.empty_like(entropy) if reference else None
        theirs = _logits_by_chunk(*reference, temperature, vocabulary, dtype) if reference else None
        for here, logits in _logits_by_chunk(hidden, weight, bias, temperature, vocabulary, dtype):
            largest = logits.amax(-1)
            p = logits.sub_(largest[:, None]).exp()  # not yet normalised
            total = p.sum(-1)
            log_probs[here] = logits.gather(-1, targets[here, None])[:, 0] - total.log()
            entropy[here] = total.log() - torch.linalg.vecdot(p, logits) / total
            normaliser[here] = largest + total.log()
            if reference:
                gap = logits.sub_(next(theirs)[1].log_softmax(-1))
                kl[here] = torch.linalg.vecdot(p, gap) / total - total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, kl, *reference)
        ctx.temperature, ctx.vocabulary = temperature, vocabulary
        ctx.mark_non_differentiable(entropy)
        return (log_probs, entropy, kl) if reference else (log_probs, entropy)

    @staticmethod
    def backward(ctx, grad, _, grad_kl=None):
        hidden, weight, bias, targets, normaliser, kl, *reference = ctx.saved_tensors
        temperature, vocabulary = ctx.temperature, ctx.vocabulary
        theirs = _logits_by_chunk(*reference, temperature, vocabulary, grad.dtype) if reference else None
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for here, logits in _logits_by_chunk(hidden, weight, bias, temperature, vocabulary, grad.dtype):
            scale = grad[here, None] / temperature
            pull, logits = -scale, logits.sub_(normaliser[here, None])  # d log-prob = one-hot - softmax
            if reference:  # d KL = softmax x (log-ratio - KL)
                log_ratio = logits - next(theirs)[1].log_softmax(-1)
                pull = log_ratio.sub_(kl[here, None]).mul_(grad_kl[here, None] / temperature).sub_(scale)
            of_logits = logits.exp_().mul_(pull)
            of_logits = of_logits.scatter_add_(-1, targets[here, None], scale).to(hidden.dtype)
            torch.mm(of_logits, weight[:vocabulary], out=of_hidden[here])
            if of_weight.dtype == hidden.dtype:
                of_weight[:vocabulary].addmm_(of_logits.t(), hidden[here])
            else:
                of_weight[:vocabulary] += of_logits.t() @ hidden[here]
            if bias is not None:
                of_bias[:vocabulary] += of_logits.sum(0)
        of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, *[None] * (3 + len(reference))


def _logits_by_chunk(hidden, weight, bias, temperature, vocabulary, dtype):
    """Yields (slice of rows, their logits), at most LOGITS_AT_ONCE of them; the receiver may overwrite them."""
    chunk, bias = max(1, LOGITS_AT_ONCE // vocabulary), None if bias is None else bias[:vocabulary]
    for i in range(0, len(hidden), chunk):
        here = slice(i, min(i + chunk, len(hidden)))
        logits = F.linear(hidden[here], weight[:vocabulary], bias).to(dtype)
        yield here, logits if temperature == 1 else logits.div_(temperature)


def first_of_each_prompt(tokens, attention_mask, P: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens, attention_mask [B, >= P] -> (one row of each of the n different prompts [n], each row's prompt [B])."""
    mask = attention_mask[:, :P]
    _, source = torch.cat([tokens[:, :P] * mask, mask], 1).unique(dim=0, return_inverse=True)
    first = torch.empty(int(source.max()) + 1, dtype=torch.long, device=source.device)
    return first.scatter_(0, source, torch.arange(len(source), device=source.device)), source


def _states_of_rows(self, tokens, attention_mask, response_length):
    """The plain way: every row in full -> [N, H] states before the response tokens, and where in [B, T] they belong."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    states = self.base_model(tokens, attention_mask=attention_mask, position_ids=positions, use_cache=False)[0]
    rows, steps = attention_mask[:, -response_length:].nonzero(as_tuple=True)
    return states[rows, steps + tokens.shape[1] - response_length - 1], rows, steps


def _states_of_packed_rows(self, tokens, attention_mask, response_length):
    """The same without padding: rows end to end in one, which variable-length attention tells apart by positions."""
    rows, columns = attention_mask.nonzero(as_tuple=True)
    positions = (attention_mask.cumsum(1) - 1)[rows, columns]
    states = self.base_model(tokens[rows, columns][None], position_ids=positions[None], use_cache=False)[0][0]
    steps = columns - (tokens.shape[1] - response_length)
    responses = (steps >= 0).nonzero()[:, 0]
    return states[responses - 1], rows[responses], steps[responses]


def _states_of_groups(self, tokens, attention_mask, response_length):
    """The same, with each different prompt run once: its siblings continue from its keys and values.

    The gradient flows back through those into the prompt. The responses go in PASSES passes of similar length.
    """
    P = tokens.shape[1] - response_length
    first, source = first_of_each_prompt(tokens, attention_mask, P)
    prompts, prompt_mask = tokens[first, :P], attention_mask[first, :P]
    cache = DynamicCache(config=self.config)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    options = {"position_ids": positions, self.cache_argument: cache, "use_cache": True}
    states = [self.base_model(prompts, attention_mask=prompt_mask, **options)[0][source, -1]]
    rows, steps = [torch.arange(len(tokens), device=tokens.device)], [torch.zeros_like(source)]
    lengths = attention_mask[:, P:].sum(1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    for part in lengths.argsort(stable=True).tensor_split(1 if isinstance(self, FSDPModule) else PASSES):
        if not len(part):
            continue
        end = P + max(1, int(lengths[part].max()) - 1)  # nothing is predicted from the last token
        theirs = copy.copy(cache)
        theirs.layers = [copy.copy(layer) for layer in cache.layers]
        theirs.batch_select_indices(source[part])
        options = {"position_ids": positions[part, P:end], self.cache_argument: theirs, "use_cache": True}
        out = self.base_model(tokens[part, P:end], attention_mask=attention_mask[part, :end], **options)[0]
        row, step = attention_mask[part, P + 1 : end + 1].nonzero(as_tuple=True)
        states.append(out[row, step])
        rows.append(part[row])
        steps.append(step + 1)
    return torch.cat(states), torch.cat(rows), torch.cat(steps)


def _response_states(self, tokens, attention_mask, response_length):
    """(state before each response token [N, H], the token's row and step [N], weight and bias of the head)."""
    states_of = _states_of_packed_rows if self.packs_rows else _states_of_rows
    if shares_prompts(self):
        states_of = _states_of_groups
    self.train(self.recomputes and torch.is_grad_enabled())  # transformers recomputes in training mode alone
    hidden, rows, steps = states_of(self, tokens, attention_mask, response_length)
    self.eval()  # dropout is 0 in both modes, but generate would go without a cache in the other one
    head = self.get_output_embeddings()
    return hidden, rows, steps, head.weight, head.bias


def _token_log_probs(self, tokens, attention_mask, response_length, temperature, reference):
    hidden, rows, steps, *head = _response_states(self, tokens, attention_mask, response_length)
    if reference:  # whose pass may have gone through the tokens in another order
        states, their_rows, their_steps, *their_head = reference
        place = torch.empty(len(tokens), response_length, dtype=torch.long, device=tokens.device)
        place[their_rows, their_steps] = torch.arange(len(states), device=tokens.device)
        reference = (states[place[rows, steps]], *their_head)
    targets = tokens[:, -response_length:][rows, steps]
    scores = _ScoreTokens.apply(hidden, *head, targets, temperature, self.vocabulary, *reference)
    places = scores[0].new_zeros(len(tokens), response_length)
    return tuple(places.index_put((rows, steps), score) for score in scores)


def shares_prompts(model) -> bool:
    """Whether a forward pass runs a prompt once for all its siblings: needs keys and values that rows can share.

    Not while activations are recomputed, for transformers then keeps no keys and values, nor where rows are packed.
    """
    return model.divisible_cache and not model.packs_rows and not (model.recomputes and torch.is_grad_enabled())


def token_log_probs(
    model, tokens: torch.Tensor, attention_mask: torch.Tensor, response_length: int, temperature: float, reference=None
) -> tuple[torch.Tensor, ...]:
    """Log-prob of each of the last `response_length` tokens, and the entropy of the distribution it was drawn from.

    tokens, attention_mask [B, S] (prompts left-padded, responses right-padded) -> log_probs, entropy [B, T] in nats,
    fp32 at least, of softmax(logits / temperature); entropy carries no gradient; 0 at padding. The head is applied to
    response tokens only and to LOGITS_AT_ONCE logits at a time, so that [B, T, V] never exists, in neither direction.
    With a frozen `reference` model, also the exact KL(model || reference) of the two distributions [B, T].
    """
    states = ()
    if reference is not None:  # sharded, its head stays gathered after this pass, for the backward pass to use
        with torch.no_grad():
            states = reference.response_states(tokens, attention_mask, response_length)
    return model.token_log_probs(tokens, attention_mask, response_length, temperature, states)


def micro_batches(rollout, tokens: int, share: bool) -> list[torch.Tensor]:
    """Rows as index lists, each of at most `tokens` prompt and response tokens, padding included, but never empty.

    Similar lengths go together; so do siblings if they `share` their prompt, which then counts once. As many lists as a
    multiple of the ranks, so that all ranks run the same number of passes: the last ones may be empty.
    """
    P, B = rollout.tokens.shape[1] - rollout.mask.shape[1], len(rollout)
    lengths, prompts = rollout.mask.sum(1).tolist(), rollout.attention_mask[:, :P].sum(1).tolist()
    groups, longest = list(range(B)), defaultdict(int)
    if share and B:
        groups = first_of_each_prompt(rollout.tokens, rollout.attention_mask, P)[1].tolist()
    for group, length in zip(groups, lengths, strict=True):
        longest[group] = max(longest[group], length)

    def size(rows: list[int]) -> int:
        distinct = len({groups[i] for i in rows})
        return distinct * max(prompts[i] for i in rows) + len(rows) * max(lengths[i] for i in rows)

    lists: list[list[int]] = []
    for i in sorted(range(B), key=lambda i: (longest[groups[i]], groups[i], lengths[i])):
        if lists and size([*lists[-1], i]) <= tokens:
            lists[-1].append(i)
        else:
            lists.append([i])
    lists += [[]] * (-len(lists) % world_size())
    return [torch.tensor(rows, dtype=torch.long) for rows in lists]


def scored_micro_batches(model, rollout, temperature: float, tokens: int, reference=None):
    """`token_log_probs` of this rank's share of a Rollout, by micro-batch: yields (rows, log_probs, entropy[, KL]).

    Only the first T columns of a micro-batch exist, T being its longest response: index other [B, T] tensors with
    `x[rows, : log_probs.shape[1]]`. One micro-batch's graph can be freed before the next is built. An empty micro-batch
    scores a row that it does not yield: FSDP needs every rank in every pass.
    """
    for rows in micro_batches(rollout, tokens, shares_prompts(model))[rank() :: world_size()]:
        part = rollout.pick(rows if len(rows) else torch.tensor([0]))
        ids, attention_mask = (x.to(model.compute_device) for x in (part.tokens, part.attention_mask))
        scores = token_log_probs(model, ids, attention_mask, part.mask.shape[1], temperature, reference)
        yield rows, *(score[: len(rows)] for score in scores)
    if isinstance(reference, FSDPModule):
        reference.reshard()


@torch.no_grad()
def rollout_log_probs(model, rollout, temperature: float, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probs` of a whole Rollout, without gradients -> log_probs, entropy [B, T] on CPU; 0 where masked.

    The ranks share the rows; each row is scored by one of them and reaches the others exactly, as a sum with zeros.
    """
    whole = torch.zeros(2, *rollout.mask.shape)
    for rows, *scores in scored_micro_batches(model, rollout, temperature, tokens):
        for i, score in enumerate(scores):
            whole[i, rows, : score.shape[1]] = score.cpu().float()
    if isinstance(model, FSDPModule):
        model.reshard()  # the root stays gathered for a backward pass, which does not come here
    return tuple(all_reduce(whole))
