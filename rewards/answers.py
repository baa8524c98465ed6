r"""Whether two mathematical answers are equal: the graders `number` and `math`.

They reject when in doubt, as a wrong answer that is accepted is learned; and take a plain right
answer however it is written. `number` compares exact rationals; `math` adds symbolic equality,
which sympy and the LaTeX parser of math-verify decide (worker.py runs them where they can be
killed). Their policies, each with its cases in tests/test_answers.py:

    \boxed{7}                          the last balanced box counts; of nested ones the outer
    #### 18                            without a box, what stands behind the last ####
    #### 18 and more lines behind it   0: a heading, not GSM8K's last line
    \boxed 7, \fbox{7}, no mark        0
    2/4, 0.50, 1e2, 1\frac34           equal 1/2, 1/2, 100, 7/4: values are compared, not their form
    1e16, a JSON number                is 10^{16}; e+16 is e plus 16
    0.333333 against 1/3               0: exact, but for the reference's tolerance; 0.\bar{3} is 1/3
    99^2-98^2 against 197              0: evaluate it. One operation (6!, \binom52) may be left
    2+3=5 against 5                    1, where all its sides are equal
    10\% against 10 or 0.1             1: the face value or a hundredth; of two, the face values
    90^\circ, 5\text{ cm}, \$5         a unit may be left out, not exchanged: cm for m is 0
    5\text{ cm} against 5\text{ cm}^2  0: units are products of powers; mph is miles per hour
    5\text{ million} against 5         0, against 5000000 1: a factor, as dozen and tenths are
    5\text{ below zero} against 5      0: neither a unit nor a factor
    60 mph, 18 dollars per day         words behind a number are units; 7x and 7 xy are products
    2,3 against 3,2 or \{2,3\}         1: order counts in (), [) and matrices; (2,3) is no list
    1,234                              one number; in brackets, or if the reference is a list, two
    12, 144                            two numbers; so are 12,\ 144 and 12; 144
    1, 2, and 3                        1, 2, 3; but 1,,3 has an empty place
    x=5 against 5                      1, either way round; y=5 against x=5 is 0
    x=1,y=2 against 2,1                0: names are bound to values; 1,2 leaves them out, in order
    x>2 against (2,\infty)             1: an inequality for one name is its interval
    x>2 and x<5 against 2<x<5          1; `or` is the union. Commas are `and`, if anything is left
    |x|<2, \mathbb{R}\setminus\{3\}    the intervals that they are; so is x\ne3
    \pm\sqrt2\pm\sqrt3                 four values; with a \mp two
    1:2 against 1/2                    0: a ratio equals a ratio only
    101_2 against 5, or 101_3          0; the base may be left out, like a unit
    Monday, (A)                        as text; case counts in one or two letters only
    \textbf{(C) }12                    equals 12, and (C)
    \text{R}, \mathbf{j}, \vec{a}      the letters R, j, a; \bar{x} and \mathcal{F} are others
    \sqrt{1/n} against 1/\sqrt{n}      1: equal where both are defined; odd roots are real
    \frac12 before a matrix            is multiplied into its entries
"""

import ast
import functools
import itertools
import math
import operator
import random
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from rewards.notation import (
    CLOSE,
    FUNCTIONS,
    GREEK,
    GROUP,
    OPEN,
    TOKEN,
    bracketed,
    plain_text,
    rational,
    spelled,
    split,
)
from rewards.statements import (
    Interval,
    bound,
    choice,
    clauses,
    matrix,
    name_of,
    named_members,
    region,
    steps,
)
from rewards.units import Unit, quantity, read_unit


def last_box(text: str) -> str | None:
    """What the last balanced \\boxed{} holds, or None; in time linear in the text."""
    opened, box = [], None
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}" and opened:
            start = opened.pop()
            box = text[start : match.start()] if start else box
        elif match[0] == "{" or match[0].startswith("\\boxed"):
            opened.append(match.end() if match[0] != "{" else 0)
    return box


