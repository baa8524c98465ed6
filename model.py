"""The policy: a Hugging Face causal LM, built or loaded, sharded, asked for log-probs, saved.

A `Policy` behaves the same wherever its model came from: fp32 weights, no dropout, a
`generation_config` that holds stop and pad ids and nothing else (sampling settings that a model
ships with would silently change what is sampled).

Under torchrun, FSDP2 keeps 1/shard of the weights, gradients and optimizer moments of every decoder
layer and of the root (embedding, head) on each rank, in fp32. A layer is gathered, in the compute
type, just for its forward and its backward; for sampling the whole model is gathered once per
rollout (`unsharded`).
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from data import micro_batch_rows
from infra.checkpoints import saved_tensors
from infra.config import Block, knob, setting
from infra.errors import BadInput, RunStopped
from infra.precision import computing_in
from infra.pretrained import attention_made_with, read_model, stored_tensors
from infra.processes import all_reduce, on_first_rank, print0, rank, world_size
from infra.rng import Draw, rng_for
from infra.sharding import reshard
from infra.waiting import counted, stage
from spro import Batch

# The same numbers sooner; where the folder has been deleted, the plain paths below do all the work.
fast = importlib.import_module("fast") if importlib.util.find_spec("fast") else None

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
DTYPES = ("bfloat16", "float32")


@dataclass
class ModelConfig(Block):
    path: str = knob("", "folder or Hub id of a model; empty: build one", warm_start=True)
    scratch: dict = knob(
        {}, "keys of a transformers config over SCRATCH", free=True, warm_start=True
    )
    attention: str = knob("auto", "sdpa, eager, flash_attention_2 or auto", warm_start=True)
    dtype: str = knob("bfloat16", "of compute on a GPU", choices=DTYPES, warm_start=True)
    gradient_checkpointing: bool = setting(
        False,
        "keep one activation per layer and recompute the rest in the backward pass",
        warm_start=True,
        rounds=True,
        lowers={"update": "set model.gradient_checkpointing=true"},
    )
    offload_reference: bool = setting(
        False,
        "keep the reference's weights in host memory (GPU runs)",
        warm_start=True,
        lowers={"load": "set model.offload_reference=true"},
    )
    shard: int = setting(
        0,
        "ranks that split a copy of the weights; 0: all of them",
        least=0,
        warm_start=True,
        rounds=True,
        lowers={"load": "give each GPU less by more of them (model.shard)"},
    )
    replicate: int = setting(
        1,
        "copies of the weights (HSDP): shard in a node",
        least=1,
        warm_start=True,
        rounds=True,
    )
    deterministic: bool = setting(
        False,
        "kernels that add in the same order every time (GPU runs): exact resume, slower",
        warm_start=True,
        rounds=True,
    )


class TokenLogProbs(NamedTuple):
    """Of each response token, [B, T], fp32 at least, in nats; 0 at padding."""

    log_probs: torch.Tensor
    entropy: torch.Tensor  # of the distribution that the token was drawn from; carries no gradient
    kl: torch.Tensor | None  # exact KL(policy || reference) there, where a reference was given


class Policy(torch.nn.Module):
    """A causal LM with its tokenizer, and what the sampler and the loss must agree on.

    Under FSDP this module is the root, so its forward methods are registered in `shard`.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        # Where inputs go, which is not where offloaded weights are
        self.device = torch.device("cpu")
        self.dtype = torch.float32  # that a pass computes in
        self.unread: Path | None = None  # the folder that a model on the meta device is to read
        self.recomputes = False  # activations, in the backward pass
        # The model that generates in place of this one while its weights are gathered, see
        # `unsharded`. In a list, or torch would take it as a part of this module.
        self.twin: list = []
        self.stop_ids = stop_ids(model, tokenizer)
        self.pad_id = self.stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.known_ids = embedding_rows(model)  # ids from here on cannot be read
        if self.pad_id >= self.known_ids:
            raise BadInput(
                f"{model.config.model_type}: the tokenizer pads with {tokenizer.pad_token!r}, id "
                f"{self.pad_id}, but the model's embedding has {self.known_ids} rows: save the "
                "tokenizer with a pad_token that the model knows, such as its eos_token"
            )
        # Rows of the head beyond the last id in use are padding: never sampled, and in no softmax.
        self.vocab_size = 1 + max(self.pad_id, *self.stop_ids, *tokenizer.get_vocab().values())
        self.shipped_generation_config = model.generation_config
        model.generation_config = GenerationConfig(
            eos_token_id=self.stop_ids, pad_token_id=self.pad_id
        )
        signature = inspect.signature(type(model).forward).parameters
        # Renamed in transformers 5.24
        self.cache_argument = "cache" if "cache" in signature else "past_key_values"
        turn_off_dropout(model)
        model.eval()
        # None: a model that has no values yet is asked at its first pass
        self.has_plain_head: bool | None = None
        if model.device.type != "meta":
            self.has_plain_head = self._has_plain_head()

    def _has_plain_head(self) -> bool:
        """Whether the fast log-probs are those of the model's own logits."""
        return not fast or fast.agrees(self, plain_log_probs_of_tokens)

    def _compare_once(self) -> None:
        """All ranks call it in a pass, where the head is gathered, and take the same path."""
        if self.has_plain_head is None:
            agrees = all_reduce(torch.tensor(int(self._has_plain_head())), dist.ReduceOp.MIN)
            self.has_plain_head = bool(agrees)
            if not agrees:
                print0("log-probs of this model by the plain path")

    @property
    def fast(self):
        """The fast paths of log-probs, where they give those of the model's own logits; or None."""
        return None if self.has_plain_head is False else fast

    @property
    def config(self):
        """Of the model, as transformers has it."""
        return self.model.config

    def num_parameters(self) -> int:
        return self.model.num_parameters()

    def generate(self, *args, **kwargs) -> torch.Tensor:
        (model,) = self.twin or [self.model]
        return model.generate(*args, **kwargs)

    def token_log_probs(
        self, tokens, attention_mask, response_length, temperature, reference=None
    ) -> TokenLogProbs:
        """See the function of this name; `reference` is what its `states_for_kl` gave."""
        self._compare_once()
        forward = self.fast.log_probs_of_tokens if self.fast else plain_log_probs_of_tokens
        with self._training_mode():
            return TokenLogProbs(
                *forward(self, tokens, attention_mask, response_length, temperature, reference)
            )

    def pack_rows(self, tokens, attention_mask) -> None:
        """From now score rows end to end in one, without padding; see fast/agreement.py."""
        self.fast.pack_rows(self, tokens, attention_mask)

    def states_for_kl(self, tokens, attention_mask, response_length) -> tuple:
        """What `token_log_probs` of a policy needs of this model as its reference."""
        self._compare_once()
        forward = self.fast.states_for_kl if self.fast else plain_states_for_kl
        return forward(self, tokens, attention_mask, response_length)

    @contextmanager
    def _training_mode(self):
        """transformers recomputes activations in training mode alone, and generates without a cache
        there.

        Nothing else differs: dropout is off in both modes.
        """
        self.model.train(self.recomputes and torch.is_grad_enabled())
        yield
        self.model.eval()


