"""Run programs that a model wrote, where they can neither do harm nor see what they are judged by.

    python -m rewards.sandbox

says which isolation works on this machine and tries to break it. This file needs the standard library alone and
imports nothing of ours, so that it can be audited alone; SECURITY.md says what it promises and what it does not.

Every run is one fresh box: a bubblewrap container without network, without the caller's environment and files, as an
unprivileged user without capabilities, behind a filter of system calls, and under resource limits that are set inside,
so that boxes do not eat each other's share. Its process 1 is `_inside`, which forks the program and waits for it: once
it ends, or is killed from outside, the kernel kills everything in the box. Nothing in a box is believed but the data it
sends out, and what that is worth is decided outside. Expected answers never enter the program's box: a test that is a
script runs in a box of its own and reaches the program in another through a pipe.
"""

import functools
import importlib.util
import inspect
import json
import marshal
import math
import os
import platform
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

POLL = 0.05  # seconds between two looks at the memory of a running box
PROCESSES = 16  # processes and threads in a box
DISK = 32 * 2**20  # bytes in each of /tmp and /dev/shm, which live in memory
FILES = 5000  # files in each of them
HEADROOM = 256  # MiB of address space of a process above the memory limit: stacks, mappings that are never touched
PACKAGES = ("numpy",)  # what programs may import besides the standard library, where it is installed here
ENVIRONMENT = {  # all of it: nothing is inherited. Fixed hash seed: a program's verdict should repeat
    **{"PATH": "/usr/bin:/bin", "HOME": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LD_LIBRARY_PATH": "/python/lib"},
}
# What LiveCodeBench's own harness imports in front of a program (each module, and all of what is in it), and the depth
# of calls that it allows.
MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "typing"),
)
RECURSION = 50_000
COMPILE_ERROR, OUT_OF_MEMORY, NOT_STARTED = 201, 202, 203  # exit codes of a box
INSTALL = "`apt-get install bubblewrap` (0.8 or newer; containers and Ubuntu: SECURITY.md), or allow unsafe execution"


class SandboxError(Exception):
    """The sandbox or the test failed, not the program, of which nothing is known now."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 6.0  # wall clock, from before the box is built
    memory: int = 512  # MiB resident, of all processes in the box together; a page that two share counts twice
    output: int = 2**20  # bytes, each of stdout, stderr and the returned value

    def __post_init__(self):
        if not (self.seconds > 0 and self.memory > 0):
            raise ValueError(f"a time limit of {self.seconds} s and {self.memory} MiB of memory must both be above 0")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: OK (by itself, exit code 0), CE, RE, TLE, MLE, OLE; for a script, WA too."""

    verdict: str
    detail: str = ""  # one line
    stdout: bytes = b""
    result: bytes = b""  # of `run_function`: what the function returned, as JSON


def run_program(program: str, stdin: bytes, limits: Limits, unsafe: bool = False) -> Outcome:
    """Run `program` as `__main__` on a real stdin. SandboxError where no box can be had: see `isolation`."""
    return _run(_Box(isolation(unsafe), limits, {"kind": "program", "source": program}, stdin=stdin))


def run_function(program: str, entry: str, arguments: list, limits: Limits, unsafe: bool = False) -> Outcome:
    """Call `entry`, a function of `program` or a method of its class Solution, with `arguments`, plain data.

    The program finds MODULES imported, for it is often the completion of a starter that needs them.
    """
    job = {"kind": "function", "source": program, "entry": entry, "arguments": json.dumps(arguments)}
    job |= {"modules": MODULES, "recursion": RECURSION}
    return _run(_Box(isolation(unsafe), limits, job))


def run_script(program: str, script: str, entry: str, prelude: str, limits: Limits, unsafe: bool = False) -> Outcome:
    """Run a test script that calls `entry`, a function or class of `program`; `prelude` runs before both.

    OK if the script comes to its end, WA if it raises, RE if what it raises comes from the program. Values cross by
    value: None, bool, int, float, str, list, tuple, set, frozenset, dict, and instances of classes that the prelude
    defines. SandboxError where script or prelude cannot start, for that is not the program's doing.
    """
    job, level = {"entry": entry, "prelude": prelude}, isolation(unsafe)
    (questions, ask), (answers, answer) = os.pipe(), os.pipe()
    with ExitStack() as started:
        try:
            test = _Box(level, limits, job | {"kind": "script", "source": script}, (answers, ask))
            started.callback(test.close)
            candidate = _Box(level, limits, job | {"kind": "remote", "source": program}, (questions, answer))
        finally:
            for end in (questions, ask, answers, answer):
                os.close(end)
        outcome = _run(test, candidate)
    if candidate.broken:
        return candidate.outcome()
    if outcome.verdict != "OK" or not outcome.result:
        return Outcome("RE", f"what the program returned was too much for its test: {outcome.detail}")
    verdict, detail = json.loads(outcome.result)
    if verdict == "fault":
        raise SandboxError(f"the test script cannot run: {detail}")
    if verdict != "OK":
        candidate.outcome()  # raises where its box never started: then it is not to blame
    return Outcome(verdict, _one_line(detail))


# --- isolation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What stands between a program and this machine: "bubblewrap", or "none" but resource limits."""

    name: str
    prefix: str  # of the Python installation that runs the programs
    python: str  # its name in bin/
    packages: tuple[str, ...] = ()  # folders of PACKAGES and their libraries

    def command(self, uid: int, seccomp: int, status: int) -> list[str]:
        """The command line that starts Python in a box; `uid` is 0 for a caller who is not root."""
        if self.name == "none":
            return [f"{self.prefix}/bin/{self.python}"]
        shown = [("/usr/bin",) * 2, ("/usr/lib",) * 2, ("/usr/lib64",) * 2, ("/etc/ld.so.cache",) * 2]
        shown += [(f"{self.prefix}/{part}", f"/python/{part}") for part in ("bin", "lib", "lib64")]
        shown += [(folder, f"/packages/{Path(folder).name}") for folder in self.packages]
        small = ("--perms", "1777", "--size", str(DISK), "--tmpfs")
        return [
            *(
                str(shutil.which("bwrap")),
                "--unshare-pid",
                "--unshare-net",
                "--unshare-ipc",
                "--unshare-uts",
                "--unshare-cgroup-try",
            ),
            # As root no user namespace is made, which many systems forbid: process 1 changes its user, to one that
            # nobody has. Otherwise one is made, in which the program cannot make another.
            *(("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if uid else ()),
            *(() if uid else ("--unshare-user", "--disable-userns", "--cap-drop", "ALL")),
            "--die-with-parent",  # a trainer that is killed leaves no box behind
            "--new-session",  # no terminal into which input could be pushed
            "--as-pid-1",  # bubblewrap's own process 1 would outlive it, and stay a zombie where no init reaps
            *("--json-status-fd", str(status)),  # tells process 1 as seen from here, and its exit code if it started
            *("--seccomp", str(seccomp), "--hostname", "box"),
            *(word for folder in ("/usr", "/etc", "/python", "/packages") for word in ("--dir", folder)),
            *(word for source, place in shown for word in ("--ro-bind-try", source, place)),  # and nothing else
            *(word for part in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{part}", f"/{part}")),
            *("--proc", "/proc", "--dev", "/dev", *small, "/tmp", *small, "/dev/shm"),
            *("--remount-ro", "/dev", "--remount-ro", "/"),  # else both are writable memory without a limit
            *("--chdir", "/tmp", "--"),
            *(("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all") if uid else ()),
            *(("--pdeathsig", "KILL") if uid else ()),  # the change of user has cleared what --die-with-parent set
            f"/python/bin/{self.python}",
        ]


PROBE = """
import os, _socket
if {packages}: import numpy
assert os.getuid() != 0 and not os.path.exists("/etc/passwd")
try: _socket.socket()
except PermissionError: print("sealed")
"""


@functools.cache
def isolation(unsafe: bool = False) -> Level:
    """The best isolation that works here, found by trying it. Where there is none, SandboxError says what to do; with
    `unsafe`, programs run under resource limits alone, free to read, send and delete whatever this user can."""
    own, python = sys.base_prefix, Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable))).name
    specs = [spec for spec in map(importlib.util.find_spec, PACKAGES) if spec]
    packages = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    packages += [libraries for folder in packages if (libraries := folder.with_name(f"{folder.name}.libs")).exists()]
    packages = tuple(map(str, packages))
    problem, levels = "bubblewrap is not installed", []
    if platform.machine() not in SYSCALLS:
        problem = f"there is no filter of system calls for {platform.machine()}"
    elif shutil.which("bwrap"):
        levels = [Level("bubblewrap", own, python, packages), Level("bubblewrap", own, python)]
        levels += [Level("bubblewrap", "/usr", "python3")]
    for level in levels:
        try:
            job = {"kind": "program", "source": PROBE.format(packages=level.packages)}
            outcome = _run(_Box(level, Limits(seconds=20), job))
            if outcome.stdout == b"sealed\n":
                return level
            problem = f"bubblewrap does not work here: {outcome.verdict} {outcome.detail}"
        except (SandboxError, OSError) as error:
            problem = f"bubblewrap does not work here: {error}"
    if unsafe:
        return Level("none", own, python, packages)
    raise SandboxError(f"{problem}; {INSTALL}")


SYSCALLS = {  # architecture as audit(7) numbers it, and the numbers of its system calls
    "x86_64": (0xC000003E, {
        "socket": 41, "clone": 56, "clone3": 435, "unshare": 272, "setns": 308, "ptrace": 101, "process_vm_readv": 310,
        "process_vm_writev": 311, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
        "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_create": 319, "memfd_secret": 447, "shmget": 29,
        "msgget": 68, "semget": 64, "mq_open": 240,
    }),
    "aarch64": (0xC00000B7, {
        "socket": 198, "clone": 220, "clone3": 435, "unshare": 97, "setns": 268, "ptrace": 117, "process_vm_readv": 270,
        "process_vm_writev": 271, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
        "add_key": 217, "request_key": 218, "keyctl": 219, "memfd_create": 279, "memfd_secret": 447, "shmget": 194,
        "msgget": 186, "semget": 190, "mq_open": 180,
    }),
}  # fmt: skip


@functools.cache
def _seccomp_filter() -> bytes:
    """A classic BPF program, see seccomp(2): EPERM for what no honest program needs and the namespaces leave open:
    kernel interfaces with a history of holes, the caller's keyrings, sockets (not every family obeys the network
    namespace), new namespaces, and memory that belongs to no process and so would escape the limits."""
    architecture, number = SYSCALLS[platform.machine()]
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026  # EPERM, ENOSYS
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, kill), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x86_64's second set of numbers
    lines += [(equal, 0, 1, number["clone3"]), (end, 0, 0, unknown)]  # has its flags out of sight; libc then uses clone
    for name in number.keys() - {"clone", "clone3"}:
        lines += [(equal, 0, 1, number[name]), (end, 0, 0, refuse)]
    new_namespaces = 0x7E020080
    lines += [(equal, 0, 3, number["clone"]), (load, 0, 0, 16), (any_bit, 0, 1, new_namespaces), (end, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*lines, (end, 0, 0, allow)])


# --- a box, seen from outside -------------------------------------------------------------------------------------


def _memory_file(content: bytes) -> int:
    file = os.memfd_create("sandbox")
    os.truncate(file, len(content))
    os.pwrite(file, content, 0)
    return file


def _one_line(text: str) -> str:
    """The last line of what may be hostile: short and printable."""
    line = (text.strip().splitlines() or [""])[-1]
    return "".join(c if c.isprintable() else "?" for c in line[:200])


class _Box:
    """One run: its process, what it has sent, and the limit that it broke."""

    def __init__(self, level: Level, limits: Limits, job: dict, pipe: tuple = (), stdin: bytes = b""):
        self.limits, self.contained, self.start = limits, level.name != "none", time.monotonic()
        self.broken: Outcome | None = None
        self.first = 0  # process 1 of the box, by its number out here
        self.pending, self.ends = memoryview(stdin), {}
        self.sent = {name: bytearray() for name in ("stdout", "stderr", "result", "status")}
        uid = random.randrange(61184, 65520) if self.contained and os.getuid() == 0 else 0
        memory = (int(limits.memory) + HEADROOM) * 2**20
        bounds = {"RLIMIT_AS": memory, "RLIMIT_STACK": memory // 4, "RLIMIT_CPU": math.ceil(limits.seconds) + 1}
        bounds |= {"RLIMIT_FSIZE": DISK, "RLIMIT_NOFILE": 128, "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0}
        if self.contained:  # where it counts no other process
            bounds |= {"RLIMIT_NPROC": PROCESSES}
        paths = ["/packages"] if self.contained else [str(Path(folder).parent) for folder in level.packages]
        theirs: dict[str, int] = {}
        self.process = None
        try:
            for name in ("stdin", "stdout", "stderr", "result", "status"):
                reading, writing = os.pipe()
                theirs[name], self.ends[name] = (reading, writing) if name == "stdin" else (writing, reading)
                os.set_blocking(self.ends[name], False)
                if uid:
                    os.fchown(reading, uid, uid)  # so that the program can open("/dev/stdin")
            job |= {"source": job["source"].encode("utf-8", "surrogatepass"), "bounds": bounds, "paths": paths}
            theirs["job"] = _memory_file(marshal.dumps(job | {"pipe": pipe, "result": theirs["result"]}, 2))
            theirs["seccomp"] = _memory_file(_seccomp_filter() if self.contained else b"")
            python = ["-S", "-s", "-B", "-X", "int_max_str_digits=0", "-c", INSIDE[job["kind"]], str(theirs["job"])]
            self.process = subprocess.Popen(
                level.command(uid, theirs["seccomp"], theirs["status"]) + python,
                **{name: theirs[name] for name in ("stdin", "stdout", "stderr")},
                env=ENVIRONMENT,  # of bubblewrap too: the program can read it under /proc
                pass_fds=(*(theirs[name] for name in ("result", "status", "job", "seccomp")), *pipe),
                start_new_session=True,
            )
            self.ends["end"] = os.pidfd_open(self.process.pid)
        except BaseException:
            if self.process:
                self.process.kill()
                self.process.wait()
            self._release()
            raise
        finally:
            for file in theirs.values():
                os.close(file)

    def serve(self, name: str) -> bool:
        """Write to, or read from, an end that is ready. False: there is nothing more to do there."""
        if name == "end":
            return False
        if name == "stdin":
            self.pending = self.pending[os.write(self.ends[name], self.pending[:65536]) :]
            return bool(self.pending)
        chunk = os.read(self.ends[name], 65536)
        self.sent[name] += chunk
        if len(self.sent[name]) > self.limits.output:
            self.stop("OLE", f"more than {self.limits.output} bytes of {name}")
        if name == "status" and not self.first and b"\n" in self.sent[name]:
            self.first = json.loads(self.sent[name].splitlines()[0])["child-pid"]
        return bool(chunk)

    def stop(self, verdict: str, detail: str) -> None:
        self.broken = self.broken or Outcome(verdict, detail)

    def look(self) -> None:
        """Hold what the box uses against the limits that the kernel does not keep."""
        pages, todo = 0, [self.first or self.process.pid]
        while todo:
            process = Path(f"/proc/{todo.pop()}")
            with suppress(OSError):  # it has ended meanwhile
                pages += int((process / "statm").read_text().split()[1])
                for thread in (process / "task").iterdir():
                    todo += (thread / "children").read_text().split()
        if pages * os.sysconf("SC_PAGE_SIZE") > self.limits.memory * 2**20:
            self.stop("MLE", f"more than {self.limits.memory} MiB")
        for folder in ("tmp", "dev/shm") if self.first else ():
            with suppress(OSError):
                place = os.statvfs(f"/proc/{self.first}/root/{folder}")
                ours = place.f_blocks * place.f_frsize == DISK  # before the box is built it is this machine's
                if ours and place.f_files - place.f_ffree > FILES:
                    self.stop("MLE", f"more than {FILES} files in /{folder}")

    def close(self) -> None:
        """Kill what still runs, reap it, read what is left in the pipes, and let go of them."""
        if self.process.returncode is None:  # a second call has nothing to do
            with suppress(ProcessLookupError):
                if self.first and "end" in self.ends:  # bubblewrap, its parent, then reaps it and ends
                    os.kill(self.first, signal.SIGKILL)
                elif "end" in self.ends or not self.contained:
                    os.killpg(self.process.pid, signal.SIGKILL)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for name in self.sent:
            with suppress(BlockingIOError):
                while name in self.ends and not self.broken and self.serve(name):
                    pass
        self._release()

    def _release(self) -> None:
        while self.ends:
            os.close(self.ends.popitem()[1])

    def outcome(self) -> Outcome:
        """After `close`. Raises SandboxError where the program was never started, or the box not ended by us or it."""
        code, detail = self.process.returncode, _one_line(self.sent["stderr"].decode(errors="replace"))
        if self.contained:
            status = [json.loads(line) for line in self.sent["status"].splitlines()]
            code = status[-1].get("exit-code") if status else None
            if not self.first or (code is None and not self.broken):
                raise SandboxError(f"the box did not start, or was killed: {detail or 'no reason given'}")
        if code == NOT_STARTED:
            raise SandboxError("the box could not be set up: too few processes or too little memory on this machine")
        if self.broken or code == 0:
            return self.broken or Outcome("OK", "", bytes(self.sent["stdout"]), bytes(self.sent["result"]))
        if code in (COMPILE_ERROR, OUT_OF_MEMORY):
            return Outcome("CE" if code == COMPILE_ERROR else "MLE", detail)
        if code == 128 + signal.SIGXCPU:
            return Outcome("TLE", f"more than {self.limits.seconds:g} s on all cores")
        return Outcome("RE", f"killed by signal {code - 128}" if code > 128 else detail or f"exit code {code}")


def _run(*boxes: _Box) -> Outcome:
    """Serve the boxes until the first has ended, or any has broken a limit, and leave none: how the first ended."""
    limits, start = boxes[0].limits, boxes[0].start
    deadline, look = start + limits.seconds, start + POLL
    try:
        with selectors.DefaultSelector() as ready:
            for box in boxes:
                for name, end in box.ends.items():
                    ready.register(end, selectors.EVENT_WRITE if name == "stdin" else selectors.EVENT_READ, (box, name))
            while "end" in boxes[0].ends and not any(box.broken for box in boxes):
                now = time.monotonic()
                for box in boxes:
                    if now >= deadline:
                        box.stop("TLE", f"longer than {limits.seconds:g} s")
                    elif now >= look:
                        box.look()
                look = now + POLL if now >= look else look
                for key, _ in ready.select(max(0.0, min(look, deadline) - now)):
                    box, name = key.data
                    try:
                        more = box.serve(name)
                    except BlockingIOError:
                        more = True
                    except BrokenPipeError:  # the program reads no further
                        more = False
                    if not more:
                        ready.unregister(key.fileobj)
                        os.close(box.ends.pop(name))
    finally:
        for box in boxes:
            box.close()
    return boxes[0].outcome()


# --- a box, seen from inside: these functions are sent there as source, and find nothing else of this file ---------


def _inside(job_file):
    """Process 1 of a box: set the limits, do the job in a child, and end with its exit code."""
    import _signal
    import _sitebuiltins
    import builtins
    import marshal
    import posix  # not os, which takes 5 ms to import
    import resource
    import sys

    _signal.signal(_signal.SIGINT, _signal.default_int_handler)  # a trainer under nohup or & ignores it, a box must not
    with open(job_file, "rb") as file:
        job = marshal.load(file)
    for name, value in job["bounds"].items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        child = posix.fork()
    except OSError:
        posix._exit(NOT_STARTED)
    if child:
        ended = 0
        while ended != child:  # orphans of the program come here too
            ended, status = posix.wait()
        code = posix.waitstatus_to_exitcode(status)
        posix._exit(1 if code == NOT_STARTED else code if code >= 0 else 128 - code)
    if job["kind"] in ("program", "remote"):
        posix.close(job["result"])
    builtins.exit, builtins.quit = (_sitebuiltins.Quitter(name, "Ctrl-D") for name in ("exit", "quit"))  # -S has none
    sys.argv, sys.path = ["program.py"], [path for path in sys.path if path] + job["paths"]
    module = type(sys)("__main__" if job["kind"] in ("program", "script") else "solution")
    sys.modules[module.__name__] = module
    try:
        globals()["_" + job["kind"]](job, module.__dict__)
    except MemoryError:
        posix.write(2, b"MemoryError\n")
        posix._exit(OUT_OF_MEMORY)


def _program(job, namespace):
    import posix

    try:
        code = compile(job["source"], "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        posix.write(2, f"{type(error).__name__}: {error}".encode(errors="replace"))
        posix._exit(COMPILE_ERROR)
    exec(code, namespace)


def _function(job, namespace):
    import builtins
    import json
    import os
    import sys

    arguments, dumps, write = json.loads(job["arguments"]), json.dumps, os.write
    modules = {name: __import__(name) for name in job["modules"]}
    usual = {name: vars(m)[name] for m in modules.values() for name in getattr(m, "__all__", vars(m)) if name[0] != "_"}
    for name, value in (usual | modules).items():  # as builtins, for a program's own names and first line stay its own
        vars(builtins).setdefault(name, value)
    sys.setrecursionlimit(job["recursion"])
    _program(job, namespace)
    function = namespace.get(job["entry"])
    if function is None:
        function = getattr(namespace["Solution"](), job["entry"])
    result = dumps(function(*arguments), default=lambda array: array.tolist()).encode() + b"\n"
    while result:
        result = result[write(job["result"], result) :]


def _script(job, namespace):
    """The test's side. Reports [verdict, detail]: OK, WA, RE (the program's), fault (before the test began)."""
    import builtins
    import contextlib
    import json
    import os

    answers, ask, classes = open(job["pipe"][0], "rb"), job["pipe"][1], {}  # noqa: SIM115

    def call(instance, name, *arguments):
        question = json.dumps([instance, name, _pack(arguments, classes)])
        with contextlib.suppress(BrokenPipeError):  # there is no answer then either
            os.write(ask, question.encode() + b"\n")
        line = answers.readline(2**26) or b'["raised", "RuntimeError", "the program ended before it answered"]'
        kind, content, detail = json.loads(line)
        if kind == "value":
            return _unpack(content, classes)
        if kind == "instance":
            return Instance(content)
        error = getattr(builtins, content, None)  # by a name that the program chose: nothing but exceptions
        error = error if isinstance(error, type) and issubclass(error, Exception) else RuntimeError
        try:
            error = error(detail)
        except TypeError:  # it takes more to make one
            error = RuntimeError(detail)
        error.by_program = f"{content}: {detail}"
        raise error

    class Instance:
        def __init__(self, number):
            self._number = number

        def __getattr__(self, name):
            return lambda *positional, **named: call(self._number, name, positional, named)

    report = ["fault", ""]
    try:
        exec(job["prelude"], namespace)
        classes |= _own_classes(namespace)
        namespace[job["entry"]] = lambda *positional, **named: call(None, None, positional, named)
        code = compile(job["source"], "test.py", "exec", dont_inherit=True)
        report = ["WA", ""]
        exec(code, namespace)
        report = ["OK", ""]
    except BaseException as error:
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "test.py" else line
            trace = trace.tb_next
        report[1] = f"line {line} of the test: {type(error).__name__} {error}"
        if hasattr(error, "by_program"):
            report = ["RE", error.by_program]
        elif not isinstance(error, Exception):  # the script left
            report[0] = "fault"
    os.write(job["result"], json.dumps(report).encode())


def _remote(job, namespace):
    """The program's side. Answers calls: ["value", data, ""], ["instance", number, ""] or ["raised", name, text]."""
    import json
    import os

    questions, answer, instances, failure = open(job["pipe"][0], "rb"), job["pipe"][1], [], None  # noqa: SIM115
    try:
        exec(job["prelude"], namespace)
        namespace.pop(job["entry"], None)  # a stub there is no solution
        exec(compile(job["source"], "program.py", "exec", dont_inherit=True), namespace)
        entry = namespace[job["entry"]]
    except BaseException as error:
        failure = error
    for question in questions:
        try:
            if failure:
                raise failure
            number, name, arguments = json.loads(question)
            positional, named = _unpack(arguments, _own_classes(namespace))
            value = (entry if number is None else getattr(instances[number], name))(*positional, **named)
            if number is None and isinstance(entry, type):
                instances.append(value)
                reply = ["instance", len(instances) - 1, ""]
            else:
                reply = ["value", _pack(value, _own_classes(namespace)), ""]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        reply = json.dumps(reply).encode() + b"\n"
        while reply:
            reply = reply[os.write(answer, reply) :]


def _own_classes(namespace):
    """Classes whose instances may cross: those that the source in this namespace defines."""
    return {n: c for n, c in namespace.items() if isinstance(c, type) and c.__module__ == namespace["__name__"]}


def _pack(value, classes):
    """Plain data as JSON: a scalar as it is, all else as [kind, contents]. TypeError for what is no plain data."""
    value = value.tolist() if type(value).__module__ == "numpy" else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [_pack(element, classes) for element in value]]
    if isinstance(value, dict):
        kind, fields = "dict", value
    elif classes.get(type(value).__name__) is type(value):
        kind, fields = type(value).__name__, vars(value)
    else:
        raise TypeError(f"a {type(value).__name__} cannot be passed between a program and its test")
    return [kind, [[_pack(key, classes), _pack(field, classes)] for key, field in fields.items()]]


def _unpack(data, classes):
    """What `_pack` packed: never anything but the kinds it knows, and instances of `classes` with fields of these."""
    if not isinstance(data, list):
        return data
    kind, contents = data
    if kind != "dict" and kind not in classes:
        kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return kinds[kind](_unpack(element, classes) for element in contents)
    fields = {_unpack(key, classes): _unpack(field, classes) for key, field in contents}
    if kind == "dict":
        return fields
    instance = object.__new__(classes[kind])
    vars(instance).update(fields)
    return instance


INSIDE = {
    kind: f"COMPILE_ERROR, OUT_OF_MEMORY, NOT_STARTED = {COMPILE_ERROR}, {OUT_OF_MEMORY}, {NOT_STARTED}\n"
    + "\n".join(map(inspect.getsource, (*functions, _inside)))
    + "\nimport sys\n_inside(int(sys.argv[1]))"
    for kind, functions in {
        "program": (_program,),
        "function": (_program, _function),
        "script": (_script, _own_classes, _pack, _unpack),
        "remote": (_remote, _own_classes, _pack, _unpack),
    }.items()
}


# --- python -m rewards.sandbox ------------------------------------------------------------------------------------

ATTEMPTS = {  # what a program may try; one that gets it ends well
    "read this machine's files": "open('/etc/passwd')",
    "write to the system": "open('/usr/bin/x', 'w')",
    "reach the network": "import socket; socket.socket()",
    "become root": "import os; os.setuid(0)",
    "fork 100 processes": "import os, time\nfor i in range(100): os.fork() or exit(time.sleep(9))",
    "take 1.6 GB in 8 processes": "import os, time\nfor i in '123': os.fork()\nx = b'1' * (200 << 20)\ntime.sleep(1)",
    "fill the disk": "f = open('/tmp/x', 'wb')\nfor i in range(99): f.write(bytes(2**20))",
    "flood stdout": "for i in range(99): print('x' * 10**6)",
    "run longer than it may": "import time; time.sleep(9)",
}


def main() -> int:
    try:
        level = isolation()
    except SandboxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"isolation: {level.name}, Python: {level.prefix}/bin/{level.python}, packages: {level.packages or 'none'}")
    failed = 0
    for what, program in ATTEMPTS.items():
        outcome = run_program(program, b"", Limits(seconds=3))
        failed += outcome.verdict == "OK"
        print(f"{'FAILED' if outcome.verdict == 'OK' else 'held'}: {what} ({outcome.verdict} {outcome.detail})")
    workers, start = 2 * (os.cpu_count() or 1), time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda i: run_program(f"print({i})", b"", Limits()).stdout == b"%d\n" % i, range(100)))
    print(
        f"{sum(done)} of 100 short programs right, {100 / (time.monotonic() - start):.0f} a second in {workers} threads"
    )
    return int(failed > 0 or not all(done))


if __name__ == "__main__":
    sys.exit(main())
