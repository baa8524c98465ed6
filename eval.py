"""Evaluation: held-out accuracy (`evaluate`, training's stage 7, and a script), and benchmarks.

    python eval.py runs/quickstart                               # sampled and greedy
    python eval.py runs/quickstart --prompts 200 --seed 1
    python eval.py RUN_OR_MODEL --benchmark math500 --data FILE  # greedy
    python eval.py RUN_OR_MODEL --benchmark aime24 --data FILE --samples 16 --temperature 0.6
    python eval.py --regrade OUTPUTS.jsonl [--grader NAME]       # no model is loaded

Under torchrun the ranks share the work.

A benchmark is a dataset of tasks.ROWS. Every response is saved with its verdict as soon as it is
graded. The same command goes on where a killed one stopped: it samples the same prompts together as
if it had not been killed, so that on as many ranks it ends with the same file.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data import (
    DataConfig,
    apply_prompt,
    check_references,
    encode_prompts,
    require_graders,
)
from infra.config import Block, knob, saved_block, saved_config
from infra.console import programs_line
from infra.errors import EXIT_STOPPED, BadInput, Parser, RunStopped, enough_memory
from infra.eval_outputs import open_outputs, read_outputs
from infra.processes import (
    command_line,
    map_over_ranks,
    on_first_rank,
    print0,
    rank,
    start_processes,
    world_size,
)
from infra.rng import Draw
from infra.run_folder import append_line
from infra.waiting import counted, stage
from model import Policy
from rewards import Grader, RewardConfig
from rewards.benchmark_metrics import benchmark_metrics, whole_problems, wilson_interval
from sample import (
    SampleConfig,
    context_left,
    held_out_prompts,
    open_run,
    sample,
    with_stop_strings,
)
from tasks.datasets import ROWS, read_problems
from tasks.problem import Problem, problems_hash

# Responses per rank between two savings: as many as a GPU decodes together
ROWS_AT_ONCE = 1024


@dataclass
class EvalConfig(Block):
    every: int = knob(
        10, "steps between evaluations; the start and the last step too", least=1, resume=True
    )
    prompts: int = knob(256, "held-out prompts used, the first ones", least=1, resume=True)


@enough_memory("evaluate")
@stage("evaluate")
def evaluate(
    policy: Policy,
    problems: list[Problem],
    prompts: list[list[int]],
    config: SampleConfig,
    grader: Grader,
    seed: int,
) -> dict[str, float]:
    """One response per prompt at `config.temperature` and one greedy -> the `eval/*` metrics.

    The uniforms depend on (seed, prompt index) alone, so that two evaluations differ by the model,
    not by luck. `eval/accuracy` is the mean score, `eval/response_length` the mean tokens at
    `config.temperature`, `eval/response_length_right` that of right ones (a score above 0.5).
    Responses without a verdict (a grader's fault) count in no accuracy and not in `eval/n`.
    """
    keys = [(seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    metrics = {}
    ways = (("eval/accuracy", config.temperature), ("eval/accuracy_greedy", 0.0))
    for name, temperature in counted(ways, "pass"):
        batch = sample(policy, prompts, keys, config, group_size=1, temperature=temperature)
        verdicts = map_over_ranks(grader.grade, list(zip(problems, batch.texts, strict=True)))
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if not scores:
            raise RunStopped(
                f"no held-out response has a verdict: does reward.grader fit? {verdicts[0].reason}"
            )
        metrics[name] = sum(scores) / len(scores)
        if temperature:
            lengths = batch.mask.sum(1).tolist()
            right = [
                length
                for length, verdict in zip(lengths, verdicts, strict=True)
                if (verdict.score or 0) > 0.5
            ]
            metrics["eval/response_length"] = sum(lengths) / len(lengths)
            if right:
                metrics["eval/response_length_right"] = sum(right) / len(right)
            metrics["eval/n"] = len(scores)
    return metrics


def eval_line(m: dict[str, float]) -> str:
    low, high = wilson_interval(m["eval/accuracy"] * m["eval/n"], m["eval/n"])
    return (
        f"held out: accuracy {m['eval/accuracy']:.3f} ({low:.3f} to {high:.3f}), greedy "
        f"{m['eval/accuracy_greedy']:.3f}, length {m['eval/response_length']:.1f}, n {m['eval/n']}"
    )


# --- benchmarks -----------------------------------------------------------------------------------


def table_row(settings: dict, rows: list[dict]) -> str:
    """One row of the README's table of benchmarks, with its header."""
    problems, left_out = whole_problems(rows)
    how = (
        f"{settings['samples']} at T={settings['temperature']:g}"
        if settings["temperature"]
        else "greedy"
    )
    cells = {
        "command": f"`python eval.py {shlex.join(sys.argv[1:])}`",
        "benchmark": f"{settings['benchmark']}, n = {len(problems)}"
        + (f", {left_out} left out: responses without a verdict" if left_out else ""),
        "samples": how,
    }
    for name, values in benchmark_metrics(rows).items():
        cells[name] = "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(
            *values, d=1 if "length" in name else 3
        )
    return "\n".join(
        f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells), cells.values())
    )


