"""Verifiers: a response's text and the reference answer -> a verdict with its reason.

    python reward.py GRADER < pairs.jsonl > verdicts.jsonl

reads lines {"text": ..., "reference": ...} and writes one line {"score": 0..1 or null, "reason": ..., "seconds": ...}
for each, in order. A score is the model's doing; null is a fault of ours (a grader that crashed, a malformed line) and
must never be mistaken for a wrong answer: training drops the whole group of a response that has no score.

The rules of `number` and `math` stand at the top of answers.py. `math` runs in worker processes that are killed when an
answer takes too long.
"""

import atexit
import functools
import importlib.util
import json
import math
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import sandbox
from answers import grade_math, grade_number, last_box, parsed

ATTEMPTS = 2  # a grader that raises is tried again once before its fault is reported
VERDICT_SECONDS = 2.0  # wall clock for one verdict of a worker; then it is killed, and the answer is wrong
START_SECONDS = 60.0  # for a worker to import what it needs
WORKER_BYTES = 2**30  # address space of a worker
WORKER_VERDICTS = 1000  # then a fresh one: the parser's caches grow
WORKER_ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUSERBASE")  # all it inherits


@dataclass
class RewardConfig:
    grader: str = ""  # a name in GRADERS for all problems; empty: each problem names its own
    bonus: dict = field(default_factory=dict)  # {grader: weight}: its score, so weighted, is added to the reward
    overlong_buffer: int = 0  # tokens before sample.max_new_tokens over which the reward falls by up to 1; 0: off
    code_fraction: bool = False  # programs: the fraction of the tests passed (PRIME), not whether all are
    allow_unsafe_code_execution: bool = False  # run programs even where no sandbox works: read SECURITY.md first

    def __post_init__(self):
        unsafe = self.allow_unsafe_code_execution
        if self.grader:
            check_grader(self.grader, "grader", unsafe)
        for name, weight in self.bonus.items():
            check_grader(name, "bonus", unsafe)
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise ValueError(f"bonus={self.bonus!r}: the weight of {name} must be a number")
        if self.overlong_buffer < 0:
            raise ValueError(f"overlong_buffer={self.overlong_buffer} must not be negative")


@dataclass(frozen=True)
class Verdict:
    score: float | None  # 0..1; None: an infrastructure fault, no statement about the response
    reason: str
    seconds: float = 0.0


def grade_chain(text: str, reference) -> tuple[float, str]:
    """The chain task: the text must end in `#` and the one right digit."""
    answer = re.search(r"#([0-9])\Z", text)
    if not answer:
        return 0.0, "no answer: the text does not end in '#' and a digit"
    if answer[1] != str(reference):  # rows may say 2 for "2"
        return 0.0, f"answered {answer[1]}, expected {reference}"
    return 1.0, "right"


def grade_boxed(text: str, reference) -> tuple[float, str]:
    """Whether there is a box to be graded at all: a bonus for the format."""
    return (0.0, "no box") if last_box(text) is None else (1.0, "boxed")


def grade_reasoning_gym(text: str, reference: dict) -> tuple[float, str]:
    """A reasoning-gym task's own score of what is boxed; the reference is the task's entry."""
    import reasoning_gym

    answer = last_box(text)
    score = reasoning_gym.get_score_answer_fn(reference["metadata"]["source_dataset"])(answer, reference)
    return min(1.0, max(0.0, float(score))), f"boxed {answer!r}, expected {reference['answer']!r}"


# --- code ---------------------------------------------------------------------------------------------------------

PYTHON = ("", "python", "py", "python3")  # what may stand behind an opening fence
DECIMAL = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", re.ASCII)


def _fence(line: str) -> tuple[str, int, str] | None:
    """(indent, number of backticks, first word behind them) of a line that opens or closes a block; else None."""
    ticks = line.lstrip(" \t")
    words = ticks.lstrip("`")
    if len(ticks) - len(words) < 3 or "`" in words:
        return None
    return line[: len(line) - len(ticks)], len(ticks) - len(words), (words.split() or [""])[0].lower()


