"""Does the step term know where a response went wrong? A table of AUCs from the dumps of runs.

    python -m tools.credit RUN ... [--continuations K] [--out FOLDER]

RUN is a run folder, or a folder with runs in it; runs are pooled as tools.report groups them. Where a task verifies its
steps, the dumps say of each step whether it is right or the response's first wrong one. A scorer gives every step a
number; its AUC is the chance that a right step has a larger one than a wrong step has, a tie counting half: 1 knows
which is which, 0.5 knows nothing. A second AUC compares only steps of the same response: it asks where the mistake is,
and not in which response. Scorers, of the tokens of a step:

    log-ratio   policy to reference, summed: over beta, what the CPR gains in the step
    CPR, MSA    at the step's end
    log-prob    of the policy, summed
    entropy     minus the largest
    step term   of the run's own estimator, its advantage minus the outcome term: the mean
    advantage   the whole of it, as training used it: the mean; the outcome alone gives it more than 0.5
    PRM         log-ratio of PRIME's model to the reference, summed
    answer      log-ratio of the policy that is told the answer to the policy, summed

Where the dumps hold Monte-Carlo values, a further table has each scorer's rank correlation (Spearman) with the step's
Monte-Carlo advantage, its value after minus before. With --continuations the runs' models add what the dumps lack:
Monte-Carlo values, of K continuations each, and the log-probs that a scorer needs. Intervals are 95 %, by a bootstrap
over groups of siblings: over further prompts of these runs, not over further runs.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from infra.errors import BadInput, Parser, optional
from infra.processes import command_line

from tools import inspector, report
from tools.credit_models import RunModels

RESAMPLES = 1000
SCORERS = {  # name: (the values of the tokens, what makes one number of those of a step)
    "log-ratio": ("log_ratio", torch.sum),
    "CPR": ("cpr", lambda values: values[-1]),
    "MSA": ("msa", lambda values: values[-1]),
    "log-prob": ("log_prob", torch.sum),
    "entropy": ("entropy", lambda values: -values.max()),
    "step term": ("step_term", lambda values: rounded(values.mean())),
    "advantage": ("advantage", lambda values: rounded(values.mean())),
    "PRM": ("prm_log_ratio", torch.sum),
    "answer": ("answer_log_ratio", torch.sum),
}
STYLES = dict(zip(SCORERS, report.STYLES, strict=True))  # a scorer has one in every figure
NOTHING = (np.nan, np.nan, np.nan)  # where a config has no dump
ROUNDING = 1e-5  # of the advantages, which training computes in fp32


def parser() -> Parser:
    parser = Parser(prog="-m tools.credit", description="Which quantities know where a response went wrong.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder with runs in it")
    parser.add_argument(
        "--continuations", type=int, metavar="K", help="load the runs' models, for values of K continuations (off)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write table and figures there (needs matplotlib)")
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.continuations is not None and args.continuations < 1:
        raise BadInput(f"--continuations {args.continuations}: give a number from 1 on")
    if args.out:
        optional("matplotlib", "matplotlib")  # now, not after the reading
        args.out.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(sys.stderr):  # what is said meanwhile is no part of the tables
        found = gathered(args.runs, args.continuations)
    text = tables(found, args.out)
    print(text)
    if args.out:
        (args.out / "credit.md").write_text(text + "\n")


# --- statistics ---------------------------------------------------------------------------------------------------


def places(scores) -> np.ndarray:
    """The place of each score in their order, from 0; equal scores share one. [n] -> int [n]."""
    return np.unique(np.asarray(scores, dtype=float), return_inverse=True)[1]


def auc(places: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """The chance that a right item stands above a wrong one, ties half; NaN without one of either.

    places int, right bool, weights (how often each item counts), all [n].
    """
    of_right = np.bincount(places, weights * right)
    of_wrong = np.bincount(places, weights * ~right, len(of_right))
    pairs = of_right.sum() * of_wrong.sum()
    below = np.cumsum(of_wrong) - of_wrong / 2
    return float((of_right * below).sum() / pairs) if pairs else np.nan


def spearman(places: np.ndarray, others: np.ndarray, weights: np.ndarray) -> float:
    """The correlation of two rankings, ties at their mean rank; NaN where one is constant. All [n], as for `auc`."""
    x, y = (centred_ranks(each, weights) for each in (places, others))
    variances = (weights * x * x).sum() * (weights * y * y).sum()
    return float((weights * x * y).sum() / np.sqrt(variances)) if variances > 0 else np.nan


def centred_ranks(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each item's mean rank among items that count `weights` times, minus the mean of all. [n]."""
    counts = np.bincount(places, weights)
    ranks = (np.cumsum(counts) - counts / 2)[places]
    return ranks - weights.sum() / 2


