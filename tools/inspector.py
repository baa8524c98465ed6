"""Look inside one step of a run: what every token of a group of siblings was worth.

    python -m tools.inspector RUN                               # the newest rollout, the group that differs most
    python -m tools.inspector RUN --step 20 --group 3 --view msa   # another one, shaded by another quantity
    python -m tools.inspector RUN --html inspector.html            # all kept groups as one page that needs no network

Reads RUN/config.yaml and RUN/samples/step_*.jsonl, of a live run or a finished one, and loads no model. The terms are
recomputed in float64 with spro.py; the advantage shown is the dumped one, which training used, and whether the two
agree is said. What a model wrote is not trusted: all text passes through `visible`.
"""

from infra import preflight  # noqa: F401  # isort: skip  (first of all)

import base64
import hashlib
import json
import math
import os
import shutil
import sys
import unicodedata
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import torch
from baselines import advantage, outcome_term
from infra.config import saved_block, saved_config
from infra.dumps import SAMPLER, dump_key
from infra.errors import BadInput, Parser
from infra.processes import command_line
from spro import (
    STEP,
    AlgorithmConfig,
    Batch,
    cumulative_process_reward,
    grpo_advantage,
    masked_step_advantage,
    process_reward,
)
from tasks.problem import Problem
from torch.nn.utils.rnn import pad_sequence

VIEWS = {
    "advantage": "what training used; in SPRO outcome + MSA (Eq. 13)",
    "outcome": "the response's reward compared with its siblings'",
    "msa": "Masked Step Advantage, CPR minus its mean over the siblings alive at this token (Eq. 12)",
    "cpr": "cumulative process reward, beta x log-ratio summed up to this token (Eq. 11)",
    "log_ratio": "log-prob under the policy minus log-prob under the reference",
    "verified": "+1 in a right step, -1 in the response's first wrong one, 0 where nothing is judged",
    "value_after": "Monte-Carlo value of the response up to the end of this token's step",
    "value_gain": "Monte-Carlo advantage of this token's step: the value after it minus the value before",
    "critic_value": "what the critic says the state before this token is worth",
}
NO_REFERENCE = "no log-ratio, CPR or MSA: this run has no reference"
ABSENT = {  # why a view may not be there
    **dict.fromkeys(("msa", "cpr", "log_ratio"), NO_REFERENCE),
    "verified": "this run's task does not verify its steps",
    **dict.fromkeys(("value_after", "value_gain"), "this run's estimator takes no Monte-Carlo values"),
    "critic_value": "this run has no critic",
}
PER_RESPONSE = ("prompt", "reference", "text", "verdict", "reward", "reason", "truncated", "group", "token_text")
PER_TOKEN = {  # in a line of a kept group -> in a Batch
    dump_key(f.name): f.name for f in fields(Batch) if f.metadata.get("layout") == STEP and f.name not in SAMPLER
}
PAGE_TOKENS = 50_000  # of about 80 bytes: groups beyond stay out of a page
TEMPLATE = Path(__file__).with_name("inspector_template.html")


def parser() -> Parser:
    parser = Parser(prog="-m tools.inspector", description="What every token of a group of siblings was worth.")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--step", type=int, help="default: the newest that was dumped")
    parser.add_argument("--group", type=int, help="default: the kept group whose rewards differ most")
    parser.add_argument("--view", choices=VIEWS, default="advantage", help="what shades the tokens")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with all kept groups and views")
    return parser


def main() -> None:
    show(parser().parse_args())


