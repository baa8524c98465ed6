"""The stages of gpu.py that say how fast it is, and how exact the step term: models in the shape of Qwen2.5."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

from common import TINY, Work
from gpu_runs import Bench, apart, check, judge, note, skip

HALF = Work(
    prompts=64, group_size=8, prompt_tokens=128, new_tokens=256, hidden=896, layers=24, heads=14, kv_heads=2,
    intermediate=4864, vocabulary=151_936,
)  # fmt: skip
SHAPES = {"0.5B": HALF, "1.5B": replace(HALF, hidden=1536, layers=28, heads=12, intermediate=8960)}
NATS = 2.0  # entropy of what the models predict
FULL_LOGITS = 1 / 6  # of their memory, at most


def shape(bench: Bench, name: str, **changes) -> Work:
    """The work with that model; a rehearsal keeps next to nothing of it."""
    kept = {key: changes[key] for key in changes.keys() & {"lengths"}}
    return bench.sized(replace(SHAPES[name], **changes), replace(TINY, **kept))


def model_folder(bench: Bench, name: str) -> str:
    """The model of a shape, made where there is none yet."""
    import common

    folder = Path(bench.scratch, name)
    if not folder.exists():
        device = "cuda" if common.on_gpu() else "cpu"
        common.make_model(folder, shape(bench, name), tied=True, device=device, dtype="bfloat16", nats=NATS)
    return str(folder)


def compute_type(bench: Bench) -> str:
    return bench.sized("bfloat16", "float32")


def peaks(bench: Bench) -> dict[str, float]:
    """As the first stage has measured them; measured now, where it has not."""
    import torch

    import floor

    file = Path(bench.out, "peaks.json")
    if not file.exists():
        found = floor.peaks(bench.sized(8192, 256), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def start(bench: Bench, name: str):
    """(device, folder with the model of that shape), the process group being there."""
    from infra.processes import start_processes

    return start_processes(5.0), model_folder(bench, name)


# --- the step term ------------------------------------------------------------------------------------------------

MOVED = 8e-6  # by which every weight of the policy is away from the reference's: 16 steps of AdamW at 5e-7
LARGEST_ERROR = {"bfloat16": None, "tf32": 0.5, "float32": 0.05}  # of the cumulative log-ratio, nats; None: not judged


def step_term(bench: Bench):
    yield from apart(bench, "gpu_speed.step_term_here")


def step_term_here(bench: Bench):
    """Noise of log policy - log reference, the policy one small update away, by what its two passes compute in."""
    import torch

    device, folder = start(bench, "0.5B")
    batch = sampled_by_itself(bench, folder, device)
    exact = exact_log_ratio(folder, batch)
    yield note("the truth, in float64", words_of(exact, batch))
    for name, limit in LARGEST_ERROR.items():
        if device.type == "cpu" and name != "float32":
            yield skip(name)
            continue
        error = torch.where(batch.mask, log_ratio_in(name, folder, batch, device) - exact, 0.0)
        worst = error.cumsum(1).abs().max().item()
        words = words_of(error, batch)
        figures = {"token": error[batch.mask].std().item(), "cumulative": worst}
        if limit is None:
            yield note(name, words, **figures)
        else:
            yield check(name, worst < limit, f"{words}; at most {limit}", **figures)


def words_of(log_ratio, batch) -> str:
    worst = log_ratio.cumsum(1).abs().max().item()
    return f"{log_ratio[batch.mask].std().item():.1e} nats a token, largest sum along a response {worst:.3g}"


def sampled_by_itself(bench: Bench, folder: str, device):
    """8 full responses of 192 tokens by the model: 1,536 tokens."""
    import sample
    import torch
    from infra.rng import Draw
    from infra.sharding import unsharded

    import common
    from floor import load_policy

    work = shape(bench, "0.5B", prompts=4, group_size=2, new_tokens=192, lengths="full")
    common.force_lengths(work)
    prompts = torch.randint(3, 200, (work.prompts, work.prompt_tokens), generator=torch.manual_seed(0)).tolist()
    keys = [(0, Draw.SAMPLE, i) for i in range(work.prompts)]
    config = sample.SampleConfig(group_size=work.group_size, max_new_tokens=work.new_tokens)
    policy = load_policy(folder, compute_type(bench), device)
    with unsharded(policy):
        return sample.sample(policy, prompts, keys, config)


def move(policy) -> None:
    """Away from the reference, by MOVED, each weight up or down."""
    import torch

    draw = torch.manual_seed(1)
    for parameter in policy.parameters():
        signs = torch.rand(parameter.shape, generator=draw).sub_(0.5).sign_()
        parameter.data += MOVED * signs.to(parameter)


def exact_log_ratio(folder: str, batch):
    """[B, T] by passes in float64, over the weights in fp32 that every other pass starts from."""
    import model
    import torch

    from logprob_memory import on_device

    found = []
    for is_policy in (True, False):
        policy = model.load(folder)
        if is_policy:
            move(policy)
        policy = on_device(policy, "float64")
        parts = [batch.select(rows).to(policy.device) for rows in torch.arange(len(batch)).split(4)]
        with torch.no_grad():
            found.append(torch.cat([model.token_log_probs(policy, part, 1.0).log_probs.cpu() for part in parts]))
    return found[0] - found[1]


def log_ratio_in(name: str, folder: str, batch, device):
    """[B, T] as a run has it: sharded, in bfloat16, but for what the process reward is told to be scored in."""
    import model
    from infra.sharding import shard

    found = []
    for is_policy in (True, False):
        policy = model.load(folder)
        if is_policy:
            move(policy)
        policy = shard(policy, model.ModelConfig(dtype="bfloat16"), device)
        finer = None if name == "bfloat16" else name
        found.append(model.batch_log_probs(policy, batch, 1.0, 4096, finer)[0].double())
    return found[0] - found[1]


# --- how fast -----------------------------------------------------------------------------------------------------


def decode_speed(bench: Bench):
    yield from apart(bench, "gpu_speed.decode_speed_here", "0.5B", bench.sized([64, 256, 512], [4]))
    yield from apart(bench, "gpu_speed.decode_speed_here", "1.5B", bench.sized([256], [4]))


def decode_speed_here(bench: Bench, name: str, all_rows: list[int]):
    """Decoding of full responses beside what reading weights, keys and values takes at the measured bandwidth."""
    import torch

    import common
    import floor

    device, folder = start(bench, name)
    policy = floor.load_policy(folder, compute_type(bench), device)
    for rows in all_rows:
        group = bench.sized(8, 2)
        work = shape(bench, name, prompts=rows // group, group_size=group, new_tokens=192, lengths="full")
        common.force_lengths(work)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        common.reset_peak()
        found = floor.decoding(policy, work, 2 if compute_type(bench) == "bfloat16" else 4, times=1)
        share = found["GB"] / found["seconds"] / peaks(bench)["memory, GB/s"]
        speed, each = rows * work.new_tokens / found["seconds"], 1e3 * found["seconds"] / work.new_tokens
        figures = {"share": share, "tokens / s": speed, "ms a token": each, **reserved(device)}
        words = f"{speed:.0f} tokens/s, {each:.2f} ms a token, {share:.0%} of the byte floor{said_of_memory(figures)}"
        what = f"{name}, {rows} rows"
        if (name, rows) == ("0.5B", 512):
            yield check(what, share >= 0.5, f"{words}; at least 50 %", **figures)
        else:
            yield note(what, words, **figures)


def reserved(device) -> dict[str, float]:
    """GiB at their peaks, by the allocator: of tensors, and with what it keeps besides."""
    import torch

    if device.type != "cuda":
        return {}
    return {
        "allocated GiB": torch.cuda.max_memory_allocated() / 2**30,
        "reserved GiB": torch.cuda.max_memory_reserved() / 2**30,
    }


def said_of_memory(figures: dict) -> str:
    if "reserved GiB" not in figures:
        return ""
    return f", {figures['allocated GiB']:.1f} GiB allocated, {figures['reserved GiB']:.1f} reserved"


def update_speed(bench: Bench):
    for name in SHAPES:
        yield from apart(bench, "gpu_speed.update_speed_here", name)


def update_speed_here(bench: Bench, name: str):
    """16k tokens forward and backward, as an update makes them, against the measured peak of matrix products."""
    import floor

    device, folder = start(bench, name)
    policy = floor.load_policy(folder, compute_type(bench), device)
    work = shape(bench, name, rows_per_pass=16, prompt_tokens=256, new_tokens=768, lengths="full")
    found = floor.scoring(policy, work)
    peak = peaks(bench)[f"{compute_type(bench)} matmul, GFLOP/s"]
    for what, row in found.items():
        share = row["GFLOP"] / row["seconds"] / peak
        words = f"{1e3 * row['seconds']:.0f} ms, {share:.0%} of the matmul peak"
        if what == "forward + backward":
            yield judge(bench, f"{name}, {what}", share >= 0.4, f"{words}; at least 40 %", mfu=share)
        else:
            yield note(f"{name}, {what}", words, mfu=share)
    if device.type == "cuda":
        yield note(f"{name}, dearest kernels", dearest(policy, work))
    else:
        yield skip(f"{name}, dearest kernels")


def dearest(policy, work: Work) -> str:
    """The ten kernels that take most of one forward and backward pass."""
    from torch.profiler import ProfilerActivity, profile

    import floor

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        floor.scoring(policy, work)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in events) or 1
    return "; ".join(f"{event.self_device_time_total / whole:.0%} {event.key[:60]}" for event in events[:10])


def log_probs(bench: Bench):
    yield from apart(bench, "gpu_speed.log_probs_here")


def log_probs_here(bench: Bench):
    """logprob_memory.py's comparison, in both types; and for as many tokens as a micro-batch has on a GPU."""
    import model

    import common
    from logprob_memory import LARGE, WAYS, differences, measured, on_device

    works = bench.sized([LARGE, replace(LARGE, prompts=16)], [TINY])
    folder = Path(bench.scratch, "one_layer")
    device = "cuda" if common.on_gpu() else "cpu"
    common.make_model(folder, works[0], tied=True, device=device)
    for dtype, work in itertools.product(("float32", "bfloat16"), works):
        if dtype == "bfloat16" and device == "cpu":
            yield skip(dtype)
            continue
        found = {way: measured(on_device(model.load(str(folder)), dtype), way, work) for way in WAYS}
        (plain, *of_plain), (ours, *of_ours) = found.values()
        off = differences(of_plain, of_ours)
        words = f"{plain['MiB']:.0f} -> {ours['MiB']:.0f} MiB"
        words += f", {1e3 * plain['seconds']:.0f} -> {1e3 * ours['seconds']:.0f} ms"
        words += f"; largest differences {', '.join(f'{key} {value:.1e}' for key, value in off.items())}"
        small = bench.rehearse or ours["MiB"] <= FULL_LOGITS * plain["MiB"]
        right = dtype == "bfloat16" or (off["log-prob"] < 1e-4 and off["gradient, relative"] < 1e-3)
        tokens = work.prompts * work.group_size * work.new_tokens
        what = f"{dtype}, {tokens} tokens: a sixth of the memory, the same values"
        yield check(what, small and right, words, **ours)


