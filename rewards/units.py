r"""What stands behind a number: units as a product of powers, with scale words as factors.

`60\text{ km/h}` is 60, kilometer^1 and hour^-1;
`2\text{ million dollars}` is 2, dollar^1 and a factor of 1000000.
"""

import functools
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.notation import FUNCTIONS, RATIONALS

# A unit, and what else it is called. A name with a slash is a quotient.
_UNITS = """
meter m, centimeter cm, millimeter mm, kilometer km, nanometer nm, inch in, foot ft feet, yard yd,
mile mi, acre ac, gram g, kilogram kg kilo, milligram mg, pound lb, ounce oz, ton t,
second s sec, minute min, hour h hr, week wk, month mo, year yr, am AM, pm PM,
liter L l, milliliter mL ml, gallon gal, quart qt, pint pt, teaspoon tsp, tablespoon tbsp,
dollar $ buck usd USD, cent ct, percent % pct, point pts,
degree deg ^\\circ, celsius C, fahrenheit F, kelvin K, radian rad,
newton N, joule J, watt W, volt V, ampere A, mole mol, hertz Hz, pascal Pa,
kilowatt kW, megawatt MW, milliwatt mW,
person people ppl, man men, woman women, child children kid,
mile/hour mph, kilometer/hour kph kmh kmph, mile/gallon mpg
"""
_NAMES = {name: entry.split()[0] for entry in _UNITS.split(",") for name in entry.split()}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES["trillion"] = 10**12
# Parts in the plural only: 12 fifth graders are 12.
_PARTS = {"halves": 2, "thirds": 3, "fourths": 4, "fifths": 5, "sixths": 6, "sevenths": 7}
_PARTS |= {"eighths": 8, "ninths": 9, "tenths": 10, "hundredths": 100, "thousandths": 1000}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Behind a number these make another number of it.
_CHANGING = _words(
    "below under minus plus negative mod not no non or least most half factorial zero infinity",
)
# What follows these tells more of what is counted.
_OPEN_ENDED = _words("of for from with on")
# These name no unit.
_FILLERS = _words(
    "and a the left remaining total each more altogether extra only long wide tall high deep old"
    " away apart approximately about"
)
# Of few letters, and yet no products of variables.
_SHORT = _words(
    "of an in at on to by is as up it he we be so if are all the and for out off one our she who"
    " old after sq cu a egg ant arm ear eye owl"
)
_CURRENCY = re.compile(r'\\\$|"(euro|pound|yen)"')
_UNIT_TOKEN = re.compile(
    r"[A-Za-z]+(?:'(?:s(?![A-Za-z]))?)?"  # a word: day, day's, days'
    r"|\^\{?-?\d\}?|\^\\circ|\\(?:cdot|times)|\\\$|[ \"/()%.-]",
)


