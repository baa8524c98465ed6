"""One policy over several ranks: FSDP2 keeps 1/shard of it on each, and gathers what a pass needs
just for that pass.

`settings` is the config's block `model` throughout.
"""

import copy
import warnings
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from infra.errors import BadInput, enough_memory
from infra.pretrained import read_shares
from infra.processes import world_size

# Of Policy: FSDP2 gathers the weights for them. Each needs an argument, for on a GPU FSDP2 moves
# what the root is called with, and fails where that is nothing.
FORWARD_METHODS = ("generate", "token_log_probs", "states_for_kl", "pack_rows")


def shard_size(settings) -> int:
    """Ranks that split one copy of the weights. Raises BadInput if shard x replicate is not the
    number of ranks.
    """
    split = settings.shard or world_size() // settings.replicate
    if split * settings.replicate != world_size():
        raise BadInput(
            f"model.shard={settings.shard} x model.replicate={settings.replicate} does not make "
            f"the {world_size()} ranks of this run"
        )
    return split


def is_split() -> bool:
    """Whether `shard` splits models here: with several ranks, and on any GPU."""
    return dist.is_initialized()


@enough_memory("load")
def shard(policy, settings, device: torch.device, offload: bool = False):
    """Put the policy on `device`, its weights split over the ranks by FSDP2 wherever there is a
    process group.

    A policy that is not read yet (model.load, `in_shares`) is read here, by each rank its share; of
    any other every rank comes with the whole in host memory. `offload` keeps the share there (the
    reference's option).
    """
    policy.device = device
    policy.dtype = compute_dtype(settings, device.type == "cuda")
    if settings.gradient_checkpointing:
        # The name is deprecated in the newest transformers; its successor is not in older ones
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.recomputes = True
    split = shard_size(settings)
    if not is_split():
        return policy.to(device)
    on_gpu = device.type == "cuda"
    offload = offload and on_gpu
    options = {
        "mesh": device_mesh(device.type, settings.replicate, split),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if policy.dtype == torch.float32 else policy.dtype,
            reduce_dtype=torch.float32,
        ),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for layer in decoder_layers(policy):
        fully_shard(layer, **options)
    fully_shard(policy, **options)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(policy, name)
    if policy.unread is not None:
        read(policy, device, offload)
    if will_pack(policy, settings, device):
        policy.pack_rows(*policy.fast.two_rows(policy))
        reshard(policy)
    return policy


def compute_dtype(settings, on_gpu: bool) -> torch.dtype:
    """What a pass computes in: `model.dtype` on a GPU, fp32 on a CPU."""
    return getattr(torch, settings.dtype) if on_gpu else torch.float32


def will_pack(policy, settings, device: torch.device) -> bool:
    """Whether `shard` has the policy score rows end to end in one: where nothing else was asked
    for, and it can be done there.
    """
    if not policy.fast or settings.attention != "auto":
        return False
    return policy.fast.can_pack(policy, device, compute_dtype(settings, device.type == "cuda"))


@lru_cache
def device_mesh(kind: str, replicate: int, split: int) -> DeviceMesh:
    """One for all models of a run: each mesh of two dimensions makes communicators of its own."""
    if replicate == 1:
        return init_device_mesh(kind, (split,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicate, split), mesh_dim_names=("replicate", "shard"))


def read(policy, device: torch.device, offload: bool) -> None:
    """Give a sharded model on the meta device its memory, and read each rank's share into it."""
    policy.to_empty(device="cpu" if offload else device)
    if offload:  # weights alone: buffers are not gathered for a pass
        for module in policy.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(
                    name,
                    torch.empty_like(buffer, device=device),
                    persistent=name not in module._non_persistent_buffers_set,
                )
    read_shares(policy.model, policy.unread)
    policy.unread = None


def decoder_layers(policy) -> list[torch.nn.Module]:
    """The modules that transformers says must not be split: one decoder layer each."""
    names = policy.model._no_split_modules or ()
    return [module for module in policy.model.modules() if type(module).__name__ in names]


@contextmanager
def unsharded(policy):
    """Whole weights on every rank, for generation: gathered once here, not once per token, and
    lent to a twin of the model that FSDP does not know.

    Costs the whole model in the compute type beside this rank's shards, until the block is left.
    While it lasts a forward pass needs no other rank, so ranks may run different numbers of them
    and cannot wait for each other: rows may stop at different lengths. All ranks must enter and
    leave together. Does nothing to a model not sharded.

    Nothing learns here, so `model.deterministic` rests: torch would refuse the sampler's sums along
    a row (cumsum), which are the same every time.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    if sharded:
        policy.twin.append(twin_of(policy.model))
    try:
        yield
    finally:
        policy.twin.clear()  # it holds what is given back now
        torch.use_deterministic_algorithms(deterministic)
        for module in sharded:
            # FSDP2's own defaults
            module.set_reshard_after_forward(module is not policy, recurse=False)
            module.reshard()


def twin_of(model) -> torch.nn.Module:
    """The same model once more, on the very tensors that its weights are gathered in: no memory.

    FSDP runs Python of its own around every layer, which in decoding costs as much as the layer and
    can be neither recorded nor compiled. The twin's layers are the library's own.
    """
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config))
    # Detached, for what is lent must not be changed: loading sets requires_grad
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    twin.load_state_dict(weights, assign=True, strict=False)
    twin.tie_weights()
    for theirs, ours in zip(model.modules(), twin.modules(), strict=True):
        # What is in no state_dict, such as rotary tables: buffers, or tensors by a name alone
        ours._buffers.update(theirs._buffers)
        tensors = {name: x for name, x in vars(theirs).items() if isinstance(x, torch.Tensor)}
        vars(ours).update(tensors)
    twin.generation_config = model.generation_config
    return twin.requires_grad_(False).eval()


def reshard(policy) -> None:
    """Give back what a forward pass leaves gathered for a backward pass that does not come: the
    root.
    """
    if isinstance(policy, FSDPModule):
        policy.reshard()


def clip_gradients(policy, max_norm: float) -> float:
    """Scale the gradients down to `max_norm` over all ranks, and give them up where they are not
    finite.

    -> their norm before. A step with a norm that is not finite must not be taken.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