# --- whole steps --------------------------------------------------------------------------------------------------


def training_step(bench: Bench):
    yield from apart(bench, "gpu_speed.steps_here", ["ours"])


def peer(bench: Bench):
    from sides import PIP, has_trl

    if has_trl():
        yield from apart(bench, "gpu_speed.steps_here", ["ours", "TRL"])
    else:
        yield skip("beside TRL", PIP)


def steps_here(bench: Bench, names: list[str]):
    """A training step after one that does not count: ragged, 64 prompts x 8 responses of up to 256 tokens."""
    import argparse

    import common
    from sides import Setting, measured, side
    from step import summary

    folder, work = model_folder(bench, "0.5B"), shape(bench, "0.5B")
    prompts = tuple(common.texts(4 * work.prompts, work.prompt_tokens))
    setting = Setting(bench.scratch, folder, prompts, compute_type(bench))
    config = ["model.attention=auto"]  # as a run has it that says nothing; the peer knows sdpa alone
    config += [] if bench.rehearse else ["train.micro_batch_tokens=16384"]
    sides = {name: side(name, setting, work, config) for name in names}
    answers = measured(sides, argparse.Namespace(pairs=1, threads=1))
    for quantity, values in summary(answers)[1].items():
        words = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if name != "ratios")
        yield note(quantity, words, **values)
    refused = [answer["counts"]["refused"] for answer in answers["ours"]]
    yield check("no optimizer step is refused", not any(refused), f"{sum(refused)} refused")
