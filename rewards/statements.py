r"""What an answer states: values of a list, names bound to values, sets of numbers, matrices."""

import itertools
import re
import string
from dataclasses import dataclass
from fractions import Fraction

from rewards.notation import bracketed, rational, split

_NAME = re.compile(  # x, f(2), \angle ABC, \overline{AB}, Area, (x,y)
    r"(?!.*\\(?:frac|sqrt|pi|cdot|times|emptyset|infty|binom))"
    r"[A-Za-z\\][A-Za-z\\ {}]*'*(?:\([^()]*\))?|\(\w(?:[,;]\w)+\)"
)
# Numbers with commas and no other commas between them.
_THOUSANDS = re.compile(r"(?:(?:[^,]*[^\d,.])?\d{1,3}(?:,\d{3})+(?!\d))+[^,]*", re.DOTALL)
_LETTERS = set(string.ascii_letters)
_CHOICE = re.compile(  # a letter and no other, and what it stands for
    r'"\(([A-H])\)"(?!\\(?:lor|land|cup|cap|in|setminus|cdot|times)(?![A-Za-z])|[,;=<>+*/^_!)-])'
    r"((?:(?!\([A-H]\)).)+)",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"(.*?)(?:\\cdot|\\times)? ?\\begin\{([pv]matrix)\}(.*)\\end\{\2\}"
    r"(\^\{?(?:T|\\top|\\intercal)\}?)?(?:(?:\\cdot|\\times) ?(.+))?",
    re.DOTALL,
)
_SIGN = re.compile(r"<|>|\\(?:le|ge|ne)(?![A-Za-z])")


def set_members(answer: str) -> list[str] | None:
    r"""What stands in the braces of a set \{a, b\}; None where there are none."""
    brackets = bracketed(answer, r"\\\{", r"\\\}")
    return split(brackets[1], ",", ";", r"\land", r"\lor") if brackets else None


def named_members(clause: str) -> list[str]:
    """(x,y)=(1,2) as x=1 and y=2, (1,2) as 1 and 2; any other clause as it is."""
    name, sides = bound(clause)
    brackets = bracketed(sides[-1], r"\(", r"\)")
    members = split(brackets[1], ",", ";") if brackets else []
    names = split(name[1:-1], ",") if name.startswith("(") else [""] * len(members) * (not name)
    if len(members) < 2 or len(sides) > 1 or len(names) != len(members):
        return [clause]
    return [f"{n}={member}" if n else member for n, member in zip(names, members, strict=True)]


def matrix(answer: str) -> tuple[str, list[list[str]]] | None:
    """(kind, rows) of a matrix, with a factor multiplied into its entries and ^T carried out."""
    match = _MATRIX.fullmatch(answer)
    if not match:
        return None
    before, kind, inside, transposed, behind = match.groups(default="")
    factor = behind or {"-": "-1"}.get(before, before)
    if r"\begin" in factor + inside or (factor and kind == "vmatrix") or (before and behind):
        return None
    rows = [row.split("&") for row in inside.removesuffix(r"\\").split(r"\\")]
    if factor:
        rows = [[_product(factor, entry) for entry in row] for row in rows]
    if transposed:
        rows = [list(column) for column in zip(*rows, strict=False)]
    return kind, rows


def _product(factor: str, entry: str) -> str:
    x, y = rational(factor), rational(entry)
    return rf"({factor})\cdot ({entry})" if x is None or y is None else str(x * y)


def choice(answer: str) -> tuple[str, str]:
    """(letter, text) of the answer to a multiple choice that names both; ("", answer) otherwise."""
    match = _CHOICE.fullmatch(answer)
    return (match[1], match[2]) if match else ("", answer)


def bound(clause: str) -> tuple[str, list[str]]:
    """(name, the sides that give it) of `name = value = ...`; ("", all sides) otherwise."""
    clause, *rounded = split(clause, r"\approx")
    name, *sides = split(clause, "=")
    if not sides and rounded and _is_name(name):
        sides = rounded[:1]
    if len(sides) == 1 and _is_name(sides[0]) and not _is_name(name):  # 5 = x
        name, sides = sides[0], [name]
    if sides and _is_name(name):
        return name.replace('"', "").replace(";", ","), sides
    return "", [name, *sides]


