"""What a newcomer gets wrong, and the one line that each mistake is worth; mistakes in a config are in test_run.py."""

import ast
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import eval as eval_script
import infra.config
import infra.errors
import infra.processes
import infra.run_folder
import pytest
import sample as sample_script
import torch
import train
import yaml
from baselines import supervised
from infra import preflight
from model import save
from tasks.chain import chain_tokenizer
from tools import sweep

import chaos
from conftest import TINY, started
from helpers import jsonl, saved, tiny_model

COMMANDS = {"train": "train.py", "sample": "sample.py", "eval": "eval.py", "sweep": "tools/sweep.py"}
SCRIPTS = {"train": train, "sample": sample_script, "eval": eval_script, "sweep": sweep}
BENCHMARK = "{model} --benchmark file --data {rows}.jsonl --max-new-tokens 8"


def run_folder(folder: Path, **changes) -> Path:
    """A run folder as train.py leaves it, without the training; `changes` go into the saved block `model`."""
    infra.run_folder.open_run_folder(infra.config.read_config(train.Config, [*TINY, f"run_dir={folder}"], None))
    if changes:
        saved_config = yaml.safe_load((folder / "config.yaml").read_text())
        saved_config["model"] |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(saved_config))
    save(tiny_model(), folder / "model")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """What the commands below name in braces."""
    work = tmp_path_factory.mktemp("places")
    run_folder(work / "stale", knob_of_yore=3)
    run_folder(work / "unfinished")
    (work / "unfinished" / "model").rename(work / "elsewhere")
    (work / "file").write_text("")
    (work / "table.csv").write_text("prompt,reference\n3b+5?,8\n")
    jsonl(work / "rows.jsonl", [{"prompt": f"{i}b+5?", "reference": "8", "grader": "chain"} for i in range(9)])
    names = {name: work / name for name in ("stale", "unfinished", "file", "table", "rows", "new")}
    unpadded = chain_tokenizer()
    unpadded.pad_token = None
    return names | {
        "run": run_folder(work / "run"),
        "model": saved(tiny_model(), work / "model"),
        "unpadded": saved(tiny_model(), work / "unpadded", unpadded),
    }


