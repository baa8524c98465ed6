"""Configs, run folders and checkpoints, one by one; then whole runs that are stopped, broken off and continued."""

import ast
import errno
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import infra.checkpoints
import infra.config
import infra.errors
import infra.run_folder
import model
import pytest
import torch
import train
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from infra.config import read_config
from infra.errors import BadInput, RunStopped
from infra.sharding import compute_dtype
from model import load
from tasks.chain import chain_tokenizer
from tasks.problem import Problem, problems_hash

import chaos
from conftest import TINY, checkpoints, finished, ran, started
from helpers import jsonl, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # checkpoints of one process
CONFIGS = sorted((chaos.ROOT / "configs").rglob("*.yaml"))
ABLATIONS = sorted((chaos.ROOT / "configs" / "ablations").glob("*.yaml"))
TASKS = {"long", "neutral"}  # the same estimator on another task: several keys make it
OWN_KEYS = {  # of what an estimator takes besides its name
    "a_star": {"algorithm.beta", "algorithm.keep_accuracy"},
    "tree_rpo": {
        "tree.depth",
        "tree.edge_tokens",
        "sample.group_size",
        "train.prompts_per_step",
        "train.mini_batch_size",
    },
}
OTHER_UNIT = {"oppo", "prime_prefix"}  # whose beta is in another unit than the base's


def config_of(*arguments, default=train.DEFAULT_CONFIG) -> train.Config:
    return read_config(train.Config, list(arguments), default)


def refusal(work, *args) -> str:
    """The message of the BadInput that `work(*args)` must raise: one line."""
    with pytest.raises(BadInput) as caught:
        work(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_of_the_project_loads_and_survives_being_written_down(file, tmp_path):
    config = config_of(str(file))
    assert config.run_dir == f"runs/{file.stem}"
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(infra.config.to_dict(config)))
    assert config_of(str(written)) == config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_of_the_project_starts_on_a_gpu(file):
    """train.py refuses the sampler's log-probs where a GPU computes in less than fp32; a CPU never does."""
    config = config_of(str(file))
    on_gpu = compute_dtype(config.model, on_gpu=True)
    assert config.train.old_log_probs == "recompute" or on_gpu == torch.float32


@pytest.mark.parametrize(
    "argument, value",
    [
        ("train.learning_rate=1e-4", 1e-4),  # text, as YAML reads it
        ("train.learning_rate=1", 1.0),
        ("train.steps=7", 7),
        ("resume=true", True),
        ("resume=no", False),
        ("train.adam_betas=[0.8, 0.99]", (0.8, 0.99)),
        ("algorithm.keep_accuracy=[0, 1e-1]", (0.0, 0.1)),
        ("run_dir=runs/a=b", "runs/a=b"),
        ("model.path=", ""),
    ],
)
def test_values_are_read_as_the_type_of_their_field(argument, value):
    config = config_of(argument)
    for name in argument.split("=")[0].split("."):
        config = getattr(config, name)
    assert config == value and type(config) is type(value)


def test_key_value_overrides_yaml_and_yaml_overrides_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\ntrain: {steps: 5, save_every: 4}\n")
    config = config_of("train.steps=6", str(file), "eval.every=2", "train.steps=7")
    assert (config.seed, config.train.steps, config.train.save_every, config.eval.every) == (3, 7, 4, 2)
    assert config.train.epochs == train.TrainConfig().epochs and config.run_dir == "runs/mine"
    file.write_text("# nothing yet\n")
    assert config_of(str(file)).train == train.TrainConfig()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("train.lerning_rate=1", "unknown key 'train.lerning_rate'; the nearest is 'train.learning_rate'"),
        ("beta=0.1", "unknown key 'beta'; the nearest is 'algorithm.beta'"),
        ("lr=1", "unknown key 'lr'; the nearest is 'train.learning_rate'"),
        ("learning_rate=1", "unknown key 'learning_rate'; the nearest is 'train.learning_rate'"),
        ("prime.lr=1", "unknown key 'prime.lr'; the nearest is 'prime.learning_rate'"),
        ("modle.path=x", "unknown key 'modle"),
        ("algorithm.advantage.name=spro", "goes through something that is no block"),
        ("train.=1", "unknown key"),
        ("seed=1.5", "seed must be of type int, not 1.5"),
        ("seed=true", "seed must be of type int, not True"),
        ("train.steps=1e3", "train.steps must be of type int, not '1e3'"),
        ("seed=", "seed must be of type int, not ''"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("resume=1", "resume must be of type bool, not 1"),
        ("data.min_steps=two", "data.min_steps must be of type int, not 'two'"),
        ("model=5", "model must hold keys and values, not 5"),
        ("seed.x=1", "seed must be of type int"),
        ("train.learning_rate=fast", "train.learning_rate must be of type float, not 'fast'"),
        ("train.learning_rate=true", "train.learning_rate must be of type float, not True"),
        ("train.learning_rate=.nan", "train.learning_rate must be of type float"),
        ("train.learning_rate=-1", "learning_rate=-1.0 must be positive"),
        ("train.adam_betas=0.9", "train.adam_betas must be a list of 2 numbers, not 0.9"),
        ("train.adam_betas=[0.9]", "train.adam_betas must be a list of 2 numbers"),
        ("train.adam_betas=[a, b]", "train.adam_betas must be of type float, not 'a'"),
        ("train.adam_betas=[0.9, 1]", "adam_betas=[0.9, 1.0] must lie in [0, 1)"),
        ("train.schedule=wavy", "choose constant, linear or cosine"),
        ("train.prompts_per_step=3 sample.group_size=4", "3 prompts x 4 samples = 12 responses do not divide"),
        ("train.micro_batch_size=5", "the nearest is 'train.mini_batch_size'"),
        ("train.old_log_probs=mine", "old_log_probs='mine': choose recompute or sampler"),
        ("sample.decoding=quick", "decoding='quick': choose fast or plain"),
        ("train.prompts_per_step=0", "prompts_per_step=0 must be at least 1"),
        ("data.train_size=8", "train.prompts_per_step=16 > data.train_size=8"),
        ("sample.group_size=1", "group_size=1"),
        ("sample.temperature=-1", "temperature=-1.0 must be positive"),
        ("sample.temperature=0", "temperature=0.0 must be positive"),
        ("algorithm.advantage=pqo", "advantage='pqo' is not known: choose one of spro, grpo"),
        ("algorithm.loss_weights=mean", "loss_weights='mean'"),
        ("algorithm.keep_accuracy=[0.8, 0.2]", "keep_accuracy"),
        ("reward.grader=oracle", "grader='oracle' is not known"),
        ("data.source=moon", "source='moon' is not known"),
        ("model.scratch=3", "model.scratch must be of type dict, not 3"),
        ("model.dtype=int8", "dtype='int8': choose bfloat16 or float32"),
        ("train.steps=[", "cannot read the value of 'train.steps=['"),
        ("one.yaml two.yaml", "usage"),
        ("--resume", "usage"),
        ("--resume=true", "usage"),
        ("no_such_file.yaml", "cannot read no_such_file.yaml: No such file or directory"),
        (str(chaos.ROOT), "Is a directory"),
    ],
)
def test_a_mistake_in_the_config_is_refused_in_one_line(arguments, words):
    arguments = re.split(r" (?=\S+=|\S+\.yaml)", arguments)
    assert words in refusal(config_of, *arguments)