def show(args) -> None:
    """Print or write what `args` ask for. Raises BadInput."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the program
    config, step, groups = read_step(Path(args.run), args.step)
    kept = {number: siblings for number, siblings in groups.items() if "advantage" in siblings[0]}
    if args.group is not None and args.group not in groups:
        raise BadInput(f"--group {args.group}: step {step} has groups {min(groups)} to {max(groups)}; kept: {[*kept]}")
    check = with_terms([line for siblings in kept.values() for line in siblings], config)
    chosen = args.group if args.group is not None else max(kept or groups, key=lambda number: spread(groups[number]))
    views = {name: VIEWS[name] for name in VIEWS if not kept or all(name in s[0]["values"] for s in kept.values())}
    absent = "" if "msa" in views else NO_REFERENCE
    if args.view not in views:
        raise BadInput(f"--view {args.view}: {ABSENT[args.view]}; choose {' or '.join(views)}")
    facts = {"run": visible(args.run), "step": step, "check": check, "absent": absent, "view": args.view}
    facts |= {"advantage": config["algorithm"]["advantage"], "beta": config["algorithm"]["beta"], "views": views}
    if args.html is None:
        print(terminal(groups[chosen], facts, shutil.get_terminal_size().columns))
        return
    text, written = page(groups, [chosen, *(number for number in kept if number != chosen)], facts)
    try:
        args.html.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--html {args.html} cannot be written: {error.strerror}") from error
    print(f"{args.html}: {written} of {len(groups)} groups, {len(kept)} of them kept; open it in a browser")


# --- what was dumped ----------------------------------------------------------------------------------------------


def read_step(run: Path, step: int | None) -> tuple[dict, int, dict[int, list[dict]]]:
    """(config, step, lines of every group) of a dumped rollout, the newest by default. Raises BadInput."""
    config = saved_config(run)
    try:
        G, _ = config["sample"]["group_size"], (config["algorithm"]["advantage"], config["algorithm"]["beta"])
    except (KeyError, TypeError) as error:
        raise BadInput(f"{run} is not a run folder: no config.yaml of a run there ({type(error).__name__})") from error
    files = dumped_steps(run)
    if not files:
        raise BadInput(f"{run / 'samples'} holds no rollout yet: step 1 and every train.dump_every steps are dumped")
    if step is not None and step not in files:
        raise BadInput(f"step {step} was not dumped: {run / 'samples'} has {', '.join(map(str, files))}")
    step, lines = max(files) if step is None else step, []
    for number, text in enumerate(files[step].read_bytes().splitlines(), 1):
        try:
            lines.append(read_line(text))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{files[step]} line {number} is broken: {visible(error)}") from error
    groups = {number: list(siblings) for number, siblings in groupby(lines, key=lambda line: line["group"])}
    for number, siblings in groups.items():
        if len(siblings) != G or len({tuple(name in line for name in PER_TOKEN) for line in siblings}) > 1:
            raise BadInput(f"{files[step]}: group {number} is not {G} whole responses: is it still being written?")
    if not groups:
        raise BadInput(f"{files[step]} is empty: is it still being written?")
    return config, step, groups


def dumped_steps(run: Path) -> dict[int, Path]:
    """The files of a run's rollouts, by step and in their order."""
    files = {int(file.stem[5:]): file for file in (run / "samples").glob("step_*.jsonl") if file.stem[5:].isdecimal()}
    return dict(sorted(files.items()))


def read_line(text: bytes) -> dict:
    """A line of samples/step_*.jsonl, with tensors for its lists of numbers. Raises ValueError or TypeError."""
    line = json.loads(text)
    kept = "advantage" in line
    needed = [*PER_RESPONSE, *(("log_prob", "entropy") if kept else ())]
    if missing := [name for name in needed if name not in line]:
        raise ValueError(
            f"it has no {missing[0]!r}; dumps of an earlier version want the commit that config.yaml names"
        )
    line |= {name: torch.tensor(line[name], dtype=torch.float64) for name in PER_TOKEN if name in line}
    if {len(line[name]) for name in PER_TOKEN if name in line} - {len(line["token_text"])} or not line["token_text"]:
        raise ValueError("its lists of values per token differ in length")
    numbers = [line["group"], line.get("v_star", 0)]
    numbers += [line[name] for name in ("verdict", "reward") if kept or line[name] is not None]
    if not all(isinstance(x, int | float) for x in numbers):
        raise ValueError("its group, its verdict or its reward is no number")
    if not all(isinstance(x, str) for x in line["token_text"]):
        raise ValueError("the text of one of its tokens is no text")
    return line


def spread(siblings: list[dict]) -> float:
    scores = [line["verdict"] for line in siblings if line["verdict"] is not None]
    return max(scores, default=0) - min(scores, default=0)