@pytest.fixture
def words_of(places, monkeypatch, capsys):
    """Run a script in this process -> (exit code, its last words, which must be one line on stderr)."""

    def ended(script: str, arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *(word.format(**places) for word in arguments.split())])
        with pytest.raises(SystemExit) as end:
            infra.processes.command_line(SCRIPTS[script].main, train.Config)
        words = capsys.readouterr().err
        assert words.startswith(("error: ", "stopped: ")) and words.count("\n") == 1, words
        return end.value.code, words

    for module in (infra.processes, supervised):  # it writes to the real stderr
        monkeypatch.setattr(module, "restart_watchdog", lambda _: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield ended
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("train", "--train.steps 5", "key=value ...], no dashes"),
        ("train", "train.steps = 5", "no spaces around '='"),
        ("train", "train.steps =5", "no spaces around '='"),
        ("train", "resume=true overwrite=true", "overwrite=true deletes it: give one of them"),
        ("train", "model.attention=flash_attention_2 data.train_size=99", "sdpa works anywhere"),
        ("train", "model.path={model} model.attention=flash_attention_2", "sdpa works anywhere"),
        ("train", "model.attention=spda data.train_size=99", "model.attention=spda: "),
        ("train", "sample.max_new_tokens=1020 data.train_size=99", "lower sample.max_new_tokens"),
        ("train", "model.path={model} data.source=file data.path={table}.csv", "a file of another kind"),
        ("train", "{stale}/config.yaml", "unknown key 'model.knob_of_yore'"),
        ("train", "{run}/config.yaml resume=true run_dir={stale}", "another version of this code"),
        ("train", "{run}/config.yaml", "is in use: give resume=true, overwrite=true or another run_dir"),
        ("sample", "", "arguments are required: run_or_model (python sample.py --help)"),
        ("eval", "", "give a run folder"),
        ("sample", "{run} --tokens 5", "unrecognized arguments: --tokens 5 (python sample.py --help)"),
        ("sample", "{run} --samples many", "invalid int value: 'many'"),
        ("sample", "{run} --seed -1", "--seed must not be negative"),
        ("sample", "{run}/nowhere/at/all", "neither a folder with a model nor a Hub id"),
        ("sample", "{unfinished}", "training has not ended; resume=true goes on with it"),
        ("sample", "{stale}", "knob_of_yore"),
        ("sample", "{model}", "is not a run folder, so it has no held-out prompts: give a prompt"),
        ("sample", "{run} " + "3b+5" * 300, "the prompt has 1201 tokens; the model's context leaves room for 1010"),
        ("sample", "{run} 3b+5? --max-new-tokens 2000", "leave no room for a prompt in the model's context of 1024"),
        ("sample", "{run} Hello", "characters that this model's tokenizer does not know"),
        ("eval", "{unfinished}", "training has not ended; resume=true goes on with it"),
        ("eval", "{stale}", "check out the commit"),
        ("eval", "{model}", "give a --benchmark"),
        ("eval", "{run} --seed -1", "--seed must not be negative"),
        ("eval", "{run} --samples 4 --temperature 1", "are a --benchmark's: a run has its own"),
        ("eval", "{model} --benchmark gms8k --data {rows}.jsonl", "invalid choice: 'gms8k' (choose from"),
        ("sweep", "", "arguments are required: CONFIG.yaml"),
        ("eval", BENCHMARK + " --output {file}/out.jsonl", "out.jsonl cannot be written"),
        ("eval", BENCHMARK + " --prompt Solve:", "--prompt='Solve:' must hold the text {question}"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line_with_code_2_and_costs_nothing(script, arguments, words, words_of, places):
    before = sorted(places["run"].parent.rglob("*"))
    code, said = words_of(script, arguments)
    assert words in said and code == infra.errors.EXIT_BAD_INPUT
    assert sorted(places["run"].parent.rglob("*")) == before


@pytest.mark.parametrize("what", ["run", "model", "unpadded"])
def test_any_prompt_can_be_put_to_a_run_and_to_a_model_even_without_a_pad_token(what, places, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", str(places[what]), "3b+5?", "--samples", "2"])
    infra.processes.command_line(sample_script.main)
    out, err = capsys.readouterr()
    assert out.count("prompt     3b+5?\nresponse   ") == 2 and not err


# --- Python and its packages --------------------------------------------------------------------------------------


def test_without_the_packages_a_script_names_the_command_that_installs_them():
    for file in COMMANDS.values():
        module = ["-m", file.removesuffix(".py").replace("/", ".")] if "/" in file else [file]
        command = [sys.executable, "-S", *module]
        done = subprocess.run(command, cwd=chaos.ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "torch is not installed" in done.stderr and "pip install -r requirements.txt" in done.stderr


def test_an_old_python_can_read_the_scripts_far_enough_to_be_told(monkeypatch):
    for file in ("infra/preflight.py", *COMMANDS.values()):
        ast.parse((chaos.ROOT / file).read_text(), feature_version=(3, 8))
        _, second = ast.parse((chaos.ROOT / file).read_text()).body[:2]
        assert file == "infra/preflight.py" or ast.unparse(second) == "from infra import preflight"
    assert preflight.complaint() is None
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert preflight.complaint().startswith("Python 3.10 or newer is needed")


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("transformers", "4.57.1", "transformers 4.57.1 is too old, 5.17 is needed: pip install -r requirements.txt"),
        ("torch", "2.9.1+cu128", "torch 2.9.1+cu128 is too old, 2.11 is needed"),
        ("torch", "2.11.0a0+nv25", None),
        ("numpy", "10.0.0", None),
    ],
)
def test_a_package_that_is_too_old_is_named(name, version, words, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda other: version if other == name else real(other))
    assert (preflight.complaint() or "").startswith(words) if words else preflight.complaint() is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocator_is_told_to_grow_its_segments_before_torch_is_there_unless_the_user_has_told_it(given, expected):
    code = "import infra.preflight, os, sys; print({k: v for k, v in os.environ.items() if 'ALLOC_CONF' in k});"
    code += "assert 'torch' not in sys.modules"
    others = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=chaos.ROOT, env=others | given, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(expected), "")


def test_every_script_computes_without_cudnns_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    seen = []
    infra.processes.command_line(lambda: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    assert seen == [False]


# --- memory and devices -------------------------------------------------------------------------------------------


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24 GiB")


@pytest.mark.parametrize(
    "stage, owner, name, knob",
    [
        ("load", torch.nn.Module, "to", "model.offload_reference=true"),
        ("warm_start", supervised, "supervised_step", "train.micro_batch_tokens"),
        ("evaluate", eval_script, "sample", "sample.batch_tokens"),
        ("sample", sample_script, "sample", "sample.batch_tokens"),
        ("log_probs", train.model, "batch_log_probs", "train.micro_batch_tokens"),
        ("update", train.spro, "policy_loss", "model.gradient_checkpointing=true"),
    ],
)
def test_out_of_memory_names_the_stage_and_the_knobs_which_may_then_be_turned(
    stage, owner, name, knob, words_of, places, monkeypatch, tmp_path
):
    start = "" if stage == "warm_start" else " model.path={model}"
    command = f"{' '.join(TINY)} run_dir={tmp_path / 'run'}{start}"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, no_memory)
        code, said = words_of("train", command)
    assert code == infra.errors.EXIT_FAILED and "resume=true goes on" in said
    assert f"in stage {stage} (CUDA out of memory. Tried to allocate 2.50 GiB): " in said and knob in said
    lower = ["sample.batch_tokens=99", "train.micro_batch_tokens=32", "model.gradient_checkpointing=true"]
    again = [word.format(**places) for word in f"{command} resume=true".split(" ")]
    config = infra.config.read_config(train.Config, [*again, *lower, "model.offload_reference=true"], None)
    assert infra.run_folder.open_run_folder(config) == tmp_path / "run"


def test_out_of_memory_in_a_script_is_one_line(words_of, monkeypatch):
    monkeypatch.setattr(sample_script, "sample", no_memory)
    code, said = words_of("sample", "{run} 3b+5?")
    assert code == infra.errors.EXIT_FAILED and "fewer --samples" in said


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error. Last error:\nFailed to CUDA calloc async 4 bytes",
    ],
)
def test_libraries_that_find_no_memory_on_a_gpu_are_out_of_memory_too(words):
    kind = torch.distributed.DistBackendError if "NCCL" in words else RuntimeError
    with pytest.raises(infra.errors.OutOfMemory, match=words[:10]) as stop, infra.errors.enough_memory("update"):
        raise kind(words)
    assert stop.value.stage == "update" and "\n" not in str(stop.value)