REFERENCE_KEYS = {"answer", "multiple", "tolerance", "unit"}
PLAIN_WORD = re.compile(r"\d|(?<![A-Za-z\\])[A-Za-z]")  # a digit, or a letter that is not in a command


def final_answer(text: str) -> str | None:
    """The last box, or else what stands behind `####` in the last line, as in GSM8K.

    With text behind that line it is one of Markdown's headings, which may begin with a number.
    """
    box = last_box(text)
    if box is not None:
        return box
    _, mark, rest = text.rpartition("####")
    line, _, more = rest.partition("\n")
    return line.strip() or None if mark and not more.strip() else None


def published(answer) -> str:
    """A reference's answer as text: a JSON number in digits, 1e16 as 10000000000000000."""
    if isinstance(answer, float) and abs(answer) < float("inf"):
        return f"{Decimal(repr(answer)):f}"
    text = str(answer).rpartition("####")[2]
    box = last_box(text)
    return text if box is None else box


def read_reference(reference) -> dict:
    """The fields of a Gold that a reference gives: `answer`, and `multiple`, `tolerance`, `unit`.

    ValueError: no answer could be right by it. Cheap, for each row of a dataset is asked.
    """
    fields = reference if isinstance(reference, dict) else {"answer": reference}
    if "answer" not in fields or not fields.keys() <= REFERENCE_KEYS:
        raise ValueError(f"an object has the key 'answer', and no others than {sorted(REFERENCE_KEYS)}")
    answer, tolerance = fields["answer"], fields.get("tolerance")
    if isinstance(answer, list | tuple):
        raise ValueError('several values are one text: {"answer": "3, 5", "multiple": true}')
    if not isinstance(answer, str | int | float):
        raise ValueError(f"the answer must be a text or a number, not {type(answer).__name__}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError("the answer is no finite number")
    text = published(answer)
    if not PLAIN_WORD.search(text) and not spelled(text):  # \infty has no word, and says something
        raise ValueError("the answer is empty")
    if tolerance is not None and not (type(tolerance) in (int, float) and 0 <= tolerance < math.inf):
        raise ValueError("tolerance must be a number, at least 0, or null")
    if not isinstance(fields.get("unit"), str | None):
        raise ValueError("unit must be a text or null")
    return fields


# --- comparing answers --------------------------------------------------------------------------

LONGEST = 500  # characters in a box
# One operation on plain numbers. Of more than one, the result is asked for.
_PLAIN = r"(?:[+-]?(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|\d+/\d+|[ei]))"
_PLAIN = rf"(?:{_PLAIN}|\({_PLAIN}\))"
_ANGLE = re.compile(r"\\frac\{\d*\\pi\}\{\d+\}|\d*\\pi(?:/\d+)?(?![A-Za-z])|\d+\^\\circ")
_OPERATION = re.compile(
    rf"-?(?:{_PLAIN}\^\{{?{_PLAIN}\}}?|{_PLAIN}!|\\binom\{{{_PLAIN}\}}\{{{_PLAIN}\}}"
    rf"|\\sqrt(?:\[\d+\])?\{{{_PLAIN}\}}|\|{_PLAIN}\||\\l(?:floor|ceil) ?{_PLAIN}\\r(?:floor|ceil)"
    rf"|\\(?:{FUNCTIONS})(?:_(?:\{{{_PLAIN}\}}|\w))? ?\{{?{_PLAIN}\}}?)"
)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.add,  # with 0 before it
    ast.USub: operator.sub,
}