def extract_program(text: str) -> str | None:
    """The last fenced block of `text` that is closed and marked python, py, python3 or not at all; None without one.

    CommonMark's fences, with two exceptions: a marked fence inside a block begins another (the first was never closed),
    and one inside a triple-quoted string is none, unless that reading would leave the last block open. Blocks count
    wherever they stand, in the thinking part too. A block is a whole program: the bare body of a function is none.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    program = None
    for strings in (True, False):
        program = block = quote = None
        for line in lines:
            fence = None if quote else _fence(line)
            if fence and (block is None or fence[2]):
                (indent, ticks, mark), block = fence, []
            elif fence and fence[1] >= ticks:
                program, block = "\n".join(block) if mark in PYTHON else program, None
            elif block is not None:
                block.append(line.removeprefix(indent))
                for found in re.findall(r"\"{3}|'{3}", line) if strings else ():
                    quote = found if quote is None else None if found == quote else quote
        if block is None:
            break
    return program


def read_tests(reference) -> dict:
    """A code reference, decoded, with pairs (input, expected) as "tests". Raises where it is malformed or has no test.

    {"inputs": [text], "outputs": [text]}    stdin and stdout of each test
    the same and "fn_name"                   arguments (JSON, one a line; or a list) and returned value (JSON)
    {"tests": [{"input", "output"}]}         either of these, as LiveCodeBench writes it
    {"script", "entry_point", "prelude"}     assertions on a function or class, and what precedes both: see sandbox.py
    each with "time_limit" (seconds a test) and "memory_limit" (MiB), if they are not to be the sandbox's defaults
    """
    reference = json.loads(reference) if isinstance(reference, str) else reference
    reference = {"tests": reference} if isinstance(reference, list) else dict(reference)
    if "script" in reference:
        return reference
    if "tests" in reference:
        tests = reference["tests"]
        if any((test.get("testtype") == "functional") != bool(reference.get("fn_name")) for test in tests):
            raise ValueError("functional tests, and no others, need fn_name (LiveCodeBench: metadata.func_name)")
        pairs = [(test["input"], test["output"]) for test in tests]
    else:
        pairs = list(zip(reference["inputs"], reference["outputs"], strict=True))
    if reference.get("fn_name"):
        inputs = [[json.loads(x) for x in i.split("\n") if x.strip()] if isinstance(i, str) else i for i, _ in pairs]
        outputs = [json.loads(o) if isinstance(o, str) else o for _, o in pairs]
        # APPS and TACO wrap the value in a list in some problems, and then in all tests of the problem
        reference["wrapped"] = all(isinstance(o, list) and len(o) == 1 for o in outputs)
        pairs = list(zip(inputs, outputs, strict=True))
    else:  # APPS has some texts as lists of lines
        pairs = [tuple(x if isinstance(x, str) else "\n".join(x) for x in pair) for pair in pairs]
    if not pairs:
        raise ValueError("the reference has no tests")
    return reference | {"tests": pairs}


def same_value(got, expected) -> bool:
    """Python's == on plain data (so True is 1, a tuple arrives as a list, NaN equals nothing), but where a float is
    expected a number that differs by 1e-6, absolute or relative, will do."""
    if isinstance(expected, float) and isinstance(got, int | float):
        try:
            return got == expected or math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
        except OverflowError:  # an integer beyond all floats
            return False
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(same_value, got, expected))
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(same_value(got[key], expected[key]) for key in expected)
    return got == expected


def same_text(got: str, expected: str) -> bool:
    """Equal line by line, but for blanks at the end of a line and blank lines at the end; and where a decimal with a
    point or an exponent is expected between single blanks, one that is `same_value` as a float will do."""

    def words(text):
        return [line.rstrip(" \t\r").split(" ") for line in text.rstrip(" \t\r\n").split("\n")]

    def same(word, want):
        decimal = ("." in want or "e" in want.lower()) and DECIMAL.fullmatch(want) and DECIMAL.fullmatch(word)
        return word == want or (bool(decimal) and same_value(float(word), float(want)))

    def same_line(line, wanted):
        return len(line) == len(wanted) and all(map(same, line, wanted))

    lines, wanted = words(got), words(expected)
    return len(lines) == len(wanted) and all(map(same_line, lines, wanted))


def run_test(program: str, reference: dict, given, expected, unsafe: bool) -> tuple[str, str]:
    """(verdict, detail) of one of the tests of `read_tests`."""
    room = 2**20 + 2 * len(json.dumps(expected))
    limits = sandbox.Limits(reference.get("time_limit", 6.0), reference.get("memory_limit", 512), room)
    function = reference.get("fn_name")
    if function:
        outcome = sandbox.run_function(program, function, given, limits, unsafe)
    else:
        outcome = sandbox.run_program(program, given.encode(), limits, unsafe)
    if outcome.verdict != "OK":
        return outcome.verdict, outcome.detail
    if function and not outcome.result:
        return "RE", "it ended without returning a value"
    try:
        if function:
            value = json.loads(outcome.result)
            right = same_value(value, expected) or (reference["wrapped"] and same_value(value, expected[0]))
        else:
            right = same_text(outcome.stdout.decode(), expected)
    except (ValueError, RecursionError) as error:  # no UTF-8, not one JSON value, or one too deep to compare
        return "WA", f"unreadable: {type(error).__name__}"
    return ("AC", "") if right else ("WA", "not what is expected")


def grade_code(text: str, reference, fraction: bool = False, unsafe: bool = False) -> tuple[float, str]:
    """1 if the program in `text` passes all tests of `reference`, see `read_tests`; or the fraction that it passes.

    The reason names the verdict (AC, WA, CE, RE, TLE, MLE, OLE) and the first test that failed. All-or-nothing stops
    there; the fraction goes on, unless a limit was broken: an endless loop costs one time limit, not one for each test.
    Whatever keeps a test from being run (no sandbox, a malformed reference) raises: it is no score.
    """
    reference = read_tests(reference)
    sandbox.isolation(unsafe)
    program = extract_program(text)
    if program is None:
        return 0.0, "no program: no closed code block that is marked python or not at all"
    if "script" in reference:
        limits = sandbox.Limits(reference.get("time_limit", 6.0), reference.get("memory_limit", 512))
        script, entry, prelude = reference["script"], reference["entry_point"], reference.get("prelude", "")
        outcome = sandbox.run_script(program, script, entry, prelude, limits, unsafe)
        return (1.0, "AC") if outcome.verdict == "OK" else (0.0, f"{outcome.verdict}: {outcome.detail}")
    passed, reason, total = 0, "", len(reference["tests"])
    for i, (given, expected) in enumerate(reference["tests"], 1):
        verdict, detail = run_test(program, reference, given, expected, unsafe)
        passed += verdict == "AC"
        if verdict != "AC":
            reason = reason or f"{verdict} on test {i} of {total}: {detail}"
            if not fraction or verdict in ("CE", "TLE", "MLE", "OLE"):
                break
    return passed / total if fraction else float(passed == total), reason or f"AC on {total} tests"


# --- from answers to verdicts -------------------------------------------------------------------------------------


GRADERS = {
    "chain": grade_chain,
    "boxed": grade_boxed,
    "number": grade_number,
    "math": grade_math,
    "reasoning_gym": grade_reasoning_gym,
    "code": functools.partial(grade_code, fraction=False, unsafe=False),  # until `configure`
}
IN_WORKER = {"math"}  # graders that may hang: they run in a killable process
IN_THREAD = IN_WORKER | {"code"}  # graders that leave the work to another process: as many at once as there are cores


def configure(config: RewardConfig) -> None:
    """Let the code grader of this process do as `config` says."""
    settings = {"fraction": config.code_fraction, "unsafe": config.allow_unsafe_code_execution}
    GRADERS["code"] = functools.partial(grade_code, **settings)


def check_grader(name: str, key: str = "grader", unsafe: bool | None = None) -> None:
    """Raise ValueError if there is no such grader, or if what it needs is not installed. `unsafe`: as configured."""
    if name not in GRADERS:
        raise ValueError(f"{key}={name!r} is not known: choose one of {', '.join(GRADERS)}")
    if name == "math" and not all(map(importlib.util.find_spec, ("math_verify", "latex2sympy2_extended"))):
        raise ValueError(f"{key}='math' needs a package that is not installed: pip install math-verify")
    if name == "code":
        unsafe = GRADERS["code"].keywords["unsafe"] if unsafe is None else unsafe
        try:
            sandbox.isolation(unsafe)
        except sandbox.SandboxError as error:
            raise ValueError(f"{key}='code': {error}, or set reward.allow_unsafe_code_execution=true") from error


def isolation() -> str:
    """What stands between this machine and the programs that this process grades: see sandbox.py."""
    level = sandbox.isolation(GRADERS["code"].keywords["unsafe"]).name
    return "resource limits alone, no sandbox" if level == "none" else f"a {level} sandbox"


def grade_one(grader: str, text: str, reference) -> Verdict:
    """One verdict. A crash of the grader is a fault (score None), never a wrong answer. KeyError: unknown grader."""
    judge, start = GRADERS[grader], time.perf_counter()
    if grader in IN_WORKER:
        judge = functools.partial(ask_worker, grader)
    for _ in range(ATTEMPTS):
        try:
            score, reason = judge(text, reference)
            if not 0 <= score <= 1:  # NaN too
                raise ValueError(f"a score of {score!r} does not lie in [0, 1]")
            break
        except Exception as error:  # whatever a grader trips over is not the response's fault
            score, reason = None, f"fault in grader {grader!r}: {type(error).__name__}: {error}"
    return Verdict(score, reason, time.perf_counter() - start)


def grade(answers, grader: str = "") -> list[Verdict]:
    """One verdict for each (problem, text) of `answers`, in order: by `grader`, or else by each problem's own."""
    jobs = [(grader or problem.grader, text, problem.reference) for problem, text in answers]
    for name in {name for name, _, _ in jobs}:
        check_grader(name)
    slow = any(name in IN_THREAD for name, _, _ in jobs)
    return list((threads(os.getpid()).map if slow else map)(lambda job: grade_one(*job), jobs))


def shaped_rewards(answers, verdicts, lengths, max_new_tokens: int, config: RewardConfig) -> list[float]:
    """The rewards to train on: score + weighted bonuses + over-long penalty, for each answer; NaN without a verdict.

    lengths: in tokens. The penalty is DAPO's (arXiv 2503.14476, Eq. 13): 0 up to max_new_tokens - overlong_buffer,
    from there falling linearly to -1 at max_new_tokens. The verdicts stay as they are: accuracy counts those.
    """
    rewards = [math.nan if verdict.score is None else float(verdict.score) for verdict in verdicts]
    for grader, weight in config.bonus.items():
        for i, verdict in enumerate(grade(answers, grader)):
            rewards[i] += math.nan if verdict.score is None else weight * verdict.score
    if config.overlong_buffer:
        for i, length in enumerate(lengths):
            excess = length - (max_new_tokens - config.overlong_buffer)
            rewards[i] -= min(max(excess / config.overlong_buffer, 0), 1)
    return rewards


# --- workers ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def threads(_process: int) -> ThreadPoolExecutor:
    """The threads of this process (a fork of it needs its own): its share of the cores, at most one worker each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


_of_thread = threading.local()
_workers: set["Worker"] = set()


class Worker:
    """A process that judges one answer at a time and can be killed. It ends by itself when its parent is gone."""

    def __init__(self):
        environment = {name: os.environ[name] for name in WORKER_ENVIRONMENT if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment | {"PYTHONHASHSEED": "0"},  # it decides sympy's order of terms
            start_new_session=True,  # a Ctrl-C is for the trainer
        )
        self.owner, self.asked, self.received = os.getpid(), 0, b""
        _workers.add(self)
        try:
            self._line(START_SECONDS)
        except (TimeoutError, ConnectionError) as error:
            self.close()
            raise RuntimeError("a worker of the math grader could not start") from error

    def _line(self, seconds: float) -> bytes:
        """The next line it writes. TimeoutError: there was none in time. ConnectionError: it has ended."""
        end, poll = time.monotonic() + seconds, select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.received:
            if not poll.poll(max(0, end - time.monotonic()) * 1000):
                raise TimeoutError
            chunk = os.read(self.process.stdout.fileno(), 2**16)
            if not chunk:
                raise ConnectionError("a worker ended without a verdict")
            self.received += chunk
        line, _, self.received = self.received.partition(b"\n")
        return line

    def ask(self, *question) -> tuple[float | None, str]:
        self.asked += 1
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()
        return tuple(json.loads(self._line(VERDICT_SECONDS)))

    def close(self) -> None:
        _workers.discard(self)
        if self.owner == os.getpid():  # not where it was only inherited by a fork
            self.process.kill()
            self.process.communicate()


atexit.register(lambda: [worker.close() for worker in list(_workers)])


def ask_worker(grader: str, text: str, reference) -> tuple[float, str]:
    """The verdict of this thread's worker. An answer that takes too long is wrong; a worker that breaks is a fault."""
    worker = getattr(_of_thread, "worker", None)
    if worker and (worker.owner != os.getpid() or worker.asked >= WORKER_VERDICTS):
        worker.close()
        worker = None
    worker = _of_thread.worker = worker or Worker()
    try:
        score, reason = worker.ask(grader, text, reference)
    except BaseException as error:  # whatever it still writes would be taken for the next answer's verdict
        worker.close()
        _of_thread.worker = None
        if isinstance(error, TimeoutError):
            return 0.0, f"took longer than {VERDICT_SECONDS:g} s to compare"
        raise
    if score is None:
        raise RuntimeError(reason)
    return score, reason