def stop_ids(model, tokenizer) -> list[int]:
    """Ids that end a response: all that the model's configs and the tokenizer name, if it has them.

    Raises BadInput without any.
    """
    stops: set[int] = set()
    for ids in (
        model.generation_config.eos_token_id,
        model.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        stops |= set(ids) if isinstance(ids, list) else {ids}
    stops = {i for i in stops - {None} if 0 <= i < embedding_rows(model)}
    if not stops:
        raise BadInput(
            f"{model.config.model_type}: neither model nor tokenizer names an end-of-sequence "
            "token that the model knows"
        )
    return sorted(stops)


def embedding_rows(model) -> int:
    return model.get_input_embeddings().weight.shape[0]


def turn_off_dropout(model) -> None:
    """Dropout has no place in a ratio of probabilities."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # the rates that modules pass to functions
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# --- build, load, save ----------------------------------------------------------------------------


def build(config: ModelConfig, tokenizer, seed: int) -> Policy:
    """A randomly initialised model of `config.scratch` for this tokenizer. Raises BadInput where
    there is no such.
    """
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    settings = SCRATCH | config.scratch
    try:
        known = AutoConfig.for_model(settings["model_type"]).to_dict()
        hf_config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **ids, **settings})
        with torch.device("meta"):  # shapes alone: do they fit together?
            AutoModelForCausalLM.from_config(hf_config)(torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # each architecture checks its sizes in its own way
        reason = str(error).strip().splitlines()[0]
        raise BadInput(
            f"model.scratch={config.scratch}: transformers cannot build that: {reason}"
        ) from error
    if hf_config.vocab_size < len(tokenizer):
        raise BadInput(
            f"model.scratch: vocab_size={hf_config.vocab_size} is less than the {len(tokenizer)} "
            "tokens of the task"
        )
    if unknown := sorted(settings.keys() - known.keys() - {"model_type"}):
        raise BadInput(f"model.scratch: {settings['model_type']} has no {unknown[0]!r}")
    # Initialisation is the one user of torch's global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, Draw.WEIGHTS).integers(2**31)))
        try:
            attention = attention_made_with(config.attention)
            options = {"dtype": torch.float32, "attn_implementation": attention}
            model = AutoModelForCausalLM.from_config(hf_config, **options)
        except (ImportError, ValueError) as error:
            raise BadInput(
                f"model.attention={config.attention}: {str(error).splitlines()[0]} (sdpa works "
                "anywhere)"
            ) from error
    return Policy(model, tokenizer)


@stage("load")
def load(
    path: str | Path, attention: str = "sdpa", empty: bool = False, in_shares: bool = False
) -> Policy:
    """The model and tokenizer of a folder or Hub id, in fp32. Raises BadInput where there is no
    causal LM.

    `empty`: the model on the meta device, shapes without memory. `in_shares`: the same for now, and
    `infra.sharding.shard` reads what each rank keeps, where the files allow it.
    """
    model, tokenizer, unread = read_model(path, attention, empty, in_shares)
    policy = Policy(model, tokenizer)
    policy.unread = unread
    return policy


def freeze(policy: Policy) -> Policy:
    """The same model as a reference: no gradients, ever."""
    return policy.requires_grad_(False)


def weights_hash(policy: Policy) -> str:
    """sha256 over names and values of all that is saved of a model that is not sharded: says which
    reference a run has.

    The hash of one stream, so one rank has to see all of it: of a model that is not read yet rank 0
    does, a tensor at a time from the files, and all ranks call it.
    """
    tensors = saved_tensors(policy.model)
    if policy.unread is None:
        return _hash_of(tensors.items())
    return on_first_rank(lambda: _hash_of(stored_tensors(policy.unread, tensors)))


def _hash_of(tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(policy: Policy, folder: Path) -> None:
    """Write HF safetensors, config, tokenizer and the generation config the model came with to
    `folder`.

    All ranks call it: weights are gathered one by one, and only rank 0 holds them all, in host
    memory. The folder appears when it is complete.
    """
    weights = {}
    for name, tensor in saved_tensors(policy.model).items():
        whole = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if rank() == 0:
            weights[name] = whole.cpu()
    on_first_rank(lambda: _write_model(policy, weights, folder))


def _write_model(policy: Policy, weights: dict[str, torch.Tensor], folder: Path) -> None:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policy.model.save_pretrained(temporary, state_dict=weights)
    except SafetensorError as error:  # its I/O errors are no OSErrors
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunStopped(
            f"the model could not be written to {folder}: {error}; make room, then resume=true"
        ) from error
    # Not through save_pretrained, which refuses some published generation configs as inconsistent.
    policy.shipped_generation_config.to_json_file(temporary / "generation_config.json")
    policy.tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# --- log-probs of tokens --------------------------------------------------------------------------


def token_log_probs(
    policy: Policy, batch: Batch, temperature: float, reference: Policy | None = None
) -> TokenLogProbs:
    """Log-prob of each response token of a Batch on the policy's device, and the entropy it was
    drawn with. [B, T].

    Of softmax(logits / temperature) over the tokenizer's vocabulary, in fp32 at least. With a
    frozen `reference`, also the exact KL(policy || reference) of the two distributions.
    """
    inputs = (batch.tokens, batch.attention_mask, batch.mask.shape[1])
    states = None
    if reference is not None:
        # Sharded, its head stays gathered after this pass, for the backward pass to use
        with torch.no_grad():
            states = reference.states_for_kl(*inputs)
    return policy.token_log_probs(*inputs, temperature, states)


def plain_states_for_kl(policy, tokens, attention_mask, response_length) -> torch.Tensor:
    """Logits [B, T, V] before each response token: one forward pass over whole rows, from the
    model's own head.
    """
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = policy.model(
        tokens,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, :-1, : policy.vocab_size]


def plain_log_probs_of_tokens(
    policy, tokens, attention_mask, response_length, temperature, reference=None
) -> tuple:
    """(log_probs, entropy, KL or None): the plain way, and what fast/ is tested against. Holds
    [B, T, V].
    """
    logits = plain_states_for_kl(policy, tokens, attention_mask, response_length)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(dtype) / temperature).log_softmax(-1)
    p = log_p.exp()
    live = attention_mask[:, -response_length:]
    log_probs = log_p.gather(-1, tokens[:, -response_length:, None])[:, :, 0]
    entropy = -(p * log_p).sum(-1).detach()
    kl = None
    if reference is not None:
        ref_log_p = (reference.to(dtype) / temperature).log_softmax(-1)
        kl = torch.where(live, (p * (log_p - ref_log_p)).sum(-1), 0.0)
    return torch.where(live, log_probs, 0.0), torch.where(live, entropy, 0.0), kl


def micro_batches(
    policy: Policy, batch: Batch, max_tokens: int
) -> Iterator[tuple[torch.Tensor, Batch]]:
    """This rank's share of a batch, as (rows, the trimmed Batch of those rows on the policy's
    device).

    FSDP needs every rank in every pass, so all ranks get as many: a rank without rows left gets no
    rows, and a Batch of one row that counts for nothing, for its mask and weights are 0.
    """
    lists = micro_batch_rows(
        batch, max_tokens, policy.fast.prompt_numbers(policy, batch) if policy.fast else None
    )
    passes = -(-len(lists) // world_size())
    mine = lists[rank() :: world_size()]
    for rows in counted(mine, "micro-batch"):
        yield rows, batch.select(rows).trim().to(policy.device)
    for _ in range(passes - len(mine)):
        filler = batch.select(torch.tensor([0])).trim().to(policy.device)
        nothing = {"mask": torch.zeros_like(filler.mask)}
        if filler.weights is not None:
            nothing["weights"] = torch.zeros_like(filler.weights)
        yield torch.empty(0, dtype=torch.long), replace(filler, **nothing)


@torch.no_grad()
def batch_log_probs(
    policy: Policy, batch: Batch, temperature: float, max_tokens: int, finer: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probs` of a whole Batch, without gradients -> log_probs, entropy [B, T] on CPU; 0
    where masked. `finer`: what they are computed in, see infra/precision.py.

    The ranks share the rows; each row is one rank's and reaches the others exactly, as a sum with
    zeros.
    """
    both = torch.zeros(2, *batch.mask.shape)
    with computing_in(policy, finer):
        for rows, part in micro_batches(policy, batch, max_tokens):
            log_probs, entropy, _ = token_log_probs(policy, part, temperature)
            for whole, values in zip(both, (log_probs, entropy), strict=True):
                whole[rows, : values.shape[1]] = values[: len(rows)].cpu().float()
        reshard(policy)
    log_probs, entropy = all_reduce(both)
    return log_probs, entropy


# --- optimizer ------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, base: float, warmup: int, schedule: str) -> float:
    """Of step 1..steps: a linear rise over `warmup` steps, then constant, or falling towards 0
    at the end.
    """
    if step <= warmup:
        return base * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return base * shape[schedule]


def make_optimizer(policy: Policy, settings, lr: float = 0.0) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        policy.parameters(),
        lr=lr,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
