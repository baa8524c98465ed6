"""What the benchmarks share: the work, a random model on disk, forced lengths, clocks, memory, processes on demand.

Linux only (memory is read from /proc). A benchmark imports this first: it puts the repository's root on the path.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
EOS = 2
HAZARD = 1 / 64  # chance per token that a response of a ragged batch ends


@dataclass(frozen=True)
class Work:
    """One training step: prompts x group_size responses by a Qwen2-shaped model with random weights."""

    prompts: int = 8
    group_size: int = 8
    prompt_tokens: int = 96
    new_tokens: int = 160  # the longest response
    lengths: str = "ragged"  # or full: all of new_tokens
    drawn: tuple[int, ...] = ()  # lengths that ragged responses are drawn from; none: geometric, by HAZARD
    stops: tuple[int, ...] = (EOS,)  # ids that end a response
    rows_per_pass: int = 16  # the micro-batch
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 768
    vocabulary: int = 260


TINY = Work(
    prompts=2, group_size=2, prompt_tokens=8, new_tokens=8, rows_per_pass=2, hidden=32, layers=1, intermediate=64
)


def make_tokenizer(folder: Path, work: Work) -> None:
    """Save a tokenizer of single bytes and unused words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused {i}>" for i in range(len(names), work.vocabulary)]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special).save_pretrained(folder)


def make_model(
    folder: Path, work: Work, tied: bool = False, device: str = "cpu", dtype: str = "float32", nats: float | None = None
) -> int:
    """Save a model with random weights (seed 0, drawn on `device`, kept in `dtype`) and a tokenizer -> its parameters.

    `nats`: scale its logits until their entropy is that.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    make_tokenizer(folder, work)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        intermediate_size=work.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    if nats is not None:
        sharpen(model, nats)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return model.num_parameters()


def sharpen(model, nats: float) -> None:
    """Scale a fresh model's logits, by its last norm, until random contexts leave an entropy of `nats` on average."""
    import torch

    with torch.no_grad():
        tokens = torch.randint(3, model.config.vocab_size, (4, 32), device=model.device)
        logits = model(tokens, use_cache=False).logits[:, 8:].double()
        low, high = 0.0, 1e3
        for _ in range(30):
            scale = (low + high) / 2
            entropy = torch.distributions.Categorical(logits=scale * logits).entropy().mean().item()
            low, high = (scale, high) if entropy > nats else (low, scale)
        model.model.norm.weight.mul_(scale)


def texts(n: int, tokens: int) -> list[str]:
    """n different prompts, one token per character."""
    draw = random.Random(0)
    return ["".join(draw.choices("0123456789+-*=() abcdefghijklmnopqrstuvwxyz", k=tokens)) for _ in range(n)]


def response_lengths(uniforms, work: Work):
    """The forced length of each response, by its first uniform number [B] in [0, 1) -> [B], 1..new_tokens."""
    if work.lengths == "full":
        return (uniforms * 0 + work.new_tokens).long()
    if work.drawn:
        return uniforms.new_tensor(work.drawn)[(uniforms * len(work.drawn)).long()].long()
    return (1 + ((1 - uniforms).log() / math.log(1 - HAZARD)).floor()).clamp(max=work.new_tokens).long()


def force_length_(scores, lengths, step: int, work: Work) -> None:
    """In place, in logits [b, V] of token `step` (from 0): no stop before a row's end, and nothing else at it."""
    ends = step + 1 >= lengths
    scores.masked_fill_(ends[:, None], -math.inf)
    for stop in work.stops:
        scores[:, stop] = -math.inf
    scores[:, work.stops[0]].masked_fill_(ends, 0.0)


def force_lengths(work: Work) -> None:
    """Make our sampler end each response where `response_lengths` says.

    It chooses as ever; then a stop before the end is replaced, and the last token is a stop. The log-prob that it notes
    is the model's of what was written: the chosen token's, and the difference of the two logits. Nothing here is as
    large as the vocabulary, and nothing waits for the GPU.
    """
    import sample
    import torch

    no_stop = next(i for i in itertools.count() if i not in work.stops)

    class Forced(sample.InverseCDF):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            assert self.prompt_length == work.prompt_tokens, "the prompts are not those of the work"
            self.lengths = response_lengths(self.uniforms[:, 0], work)

        def choose(self, logits, rows, step):
            chosen = super().choose(logits, rows, step)
            is_stop = torch.zeros_like(chosen, dtype=torch.bool)
            for stop in work.stops:
                is_stop |= chosen == stop
            written = torch.where(is_stop, no_stop, chosen)
            written = torch.where(step + 1 >= self.lengths[rows], work.stops[0], written)
            both = logits.gather(-1, torch.stack([written, chosen], 1)).float() / (self.temperature or 1.0)
            self.log_probs[rows, step] += both[:, 0] - both[:, 1]
            return written

    sample.InverseCDF = Forced