def steps(sides: list[str]) -> list[str]:
    r"""The sides before the last that give its value, too; not \pi r^2, a formula for 9\pi."""
    letters = [set(re.sub(r'\\[A-Za-z]+|"[^"]*"', "", side)) & _LETTERS for side in sides]
    return [side for side, found in zip(sides[:-1], letters, strict=False) if found <= letters[-1]]


def _is_name(side: str) -> bool:
    bare = re.sub(r'_(?:\{[^{}]*\}|\w)|\^\{-1\}|"', "", side)  # of a_{n+1}, of f^{-1}(x)
    return _NAME.fullmatch(bare) is not None


def name_of(clause: str) -> str:
    """What a clause says something about: the name in an equation or an inequality, or ""."""
    described = inequality(clause)
    return described[0] if described else bound(clause)[0]


def clauses(answer: str, multiple: bool = False) -> list[str]:
    r"""The values of a list, the statements that `and`, `or` and commas join; each \pm both ways.

    multiple: 1,234 are two.
    """
    name, sides = bound(answer)
    name, inside = (name, sides[-1]) if name else _element_of(answer)
    if (members := set_members(inside if name else answer)) is not None:
        members = [f"{name}={member}" if name else member for member in members]
        return [value for member in members for value in _signs(member)]
    parts = [part for either in split(answer, r"\lor") for part in _joined(either, multiple)]
    return [value for part in parts for value in _signs(part)]


def _joined(answer: str, multiple: bool = False) -> list[str]:
    """What commas and `and` join."""
    found = []
    for part in split(answer, ";", r"\land"):
        whole = _THOUSANDS.fullmatch(part) and not multiple
        found += [part] if whole else split(part, ",")
    return found


def _element_of(answer: str) -> tuple[str, str]:
    r"""(name, set) of `name \in set`; ("", answer) otherwise."""
    name, *inside = split(answer, r"\in")
    return (name, inside[0]) if len(inside) == 1 and _is_name(name) else ("", answer)


def _signs(value: str) -> list[str]:
    r"""A value with its \pm both ways, each for itself; with a \mp, all together."""
    marks = re.findall(r"\\(?:pm|mp)(?![A-Za-z])", value)
    if not marks or len(marks) > 4:
        return [value]
    linked = r"\mp" in marks
    found = []
    for upper in itertools.product("+-", repeat=1 if linked else len(marks)):
        ways = iter(upper * len(marks))

        def sign(match: re.Match, ways=ways) -> str:
            way = next(ways)
            return way if match[1] == "p" else {"+": "-", "-": "+"}[way]

        found.append(_sum(re.sub(r"\\(p|m)[pm](?![A-Za-z]) ?", sign, value)))
    return found


def _sum(value: str) -> str:
    """5+2, from 5\\pm2, as 7; anything else as it is."""
    match = re.fullmatch(r"(.+)([+-])(.+)", value)
    x, y = (rational(match[1]), rational(match[3])) if match else (None, None)
    return value if x is None or y is None else str(x + y if match[2] == "+" else x - y)


@dataclass(frozen=True)
class Interval:
    """The numbers between two spelled ends; `closed` says of either whether it belongs."""

    low: str
    high: str
    closed: tuple[bool, bool]

    def ends(self) -> tuple | None:
        """(low, high) as numbers, or None where one is not rational."""
        low, high = (_number(end) for end in (self.low, self.high))
        return None if low is None or high is None else (low, high)


def _number(end: str) -> Fraction | float | None:
    infinities = {r"\infty": float("inf"), r"-\infty": -float("inf")}
    return infinities[end] if end in infinities else rational(end)


REALS = [Interval(r"-\infty", r"\infty", (False, False))]