def serve() -> None:
    """A worker's life: a question per line of stdin, a verdict per line of stdout, until stdin ends."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no verdict
    parsed("x^2")  # imports all it needs, or ends here
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin.buffer:
        limit = math.ceil(time.process_time() + VERDICT_SECONDS) + 1  # the kernel's, should the parent be gone
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        grader, text, reference = json.loads(line)
        try:
            verdict = GRADERS[grader](text, reference)
        except Exception as error:
            verdict = None, f"{type(error).__name__}: {error}"
        print(json.dumps(verdict), file=verdicts, flush=True)


# --- as a script --------------------------------------------------------------------------------------------------


def grade_line(grader: str, line: bytes) -> Verdict:
    try:
        row = json.loads(line)
        text, reference = row["text"], row["reference"]
        if not isinstance(text, str) or type(reference) not in (str, dict, int, float):
            raise TypeError("text must be a string, reference a string, a number or an object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"fault: not a JSON object with text and reference ({type(error).__name__}: {error})"
        return Verdict(None, reason)
    return grade_one(grader, text, reference)


def main() -> int:
    try:
        if len(sys.argv) != 2:
            raise ValueError(f"usage: python reward.py GRADER < pairs.jsonl, GRADER one of: {', '.join(GRADERS)}")
        check_grader(sys.argv[1])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    under_way: queue.Queue = queue.Queue(maxsize=256)

    def write():
        while verdict := under_way.get():
            print(json.dumps(asdict(verdict.result())), flush=True)

    writer = threading.Thread(target=write)
    writer.start()
    for line in sys.stdin.buffer:
        under_way.put(threads(os.getpid()).submit(grade_line, sys.argv[1], line))
    under_way.put(None)
    writer.join()
    return 0


if __name__ == "__main__":
    sys.exit(serve() if sys.argv[1:] == ["--worker"] else main())