# --- clocks and memory --------------------------------------------------------------------------------------------


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def now() -> tuple[float, float]:
    """(CPU seconds of this process, wall seconds), the GPU's queue being empty."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def seconds_of(work) -> tuple[float, object]:
    """(seconds, result) of `work()`: CPU seconds, which neighbours on the machine hardly change; on a GPU wall."""
    start = now()
    result = work()
    return now()[on_gpu()] - start[on_gpu()], result


def memory() -> tuple[float, float]:
    """(now, peak since `reset_peak`) in MiB: resident, or allocated on the GPU."""
    if on_gpu():
        import torch

        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def reset_peak() -> None:
    if on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


# --- processes that work on demand --------------------------------------------------------------------------------


class Worker:
    """A child process that has imported and loaded everything and does one step each time it is called.

    `script --worker SETTINGS` must build a `Steps` and go through its begin, stages and end again and again.
    """

    def __init__(self, script: str, settings: dict, threads: int):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        cores = sorted(os.sched_getaffinity(0))[:threads]
        self.process = subprocess.Popen(
            [sys.executable, script, "--worker", json.dumps({**settings, "cores": cores})],
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def __call__(self) -> dict:
        """One step's measurements, as `Steps.end` sends them. The child's own words are shown if it dies."""
        try:
            print("go", file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.log.seek(0)
            sys.exit(f"error: a worker died; its last words:\n{self.log.read()[-4000:]}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Steps:
    """The child's side of a Worker: waits to be asked, clocks a step and its stages, and answers."""

    def __init__(self, cores: list[int]):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the code under test prints goes to the log
        if not on_gpu():
            os.sched_setaffinity(0, cores)
        self.idle = self.start = self.stage_now = None

    def begin(self) -> None:
        """Wait until a step is wanted, and start its clock."""
        if self.idle is None:
            reset_peak()
            self.idle = memory()[0]
        if not sys.stdin.readline():
            os._exit(0)  # the parent is gone
        self.stages, self.counts = defaultdict(lambda: [0.0, 0.0]), defaultdict(int)
        self.start = now()

    @contextmanager
    def stage(self, name: str):
        """Clock a block as part of a stage, unless a stage is being clocked already."""
        if self.start is None or self.stage_now:
            yield
            return
        self.stage_now, start = name, now()
        yield
        self.stage_now = None
        self.stages[name] = [total + b - a for total, a, b in zip(self.stages[name], start, now(), strict=True)]

    def clocked(self, inner, stage: str):
        """The same function, clocked."""

        def outer(*args, **kwargs):
            with self.stage(stage):
                return inner(*args, **kwargs)

        return outer

    def clock(self, owner, method: str, stage: str) -> None:
        """Clock a method of one object."""
        setattr(owner, method, self.clocked(getattr(owner, method), stage))

    def end(self, tokens: int) -> None:
        """Answer: tokens sampled, {stage: [CPU s, wall s]}, positions by model and stage, memory in MiB."""
        step = [b - a for a, b in zip(self.start, now(), strict=True)]
        rest = [whole - sum(part[i] for part in self.stages.values()) for i, whole in enumerate(step)]
        answer = {"tokens": tokens, "stages": {**self.stages, "rest": rest, "step": step}, "counts": self.counts}
        print(json.dumps({**answer, "idle": self.idle, "peak": memory()[1]}), file=self.answers, flush=True)
        self.start = None


# --- output -------------------------------------------------------------------------------------------------------


def table(rows: list[list]) -> str:
    """Rows as aligned text: the first column to the left, the others to the right; floats with three digits."""
    cells = [[f"{x:.3g}" if isinstance(x, float) and abs(x) < 100 else f"{x:.0f}" if isinstance(x, float) else str(x)
              for x in row] for row in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )
