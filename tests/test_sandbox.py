"""The code grader against programs that are right, wrong or hostile, and the sandbox against what they try."""

import ast
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rewards import sandbox
from rewards.programs import extract_program, grade_code, same_text, same_value
from rewards.sandbox import Limits, Outcome, SandboxError, run_program

from helpers import grade_one

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("BENCHMARK_DATA", ROOT.parent / "shared" / "data"))
LONG = bool(os.environ.get("SANDBOX_LONG"))  # every problem of the benchmarks, 100 bombs: minutes instead of seconds
try:
    LEVEL, REASON = sandbox.isolation(), ""
except SandboxError as error:
    LEVEL, REASON = None, str(error)
boxed = pytest.mark.skipif(LEVEL is None, reason=REASON)


def block(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


def in_a_box(program: str, stdin: str = "", **limits) -> Outcome:
    return run_program(program, stdin.encode(), Limits(**({"seconds": 10} | limits)))


def prints(program: str, stdin: str = "", **limits) -> str:
    outcome = in_a_box(program, stdin, **limits)
    assert outcome.verdict == "OK", outcome
    return outcome.stdout.decode()


# --- the list: right programs, and every kind of wrong one, all at the same time ----------------------------------

SUM = "a, b = map(int, input().split())\nprint(a + b)"  # of every right program: "3 4" -> 7
RIGHT = {
    "plain": SUM,
    "stdin.buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "for line in stdin": "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
    "open(0)": "print(sum(map(int, open(0).read().split())))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "readline": "import sys\ninput = sys.stdin.readline\n" + SUM,
    "main guard": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
    "globals and deep recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\ndepth = 0\n"
        "def f(n):\n    global depth\n    depth += 1\n    return f(n - 1) if n else 0\nf(20000)\n" + SUM
    ),
    "a thread with a big stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
        "def f(n):\n    return f(n - 1) + 1 if n else 0\n"
        "def main():\n    a, b = map(int, input().split())\n    print(f(20000) - 20000 + a + b)\n"
        "t = threading.Thread(target=main)\nt.start()\nt.join()"
    ),
    "sys.exit(0)": SUM + "\nimport sys\nsys.exit(0)",
    "exit()": SUM + "\nexit()",
    "quit()": SUM + "\nquit()",
    "os._exit(0) after a flush": SUM.replace("a + b", "a + b, flush=True") + "\nimport os\nos._exit(0)",
    "os.write": "import os\na, b = map(int, input().split())\nos.write(1, b'%d' % (a + b))",
    "atexit": "import atexit\na, b = map(int, input().split())\natexit.register(print, a + b)",
    "strings of several lines": 's = """\n  1\n"""\n' + SUM,
    "trailing blanks and lines": SUM.replace("a + b)", "a + b, end='  \\n\\n \\n')"),
    "CRLF out": SUM.replace("a + b)", "a + b, end='\\r\\n')"),
    "numpy": "import numpy as np\nprint(int(np.array(input().split(), dtype=int).sum()))",
    "imports": "import bisect, collections, decimal, fractions, functools, heapq, itertools, math, re, string\n" + SUM,
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int\n    b: int\n"
    "p = P(*map(int, input().split()))\nprint(p.a + p.b)",
    "big integers": "a, b = map(int, input().split())\nassert len(str(10**20000)) == 20001\nprint(a + b)",
    "a temporary file": "open('/tmp/x', 'w').write(input())\nprint(sum(map(int, open('/tmp/x').read().split())))",
    "sh, inside": "import subprocess\na, b = input().split()\nprint(subprocess.getoutput(f'echo $(({a} + {b}))'))",
    "processes": "from multiprocessing import Pool\nif __name__ == '__main__':\n    with Pool(2) as pool:\n"
    "        print(sum(pool.map(int, input().split())))",
    "stderr": "import sys\nprint('debug', file=sys.stderr)\n" + SUM,
    "BOM, tabs, CRLF": "\ufeffif 1:\r\n\tprint(sum(map(int, input().split())))\r",
    "an encoding line": "# -*- coding: utf-8 -*-\n" + SUM,
    "a megabyte of code": "x = 1\n" * 170_000 + SUM,
    "its child lives on": SUM.replace("a + b", "a + b, flush=True")
    + "\nimport os, time\nif not os.fork():\n    time.sleep(100)",
}
WRONG = {
    "empty": "",
    "a comment": "# 7",
    "silent sys.exit(0)": "import sys\nsys.exit(0)",
    "silent os._exit(0)": "import os\nos._exit(0)",
    "a prefix": "print('')",
    "extra line": SUM + "\nprint(7)",
    "leading line": "print()\n" + SUM,
    "passed": "print('passed')",
    "AC": "print('AC')\nprint('OK')",
    "NUL": "print('7\\0')",
    "ANSI": "print('\\x1b[31m7\\x1b[0m')",
    "full width": "print('\uff17')",
    "no-break space": "print('7\\xa0')",
    "invalid UTF-8": "import os\nos.write(1, b'7\\xff')",
    "only stderr": "import sys\nprint(7, file=sys.stderr)",
    "float for int": "print(7.0)",
    "another test's answer": "print(8)",
    "closed stdout": "import os\nos.close(1)",
}
FAILING = {
    "CE": {
        "syntax error": "print(",
        "indentation": "  print(7)",
        "null byte": "print(7)\0",
        "nested too deep": "(" * 100_000 + ")" * 100_000,
        "half a surrogate pair": "print('\ud800')",
        "unknown encoding": "# coding: nonsense\nprint(7)",
    },
    "RE": {
        "exit code 1": SUM + "\nexit(1)",
        **{f"exit code {code}": SUM + f"\nexit({code})" for code in (2, 127, 137, 203, 255)},
        "SystemExit(text)": SUM + "\nraise SystemExit('x')",
        "exception": SUM + "\n1 / 0",
        "segfault": SUM.replace("a + b", "a + b, flush=True") + "\nimport ctypes\nctypes.string_at(0)",
        "kills itself": SUM.replace("a + b", "a + b, flush=True") + "\nimport os\nos.kill(os.getpid(), 9)",
        "abort": "import os\nprint(7, flush=True)\nos.abort()",
        "interrupts process 1": "import os, time\nprint(7, flush=True)\nos.kill(1, 2)\ntime.sleep(9)",
        "5000 threads": "import threading, time\nfor i in range(5000):\n"
        "    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "a fork bomb": "import os\nwhile True:\n    os.fork()",
        "fills /tmp": "f = open('/tmp/x', 'wb')\nwhile True:\n    f.write(bytes(2**20))",
        "fills /tmp with files": "for i in range(1000):\n    open(f'/tmp/{i}', 'wb').write(bytes(2**20))",
        "fills /dev/shm": "for i in range(1000):\n    open(f'/dev/shm/{i}', 'wb').write(bytes(2**20))",
        "a stdin of its own": "raise EOFError(open(0).read())",
    },
    "TLE": {
        "busy loop": "while True:\n    pass",
        "swallows everything": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "sleeps": "import time\nprint(7, flush=True)\ntime.sleep(1000)",
        "ignores all signals": "import signal\nfor s in set(signal.valid_signals()) - {9, 19}:\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass",
        "stops itself": "import os\nos.kill(os.getpid(), 19)\nprint(7)",
        "closes everything and sleeps": "import os, time\nos.write(1, b'7')\nos.closerange(0, 99)\ntime.sleep(1000)",
        "9**9**9": "print(9**9**9)",
        "prints a huge integer": "print(10**10_000_000)",
        "ReDoS": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "waits for a thread": "import threading\nprint(7)\nthreading.Event().wait()",
        "waits at exit": "import atexit, time\nprint(7)\natexit.register(time.sleep, 1000)",
        "a fork bomb that hides its errors": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "many busy children": "import os\nfor i in range(10):\n    if not os.fork(): break\nwhile True: pass",
    },
    "MLE": {
        "8 GB": "x = bytearray(8 << 30)",
        "slow creep": "x = []\nwhile True:\n    x.append(bytearray(b'1' * 2**20))",
        "children, each within its limit": "import os\nfor i in '123': os.fork()\n"
        "x = bytearray(b'1' * (100 << 20))\nwhile True: pass",
        "a list": "x = [0]\nwhile True:\n    x += x",
        "files without content": "import os\ni = 0\nwhile True:\n    os.mknod(f'/tmp/{i}')\n    i += 1",
    },
    "MLE/RE/TLE": {"endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    f()\nf()"},
    "OLE": {
        "stdout flood": "while True:\n    print('x' * 1000)",
        "stderr flood": "import sys\nwhile True:\n    print('x' * 1000, file=sys.stderr)",
        "a line of 2 MB": "print('7' * 2_000_000)",
        "flood from children": "import os\nos.fork()\nos.fork()\nwhile True:\n    os.write(1, b'7' * 65536)",
    },
}  # fmt: skip
PROGRAMS = {f"AC {name}": program for name, program in RIGHT.items()}
PROGRAMS |= {f"WA {name}": program for name, program in WRONG.items()}
PROGRAMS |= {f"{verdict} {name}": program for verdict, group in FAILING.items() for name, program in group.items()}
LIMIT = {"RE": 6.0, "TLE": 2.0, "MLE": 6.0, "OLE": 6.0, "CE": 6.0, "MLE/RE/TLE": 6.0, "AC": 20.0, "WA": 20.0}  # seconds


