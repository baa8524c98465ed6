"""The house: what stands where, which way imports run, sizes, and texts that say what the code does."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import baselines
import infra.config
import pytest
import rewards
import tasks.datasets
import train
import yaml

ROOT = Path(__file__).parent.parent
CORE = ("train", "spro", "sample", "model", "data", "eval")
# From below to above: a room imports only from those before it, and from itself.
ORDER = ("spro", "infra", "rewards", "tasks", "data", "fast", "model", "sample", "eval", "baselines", "train", "tools")
FILES = [ROOT / f"{name}.py" for name in CORE]
FILES += [file for room in ORDER if room not in CORE for file in sorted((ROOT / room).glob("*.py"))]
SOURCES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}
README = (ROOT / "README.md").read_text()
PAGES = {file.name: file.read_text() for file in (ROOT / "docs").glob("*.md")}
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(), **PAGES}
TEXTS["SECURITY.md"] = (ROOT / "SECURITY.md").read_text()
GOLDEN = [json.loads(line) for line in (ROOT / "tests" / "golden" / "tiny.jsonl").read_text().splitlines()][1:]
MEASURED = {f"time/{stage}" for stage in ("sample", "reward", "log_probs", "update", "step", "verdict_max")}
MEASURED |= {"tokens_per_second", "memory/peak_gib"}
OPTIONAL = {  # keys that the golden run's config does not compute
    *("prm/loss", "prm/ranking_accuracy", "prm/grad_norm", "prm/refused", "time/prm"),  # with PRIME
    *("values/continuations", "values/tokens", "values/faults", "time/values"),  # where an estimator needs values
    *("critic/loss", "critic/explained_variance", "critic/grad_norm", "critic/refused", "time/critic"),  # with PPO
    "groups/sampled",  # with train.max_refills
    *("kl/loss", "gradient/cosine", "gradient/norm_ratio"),  # with algorithm.kl_coef, train.diagnose_every
}


# --- what stands where --------------------------------------------------------------------------------------------


def test_the_top_level_holds_the_six_files_and_the_rooms():
    assert {file.stem for file in ROOT.glob("*.py")} == set(CORE)
    rooms = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert rooms == set(ORDER) - set(CORE)


def imported(tree) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_imports_run_one_way():
    for file, tree in SOURCES.items():
        room = file.split("/")[0].removesuffix(".py")
        above = set(ORDER[ORDER.index(room) + 1 :])
        assert not imported(tree) & above, f"{file} imports {imported(tree) & above}"
    assert not imported(SOURCES["spro.py"]) & set(ORDER)
    assert imported(SOURCES["rewards/sandbox.py"]) <= set(sys.stdlib_module_names)
    assert imported(SOURCES["infra/preflight.py"]) <= set(sys.stdlib_module_names)
    for file in SOURCES:
        if file.startswith("rewards/"):
            assert not imported(SOURCES[file]) & {"torch", "transformers", "numpy"}, file


def test_infra_and_tools_hold_no_mathematics():
    """No formula of the algorithm and no gradient. Three tools ask for some: one checks what training dumped, two ask a
    run's models what its dumps do not say.
    """
    asking = {"tools/inspector.py", "tools/credit_models.py", "tools/extrapolate.py"}
    for file, tree in SOURCES.items():
        if file.startswith(("infra/", "tools/")):
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not names & {"backward", "autograd", "log_softmax", "softmax", "enable_grad"}, file
            formulas = imported(tree) & {"spro", "baselines", "model", "fast"}
            assert not formulas or file in asking, f"{file} imports {formulas}"


def test_training_needs_the_six_packages_alone():
    lines = [re.split(r"[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert lines == ["torch", "transformers", "safetensors", "numpy", "tqdm", "pyyaml"]
    needed = set().union(*(imported(tree) for tree in SOURCES.values())) - set(sys.stdlib_module_names) - set(ORDER)
    assert needed <= {
        "torch",
        "transformers",
        "tokenizers",  # which transformers brings
        "safetensors",
        "numpy",
        "tqdm",
        "yaml",
        # Where they are needed: requirements-extra.txt.
        *("sympy", "latex2sympy2_extended", "reasoning_gym", "matplotlib"),
    }


def test_importing_a_module_prints_starts_and_changes_nothing():
    """infra/preflight.py apart, which the scripts import first for what it does."""
    modules = [file.removesuffix(".py").replace("/", ".") for file in SOURCES]
    modules = [name for name in modules if name not in ("infra.preflight", "rewards.__main__")]
    code = (
        "import importlib, logging, subprocess, sys, threading\n"
        "import torch, transformers\n"
        "sys.modules['infra.preflight'] = type(sys)('infra.preflight')\n"
        "before = threading.active_count(), sys.excepthook, torch.get_num_threads()\n"
        "levels = logging.getLogger('huggingface_hub').level, transformers.utils.logging.is_progress_bar_enabled()\n"
        "subprocess.Popen = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "after = threading.active_count(), sys.excepthook, torch.get_num_threads()\n"
        "assert before == after, (before, after)\n"
        "now = logging.getLogger('huggingface_hub').level, transformers.utils.logging.is_progress_bar_enabled()\n"
        "assert levels == now\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- sizes --------------------------------------------------------------------------------------------------------


def test_the_seven_stages_stand_in_the_loop_once_and_in_order():
    stages = re.findall(r"^ +# (\d)\. (.+)\.$", (ROOT / "train.py").read_text(), re.M)
    names = ["Sample", "Reward", "Log-probs", "Advantage", "Update", "Log", "Evaluate and save"]
    assert stages == [(str(i), name) for i, name in enumerate(names, 1)]


def test_the_step_has_loss_backward_and_optimizer_in_plain_sight():
    loops = [node for node in ast.walk(function_of("train.py", "train")) if isinstance(node, ast.For)]
    (loop,) = [node for node in loops if ast.unparse(node.target) == "step"]
    assert loop.end_lineno - loop.lineno <= 130
    calls = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
    assert {"spro.policy_loss", "(loss * processes.world_size()).backward", "optimizer.step"} <= set(calls)


def function_of(file: str, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(SOURCES[file]) if isinstance(node, ast.FunctionDef) and node.name == name)


def test_files_functions_and_lines_keep_to_their_sizes():
    """Over one of these, split, rename or delete; never squeeze."""
    longer = {"rewards/answers.py", "rewards/sandbox.py", "tools/report.py"}
    for file, tree in SOURCES.items():
        text = (ROOT / file).read_text().splitlines()
        assert len(text) <= 500 or file in longer, f"{file} has {len(text)} lines"
        if file.removesuffix(".py") in CORE:
            assert max(map(len, text)) <= 100, file
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (file, node.name) != ("train.py", "train"):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
    assert 180 <= len(README.splitlines()) <= 220


# --- knobs --------------------------------------------------------------------------------------------------------


def test_every_config_field_is_read_somewhere_and_has_its_line_of_help():
    read = {node.attr for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    blocks = [kind for kind in get_type_hints(train.Config).values() if dataclasses.is_dataclass(kind)]
    for block in [train.Config, *blocks]:
        for field in dataclasses.fields(block):
            assert field.name in read, f"{block.__name__}.{field.name} is a dead knob"
            is_block = dataclasses.is_dataclass(get_type_hints(block)[field.name])
            assert is_block or field.metadata["help"], f"{block.__name__}.{field.name} has no help"


def test_the_configuration_page_says_what_the_knobs_say():
    """Key, default, whether a resumed run may change it, and which stages it makes need less memory."""
    rows = {}
    for line in PAGES["configuration.md"].splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]]
        if line.startswith("| `") and len(cells) == 5:
            rows[cells[0].strip("`")] = cells
    assert rows.keys() == infra.config.knobs(train.Config).keys()
    for key, field in infra.config.knobs(train.Config).items():
        _, _, _, resume, memory = rows[key]
        assert (resume == "yes") == bool(field.metadata.get("resume")), key
        stages = set(re.findall(r"`(\w+)`", memory))
        assert stages == set(field.metadata.get("lowers", {})), key


def test_help_lists_every_key_with_its_default_and_meaning():
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for key, field in infra.config.knobs(train.Config).items():
        assert f"{key} = " in done.stdout and field.metadata["help"] in done.stdout


FIRST_KNOBS = {
    *("algorithm.advantage", "algorithm.beta", "sample.group_size", "sample.max_new_tokens"),
    *("train.steps", "train.prompts_per_step", "train.mini_batch_size", "train.learning_rate"),
}


def test_the_quickstart_spells_out_what_a_person_changes_first_and_that_is_what_runs():
    file = ROOT / "configs" / "quickstart.yaml"
    spelled = infra.config.flat(yaml.safe_load(file.read_text()))
    runs = infra.config.flat(infra.config.to_dict(infra.config.read_config(train.Config, [str(file)], None)))
    assert set(spelled) >= FIRST_KNOBS and all(runs[key] == value for key, value in spelled.items())
    for line in file.read_text().splitlines():
        assert not line.startswith(" ") or " # " in line, f"no comment: {line}"


# --- texts --------------------------------------------------------------------------------------------------------


def test_every_metric_is_explained_once_and_no_other_is():
    rows = [line for line in PAGES["metrics.md"].splitlines() if line.startswith("| `")]
    keys = [key for line in rows for key in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert len(keys) == len(set(keys))
    assert set(keys) == set().union(*GOLDEN) | MEASURED | OPTIONAL


@pytest.mark.parametrize("name", TEXTS)
def test_texts_name_only_files_keys_and_commands_that_exist(name):
    text = TEXTS[name]
    for path in re.findall(
        r"(?<![\w/.])((?:configs|tests|docs|baselines|rewards|tasks|fast|infra|tools|bench)/[\w./]+\.\w+)", text
    ):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / ("docs" if name in PAGES else "") / path).exists(), path
    known = set(infra.config.all_keys(train.Config))
    blocks = "model|data|sample|reward|algorithm|prime|critic|values|tree|a_star|train|eval"
    for key in re.findall(rf"(?<![\w./])((?:{blocks})\.\w+)(?==|`|:)", text):
        free = key.split(".")[0] + "." + key.split(".")[1]
        assert key in known or free in known or key.endswith((".from_pretrained", ".py")), key
    for script in re.findall(r"python (\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:tools|rewards)[\w.]*)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_texts_start_from_their_own_configs(name):
    for line in re.findall(r"^(?:python|torchrun .*?) train\.py (.+)$", TEXTS[name], re.M):
        words = [word for word in line.split("#")[0].replace("\\", "").split() if word != "CONFIG.yaml"]
        if any(re.search(r"[A-Z]{3}|\$", word) for word in words):  # a placeholder
            continue
        config, *overrides = words or ["configs/tiny.yaml"]
        if "=" in config:
            config, overrides = "configs/tiny.yaml", words
        infra.config.read_config(train.Config, [str(ROOT / config), *overrides], None)


def test_the_page_of_estimators_lists_each_once():
    table = PAGES["estimators.md"].split("| `algorithm.advantage` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.M)) == sorted(baselines.ADVANTAGES)


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_readmes_grader_and_dataset_work_as_they_stand(tmp_path, monkeypatch):
    _, grader, dataset = examples(README)
    assert max(example.count("\n") for example in examples(README)) <= 10
    monkeypatch.setattr(rewards.graders, "GRADERS", dict(rewards.GRADERS))
    exec(grader, vars(rewards.graders))
    verdicts = [rewards.Grader().grade_one("short", "x" * n, None).score for n in (10, 300, 500)]
    assert verdicts == [1.0, 0.5, 0.0]
    monkeypatch.setattr(tasks.datasets, "ROWS", dict(tasks.datasets.ROWS))
    exec(dataset, vars(tasks.datasets))
    (tmp_path / "svamp.jsonl").write_text(json.dumps({"Body": "Two pies.", "Question": "How many?", "Answer": "2"}))
    (problem,) = tasks.datasets.read_problems("svamp", str(tmp_path / "svamp.jsonl"))
    assert (problem.prompt, problem.reference, problem.grader) == ("Two pies. How many?", "2", "number")
    assert rewards.Grader().grade_one("number", r"\boxed{2}", problem.reference).score == 1.0


def test_scripts_explain_themselves():
    scripts = ["sample.py", "eval.py", "-m tools.sweep", "-m tools.report", "-m tools.inspector", "-m tools.smollm2"]
    scripts += ["-m tools.credit", "-m tools.extrapolate"]
    commands = [[sys.executable, *script.split(), "--help"] for script in scripts]
    # At the same time, for each takes seconds to import what it needs
    asked = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    for script, process in zip(scripts, asked, strict=True):
        said, _ = process.communicate()
        assert process.returncode == 0 and "usage" in said, script
        if script.startswith("-m"):
            assert f"usage: python {script}" in said.replace("usage: -m", "usage: python -m")