def batch_of(kept: list[dict], group_size: int) -> Batch:
    """The Batch that training had when it dumped these lines, in float64."""
    mask = pad_sequence([torch.ones(len(line["token_text"]), dtype=torch.bool) for line in kept], True)
    per_token = {
        field: pad_sequence([line[key] for line in kept], True) for key, field in PER_TOKEN.items() if key in kept[0]
    }
    if "step_ids" in per_token:
        per_token["step_ids"] = per_token["step_ids"].long()
    if "id" in kept[0]:  # the responses' own, behind no prompt
        per_token["tokens"] = pad_sequence([torch.tensor(line["id"]) for line in kept], True)
    rewards = torch.tensor([line["reward"] for line in kept], dtype=torch.float64)
    texts = tuple(line["text"] for line in kept)
    problems = tuple(Problem(line["prompt"], line["reference"], "", v_star=line.get("v_star")) for line in kept)
    per_row = {"truncated": torch.tensor([line["truncated"] for line in kept]), "rewards": rewards, "texts": texts}
    return Batch(mask=mask, group_size=group_size, problems=problems, **per_row, **per_token)


def recomputed(batch: Batch, name: str, algo: AlgorithmConfig) -> tuple[torch.Tensor, str]:
    """The outcome term [B, T], and whether the advantages come out of rewards and log-probs as they were dumped."""
    try:
        again = advantage(name, batch, algo)
        outcome = outcome_term(name, batch, algo)
    except (KeyError, ValueError) as error:  # an estimator that is gone, or one that needs more than is dumped
        told = f"⚠ the advantages were not recomputed ({visible(error)}); the outcome term shown is GRPO's"
        return grpo_advantage(batch, algo), told
    gap = (again - batch.advantages).abs().max().item()
    if torch.allclose(again, batch.advantages, rtol=1e-3, atol=1e-4):
        check = f"✓ advantages recomputed from rewards and log-probs are those of training (largest gap {gap:.0e})"
    else:
        check = f"⚠ advantages recomputed from rewards and log-probs differ from training's by up to {gap:.3g}"
    return again if outcome is None else outcome, check


def with_terms(kept: list[dict], config: dict) -> str:
    """Add `values`, the views by name, to all lines of kept groups -> whether advantages come out as dumped."""
    if not kept:
        return "⚠ no group of this step was kept (algorithm.keep_accuracy)"
    algo = saved_block(AlgorithmConfig, config, "algorithm")
    batch = batch_of(kept, config["sample"]["group_size"])
    outcome, check = recomputed(batch, algo.advantage, algo)
    values = {"advantage": batch.advantages, "outcome": outcome}
    if batch.ref_log_probs is not None:
        cpr = cumulative_process_reward(
            process_reward(batch.policy_log_probs, batch.ref_log_probs, algo.beta), batch.mask
        )
        msa = masked_step_advantage(cpr, batch.mask, batch.group_size)
        values |= {"msa": msa, "cpr": cpr, "log_ratio": batch.policy_log_probs - batch.ref_log_probs}
    for i, line in enumerate(kept):
        line["values"] = {name: value[i, : len(line["token_text"])] for name, value in values.items()}
        line["values"] |= known_values(line)
    return check


def known_values(line: dict) -> dict[str, torch.Tensor]:
    """The views of what is known of a response's steps: whether they are right, and what they gained."""
    values = {}
    if "step_label" in line:
        values["verified"] = (line["step_label"] == 1).double() - (line["step_label"] == 0).double()
    if "value_after" in line:
        values |= {"value_after": line["value_after"], "value_gain": line["value_after"] - line["value_before"]}
    if "critic_value" in line:
        values["critic_value"] = line["critic_value"]
    return values


def scale_of(siblings: list[dict], view: str) -> float:
    """The value that gets full colour: the 98th percentile of the group's, or, if that is 0, the largest."""
    values = torch.cat([line["values"][view] for line in siblings]).nan_to_num(0, 0, 0).abs().sort().values
    return (values[int(0.98 * (len(values) - 1))] or values[-1]).item()


# --- text ---------------------------------------------------------------------------------------------------------