def resampled(clusters: np.ndarray) -> np.ndarray:
    """How often each cluster is drawn, when as many as there are are drawn anew. clusters int [n] -> [RESAMPLES, n].

    The same draws every time.
    """
    number = places(clusters)
    n = number.max() + 1
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)[:, number]


def with_interval(statistic: Callable[[np.ndarray], float], draws: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of weights [n], its interval over the weights in `draws` [RESAMPLES, n]."""
    value = statistic(np.ones(draws.shape[1]))
    if np.isnan(value):
        return value, value, value
    low, high = np.nanpercentile([statistic(weights) for weights in draws], (2.5, 97.5))
    return value, float(low), float(high)


# --- the steps of the dumps ---------------------------------------------------------------------------------------

KINDS = {  # file: (what it is, its statistic, what a scorer has that knows nothing)
    "auc": ("AUC of right steps against first wrong ones", auc, 0.5),
    "within": ("AUC of right steps against the first wrong one of the same response", auc, 0.5),
    "spearman": ("Spearman of the scorers with the Monte-Carlo advantage", spearman, 0.0),
}


@dataclass
class Steps:
    """Steps of responses: what the scorers say of each, and what is true of it."""

    truth: list = field(default_factory=list)  # bool, whether it is right; or float, what it gained
    groups: list[tuple[int, ...]] = field(
        default_factory=list
    )  # of siblings: (run, number), in `later` (step, run, number)
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, scores: dict[str, float], truth: bool | float, group: tuple[int, int]) -> None:
        self.truth.append(truth)
        self.groups.append(group)
        for name, score in scores.items():
            self.scores[name].append(score)

    def compared(self, scorers: list[str], statistic) -> dict[str, tuple[float, float, float]]:
        """scorer -> (its statistic with the truth, low, high)."""
        _, clusters = np.unique(np.array(self.groups), axis=0, return_inverse=True)
        draws = resampled(clusters.reshape(-1))  # numpy 2.0 gives it another shape
        truth = np.array(self.truth)
        truth = truth if truth.dtype == bool else places(truth)
        found = {}
        for name in scorers:
            where = places(self.scores[name])
            found[name] = with_interval(lambda weights, where=where: statistic(where, truth, weights), draws)
        return found


ByStep = dict[int, Steps]  # by RL step


def later(by_step: ByStep) -> Steps:
    """Those of all dumps but the first step's, at which policy and reference are equal, together."""
    together = Steps()
    for number, steps in by_step.items():
        if number > 1:
            together.truth += steps.truth
            together.groups += [(number, *group) for group in steps.groups]
            for name, scores in steps.scores.items():
                together.scores[name] += scores
    return together


def gathered(paths: list[Path], continuations: int | None) -> dict[str, dict[str, ByStep]]:
    """The steps in the dumps of all runs among and below `paths`, by the name of their config and by kind; with
    `continuations`, with what the runs' models add. Raises BadInput where there are none.
    """
    runs = [report.read_run(folder) for folder in report.find_runs(paths)]
    named = report.grouped([run for run in runs if run.config])
    if not named:
        raise BadInput(report.no_run_in(paths))
    found = {}
    for name, members in named.items():
        by_kind = {kind: defaultdict(Steps) for kind in KINDS}
        for number, run in enumerate(members):
            try:
                for step, line in learned_from(run.folder, continuations):
                    add_line({kind: by_step[step] for kind, by_step in by_kind.items()}, line, (number, line["group"]))
            except BadInput as error:  # hours of values of other runs are not lost for it
                print(f"left out, from here on: {error}", file=sys.stderr)
        found[f"{name}, {len(members)} run{'s' * (len(members) > 1)}"] = by_kind
    if not any(steps.truth for kinds in found.values() for by_step in kinds.values() for steps in by_step.values()):
        raise BadInput(
            "no dump of these runs has a step_label or a value_after: the first is there where the task verifies its "
            "steps, the second where the estimator takes Monte-Carlo values, or with --continuations (docs/credit.md)"
        )
    return found


def learned_from(run: Path, continuations: int | None) -> Iterator[tuple[int, dict]]:
    """(RL step, line) of every response in a run's dumps that was learned from, with its terms as `values`."""
    models = RunModels(run) if continuations else None
    for number in inspector.dumped_steps(run):
        config, step, groups = inspector.read_step(run, number)
        lines = [line for siblings in groups.values() for line in siblings if "advantage" in line]
        if models:
            models.complete(step, lines, continuations)
        inspector.with_terms(lines, config)
        for line in lines:
            yield step, line


def add_line(steps: dict[str, Steps], line: dict, group: tuple[int, int]) -> None:
    """Add the steps of one response to those of each kind that the dump tells the truth of."""
    values = token_values(line)
    if "step_label" in line:
        add_labelled(steps, line, values, group)
    if "value_after" in line:
        gains = line["value_after"] - line["value_before"]
        for tokens in steps_of(line["step_id"]):
            if gains[tokens][0].isfinite():
                steps["spearman"].add(step_scores(values, tokens), gains[tokens][0].item(), group)


def add_labelled(steps: dict[str, Steps], line: dict, values: dict[str, torch.Tensor], group: tuple[int, int]) -> None:
    """The right steps of a response and its first wrong one.

    For "within" a score is above, at or below that of the wrong step of the same response: 1, 0 or -1. That of the
    wrong step itself is 0, so that the AUC of these numbers compares no step with one of another response.
    """
    labelled = [
        (step_scores(values, tokens), line["step_label"][tokens][0].item()) for tokens in steps_of(line["trace_id"])
    ]
    labelled = [(scores, label == 1) for scores, label in labelled if label >= 0]
    wrong = next((scores for scores, right in labelled if not right), None)
    for scores, right in labelled:
        steps["auc"].add(scores, right, group)
        if wrong:
            signs = {name: float(np.sign(score - wrong[name])) for name, score in scores.items()}
            steps["within"].add(signs, right, group)


def step_scores(values: dict[str, torch.Tensor], tokens: slice) -> dict[str, float]:
    """scorer -> its number of one step."""
    return {
        name: reduced(values[source][tokens]).item() for name, (source, reduced) in SCORERS.items() if source in values
    }


def steps_of(numbers: torch.Tensor) -> Iterator[slice]:
    """The tokens of each step, from the number of every token's step; those below 0 belong to none."""
    kinds, lengths = torch.unique_consecutive(numbers, return_counts=True)
    end = 0
    for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
        end += length
        if kind >= 0:
            yield slice(end - length, end)


def token_values(line: dict) -> dict[str, torch.Tensor]:
    """What SCORERS read of the tokens of a response, as far as the dump has it."""
    values = {**line["values"], "log_prob": line["log_prob"], "entropy": line["entropy"]}
    values["step_term"] = rounded(values["advantage"] - values["outcome"])
    values["advantage"] = rounded(values["advantage"])
    if "process_log_prob" in line and "ref_log_prob" in line:
        values["prm_log_ratio"] = line["process_log_prob"] - line["ref_log_prob"]
    if "answer_log_ratio" in line:
        values["answer_log_ratio"] = line["answer_log_ratio"]
    elif "answer_log_prob" in line:
        values["answer_log_ratio"] = line["answer_log_prob"] - line["log_prob"]
    return values


def rounded(advantages: torch.Tensor) -> torch.Tensor:
    """To ROUNDING, so that what is equal but for it ties: tokens, and the means of steps of different lengths."""
    return (advantages / ROUNDING).round() * ROUNDING


# --- tables and figures -------------------------------------------------------------------------------------------


def tables(found: dict[str, dict[str, ByStep]], out: Path | None) -> str:
    """A Markdown table for each config and kind; with `out`, each as a figure there too, and for each AUC one of what
    the configs' own step terms know.
    """
    parts, step_terms = [], defaultdict(dict)
    for name, by_kind in found.items():
        for kind, (title, statistic, ignorance) in KINDS.items():
            by_step = {step: steps for step, steps in sorted(by_kind[kind].items()) if steps.truth}
            scorers = [scorer for scorer in SCORERS if speaks(scorer, by_step)]
            rows = {step: steps.compared(scorers, statistic) for step, steps in by_step.items()}
            if not rows:
                continue
            parts.append(f"{name}: {title}\n\n{table(rows, by_step, scorers, statistic)}")
            if "step term" in scorers and kind != "spearman":
                step_terms[kind][name] = {step: row["step term"] for step, row in rows.items()}
            if out:
                slug = re.sub(r"\W+", "-", name).strip("-")
                styles = {scorer: STYLES[scorer] for scorer in scorers}
                draw(rows, styles, title, ignorance, out / f"{kind}-{slug}.svg")
    for kind, of_configs in step_terms.items():
        if out and len(of_configs) > 1:
            draw_step_terms(kind, of_configs, out)
    return "\n\n".join(parts)


def draw_step_terms(kind: str, of_configs: dict[str, dict[int, tuple]], out: Path) -> None:
    """What the step term of each config knows; in a second figure and further ones where there are too many."""
    title, _, ignorance = KINDS[kind]
    names, at_once = list(of_configs), len(report.STYLES)
    for first in range(0, len(names), at_once):
        part = names[first : first + at_once]
        dumped = sorted({step for name in part for step in of_configs[name]})
        rows = {step: {name: of_configs[name].get(step, NOTHING) for name in part} for step in dumped}
        which = f"-{first // at_once + 1}" if first else ""
        styles = dict(zip(part, report.STYLES, strict=False))
        draw(rows, styles, f"step terms: {title}", ignorance, out / f"{kind}-step-term{which}.svg")


def speaks(scorer: str, by_step: ByStep) -> bool:
    """Whether these dumps have it, and it is not 0 everywhere, as the step term of GRPO is."""
    return any(np.any(steps.scores[scorer]) for steps in by_step.values())


def table(rows: dict[int, dict[str, tuple]], by_step: ByStep, scorers: list[str], statistic) -> str:
    """A row for every dumped step, and a last one for all steps but the first together, where there are several."""
    lines = [f"| step | steps | {' | '.join(scorers)} |", "| --- " * (2 + len(scorers)) + "|"]
    lines += [table_row(str(step), by_step[step].truth, row, scorers) for step, row in rows.items()]
    if sum(step > 1 for step in by_step) > 1:
        together = later(by_step)
        lines.append(table_row("later", together.truth, together.compared(scorers, statistic), scorers))
    return "\n".join(lines)


def table_row(step: str, truth: list, row: dict[str, tuple], scorers: list[str]) -> str:
    of_what = f"{sum(truth)} right, {len(truth) - sum(truth)} wrong" if isinstance(truth[0], bool) else len(truth)
    return f"| {step} | {of_what} | {' | '.join(figure(*row[scorer]) for scorer in scorers)} |"


def figure(value: float, low: float, high: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def draw(rows: dict[int, dict[str, tuple]], styles: dict[str, tuple], title: str, ignorance: float, file: Path) -> None:
    """The line of each name in `styles`, a scorer or a config, against the RL step, with its interval as a band."""
    matplotlib = optional("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "credit", "font.size": 11, "svg.fonttype": "none"}
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    axes.axhline(ignorance, color="#999999", linewidth=0.8)
    for name, (colour, line, marker) in styles.items():
        value, low, high = np.array([row[name] for row in rows.values()]).T
        axes.fill_between(list(rows), low, high, color=colour, alpha=0.12, linewidth=0)
        style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.5}
        axes.plot(list(rows), value, label=name, **style)
    axes.set_xlabel("RL step")
    axes.set_ylabel(title.replace(" against ", "\nagainst "), fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    drawing.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8, handlelength=4)
    drawing.savefig(file, metadata={"Date": None})
    pyplot.close(drawing)


if __name__ == "__main__":
    command_line(main)
