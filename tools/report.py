"""Compare runs: a Markdown table with intervals, figures, or a live view in the terminal.

    python -m tools.report RUN ... [--baseline NAME] [--threshold 0.8] [--figures DIR] [--output FILE.md]
    python -m tools.report RUN ... --watch [SECONDS]

RUN is a run folder, or a folder with runs in it at any depth (a sweep's warm starts are no runs). Runs are grouped by
their resolved configs, but for the seed, the warm start and what only places, saves or divides the work. A group is
named after its config in a sweep, else after its estimator. Only finished runs are in the table and the figures: the
others are named on stderr and counted in the table, for if it is the diverged runs that end early, the rest flatters.
"""

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from infra.config import all_keys, flat, keys_where
from train import Config

LAST_STEPS = 5  # entropy at the end is the mean over these: a step has few kept groups
PER_FIGURE = 8  # groups: more lines than these are not told apart


def end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    folder: Path
    config: dict  # resolved, flat: dotted keys
    rows: list[dict]  # of steps 0, 1, ...
    fault: str = ""  # why it cannot be used

    @property
    def steps(self) -> int:
        return self.config.get("train.steps", 0)

    @property
    def done(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @cached_property
    def sampled_tokens(self) -> np.ndarray:
        """The tokens that it had sampled by the end of each step, evaluations left out: of responses, of continuations
        that value prefixes, and before RL for V*.
        """
        of_responses = [row.get("tokens_per_second", 0.0) * row.get("time/step", 0.0) for row in self.rows]
        of_continuations = [row.get("values/tokens", 0) for row in self.rows]
        file = self.folder / "v_star.jsonl"
        text = file.read_text() if file.exists() else ""  # whose last line may be cut short
        before = sum(map(int, re.findall(r'"tokens": (\d+)', text)))
        return before + np.cumsum(np.add(of_responses, of_continuations)).round()


def find_runs(paths: list[Path]) -> list[Path]:
    """The run folders among and below `paths`, each once, in order."""
    found = {}
    for path in paths:
        below = [path / "config.yaml"] if (path / "config.yaml").exists() else sorted(path.rglob("config.yaml"))
        runs = [f.parent for f in below if f.parent == path or "warm_starts" not in f.relative_to(path).parts]
        found |= {run.resolve(): run for run in runs if not run.name.endswith(".overwritten")}
    return list(found.values())


def no_run_in(paths: list[Path]) -> str:
    """What is said where `find_runs` finds none."""
    return f"no run in {', '.join(map(str, paths))}: a run's folder has a config.yaml"


def read_rows(file: Path) -> tuple[list[dict], str]:
    """(rows, fault) of a metrics.jsonl. A last line that is still being written is left out; it is no fault."""
    rows: list[dict] = []
    text = file.read_text(errors="replace") if file.exists() else ""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == text.count("\n") + 1:
                break
            return rows, f"{file}:{number}: not a line of JSON"
        if not isinstance(row, dict) or row.get("step") != len(rows):
            return rows, f"{file}:{number}: not the row of step {len(rows)}, which is due here"
        rows.append(row)
    return rows, ""


def read_run(folder: Path) -> Run:
    try:
        safe_loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one: a sweep has many configs
        config = safe_loader((folder / "config.yaml").read_text()).get_single_data()
        if not isinstance(config, dict) or not {"algorithm", "train", "run_dir"} <= config.keys():
            raise ValueError("it is not the config of a run")
    except (OSError, ValueError, yaml.YAMLError) as error:
        return Run(folder, {}, [], f"{folder / 'config.yaml'}: {' '.join(str(error).split())}")
    run = Run(folder, flat(config), *read_rows(folder / "metrics.jsonl"))
    if run.fault:
        return run
    if run.done < run.steps or not run.rows:
        run.fault = f"{folder}: unfinished, at step {run.done} of {run.steps}"
    for row in (run.rows[0], run.rows[-1]) if not run.fault else ():
        if not isinstance(row.get("eval/accuracy"), int | float):
            run.fault = f"{folder / 'metrics.jsonl'}:{row['step'] + 1}: no eval/accuracy"
    return run


def difference(a: dict, b: dict) -> list[str]:
    return sorted(key for key in a | b if a.get(key) != b.get(key))


def settings(run: Run) -> dict:
    """What of its config makes a run comparable with others: all but what its knobs say does not count."""
    compared, known = set(keys_where(Config, "compared")), set(all_keys(Config))
    kept = {key: value for key, value in run.config.items() if key in compared or key not in known}
    if str(kept.get("model.path", "")).endswith("warm_start/model"):
        kept["model.path"] = ""
    return kept


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by a short name; where several groups would have one name, what differs between those follows it."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        swept = re.fullmatch(r"warm\d+-seed\d+", run.folder.name)
        name = run.folder.resolve().parent.name if swept else str(run.config.get("algorithm.advantage"))
        groups.setdefault((name, json.dumps(settings(run), sort_keys=True)), []).append(run)
    named = {}
    for (name, signature), members in groups.items():
        twins = [settings(group[0]) for (other, _), group in groups.items() if other == name]
        keys = sorted({key for twin in twins for key in difference(twin, twins[0])})
        short = {key: key.split(".")[-1] for key in keys}
        alike = Counter(short.values())
        values = json.loads(signature)
        words = [f"{short[key] if alike[short[key]] == 1 else key} {values.get(key)}" for key in keys]
        named[", ".join([name, *words])] = members
    return named


def set_copies_aside(groups: dict[str, list[Run]]) -> None:
    """Of runs with one config, warm start and seed only the first counts: the others are the same run again."""
    for members in groups.values():
        first: dict[tuple, Run] = {}
        for run in members:
            twin = first.setdefault((warm_start(run, members), run.seed), run) if not run.fault else run
            if twin is not run:
                run.fault = f"{run.folder}: the same config, warm start and seed as {twin.folder}"


# --- statistics ---------------------------------------------------------------------------------------------------


def steps_to(threshold: float, points: list[tuple[int, float]]) -> float:
    """The step at which accuracy first reaches `threshold`, interpolated between evaluations; NaN if it never does."""
    step, accuracy = points[0]
    if accuracy >= threshold:
        return step
    for (step, accuracy), (later, higher) in pairwise(points):
        if higher >= threshold:
            return step + (later - step) * (threshold - accuracy) / (higher - accuracy)
    return math.nan


def accuracy_at(tokens: float, run: Run) -> float:
    """The accuracy when so many tokens had been sampled, interpolated between evaluations; NaN outside of them."""
    places = [row["step"] for row in run.rows if "eval/accuracy" in row]
    accuracies = [run.rows[place]["eval/accuracy"] for place in places]
    return float(np.interp(tokens, run.sampled_tokens[places], accuracies, left=math.nan, right=math.nan))


def measure(run: Run, threshold: float, tokens: float) -> dict[str, float]:
    """What one run comes to, by column, its accuracy at so many tokens too; NaN where its metrics do not say."""
    points = [(row["step"], row["eval/accuracy"]) for row in run.rows if "eval/accuracy" in row]
    entropies = [row["entropy"] for row in run.rows[-LAST_STEPS:] if "entropy" in row]
    return {
        "accuracy": points[-1][1],
        "area": float(np.mean([accuracy for step, accuracy in points if step > 0])) if len(points) > 1 else math.nan,
        "steps": steps_to(threshold, points),
        "entropy": float(np.mean(entropies)) if entropies else math.nan,
        "length": run.rows[-1].get("eval/response_length", math.nan),
        "right": run.rows[-1].get("eval/response_length_right", math.nan),
        "tokens": run.sampled_tokens[-1] / 1e3,
        "at_tokens": accuracy_at(tokens, run),
        "seconds": sum(row.get("time/step", 0.0) for row in run.rows),
    }


def warm_start(run: Run, runs: list[Run]) -> str:
    """Which warm start a run began from: a path, or the seed of one that a run made for itself."""
    path = run.config.get("model.path")
    own = {f"{other.config['run_dir']}/warm_start/model": other for other in runs if not other.config.get("model.path")}
    return f"of seed {own.get(path, run).seed}" if not path or path in own else path


def paired(group: list[Run], baseline: list[Run], runs: list[Run]) -> list[tuple[str, Run, Run]]:
    """(warm start, run, its twin in the baseline: from the same warm start, with the same seed)."""
    twins = {(warm_start(run, runs), run.seed): run for run in baseline}
    keys = [((warm_start(run, runs), run.seed), run) for run in group]
    return [(key[0], run, twins[key]) for key, run in keys if key in twins]


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t: Cornish and Fisher's expansion, right to 0.5 % from df 4."""
    z, exact = 1.959964, {1: 12.706, 2: 4.303, 3: 3.182}
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return exact.get(df) or z + sum(term / df**power for power, term in enumerate(terms, 1))


def interval(differences: dict[str, list[float]]) -> tuple[float, float, float] | None:
    """(mean, low, high) of paired differences, {warm start: [d, ...]}, with a 95 % interval; None of a single pair.

    The mean is that of the warm starts' means. The interval is over runs: over further warm starts, and further seeds
    from each, not over the prompts of one evaluation. Its width is the standard error of the hierarchical bootstrap
    (draw warm starts, then pairs inside each) in the closed form that resampling converges to, times Student's t: with
    few pairs the bootstrap's own percentiles are too narrow. Coverage in 2000 simulations each (beside it that of the
    percentiles), by the sd of a warm start's own effect on the difference, in sds of a run:

        warm starts x seeds   1 x 3      1 x 10     2 x 5      5 x 2      5 x 5      10 x 1
        no effect            .95 (.74)  .95 (.91)  .97 (.92)  .98 (.94)  .98 (.97)  .95 (.90)
        0.5                                        .91 (.85)  .96 (.92)  .94 (.92)  .94 (.90)
        1                                          .82        .95        .92

    So where warm starts matter as much as seeds, two of them are too few for 95 %.
    """
    parts = [np.asarray(d, dtype=float) for d in differences.values()]
    means, n = np.array([d.mean() for d in parts]), sum(map(len, parts))
    if n < 2:
        return None
    variance = means.var() / len(parts) + sum(d.var() / len(d) for d in parts) / len(parts) ** 2
    width = t_quantile(n - 1) * math.sqrt(variance * n / (n - 1))
    return float(means.mean()), float(means.mean() - width), float(means.mean() + width)


# --- the table ----------------------------------------------------------------------------------------------------

COLUMNS = (
    "runs",
    "n",
    "accuracy",
    "difference",
    "area",
    "difference",
    "steps to {}",
    "ratio",
    "entropy",
    "length",
    "right",
    "k tokens",
    "at {:.0f} k",
    "s",
)


COSTS = (  # a mean each, with so many digits
    ("entropy", 4),
    ("length", 1),
    ("right", 1),
    ("tokens", 0),
    ("at_tokens", 3),
    ("seconds", 0),
)


def spread(values: list[float], digits: int) -> str:
    """mean ± sd of those that are numbers."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return "-"
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def with_interval(pairs: list[tuple[str, float, float]]) -> str:
    """The mean difference of (warm start, value, baseline's value), with its interval."""
    differences: dict[str, list[float]] = {}
    for start, value, base in pairs:
        if math.isfinite(value - base):
            differences.setdefault(start, []).append(value - base)
    if not differences:
        return "-"
    if (bounds := interval(differences)) is None:
        return f"{next(iter(differences.values()))[0]:+.3f} (one pair)"
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bounds)


def table(groups: dict[str, list[Run]], baseline: str, threshold: float) -> str:
    """The Markdown table, and what differs between its rows. `ratio` is the baseline's steps over the row's own."""
    runs = [run for members in groups.values() for run in members if not run.fault]
    budget = min(run.sampled_tokens[-1] for run in runs)  # what every run has sampled
    values = {id(run): measure(run, threshold, budget) for run in runs}
    lines = [f"| {' | '.join(COLUMNS).format(threshold, budget / 1e3)} |", "| --- " * len(COLUMNS) + "|"]
    for name, members in groups.items():
        finished = [run for run in members if not run.fault]
        mine = {key: [values[id(run)][key] for run in finished] for key in values[id(runs[0])]}
        twins = paired(finished, [run for run in groups[baseline] if not run.fault], runs) if name != baseline else []
        pairs = {key: [(start, values[id(a)][key], values[id(b)][key]) for start, a, b in twins] for key in mine}
        both = [(a, b) for _, a, b in pairs["steps"] if math.isfinite(a + b)]
        reached = sum(map(math.isfinite, mine["steps"]))
        cells = [
            name,
            f"{len(finished)}"
            + (f" (+{len(members) - len(finished)} left out)" if len(finished) < len(members) else ""),
            *(cell for key in ("accuracy", "area") for cell in (spread(mine[key], 3), with_interval(pairs[key]))),
            spread(mine["steps"], 1) + (f" ({reached} of {len(finished)})" if reached < len(finished) else ""),
            f"{sum(b for _, b in both) / sum(a for a, _ in both):.2f}" if any(a for a, _ in both) else "-",
            *(spread(mine[key], digits) for key, digits in COSTS),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    base = settings(groups[baseline][0])
    lines += [
        "",
        f"Against {baseline}, paired by warm start and seed; 95 % intervals over runs; ± is the sd over runs. All rows",
        "share the baseline's runs, so their errors go together, and of many rows some exclude 0 by chance.",
    ]
    for name, members in groups.items():
        own = settings(members[0])
        if changed := [f"{key}: {base.get(key)} -> {own.get(key)}" for key in difference(base, own)]:
            lines.append(f"- {name}: {', '.join(changed)}")
    return "\n".join(lines)


# --- figures ------------------------------------------------------------------------------------------------------

STYLES = [  # Okabe and Ito's colours, brown for their yellow; line and marker tell them apart in grey too
    *(("#000000", "-", "o"), ("#0072B2", "--", "s"), ("#D55E00", "-.", "^"), ("#009E73", ":", "D")),
    *(("#CC79A7", (0, (6, 1, 1, 1, 1, 1)), "v"), ("#E69F00", (0, (8, 2)), "P"), ("#56B4E9", (0, (3, 1)), "X")),
    *(("#777777", (0, (1, 1)), "*"), ("#7F4A1E", (0, (4, 1, 1, 1)), "<")),
]
FIGURES = {  # file: (metric, its label, x)
    "accuracy-steps": ("eval/accuracy", "held-out accuracy", "step"),
    "accuracy-seconds": ("eval/accuracy", "held-out accuracy", "seconds of training"),
    "accuracy-tokens": ("eval/accuracy", "held-out accuracy", "response tokens sampled"),
    "entropy": ("entropy", "entropy, nats per token", "step"),
    "length": ("response_length/mean", "response length, tokens", "step"),
    "gradient-cosine": ("gradient/cosine", "cosine of step and outcome gradient", "step"),
    "gradient-norm-ratio": ("gradient/norm_ratio", "norm of step over outcome gradient", "step"),
}


def along(run: Run, x: str) -> np.ndarray:
    """The position on the x axis at the end of each step."""
    if x == "step":
        return np.arange(len(run.rows), dtype=float)
    if x.startswith("seconds"):
        return np.cumsum([row.get("time/step", 0.0) for row in run.rows])
    return run.sampled_tokens


def curve(members: list[Run], metric: str, x: str) -> np.ndarray:
    """[points, 3]: mean x, mean and sd of the metric over runs, at each step where any run has it."""
    points, positions = [], {id(run): along(run, x) for run in members}
    for step in range(max(len(run.rows) for run in members)):
        having = [run for run in members if step < len(run.rows) and metric in run.rows[step]]
        ys = np.array([run.rows[step][metric] for run in having], dtype=float)
        if np.isfinite(ys).any():
            xs = [positions[id(run)][step] for run in having]
            points.append((np.mean(xs), np.nanmean(ys), np.nanstd(ys, ddof=1) if np.isfinite(ys).sum() > 1 else 0.0))
    return np.array(points).reshape(-1, 3)


def draw(groups: dict[str, list[Run]], folder: Path) -> list[str]:
    """Writes each figure whose metric there is, PNG and SVG -> their names. Many groups: several, the first in each."""
    try:
        import matplotlib
    except ImportError:
        end("--figures needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "report", "font.size": 11, "svg.fonttype": "none"}
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    (baseline, *others), written = groups, []
    parts = [others[i : i + PER_FIGURE - 1] for i in range(0, len(others), PER_FIGURE - 1)] or [[]]
    for file, (metric, label, x) in FIGURES.items():
        for number, part in enumerate(parts, 1):
            curves = {name: curve(groups[name], metric, x) for name in [baseline, *part]}
            if not any(len(points) for points in curves.values()):
                continue
            figure, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
            for i, ((name, points), (colour, line, marker)) in enumerate(zip(curves.items(), STYLES, strict=False)):
                if not len(points):
                    continue
                n, (xs, mean, sd) = len(groups[name]), points.T
                often = max(1, len(points) // 8)
                axes.fill_between(xs, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
                style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}
                style["markevery"] = (i * often // len(curves), often)  # markers side by side, not on each other
                axes.plot(xs, mean, label=f"{name} (n {n})", linewidth=1.5, **style)
            axes.set(xlabel=x, ylabel=label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            figure.legend(
                loc="outside lower center",
                ncols=min(4, len(curves)),
                frameon=False,
                fontsize=8,
                handlelength=4,
                title="mean and sd over runs",
                title_fontsize=8,
            )
            name = file if len(parts) == 1 else f"{file}-{number}"
            for suffix in ("png", "svg"):
                figure.savefig(
                    folder / f"{name}.{suffix}", dpi=200, metadata={"Date": None} if suffix == "svg" else None
                )
                written.append(str(folder / f"{name}.{suffix}"))
            pyplot.close(figure)
    return written


# --- the live view ------------------------------------------------------------------------------------------------

SHOWN = {"reward": "reward/mean", "accuracy": "eval/accuracy", "entropy": "entropy", "length": "response_length/mean"}


def sparkline(values: list[float], width: int) -> str:
    """The values between their least and largest, in at most `width` characters: means of equal parts."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    parts = [np.mean(part) for part in np.array_split(values, min(width, len(values)))]
    low, high = min(parts), max(parts)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (part - low) / (high - low)) if high > low else 3] for part in parts)


def view(runs: list[Run], width: int, height: int) -> str:
    """Each unfinished run in two lines, as many as fit: progress and last metrics, and how they went."""
    live = [run for run in runs if run.done < run.steps]
    lines = [f"{len(runs)} runs, {len(runs) - len(live)} finished   {time.strftime('%H:%M:%S')}"]
    for run in (live or runs)[: max(1, (height - 2) // 2)]:
        share = run.done / max(run.steps, 1)
        series = {name: [row[key] for row in run.rows if key in row] for name, key in SHOWN.items()}
        last = [f"{name} {values[-1]:.3g}" for name, values in series.items() if values]
        seconds = [row["time/step"] for row in run.rows if "time/step" in row]
        left = f"{np.mean(seconds[-10:]) * (run.steps - run.done) / 60:.0f} min left" if seconds else "warming up"
        bar = "█" * round(12 * share) + "░" * (12 - round(12 * share))
        name = "/".join(run.folder.parts[-2:])
        lines.append("  ".join([f"{name} {bar} {run.done}/{run.steps}", *last, left])[:width])
        room = max(4, (width - 2) // len(series) - 12)
        lines.append(("  " + "  ".join(f"{n} {sparkline(v, room)}" for n, v in series.items() if v))[:width])
    return "\n".join(lines)


def watch(paths: list[Path], seconds: float) -> None:
    try:
        while True:
            width, height = shutil.get_terminal_size((120, 40))
            screen = view([read_run(folder) for folder in find_runs(paths)], width, height)
            print(("\x1b[2J\x1b[H" if sys.stdout.isatty() else "") + screen, flush=True)
            time.sleep(seconds)
    except KeyboardInterrupt:
        print()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = end
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument(
        "--baseline", metavar="NAME", help="the row that others are compared with (grpo, else the first)"
    )
    parser.add_argument("--threshold", type=float, default=0.8, help="accuracy whose first step is reported (0.8)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the curves there (needs matplotlib)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table there too")
    parser.add_argument("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS", help="a live view, every 5 s")
    args = parser.parse_args()
    if args.watch is not None:
        return watch(args.runs, max(args.watch, 0.2))
    runs = [read_run(folder) for folder in find_runs(args.runs)]
    if not runs:
        end(no_run_in(args.runs))
    named = grouped([run for run in runs if run.config])
    set_copies_aside(named)
    for run in runs:
        if run.fault:
            print(f"left out: {run.fault}", file=sys.stderr)
    sound = {name: members for name, members in named.items() if not all(run.fault for run in members)}
    if not sound:
        end("no finished run to report")
    baseline = args.baseline or ("grpo" if "grpo" in sound else next(iter(sound)))
    if baseline not in sound:
        end(f"--baseline {baseline}: no row of finished runs has that name; choose one of {'; '.join(sound)}")
    named = {baseline: named[baseline]} | named
    text = table(named, baseline, args.threshold)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.figures:
        print(
            *draw(
                {name: [run for run in named[name] if not run.fault] for name in named if name in sound}, args.figures
            ),
            sep="\n",
            file=sys.stderr,
        )


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        end(str(error))
