"""What a pass computes in, where it is to be finer than the rest of a run.

A log-ratio to a reference that the policy has hardly left is smaller than what bfloat16 rounds away
(docs/precision.md). So the process reward's log-probs are scored in a finer type, and everything
else is as before.
"""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule

from infra.sharding import reshard


@contextmanager
def computing_in(policy, finer: str | None):
    """Within the block, passes of a sharded policy compute in fp32, without gradient; as "tf32",
    their matrix products round to TF32, which a GPU does at half the speed of bfloat16 and not a
    fifteenth. None, and a policy that computes in fp32: nothing changes.
    """
    dtype = policy.dtype
    if finer is None or dtype == torch.float32:
        yield
        return
    config, attention = policy.config, policy.config._attn_implementation
    products = torch.get_float32_matmul_precision()
    gather_in(policy, torch.float32)
    if "flash" in attention:  # knows half precision alone
        config._attn_implementation = "sdpa"
    if finer == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        config._attn_implementation = attention
        gather_in(policy, dtype)


def gather_in(policy, dtype: torch.dtype) -> None:
    """Have FSDP2 gather the policy's weights, for passes from now on, in this type.

    FSDP2 fixes the type at a module's first pass and has no switch for it: what it keeps of that
    pass, its buffers and the parameters made of them, is dropped here, and made anew by the next.
    """
    reshard(policy)
    for module in policy.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        state._mp_policy = replace(state._mp_policy, param_dtype=dtype)
        group = state._fsdp_param_group
        group.mp_policy = state._mp_policy
        for parameter in group.fsdp_params:
            parameter.all_gather_outputs = []
            parameter.__dict__.pop("_unsharded_param", None)
        group._init_mp_dtypes()
    policy.dtype = dtype
