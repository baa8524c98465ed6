"""The stages of gpu.py that say whether it is right: decoding, and whole runs of train.py against each other.

A stage is a generator of rows (gpu_runs.py). Those whose name ends in _here do their work in a process of their own,
where torch may touch the GPU; the others start such processes and runs of train.py, and compare what those leave.
"""

import functools
import json
import math
from pathlib import Path

from gpu_runs import Bench, apart, chaos, check, far_apart, guarded, judge, note, skip, train, warm_start

CLOSE = 1e-4  # between metrics on a CPU and on a GPU, both in fp32


def probe() -> None:
    """In a process of its own: raise where torch cannot use a GPU."""
    import torch

    assert torch.cuda.is_available(), "torch sees no GPU"
    print(torch.cuda.get_device_name(), torch.ones(1, device="cuda").item())


# --- versions and peaks -------------------------------------------------------------------------------------------


def versions(bench: Bench):
    yield from apart(bench, "gpu_checks.versions_here")


def versions_here(bench: Bench):
    import platform

    import torch
    import transformers

    from floor import peaks

    on_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    said = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    said += [f"transformers {transformers.__version__}"]
    if on_gpu:
        said += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
        said += [f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"]
    yield note("versions", ", ".join([card, *said]), card=card)
    yield guarded("cuDNN's attention is off", cudnn_is_off) if on_gpu else skip("cuDNN's attention is off")
    yield guarded("the allocator grows its segments", allocator) if on_gpu else skip("the allocator grows its segments")
    yield guarded("a process group of one, for CPU and GPU", process_group)
    found = peaks(bench.sized(8192, 256), torch.device("cuda" if on_gpu else "cpu"))
    Path(bench.out, "peaks.json").write_text(json.dumps(found))
    enough = {"memory, GB/s": 2400, "float32 matmul, GFLOP/s": 30e3, "bfloat16 matmul, GFLOP/s": 550e3}
    for name, value in found.items():
        words = f"{value:.4g}; an idle H100 has more than {enough[name]:.4g}"
        yield judge(bench, name, value > enough[name], words, value=value)


def cudnn_is_off() -> dict:
    """Asked as a script of this project would be: its start decides."""
    import torch
    from infra.processes import command_line
    from torch.nn.attention import SDPBackend

    torch.backends.cuda.enable_cudnn_sdp(True)
    seen = []
    command_line(lambda: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    backends = {int(backend): name for name, backend in SDPBackend.__members__.items()}
    order = [backends.get(i, str(i)) for i in torch._C._get_sdp_priority_order()]
    return check("cuDNN's attention is off", seen == [False], f"sdpa's order: {', '.join(order)}")


def allocator() -> dict:
    import torch

    torch.ones(1, device="cuda")
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    return check("the allocator grows its segments", bool(settings.get("expandable_segments")), str(settings)[:200])


def process_group() -> dict:
    import torch
    import torch.distributed as dist
    from infra.processes import start_processes

    device = start_processes(5.0)
    if not dist.is_initialized():  # a process alone on a CPU has no group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sums = [torch.arange(4.0, device=place) for place in ("cpu", device)]
    for part in sums:
        dist.all_reduce(part)
    right = all(part.tolist() == [0, 1, 2, 3] for part in sums)
    return check("a process group of one, for CPU and GPU", right, dist.get_backend())


# --- runs of train.py ---------------------------------------------------------------------------------------------


def tiny(bench: Bench):
    """The same three steps by a CPU in fp32, by the GPU in fp32, and by the GPU in bf16, from one warm start."""
    warm = warm_start(bench)
    steps = f"train.steps={bench.sized(3, 1)}"
    cpu = train(bench, "tiny_cpu", warm, steps, on_gpu=False)
    fp32 = train(bench, "tiny_fp32", warm, steps, "model.dtype=float32")
    bf16 = train(bench, "tiny_bf16", warm, steps)
    cpu.ended()
    what = ("GPU in fp32: equal texts", "GPU in fp32: metrics to 1e-4", "GPU in bf16: steps taken, sampler_gap < 0.5")
    yield guarded(what[0], lambda: same_texts(what[0], cpu, fp32.ended()))
    yield guarded(what[1], lambda: same_metrics(what[1], cpu, fp32))

    def in_bf16():
        rows = bf16.ended().metrics()[1:]
        gap, refused = max(r["sampler_gap"] for r in rows), sum(r["updates/refused"] for r in rows)
        return check(what[2], gap < 0.5 and not refused, f"gap {gap:.3g}, {refused} refused")

    yield guarded(what[2], in_bf16)
    yield from apart(bench, "gpu_checks.gradient_here", warm.partition("=")[2])


def same_texts(what: str, cpu, gpu) -> dict:
    """Of two runs' rollouts."""
    pairs = list(zip(cpu.texts(), gpu.texts(), strict=True))
    differ = sum(a != b for a, b in pairs)
    return check(what, not differ and bool(pairs), f"{differ} of {len(pairs)} differ")


def same_metrics(what: str, cpu, gpu) -> dict:
    """Of two runs, to CLOSE."""
    differ = far_apart(cpu, gpu, CLOSE)
    return check(what, not differ, "; ".join(differ[:3]) or "all of them")


def gradient_here(bench: Bench, model_folder: str):
    """The gradient of one batch, which a CPU has sampled, in fp32 there and in bf16 on the GPU."""
    import model
    import torch
    import train as program
    from baselines.diagnostics import dot, gradient_of
    from infra.processes import start_processes

    from floor import load_policy

    on_cpu, on_gpu = model.load(model_folder), load_policy(model_folder, "bfloat16", start_processes(5.0))
    batch = sampled(on_cpu, "plain")
    advantages = torch.linspace(-1, 1, len(batch))[:, None].expand(batch.mask.shape)
    norms = []
    for policy in (on_cpu, on_gpu):
        gradient = [part.cpu() for part in gradient_of(policy, program.Config(), batch, advantages)]
        norms.append(math.sqrt(dot(gradient, gradient)))
    off = abs(norms[1] / norms[0] - 1)
    words = f"{norms[0]:.4g}, on the GPU {norms[1]:.4g}"
    yield check("GPU in bf16: grad_norm of one batch within 5 %", off < 0.05, words)


def sampled(policy, decoding: str):
    """A Batch of 6 prompts of different lengths x 4 responses."""
    import sample
    from infra.rng import Draw
    from infra.sharding import unsharded

    prompts = [[3 + (i * j) % 20 for j in range(4 + 3 * i)] for i in range(1, 7)]
    keys = [(0, Draw.SAMPLE, i) for i in range(len(prompts))]
    with unsharded(policy):
        config = sample.SampleConfig(group_size=4, max_new_tokens=24, decoding=decoding)
        return sample.sample(policy, prompts, keys, config)


def decoding(bench: Bench):
    yield from apart(bench, "gpu_checks.decoding_here", warm_start(bench).partition("=")[2])


def decoding_here(bench: Bench, model_folder: str):
    """Every value of sample.decoding: the same tokens as the plain loop in fp32; in bf16 where they part."""
    import model
    import sample
    import torch
    from infra.config import knobs
    from infra.processes import start_processes

    from floor import load_policy

    device = start_processes(5.0)
    on_cpu = sampled(model.load(model_folder), "plain")
    ways = knobs(sample.SampleConfig)["decoding"].metadata["choices"]
    for dtype in ("float32", "bfloat16") if torch.cuda.is_available() else ("float32",):
        policy = load_policy(model_folder, dtype, device)
        plain = sampled(policy, "plain")
        yield note(f"{dtype}, plain beside the CPU's", first_difference(on_cpu, plain))
        for way in ways:
            what = f"{dtype}, {way} beside plain"
            yield guarded(what, functools.partial(same_tokens, what, policy, way, plain, dtype == "float32"))
            what = f"{dtype}, {way}: what the GPU is asked, a token"
            counted = functools.partial(launches, what, policy, way)
            yield guarded(what, counted) if torch.cuda.is_available() else skip(what)


def first_difference(one, other) -> str:
    """Between the responses of two Batches of the same prompts."""
    rows = []
    for a, b, n, m in zip(one.tokens, other.tokens, one.mask.sum(1), other.mask.sum(1), strict=True):
        x, y = a[one.prompt_length :][:n].tolist(), b[other.prompt_length :][:m].tolist()
        if x != y:
            rows.append(next((i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y))))
    return f"{len(rows)} of {len(one)} responses differ, the first at token {min(rows) + 1}" if rows else "equal"


def same_tokens(what: str, policy, way: str, plain, must: bool) -> dict:
    words = first_difference(plain, sampled(policy, way))
    return check(what, words == "equal", words) if must else note(what, words)


def launches(what: str, policy, way: str) -> dict:
    """Kernels, graphs and waits of the CPU for the GPU, a decoded token, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    sampled(policy, way)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        tokens = sampled(policy, way).mask.shape[1]
    counts = {event.key: event.count for event in seen.key_averages()}
    kinds = {"kernels": ("cudaLaunchKernel", "cudaLaunchKernelExC"), "graphs": ("cudaGraphLaunch",)}
    kinds["waits"] = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    figures = {kind: sum(counts.get(name, 0) for name in names) / tokens for kind, names in kinds.items()}
    words = ", ".join(f"{n:.1f} {kind}" for kind, n in figures.items())
    if way == "fast":  # its step is recorded once and replayed: fast/recorded.py
        return check(what, figures["graphs"] > 0.3, words, **figures)
    return note(what, words, **figures)


def resume(bench: Bench):
    """Four steps against two and two more: to the last bit where runs are told to be deterministic."""
    warm = warm_start(bench)
    often = ("train.save_every=2", "eval.every=2", "train.dump_every=2")
    ways = {"deterministic": ("model.deterministic=true",), "default": ()}
    runs = {}
    for name, knobs in ways.items():
        if not (bench.rehearse and name == "default"):
            arguments = (warm, *often, *knobs)
            runs[name] = [train(bench, f"resume_{name}_{n}", *arguments, f"train.steps={n}") for n in (4, 2)]
    for name, (straight, cut) in runs.items():
        what = f"{name}: 4 steps and 2 + 2"

        def compared(what=what, name=name, straight=straight, cut=cut):
            straight.ended(), cut.ended()
            again = [warm, *often, *ways[name], "train.steps=4", "overwrite=false", "resume=true"]
            train(bench, cut.folder.name, *again).ended()
            differ = chaos.differences(straight.folder, cut.folder)
            words = "; ".join(differ[:3]) or "equal to the last bit"
            return check(what, not differ, words) if name == "deterministic" else note(what, words)

        yield guarded(what, compared)
    if bench.rehearse:
        yield skip("default: 4 steps and 2 + 2", "a CPU is deterministic without the knob")


OPTIONS = {
    "PRIME": ("algorithm.advantage=prime", "prime.learning_rate=1e-4"),
    "PPO": ("algorithm.advantage=ppo", "critic.learning_rate=1e-4"),
    "exact KL": ("algorithm.kl_coef=0.01",),
    "checkpointing": ("model.gradient_checkpointing=true",),
    "offload": ("model.offload_reference=true",),
    "diagnosis": ("train.diagnose_every=1",),
}


def options(bench: Bench):
    """What is off by default, two steps each: the GPU in fp32 against the CPU."""
    warm = warm_start(bench)
    steps = f"train.steps={bench.sized(2, 1)}"
    runs = {}
    for name, knobs in OPTIONS.items():
        folder = "option_" + name.replace(" ", "_")
        gpu = train(bench, f"{folder}_gpu", warm, steps, *knobs, "model.dtype=float32")
        runs[name] = (None if bench.rehearse else train(bench, f"{folder}_cpu", warm, steps, *knobs, on_gpu=False), gpu)
    for name, (cpu, gpu) in runs.items():
        what = f"{name}: metrics to 1e-4"

        def compared(what=what, cpu=cpu, gpu=gpu):
            gpu.ended()
            if cpu is None:
                return check(what, True, "ended well; a rehearsal compares nothing")
            return same_metrics(what, cpu.ended(), gpu)

        yield guarded(what, compared)


def memory(bench: Bench):
    """Out of memory, once while sampling, once while updating: one line with stage and knob, and exit code 1."""
    warm = warm_start(bench)
    work = ("train.steps=1", "train.prompts_per_step=64", "train.mini_batch_size=512")
    work += ("sample.max_new_tokens=64", "sample.batch_tokens=1000000", "train.micro_batch_tokens=100000")
    knobs = {"sample": "sample.batch_tokens", "update": "train.micro_batch_tokens"}
    work = {"sample": (*work, "sample.group_size=32"), "update": (*work, "sample.group_size=8")}  # more than lies about
    runs = {stage: train(bench, f"out_in_{stage}", warm, *work[stage], starved=stage) for stage in knobs}
    for stage, run in runs.items():

        def said(stage=stage, run=run):
            last = run.ended(1).words().strip().splitlines()[-1]
            right = last.startswith(f"stopped: out of memory in stage {stage} ") and knobs[stage] in last
            return check(f"while in {stage}", right, last[:300])

        yield guarded(f"while in {stage}", said)