@dataclass(frozen=True)
class Gold:
    """A reference: the published answer, and how to read it. `same` compares spelled answers."""

    answer: str | float
    multiple: bool = False  # several values separated by commas: 1,234 are two
    tolerance: float | None = None  # absolute, for numbers
    unit: str | None = None  # of the answer, where it does not name it itself
    symbolic: bool = False  # whether expressions may be compared by sympy
    literal: bool = True  # whether equal spelling is enough; off in tests of everything else
    evaluated: bool = True  # whether a plain number must be answered by one

    def same(self, gold: str, answer: str) -> bool:
        if self.literal and plain_text(gold) == plain_text(answer):
            return True
        if not (gold + answer).isascii():  # `spelled` translates what has a meaning
            return False
        gold_letter, gold_text = choice(gold)
        letter, text = choice(answer)
        if gold_letter and letter:
            return gold_letter == letter and self.same(gold_text, text)
        if gold_letter or letter:
            return any(map(self.same, (gold_text, gold_letter or gold), (text, letter or answer)))
        if region(gold) or region(answer):
            return self._same_region(region(gold, plain=True), region(answer, plain=True))
        golds = clauses(gold, self.multiple)
        readings = [clauses(answer, self.multiple)]
        if len(golds) > 1:  # then 100,200 may be two
            readings.append(clauses(answer, multiple=True))
        return any(self._same_clauses(gold, golds, answer, answers) for answers in readings)

    def _same_region(self, gold, answer) -> bool:
        """Whether two (name, intervals) are one set of numbers. Either may be none at all."""
        if not gold or not answer or (gold[0] and answer[0] and gold[0] != answer[0]):
            return False
        return self._matched(gold[1], answer[1], self._same_interval)

    def _same_interval(self, gold: Interval, answer: Interval) -> bool:
        ends = [[interval.low, interval.high] for interval in (gold, answer)]
        one = replace(self, multiple=False)
        return gold.closed == answer.closed and all(map(one.same, *ends))

    def _same_clauses(self, gold: str, golds: list[str], answer: str, answers: list[str]) -> bool:
        """Whether two lists of clauses say the same. What is said of several names belongs to its
        name; if one side leaves the names out, the order stands for them."""
        if len(golds) == len(answers) == 1:
            points = named_members(golds[0]), named_members(answers[0])
            if all(len(point) > 1 and name_of(point[0]) for point in points):  # (x,y)=(1,2)
                return self._matched(*points, self.same)
            return self._same_clause(golds[0], answers[0])
        several = [len({name_of(c) for c in side} - {""}) > 1 for side in (golds, answers)]
        if not any(several):
            return self._matched(golds, answers, self.same)
        alternatives = [split(side, r"\lor") for side in (gold, answer)]
        if max(map(len, alternatives)) > 1:
            return self._matched(*alternatives, self.same)
        golds, answers = (named_members(s[0]) if len(s) == 1 else s for s in (golds, answers))
        named = [all(map(name_of, side)) for side in (golds, answers)]
        indexed = {re.sub(r"_(?:\{\d+\}|\d)$", "", name) for name in map(name_of, answers)}
        if all(named) or (named[1] and len(indexed) == 1):  # the roots 1,3 as x_1=3, x_2=1
            return self._matched(golds, answers, self.same)
        unnamed = not any(map(name_of, answers if named[0] else golds))
        return unnamed and any(named) and self._in_order(golds, answers)

    def _matched(self, golds: list, answers: list, same) -> bool:
        """Whether the two lists hold the same, in any order."""
        rest = list(answers)
        for gold in golds if len(golds) == len(answers) else ():
            found = next((i for i, answer in enumerate(rest) if same(gold, answer)), None)
            if found is None:
                return False
            del rest[found]
        return len(golds) == len(answers)

    def _in_order(self, golds: list[str], answers: list[str]) -> bool:
        inside = replace(self, multiple=True)
        return len(golds) == len(answers) and all(map(inside.same, golds, answers))

    def _same_clause(self, gold: str, answer: str) -> bool:
        """One value or equation each. `name = value` and `2+3=5` are as good as the value."""
        gold_name, golds = bound(gold)
        name, answers = bound(answer)
        is_value = [not gold_name and len(golds) == 1, not name and len(answers) == 1]
        if all(is_value):
            return self._same_structure(golds[0], answers[0])
        if not any(is_value) and (not name or name != gold_name):
            return self._same_equation(split(gold, "="), split(answer, "="))
        golds = golds[-1:] if gold_name else golds
        before = steps(answers) if name else answers[:-1]
        between = replace(self, evaluated=False)
        return self.same(golds[-1], answers[-1]) and all(
            between.same(*pair) for pair in itertools.product(golds, [*before, answers[-1]])
        )

    def _same_equation(self, golds: list[str], answers: list[str]) -> bool:
        return self.symbolic and len(golds) == len(answers) == 2 and equal_equations(golds, answers)

    def _same_structure(self, gold: str, answer: str) -> bool:
        """Ratios, matrices, tuples and intervals; else one value each."""
        golds, answers = split(gold, ":"), split(answer, ":")
        if len(golds) > 1 or len(answers) > 1:
            return self._in_order(golds, answers)
        matrices = [matrix(gold), matrix(answer)]
        if any(matrices):
            return all(matrices) and self._same_matrix(*matrices)
        brackets = [bracketed(side) or ("", side, "") for side in (gold, answer)]
        golds, answers = (split(b[1], ",", ";") if b[0] else [b[1]] for b in brackets)
        if len(golds) > 1 or len(answers) > 1:
            return brackets[0][::2] == brackets[1][::2] and self._in_order(golds, answers)
        return self._same_value(gold, answer)

    def _same_matrix(self, gold, answer) -> bool:
        """Whether two (kind, rows) are one matrix."""
        (kind, golds), (other, answers) = gold, answer
        entries = [[entry for row in rows for entry in row] for rows in (golds, answers)]
        same_shape = kind == other and list(map(len, golds)) == list(map(len, answers))
        return same_shape and replace(self, evaluated=False)._in_order(*entries)

    def _same_value(self, gold: str, answer: str) -> bool:
        """One number, word or expression each, with a unit or without."""
        gold, gold_unit = quantity(gold)
        # Without algebra, or beside a unit, 5 m is a length.
        answer, unit = quantity(answer, letters=bool(gold_unit.powers) or not self.symbolic)
        if unit.powers and not gold_unit.powers:
            gold, gold_unit = quantity(gold, letters=True)
        scales = {Fraction(1)}  # of the answer, for which it may be right
        if self.unit and not gold_unit.powers:
            named = read_unit(spelled(self.unit), letters=True) or Unit()
            gold_unit = replace(named, factor=gold_unit.factor)
            scales.add(1 / named.factor)
        if gold_unit.powers and unit.powers and gold_unit.powers != unit.powers:
            return False
        gold, answer = without_parentheses(gold), without_parentheses(answer)
        read = rational if self.evaluated else arithmetic
        g, a = read(gold), read(answer)
        if g is not None and a is not None:
            g, a = g * gold_unit.factor, a * unit.factor
            percents = [("percent", 1) in powers for powers in (gold_unit.powers, unit.powers)]
            if percents[0] != percents[1]:
                scales.add(Fraction(1, 100) if percents[1] else Fraction(100))
            return any(abs(g - a * scale) <= Fraction(str(self.tolerance or 0)) for scale in scales)
        words = [plain_text(side) for side in (gold, answer)]
        words = [word if len(word) < 3 else word.lower() for word in words]
        if words[0] == words[1] and re.fullmatch(r"[A-Za-z][A-Za-z'.-]*", words[0]):
            return True
        if not self.symbolic or (self.evaluated and g is not None and not one_operation(answer)):
            return False
        gold, answer = scaled(gold, gold_unit), scaled(answer, unit)
        return equal_expressions(gold, answer, self.tolerance)


