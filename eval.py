"""What is measured: held-out accuracy (`evaluate`, training's stage 7, and a script), benchmarks, a step's metrics.

    python eval.py runs/quickstart                      # accuracy at the run's temperature and greedy, with intervals
    python eval.py runs/quickstart --prompts 200 --seed 1
    python eval.py RUN_OR_MODEL --benchmark math500 --data FILE                                   # greedy
    torchrun --nproc_per_node 8 eval.py RUN_OR_MODEL --benchmark aime24 --data FILE --samples 16 --temperature 0.6
    python eval.py --regrade OUTPUTS.jsonl [--grader NAME]                                        # no model is loaded

A benchmark is a dataset of tasks.ROWS. Every response is saved with its verdict as soon as it is graded; the same
command goes on where a killed one stopped, and prints the same row as if it had not been killed.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import json
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from math import comb, sqrt
from pathlib import Path
from statistics import fmean, pvariance, stdev

import torch
from tqdm import tqdm

from data import DataConfig, dressed, encode_prompts, load_problems, require_graders
from infra.config import require_at_least, saved_block, saved_config
from infra.errors import EXIT_STOPPED, BadInput, Parser, RunStopped, enough_memory
from infra.memory import memory_plan
from infra.processes import command_line, on_first_rank, rank, say, shared, start_processes, world_size
from infra.rng import Draw
from infra.run_folder import append_line, hold
from model import LOGITS_AT_ONCE
from rewards import Grader, RewardConfig
from rewards.answers import last_box
from sample import SampleConfig, context_left, generation_settings, open_run, sample
from spro import OUTCOME_ONLY
from tasks.datasets import ROWS, read_problems
from tasks.problem import Problem


@dataclass
class EvalConfig:
    every: int = 10  # evaluate every this many steps; the start and the last step always are
    prompts: int = 256  # held-out prompts used, the first ones

    def __post_init__(self):
        require_at_least(1, self, "every", "prompts")


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike +- 2 standard errors, honest near 0 and 1."""
    centre, spread = right + z * z / 2, z * sqrt(right * (n - right) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


@enough_memory("evaluate")
def evaluate(
    model, tokenizer, problems: list[Problem], prompts: list[list[int]], config: SampleConfig, grader: Grader, seed: int
) -> dict[str, float]:
    """One response per prompt at `config.temperature` and one greedy -> the `eval/*` metrics.

    The uniforms depend on (seed, prompt index) alone, so that two evaluations differ by the model, not by luck.
    `eval/accuracy` is the mean score, `eval/response_length` the mean tokens at `config.temperature`; responses
    without a verdict (a grader's fault) count in neither accuracy nor `eval/n`.
    """
    keys = [(seed, Draw.EVALUATE, i) for i in range(len(prompts))]
    metrics = {}
    for name, temperature in (("eval/accuracy", config.temperature), ("eval/accuracy_greedy", 0.0)):
        rollout = sample(model, tokenizer, prompts, keys, config, group_size=1, temperature=temperature)
        answers = list(zip(problems, rollout.texts, strict=True))
        verdicts = shared(grader.grade, answers)
        scores = [verdict.score for verdict in verdicts if verdict.score is not None]
        if not scores:
            raise RunStopped(f"no held-out response has a verdict: does reward.grader fit? {verdicts[0].reason}")
        metrics[name] = sum(scores) / len(scores)
        if temperature:
            metrics["eval/response_length"] = rollout.mask.sum(1).double().mean().item()
            metrics["eval/n"] = len(scores)
    return metrics


def eval_line(m: dict[str, float]) -> str:
    low, high = wilson_interval(m["eval/accuracy"] * m["eval/n"], m["eval/n"])
    return (
        f"held out: accuracy {m['eval/accuracy']:.3f} ({low:.3f} to {high:.3f}), greedy "
        f"{m['eval/accuracy_greedy']:.3f}, length {m['eval/response_length']:.1f}, n {m['eval/n']}"
    )


def programs(problems: list[Problem], grader: Grader) -> str:
    """For the lines of a start: what programs run in, where any is graded."""
    graded = "code" in {grader.name_for(problem) for problem in problems}
    return f"; programs run in {grader.isolation()}" if graded else ""


def describe(config, policy, tokenizer, device, problems: list[Problem], n_held_out: int) -> str:
    """What is about to run, with the batch arithmetic and the sampling settings that are really in force."""
    t, s, a = config.train, config.sample, config.algorithm
    responses = t.prompts_per_step * s.group_size
    settings = generation_settings(policy, s).to_diff_dict()
    settings.pop("transformers_version", None)
    kl = f", kl_coef {a.kl_coef:g} ({a.kl_estimator})" if a.kl_coef else ""
    chat = "chat template" if config.data.chat_template and tokenizer.chat_template else "plain text"
    ends = policy.generation_config
    stops = " ".join(tokenizer.convert_ids_to_tokens(ends.eos_token_id))
    return "\n".join((
        f"{a.advantage}{'' if a.advantage in OUTCOME_ONLY else f', beta {a.beta:g}'}{kl}, seed {config.seed}, "
        f"into {config.run_dir}",
        f"model    {config.model.path or 'from scratch'}: {policy.config.model_type}, {policy.num_parameters():,} "
        f"parameters; {world_size()} x {device.type}, {torch.get_num_threads()} threads each",
        f"data     {config.data.source}: {len(problems)} training prompts, {n_held_out} held out for evaluation"
        f"{programs(problems, Grader(config.reward))}",
        f"prompts  {chat}, {'with a' if any(p.system for p in problems) else 'no'} system prompt; stop {stops} "
        f"{ends.eos_token_id}, pad {ends.pad_token_id}; {config.model.dtype if device.type == 'cuda' else 'float32'}, "
        f"{policy.config._attn_implementation} attention",
        f"step     {t.prompts_per_step} prompts x {s.group_size} samples = {responses} responses = "
        f"{responses // t.mini_batch_size} optimizer steps in micro-batches of at most "
        f"{t.micro_batch_tokens} tokens; {t.epochs} epoch(s); keeping groups of accuracy {list(a.keep_accuracy)}"
        + f", at most {t.max_refills} refill(s)" * bool(t.max_refills),
        f"sampler  softmax at temperature {s.temperature:g} over the whole vocabulary; generate: {settings}",
    ))  # fmt: skip


def dry_run_report(config, policy, tokenizer, prompts: list[list[int]]) -> str:
    """The first prompts exactly as the model will see them, and the memory plan of each rank."""
    t, s = config.train, config.sample
    shown = [f"prompt {i + 1}: {tokenizer.decode(ids)!r}" for i, ids in enumerate(prompts[:2])]
    ranks = max(world_size(), config.model.shard * config.model.replicate)
    on_gpu = torch.cuda.is_available() or bool(config.model.path)  # a plan for a saved model is one for GPUs
    row = max(map(len, prompts)) + s.max_new_tokens
    plan = memory_plan(
        policy,
        config.model,
        ranks,
        on_gpu,
        sampled_tokens=min(max(row, s.batch_tokens), row * -(-t.prompts_per_step * s.group_size // ranks)),
        tokens_per_row=row,
        trained_tokens=min(max(row, t.micro_batch_tokens), row * -(-t.mini_batch_size // ranks)),
        has_reference=config.needs_reference,
        has_prm=config.needs_prm,
        logits_at_once=LOGITS_AT_ONCE,
    )
    table = [f"  {name:<42} {gib:9.3f} GiB" for name, gib in plan.items()]
    return "\n".join(
        [
            *shown,
            f"memory of each of {ranks} {'GPU' if on_gpu else 'CPU process'}(s), estimated:",
            *table,
            "dry run: nothing was written",
        ]
    )


# --- benchmarks ---------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 128  # responses per rank between two savings


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, `right` of them right, hold a right one (unbiased; arXiv 2107.03374, Eq. 1)."""
    return 1 - comb(n - right, k) / comb(n, k)


def majority(votes: list[tuple[str | None, float]]) -> float:
    """Score of the most common answer of (answer, score) pairs; of several as common, their mean score.

    That is the expected score where ties are broken at random. Without an answer (None) there is no vote.
    """
    scores = defaultdict(list)
    for answer, score in votes:
        if answer is not None:
            scores["".join(answer.split())].append(score)
    most = max(map(len, scores.values()), default=0)
    return fmean([fmean(group) for group in scores.values() if len(group) == most] or [0.0])


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value in [0, 1] per problem, and its 95 % interval over problems like these.

    Wilson's interval at the effective sample size m(1-m) / variance, by which n exceeds that of yes-or-no values (Korn
    and Graubard 1998 do so for surveys): exactly Wilson's for those, narrower for averages of several samples. It
    covers more often than bootstrap and normal intervals; worst are few problems of which few are ever solved.
    """
    m, n = fmean(values), len(values)
    n *= m * (1 - m) / pvariance(values) if len(set(values)) > 1 else 1
    return m, *wilson_interval(m * n, n)


def benchmark_metrics(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """name -> (mean over problems, low, high) of saved outputs; a response without a verdict counts in no score.

    accuracy is the mean score (avg@n), pass@k takes a score of 1 as right, maj@n lets all n samples of a problem
    vote by what they box (absent where nothing is boxed).
    """
    problems = defaultdict(list)
    for row in rows:
        problems[row["problem"]].append(row)
    graded = [[row for row in group if row["score"] is not None] for group in problems.values()]
    graded = [group for group in graded if group]
    if not graded:
        raise BadInput(f"no response has a verdict; the first: {rows[0]['reason'] if rows else 'there is none'}")
    n = max(map(len, graded))
    metrics = {"accuracy": mean_interval([fmean(row["score"] for row in group) for group in graded])}
    for k in sorted({2**i for i in range(1, n.bit_length())} | {n} - {1}):
        counts = [(len(group), sum(row["score"] == 1 for row in group)) for group in graded if len(group) >= k]
        metrics[f"pass@{k}"] = mean_interval([pass_at_k(*count, k) for count in counts])
    votes = [[(last_box(row["text"]), row["score"]) for row in group] for group in graded]
    if n > 1 and any(answer is not None for group in votes for answer, _ in group):
        metrics[f"maj@{n}"] = mean_interval([majority(group) for group in votes])
    lengths = [fmean(row["length"] for row in group) for group in problems.values()]
    m, half = fmean(lengths), 1.96 * stdev(lengths) / sqrt(len(lengths)) if len(lengths) > 1 else 0.0
    cut = mean_interval([fmean(row["truncated"] for row in group) for group in problems.values()])
    return metrics | {"length, tokens": (m, m - half, m + half), "cut off": cut}


def table_row(settings: dict, rows: list[dict]) -> str:
    """One row of the README's table of benchmarks, with its header."""
    faults, n = sum(row["score"] is None for row in rows), len({row["problem"] for row in rows})
    how = f"{settings['samples']} at T={settings['temperature']:g}" if settings["temperature"] else "greedy"
    cells = {
        "command": f"`python eval.py {shlex.join(sys.argv[1:])}`",
        "benchmark": f"{settings['benchmark']}, n = {n}" + (f", {faults} without a verdict" if faults else ""),
        "samples": how,
    }
    for name, values in benchmark_metrics(rows).items():
        cells[name] = "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*values, d=1 if "length" in name else 3)
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells, ["---"] * len(cells), cells.values()))


def read_outputs(file: Path) -> tuple[dict, list[dict]]:
    """(settings, rows) of saved outputs; a last line that was cut short is left out."""
    try:
        lines = file.read_text().splitlines(keepends=True)
        first, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return first["settings"], rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} cannot be read as outputs of eval.py: {error}") from error


def open_outputs(file: Path, settings: dict) -> int:
    """Make FILE, or cut it back to whole problems -> how many it has.

    BadInput if it is another evaluation's, if one that still runs writes it, or if it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        hold(file.with_name(f"{file.name}.lock"), f"--output {file}")
    except OSError as error:
        raise BadInput(f"{file} cannot be written: {error}") from error
    saved, rows = read_outputs(file) if file.exists() else (settings, [])
    if saved != settings:
        changed = ", ".join(f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in settings.items() if saved.get(k) != v)
        raise BadInput(f"{file} holds another evaluation ({changed}): choose another --output")
    done = len(rows) // settings["samples"]
    kept = [{"settings": settings}, *rows[: done * settings["samples"]]]
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(file)
    return done


def benchmark_prompts(args, grader: Grader, model, tokenizer, config: dict, max_new_tokens: int):
    """(problems, prompts) of --data, asked as the run asked its own unless flags say otherwise."""
    own = config.get("data", {})
    system, chat = args.system_prompt or own.get("system_prompt", ""), own.get("chat_template", True) and not args.plain
    if own.get("source", "").startswith("eurus") and not system:
        say("note: this run's training rows brought a system prompt of their own; give it by --system-prompt")
    try:
        data = DataConfig(source=args.benchmark, path=args.data, prompt=args.prompt, system_prompt=system)
    except ValueError as error:
        raise BadInput(f"--{error}") from error
    problems = dressed(read_problems(args.benchmark, args.data), data)[: args.limit]
    require_graders(problems, grader)
    return encode_prompts(problems, tokenizer, context_left(model, max_new_tokens, sys.maxsize), chat)


def grader_named(name: str, config: RewardConfig) -> Grader:
    """The grader of `config`, with `name` for all problems if it is given. Raises BadInput if there is none such."""
    try:
        return Grader(replace(config, grader=name))
    except ValueError as error:
        raise BadInput(f"--{error}") from error


def benchmark(args) -> None:
    """Sample, grade and save a few problems after the other; the ranks share the rows of each lot."""
    start_processes(timeout_minutes=24 * 60)
    model, tokenizer, config = open_run(args.run_or_model)
    reward = saved_block(RewardConfig, config, "reward")
    grader = grader_named(args.grader, reward)
    sampling = saved_block(SampleConfig, config or {"sample": {"max_new_tokens": 3072}}, "sample")
    sampling = replace(sampling, max_new_tokens=args.max_new_tokens or sampling.max_new_tokens)
    problems, prompts = benchmark_prompts(args, grader, model, tokenizer, config, sampling.max_new_tokens)
    names = ("run_or_model", "benchmark", "data", "prompt", "system_prompt", "plain", "samples", "temperature")
    settings = {name: getattr(args, name) for name in (*names, "grader")} | {"code_fraction": reward.code_fraction}
    settings |= {"max_new_tokens": sampling.max_new_tokens, "seed": args.seed or 0}
    folder = Path(args.run_or_model, "model" if config else "")
    settings["model_saved"] = folder.stat().st_mtime if folder.is_dir() else None  # trained on, it is another model
    settings["first_prompt"] = tokenizer.decode(prompts[0])
    n = args.samples
    how = f"{n}xT{args.temperature:g}" if args.temperature else "greedy"
    file = Path(args.output or f"outputs/{Path(args.run_or_model).name}-{args.benchmark}-{how}.jsonl")
    done = on_first_rank(lambda: open_outputs(file, settings))
    say(f"{args.benchmark}: {len(problems)} problems x {n}, {done} done, into {file}{programs(problems, grader)}")
    say(repr(settings["first_prompt"]))
    lot = max(1, ROWS_AT_ONCE * world_size() // n)
    with tqdm(total=len(problems), initial=done, unit="problem", disable=True if rank() else None) as bar:
        for start in range(done, len(problems), lot):
            chosen = range(start, min(start + lot, len(problems)))
            keys = [(settings["seed"], Draw.EVALUATE, i) for i in chosen]
            rollout = sample(model, tokenizer, [prompts[i] for i in chosen], keys, sampling, n, args.temperature)
            asked = [(i, j) for i in chosen for j in range(n)]
            answers = [(problems[i], text) for (i, _), text in zip(asked, rollout.texts, strict=True)]
            verdicts = shared(grader.grade, answers)
            ends = zip(rollout.mask.sum(1).tolist(), rollout.truncated.tolist(), strict=True)
            for (i, j), (problem, text), verdict, (length, cut) in zip(asked, answers, verdicts, ends, strict=True):
                row = {
                    "problem": i,
                    "sample": j,
                    "prompt": problem.prompt,
                    "reference": problem.reference,
                    "text": text,
                }
                row |= {"grader": args.grader or problem.grader, "score": verdict.score, "reason": verdict.reason}
                append_line(file, row | {"length": length, "truncated": cut})
            bar.update(len(chosen))
    if rank() == 0:
        _, rows = read_outputs(file)
        print(table_row(settings, [row for row in rows if row["problem"] < len(problems)]))  # --limit may be less now


def regrade(args) -> None:
    """Grade saved outputs again, list the verdicts that differ, and report by the new ones."""
    settings, rows = read_outputs(Path(args.regrade))
    grader = Grader(RewardConfig(code_fraction=settings.get("code_fraction", False)))
    problems = [Problem(row["prompt"], row["reference"], args.grader or row["grader"]) for row in rows]
    require_graders(problems, grader)
    verdicts = grader.grade(list(zip(problems, (row["text"] for row in rows), strict=True)))
    changes: Counter = Counter()
    for row, now in zip(rows, verdicts, strict=True):
        if now.score != row["score"]:
            changes[f"{row['score']} -> {now.score}"] += 1
            place = f"problem {row['problem']}, sample {row['sample']}"
            print(f"{place}: {row['score']} ({row['reason']}) -> {now.score} ({now.reason})")
        row |= {"score": now.score, "reason": now.reason}
    print(f"{changes.total()} of {len(rows)} verdicts differ {dict(changes)}\n{table_row(settings, rows)}")


# --- the script ---------------------------------------------------------------------------------------------------


def held_out_accuracy(args) -> None:
    """Of a run's model on the run's own held-out prompts."""
    if not saved_config(Path(args.run_or_model)):
        raise BadInput(f"{args.run_or_model} is not a run folder, so it has no held-out prompts: give a --benchmark")
    model, tokenizer, config = open_run(args.run_or_model)
    grader = Grader(saved_block(RewardConfig, config, "reward"))
    settings, data = saved_block(SampleConfig, config, "sample"), saved_block(DataConfig, config, "data")
    limit = context_left(model, settings.max_new_tokens, data.max_prompt_tokens)
    held_out = load_problems(data, config["seed"], grader)[1]
    problems, prompts = encode_prompts(held_out, tokenizer, limit, data.chat_template)
    n = args.limit or config["eval"]["prompts"]
    if n > len(prompts):
        raise BadInput(f"--limit {n}: the run has {len(prompts)} held-out prompts")
    seed = config["seed"] if args.seed is None else args.seed
    metrics = evaluate(model, tokenizer, problems[:n], prompts[:n], settings, grader, seed)
    n = metrics["eval/n"]
    for label, key in ((f"T={settings.temperature:g}", "eval/accuracy"), ("greedy", "eval/accuracy_greedy")):
        low, high = wilson_interval(round(metrics[key] * n), n)
        print(f"accuracy {label:8} {metrics[key]:.3f}   95 % interval {low:.3f} to {high:.3f}   n = {n}")
    print(f"response length   {metrics['eval/response_length']:.1f} tokens")


def main() -> None:
    parser = Parser(description="Accuracy on a run's held-out prompts, or on a benchmark.")
    parser.add_argument("run_or_model", nargs="?", help="a run folder; for a benchmark also a model folder or Hub id")
    parser.add_argument("--limit", "--prompts", type=int, help="the first ones alone; default: eval.prompts, or all")
    parser.add_argument("--seed", type=int, help="of the sampling; default: the run's, for a benchmark 0")
    parser.add_argument("--benchmark", choices=sorted(ROWS), help="shape of the rows of --data")
    parser.add_argument("--data", help="file or Hub dataset, as data.path")
    parser.add_argument("--samples", type=int, default=1, help="responses per problem")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's, else 3072")
    parser.add_argument("--prompt", default="", help="text around {question}; default: the benchmark's own")
    parser.add_argument("--system-prompt", default="", help="default: the run's")
    parser.add_argument("--plain", action="store_true", help="without the chat template")
    parser.add_argument("--grader", default="", help="a name in rewards.GRADERS; default: the benchmark's own")
    parser.add_argument("--output", help="default: outputs/MODEL-BENCHMARK-SAMPLING.jsonl")
    parser.add_argument("--regrade", metavar="OUTPUTS", help="grade saved outputs again; loads no model")
    args = parser.parse_args()
    if args.temperature < 0 or (args.samples > 1 and not args.temperature):
        raise BadInput("--temperature must not be negative, and several --samples need one above 0")
    if min(args.samples, *(1 if n is None else n for n in (args.limit, args.max_new_tokens))) < 1:
        raise BadInput("--samples, --limit and --max-new-tokens must be at least 1")
    if (args.seed or 0) < 0:
        raise BadInput("--seed must not be negative")
    if not args.benchmark and not args.regrade and (args.samples > 1 or args.temperature or args.max_new_tokens):
        raise BadInput("--samples, --temperature and --max-new-tokens are a --benchmark's: a run has its own")
    if args.regrade:
        regrade(args)
    elif not args.run_or_model or bool(args.benchmark) != bool(args.data):
        raise BadInput("give a run folder; or RUN_OR_MODEL --benchmark NAME --data FILE; or --regrade OUTPUTS")
    elif args.benchmark:
        try:
            benchmark(args)
        except KeyboardInterrupt as error:
            raise RunStopped("what was graded is saved; the same command goes on", EXIT_STOPPED) from error
    else:
        held_out_accuracy(args)


if __name__ == "__main__":
    command_line(main)
