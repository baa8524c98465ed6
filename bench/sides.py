"""The two sides that step.py compares, each a child process that does one training step when asked: ours and TRL's.

Ours is train.main itself, with clocks on its stages and a source of prompts put in; TRL's is GRPOTrainer.train.
Response i of step s is forced to the same length on both sides: a function of the first of its uniform numbers, which
are a function of (seed, purpose, prompt position, sibling).
"""

import importlib.util
import json
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import common
from common import Steps, Work, Worker

STAGES = ("sample", "reward", "log_probs", "advantage", "update")
PROMPTS = 512  # different ones, for a model with random weights
PIP = "pip install trl datasets accelerate"


def has_trl() -> bool:
    return all(map(importlib.util.find_spec, PIP.split()[2:]))


def ours(settings: dict, work: Work, steps: Steps) -> None:
    """train.main on the work, one step on demand; never returns."""
    import rewards
    import tasks
    import train
    from infra.processes import command_line
    from tasks.problem import Problem

    timed = train.metrics.timed
    append_line = train.run_folder.append_line
    start_models = train.supervised.start_models

    @contextmanager
    def clocked(seconds, key):
        if key == "time/sample":
            steps.begin()
        with steps.stage(key.removeprefix("time/")), timed(seconds, key):
            yield

    def noted(file, row):
        append_line(file, row)
        if row["step"]:
            assert set(STAGES) == steps.stages.keys(), "train.py's stages have changed"
            steps.counts["refused"] = row["updates/refused"]
            steps.end(round(row["response_length/mean"] * work.prompts * work.group_size))

    def counted(*args):
        *models, start_hash = start_models(*args)
        for name, policy in zip(("policy", "reference"), models, strict=True):
            if policy is not None:
                policy.model.get_input_embeddings().register_forward_pre_hook(
                    lambda _, ids, name=name: count(f"{name}, {steps.stage_now}", ids[0].numel())
                )
        return *models, start_hash

    def count(key, n):
        if steps.start is not None:
            steps.counts[key] += n

    problems = [Problem(text, "", "digits") for text in settings["prompts"]]
    tasks.SOURCES["bench"] = lambda config, seed: (problems, problems)
    rewards.GRADERS["digits"] = lambda text, _: (sum(c.isdigit() for c in text) / max(1, len(text)), "digits")
    common.force_lengths(work)
    train.metrics.timed = clocked
    train.supervised.start_models = counted
    train.run_folder.append_line = noted
    train.baselines.advantage = steps.clocked(train.baselines.advantage, "advantage")
    (Path(settings["folder"]) / "empty.yaml").write_text("")
    config = {
        "run_dir": tempfile.mkdtemp(dir=settings["folder"]),
        "model.path": settings["model"],
        "model.attention": settings["attention"],
        "model.dtype": settings["dtype"],
        "data.source": "bench",
        "data.path": "made here",
        "data.prompt": "{question}",
        "sample.group_size": work.group_size,
        "sample.max_new_tokens": work.new_tokens,
        "algorithm.beta": 0.04,
        "train.prompts_per_step": work.prompts,
        "train.mini_batch_size": work.prompts * work.group_size,
        # The peer makes no pass for them either, having one update per step; in bfloat16 we must.
        "train.old_log_probs": "sampler" if settings["dtype"] == "float32" else "recompute",
        # As many rows as the peer's pass if all are full, their prompts once: shorter ones share the room.
        "train.micro_batch_tokens": -(-work.rows_per_pass // work.group_size) * work.prompt_tokens
        + work.rows_per_pass * work.new_tokens,
        "train.learning_rate": 1e-6,
        "eval.prompts": 1,
        **{key: 10**9 for key in ("train.steps", "train.save_every", "train.dump_every", "eval.every")},
    }
    sys.argv[1:] = [f"{settings['folder']}/empty.yaml", *(f"{k}={v}" for k, v in config.items()), *settings["config"]]
    command_line(train.main)


def trl(settings: dict, work: Work, steps: Steps) -> None:
    """TRL's GRPOTrainer on the work, one step on demand; never returns."""
    import torch
    from datasets import Dataset
    from infra.rng import Draw, rng_for
    from transformers import LogitsProcessorList, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows, tokens, place = work.prompts * work.group_size, 0, 0

    def digits(completions, completion_ids, **_):
        nonlocal tokens
        tokens = sum(map(len, completion_ids))
        texts = [x if isinstance(x, str) else x[0]["content"] for x in completions]
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in texts]

    def generate(**inputs):
        nonlocal place
        keys = [(0, Draw.SAMPLE, place + i, g) for i in range(work.prompts) for g in range(work.group_size)]
        place += work.prompts
        uniforms = torch.tensor([rng_for(*key).random() for key in keys], dtype=torch.float64)
        lengths = common.response_lengths(uniforms, work).to(model.device)
        width = inputs["input_ids"].shape[1]
        assert inputs["input_ids"].shape == (rows, work.prompt_tokens)

        def force(ids, scores):
            common.force_length_(scores, lengths, ids.shape[1] - width, work)
            return scores

        return inner_generate(**inputs, logits_processor=LogitsProcessorList([force]))

    class Gate(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **_):
            steps.clock(optimizer, "step", "update")
            steps.begin()

        def on_step_end(self, *args, **_):
            steps.end(tokens)
            steps.begin()

    config = GRPOConfig(
        output_dir=settings["folder"] + "/trl",
        use_cpu=not common.on_gpu(),
        bf16=settings["dtype"] == "bfloat16",  # autocast over fp32 weights: ours keeps fp32 master weights too
        gradient_checkpointing=False,
        per_device_train_batch_size=work.rows_per_pass,
        gradient_accumulation_steps=rows // work.rows_per_pass,
        num_generations=work.group_size,
        max_completion_length=work.new_tokens,
        beta=0.04,
        loss_type="grpo",
        model_init_kwargs={"dtype": "float32", "attn_implementation": settings["attention"]},
        learning_rate=1e-6,
        max_steps=10**9,
        logging_steps=10**9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(settings["model"])
    prompts = settings["prompts"]
    if tokenizer.chat_template:  # what our side does by default
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    dataset = Dataset.from_dict({"prompt": prompts})
    trainer = GRPOTrainer(settings["model"], digits, config, dataset, processing_class=tokenizer, callbacks=[Gate()])
    model = trainer.model
    inner_generate, model.generate = model.generate, generate
    steps.clock(model, "generate", "sample")
    steps.clock(trainer, "_calculate_rewards", "reward")
    steps.clock(trainer, "compute_loss", "update")
    steps.clock(trainer, "_get_per_token_logps_and_entropies", "log_probs")  # inside compute_loss it counts as that
    steps.clock(trainer.accelerator, "backward", "update")
    steps.clock(trainer.accelerator, "clip_grad_norm_", "update")
    trainer.train()


# --- starting and asking them -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What both sides have in common: where they may write, the model's folder, prompts, and how it is computed."""

    folder: str
    model: str
    prompts: tuple[str, ...]
    dtype: str = "float32"  # of compute on a GPU; a CPU computes in float32
    attention: str = "sdpa"
    onednn: bool = False


def side(name: str, setting: Setting, work: Work, config=()) -> dict:
    """The settings of one child: `name` is ours or TRL, `config` holds key=value for ours."""
    return {"name": name, "work": asdict(work), "config": list(config), **asdict(setting)}


def use_onednn(on: bool) -> None:
    """fp32 matrix products on a CPU through oneDNN, which on some is twice as fast as MKL; see `precision`."""
    import torch

    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if on else "ieee"


def measured(sides: dict[str, dict], args) -> dict[str, list[dict]]:
    """{side: its answers}: a step of each in turn, args.pairs times, after one of each that does not count."""
    workers = {name: Worker(__file__, settings, args.threads) for name, settings in sides.items()}
    try:
        answers = [{name: worker() for name, worker in workers.items()} for _ in range(args.pairs + 1)][1:]
    finally:
        for worker in workers.values():
            worker.close()
    if any(len({answer["tokens"] for answer in pair.values()}) > 1 for pair in answers):
        sys.exit("error: the sides sampled different numbers of tokens, so this compares nothing")
    return {name: [pair[name] for pair in answers] for name in sides}


if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    steps = Steps(settings["cores"])
    use_onednn(settings["onednn"])
    {"ours": ours, "TRL": trl}[settings["name"]](settings, Work(**settings["work"]), steps)