@dataclass(frozen=True)
class Unit:
    """A product of powers of units, and the factor that its scale words make."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)


def _singular(word: str) -> str:
    """centimetres -> centimeter, boxes -> box, berries -> berry."""
    word = re.sub(r"(met|lit)re", r"\1er", word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if re.search(r"(?:ch|sh|x|ss)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _scale(word: str) -> Fraction | None:
    """The factor that a scale word is."""
    if word in _PARTS:
        return Fraction(1, _PARTS[word])
    factor = _SCALES.get(word, _SCALES.get(_singular(word)))
    return None if factor is None else Fraction(factor)


def _unit_name(word: str) -> str:
    """The name of the unit that a word is: one in _UNITS, or the word in the singular."""
    for form in (word, word.lower(), _singular(word), _singular(word.lower())):
        if form in _NAMES:
            return _NAMES[form]
    return _singular(word if len(word) < 4 else word.lower())


def _is_word(word: str) -> bool:
    """Whether letters in no \\text{} behind a number are a word, and no product of variables."""
    if word in _SHORT:
        return True
    known = _unit_name(word) in _NAMES or _scale(word.lower()) is not None
    if len(word) < 3:
        return len(word) == 2 and known
    # Three letters: a consonant, a vowel, a letter, as in hat.
    noun = re.fullmatch("[b-df-hj-np-tv-z][aeiou][a-z]", word)
    return known or len(word) > 3 or noun is not None


class _UnitReader:
    """Reads what stands behind a number, token by token."""

    def __init__(self):
        self.powers: dict[str, int] = {}
        self.factor = Fraction(1)
        self.last: tuple[str, int] | None = None  # the unit that an exponent raises, and its sign
        self.sign = self.power = 1  # of the next unit
        self.grouped = False  # in parentheses, whose units share a sign

    def add(self, name: str, power: int) -> None:
        self.powers[name] = self.powers.get(name, 0) + power

    def unit(self, word: str) -> None:
        above, _, below = _unit_name(word).partition("/")
        self.add(above, self.sign * self.power)
        if below:
            self.add(below, -self.sign)
        self.last = (above, self.sign)
        self.power = 1
        self.sign = self.sign if self.grouped else 1

    def ended_by(self, word: str) -> bool:
        """Whether the rest tells more of what is counted. `in` is an inch where a unit is due."""
        expecting = self.last is None or self.sign < 0 or self.power > 1
        return word in _OPEN_ENDED or (word == "in" and not expecting)

    def word(self, word: str) -> bool:
        """Take one word. False: it makes this no unit."""
        word = re.sub("'s?$", "", word)
        lower = word.lower()
        if lower in _CHANGING or (len(word) == 1 and word not in _NAMES and word != "a"):
            return False
        if word == "a" and not self.powers:  # 7 a is a product
            return False
        if lower == "per" or (lower in ("a", "an") and word not in _NAMES and self.powers):
            self.sign = -1
        elif lower in ("squared", "cubed"):
            return self.raised(2 if lower == "squared" else 3)
        elif lower in ("square", "sq", "cubic", "cu"):
            self.power = 2 if lower in ("square", "sq") else 3
        elif (factor := _scale(lower)) is not None:
            self.factor *= factor**self.sign
        elif lower not in _FILLERS and lower != "an":
            self.unit(word)
        return True

    def raised(self, power: int) -> bool:
        if self.last is None:
            return False
        self.add(self.last[0], self.last[1] * (power - 1))
        return True


@functools.lru_cache(maxsize=1024)
def read_unit(text: str, letters: bool = False) -> Unit | None:
    """The unit that `text`, which stands behind a value, is. None: it is none.

    letters: those that are units count without a \\text{}, too.
    """
    if base := re.fullmatch(r"_\{(\d+)\}", text):  # may be left out like a unit
        return Unit(((f"base {base[1]}", 1),))
    text = text.replace("per cent", "percent")
    tokens = _UNIT_TOKEN.findall(text)
    named = any(token[0].isalpha() or token in ("%", r"^\circ", r"\$") for token in tokens)
    if "".join(tokens) != text or not named or text.startswith(".") or tokens[0] in _SHORT:
        return None
    reader = _UnitReader()
    letters = letters or re.match(r" ?m/s(?![A-Za-z])", text) is not None
    quoted = marked = ended = False  # in a quote; behind one, a % or a degree; behind an `of`
    for token in tokens:
        quoted = quoted != (token == '"')
        marked = marked or token in ('"', r"^\circ", "%")
        if token[0].isalpha():
            ended = ended or reader.ended_by(token.lower())
            sure = quoted or (marked and not ended) or (letters and token in _NAMES)
            if not (sure or _is_word(token)) or not (ended or reader.word(token)):
                return None
        elif ended and token not in ' "().-':
            return None
        elif token in ("%", r"^\circ", r"\$"):
            reader.unit(token.strip("\\"))
        elif token == "/":
            reader.sign = -1
        elif token in "()":
            reader.grouped = token == "("
            reader.sign = reader.sign if reader.grouped else 1
        elif token[0] == "^" and not reader.raised(int(token.strip("^{}"))):
            return None
    if reader.sign < 0 and not reader.grouped:  # 7/
        return None
    powers = tuple(sorted((name, power) for name, power in reader.powers.items() if power))
    return Unit(powers, reader.factor)


def _behind_number(answer: str) -> int:
    """Where the longest rational number that the answer begins with ends."""
    end = max((match.end() for pattern in RATIONALS if (match := pattern.match(answer))), default=0)
    return 0 if answer[:end].endswith(".") else end  # 3. Conclusion


@functools.lru_cache(maxsize=4096)
def quantity(answer: str, letters: bool = False) -> tuple[str, Unit]:
    """(value, unit) of a spelled answer. Bare words are a unit behind a plain number only."""
    sign = _CURRENCY.match(answer)
    answer = answer[sign.end() :] if sign else answer
    value, unit = answer, Unit()
    mark = re.search(r'"|%|\^\\circ(?![A-Za-z])|(?<=\d)_\{\d+\}$', answer)
    for end in filter(None, (_behind_number(answer), mark.start() if mark else 0)):
        before, rest = answer[:end], answer[end:]
        of_function = rest.startswith(r"^\circ") and re.search(rf"\\(?:{FUNCTIONS})", before)
        found = read_unit(rest, letters) if rest and not of_function else None
        if found:
            value, unit = before.strip(), found
            break
    if sign:  # \$5\text{ dollars} are no square dollars
        currency = (_unit_name(sign[1] or "$"), 1)
        unit = replace(unit, powers=tuple(sorted({*unit.powers, currency})))
    return value, unit