def belongings() -> tuple[int, int, int]:
    """What a leak would add to: this process's open files, its children (zombies too), and all boxes on the machine."""
    children = [
        child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return len(os.listdir("/proc/self/fd")), len(children), len(processes("bwrap"))


def processes(word: str) -> list[str]:
    """The ids of all processes of this machine with `word` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if word in (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.append(process.name)
        except OSError:
            pass
    return found


@pytest.fixture(scope="module")
def verdicts():
    """Right and hostile programs next to one another, four at a time, in a mixed order."""

    def one(name):
        start = time.monotonic()
        reference = {"inputs": ["3 4\n"], "outputs": ["7\n"], "time_limit": LIMIT[name.split()[0]]}
        return *grade_code(block(PROGRAMS[name]), reference), time.monotonic() - start

    names, before = list(PROGRAMS), belongings()
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(names, pool.map(one, names), strict=True))
    return found | {"before": before, "after": belongings()}


@boxed
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gets_its_verdict_whatever_runs_beside_it(name, verdicts):
    if name == "AC numpy" and not LEVEL.packages:
        pytest.skip("numpy cannot be shown to programs here")
    score, reason, seconds = verdicts[name]
    assert reason.split()[0] in name.split()[0].split("/"), reason
    assert score == (1.0 if name.startswith("AC") else 0.0)
    assert seconds < LIMIT[name.split()[0]] + 1


@boxed
def test_of_all_these_no_file_no_child_and_no_box_is_left(verdicts):
    assert verdicts["after"] == verdicts["before"]


@boxed
@pytest.mark.parametrize("size", [20, 100 if LONG else 0], ids=["short", "long"])
def test_bombs_hogs_and_floods_do_not_cost_their_neighbours_a_verdict(size):
    """As many right programs as hostile ones; afterwards memory and processes are back."""
    if not size:
        pytest.skip("set SANDBOX_LONG=1")
    kinds = [FAILING["TLE"]["a fork bomb that hides its errors"], FAILING["MLE"]["slow creep"]]
    kinds += [FAILING["MLE"]["children, each within its limit"], FAILING["OLE"]["flood from children"]]
    hostile = [(kinds[i % len(kinds)], 2.0, 0.0) for i in range(size)]
    jobs = hostile + [(SUM, 6.0, 1.0)] * size
    random.Random(0).shuffle(jobs)

    def score(job):
        return grade_code(block(job[0]), {"inputs": ["3 4"], "outputs": ["7"], "time_limit": job[1]})[0]

    before, memory = belongings(), available()
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        assert list(pool.map(score, jobs)) == [job[2] for job in jobs]
    assert belongings() == before
    wait_for(lambda: available() > memory - 2000)  # others use this machine too; a hundred hogs would take 50 GB


def available() -> int:
    """MiB of memory that this machine has to give."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) // 1024


@boxed
def test_a_program_that_never_reads_does_not_block_the_judge_and_one_that_does_gets_all():
    stdin = b"1234567\n" * (50 * 2**20 // 8)
    start = time.monotonic()
    assert run_program("while True: pass", stdin, Limits(seconds=2)).verdict == "TLE"
    assert run_program("print(7)", stdin, Limits(seconds=10)).stdout == b"7\n"
    assert time.monotonic() - start < 10
    length = run_program("import sys\nprint(len(sys.stdin.buffer.read()))", stdin, Limits(seconds=20)).stdout
    assert int(length) == len(stdin)


# --- escape and theft: what they are after is not to be had -------------------------------------------------------


@boxed
def test_no_file_can_be_read_but_programs_and_libraries():
    program = """
import os
for folder, folders, files in os.walk('/'):
    if folder in ('/proc', '/usr/bin', '/usr/lib', '/usr/lib64', '/python/lib', '/packages/numpy'):
        folders[:] = []
    for file in files if folder != '/proc' else ():
        try:
            os.read(os.open(os.path.join(folder, file), os.O_RDONLY | os.O_NONBLOCK), 1)
            print(os.path.join(folder, file))
        except OSError: pass
"""
    seen = prints(program, output=2**26, seconds=20).splitlines()
    allowed = ("/usr/bin/", "/usr/lib/", "/usr/lib64/", "/python/", "/packages/numpy", "/dev/", "/etc/ld.so.cache")
    assert len(seen) > 10 and not [file for file in seen if not file.startswith(allowed)]


@boxed
def test_neither_environment_nor_command_lines_nor_open_files_tell_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    program = """
import glob, os
print(dict(os.environ))
for path in glob.glob('/proc/[0-9]*/*') + glob.glob('/proc/[0-9]*/task/*/*'):
    try: print(path, open(path, 'rb').read(10**5))
    except OSError: pass
for fd in range(100):
    try: print('open', fd, os.readlink(f'/proc/self/fd/{fd}'))
    except OSError: pass
"""
    given = {"inputs": ["an input"], "outputs": ["EXPECTED"]}
    told = prints(program, given["inputs"][0], output=2**26, seconds=60)
    told += grade_code(block(program + "raise SystemExit(open('/proc/1/cmdline').read())"), given)[1]
    # The tables of mounts name what is shown: the folders of Python and its packages, which may lie in a venv in here.
    told = "\n".join(line for line in told.splitlines() if not re.match(r"/proc/\S+/mount\w* ", line))
    for secret in ("hf_secret", "HF_TOKEN", "EXPECTED", "an input", str(ROOT), sys.executable):
        assert secret not in told
    assert [line.split()[1] for line in told.splitlines() if line.startswith("open ")] == ["0", "1", "2"]


@boxed
def test_a_box_has_no_privileges_and_the_filter_is_on():
    status = dict(line.split(":\t", 1) for line in prints("print(open('/proc/1/status').read())").splitlines() if line)
    assert {status[key].strip() for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert "0" not in status["Uid"].split() + status["Gid"].split() and status["Groups"].strip() in ("", "65534")


@boxed
def test_the_network_does_not_exist():
    program = """
import socket, asyncio
for family in range(50):
    for kind in (1, 2, 3):
        try: print(family, socket.socket(family, kind))
        except OSError as error: assert error.errno == 1, error
print(open('/proc/net/dev').read().count(':'), [type(s).__name__ for s in socket.socketpair()])
"""
    assert prints(program) == "1 ['socket', 'socket']\n"  # the loopback device; pairs are within the program


PRIVILEGED = [
    *("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.chroot('/tmp')", "os.mknod('/tmp/x', 0o60600, 2049)"),
    *("call('clone', 0x10000011, 0, 0, 0, 0)", "call('clone', 0x40000011, 0, 0, 0, 0)", "call('clone3', 0, 0)"),
    *("call('ptrace', 16, os.getppid(), 0, 0)", "call('memfd_create', b'x', 0)", "call('shmget', 0, 4096, 0o1600)"),
    *("call('keyctl', 0, -3, 0)", "call('io_uring_setup', 4, bytes(200))", "call('bpf', 0, bytes(99), 99)"),
    *("call('setns', 0, 0)", "call('userfaultfd', 0)", "call('perf_event_open', bytes(200), 0, -1, -1, 0)"),
    *("call('unshare', 0x10000000)", "libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) and fail()"),
    *("libc.umount2(b'/tmp', 2) and fail()", "os.open('/dev/tty', os.O_RDWR)", "os.mkdir('/x')"),
    *("open('/proc/sys/kernel/hostname', 'w')", "open('/proc/sysrq-trigger', 'w')", "os.symlink('/x', '/lib/x')"),
    *("os.write(os.open('/proc/1/oom_score_adj', 1), b'-1000')", "os.rename('/usr/bin/env', '/usr/bin/x')"),
    *(f"open('{folder}/x', 'w')" for folder in ("", "/etc", "/usr/bin", "/python/lib", "/dev", "/packages", "/proc")),
]


@boxed
@pytest.mark.parametrize("attempt", PRIVILEGED)
def test_what_needs_a_privilege_fails(attempt):
    program = f"""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {sandbox.SYSCALLS[os.uname().machine][1]}
def fail(): raise OSError(ctypes.get_errno(), 'refused')
def call(name, *arguments):
    if libc.syscall(numbers[name], *arguments) == -1: fail()
try: {attempt}
except OSError: print('refused')
else: print('done')
"""
    assert prints(program) == "refused\n"


@boxed
def test_killing_everything_in_sight_kills_nobody_outside():
    with ThreadPoolExecutor(2) as pool:
        bystander = pool.submit(in_a_box, "import time\ntime.sleep(2)\nprint('alive')")
        time.sleep(0.5)
        program = "import os\nfor pid in (-1, 0, 1, 2, 3, os.getppid(), *range(2, 40000)):\n    try: os.kill(pid, 9)\n"
        pool.submit(in_a_box, program + "    except OSError: pass").result()
        assert bystander.result().stdout == b"alive\n"


@boxed
def test_a_box_leaves_nothing_to_the_next_one():
    leave = "import os\nfor d in '/tmp', '/dev/shm':\n    open(d + '/sitecustomize.py', 'w').write('print(1)')\n"
    leave += (
        "os.makedirs('/tmp/__pycache__')\nos.symlink('/etc/hostname', '/tmp/link')\nprint(os.path.exists('/tmp/link'))"
    )
    assert prints(leave) == "False\n"  # the link leads nowhere: it is followed inside
    assert prints("import os\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'))") == "[] []\n"


@boxed
def test_daemons_die_with_their_box():
    daemon = "import os\nif not os.fork():\n    os.setsid()\n"
    daemon += "    if not os.fork():\n        os.execv('/usr/bin/sleep', ['sleep', '86413'])\n"
    for rest in ("import time\ntime.sleep(0.5)", "import time\ntime.sleep(100)"):
        in_a_box(daemon + rest, seconds=2)
        assert not processes("86413")


@boxed
def test_boxes_die_with_a_trainer_that_is_killed():
    code = "from rewards.sandbox import Limits, run_program\n"
    code += "run_program('import time; time.sleep(999) # 86414', b'', Limits(seconds=999))"
    before = len(processes("bwrap"))
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(lambda: len(processes("_inside")) > 1)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_for(lambda: len(processes("bwrap")) <= before)


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# --- functions: the value is judged, outside, as plain data -------------------------------------------------------

ADD = {"inputs": ["1\n2", "3\n4", "5\n5"], "outputs": ["3", "7", "10"], "fn_name": "add", "time_limit": 4}
CHEATS = {
    "an object equal to all": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b): return Any()",
    "an int equal to all": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b): return Any(0)",
    "a str equal to all": "class Any(str):\n    def __eq__(self, other): return True\ndef add(a, b): return Any('3')",
    "an int that shows itself": "class Any(int):\n    def __repr__(self): return '3'\ndef add(a, b): return Any(0)",
    "__eq__ that raises": "class No:\n    def __eq__(self, other): raise SystemExit(0)\ndef add(a, b): return No()",
    "NaN": "def add(a, b): return float('nan')",
    "infinity": "def add(a, b): return float('inf')",
    "a million levels": "def add(a, b):\n    x = []\n    for i in range(10**6): x = [x]\n    return x",
    "900 levels": "def add(a, b):\n    x = 3\n    for i in range(900): x = [x]\n    return x",
    "a hundred million elements": "def add(a, b): return [0] * 10**8",
    "a cycle": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "its own json": "import json\njson.dumps = lambda *a, **k: '3'\ndef add(a, b): return 0",
    "its own builtins": "import builtins\nbuiltins.all = lambda *a: True\ndef add(a, b): return 0",
    "prints it": "def add(a, b):\n    print(a + b)\n    return 0",
    "a text": "def add(a, b): return str(a + b)",
    "a list of it": "def add(a, b): return [a + b]",
    "the reference's name": "def add(a, b): return 'add'",
    "None": "def add(a, b): pass",
    "exits at import": "import sys\nsys.exit(0)",
    "_exits at import": "import os\nos._exit(0)",
    "exits": "import sys\ndef add(a, b): sys.exit(0)",
    "_exits": "import os\ndef add(a, b): os._exit(0)",
    "leaves at exit": "import atexit, os\natexit.register(os._exit, 3)\ndef add(a, b): return a + b",
    "frames and garbage": (
        "import gc, sys\ndef add(a, b):\n    frame, seen = sys._getframe(), []\n"
        "    while frame:\n        seen += [*frame.f_locals.values(), *frame.f_globals.values()]\n"
        "        frame = frame.f_back\n"
        "    for x in seen + gc.get_objects():\n"
        "        if isinstance(x, dict) and ('outputs' in x or 'expected' in x): return a + b\n"
        "        if isinstance(x, (list, tuple)) and len(x) == 3 and all(type(y) in (int, str) for y in x)"
        " and [*map(str, x)] == '3 7 10'.split(): return a + b"
    ),
    "writes its result early, everywhere": (
        "import os\nfor fd in range(3, 100):\n    try: os.write(fd, b'3\\n')\n    except OSError: pass\n"
        "def add(a, b): return 3"
    ),
    "writes its result and leaves": (
        "import os\nfor fd in range(3, 100):\n    try: os.write(fd, b'3\\n')\n    except OSError: pass\nos._exit(0)"
    ),
    "writes a reward": "def add(a, b):\n    for f in 'reward', 'conftest.py': open(f, 'w').write('1')\n    return 0",
    "defines the check": "__name__ = 'check'\ndef check(*a): return True\nsame_value = grade_code = check\nadd = check",
    "no function": "x = 3",
    "a number": "add = 3",
    "syntax": "def add(a, b)",
    "right twice, then wrong": "def add(a, b): return 7 if a == 3 else 3",
}
HONEST = {
    "a function": "def add(a, b): return a + b",
    "a method": "class Solution:\n    def add(self, a, b): return a + b",
    "a lambda": "add = lambda a, b: a + b",
    "prints too": "def add(a, b):\n    print('adding', a, b)\n    return a + b",
    "a float": "def add(a, b): return (a + b) / 1",
    "has a main part": "def add(a, b): return a + b\nif __name__ == '__main__':\n    print(add(int(input()), 1))",
    "recursive": "def add(a, b): return a if b == 0 else add(a + 1, b - 1)",
    "an int of its own": "class N(int): pass\ndef add(a, b): return N(a + b)",
}


@boxed
@pytest.mark.parametrize("name", [*CHEATS, *HONEST])
def test_a_function_is_worth_what_it_returns(name):
    score, reason = grade_code(block({**CHEATS, **HONEST}[name]), ADD)
    assert score == (name in HONEST), reason
    assert reason.split()[0] in (("AC",) if name in HONEST else ("WA", "RE", "CE", "MLE", "OLE")), reason


@boxed
def test_arguments_and_values_keep_their_json_types():
    values = [1, -2.5, True, None, "a\nb \u2028 é", [], {}, [[1, "x"], {"k": [None]}], 10**30]
    for inputs in ([json.dumps(value) for value in values], [[value] for value in values]):
        reference = {"inputs": inputs, "outputs": [json.dumps(value) for value in values], "fn_name": "same"}
        assert grade_code(block("def same(x): return x"), reference) == (1.0, f"AC on {len(values)} tests")
    pair = {"inputs": ["[1, 2]\n3"], "outputs": ["[[1, 2], 3]"], "fn_name": "pair"}
    assert grade_code(block("def pair(a, b): return (tuple(a), b)"), pair)[0] == 1.0  # JSON knows no tuple
    keys = {"inputs": ["1"], "outputs": ['{"1": 2}'], "fn_name": "f"}
    assert grade_code(block("def f(x): return {1: 2}"), keys)[0] == 1.0  # nor keys that are numbers
    sets = {"inputs": ["1"], "outputs": ["[1]"], "fn_name": "f"}
    assert grade_code(block("def f(x): return {1}"), sets)[0] == 0.0


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (1, 1, True), (1, 2, False), (1, 1.0, True), (1.0, 1, True), (1.0000001, 1, False), (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False), (1e9 + 1, 1e9, True), (1e9 + 1e4, 1e9, False), (1e-7, 0.0, True), (True, 1, True),
        (0, False, True), ("1", 1, False), (1, "1", False), (None, False, False), (None, 0, False), ([], None, False),
        (float("nan"), float("nan"), False), (float("nan"), 0.0, False), (float("inf"), float("inf"), True),
        (1e308, float("inf"), False), (float("inf"), 1e308, False), (10**400, 1.5, False), ([1, 2], [1, 2], True),
        ([1, 2], [2, 1], False), ([1], [1, 2], False), ([[0.1 + 0.2]], [[0.3]], True), ({"a": 1}, {"a": 1.0}, True),
        ({"a": 1}, {"b": 1}, False), ({"a": 1}, {"a": 1, "b": 2}, False), ("a", "a ", False), ("A", "a", False),
    ],
)  # fmt: skip
def test_values_are_the_same_as_documented(got, expected, same):
    assert same_value(got, expected) is same


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        ("7", "7\n", True), ("7 \t\r\n\n \n", "7", True), ("\n7", "7", False), (" 7", "7", False), ("7\n8", "7", False),
        ("7", "7\n8", False), ("1 2", "1  2", False), ("1 2", "12", False), ("1\n\n2", "1\n2", False), ("", "", True),
        ("", "7", False), ("7.0", "7", False), ("7", "7.0", True), ("0.33333333", "0.3333333", True),
        ("0.3334", "0.3333", False), ("1e3", "1000.0", True), ("1000000.5", "1000000.4", True), ("nan", "nan", True),
        ("nan", "0.5", False), ("inf", "0.5", False), ("1e999", "2e999", True), ("YES", "Yes", False),
        ("+7", "7", False), ("\n", "", True), ("007", "7", False),
        ("x=0.50", "x=0.5", False), ("a 0.50 b", "a 0.5 b", True), ("\uff17", "7", False),
        ("\uff17.0", "7.0", False), ("7\u00a0", "7", False), ("7\x00", "7", False), ("7\x0b", "7", False),
        ("1_0.0", "10.0", False),
    ],
)  # fmt: skip
def test_texts_are_the_same_as_documented(got, expected, same):
    assert same_text(got, expected) is same