def benchmark_prompts(args, grader: Grader, policy: Policy, config: dict, max_new_tokens: int):
    """(problems, prompts, the hash of all problems) of --data.

    They are asked as the run asked its own unless flags say otherwise.
    """
    own = config.get("data", {})
    system, chat = (
        args.system_prompt or own.get("system_prompt", ""),
        own.get("chat_template", True) and not args.plain,
    )
    if own.get("source", "").startswith("eurus") and not system:
        print0(
            "note: this run's training rows brought a system prompt of their own; give it by "
            "--system-prompt"
        )
    try:
        data = DataConfig(
            source=args.benchmark, path=args.data, prompt=args.prompt, system_prompt=system
        )
    except ValueError as error:
        raise BadInput(f"--{error}") from error
    asked = apply_prompt(read_problems(args.benchmark, args.data), data)
    problems = asked[: args.limit]
    require_graders(problems, grader)
    check_references(problems, grader)
    limit = context_left(policy, max_new_tokens, sys.maxsize)
    fitting = encode_prompts(problems, policy.tokenizer, limit, chat, policy.known_ids)
    return *fitting, problems_hash(asked)


def grader_named(name: str, config: RewardConfig) -> Grader:
    """The grader of `config`, with `name` for all problems if it is given. Raises BadInput if
    there is none such.
    """
    try:
        return Grader(replace(config, grader=name))
    except ValueError as error:
        raise BadInput(f"--{error}") from error