def test_what_has_no_deterministic_kernel_is_one_line(words_of, places, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set x. You can turn it off")

    monkeypatch.setattr(sample_script, "sample", refuse)
    code, said = words_of("sample", "{run} 3b+5?")
    assert code == infra.errors.EXIT_FAILED and "set model.deterministic=false" in said


def test_the_deterministic_knob_asks_torch_for_it_but_not_for_sampling(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    is_on = torch.are_deterministic_algorithms_enabled
    try:
        infra.processes.start_processes(1)
        assert not is_on()
        infra.processes.start_processes(1, deterministic=True)
        assert is_on() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with train.sharding.unsharded(tiny_model()):
            assert not is_on()
        assert is_on()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


ENDS_BADLY = """
import atexit, os, sys, time
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
from infra import errors, processes
atexit.register(time.sleep, 3600)  # as taking down a group does whose collectives are pending

def main():
    processes.start_processes(1)
    raise errors.BadInput("a word of why") if sys.argv[2] == "BadInput" else RuntimeError("a word of why")

processes.command_line(main)
"""


@pytest.mark.parametrize(
    "kind, code, line", [("BadInput", 2, "error: a word of why"), ("RuntimeError", 1, "Traceback")]
)
def test_a_process_of_a_group_that_ends_badly_waits_for_nobody(kind, code, line):
    command = [sys.executable, "-c", ENDS_BADLY, str(chaos.free_port()), kind]
    done = subprocess.run(command, cwd=chaos.ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == code and line in done.stderr and "a word of why" in done.stderr


def test_a_resumed_run_that_will_round_otherwise_says_so_in_one_line(places, capsys):
    folder = places["run"]
    for changed, words in (("sample.batch_tokens=99", "sample.batch_tokens: 0 -> 99"), ("train.steps=11", None)):
        arguments = [*TINY, f"run_dir={folder}", "resume=true", changed]
        before = (folder / "config.yaml").read_text()
        infra.run_folder.open_run_folder(infra.config.read_config(train.Config, arguments, None))
        (folder / "config.yaml").write_text(before)
        said = capsys.readouterr().out
        assert (
            said.count("sums are rounded otherwise") == said.count("\n") == int(bool(words)) and (words or "") in said
        )


def test_another_runtime_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="shapes do not match"), infra.errors.enough_memory("update"):
        raise RuntimeError("shapes do not match")


def say_devices() -> None:
    print(repr(os.environ.get("CUDA_VISIBLE_DEVICES")), torch.cuda.device_count())


def test_tests_and_the_processes_they_start_see_no_gpu(tmp_path, capsys):
    say_devices()
    assert chaos.exit_code(chaos.fork(say_devices, (), 2, tmp_path / "log"), 60) == 0
    assert (tmp_path / "log").read_text() == 2 * capsys.readouterr().out == 2 * "'' 0\n"


def test_more_processes_than_gpus_are_refused(words_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    code, said = words_of("train", "run_dir={new}")
    assert code == infra.errors.EXIT_BAD_INPUT and "8 processes were started here for 2 GPU(s)" in said


def test_a_grader_that_cannot_judge_the_rows_is_named(words_of, tmp_path):
    code, said = words_of("train", f"{' '.join(TINY)} model.path={{model}} run_dir={tmp_path} reward.grader=code")
    assert code == infra.errors.EXIT_BAD_INPUT and "the grader 'code' cannot read the reference" in said


def test_a_folder_that_becomes_read_only_ends_a_run_with_one_line(words_of, tmp_path, monkeypatch):
    def refuse(file, _):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(infra.run_folder, "append_line", refuse)
    code, said = words_of("train", f"{' '.join(TINY)} model.path={{model}} run_dir={tmp_path / 'run'}")
    assert (
        code == infra.errors.EXIT_FAILED
        and "cannot write" in said
        and "metrics.jsonl" in said
        and "resume=true" in said
    )


# --- Ctrl-C -------------------------------------------------------------------------------------------------------


def test_ctrl_c_before_anything_is_written_needs_no_safe_place(places, monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        raise KeyboardInterrupt

    monkeypatch.setattr(train.model, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, "model.path=any", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(KeyboardInterrupt) as caught:
        infra.processes.command_line(train.main)
    preflight.hook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == "stopped: interrupted\n" and not (tmp_path / "run").exists()


def test_ctrl_c_in_a_warm_start_says_what_becomes_of_it(tmp_path):
    process = started(tmp_path / "run", on="warm start", n=5, does="SIGINT")
    assert chaos.exit_code(process, 60) == infra.errors.EXIT_STOPPED
    *_, said = (tmp_path / "run.log").read_text().splitlines()
    assert said == "stopped: told to stop during the warm start, which resume=true begins again"


def test_ctrl_c_in_a_benchmark_keeps_what_is_graded_and_the_same_command_goes_on(
    words_of, places, monkeypatch, tmp_path, capsys
):
    command, lots = f"{BENCHMARK} --output {tmp_path / 'out.jsonl'}", []

    def interrupted(*args):
        lots.append(args)
        if len(lots) == 3:
            raise KeyboardInterrupt
        return sample_script.sample(*args)

    monkeypatch.setattr(eval_script, "ROWS_AT_ONCE", 2)
    with monkeypatch.context() as patch:
        patch.setattr(eval_script, "sample", interrupted)
        code, said = words_of("eval", command)
    assert code == infra.errors.EXIT_STOPPED and "the same command goes on" in said
    eval_script.main()
    assert "9 problems x 1, 4 done" in capsys.readouterr().out


# --- two processes, one folder ------------------------------------------------------------------------------------


def opens(folder: Path) -> None:
    """Try to work in a run folder for a second."""
    infra.run_folder.LOCK_TRIES = 1
    try:
        arguments = [*TINY, f"run_dir={folder}", "resume=true"]
        infra.run_folder.open_run_folder(infra.config.read_config(train.Config, arguments, None))
        print("mine")
        time.sleep(1)
    except infra.errors.BadInput as error:
        print(error)


def test_of_processes_that_start_into_one_folder_at_once_one_gets_it(tmp_path):
    logs = [tmp_path / f"log{i}" for i in range(3)]
    for process in [chaos.fork(opens, (tmp_path / "run",), 1, log) for log in logs]:
        chaos.exit_code(process, 60)
    said = sorted(log.read_text().strip() for log in logs)
    assert said.count("mine") == 1 and all("run is in use by " in words for words in said if words != "mine")


@pytest.mark.parametrize("flag", ["resume=true", "overwrite=true"])
def test_a_run_that_still_runs_is_left_alone_until_it_is_dead(flag, words_of, tmp_path, monkeypatch):
    folder, command = tmp_path / "run", f"{' '.join(TINY)} run_dir={tmp_path / 'run'} {flag}"
    process = started(folder, on="warm start", n=3, does="hang")
    steps = folder / "warm_start" / "metrics.jsonl"
    while not steps.exists() or steps.read_text().count("\n") < 2:
        assert process.exitcode is None
        time.sleep(0.05)
    monkeypatch.setattr(infra.run_folder, "LOCK_TRIES", 1)
    before = sorted(folder.rglob("*"))
    code, said = words_of("train", command)
    assert (
        code == infra.errors.EXIT_BAD_INPUT and f"in use by process {process.pid} on " in said and "wait for it" in said
    )
    assert sorted(folder.rglob("*")) == before
    chaos.kill(process)
    process.join()
    config = infra.config.read_config(train.Config, command.split(" "), None)
    assert infra.run_folder.open_run_folder(config) == folder


def test_where_the_file_system_knows_no_locks_a_run_goes_without(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(os.strerror(95))

    monkeypatch.setattr(infra.run_folder.fcntl, "flock", unsupported)
    infra.run_folder.take_lock(tmp_path / "lock", "this")
    assert not infra.run_folder._locks


def test_an_evaluation_that_still_runs_keeps_its_file(words_of, places, tmp_path, monkeypatch):
    with (tmp_path / "out.jsonl.lock").open("w") as other:
        infra.run_folder.fcntl.flock(other, infra.run_folder.fcntl.LOCK_EX)
        monkeypatch.setattr(infra.run_folder, "LOCK_TRIES", 1)
        code, said = words_of("eval", f"{BENCHMARK} --output {tmp_path / 'out.jsonl'}")
    assert code == infra.errors.EXIT_BAD_INPUT and "out.jsonl is in use by another process" in said