# --- scripts of assertions: the test in one box, the program in another -------------------------------------------

SCRIPT = {"script": "assert f(2) == 4\nassert f(3) == 9\n", "entry_point": "f", "time_limit": 4}
NODE = "class Node:\n    def __init__(self, value=0, next=None):\n        self.value, self.next = value, next\n"


@boxed
@pytest.mark.parametrize(
    ("program", "score", "reason"),
    [
        ("def f(x): return x * x", 1.0, "AC"),
        ("def f(x): return 4", 0.0, "WA"),
        ("def f(x): return 1 / 0", 0.0, "RE: ZeroDivisionError"),
        ("def f(x):", 0.0, "RE: IndentationError"),
        ("g = 1", 0.0, "RE: KeyError"),
        ("raise SystemExit(0)", 0.0, "RE: SystemExit"),
        ("import os\nos._exit(0)", 0.0, "RE"),
        ("import os\ndef f(x): os._exit(0)", 0.0, "RE"),
        ("def f(x): raise AssertionError", 0.0, "RE: AssertionError"),
        ("def f(x): raise KeyboardInterrupt", 0.0, "RE: KeyboardInterrupt"),
        ("def f(x):\n    while True: pass", 0.0, "TLE"),
        ("def f(x): return bytearray(8 << 30)", 0.0, "RE: MemoryError"),
        ("def f(x):\n    x = []\n    while True: x.append(bytearray(b'1' * 2**20))", 0.0, "MLE"),
        ("def f(x): print('x' * 10**7)", 0.0, "OLE"),
        ("class Any:\n    def __eq__(self, o): return True\ndef f(x): return Any()", 0.0, "WA"),
        ("class Any(int):\n    def __eq__(self, o): return True\ndef f(x): return Any(0)", 0.0, "WA"),
        ("class f:\n    def __init__(self, x): pass\n    def __eq__(self, o): return True", 0.0, "WA"),
        ("import builtins\nbuiltins.AssertionError = SystemExit\ndef f(x): return 0", 0.0, "WA"),
        ("import sys\nsys.modules['__main__'].f = lambda x: x * x\ndef f(x): return 0", 0.0, "WA"),
    ],
)
def test_a_test_script_sees_plain_data_and_the_program_sees_no_test(program, score, reason):
    got = grade_code(block(program), SCRIPT)
    assert got[0] == score and got[1].startswith(reason), got


