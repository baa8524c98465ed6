"""What a mathematical answer says, and whether two answers are equal: the graders `number` and `math`.

Both read the last balanced \\boxed{} of the text, wherever it stands; without one the score is 0. They reject when in
doubt: a wrong answer that is accepted is learned. `number` compares exact rationals; `math` adds symbolic equality,
which sympy and the LaTeX parser of math-verify decide (worker.py runs them where they can be killed). Their policies:

    no box, \\boxed 7, \\fbox{7}      0; of nested boxes the outer counts, of several the last that is closed
    2/4, 0.50, 1e2, 1\\frac34        equal 1/2, 1/2, 100, 7/4: values are compared, not their form
    0.333333 against 1/3            0: exact, unless the reference gives a tolerance
    10\\% against 10 or 0.1          1: a percentage equals its face value or a hundredth; of two, the face values count
    90^\\circ, 5\\text{ cm}, \\$5      a unit may be left out, not exchanged: 5\\text{ m} against 5\\text{ cm} is 0
    2,3 against 3,2 or \\{2,3\\}      1: order counts inside (), [) and matrices only, and (2,3) is no such list
    1,234                           one number; in brackets, or where the reference says `multiple`, two
    x=5 against 5                   1, either way round; y=5 against x=5 is 0
    x>2 against (2,\\infty)          1: an inequality for one name is its interval
    1:2 against 1/2                 0: a ratio equals a ratio only
    101_2 against 5, or 101_3       0; the base may be left out, like a unit
    Monday, (A)                     as text; case counts in one or two letters only
"""

import functools
import random
import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction


def last_box(text: str) -> str | None:
    """What the last balanced \\boxed{} holds, or None; in time linear in the text, whatever is left open in it."""
    opened, box = [], None
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if match[0] == "}" and opened:
            start = opened.pop()
            box = text[start : match.start()] if start else box
        elif match[0] == "{" or match[0].startswith("\\boxed"):
            opened.append(match.end() if match[0] != "{" else 0)
    return box


# --- reading an answer: one spelling, units, rationals ------------------------------------------------------------