def visible(text) -> str:
    """Text without power over a terminal or the reading direction: what cannot be printed is spelt as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def shown(line: dict) -> list[str]:
    """The text of each token of a response. One that holds a part of a character alone, and has no text, is a ◌."""
    return [visible(text) or "◌" for text in line["token_text"]]


def mark_of(score: float | None) -> str:
    return "?" if score is None else "✓" if score >= 1 else "✗" if score <= 0 else "◐"


def verdict_of(line: dict) -> str:
    score, reward = line["verdict"], line["reward"]
    words = ["no verdict" if score is None else f"verdict {score:.3g}"]
    if reward != score:
        words.append(f"reward {reward:.3g} as shaped for training")
    words += [visible(line["reason"]), f"{len(line['token_text'])} tokens"]
    if line["truncated"]:
        words.append("cut off")
    if "step_label" in line:
        words.append(trace_of(line))
    return f"{mark_of(score)} " + ", ".join(words)


def trace_of(line: dict) -> str:
    """How many steps of a response are right, and which is the first wrong one."""
    right = line["trace_id"][line["step_label"] == 1].unique().numel()
    tokens = zip(line["token_text"], line["step_label"].tolist(), strict=True)
    wrong = "".join(text for text, label in tokens if label == 0).strip()
    return f"{right} steps right" + (f", then ✗ {visible(wrong)}" if wrong else "")


# --- the page -----------------------------------------------------------------------------------------------------


def page(groups: dict[int, list[dict]], order: list[int], facts: dict) -> tuple[str, int]:
    """(HTML, number of groups in it): those of `order`, the first in any case and others while there is room."""
    shown, room = [], PAGE_TOKENS
    for number in order:
        siblings = groups[number]
        room -= sum(len(line["token_text"]) for line in siblings)
        if room >= 0 or not shown:
            shown.append(group_of(number, siblings))
    text = json.dumps({**facts, "groups": shown}, allow_nan=False).replace("<", "\\u003c")  # no tag can end the script
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.rsplit("<script>", 1)[1].split("</script>")[0]  # the one script that the page may run
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("@HASH@", f"sha256-{digest}").replace("@DATA@", text), len(shown)


def group_of(number: int, siblings: list[dict]) -> dict:
    """A group as the page's JSON. Four significant digits, null where a value is not finite."""
    first, kept = siblings[0], "values" in siblings[0]
    responses = []
    for line in siblings:
        response = {"mark": mark_of(line["verdict"]), "verdict": verdict_of(line), "texts": shown(line)}
        if kept:
            values = line["values"] | {name: line[name] for name in PER_TOKEN if name in line}
            response["values"] = {
                name: [float(f"{v:.4g}") if math.isfinite(v) else None for v in value.tolist()]
                for name, value in values.items()
            }
        responses.append(response)
    scores = [line["verdict"] for line in siblings if line["verdict"] is not None]
    name = f"{number}, mean verdict {sum(scores) / len(scores):.2g}" if scores else str(number)
    texts = {"prompt": visible(first["prompt"]), "reference": visible(first["reference"])}
    scales = {view: scale_of(siblings, view) for view in first["values"]} if kept else {}
    return {"group": number, "name": name, **texts, "kept": kept, "scales": scales, "responses": responses}


# --- the terminal -------------------------------------------------------------------------------------------------

RESET = "\033[0m"
PLUS, MINUS = (189, 153, 111, 69), (230, 223, 215, 208)  # blues and oranges, in the numbers that terminals give colours


def shading(fraction: float) -> str:
    """Escape codes for a value from -1 to 1: black on blue above 0, black and underlined on orange below."""
    strength = min(abs(fraction), 1.0)
    if not strength > 0.02:  # NaN too
        return ""
    level = math.ceil(4 * strength) - 1
    return f"\033[38;5;16;48;5;{PLUS[level]}m" if fraction > 0 else f"\033[4;38;5;16;48;5;{MINUS[level]}m"