FORGED = [
    *(b"", b"\n", b"5\n", b"[]\n", b'["value", ["nothing", []], ""]\n', b"[" * 10**6 + b"\n", b"\xff\n"),
    *(b'["value", ["Node", [["__class__", 1]]], ""]\n', b'["value", [[], 1], ""]\n', b'["raised", "SystemExit", ""]\n'),
    b'["raised", "exec", "import os\\nfor f in range(3, 64):\\n'  # what an exception's name and text must not become
    b' try: os.write(f, b\'[\\"OK\\", 1]\')\\n except OSError: 0"]\n',
    *(b'["raised", "exit", "0"]\n', b'["instance", 0, ""]\n', b'["value", 4, ""]\n'),  # the last right, once
]


@boxed
@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_a_program_that_answers_its_test_by_hand_gains_nothing(forged):
    program = "import os\nfor fd in range(3, 64):\n    try: os.write(fd, %r * 9)\n    except OSError: pass\nos._exit(0)"
    assert grade_code(block(program % forged), SCRIPT | {"prelude": NODE})[0] == 0.0


@boxed
def test_what_crosses_between_program_and_test_keeps_its_type():
    values = (
        "[None, True, 1, -2.5, 'a\\n\u2028', (1,), [(2, [3])], {1: {2}, (1, 2): frozenset([3])}, {}, 1e999, 10**40]"
    )
    script = f"for v in {values}:\n    w = f(v, key=v)\n    assert type(w) is type(v) and w == v, (v, w)\n"
    script += "x = f(float('nan'), 1)\nassert x != x"
    reference = {"script": script, "entry_point": "f"}
    assert grade_code(block("def f(x, key): return x"), reference) == (1.0, "AC")
    loose = {"script": "assert f() == [1, 2.5, [3], {'a': 1}]", "entry_point": "f"}
    program = "import collections\nclass L(list): pass\nclass N(int): pass\n"
    program += "def f(): return L([N(1), 2.5, L([3]), collections.Counter('a')])"
    assert grade_code(block(program), loose) == (1.0, "AC")
    if LEVEL.packages:
        numbers = "[numpy.int64(1), numpy.float32(2.5), numpy.array([3]), {'a': numpy.int8(1)}]"
        assert grade_code(block(f"import numpy\ndef f(): return {numbers}"), loose) == (1.0, "AC")