LONGEST = 500  # characters in a box
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_GREEK = {c: f"\\{unicodedata.name(c).split()[-1].lower()} " for c in map(chr, range(945, 970))} | {"λ": r"\lambda "}
_SIGNS = str.maketrans(
    _GREEK
    | dict(zip("−–×·⋅÷°", ("-", "-", r"\times ", r"\cdot ", r"\cdot ", "/", r"^\circ "), strict=True))  # noqa: RUF001
    | dict(zip("≤≥≠∪∈±∞", (rf"\{name} " for name in "le ge ne cup in pm infty".split()), strict=True))  # noqa: RUF001, SIM905
    | {c: "^{" + unicodedata.normalize("NFKC", c) + "}" for c in "⁰¹²³⁴⁵⁶⁷⁸⁹"}
    | {c: r"\frac{" + unicodedata.normalize("NFKC", c).replace("\u2044", "}{") + "}" for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
)
_ARGUMENT = r"(\d|[A-Za-z]|\\[A-Za-z]+)"
_GROUP = r"\{[^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}"
_TEXT = (
    r"\\(?:text|math|mbox|operatorname)(?:bf|it|rm|sf|tt)?\s*\{([^{}]*)\}",
    lambda match: '"' + match[1].replace('"', "") + '"' if match[1] != "R" else match[0],
)
_SPELLING = [  # (what is written, one way to write it), applied in this order
    (r"√ ?(\d+|[A-Za-z])", r"\\sqrt{\1}"),
    (r'"', ""),
    *(_TEXT, _TEXT),  # one in the other
    (r'_\s*\{"\s*(\w*)\s*"\}', r"_{\1}"),
    (r'^"[^"]*(?:\b(?:is|are)|[=:]) *"', ""),  # the answer is
    (r"\\(?:left|right) ?\.|\\(?:left|right|[bB]igg?[lr]?|displaystyle|quad|qquad)(?![A-Za-z])", " "),
    (r"\{,\}", ","),
    (r"\\!", ""),
    (r"(\\\\) ?\[[^\]]*\]", r"\1"),  # a row's end with its distance
    (r"(?<!\\)\\[,;: ]|~|\s+", " "),
    (r"\\\$|\$", ""),
    (r"\\%", "%"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\([lg]e)(?:q|qslant)(?![A-Za-z])", r"\\\1 "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\neq(?![A-Za-z])", r"\\ne "),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"^\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?::|\||\\mid(?![a-z]))(.*)\\\}$", r"\1"),  # {x: x > 2}
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset "),
    (r"[\(\[] ?\\begin ?\{array\} ?\{[^{}]*\}(.*)\\end ?\{array\} ?[\)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"\\begin ?\{bmatrix\}(.*)\\end ?\{bmatrix\}", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r'"[ ,]*(?:or|and) *"|(?<=[\s\d\)\}\]"])(?:or|and)(?=[\s\d\(\\"])', ","),
    (r"(?<=[\)\]\}]) ?U ?(?=[\(\[\\])", r"\\cup "),
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    (rf"(?<![\\A-Za-z])(?:np\.)?({_FUNCTIONS}|sqrt|pi)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\^ ?\{ ?\\circ ?\}|\\degree(?![A-Za-z])", r"^\\circ "),
    (r"([\^_]) ?(-?\d+)", r"\1{\2}"),
    (rf"(\\sqrt(?: ?\[[^\]]*\])?) ?{_ARGUMENT}", r"\1{\2}"),
    (rf"\\frac ?{_ARGUMENT}", r"\\frac{\1}"),
    (rf"(\\frac ?{_GROUP}) ?{_ARGUMENT}", r"\1{\2}"),
    (r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)", lambda match: match[1].replace(" ", "")),
    (r" +", " "),
    (r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", ""),  # the other blanks part words, or numbers
    (r"(?<![\w\)\}\]])\+(?=\\infty)", ""),
    (r'^"([^"]*\d[^"]*|\([^"]\))"$', r"\1"),  # words stay quoted
    (r"(?<=.)\\(?:approx|simeq)(?![A-Za-z]).*", ""),
    (r"\\mathbb\{R\}|\\Reals", r"(-\\infty,\\infty)"),
    (r"(?<![\w\\}\]^])\{(-|[\w.]+)\}", r"\1"),
    (r"^(?:=|\\approx)|(?<!\.)\.$|[ ;:]+$", ""),
]
_SPELLING = [(re.compile(pattern, re.DOTALL), to) for pattern, to in _SPELLING]


@functools.lru_cache(maxsize=1024)
def spelled(answer: str) -> str:
    """The answer in one spelling of LaTeX. What a \\text{} holds stands in double quotes, and nothing else does."""
    answer = answer.translate(_SIGNS)
    for pattern, to in _SPELLING:
        answer = pattern.sub(to, answer)
    return answer


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_RATIONALS = [
    re.compile(rf"([+-]?)(?P<n>{_DECIMAL})(?:(?:e(?!\+)|(?:\\times|\\cdot) ?10\^\{{)(?P<power>[+-]?\d{{1,3}})\}}?)?"),
    re.compile(rf"([+-]?)(?P<whole>\d+)? ?(?:\\frac\{{(?P<n>[+-]?{_DECIMAL})\}}\{{(?P<d>[+-]?{_DECIMAL})\}})"),
    re.compile(rf"([+-]?)(?:(?P<whole>\d+) )?(?P<n>{_DECIMAL})/(?P<d>{_DECIMAL})"),
    re.compile(r"([+-]?)(?P<n>\d*\.\d*)\\overline\{(?P<repeated>\d+)\}"),
]
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?")
_MIXED = re.compile(r"(?<![\w.}])(\d+)(\\frac\{(\d+)\}\{(\d+)\})")
_LENGTHS = {"mm": "millimeter", "cm": "centimeter", "m": "meter", "km": "kilometer", "in": "inch", "ft": "feet"}
_UNITS = _LENGTHS | {"g": "gram", "kg": "kilogram", "s": "second", "h": "hour", "hr": "hour", "L": "liter"}
_UNIT = (
    r'(?:%|\^\\circ ?(?:"?[CF]"?)?|"[^"]*"|_\{\d+\}(?=$)|'  # a base counts as a unit
    r"(?<![A-Za-z\\])(?:mm|cm|km|kg|mg|ft|hr|min|mL|ml|[A-Za-z]{4,})(?![A-Za-z]))(?:\^\{-?\d\})?"
)
_WITH_UNIT = re.compile(rf"(.*?[^ /])((?:[ /]|\\cdot )*{_UNIT}(?:(?:[ /]|\\cdot )*{_UNIT})*)", re.DOTALL)


@functools.lru_cache(maxsize=4096)
def rational(answer: str) -> Fraction | None:
    """The exact value of a spelled integer, decimal, fraction, mixed number, power of ten or repeating decimal."""
    match = next(filter(None, (pattern.fullmatch(answer) for pattern in _RATIONALS)), None)
    if not match or len(answer) > 2000:  # Python reads no integers of more than 4,300 digits
        return None
    found = {name: text.replace(",", "") for name, text in match.groupdict().items() if text}
    n, d, whole = (Fraction(found.get(name, default)) for name, default in (("n", 0), ("d", 1), ("whole", 0)))
    if not d or (whole and not 0 < n < d):
        return None
    value = whole + n / d
    if "repeated" in found:
        place = Fraction(10) ** -len(found["n"].partition(".")[2])
        value += place * Fraction(int(found["repeated"]), 10 ** len(found["repeated"]) - 1)
    return (-1 if match[1] == "-" else 1) * value * Fraction(10) ** int(found.get("power", 0))


def plain_text(answer: str) -> str:
    """A spelled answer without quotes, and without blanks but those that part numbers."""
    return re.sub(r'(?<!\d) | (?!\d)|"', "", answer)


def without_unit(answer: str) -> tuple[str, str]:
    """(value, unit) of a spelled answer. Words without a \\text{} are a unit behind a plain number only."""
    match = _WITH_UNIT.fullmatch(answer)
    if not match or (r"\circ" in match[2] and re.search(rf"\\(?:{_FUNCTIONS})", match[1])):
        return answer, ""
    if re.search(r"[A-Za-z_]", re.sub(r'"[^"]*"|\\circ', "", match[2])) and rational(match[1]) is None:
        return answer, ""
    return match[1], re.sub(r'[" {}]', "", match[2].replace(r"^\circ", "degree"))


def same_unit(a: str, b: str) -> bool:
    """Whether two units are one: abbreviated, or in the singular, if they like."""
    a, b = sorted((re.sub("[A-Za-z]+", lambda m: _UNITS.get(m[0], m[0]), unit) for unit in (a, b)), key=len)
    return a == b or (len(a) >= 3 and b.startswith(a))


# --- comparing answers --------------------------------------------------------------------------------------------

_OPEN, _CLOSE = {"(", "[", "{", r"\{", r"\lfloor", r"\lceil", r"\begin"}, {")", "]", "}", r"\}", r"\rfloor", r"\rceil"}
_NAME = re.compile(  # x, f(2), \angle ABC, \overline{AB}, Area, (x,y)
    r"(?!.*\\(?:frac|sqrt|pi|cdot|times|emptyset|infty))[A-Za-z\\][A-Za-z\\ {}]*'*(?:\([^()]*\))?|\(\w(?:,\w)+\)"
)


def split(answer: str, *separators: str) -> list[str]:
    """The parts of a spelled answer between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"\\[A-Za-z]+|\\.|[^\\]", answer, re.DOTALL):
        depth += (match[0] in _OPEN) - (match[0] in _CLOSE or match[0] == r"\end")
        if depth == 0 and match[0] in separators:
            parts.append(answer[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, answer[start:]]]


def bracketed(answer: str, opened: str = r"\(|\[|\\\{", closed: str = r"\)|\]|\\\}") -> tuple[str, str, str] | None:
    """(opening bracket, inside, closing bracket), where one pair holds the whole answer."""
    match = re.fullmatch(rf"({opened})(.*)({closed})", answer, re.DOTALL)
    depth = 1
    for token in re.findall(r"\\[A-Za-z]+|\\.|[^\\]", match[2]) if match else ():
        depth += (token in _OPEN) - (token in _CLOSE or token == r"\end")
        if depth == 0:
            return None
    return match.groups() if match and depth == 1 else None


def elements(answer: str, multiple: bool = False) -> list[str]:
    """The values of a list or set (their order means nothing), with each +- both ways."""
    brackets = bracketed(answer)
    if brackets and brackets[::2] == (r"\{", r"\}"):
        return elements(brackets[1], multiple=True)
    parts = [answer] if _THOUSANDS.fullmatch(answer) and not multiple else split(answer, ",", ";")
    signs = [("+", "-"), ("-", "+")]
    return [
        re.sub(r"\\mp ?", lower, re.sub(r"\\pm ?", upper, part))
        for part in parts
        for upper, lower in (signs if re.search(r"\\(?:pm|mp)(?![A-Za-z])", part) else signs[:1])
    ]


def region(answer: str) -> tuple[str, str]:
    """(interval, name) of an inequality for one name, or of `name \\in set`; else (answer, "")."""
    name, *inside = split(answer, r"\in")
    if len(inside) == 1 and _NAME.fullmatch(name):
        return inside[0], name
    sides, signs = split(answer, "<", ">", r"\le", r"\ge"), re.findall(r"<|>|\\[lg]e(?![A-Za-z])", answer)
    names = [i for i, side in enumerate(sides) if _NAME.fullmatch(side)]
    if len(sides) != len(signs) + 1 or len(names) != 1 or len({sign.strip("\\")[0] in "<l" for sign in signs}) != 1:
        return answer, ""
    if signs[0] in (">", r"\ge"):
        sides, signs, names = sides[::-1], signs[::-1], [len(signs) - names[0]]
    at = names[0]
    if len(sides) > 2 and (len(sides), at) != (3, 1):
        return answer, ""
    low = ("(" if signs[at - 1] in "<>" else "[") + sides[at - 1] if at else r"(-\infty"
    high = sides[at + 1] + (")" if signs[at] in "<>" else "]") if at < len(signs) else r"\infty)"
    return f"{low},{high}", sides[at]


def values(answer: str) -> tuple[str, list[str]]:
    """(name, the sides that give it) of a spelled `name = value = ...`; ("", [answer]) otherwise."""
    name, *sides = split(answer, "=")
    name = name.replace('"', "")
    bare = re.sub(r"_(?:\{[^{}]*\}|\w)|\^\{-1\}", "", name)  # of a_{n+1}, of f^{-1}(x)
    return (name, sides) if sides and _NAME.fullmatch(bare) else ("", [answer])


@dataclass(frozen=True)
class Gold:
    """A reference: the published answer, and how to read it. `same` compares spelled answers, parts by parts."""

    answer: str
    multiple: bool = False  # several values separated by commas: 1,234 are two
    tolerance: float | None = None  # absolute, for numbers
    unit: str | None = None  # of the answer, where it does not name it itself
    symbolic: bool = False  # whether expressions may be compared by sympy
    literal: bool = True  # whether equal spelling is enough; off in tests of everything else

    def same(self, gold: str, answer: str) -> bool:
        if self.literal and plain_text(gold) == plain_text(answer):
            return True
        if not (gold + answer).isascii():  # `spelled` translates what has a meaning
            return False
        golds, answers = ([region(e) for e in elements(side, self.multiple)] for side in (gold, answer))
        if len(golds) > 1 or len(answers) > 1:
            golds, answers = (self._union(side) for side in (golds, answers))
        if len(golds) > 1 or len(answers) > 1:
            return self._matched([g for g, _ in golds], [a for a, _ in answers])
        ((gold, gold_name),), ((answer, name),) = golds, answers
        if gold_name and name and gold_name != name:
            return False
        gold_name, gold_values = values(gold)
        name, answer_values = values(answer)
        alone = [len(split(side, "=")) == 1 for side in (gold, answer)]
        if (gold_name or name) and (any(alone) or name == gold_name):
            return all(self.same(gold_values[-1], value) for value in answer_values)
        return self._same_structure(gold, answer)

    def _union(self, regions: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Inequalities for one name, one or the other: a union. Any other list as it is."""
        name = regions[0][1]
        return [(r"\cup ".join(r for r, _ in regions), name)] if name and {n for _, n in regions} == {name} else regions

    def _matched(self, golds: list[str], answers: list[str]) -> bool:
        """Whether the two lists hold the same values, in any order."""
        rest = list(answers)
        for gold in golds if len(golds) == len(answers) else ():
            found = next((i for i, answer in enumerate(rest) if self.same(gold, answer)), None)
            if found is None:
                return False
            del rest[found]
        return len(golds) == len(answers)

    def _in_order(self, golds: list[str], answers: list[str]) -> bool:
        inside = replace(self, multiple=True)
        return len(golds) == len(answers) and all(map(inside.same, golds, answers))

    def _same_structure(self, gold: str, answer: str) -> bool:
        """Unions, ratios, equations, matrices, tuples and intervals; else one value each."""
        for separator, compare in ((r"\cup", self._matched), (":", self._in_order)):
            golds, answers = split(gold, separator), split(answer, separator)
            if len(golds) > 1 or len(answers) > 1:
                return compare(golds, answers)
        golds, answers = split(gold, "="), split(answer, "=")
        if len(golds) > 1 or len(answers) > 1:
            return self.symbolic and len(golds) == len(answers) == 2 and equal_equations(golds, answers)
        matrices = [bracketed(side, r"\\begin\{[pv]matrix\}", r"\\end\{[pv]matrix\}") for side in (gold, answer)]
        if any(matrices):
            if not all(matrices) or matrices[0][0] != matrices[1][0]:
                return False
            golds, answers = ([row.split("&") for row in m[1].removesuffix(r"\\").split(r"\\")] for m in matrices)
            same_shape = [len(row) for row in golds] == [len(row) for row in answers]
            return same_shape and self._in_order([c for row in golds for c in row], [c for row in answers for c in row])
        brackets = [bracketed(side) or ("", side, "") for side in (gold, answer)]
        golds, answers = (split(inside, ",", ";") if opened else [inside] for opened, inside, _ in brackets)
        if len(golds) > 1 or len(answers) > 1:
            return brackets[0][::2] == brackets[1][::2] and self._in_order(golds, answers)
        return self._same_value(gold, answer)

    def _same_value(self, gold: str, answer: str) -> bool:
        gold, gold_unit = without_unit(gold)
        answer, unit = without_unit(answer)
        if self.unit and not gold_unit:
            gold_unit = without_unit("1 " + spelled(self.unit))[1]
        if gold_unit and unit and not same_unit(gold_unit, unit):
            return False
        gold, answer = (b[1] if (b := bracketed(side, r"\(", r"\)")) else side for side in (gold, answer))
        g, a = rational(gold), rational(answer)
        if g is not None and a is not None:
            one_percent = (gold_unit == "%") != (unit == "%")
            scales = (1, Fraction(1, 100) if unit == "%" else 100) if one_percent else (1,)
            return any(abs(g - a * scale) <= Fraction(str(self.tolerance or 0)) for scale in scales)
        words = [plain_text(side) for side in (gold, answer)]
        words = [word if len(word) < 3 else word.lower() for word in words]
        if words[0] == words[1] and re.fullmatch(r"[A-Za-z][A-Za-z'.-]*", words[0]):
            return True
        return self.symbolic and equal_expressions(gold, answer, self.tolerance)


def grade_answer(text: str, reference, symbolic: bool, literal: bool = True) -> tuple[float, str]:
    """Compare what the last box of `text` holds with a reference: the published answer (a number, or a text that may
    hold $, \\boxed{} or GSM8K's ####), or a dict of Gold's `answer`, `multiple`, `tolerance` and `unit`.

    TypeError: the dict has other keys.
    """
    gold = Gold(**reference) if isinstance(reference, dict) else Gold(str(reference))
    gold = replace(gold, symbolic=symbolic, literal=literal)
    box, published = last_box(text), str(gold.answer).rpartition("####")[2]
    published = last_box(published) or published
    if box is None:
        return 0.0, "no box"
    while inner := bracketed(box.strip(), r"\\boxed\s*\{", r"\}"):
        box = inner[1]
    if len(box) > max(LONGEST, 3 * len(published)):
        return 0.0, f"the answer is longer than {LONGEST} characters"
    if spelled(box) and gold.same(spelled(published), spelled(box)):
        return 1.0, "right"
    return 0.0, f"answered {box[:80]}, expected {published.strip()[:80]}"


def grade_number(text: str, reference) -> tuple[float, str]:
    """The answer is one rational number, or several: exact, no algebra. Cheap."""
    return grade_answer(text, reference, symbolic=False)


def grade_math(text: str, reference) -> tuple[float, str]:
    """As `number`, and expressions may be equal symbolically. To be run in a worker: it may take forever."""
    return grade_answer(text, reference, symbolic=True)


# --- symbolic equality (in a worker) ------------------------------------------------------------------------------

_COMMANDS = {  # what the parser reads as it is meant; anything else can be equal in spelling only
    *re.findall(r"\S+", r"\frac \sqrt \pi \cdot \times \div \infty \binom \lfloor \rfloor \lceil \rceil \{ \}"),
    *(f"\\{name}" for name in _FUNCTIONS.split("|")),
    *(letter.strip() for letter in _GREEK.values() if "omicron" not in letter),
    *re.findall(r"\S+", r"\Delta \Theta \Lambda \Phi \Psi \Omega \varphi \hbar \ell"),
}
# Letters that the parser would take for constants, under names that are not in _COMMANDS.
_LETTERS = {r"\gamma": r"\omicron ", "E": r"\Upsilon ", "I": r"\Xi "}


class Unreadable(Exception):
    """This text is not compared symbolically: it is no expression that the parser reads right, or it is too large."""


def check_text(answer: str) -> None:
    """Raise Unreadable before the parser sees what it would misread, or not come back from."""
    depth = deepest = 0
    for token in re.findall(r"\\[A-Za-z]+|\\.|[^\\]", answer):
        depth += (token in _OPEN) - (token in _CLOSE)
        deepest = max(deepest, depth)
    binomials = re.findall(rf"\\binom{_GROUP}{_GROUP}", answer)  # the parser evaluates them
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
    """Raise Unreadable if evaluating a parsed, unevaluated expression would make numbers or terms without bound."""
    import sympy

    for node in sympy.postorder_traversal(tree):  # so that what a node is made of is known to be small
        if node.func in (sympy.factorial, sympy.binomial, sympy.gamma) and any(
            part.is_number and abs(part.evalf(5)) > 1000 for part in node.args
        ):
            raise Unreadable("too large")
        if isinstance(node, sympy.Pow | sympy.exp) and node.exp.is_number:
            digits = abs(sympy.log(abs(node.base.evalf(5)), 10).evalf(5)) if node.base.is_number else 10
            if node.base != 0 and abs(node.exp.evalf(5)) * max(digits, 1) > 5000:
                raise Unreadable("too large")
        if node.func in (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit):
            raise Unreadable("not an expression")


@functools.lru_cache(maxsize=512)
def parsed(answer: str):
    """The sympy expression of a spelled answer, exact; i is imaginary. Raises whatever the parser raises."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

    if (value := rational(answer)) is not None:
        return sympy.Rational(value.numerator, value.denominator)
    if re.search(rf"\\(?:{_FUNCTIONS})", answer):
        answer = answer.replace(r"^\circ", r"\cdot \frac{\pi}{180}")
    answer = re.sub(
        r"([A-Za-z])('+|\^\{(?:\\prime ?)+\})",
        lambda m: m[1] + "_{" + "prime" * len(re.findall(r"'|p", m[2])) + "}",
        answer,
    )
    check_text(answer)
    answer = _MIXED.sub(lambda m: f"({m[1]}+{m[2]})" if 0 < int(m[3]) < int(m[4]) else m[0], answer)
    answer = re.sub(r"([\d)])(?= ?(?:[(\[{]|\\frac))|(\))(?= ?\d)", r"\1\2\\cdot ", answer)  # it would add 2(3)
    answer = re.sub(r"(\d*)\.(\d*)", lambda m: rf"{{\frac{{{m[1]}{m[2]}}}{{1{'0' * len(m[2])}}}}}", answer)
    answer = re.sub(r"\\[A-Za-z]+|[EI]", lambda m: _LETTERS.get(m[0], m[0]), answer)
    settings = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    tree = latex2sympy(answer, is_real=True, normalization_config=None, conversion_config=settings)
    if not isinstance(tree, sympy.Expr):
        raise Unreadable("not an expression")
    check_size(tree)
    unknown = tree.atoms(sympy.core.function.AppliedUndef, sympy.Derivative)  # u(t), dx/dt: as good as letters
    return tree.subs({**{f: sympy.Symbol(str(f)) for f in unknown}, sympy.Symbol("i", real=True): sympy.I}).doit()


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
    """Whether `left = right` is the same equation twice: their differences have a constant, nonzero ratio."""
    try:
        g, a = ((parsed(left) - parsed(right)).expand() for left, right in (golds, answers))
        ratio = (g / a).cancel() if g and a else None
        return bool(ratio) and (ratio.is_number or ratio.simplify().is_number)
    except Exception:
        return False


def differ(g, a) -> bool:
    """Whether two expressions have different values, at 50 digits, at some points or (numbers) as they are."""
    draw = random.Random(0)
    symbols = sorted(g.free_symbols | a.free_symbols, key=str)
    for _ in range(4):
        point = {symbol: Fraction(draw.randint(-300, 300), 97) for symbol in symbols}
        x, y = (e.subs(point).evalf(50) for e in (g, a))
        if not (x.is_number and y.is_number):
            continue
        if not abs(x - y) <= max(abs(x), abs(y)) * 1e-40:
            return True
    return False


def is_zero(difference) -> bool:
    """Whether algebra shows it."""
    return difference.expand() == 0 or difference.simplify() == 0 or difference.equals(0) is True
