"""A change that a researcher makes touches what the README says it touches, and nothing else."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import chaos
from conftest import TINY

README = (chaos.ROOT / "README.md").read_text()
LEFT_OUT = shutil.ignore_patterns("runs", "outputs", ".git", ".venv", "__pycache__", "docs", "bench", "tests", "models")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project, to be changed."""
    return shutil.copytree(chaos.ROOT, tmp_path / "project", ignore=LEFT_OUT)


def put(file, anchor: str, new: str, before: bool = False) -> None:
    """Add lines to a file of the copy, after the first `anchor` or before it."""
    text = file.read_text()
    assert text.count(anchor) >= 1, anchor
    file.write_text(text.replace(anchor, new + anchor if before else anchor + new, 1))


def run(checkout, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def trained(checkout, warm, *arguments: str) -> list[dict]:
    """The lines that two steps of a run of the copy dump, of the responses that were learned from."""
    tiny = [word.replace(str(chaos.ROOT), str(checkout)) for word in TINY]
    short = ("train.steps=2", "train.dump_every=1", "eval.every=9", "algorithm.keep_accuracy=[0.01,0.99]")
    run(checkout, "train.py", *tiny, warm, *short, *arguments, "run_dir=runs/own")
    files = sorted((checkout / "runs" / "own" / "samples").iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "advantage" in line]


def test_an_estimator_that_reads_the_entropy_is_one_function_and_its_knob_one_field(checkout, warm):
    """The README's, with its threshold as a knob: it trains, and the inspector shows it."""
    (estimator, *_) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "batch.entropy > 0.1" in estimator
    own = "\n\n" + estimator.replace("batch.entropy > 0.1", "batch.entropy > algo.sure_below")
    ablations = checkout / "baselines" / "ablations.py"
    ablations.write_text(ablations.read_text() + own)
    knob = '    sure_below: float = _knob(0.1, "nats of entropy below which no step term counts")\n'
    put(checkout / "spro.py", "    line_end: str = _knob", knob, before=True)
    lines = trained(
        checkout, warm, "algorithm.advantage=spro_sure", "algorithm.sure_below=0.5", "train.learning_rate=1e-2"
    )
    assert lines and min(x for line in lines for x in line["entropy"]) < 0.5 < max(
        x for line in lines for x in line["entropy"]
    )
    shown = run(checkout, "-m", "tools.inspector", "runs/own")
    assert "spro_sure" in shown and "check     ✓" in shown


def test_a_field_per_token_is_one_declaration_and_one_assignment(checkout, warm):
    """It goes through selection, trimming and the dump, and the inspector's page has it, with no other line."""
    put(
        checkout / "spro.py",
        "    advantages: Tensor | None = per_step()\n",
        "    surprises: Tensor | None = per_step()\n",
    )
    anchor = "        outcome = baselines.outcome_term("
    put(
        checkout / "train.py", anchor, "        learned = replace(learned, surprises=-learned.log_probs)\n", before=True
    )
    lines = trained(checkout, warm)
    assert lines and all(line["surprise"] == [-x for x in line["log_prob"]] for line in lines)
    run(checkout, "-m", "tools.inspector", "runs/own", "--html", "page.html")
    assert '"surprise": [' in (checkout / "page.html").read_text()