def arithmetic(expression: str) -> Fraction | None:
    """The value of sums and products of rational numbers, as in 2+3=5; None of anything else."""
    if (value := rational(expression)) is not None:
        return value
    plain = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", expression).replace(r"\div", "/")
    if len(plain) > 100 or not re.fullmatch(r"[\d.+\-*/() ]+", plain):
        return None
    try:
        return _evaluated(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


def _evaluated(node: ast.expr) -> Fraction | None:
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _evaluated(node.operand)
        return None if value is None else _OPERATORS[type(node.op)](Fraction(0), value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluated(node.left), _evaluated(node.right)
        return None if left is None or right is None else _OPERATORS[type(node.op)](left, right)
    return None


def one_operation(answer: str) -> bool:
    """Whether this is a single operation on plain numbers, as 6! or \\binom{5}{2}."""
    return _OPERATION.fullmatch(_ANGLE.sub("1", answer)) is not None


def without_parentheses(side: str) -> str:
    """(5) as 5."""
    brackets = bracketed(side, r"\(", r"\)")
    return brackets[1] if brackets else side


def scaled(value: str, unit: Unit) -> str:
    """An expression times the scale words behind it."""
    factor = unit.factor
    if factor == 1:
        return value
    return rf"({value})\cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"


def grade_answer(text: str, reference, symbolic: bool, literal: bool = True) -> tuple[float, str]:
    """Compare the answer of `text` with a reference: the published answer (a number, or a text that
    may hold $, \\boxed{} or GSM8K's ####), or a dict of Gold's `answer`, `multiple`, `tolerance`
    and `unit`.

    ValueError: the reference cannot be read, see `read_reference`.
    """
    gold = Gold(**read_reference(reference), symbolic=symbolic, literal=literal)
    answer, expected = final_answer(text), published(gold.answer)
    if answer is None:
        return 0.0, "no box, and no last line of ####"
    while inner := bracketed(answer.strip(), r"\\boxed\s*\{", r"\}"):
        answer = inner[1]
    if len(answer) > max(LONGEST, 3 * len(expected)):
        return 0.0, f"the answer is longer than {LONGEST} characters"
    if spelled(answer) and gold.same(spelled(expected), spelled(answer)):
        return 1.0, "right"
    return 0.0, f"answered {answer[:80]}, expected {expected.strip()[:80]}"


def grade_number(text: str, reference) -> tuple[float, str]:
    """The answer is one rational number, or several: exact, no algebra. Cheap."""
    return grade_answer(text, reference, symbolic=False)


def grade_math(text: str, reference) -> tuple[float, str]:
    """As `number`, and expressions may be equal symbolically. Run it in a worker: it may hang."""
    return grade_answer(text, reference, symbolic=True)


# --- symbolic equality (in a worker) ------------------------------------------------------------

_COMMANDS = {  # what the parser reads as it is meant; anything else can be equal in spelling only
    *re.findall(
        r"\S+",
        r"\frac \sqrt \pi \cdot \times \div \infty \binom \lfloor \rfloor \lceil \rceil \{ \}",
    ),
    *(f"\\{name}" for name in FUNCTIONS.split("|")),
    *(letter.strip() for letter in GREEK.values() if "omicron" not in letter),
    *re.findall(r"\S+", r"\Delta \Theta \Lambda \Phi \Psi \Omega \varphi \hbar \ell"),
}
# Letters that the parser would take for constants, under names that are not in _COMMANDS.
_MIXED = re.compile(r"(?<![\w.}])(\d+)(\\frac\{(\d+)\}\{(\d+)\})")
_LETTERS = {r"\gamma": r"\omicron ", "E": r"\Upsilon ", "I": r"\Xi "}


class Unreadable(Exception):
    """This text is not compared symbolically: the parser would misread it, or it is too large."""


def check_text(answer: str) -> None:
    """Raise Unreadable before the parser sees what it would misread, or not come back from."""
    depth = deepest = 0
    for token in TOKEN.findall(answer):
        depth += (token in OPEN) - (token in CLOSE)
        deepest = max(deepest, depth)
    binomials = re.findall(rf"\\binom{GROUP}{GROUP}", answer)  # the parser evaluates them
    large_binomial = any(re.search(r"\d{4}|[\^!]", binomial) for binomial in binomials)
    if len(answer) > 300 or deepest > 10 or answer.count("|") > 4 or large_binomial:
        raise Unreadable("too large")
    plain = re.sub(r"_\{\w*\}|\\[A-Za-z]+", "|", answer)
    if (
        not re.fullmatch(r"[A-Za-z0-9+\-/^_{}()\[\]|!.\\ ]*", answer)
        or not _COMMANDS.issuperset(re.findall(r"\\[A-Za-z]+|\\.", answer))
        or re.search(r"\d_|__|\^\{?T", answer)  # T is taken for a transposition
        or re.search(r"[A-Za-z]{4}|!!|^[+-]{2}|\d +\d|mod|\.\.", plain)
    ):
        raise Unreadable("not an expression")


def check_size(tree) -> None:
    """Raise Unreadable if evaluating a parsed expression would make numbers without bound."""
    import sympy

    # In this order what a node is made of is known to be small.
    for node in sympy.postorder_traversal(tree):
        if node.func in (sympy.factorial, sympy.binomial, sympy.gamma) and any(
            part.is_number and abs(part.evalf(5)) > 1000 for part in node.args
        ):
            raise Unreadable("too large")
        if isinstance(node, sympy.Pow | sympy.exp) and node.exp.is_number:
            digits = 10
            if node.base.is_number:
                digits = abs(sympy.log(abs(node.base.evalf(5)), 10).evalf(5))
            if node.base != 0 and abs(node.exp.evalf(5)) * max(digits, 1) > 5000:
                raise Unreadable("too large")
        if node.func in (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
            raise Unreadable("not an expression")


@functools.lru_cache(maxsize=512)
def parsed(answer: str):
    """The sympy expression of a spelled answer; i is imaginary. Raises what the parser does."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    value = rational(answer)
    if value is not None and not re.search("[eE][+-]", answer):  # 2e-3 may be 2e less 3
        return sympy.Rational(value.numerator, value.denominator)
    if re.search(rf"\\(?:{FUNCTIONS})", answer):
        answer = answer.replace(r"^\circ", r"\cdot \frac{\pi}{180}")
    answer = re.sub(
        r"([A-Za-z])('+|\^\{(?:\\prime ?)+\})",
        lambda m: m[1] + "_{" + "prime" * len(re.findall(r"'|p", m[2])) + "}",
        answer,
    )
    check_text(answer)
    answer = _MIXED.sub(lambda m: f"({m[1]}+{m[2]})" if 0 < int(m[3]) < int(m[4]) else m[0], answer)
    # The parser would add 2(3), and knows no decimals.
    answer = re.sub(r"([\d)])(?= ?(?:[(\[{]|\\frac))|(\))(?= ?\d)", r"\1\2\\cdot ", answer)
    answer = re.sub(
        r"(\d*)\.(\d*)",
        lambda m: rf"{{\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}}}",
        answer,
    )
    answer = re.sub(r"\\[A-Za-z]+|[EI]", lambda m: _LETTERS.get(m[0], m[0]), answer)
    settings = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    tree = latex2sympy(answer, is_real=True, normalization_config=None, conversion_config=settings)
    if not isinstance(tree, sympy.Expr):
        raise Unreadable("not an expression")
    check_size(tree)
    # u(t) and dx/dt are as good as letters.
    unknown = tree.atoms(sympy.core.function.AppliedUndef, sympy.Derivative)
    letters = {f: sympy.Symbol(str(f)) for f in unknown}
    tree = tree.subs({**letters, sympy.Symbol("i", real=True): sympy.I}).doit()
    return tree if tree.has(sympy.I) else tree.replace(_is_odd_root, _real_root)


def _is_odd_root(node) -> bool:
    """Whether this is an odd root, which is real where what it is taken of is."""
    return node.is_Pow and node.exp.is_Rational and node.exp.q > 1 and node.exp.q % 2 == 1


def _real_root(node):
    """The real odd root of a real number, -2 of -8: sympy's is the first complex one."""
    import sympy

    base, exponent = node.args
    return sympy.sign(base) ** exponent.p * sympy.Abs(base) ** exponent


def equal_expressions(gold: str, answer: str, tolerance: float | None = None) -> bool:
    """Whether two spelled expressions are shown to be equal: at 50 digits, and then by algebra."""
    import sympy

    try:
        g, a = parsed(gold), parsed(answer)
        if g == a:
            return not g.has(sympy.zoo, sympy.nan)
        if tolerance and g.is_number and a.is_number:
            return bool(abs((g - a).evalf(50)) <= tolerance)
        return not differ(g, a) and is_zero(g - a)
    except Exception:  # whatever a parser or a computer algebra system trips over on a model's text
        return False


def equal_equations(golds: list[str], answers: list[str]) -> bool:
    """Whether two equations are one: the differences of their sides have a constant ratio."""
    try:
        g, a = ((parsed(left) - parsed(right)).expand() for left, right in (golds, answers))
        ratio = (g / a).cancel() if g and a else None
        return bool(ratio) and (ratio.is_number or ratio.simplify().is_number)
    except Exception:
        return False


def differ(g, a) -> bool:
    """Whether two expressions have different values, at 50 digits, at some points.

    Points out of the domain do not count, if there are others: \\ln a+\\ln b is \\ln(ab) where both
    are defined.
    """
    draw = random.Random(0)
    symbols = sorted(g.free_symbols | a.free_symbols, key=str)
    domain = _domain(g) | _domain(a)
    others = []  # points out of the domain, as complex numbers
    counted = 0
    ranges = itertools.cycle([(1, 300), (-300, -1), (-300, 300), (1, 3000)])
    for numerators in itertools.islice(ranges, 24 if domain else 4):
        point = {symbol: Fraction(draw.randint(*numerators), 97) for symbol in symbols}
        if any(not _is_at_least_zero(e.subs(point).evalf(20)) for e in domain):
            others.append(point)
        elif _differ_at(point, g, a):
            return True
        else:
            counted += 1
    return not counted and any(_differ_at(point, g, a) for point in others[:4])


def _domain(expression) -> set:
    """What is taken not to be negative: factors under even roots, in logarithms, below powers."""
    import sympy

    powers = expression.atoms(sympy.Pow)
    insides = {power.base for power in powers if not power.exp.is_integer}
    insides |= {logarithm.args[0] for logarithm in expression.atoms(sympy.log)}
    factors = {
        factor
        for inside in insides
        for factor, exponent in inside.as_powers_dict().items()
        if not (exponent.is_integer and exponent % 2 == 0)
    }
    return {factor for factor in factors if factor.free_symbols}


def _is_at_least_zero(value) -> bool:
    return value.is_real is True and value >= 0


def _differ_at(point: dict, g, a) -> bool:
    """Whether two expressions have different values at a point; not where one has none."""
    x, y = (e.subs(point).evalf(50) for e in (g, a))
    if not (x.is_number and y.is_number):
        return False
    return not abs(x - y) <= max(abs(x), abs(y)) * 1e-40


def is_zero(difference) -> bool:
    """Whether algebra shows it, the letters taken for positive: `differ` has tried the others."""
    import sympy

    symbols = difference.free_symbols
    positive = difference.subs({s: sympy.Symbol(s.name, positive=True) for s in symbols})
    apart = sympy.expand_log(sympy.expand_power_base(positive, force=True), force=True)
    if any(form.expand() == 0 or form.simplify() == 0 for form in (difference, positive, apart)):
        return True
    squares = difference.replace(  # of x^2-2x+1 the root is |x-1|
        lambda node: node.is_Pow and not node.exp.is_integer,
        lambda node: node.base.factor() ** node.exp,
    )
    if squares.simplify() == 0:
        return True
    return difference.equals(0) is True