def inequality(clause: str) -> tuple[str, list[Interval]] | None:
    r"""(name, where it lies) of an inequality for one name, or of `name \in set`."""
    name, inside = _element_of(clause)
    if name:
        found = intervals(inside)
        return (name, found) if found is not None and set_members(inside) is None else None
    sides, signs = split(clause, "<", ">", r"\le", r"\ge", r"\ne"), _SIGN.findall(clause)
    if not signs or len(sides) != len(signs) + 1:
        return None
    if signs in (["<"], [r"\le"], [">"], [r"\ge"]) and (absolute := _absolute(sides, signs[0])):
        return absolute
    names = [i for i, side in enumerate(sides) if _is_name(side)]
    if len(names) != 1:
        return None
    if signs == [r"\ne"]:
        return sides[names[0]], without(REALS, [sides[1 - names[0]]])
    if len({sign.strip("\\")[0] in "<l" for sign in signs}) != 1 or r"\ne" in signs:
        return None
    if signs[0] in (">", r"\ge"):
        sides, signs, names = sides[::-1], signs[::-1], [len(signs) - names[0]]
    at = names[0]
    if len(sides) > 2 and (len(sides), at) != (3, 1):
        return None
    low, low_closed, high, high_closed = r"-\infty", False, r"\infty", False
    if at:
        low, low_closed = sides[at - 1], signs[at - 1] in (r"\le", r"\ge")
    if at < len(signs):
        high, high_closed = sides[at + 1], signs[at] in (r"\le", r"\ge")
    return sides[at], [Interval(low, high, (low_closed, high_closed))]