def benchmark(args) -> None:
    """Sample, grade and save a few problems after the other; the ranks share the rows of each
    lot.
    """
    start_processes(timeout_minutes=24 * 60)
    policy, config = open_run(args.run_or_model)
    reward = saved_block(RewardConfig, config, "reward")
    grader = grader_named(args.grader, reward)
    sampling = saved_block(SampleConfig, config or {"sample": {"max_new_tokens": 3072}}, "sample")
    sampling = replace(sampling, max_new_tokens=args.max_new_tokens or sampling.max_new_tokens)
    sampling = with_stop_strings(sampling, args.stop)
    longest = sampling.max_new_tokens
    problems, prompts, of_all = benchmark_prompts(args, grader, policy, config, longest)
    settings = benchmark_settings(args, bool(config), reward, sampling)
    settings["problems"] = of_all
    settings["first_prompt"] = policy.tokenizer.decode(prompts[0])
    n = args.samples
    how = f"{n}xT{args.temperature:g}" if args.temperature else "greedy"
    file = Path(
        args.output or f"outputs/{Path(args.run_or_model).name}-{args.benchmark}-{how}.jsonl"
    )
    done = on_first_rank(lambda: open_outputs(file, settings))
    programs = programs_line(problems, grader)
    print0(f"{args.benchmark}: {len(problems)} problems x {n}, {done} done, into {file}{programs}")
    print0(repr(settings["first_prompt"]))
    lot = max(1, ROWS_AT_ONCE * world_size() // n)
    with tqdm(
        total=len(problems), initial=done, unit="problem", disable=True if rank() else None
    ) as bar:
        for start in range(0, len(problems), lot):
            chosen = range(start, min(start + lot, len(problems)))
            if chosen[-1] < done:
                continue
            keys = [(settings["seed"], Draw.EVALUATE, i) for i in chosen]
            batch = sample(
                policy, [prompts[i] for i in chosen], keys, sampling, n, args.temperature
            )
            answers = [
                (problems[i], text)
                for i, text in zip([i for i in chosen for _ in range(n)], batch.texts, strict=True)
            ]
            verdicts = map_over_ranks(grader.grade, answers)
            # A lot that was cut short is sampled whole again: rounding depends on who is in it
            save_responses(file, chosen, done, batch, answers, verdicts, grader)
            bar.update(len(chosen) - max(0, done - start))
    if rank() == 0:
        _, rows = read_outputs(file)
        # --limit may be less now
        print(table_row(settings, [row for row in rows if row["problem"] < len(problems)]))


def benchmark_settings(args, is_run: bool, reward: RewardConfig, sampling: SampleConfig) -> dict:
    """What makes outputs those of one evaluation: two that differ here are never mixed in one
    file.
    """
    names = (
        "run_or_model",
        "benchmark",
        "data",
        "prompt",
        "system_prompt",
        "plain",
        "samples",
        "temperature",
    )
    settings = {name: getattr(args, name) for name in (*names, "grader")} | {
        "code_fraction": reward.code_fraction
    }
    settings |= {"max_new_tokens": sampling.max_new_tokens, "seed": args.seed or 0}
    settings["stop"] = sampling.stop
    folder = Path(args.run_or_model, "model" if is_run else "")
    # Trained on, it is another model
    settings["model_saved"] = folder.stat().st_mtime if folder.is_dir() else None
    return settings


def save_responses(
    file: Path, chosen: range, done: int, batch, answers, verdicts, grader: Grader
) -> None:
    """Append a line per response to the `chosen` problems from the `done`-th on, on rank 0."""
    n = len(batch) // len(chosen)
    lengths, truncated = batch.mask.sum(1).tolist(), batch.truncated.tolist()
    for place, ((problem, text), verdict) in enumerate(zip(answers, verdicts, strict=True)):
        if chosen[place // n] < done:
            continue
        row = {
            "problem": chosen[place // n],
            "sample": place % n,
            "prompt": problem.prompt,
            "reference": problem.reference,
            "text": text,
            "grader": grader.name_for(problem),
            "score": verdict.score,
            "reason": verdict.reason,
            "length": lengths[place],
            "truncated": truncated[place],
        }
        append_line(file, row)


def regrade(args) -> None:
    """Grade saved outputs again, list the verdicts that differ, and report by the new ones."""
    settings, rows = read_outputs(Path(args.regrade))
    grader = Grader(RewardConfig(code_fraction=settings.get("code_fraction", False)))
    problems = [
        Problem(row["prompt"], row["reference"], args.grader or row["grader"]) for row in rows
    ]
    require_graders(problems, grader)
    verdicts = grader.grade(list(zip(problems, (row["text"] for row in rows), strict=True)))
    changes: Counter = Counter()
    for row, now in zip(rows, verdicts, strict=True):
        if now.score != row["score"]:
            changes[f"{row['score']} -> {now.score}"] += 1
            place = f"problem {row['problem']}, sample {row['sample']}"
            print(f"{place}: {row['score']} ({row['reason']}) -> {now.score} ({now.reason})")
        row |= {
            "grader": args.grader or row["grader"],
            "score": now.score,
            "reason": now.reason,
        }
    print(
        f"{changes.total()} of {len(rows)} verdicts differ "
        f"{dict(changes)}\n{table_row(settings, rows)}"
    )


# --- the script -----------------------------------------------------------------------------------


def held_out_accuracy(args) -> None:
    """Of a run's model on the run's own held-out prompts."""
    if not saved_config(Path(args.run_or_model)):
        raise BadInput(
            f"{args.run_or_model} is not a run folder, so it has no held-out prompts: give a "
            "--benchmark"
        )
    policy, config = open_run(args.run_or_model)
    grader = Grader(saved_block(RewardConfig, config, "reward"))
    settings = saved_block(SampleConfig, config, "sample")
    data = saved_block(DataConfig, config, "data")
    problems, prompts = held_out_prompts(policy, settings, data, config["seed"], grader)
    n = args.limit or config["eval"]["prompts"]
    if n > len(prompts):
        raise BadInput(f"--limit {n}: the run has {len(prompts)} held-out prompts")
    seed = config["seed"] if args.seed is None else args.seed
    metrics = evaluate(policy, problems[:n], prompts[:n], settings, grader, seed)
    n = metrics["eval/n"]
    for label, key in (
        (f"T={settings.temperature:g}", "eval/accuracy"),
        ("greedy", "eval/accuracy_greedy"),
    ):
        low, high = wilson_interval(round(metrics[key] * n), n)
        print(
            f"accuracy {label:8} {metrics[key]:.3f}   95 % interval {low:.3f} to {high:.3f}   n = "
            f"{n}"
        )
    print(f"response length   {metrics['eval/response_length']:.1f} tokens")


def parse_arguments():
    parser = Parser(description="Accuracy on a run's held-out prompts, or on a benchmark.")
    parser.add_argument(
        "run_or_model",
        nargs="?",
        help="a run folder; for a benchmark also a model folder or Hub id",
    )
    parser.add_argument(
        "--limit", "--prompts", type=int, help="the first ones alone; default: eval.prompts, or all"
    )
    parser.add_argument(
        "--seed", type=int, help="of the sampling; default: the run's, for a benchmark 0"
    )
    parser.add_argument("--benchmark", choices=sorted(ROWS), help="shape of the rows of --data")
    parser.add_argument("--data", help="file or Hub dataset, as data.path")
    parser.add_argument("--samples", type=int, default=1, help="responses per problem")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's, else 3072")
    parser.add_argument(
        "--stop", help="as sample.stop, '[\"\\n\\n\"]'; default: the run's, else none"
    )
    parser.add_argument(
        "--prompt", default="", help="text around {question}; default: the benchmark's own"
    )
    parser.add_argument("--system-prompt", default="", help="default: the run's")
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument(
        "--grader", default="", help="a name in rewards.GRADERS; default: the benchmark's own"
    )
    parser.add_argument("--output", help="default: outputs/MODEL-BENCHMARK-SAMPLING.jsonl")
    parser.add_argument(
        "--regrade", metavar="OUTPUTS", help="grade saved outputs again; loads no model"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.temperature < 0 or (args.samples > 1 and not args.temperature):
        raise BadInput("--temperature must not be negative, and several --samples need one above 0")
    if min(args.samples, *(1 if n is None else n for n in (args.limit, args.max_new_tokens))) < 1:
        raise BadInput("--samples, --limit and --max-new-tokens must be at least 1")
    if (args.seed or 0) < 0:
        raise BadInput("--seed must not be negative")
    if (
        not args.benchmark
        and not args.regrade
        and (args.samples > 1 or args.temperature or args.max_new_tokens or args.stop is not None)
    ):
        raise BadInput(
            "--samples, --temperature, --max-new-tokens and --stop are a --benchmark's: a run has "
            "its own"
        )
    if args.regrade:
        regrade(args)
    elif not args.run_or_model or bool(args.benchmark) != bool(args.data):
        raise BadInput(
            "give a run folder; or RUN_OR_MODEL --benchmark NAME --data FILE; or --regrade OUTPUTS"
        )
    elif args.benchmark:
        try:
            benchmark(args)
        except KeyboardInterrupt as error:
            raise RunStopped(
                "what was graded is saved; the same command goes on", EXIT_STOPPED
            ) from error
    else:
        held_out_accuracy(args)


if __name__ == "__main__":
    command_line(main)