@boxed
def test_linked_nodes_objects_with_state_and_exceptions_cross_too():
    chain = "x = f(Node(1, Node(2)))\nassert type(x) is Node and (x.value, x.next.value) == (0, 1)\n"
    chain += "assert x.next.next.value == 2 and x.next.next.next is None"
    reference = {"script": chain, "entry_point": "f", "prelude": NODE}
    assert grade_code(block("def f(node): return Node(0, node)"), reference) == (1.0, "AC")
    assert grade_code(block(NODE + "def f(node): return Node(0, node)"), reference) == (1.0, "AC")
    counter = "class Counter:\n    def __init__(self, n): self.n = n\n"
    counter += "    def up(self, by=1):\n        self.n += by\n        return self.n"
    script = "a, b = Counter(5), Counter(n=0)\nassert a.up() == 6 and a.up(by=2) == 8 and b.up() == 1"
    assert grade_code(block(counter), {"script": script, "entry_point": "Counter"}) == (1.0, "AC")
    script = (
        "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert 'below' in str(e)\nassert f(1) == 1"
    )
    program = "def f(x):\n    if x < 0: raise ValueError('below 0')\n    return x"
    assert grade_code(block(program), {"script": script, "entry_point": "f"}) == (1.0, "AC")
    assert grade_code(block("def f(x): return x"), {"script": script, "entry_point": "f"})[0] == 0.0


@boxed
def test_a_stub_in_the_prelude_is_no_solution():
    reference = {"script": "assert f(1) is None\nassert helper(2) == 4", "entry_point": "f"}
    reference["prelude"] = "def helper(x): return 2 * x\ndef f(x):\n    pass\n"
    assert grade_code(block("def f(x): return helper and None"), reference) == (1.0, "AC")
    assert grade_code(block("x = 1"), reference)[0] == 0.0


def human_eval():
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def as_reference(row, **more) -> dict:
    script = f"{row['test']}\ncheck({row['entry_point']})\n"
    return {"script": script, "entry_point": row["entry_point"], "prelude": row["prompt"], **more}


def side_by_side(function, items) -> list:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, items))


@boxed
def test_human_evals_own_solutions_pass():
    rows = human_eval()[:: 1 if LONG else 8]
    solutions = [block(row["prompt"] + row["canonical_solution"]) for row in rows]
    found = side_by_side(lambda pair: grade_code(pair[0], as_reference(pair[1])), zip(solutions, rows, strict=True))
    assert {row["task_id"]: verdict for row, verdict in zip(rows, found, strict=True) if verdict[0] != 1.0} == {}


class Mutation(ast.NodeTransformer):
    """Changes the n-th operator or constant that it meets."""

    OTHER = {  # noqa: RUF012
        **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Mult, ast.FloorDiv: ast.Mult},
        **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
        **{ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Div: ast.Mult},
    }

    def __init__(self, place: int):
        self.left = place

    def visit(self, node):
        node = self.generic_visit(node)
        constant = isinstance(node, ast.Constant) and type(node.value) in (int, bool, str)
        if type(node) not in self.OTHER and not constant:
            return node
        self.left -= 1
        if self.left != -1:
            return node
        if not constant:
            return self.OTHER[type(node)]()
        value = node.value
        return ast.Constant(not value if isinstance(value, bool) else value + ("x" if isinstance(value, str) else 1))


def fails_without_a_sandbox(source: str, row) -> bool:
    """What the published harness does: program, test and call in one namespace."""
    code = f"{source}\n{row['test']}\ncheck({row['entry_point']})\n"
    try:
        command = [sys.executable, "-"]
        return subprocess.run(command, input=code.encode(), capture_output=True, timeout=6).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def mutant(row) -> str | None:
    """A solution with one thing changed, seeded, that the test as published rejects; those it accepts are redrawn."""
    draw, source = random.Random(row["task_id"]), row["prompt"] + row["canonical_solution"]
    for place in draw.sample(range(40), 40):
        tree = ast.parse(source)
        changed = ast.unparse(Mutation(place).visit(tree))
        if changed != ast.unparse(ast.parse(source)) and fails_without_a_sandbox(changed, row):
            return changed
    return None


@boxed
def test_human_evals_solutions_with_one_operator_or_constant_changed_fail():
    rows = human_eval()[:: 1 if LONG else 16]
    pairs = [(row, changed) for row, changed in zip(rows, side_by_side(mutant, rows), strict=True) if changed]
    scores = side_by_side(lambda pair: grade_code(block(pair[1]), as_reference(pair[0], time_limit=4))[0], pairs)
    print(f"{len(pairs)} of {len(rows)} problems have such a mutant; {scores.count(0.0)} of them score 0")
    assert set(scores) == {0.0} and len(pairs) > 0.9 * len(rows)


LEETCODE = {  # a right body of the method, and a wrong one
    "minimum-number-of-pushes-to-type-word-i": (
        "return sum(i // 8 + 1 for i in range(len(word)))",
        "return len(word)",
    ),
    "double-a-number-represented-as-a-linked-list": (
        "digits, node = '', head\nwhile node:\n    digits, node = digits + str(node.val), node.next\nhead = None\n"
        "for d in reversed(str(2 * int(digits))):\n    head = ListNode(int(d), head)\nreturn head",
        "return head",
    ),
    "insert-greatest-common-divisors-in-linked-list": (
        "node = head\nwhile node.next:\n    node.next = ListNode(math.gcd(node.val, node.next.val), node.next)\n"
        "    node = node.next.next\nreturn head",
        "node = head\nwhile node.next:\n    node.next = ListNode(1, node.next)\n    node = node.next.next\nreturn head",
    ),
    "find-longest-special-substring-that-occurs-thrice-i": (
        "c = Counter(s[i:j] for i in range(len(s)) for j in range(i + 1, len(s) + 1) if len(set(s[i:j])) == 1)\n"
        "return max((len(k) for k, v in c.items() if v > 2), default=-1)",
        "return 1",
    ),
    "count-the-number-of-houses-at-a-certain-distance-i": (
        "r = [0] * n\nfor i in range(1, n + 1):\n    for j in set(range(1, n + 1)) - {i}:\n"
        "        r[min(abs(i - j), abs(i - x) + 1 + abs(j - y), abs(i - y) + 1 + abs(j - x)) - 1] += 1\nreturn r",
        "return [0] * n",
    ),
}


@boxed
@pytest.mark.parametrize("title", LEETCODE)
def test_leetcode_solutions_get_what_they_deserve(title):
    path = DATA / "leetcode" / "leetcode-test.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    row = next(row for row in map(json.loads, path.open()) if row["title"] == title)
    helpers, signature = row["prompt"].split('"""')[-1].split("class Solution:")
    prelude = "from typing import *\nfrom collections import *\nimport math\n" + helpers
    reference = {"script": row["test"], "entry_point": "Solution", "prelude": prelude}
    for body, score in zip(LEETCODE[title], (1.0, 0.0), strict=True):
        lines = "".join(f"        {line}\n" for line in body.split("\n"))
        got = grade_code(block(f"class Solution:{signature.rstrip()}\n{lines}"), reference)
        assert got[0] == score, (got, body)


# --- the text of a response, and the shapes of a reference --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```", "a"),
        ("```py\na\n```", "a"),
        ("```python3\na\n```", "a"),
        ("```Python\na\n```", "a"),
        ("```\na\n```", "a"),
        ("``` python \na\n``` ", "a"),
        ("```python title=x\na\n```", "a"),
        ("````python\n```\na\n````", "```\na"),
        ("a\n```python\nb\nc\n```\nd", "b\nc"),
        ("```python\n```", ""),
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```\nout:\n```text\nb\n```", "a"),
        ("```cpp\na\n```", None),
        ("```python\na\n```\n```python\nb", "a"),
        ("```python\na", None),
        ("a", None),
        ("", None),
        ("```", None),
        ("`a`", None),
        ("```a```", None),
        ("~~~python\na\n~~~", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b"),
        ("<think>\n```python\na\n```\n</think> done", "a"),
        ("<think>\n```python\na\n</think>\n```python\nb\n```", "b"),
        ('```python\ns = """\n```\nx\n```\n"""\n```', 's = """\n```\nx\n```\n"""'),
        ('```python\ns = """\n```python\n"""\n```', 's = """\n```python\n"""'),
        ("```python\ns = '''\n```\n'''\n```", "s = '''\n```\n'''"),
        ("```python\ns = '```'\nt = 1\n```", "s = '```'\nt = 1"),
        ('```python\n# an odd """ here\n```', '# an odd """ here'),
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb"),
        ("\ufeff```python\na\n```", "a"),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b"),
        ("```python\n\ta\n\x00\n```", "\ta\n\x00"),
        ("```python a```\nb\n```", None),
    ],
)
def test_the_program_is_the_last_closed_python_block(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\n```\nprints\n```\n3\n```", "a"),
        ("```py\na\n```\nIt is in\n```\nO(n log n)\n```", "a"),
        ("```python3\na\n```\nRun it:\n```\npython main.py\n```\nand\n```bash\nls\n```", "a"),
        ("```\nb\n```\n```python\na\n```\n```\n3\n```", "a"),
        ("```python\na\n```\n```Python\nb\n```\n```\n3\n```", "b"),
        ("```\na\n```\n```\nb\n```", "b"),  # no block is marked
        ("```cpp\na\n```\n```\nb\n```", "b"),
        ("```\na\n```\n```python\nb", "a"),  # the marked one was never closed
    ],
)
def test_kind_16_marked_blocks_count_before_unmarked_ones(text, program):
    assert extract_program(text) == program


LONE = {
    "in a string": 's = \'"""\'',
    "in the other string": "s = \"'''\"",
    "behind an escaped quote": "s = 'it\\'s \"\"\"'",
    "in a comment": '# an odd """ here, and it\'s open',
    "in a raw string": 's = re.split(r\'"""\', t)',
    "in the other triple quotes": "s = '''a\n\"\"\"\n'''",
    "escaped in triple quotes": 's = """a \\""" b"""',
    "never closed": 's = """a',
}


@pytest.mark.parametrize("first", LONE)
@pytest.mark.parametrize("last", [name for name in LONE if name != "never closed"])
def test_kind_17_of_two_programs_with_lone_triple_quotes_the_last_counts(first, last):
    text = f"A draft:\n```python\n{LONE[first]}\n```\nBetter:\n```python\n{LONE[last]}\nprint(1)\n```\nDone."
    assert extract_program(text) == f"{LONE[last]}\nprint(1)"


@pytest.mark.parametrize("line", [line for name, line in LONE.items() if name != "never closed"])
def test_kind_17_a_lone_triple_quote_does_not_end_a_docstring_that_shows_a_block(line):
    program = f'{line}\ndef f():\n    """Use:\n\n    ```\n    f()\n    ```\n    """\n    return 1'
    assert extract_program(f"So:\n```python\n{program}\n```\nDone.") == program


def test_kind_17_a_fence_inside_a_string_of_a_program_is_still_none():
    for program in ('s = """\n```\nx\n```\n"""', "a = 'x'; s = '''it's\n```python\n'''", 'f("""\n```\n""", """b""")'):
        assert extract_program(f"```python\n# it's one\n{program}\n```\n") == f"# it's one\n{program}"
    assert extract_program('```text\nan odd """\n```\n```python\na\n```') == "a"  # no program has it


def test_extraction_is_quick_whatever_the_text():
    start = time.monotonic()
    for line in ('"\\' * 10**6, "'\"" * 10**6, "\"\"\"'''" * 10**5, "\\" * 10**6 + "'", '"""' + '\\"' * 10**6):
        extract_program(f"```python\n{line}\n```")
    extract_program("`" * 10**6)
    extract_program("```\n" * 10**5 + '"' * 10**6)
    extract_program("```python\n" + "'''\n" * 10**5)
    extract_program(" " * 10**6 + "```" + " " * 10**6 + "x`")
    extract_program("```python " * 10**5)
    assert time.monotonic() - start < 20


@boxed
def test_without_a_program_the_score_is_0_and_the_reason_says_so():
    for text in ("", "The answer is 7.", f"```python\n{SUM}\n", f"```cpp\n{SUM}\n```"):
        score, reason = grade_code(text, {"inputs": ["3 4"], "outputs": ["7"]})
        assert score == 0.0 and "no closed code block" in reason


@boxed
def test_every_published_shape_of_a_reference_is_understood():
    add, plain = block("def add(a, b): return a + b"), block(SUM)
    cases = [{"input": "3 4", "output": "7", "testtype": "stdin"}]
    calls = [{"input": "3\n4", "output": "7", "testtype": "functional"}]
    wrapped = {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [[7], [2]]}  # APPS
    stdin = [
        {"inputs": ["3 4\n"], "outputs": ["7\n"]},
        {"inputs": [["3 4"]], "outputs": [["7"]]},
        {"tests": cases},
        cases,
    ]
    for text, references in ((plain, stdin), (add, [ADD, wrapped, {"tests": calls, "fn_name": "add"}])):
        for reference in references:
            assert grade_code(text, reference)[0] == grade_code(text, json.dumps(reference))[0] == 1.0
    assert grade_code(block("def add(a, b): return [a + b]"), wrapped)[0] == 1.0
    assert grade_code(add, {"fn_name": "add", "inputs": [[3, 4], [1, 1]], "outputs": [[7], [2, 2]]})[0] == 0.0


def fraction_of(text, reference) -> float:
    return grade_code(text, reference, fraction=True)[0]


@boxed
def test_all_or_nothing_stops_at_the_first_failure_and_the_fraction_counts():
    reference = {"inputs": ["1 1", "2 2", "3 4", "5 5"], "outputs": ["2", "4", "7", "10"], "time_limit": 2}
    wrong = block("a, b = map(int, input().split())\nprint(a + b if a != 2 else 0)")
    assert grade_one("code", wrong, reference).score == 0.0
    assert fraction_of(wrong, reference) == 0.75
    assert "test 2 of 4" in grade_code(wrong, reference)[1]
    slow = block("a, b = map(int, input().split())\nwhile a == 2: pass\nprint(a + b)")
    assert fraction_of(slow, reference) == 0.25
    assert fraction_of(block(SUM), reference) == 1.0


MALFORMED = [
    *("", "no JSON", "[]", "{}", "null", "7", {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}),
    *({"inputs": ["1"]}, {"inputs": [1], "outputs": [2]}, {"inputs": ["1"], "outputs": ["1"], "time_limit": "long"}),
    {"inputs": ["1"], "outputs": ["1"], "memory_limit": 0},
    {"inputs": ["1"], "outputs": ["no JSON"], "fn_name": "f"},
    {"inputs": ["no JSON"], "outputs": ["1"], "fn_name": "f"},
    {"tests": [{"input": "1", "output": "1", "testtype": "functional"}]},
    {"tests": [{"input": "1"}]},
    {"script": "assert f() =", "entry_point": "f"},
    {"script": "assert f()", "entry_point": "f", "prelude": "1 / 0"},
    {"script": "assert f()"},
    {"script": None, "entry_point": "f"},
    {"script": "raise SystemExit(0)", "entry_point": "f"},
]


@boxed
@pytest.mark.parametrize("reference", MALFORMED, ids=str)
def test_a_reference_that_cannot_be_run_is_a_fault_and_no_score(reference):
    verdict = grade_one("code", block("def f(): return 1"), reference)
    assert verdict.score is None and verdict.reason.startswith("fault"), verdict


# --- where there is no sandbox, and other users -------------------------------------------------------------------


@pytest.fixture
def no_bubblewrap(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox.isolation.cache_clear()
    yield
    sandbox.isolation.cache_clear()


def test_without_bubblewrap_nothing_runs_and_the_error_says_what_to_install(no_bubblewrap):
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        grade_code(block("print(7)"), {"inputs": [""], "outputs": ["7"]})
    verdict = grade_one("code", block("print(7)"), {"inputs": [""], "outputs": ["7"]})
    assert verdict.score is None and "bubblewrap" in verdict.reason


def test_unsafe_execution_must_be_asked_for_and_still_bounds_time_memory_and_output(no_bubblewrap, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    reference = {"inputs": ["3 4"], "outputs": ["7"], "time_limit": 2}
    programs = {"AC": SUM, "WA": "import os\nprint(*os.environ.values())", "CE": "print(", "RE": "1 / 0"}
    programs |= {"TLE": "while True: pass", "MLE": "x = bytearray(8 << 30)", "OLE": "while True: print('x' * 1000)"}
    for verdict, program in programs.items():
        score, reason = grade_code(block(program), reference, unsafe=True)
        assert reason.split()[0] == verdict and score == (verdict == "AC"), (program, reason)
    daemon = "import os, time\nprint(7, flush=True)\nos.fork() or time.sleep(86415)"
    assert grade_code(block(daemon), reference, unsafe=True)[0] == 1.0
    assert grade_code(block("def f(x): return x * x"), SCRIPT, unsafe=True) == (1.0, "AC")
    assert b"hf_secret" not in run_program(programs["WA"], b"", Limits(), unsafe=True).stdout


@boxed
@pytest.mark.skipif(
    os.getuid() != 0, reason="only root can become another user, and where another runs this it is shown"
)
def test_it_works_for_a_user_who_is_not_root():
    other = [str(shutil.which("setpriv")), "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-B"]
    if subprocess.run([*other, "-c", "import rewards.sandbox"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("there is no /usr/bin/python3, or this folder is closed to others")
    done = subprocess.run([*other, "-m", "rewards.sandbox"], cwd=ROOT, capture_output=True, text=True)
    if "does not work here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0 and "FAILED" not in done.stdout and "100 of 100" in done.stdout, done


def test_the_script_grades_references_that_are_objects():
    row = {"text": block(SUM), "reference": {"inputs": ["3 4"], "outputs": ["7"]}}
    lines = json.dumps(row) + "\n" + json.dumps(row | {"text": ""}) + "\n"
    command = [sys.executable, "-m", "rewards", "code"]
    done = subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["score"] for line in done.stdout.splitlines()] == ([1.0, 0.0] if LEVEL else [None, None])