def _absolute(sides: list[str], sign: str) -> tuple[str, list[Interval]] | None:
    """(name, where it lies) of |x - a| < r, or of r > |x - a|."""
    if "|" not in sides[0]:
        sides, sign = sides[::-1], {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[sign]
    match = re.fullmatch(r"\|([A-Za-z])([-+][^|]+)?\|", sides[0])
    if not match:
        return None
    shift, radius = rational(match[2] or "0"), rational(sides[1])
    if shift is not None and radius is not None:
        low, high = str(-shift - radius), str(-shift + radius)
    else:
        low, high = (f"-({match[2] or 0}){way}({sides[1]})" for way in "-+")
    closed = sign in (r"\le", r"\ge")
    if sign in ("<", r"\le"):
        return match[1], [Interval(low, high, (closed, closed))]
    below = Interval(r"-\infty", low, (False, closed))
    return match[1], [below, Interval(high, r"\infty", (closed, False))]


def intervals(answer: str) -> list[Interval] | None:
    r"""The intervals of a set of numbers, as (1,2)\cup\{5\}; None where it is none."""
    whole, *removed = split(answer, r"\setminus")
    if removed:
        found, points = intervals(whole), [set_members(part) for part in removed]
        if found is None or None in points:
            return None
        return without(found, [point for members in points for point in members])
    found = []
    for part in split(answer, r"\cup"):
        brackets = bracketed(part)
        ends = split(brackets[1], ",", ";") if brackets else []
        if brackets and brackets[0] == r"\{":
            found += [Interval(point, point, (True, True)) for point in ends]
        elif len(ends) == 2:
            found.append(Interval(*ends, (brackets[0] == "[", brackets[2] == "]")))
        else:
            return None
    return found


def without(found: list[Interval], points: list[str]) -> list[Interval] | None:
    """Intervals less some points. None: their order is not known."""
    for point in points:
        outside = [
            Interval(r"-\infty", point, (False, False)),
            Interval(point, r"\infty", (False, False)),
        ]
        found = intersection(found, outside)
        if found is None:
            return None
    return found


def intersection(some: list[Interval], others: list[Interval]) -> list[Interval] | None:
    """What lies in both. None: the order of their ends is not known."""
    found = []
    for a, b in itertools.product(some, others):
        low = _tighter((a.low, a.closed[0]), (b.low, b.closed[0]), lower=True)
        high = _tighter((a.high, a.closed[1]), (b.high, b.closed[1]), lower=False)
        if low is None or high is None:
            return None
        piece = Interval(low[0], high[0], (low[1], high[1]))
        ends = piece.ends()
        if ends is None or ends[0] < ends[1] or (ends[0] == ends[1] and all(piece.closed)):
            found.append(piece)
    return found


def _tighter(a: tuple, b: tuple, lower: bool) -> tuple[str, bool] | None:
    """Of two ends, each with whether it belongs, the one that cuts off more."""
    unbounded = r"-\infty" if lower else r"\infty"
    if b[0] == unbounded:
        return a
    if a[0] == unbounded:
        return b
    both = a[0], a[1] and b[1]
    x, y = _number(a[0]), _number(b[0])
    if x is None or y is None:
        return both if a[0] == b[0] else None
    if x == y:
        return both
    return a if (x > y) == lower else b


def union(found: list[Interval]) -> list[Interval]:
    """The same numbers in as few intervals as there can be, where all ends are rational."""
    if any(interval.ends() is None for interval in found):
        return found
    merged: list[Interval] = []
    for new in sorted(found, key=lambda i: (i.ends()[0], not i.closed[0])):
        last = merged[-1] if merged else None
        if last is None or not _touch(last, new):
            merged.append(new)
            continue
        highest = max((last, new), key=lambda i: (i.ends()[1], i.closed[1]))
        merged[-1] = Interval(last.low, highest.high, (last.closed[0], highest.closed[1]))
    return merged


def _touch(left: Interval, right: Interval) -> bool:
    """Whether no number lies between two intervals, of which the first begins first."""
    end, start = left.ends()[1], right.ends()[0]
    return start < end or (start == end and (left.closed[1] or right.closed[0]))


def region(answer: str, plain: bool = False) -> tuple[str, list[Interval]] | None:
    r"""(name, intervals) of an answer that describes a set of numbers: inequalities, unions.

    plain: (1,2) alone is one, too.
    """
    found, named = [], ""
    for alternative in split(answer, r"\lor"):
        described = _conjunction(alternative, plain)
        if described is None or (named and described[0] and named != described[0]):
            return None
        named = named or described[0]
        found += described[1]
    only_points = all(i.low == i.high for i in found) and not re.search(r"[<>]|\\[lg]e", answer)
    return None if only_points else (named, union(found))


def _conjunction(answer: str, plain: bool) -> tuple[str, list[Interval]] | None:
    """(name, intervals) of what holds together. If nothing can, commas mean `or`: x<1, x>2."""
    parts = _excluded(_joined(answer))
    described = [_described(part, plain) for part in parts]
    if None in described:
        return None
    names = {name for name, _ in described}
    if len(names) > 1 or (len(parts) > 1 and "" in names):
        return None
    together = described[0][1]
    for _, found in described[1:]:
        together = None if together is None else intersection(together, found)
    if together == [] and r"\land" not in answer:
        together = [interval for _, found in described for interval in found]
    return None if together is None else (names.pop(), together)


def _excluded(parts: list[str]) -> list[str]:
    r"""x\ne1, 2 and x\ne\pm1 as the inequalities that they are."""
    found: list[str] = []
    for part in parts:
        name, sign, _ = found[-1].partition(r"\ne") if found else ("", "", "")
        part = name + sign + part if sign and rational(part) is not None else part
        found += _signs(part) if r"\ne" in part else [part]
    return found


def _described(clause: str, plain: bool) -> tuple[str, list[Interval]] | None:
    """(name, intervals) of one clause."""
    if (found := inequality(clause)) is not None:
        return found
    name, sides = bound(clause)
    is_set = re.search(r"\\(?:cup|setminus)(?![A-Za-z])", sides[-1])
    if name and not is_set and not set_members(sides[-1]):
        return name, [Interval(sides[-1], sides[-1], (True, True))]
    found = intervals(sides[-1]) if is_set or (plain and not name) else None  # D = (1,2] is no x
    return None if found is None else ("", found)