def cells(text: str) -> int:
    """How wide text is on a terminal."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def lines_of(texts: list[str], width: int) -> list[list[tuple[int, str]]]:
    """Texts that follow each other -> lines of at most `width` cells, each a list of (number of the text, part of it).

    Lines end where the texts' lines do, else at a space, wherever one text goes over into the next. Only a word that
    is longer than a line is cut.
    """
    characters = [(i, c) for i, text in enumerate(texts) for c in text.replace("\n", "↵\n")]
    lines, used = [[]], 0
    for is_word, part in groupby(characters, key=lambda pair: pair[1] not in " \n"):
        part = list(part)
        if is_word and used and used + cells("".join(c for _, c in part)) > width:
            lines, used = [*lines, []], 0
        for i, c in part:
            if c == "\n" or (is_word and used + cells(c) > width):
                lines, used = [*lines, []], 0
            if c != "\n" and used + cells(c) <= width:  # a space at the end of a line is not missed
                lines[-1].append((i, c))
                used += cells(c)
    return [[(i, "".join(c for _, c in part)) for i, part in groupby(line, key=lambda pair: pair[0])] for line in lines]


def figures_below(lines: list[list[tuple[int, str]]], values: list[float], apart: float, width: int) -> list[str]:
    """For each of `lines_of` tokens a row of figures: the value of each token that is `apart` or more from the figure
    before it, below that token; or below the next such token, where there is no room."""
    rows, last = [], math.nan
    for line in lines:
        row, column = "", 0
        for token, text in line:
            figure = f"{values[token]:+.2g}"
            start = max(0, min(column, width - len(figure)))
            if not abs(values[token] - last) < apart and (not row or start > len(row)):  # NaN too
                row, last = row.ljust(start) + figure, values[token]
            column += cells(text)
        rows.append(row)
    return rows


def paragraph(text: str, width: int, label: str = "", indent: int = 0) -> str:
    """Text in lines of at most `width` cells, the first behind `label`, the others behind `indent` spaces."""
    lines = ["".join(part for _, part in line) for line in lines_of([text], width - indent)]
    return f"{label:{indent}}" + ("\n" + " " * indent).join(lines)


def painted(line: list[tuple[str, str]]) -> str:
    """(escape codes, text) of each part of a line -> the line."""
    return "".join(codes + text + RESET if codes else text for codes, text in line)


def header(siblings: list[dict], facts: dict, width: int, colour: bool) -> list[str]:
    """What stands above the responses."""
    view, lengths = facts["view"], sorted(len(line["token_text"]) for line in siblings)
    where = f"{facts['run']}, step {facts['step']}, group {siblings[0]['group']}"
    out = [paragraph(f"{where}: {facts['advantage']}, beta {facts['beta']}", width)]
    rows = {name: visible(siblings[0][name]) for name in ("prompt", "reference")}
    rows |= {name: facts[name] for name in ("check", "absent") if facts[name]}
    if "values" not in siblings[0]:
        rows["view"] = "none: training did not keep this group, so it has no log-probs"
        return out + [paragraph(text, width, label, 10) for label, text in rows.items()]

    rows["view"] = f"{view}: {VIEWS[view]}"
    scale, columns = scale_of(siblings, view), max(1, min(width - 10, lengths[-1]))
    if not scale:
        rows["scale"] = "0 everywhere"
    elif not colour:
        rows["figures"] = f"below the token from which they hold, wherever {view} has moved by {scale / 4:.2g} or more"
    alive = [sum(n > c * lengths[-1] // columns for n in lengths) / len(lengths) for c in range(columns)]
    rows["alive"] = "".join("▁▂▃▄▅▆▇█"[math.ceil(8 * part) - 1] for part in alive)
    rows[""] = ", ".join(f"{len(lengths) - lengths.index(n)} to token {n}" for n in sorted(set(lengths)))
    out += [paragraph(text, width, label, 10) for label, text in rows.items()]
    if scale and colour:
        shades = [(shading(i / 4), f" {i / 4 * scale:+.2g} ") for i in range(-4, 5)]
        out.append(f"{'scale':10}{painted(shades)}")
    return out


def terminal(siblings: list[dict], facts: dict, width: int) -> str:
    """One group as text: its tokens shaded on a terminal with colours, elsewhere with figures below them."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    out = header(siblings, facts, width, colour)
    scale = scale_of(siblings, facts["view"]) if "values" in siblings[0] else 0.0
    for i, line in enumerate(siblings, 1):
        out.append("\n" + paragraph(verdict_of(line), width, f"{i}", 3))
        lines = lines_of(shown(line), width - 3)
        if not scale:
            out += [f"   {''.join(text for _, text in parts)}" for parts in lines]
            continue
        values = line["values"][facts["view"]].tolist()
        if colour:
            out += [f"   {painted([(shading(values[i] / scale), text) for i, text in parts])}" for parts in lines]
            continue
        for parts, figures in zip(lines, figures_below(lines, values, scale / 4, width - 3), strict=True):
            out.append(f"   {''.join(text for _, text in parts)}")
            out += [f"   {figures}"] * bool(figures)
    return "\n".join(out)


if __name__ == "__main__":
    command_line(main)