@pytest.mark.parametrize("buffer, limit", [(65, 64), (512, 64), (4096, 3072)])
def test_kind_20_an_overlong_buffer_above_the_limit_is_refused_in_one_line(buffer, limit):
    words = refusal(config_of, f"reward.overlong_buffer={buffer}", f"sample.max_new_tokens={limit}")
    assert f"reward.overlong_buffer={buffer} > sample.max_new_tokens={limit}" in words


@pytest.mark.parametrize("buffer, limit", [(0, 64), (63, 64), (64, 64), (512, 4096)])
def test_kind_20_an_overlong_buffer_within_the_limit_is_taken(buffer, limit):
    config = config_of(f"reward.overlong_buffer={buffer}", f"sample.max_new_tokens={limit}")
    assert (config.reward.overlong_buffer, config.sample.max_new_tokens) == (buffer, limit)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"train: {steps: 5", "is not valid YAML"),
        (b"train:\n\tsteps: 5", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"- a\n- b\n", "config.yaml must hold keys and values"),
        (b"just text", "config.yaml must hold keys and values"),
        (b"5: 6", "unknown key '5'"),
        (b"train:\n", "train must hold keys and values, not None"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_one_line(text, words, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    assert words in refusal(config_of, str(file))
    refusal(config_of, str(file), "train.steps=5")  # an override cannot save it


def written(folder: Path, **texts: str) -> str:
    """Writes NAME.yaml for each; the last one's path."""
    for name, text in texts.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return str(file)


def test_a_config_overrides_its_base_key_by_key_and_is_saved_resolved(tmp_path):
    (tmp_path / "sub").mkdir()
    written(tmp_path, ground="seed: 3\ntrain: {steps: 5, save_every: 4, adam_betas: [0.5, 0.6]}\n")
    written(tmp_path, middle="base: ground.yaml\nseed: 4\ntrain: {save_every: 3}\n")
    top = tmp_path / "sub" / "top.yaml"  # a base is named from the file that names it, not from where one stands
    top.write_text("base: ../middle.yaml\ntrain: {adam_betas: [0.7, 0.8]}\nmodel: {scratch: {hidden_size: 64}}\n")
    config = config_of(str(top), "train.save_every=2")
    assert (config.seed, config.train.steps, config.train.save_every) == (4, 5, 2)
    assert config.train.adam_betas == (0.7, 0.8) and config.model.scratch == {"hidden_size": 64}
    assert config.run_dir == "runs/top" and "base" not in infra.config.to_dict(config)


@pytest.mark.parametrize(
    "texts, words",
    [
        ({"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: a.yaml"}, "c.yaml is its own base: "),
        ({"c": "base: c.yaml"}, "c.yaml is its own base: "),
        ({"c": "base: none.yaml"}, "none.yaml: No such file"),
        ({"b": "train: {steps", "c": "base: b.yaml"}, "b.yaml is not valid YAML"),
        ({"b": "- 1", "c": "base: b.yaml\nseed: 1"}, "b.yaml must hold keys and values"),
        ({"c": "base: [b.yaml]"}, "base of "),
        ({"c": "base:"}, "must be the path of another YAML, not None"),
        ({"b": "seeed: 1", "c": "base: b.yaml"}, "unknown key 'seeed'"),
    ],
)
def test_a_base_that_is_none_is_refused_in_one_line(texts, words, tmp_path):
    assert words in refusal(config_of, written(tmp_path, **texts))


TEXTS = [
    "End with #### and the number.",
    "{question} Think.\n\nThen answer.",
    "yes", "1e3", "null", "~", "", " ", "0x1f", "2024-01-01", "[1, 2]", "{a: b}", "'quoted'", '"a\\n"', "a: b # c",
    "- item", "| \n  x", "&a", "*a", "!!int 3", "%", "\t", "\u00e9\U0001f600\u2028", "a=b=c", "\r\n",
]  # fmt: skip
TEXT_KEYS = [key for key, field in infra.config.knobs(train.Config).items() if field.default == ""]


def value_of(config, key: str):
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.mark.parametrize("text", TEXTS)
def test_kind_21_a_text_is_taken_to_the_letter(text, tmp_path):
    """On the command line, and as YAML writes it down; a prompt must hold {question} to be one at all."""
    values: dict = {}
    for key in TEXT_KEYS:
        infra.config.override(values, f"{key}={text}", train.Config)
        assert value_of(values, key) == text
    assert config_of(f"data.system_prompt={text}").data.system_prompt == text
    assert config_of(f"data.prompt={{question}}{text}").data.prompt == "{question}" + text
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": {"system_prompt": text}}))
    assert config_of(str(file)).data.system_prompt == text


@pytest.mark.parametrize(
    "text, value",
    [
        ("5", 5), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("1.5", 1.5), ("'5'", "5"), ('"a\\n"', "a\n"),
        ("a # b", "a # b"),
        ("two\n  lines", "two\n  lines"), ("# a", "# a"), ("", ""), ("1e-4", "1e-4"), (" a ", " a "),
    ],
)  # fmt: skip
def test_kind_21_a_value_of_no_declared_type_is_yamls_and_bare_text_to_the_letter(text, value):
    assert config_of(f"model.scratch.x={text}").model.scratch == {"x": value}
    assert config_of(f"model.scratch.x.y={text}").model.scratch == {"x": {"y": value}}
    weight = value if type(value) in (int, float) else None
    if weight is not None:
        assert config_of(f"reward.bonus.boxed={text}").reward.bonus == {"boxed": weight}
    else:
        assert "must be a number" in refusal(config_of, f"reward.bonus.boxed={text}")


@pytest.mark.parametrize("value", ["yes", "5", "1.0", "null", "", "2024-01-01", "[a]"])
def test_kind_21_a_text_that_yaml_reads_as_something_else_is_refused_with_what_to_do(value, tmp_path):
    file = written(tmp_path, c=f"data:\n  system_prompt: {value}\n")
    assert "data.system_prompt must be of type str" in refusal(config_of, file)
    assert "put it in quotes" in refusal(config_of, file)


@pytest.mark.parametrize(
    "text, key, lines",
    [
        ("train: {steps: 5}\neval: {every: 3}\ntrain: {epochs: 2}", "'train'", "1 and 3"),
        ("train: {steps: 5,\n  steps: 6}", "'steps'", "1 and 2"),
        ("train:\n  steps: 5\n  epochs: 2\n  steps: 6", "'steps'", "2 and 4"),
        ("'seed': 1\nseed: 2", "'seed'", "1 and 2"),
        ('seed: 1\n"se\\x65d": 2', "'seed'", "1 and 2"),
        ("model:\n  scratch:\n    a: {b: [{c: 1}, {d: 1,\n      d: 2}]}", "'d'", "3 and 4"),
        ("model: {scratch: {1: a, 1.0: b}}", "1.0", "1 and 1"),
        ("model: {scratch: {true: a, yes: b}}", "True", "1 and 1"),
        ("seed: 1\nbase: a.yaml\nbase: b.yaml", "'base'", "2 and 3"),
        ("x: &a {seed: 1}\n<<: *a\nseed: 2\nseed: 3", "'seed'", "3 and 4"),
    ],
)
def test_kind_22_a_key_that_stands_twice_is_an_error_that_names_both_lines(text, key, lines, tmp_path):
    wanted = f"key {key} stands twice, in lines {lines}"
    assert wanted in refusal(config_of, written(tmp_path, c=text))
    assert wanted in refusal(config_of, written(tmp_path, c=text, d="base: c.yaml\nseed: 4"))
    assert wanted in refusal(infra.config.override, {}, f"model.scratch={text}", train.Config)


def test_kind_22_merge_keys_override_as_yaml_means_them_to_wherever_they_stand(tmp_path):
    text = """
model:
  scratch:
    first: &first {a: 1, b: 2}
    deep: {er: &second {<<: *first, b: 3}}
    both: {<<: [*first, {c: 5}], a: 4}
train: {<<: &third {steps: 5, epochs: 2}, steps: 6}
eval: {every: 3}
"""
    config = config_of(written(tmp_path, c=text))
    assert config.model.scratch["deep"] == {"er": {"a": 1, "b": 3}}
    assert config.model.scratch["both"] == {"a": 4, "b": 2, "c": 5}
    assert (config.train.steps, config.train.epochs) == (6, 2)
    # The mapping that is merged stands deeper than the one that takes it, so it is made later
    deeper = "a: {b: &m {<<: &n {x: 1}, x: 2}}\nc: {<<: *m, y: 3}"
    assert infra.config.parse_yaml(deeper) == yaml.safe_load(deeper)


@pytest.mark.parametrize("text", ["1: a\n'1': b", "a: 1\nA: 2", "a: {x: 1}\nb: {x: 1}", "? a\n: 1\n? b\n: 2"])
def test_kind_22_keys_that_differ_are_two(text):
    assert len(infra.config.parse_yaml(text)) == 2


# --- what no config may do: anything but be read, or be refused in one line ----------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
YAML_BITS = st.sampled_from([
    *"[]{}:,-?&*!|>#%@`'\"\n \t\\~=<0.", "<<", "*a", "&a ", "!!int ", "!!bool x", "!!timestamp x", "!!set ", "0x_",
    "1e3",
    "2024-99-99", "1:99", "null", "yes", ".nan", ".inf", "\ud800",
    "\x00", "\u2028", "---", "...", "a: ", "train: ", "? ",
    "!!binary x", "!!python/object:os.system ", "9" * 400, "[" * 400,
    "base: ", "seed", "model", "scratch: ", "steps: ",
])  # fmt: skip
MESSES = st.lists(YAML_BITS, max_size=12).map("".join)


def read_or_refused(work, *args):
    """What `work` gives; None where it refused, which must be by BadInput, in one line."""
    try:
        return work(*args)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1, str(error)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_kind_21_any_text_comes_back_from_the_command_line_and_from_yaml(text):
    assert config_of(f"data.system_prompt={text}").data.system_prompt == text
    assert config_of(f"algorithm.line_end={text};").algorithm.line_end == text + ";"
    config = config_of(f"data.prompt={text}{{question}}{text}")
    assert config.data.prompt == f"{text}{{question}}{text}"
    again = infra.config.parse_yaml(yaml.safe_dump(infra.config.to_dict(config)))
    assert infra.config.build_config(train.Config, again, infra.config.all_keys(train.Config)) == config
    assert not infra.config.changes(again, config)


@settings(max_examples=120, deadline=None)
@given(key=st.sampled_from([*infra.config.all_keys(train.Config), "model.scratch.x", "model", "x.y"]), text=MESSES)
def test_kind_21_any_argument_is_read_or_refused_in_one_line(key, text):
    config = read_or_refused(config_of, f"{key}={text}")
    if config:
        json.dumps(infra.config.to_dict(config)).encode()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=MESSES)
def test_kind_22_any_file_is_read_or_refused_in_one_line(text, tmp_path):
    file = tmp_path / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refused(config_of, str(file))


NAMES = st.text("abc\u00e9 :#'", min_size=1, max_size=4)
TREES = st.recursive(
    st.integers(0, 9), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
)


def in_flow(tree, doubled: list[str], path: str = "") -> str:
    """A tree as YAML in one line; the key at `doubled` stands twice."""
    if not isinstance(tree, dict):
        return str(tree)
    items = []
    for key, value in tree.items():
        here = f"{path}/{key}"
        items += [f"{json.dumps(key)}: {in_flow(value, doubled, here)}"] * (2 if here in doubled else 1)
    return "{" + ", ".join(items) + "}"


def places_of(tree, path: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    below = [place for key, value in tree.items() for place in places_of(value, f"{path}/{key}")]
    return [*below, *(f"{path}/{key}" for key in tree)]


@settings(max_examples=60, deadline=None)
@given(tree=st.dictionaries(NAMES, TREES, min_size=1, max_size=3), data=st.data())
def test_kind_22_a_doubled_key_is_found_wherever_it_stands_and_no_other_is(tree, data):
    assert infra.config.parse_yaml(in_flow(tree, [])) == tree
    place = data.draw(st.sampled_from(places_of(tree)))
    with pytest.raises(yaml.YAMLError, match="stands twice, in lines 1 and 1"):
        infra.config.parse_yaml(in_flow(tree, [place]))


@pytest.mark.parametrize("file", [f for f in ABLATIONS if f.stem not in {"base", *TASKS}], ids=lambda file: file.stem)
def test_an_ablation_differs_from_its_base_in_one_key(file):
    base = file.parent / yaml.safe_load(file.read_text())["base"]
    mine, its = infra.config.flat(infra.config.read_yaml(file)), infra.config.flat(infra.config.read_yaml(base))
    differing = {key for key in mine | its if mine.get(key) != its.get(key)}
    if file.stem in OTHER_UNIT:
        differing.remove("algorithm.beta")
    differing -= OWN_KEYS.get(file.stem, set())
    assert len(differing) == (file.stem != "spro")  # spro.yaml is base.yaml by its own name


def test_bad_input_ends_the_script_with_code_2_and_one_line():
    command = [sys.executable, "train.py", "configs/tiny.yaml", "train.lerning_rate=1"]
    ended = subprocess.run(command, cwd=chaos.ROOT, env=os.environ | chaos.AT_ONCE, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1 and "learning_rate" in ended.stderr


# --- the run folder -----------------------------------------------------------------------------------------------


def opened(folder: Path, *arguments) -> Path:
    return infra.run_folder.open_run_folder(config_of(f"run_dir={folder}", *arguments))


def test_a_run_folder_in_use_is_left_alone_unless_resume_or_overwrite_is_given(tmp_path):
    folder = opened(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{}\n")
    words = refusal(opened, folder)
    assert "in use" in words and "resume=true" in words and "overwrite=true" in words
    assert opened(folder, "resume=true") == folder and (folder / "metrics.jsonl").exists()
    opened(folder, "overwrite=true", "seed=5")
    assert not (folder / "metrics.jsonl").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 5


@pytest.mark.parametrize("flag", ["overwrite=true", "resume=true"])
@pytest.mark.parametrize("config", [None, "", "- a list", "name: of another program"])
def test_a_folder_that_is_no_run_folder_is_refused_and_nothing_in_it_is_touched(config, flag, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert str(tmp_path) in refusal(opened, tmp_path, flag)
    assert before == {file.name: file.read_text() for file in tmp_path.iterdir()}


def test_overwriting_that_was_killed_half_way_can_be_begun_again(tmp_path, monkeypatch):
    folder = opened(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{}\n")

    def killed(path, *args, **kwargs):  # files go in any order
        (Path(path) / "config.yaml").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        opened(folder, "overwrite=true")
    assert not (opened(folder, "overwrite=true") / "metrics.jsonl").exists()


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    words = refusal(opened, tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in words and "cannot be used" in words


def test_an_empty_folder_can_be_started_into_and_resumed(tmp_path):
    assert opened(tmp_path, "resume=true") == tmp_path


@pytest.mark.parametrize("function", ["provenance", "_write_atomically"])
@pytest.mark.parametrize("flag", ["resume=true", "overwrite=true"])
def test_a_run_killed_before_its_config_was_written_can_be_started_again(function, flag, tmp_path, monkeypatch):
    def killed(*args):
        if args:
            args[0].with_name("config.yaml.tmp").write_text("seed: ")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(infra.run_folder, function, killed)
        opened(tmp_path / "run", flag)
    opened(tmp_path / "run", flag)


def test_resuming_with_another_config_names_both_values(tmp_path):
    folder = opened(tmp_path / "run", "algorithm.beta=0.1", "train.adam_betas=[0.9, 0.99]")
    words = refusal(opened, folder, "resume=true", "algorithm.beta=0.2", "train.adam_betas=[0.9, 0.95]", "seed=1")
    for difference in ("algorithm.beta: 0.1 -> 0.2", "seed: 0 -> 1", "[0.9, 0.99] -> [0.9, 0.95]"):
        assert difference in words
    assert words.count("->") == 3
    assert yaml.safe_load((folder / "config.yaml").read_text())["algorithm"]["beta"] == 0.1


def test_a_resumed_run_may_change_what_does_not_touch_its_past(tmp_path):
    folder = opened(tmp_path / "run")
    free = ["train.steps=99", "train.save_every=3", "train.keep_checkpoints=7", "train.dump_every=2", "eval.every=4"]
    opened(folder, "resume=true", "train.timeout_minutes=5", "train.diagnose_every=2", "eval.prompts=3", *free)
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 99


def test_the_config_of_a_run_says_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no git
    text = (opened(tmp_path / "run") / "config.yaml").read_text()
    for words in ("# command: ", "# commit: unknown", f"# torch: {torch.__version__}", "# transformers: "):
        assert words in text


@pytest.mark.parametrize(
    "text", ["a\nalgorithm: 3", "a\nb", "a\r\nb", "a\x85b", "a\u2028seed: 1", "a\x01b", "é: #"], ids=ascii
)
def test_kind_21_a_run_is_read_back_whatever_text_its_command_held(text, tmp_path, monkeypatch):
    prompt = f"{text}{{question}}"
    monkeypatch.setattr(sys, "argv", ["train.py", f"data.prompt={prompt}"])
    folder = opened(tmp_path / "run", f"data.prompt={prompt}")
    assert infra.config.saved_config(folder)["data"]["prompt"] == prompt
    opened(folder, f"data.prompt={prompt}", "resume=true")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_kind_24_metrics_with_a_line_separator_inside_are_kept(separator, tmp_path):
    rows = [{"step": step, "note": f"a{separator}b"} for step in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert infra.run_folder.keep_metrics_through(tmp_path, 1) == rows[:2]


def test_metrics_are_cut_back_to_a_step_and_a_half_written_line_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 3, "bad": float("nan")} for step in range(5)]
    for row in rows:
        infra.run_folder.append_line(file, row)
    whole = file.read_text()
    file.write_text(whole + '{"step": 5, "los')
    assert [row["step"] for row in infra.run_folder.keep_metrics_through(tmp_path, 9)] == [0, 1, 2, 3, 4]
    assert file.read_text() == whole  # to the last digit
    infra.run_folder.keep_metrics_through(tmp_path, 2)
    assert file.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    assert infra.run_folder.keep_metrics_through(tmp_path, -1) == [] and file.read_text() == ""


# --- checkpoints --------------------------------------------------------------------------------------------------


def trainable(tied: bool = True):
    """(policy, optimizer) of a tiny model."""
    policy = tiny_model()
    if not tied:
        policy.model.lm_head.weight = torch.nn.Parameter(2 * policy.model.lm_head.weight.detach())
    return policy, model.make_optimizer(policy, train.TrainConfig())


def learn(policy, optimizer, seed: int) -> None:
    """One optimizer step on made-up gradients."""
    source = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=source)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    optimizer.zero_grad()


def everything(policy, optimizer) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        found |= {f"{name} {key}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory) -> Path:
    folder, (policy, optimizer) = tmp_path_factory.mktemp("three"), trainable()
    for step in (1, 2, 3):
        learn(policy, optimizer, step)
        infra.checkpoints.save_checkpoint(
            folder, step, {"policy": (policy, optimizer)}, {"step": step, "position": 4 * step}, keep=3
        )
    return folder


@pytest.fixture
def folder(three_checkpoints, tmp_path) -> Path:
    """A run folder with the checkpoints of steps 1 to 3."""
    return shutil.copytree(three_checkpoints, tmp_path / "run")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_checkpoint_brings_back_weights_moments_adam_step_and_state_to_the_last_bit(tied, tmp_path):
    policy, optimizer = trainable(tied)
    for seed in range(3):
        learn(policy, optimizer, seed)
    state = {"step": 2, "position": 8, "best": {"step": 1, "eval/accuracy": 1 / 3}, "after": None}
    infra.checkpoints.save_checkpoint(tmp_path, 2, {"policy": (policy, optimizer)}, state, keep=2)
    saved_tensors = everything(policy, optimizer)
    learn(policy, optimizer, 3)
    continued = everything(policy, optimizer)

    policy, optimizer = trainable(tied)
    loaded = infra.checkpoints.load_checkpoint(
        infra.checkpoints.newest_checkpoint(tmp_path), {"policy": (policy, optimizer)}
    )
    assert {key: loaded[key] for key in state} == state
    assert_same(everything(policy, optimizer), saved_tensors)
    learn(policy, optimizer, 3)
    assert_same(everything(policy, optimizer), continued)


def test_a_checkpoint_of_two_models_keeps_them_apart(tmp_path):
    trained = {"policy": trainable(), "prm": trainable()}
    for name, seeds in (("policy", (0, 1)), ("prm", (2, 3, 4))):  # the one has taken two steps and the other three
        for seed in seeds:
            learn(*trained[name], seed)
    infra.checkpoints.save_checkpoint(tmp_path, 1, trained, {"step": 1}, keep=2)
    again = {"policy": trainable(), "prm": trainable()}
    infra.checkpoints.load_checkpoint(infra.checkpoints.newest_checkpoint(tmp_path), again)
    for name in trained:
        assert_same(everything(*again[name]), everything(*trained[name]))
    assert not torch.equal(*(next(pair[0].parameters()) for pair in again.values()))


def test_a_checkpoint_of_a_resumed_run_counts_adam_steps_on(folder):
    policy, optimizer = trainable()
    state = infra.checkpoints.load_checkpoint(
        infra.checkpoints.newest_checkpoint(folder), {"policy": (policy, optimizer)}
    )  # as train.resume keeps it
    learn(policy, optimizer, 4)
    infra.checkpoints.save_checkpoint(folder, 4, {"policy": (policy, optimizer)}, state | {"step": 4}, keep=3)
    expected = everything(policy, optimizer)
    policy, optimizer = trainable()
    assert (
        infra.checkpoints.load_checkpoint(infra.checkpoints.newest_checkpoint(folder), {"policy": (policy, optimizer)})[
            "step"
        ]
        == 4
    )
    assert_same(everything(policy, optimizer), expected)


def test_a_checkpoint_before_the_first_optimizer_step_can_be_loaded(tmp_path):
    policy, optimizer = trainable()
    infra.checkpoints.save_checkpoint(tmp_path, 0, {"policy": (policy, optimizer)}, {"step": 0}, keep=2)
    learn(policy, optimizer, 0)
    expected = everything(policy, optimizer)
    policy, optimizer = trainable()
    learn(policy, optimizer, 9)
    infra.checkpoints.load_checkpoint(infra.checkpoints.newest_checkpoint(tmp_path), {"policy": (policy, optimizer)})
    learn(policy, optimizer, 0)
    assert_same(everything(policy, optimizer), expected)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a truncated shard": (lambda c: os.truncate(next(c.glob("*.safetensors")), 1000), "has 1000 bytes, not"),
    "a missing shard": (lambda c: next(c.glob("*.safetensors")).unlink(), "is missing"),
    "a flipped bit": (lambda c: flip_a_byte(next(c.glob("*.safetensors"))), "has another sha256"),
    "a missing state": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "a changed state": (lambda c: flip_a_byte(c / "state.json"), "state.json has another sha256"),
    "a missing manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda c: os.truncate(c / "manifest.json", 40), "manifest.json cannot be read"),
    "a garbled manifest": (lambda c: (c / "manifest.json").write_text("[1, 2]"), "manifest.json"),
    "an empty manifest": (lambda c: (c / "manifest.json").write_text("{}"), "manifest.json"),
    "an empty folder": (lambda c: [f.unlink() for f in c.iterdir()], "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_is_used(damage, words, folder, capsys):
    damage(folder / "checkpoints" / "step_000003")
    assert infra.checkpoints.newest_checkpoint(folder).name == "step_000002"
    said = capsys.readouterr().out
    assert "step_000003 is damaged" in said and words in said
    assert checkpoints(folder) == ["damaged_step_000003", "step_000001", "step_000002"]
    policy, optimizer = trainable()
    assert (
        infra.checkpoints.load_checkpoint(infra.checkpoints.newest_checkpoint(folder), {"policy": (policy, optimizer)})[
            "position"
        ]
        == 8
    )
    assert not capsys.readouterr().out


def test_without_any_sound_checkpoint_there_is_none_and_none_is_deleted(folder, capsys):
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").unlink()
    assert infra.checkpoints.newest_checkpoint(folder) is None
    assert capsys.readouterr().out.count("is damaged") == 3
    assert all(name.startswith("damaged_") for name in checkpoints(folder)) and len(checkpoints(folder)) == 3


def test_old_checkpoints_go_only_once_the_new_one_is_complete(folder, monkeypatch):
    policy, optimizer = trainable()
    new, remove, removed = folder / "checkpoints" / "step_000004", shutil.rmtree, []

    def watched(path, *args, **kwargs):
        if Path(path).suffix != ".tmp":
            removed.append(Path(path).name)
            assert infra.checkpoints.fault_of(new) is None
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    infra.checkpoints.save_checkpoint(folder, 4, {"policy": (policy, optimizer)}, {"step": 4}, keep=2)
    assert removed == ["step_000001", "step_000002"]
    assert checkpoints(folder) == ["step_000003", "step_000004"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_not_reported_as_a_new_one_that_was_not_written(
    folder, monkeypatch
):
    def refuse(path, **kwargs):
        if not str(path).endswith(".tmp") and not kwargs.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    policy, optimizer = trainable()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    try:
        infra.checkpoints.save_checkpoint(folder, 4, {"policy": (policy, optimizer)}, {"step": 4}, keep=2)
    except RunStopped as stop:
        assert "could not be written" not in str(stop)
    assert infra.checkpoints.newest_checkpoint(folder).name == "step_000004"


def fill_the_disk_at_every_operation(folder: Path) -> None:
    """Save again and again, while the n-th file operation of the save finds the disk full, for every n."""
    left, name = 0, ""

    def on_event(event: str, args: tuple) -> None:
        nonlocal left, name
        if event == "os.mkdir" and Path(args[0]).exists():  # harmless, and the caller knows
            return
        if event in ("open", "os.mkdir", "os.rename") and str(args[0]).startswith(str(folder / "checkpoints")):
            left -= 1
            if left == 0:
                name = f"{event} {args[0]}"
                chaos.disk_full()

    policy, optimizer = trainable()
    learn(policy, optimizer, 0)
    sys.addaudithook(on_event)
    for n in range(1, 99):
        step, before, left = 3 + n, checkpoints(folder), n
        try:
            infra.checkpoints.save_checkpoint(folder, step, {"policy": (policy, optimizer)}, {"step": step}, keep=3)
            assert left > 0 or f"{step:06d}" not in name, f"{name}: the save went on as if nothing had happened"
        except RunStopped as stop:
            assert "No space left on device" in str(stop) and "\n" not in str(stop), f"{name}: {stop}"
            assert stop.code == infra.errors.EXIT_FAILED
        undisturbed, left = left > 0, 0
        now = checkpoints(folder)
        assert not [c for c in now if c.endswith(".tmp")], f"{name}: leaves {now}"
        assert all(infra.checkpoints.fault_of(folder / "checkpoints" / c) is None for c in now), name
        assert len(now) >= 3 and set(before[-2:]) <= set(now), f"{name}: lost a checkpoint, {before} -> {now}"
        if undisturbed:
            break
    assert 8 < n < 98  # every file is opened to be written, hashed and flushed, and the folder renamed


def test_a_disk_that_fills_at_any_moment_of_a_save_costs_no_checkpoint(folder, tmp_path):
    process = chaos.fork(fill_the_disk_at_every_operation, (folder,), 1, tmp_path / "log")
    assert chaos.exit_code(process, 60) == 0, (tmp_path / "log").read_text()


def sources() -> list[Path]:
    """The project's own code: neither tests, nor benchmarks, nor an environment that lies in the folder."""
    rooms = ("infra", "rewards", "tasks", "fast", "baselines", "tools")
    return [*chaos.ROOT.glob("*.py"), *(file for room in rooms for file in (chaos.ROOT / room).glob("*.py"))]


def test_nothing_in_the_project_can_load_code():
    """No pickle and its like, no torch.load, no unsafe YAML, no eval, no remote code.

    But for what is sent into the sandbox to be run there, and datasets.py's unpickler, which knows no class.
    """
    modules = re.compile(r"(_?pickle|cPickle|dill|marshal|shelve|joblib|cloudpickle)(\..*)?")
    calls = re.compile(r"torch\.load|yaml\.(full_|unsafe_)?load|eval|exec|compile|allow_pickle|trust_remote_code")
    found = []
    for file in sources():
        tree = ast.parse(file.read_text())
        boxed = {"_inside", "_program", "_script", "_remote"} if file.name == "sandbox.py" else set()
        tree.body = [node for node in tree.body if getattr(node, "name", "") not in boxed]
        for node in ast.walk(tree):
            names, bad = [], modules
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            elif isinstance(node, ast.Call):
                names, bad = [ast.unparse(node.func), *(word.arg for word in node.keywords if word.arg)], calls
            found += [f"{file.name}:{node.lineno}: {name}" for name in names if bad.fullmatch(name)]
    assert sorted(re.sub(r":\d+", "", name) for name in found) == ["datasets.py: pickle", "sandbox.py: marshal"]


# --- whole runs ---------------------------------------------------------------------------------------------------

SHORT = ("train.steps=4", "eval.every=3", "train.dump_every=2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, warm) -> Path:
    """Four steps without a break, with a checkpoint at each."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finished(folder, warm, *SHORT, "train.save_every=1")
    return folder


def test_a_run_leaves_what_it_promises_and_learns_something(straight, killed_in_step_1):
    assert [row["step"] for row in chaos.metrics(straight)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in chaos.metrics(straight) if "eval/accuracy" in row] == [0, 3, 4]
    assert sorted(f.name for f in (straight / "samples").iterdir()) == [f"step_{n:06d}.jsonl" for n in (1, 2, 4)]
    assert checkpoints(straight) == ["step_000003", "step_000004"]
    weights = [f / "model.safetensors" for f in (straight / "model", killed_in_step_1 / "warm_start" / "model")]
    assert weights[0].read_bytes() != weights[1].read_bytes()  # else "equal weights" would say nothing below


def repeat_a_line(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("r+") as file:
        file.write(file.read().splitlines(keepends=True)[-1])


def drop_a_line(run_dir: Path) -> None:
    file = run_dir / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def change_a_digit(run_dir: Path) -> None:
    file = run_dir / "metrics.jsonl"
    file.write_text(re.sub(r'("entropy": 0\.\d+)\d', r"\1", file.read_text(), count=1))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda run_dir: None, ""),
        (repeat_a_line, "has the steps [0, 1, 2, 3, 4, 4]"),
        (drop_a_line, "has the steps [1, 2, 3, 4]"),
        (change_a_digit, "metrics.jsonl, step 1: entropy"),
        (lambda run_dir: flip_a_byte(run_dir / "model" / "model.safetensors"), "model/model.safetensors differs"),
        (lambda run_dir: flip_a_byte(run_dir / "samples" / "step_000002.jsonl"), "samples/step_000002.jsonl differs"),
        (lambda run_dir: (run_dir / "samples" / "step_000003.jsonl").touch(), "samples/ has other files"),
    ],
)
def test_the_comparison_of_two_runs_misses_nothing(change, words, straight, tmp_path):
    other = shutil.copytree(straight, tmp_path / "run")
    change(other)
    found = chaos.differences(straight, other)
    assert words in found[0] if words else found == []


def test_a_run_that_is_stopped_and_resumed_at_every_turn_ends_as_the_straight_one(straight, warm, tmp_path):
    """SIGTERM and Ctrl-C, in the first evaluation, while sampling, and in an update: it saves and exits with 75."""
    folder, go_on = tmp_path / "run", (warm, *SHORT, "train.save_every=100", "resume=true")
    for step, saved_step, spec in (
        (0, 0, {"on": "generate", "does": "SIGTERM"}),
        (2, 1, {"on": "generate", "does": "SIGINT", "step": 2}),  # nothing of step 2 is kept
        (3, 3, {"on": "backward", "does": "SIGTERM", "step": 3, "n": 2}),  # step 3 is finished
    ):
        code, words = ran(folder, *go_on, **spec)
        assert code == infra.errors.EXIT_STOPPED == 75, words
        assert f"stopped: saved after step {saved_step} of 4; resume=true goes on" in words
        assert f"{spec['does']}: stopping at the next safe place" in words and "Traceback" not in words
        assert checkpoints(folder)[-1] == f"step_{saved_step:06d}", step
    assert "going on after step 3" in finished(folder, *go_on)
    assert chaos.differences(straight, folder) == []

    def content() -> dict:
        return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in ("config.yaml", "lock")}

    before = content()
    assert "is finished: 4 steps" in finished(folder, *go_on)
    assert before == content()
    finished(folder, *go_on, "train.steps=5")
    assert [row["step"] for row in chaos.metrics(folder)] == [0, 1, 2, 3, 4, 5]


def test_a_run_stopped_before_any_evaluation_can_be_ended_where_it_stands(warm, tmp_path):
    folder = tmp_path / "run"
    code, words = ran(folder, warm, "train.steps=4", on="backward", step=2, does="SIGTERM")
    assert code == infra.errors.EXIT_STOPPED and "saved after step 2" in words
    assert "done in" in finished(folder, warm, "train.steps=2", "resume=true")
    assert (folder / "model" / "model.safetensors").exists()


def test_a_second_signal_ends_a_run_that_does_not_come_to_a_safe_place(warm, tmp_path):
    process = started(tmp_path / "run", warm, on="generate", step=1, does="hang")
    log, deadline = tmp_path / "run.log", time.monotonic() + 60
    while "held out" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(2.2)
    assert process.exitcode is None and "stopping at the next safe place" in log.read_text()
    os.kill(process.pid, signal.SIGTERM)
    assert chaos.exit_code(process, 20) == 128 + signal.SIGTERM


def test_a_disk_that_is_too_small_ends_a_run_with_one_line_and_loses_nothing(straight, warm, tmp_path):
    """A real limit on the size of files: first checkpoints do not fit, then, on the way out, not even the model."""
    folder, go_on = tmp_path / "run", (warm, *SHORT, "train.save_every=2", "resume=true")

    def stops(words_wanted: str, **spec) -> None:
        code, words = ran(folder, *go_on, **spec)
        assert code == infra.errors.EXIT_FAILED and "Traceback" not in words, words
        said = [line for line in words.splitlines() if line.startswith("stopped: ")]
        assert len(said) == 1 and words_wanted in said[0], words
        assert not list((folder / "checkpoints").glob("*.tmp"))

    stops("the checkpoint of step 2 could not be written", on="reward", step=2, does="small disk")
    assert checkpoints(folder) == []
    stops("the checkpoint of step 4 could not be written", on="reward", step=4, does="small disk")
    assert checkpoints(folder) == ["step_000002"]
    stops("No space left", on="file", part="metrics.jsonl", step=3, does="disk full")
    stops("File too large", on="file", part="model", n=2, does="small disk")
    assert checkpoints(folder) == ["step_000002", "step_000004"] and not (folder / "model").exists()
    finished(folder, *go_on)
    assert chaos.differences(straight, folder) == []


def test_a_finished_warm_start_is_kept_when_rl_had_no_checkpoint_yet(killed_in_step_1, tmp_path):
    folder = shutil.copytree(killed_in_step_1, tmp_path / "run")
    before = {file: file.read_bytes() for file in (folder / "warm_start").rglob("*") if file.is_file()}
    words = finished(folder, "train.steps=1", "resume=true")
    assert "the warm start of this run is finished and kept" in words and "RL starts over" in words
    assert before == {file: file.read_bytes() for file in (folder / "warm_start").rglob("*") if file.is_file()}
    assert [row["step"] for row in chaos.metrics(folder)] == [0, 1]


def test_a_run_does_not_go_on_with_another_reference_than_it_began_with(straight, tmp_path):
    folder = shutil.copytree(straight, tmp_path / "run")
    policy = load(folder / "model")
    trained = {"policy": (policy, model.make_optimizer(policy, train.TrainConfig()))}
    words = refusal(infra.checkpoints.resume, True, folder, trained, "another hash")
    assert "started from has changed on disk" in words


# --- the problems are part of a run -------------------------------------------------------------------------------

PROBLEMS = [Problem(f"{i}b+5?", str((i + 5) % 10), "chain", "Be brief.") for i in range(6)]
CHANGES = {
    "a reference": [*PROBLEMS[:5], replace(PROBLEMS[5], reference="7")],
    "a reference's type": [*PROBLEMS[:5], replace(PROBLEMS[5], reference=0)],
    "a prompt": [*PROBLEMS[:5], replace(PROBLEMS[5], prompt="5b+5? ")],
    "a system prompt": [replace(PROBLEMS[0], system=""), *PROBLEMS[1:]],
    "a grader": [replace(PROBLEMS[0], grader="number"), *PROBLEMS[1:]],
    "their number": PROBLEMS[:5],
    "their order": PROBLEMS[::-1],
    "where a text ends": [replace(PROBLEMS[0], prompt="0b+5?Be", system=" brief."), *PROBLEMS[1:]],
}


@pytest.mark.parametrize("what", CHANGES)
def test_kind_23_the_hash_of_problems_is_another_where_anything_that_matters_is(what):
    assert problems_hash(CHANGES[what]) != problems_hash(PROBLEMS)


def test_kind_23_the_hash_is_the_same_on_every_machine_and_for_every_order_of_keys():
    answers = [{"a": 1, "b": [None, 0.5]}, {"b": [None, 0.5], "a": 1}]
    first, second = (problems_hash([Problem("\u00e9\ud800?", answer, "math")]) for answer in answers)
    text = r'["\u00e9\ud800?", "", "math", {"a": 1, "b": [null, 0.5]}]' + "\n"
    assert first == second == hashlib.sha256(text.encode()).hexdigest()
    assert problems_hash(list(PROBLEMS)) == problems_hash(PROBLEMS)


def without_problems(checkpoint: Path) -> None:
    """Make it one of an earlier version, which wrote no hash of the problems."""
    state = json.loads((checkpoint / "state.json").read_text())
    del state["problems"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "state.json"
    manifest["state.json"] = {"bytes": file.stat().st_size, "sha256": infra.checkpoints._sha256(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_kind_23_a_run_goes_on_with_the_problems_that_it_began_with_alone(warm, tmp_path):
    rows = [{"prompt": f"{i}b+{j}?", "reference": str((i + j) % 10)} for i in range(9) for j in range(9)]
    held_out = [{"prompt": f"9b+{j}?", "reference": str((9 + j) % 10)} for j in range(4)]
    files = {"train": tmp_path / "train.jsonl", "held_out": tmp_path / "held_out.jsonl"}
    jsonl(files["train"], rows), jsonl(files["held_out"], held_out)
    run = tmp_path / "run"
    arguments = [warm, "data.source=file", f"data.path={files['train']}", f"data.held_out_path={files['held_out']}"]
    arguments += ["reward.grader=chain", "data.train_size=0", "data.held_out_size=4", "eval.prompts=4", "resume=true"]
    finished(run, *arguments, "train.steps=1")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert set(json.loads((checkpoint / "state.json").read_text())["problems"]) == {"training", "held-out"}

    wrong, fewer = [rows[0] | {"reference": "1"}, *rows[1:]], rows[1:]
    asked = [held_out[0] | {"prompt": "9b-1?"}, *held_out[1:]]
    changes = [("training", wrong, held_out), ("training", fewer, held_out), ("held-out", rows, asked)]
    changes += [("training and held-out", wrong, asked)]
    for which, *changed in changes:
        for file, lines in zip(files.values(), changed, strict=True):
            jsonl(file, lines)
        code, words = ran(run, *arguments, "train.steps=2")
        assert code == 2 and f"error: the {which} problems of {run} have changed since it began" in words
    jsonl(files["train"], rows[::-1]), jsonl(files["held_out"], held_out)  # a file's order is none of a run's
    assert "going on after step 1" in finished(run, *arguments, "train.steps=2", "eval.prompts=3")

    newest = max((run / "checkpoints").iterdir())
    without_problems(newest)
    jsonl(files["train"], wrong)
    words = finished(run, *arguments, "train.steps=3")
    assert "whether they are the same could not be compared" in words and "going on after step 2" in words
    jsonl(files["train"], rows)  # from there on they are known
    code, words = ran(run, *arguments, "train.steps=4")
    assert code == 2 and "the training problems of" in words


# --- the dry run --------------------------------------------------------------------------------------------------


def dry_run(arguments: list[str]) -> None:
    began = time.perf_counter()
    chaos.child(None, [*arguments, "dry_run=true"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"took {time.perf_counter() - began:.1f} s and {peak:.2f} GiB")


def test_a_dry_run_plans_a_7b_model_from_its_config_alone_and_writes_nothing(tmp_path):
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 152_064, "max_position_embeddings": 32_768}
    model = tmp_path / "model"
    chain_tokenizer().save_pretrained(model)
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **sizes, "tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
    before, log = sorted(tmp_path.rglob("*")), tmp_path / "log"

    arguments = [*TINY, f"model.path={model}", "model.shard=8", f"run_dir={tmp_path / 'run'}"]
    assert chaos.exit_code(chaos.fork(dry_run, (arguments,), 1, log), 60) == 0, log.read_text()
    words = log.read_text()
    assert sorted({*tmp_path.rglob("*")} - {log}) == before
    assert "7,615,616,512 parameters" in words and "memory of each of 8 " in words
    peak = float(re.search(r"peak +([\d.]+) GiB", words)[1])
    assert 14 < peak < 60  # 16 bytes a parameter over 8 ranks, and the model gathered once
    assert re.search(r"\d[b-z][-+*]\d\?", words)  # a prompt
    seconds, gib = map(float, re.search(r"took ([\d.]+) s and ([\d.]+) GiB", words).groups())
    assert seconds < 20 and gib < 2


def test_a_dry_run_of_the_quickstart_needs_no_folder(tmp_path):
    log = tmp_path / "log"
    process = chaos.fork(dry_run, ([f"run_dir={tmp_path / 'run'}"],), 1, log)
    assert chaos.exit_code(process, 60) == 0, log.read_text()
    assert "nothing was written" in log.read_text() and [f.name for f in tmp_path.iterdir()] == ["log"]
