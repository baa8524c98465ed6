"""The house: layout, imports, budgets, and a README that says what the code does."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import run
import spro
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = {file.stem: ast.parse(file.read_text()) for file in ROOT.glob("*.py")}
GOLDEN = [json.loads(line) for line in (ROOT / "tests" / "golden" / "tiny.jsonl").read_text().splitlines()][1:]
MEASURED = {f"time/{stage}" for stage in ("sample", "reward", "log_probs", "update", "step", "verdict_max")}
MEASURED |= {"tokens_per_second", "memory/peak_gib"}
OPTIONAL = {  # keys that the golden run's config does not compute
    *("prm/loss", "prm/ranking_accuracy", "prm/grad_norm", "prm/refused", "time/prm"),  # with PRIME
    "groups/sampled",  # with train.max_refills
    *("kl/loss", "gradient/cosine", "gradient/norm_ratio"),  # with algorithm.kl_coef, train.diagnose_every
}


def test_the_seven_stages_stand_in_the_loop_once_and_in_order():
    stages = re.findall(r"^ +# (\d)\. (.+)\.$", (ROOT / "train.py").read_text(), re.M)
    names = ["Sample", "Reward", "Log-probs", "Advantage", "Update", "Log", "Evaluate and save"]
    assert stages == [(str(i), name) for i, name in enumerate(names, 1)]


def imported(tree):
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_run_one_way():
    order = ["preflight", "run", "spro", "notation", "units", "statements", "answers", "sandbox", "reward", "data"]
    order += ["model", "inspector", "sample", "eval", "prime", "train", "sweep", "report"]
    assert set(order) == SOURCES.keys()
    for i, name in enumerate(order):
        ours = imported(SOURCES[name]) & set(order)
        assert ours <= set(order[:i]), f"{name} imports {ours - set(order[:i])}"
    assert not imported(SOURCES["spro"]) & set(order) and not imported(SOURCES["report"]) & {*order, "torch"}
    assert not imported(SOURCES["preflight"]) - set(sys.stdlib_module_names)
    assert imported(SOURCES["reward"]) & set(order) == {"answers", "sandbox"}
    assert imported(SOURCES["sandbox"]) <= set(sys.stdlib_module_names)
    assert not (imported(SOURCES["reward"]) | imported(SOURCES["answers"])) & {"torch", "transformers", "numpy"}


def test_training_needs_the_six_packages_alone():
    lines = [re.split(r"[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert lines == ["torch", "transformers", "safetensors", "numpy", "tqdm", "pyyaml"]
    needed = set().union(*(imported(tree) for tree in SOURCES.values())) - set(sys.stdlib_module_names) - SOURCES.keys()
    assert needed <= {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "tqdm",
        "yaml",
        # Where they are needed: requirements-extra.txt.
        *("sympy", "latex2sympy2_extended", "reasoning_gym", "matplotlib"),
    }  # transformers brings tokenizers


def test_every_config_field_is_read_somewhere():
    """As an attribute, or by its name in one of the generic checks that take names."""
    read = {node.attr for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read |= {"overwrite", "resume"}  # run.py reads the resolved config as a dict
    blocks = [kind for kind in get_type_hints(train.Config).values() if dataclasses.is_dataclass(kind)]
    for block in [train.Config, *blocks]:
        for field in dataclasses.fields(block):
            assert field.name in read, f"{block.__name__}.{field.name} is a dead knob"


def test_the_budget_of_knobs_and_lines_holds():
    assert len(run.all_keys(train.Config)) <= 72
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SOURCES}
    assert sum(lines.values()) <= 7600 and sum(lines[n] for n in ("train", "spro", "sample", "model")) <= 2050
    for name, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (name, node.name) != ("train", "train"):  # the visible loop
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_every_metric_is_explained_once_in_the_readme_and_no_other_is():
    table = README.split("## Metrics")[1].split("\n## ")[0]
    keys = [
        key
        for line in table.splitlines()
        if line.startswith("| `")
        for key in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert len(keys) == len(set(keys))
    assert set(keys) == set().union(*GOLDEN) | MEASURED | OPTIONAL


def test_the_readme_names_only_files_keys_and_flags_that_exist():
    for path in re.findall(r"(?<![\w/])((?:configs|tests|docs)/[\w./]+\.\w+)", README):
        assert (ROOT / path).exists(), path
    known = set(run.all_keys(train.Config))
    for key in re.findall(
        r"(?<![\w./])((?:model|data|sample|reward|algorithm|prime|train|eval)\.\w+)(?==|`|:)", README
    ):
        assert key in known or (ROOT / f"{key}").exists() or key.endswith((".from_pretrained", ".py")), key
    for script in ("sample", "eval", "reward", "sweep", "report"):
        assert f"python {script}.py" in (ROOT / f"{script}.py").read_text()


def test_the_readmes_commands_start_from_its_own_config():
    for line in re.findall(r"^python train\.py (.+)$", README, re.M):
        config, *overrides = [word for word in line.split("#")[0].split() if word != "CONFIG.yaml"] or [
            "configs/tiny.yaml"
        ]
        run.read_config(train.Config, [str(ROOT / config), *overrides], None)


def test_the_readmes_ten_line_estimator_trains_as_it_says(monkeypatch):
    monkeypatch.setattr(spro, "ADVANTAGES", dict(spro.ADVANTAGES))
    example = README.split("### Estimators")[1].split("```python\n")[1].split("```")[0]
    exec(example, vars(spro).copy() | {"ADVANTAGES": spro.ADVANTAGES})
    log_probs, ref = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.zeros(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    advantages = spro.ADVANTAGES["spro_clipped"](torch.tensor([1.0, 1.0]), log_probs, ref, mask, 2, 4.0)
    assert torch.allclose(advantages, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # equal rewards: the step term is left
    assert train.AlgorithmConfig(advantage="spro_clipped").advantage == "spro_clipped"


def test_the_readme_lists_every_estimator_once():
    table = README.split("| `algorithm.advantage` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.M)) == sorted(spro.ADVANTAGES)


@pytest.mark.parametrize("script", ["sample.py", "eval.py", "sweep.py", "report.py"])
def test_scripts_explain_themselves(script):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout
