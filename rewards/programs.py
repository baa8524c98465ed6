"""Programs: find the last one in a response, run it on its tests, and say why it fails.

The reference holds the tests, see `read_tests`. A program runs in a box of sandbox.py and nowhere else.
"""

import json
import math
import re

from rewards import sandbox

PYTHON = ("", "python", "py", "python3")  # what may stand behind an opening fence
# Where a triple quote may open in a line of a program; what stands in comments and other strings opens none.
TOKENS = re.compile(r"""\\.|\#.*|"{3}|'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
CLOSING = {quote: re.compile(rf"(?:\\.|[^\\])*?{quote}") for quote in ('"""', "'''")}
DECIMAL = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", re.ASCII)


def _fence(line: str) -> tuple[str, int, str] | None:
    """(indent, number of backticks, first word behind them) of a line that opens or closes a block; else None."""
    ticks = line.lstrip(" \t")
    words = ticks.lstrip("`")
    if len(ticks) - len(words) < 3 or "`" in words:
        return None
    return line[: len(line) - len(ticks)], len(ticks) - len(words), (words.split() or [""])[0].lower()


def _quote_after(line: str, quote: str | None) -> str | None:
    """The triple quote that is open behind a line of a program, where `quote` is open before it; None for none."""
    place = 0
    while token := CLOSING[quote].match(line, place) if quote else TOKENS.search(line, place):
        place = token.end()
        if quote:
            quote = None
        elif token[0] in CLOSING:
            quote = token[0]
    return quote


def _blocks(text: str, strings: bool) -> tuple[list[tuple[str, str]], bool]:
    """(mark, content) of each closed block, and whether that is all there is. With `strings`, a fence inside a
    triple-quoted string of a program is none; it is not all where the last block, or a block in a string, stays open.
    """
    blocks: list[tuple[str, str]] = []
    block, quote, quoted = None, None, False  # quoted: whether a block is open inside the string
    for line in text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n"):
        fence = _fence(line)
        if fence and quote:
            if quoted and fence[2]:  # this block begins behind a program whose string never ended
                return blocks, False
            quoted, fence = not quoted, None
        if fence and (block is None or fence[2]):
            (indent, ticks, mark), block = fence, []
        elif fence and fence[1] >= ticks:
            blocks.append((mark, "\n".join(block)))
            block = None
        elif block is not None:
            block.append(line.removeprefix(indent))
            quote = _quote_after(line, quote) if strings and mark in PYTHON else None
            quoted = quoted and quote is not None
    return blocks, block is None


def extract_program(text: str) -> str | None:
    """The last closed block of `text` that is marked python, py or python3; without any, the last one that is not
    marked at all, for that may be an output as well; None without one.

    CommonMark's fences, with two exceptions: a marked fence inside a block begins another (the first was never closed),
    and one inside a triple-quoted string is none, unless that reading would leave a block open. Blocks count wherever
    they stand, in the thinking part too. A block is a whole program: the bare body of a function is none.
    """
    blocks, closed = _blocks(text, strings=True)
    if not closed:
        blocks, _ = _blocks(text, strings=False)
    programs = {bool(mark): program for mark, program in blocks if mark in PYTHON}  # the last of each kind
    return programs.get(True, programs.get(False))


def read_tests(reference) -> dict:
    """A code reference, decoded, with pairs (input, expected) as "tests". Raises where it is malformed or has no test.

    {"inputs": [text], "outputs": [text]}    stdin and stdout of each test
    the same and "fn_name"                   arguments (JSON, one a line; or a list) and returned value (JSON)
    {"tests": [{"input", "output"}]}         either of these, as LiveCodeBench writes it
    {"script", "entry_point", "prelude"}     assertions on a function or class, and what precedes both: see sandbox.py
    each with "time_limit" (seconds a test) and "memory_limit" (MiB), if they are not to be the sandbox's defaults
    """
    reference = json.loads(reference) if isinstance(reference, str) else reference
    reference = {"tests": reference} if isinstance(reference, list) else reference
    if not isinstance(reference, dict):
        raise ValueError("tests are an object or a list")
    reference = dict(reference)
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


def limits_of(reference: dict, output: int = 2**20) -> sandbox.Limits:
    return sandbox.Limits(reference.get("time_limit", 6.0), reference.get("memory_limit", 512), output)


def check_tests(reference) -> None:
    """Raise where `read_tests` or the sandbox could not read a reference; runs nothing."""
    reference = read_tests(reference)
    limits_of(reference)
    for name in ("script", "entry_point") if "script" in reference else ():
        if not isinstance(reference.get(name), str):
            raise ValueError(f"{name} is no text")


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
    limits = limits_of(reference, room)
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
        script, entry, prelude = reference["script"], reference["entry_point"], reference.get("prelude", "")
        outcome = sandbox.run_script(program, script, entry, prelude, limits_of(reference), unsafe)
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
