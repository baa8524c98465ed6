r"""How a mathematical answer is written: one spelling of LaTeX, and numbers.

Everything here reads one answer and compares nothing; answers.py compares. One pass, `spelled`,
brings an answer into one spelling, and keeps what the later rules need:

    "cm"            what a \text{} holds, in double quotes; nothing else stands in them
    ,  and  ;       a comma as it was; a semicolon for one before a blank: `12, 144` is no number
    \land, \lor     `and` and `or`, whether words or signs
    \$              a dollar; the $ around formulas is gone
"""

import functools
import re
import unicodedata
from fractions import Fraction

# --- one spelling -------------------------------------------------------------------------------

FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_ALPHABET = map(chr, range(945, 970))
GREEK = {letter: f"\\{unicodedata.name(letter).split()[-1].lower()} " for letter in _ALPHABET}
GREEK["λ"] = r"\lambda "
_SIGNS = {  # what it means in LaTeX: the characters that mean it
    "-": "−–‐‑⁃﹣",  # noqa: RUF001
    "/": "÷⁄∕",  # noqa: RUF001
    "|": "∣",  # noqa: RUF001
    "'": "′’",  # noqa: RUF001
    " ": "\u00a0\u2002\u2003\u2009\u200a\u202f\u3000",
    "": "\u200b\u2060\ufeff",
    r"\mathbb{R}": "ℝ",  # noqa: RUF001
    r"\times ": "×",  # noqa: RUF001
    r"\cdot ": "·⋅∙•",
    r"^\circ ": "°º",
    r"\le ": "≤⩽≦",
    r"\ge ": "≥⩾≧",
    r"\ne ": "≠",
    r"\approx ": "≈",
    r"\cup ": "∪",  # noqa: RUF001
    r"\cap ": "∩",
    r"\in ": "∈",
    r"\setminus ": "∖",  # noqa: RUF001
    r"\emptyset ": "∅",
    r"\land ": "∧",
    r"\lor ": "∨",  # noqa: RUF001
    r"\pm ": "±",
    r"\mp ": "∓",
    r"\infty ": "∞",
    r"\angle ": "∠",
    r"\langle ": "⟨〈",
    r"\rangle ": "⟩〉",
    r"\lfloor ": "⌊",
    r"\rfloor ": "⌋",
    r"\lceil ": "⌈",
    r"\rceil ": "⌉",
    r"\{": "｛",  # noqa: RUF001
    r"\}": "｝",  # noqa: RUF001
    ", ": "、",
    ".": "。",
    r"\ldots ": "…",
    r"\text{euro}": "€",
    r"\text{pound}": "£",
    r"\text{yen}": "¥￥",
    r"\text{ cent}": "¢￠",
}
_CHARACTERS = str.maketrans(
    GREEK
    | {chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}  # full width
    | {character: latex for latex, characters in _SIGNS.items() for character in characters}
    | {
        vulgar: r"\frac{" + unicodedata.normalize("NFKC", vulgar).replace("\u2044", "}{") + "}"
        for vulgar in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    }
)
_CONNECTIVES = {"and": r"\land ", "or": r"\lor "}
_SCRIPTS = {"^": "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "_": "₀₁₂₃₄₅₆₇₈₉₊₋"}
_ARGUMENT = r"(\d|[A-Za-z]|\\[A-Za-z]+)"
GROUP = r"\{[^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}"
_IN_BRACES = r"((?:[^{}]|\{[^{}]*\})*?)"
_UNIT_LETTERS = "msghLNJWVKCFA"  # 5\text{m} is a length, 5\mathrm{e} a product
_FONT = (
    r"\\(text|mbox|hbox|emph|operatorname|boldsymbol|bm|pmb|underline|"
    r"math(?:bf|it|rm|sf|tt|cal|scr|frak|bb|ord|op)|text(?:bf|it|rm|sf|tt|normal))\*?\s*"
)
_UNIT_TEXT = r" ?\\(?:text|mathrm) ?\{([^{}]*)\} ?(\^\{?\d\}?)? ?"


def _script(match: re.Match) -> str:
    """Raised or lowered characters, as LaTeX has them."""
    sign = "^" if match[0][0] in _SCRIPTS["^"] else "_"
    plain = unicodedata.normalize("NFKC", match[0]).replace("−", "-")  # noqa: RUF001
    return sign + "{" + plain + "}"


def _radical(match: re.Match) -> str:
    """A root's sign takes a whole number with it, unlike \\sqrt."""
    root = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}[match[1]]
    return root + (f"{{{match[2]}}}" if match[2] else "")


def _dollars(match: re.Match) -> str:
    r"""A whole answer, without the $ around formulas. One alone, before an amount, is a dollar."""
    answer = match[0]
    if len(re.findall(r"(?<!\\)\$", answer)) % 2:
        amount = r" ?-?[\d.,]*\d(?=\.?$| ?/| ?\\text| ?\(| ?[A-Za-z]{3})"
        answer = re.sub(rf"(?<!\\)\$(?={amount})", r"\\$", answer, count=1)
    return re.sub(r"(?<!\\)\$", "", answer)


def _font(match: re.Match) -> str:
    r"""What stands upright or bold: words in quotes; numbers, letters and functions as they are."""
    font, inside = match[1], match[2].replace('"', "")
    before = match.string[: match.start()]
    if font == "mathbb" and inside == "R":
        return match[0]
    if re.fullmatch(FUNCTIONS, inside):
        return f"\\{inside} "
    single = len(inside) == 1 and inside.isalpha()
    if font in ("mathcal", "mathscr", "mathfrak", "mathbb"):  # another letter
        return f"{inside}_{{{font}}}" if single else f'"{inside}"'
    unit = inside in _UNIT_LETTERS and font in ("text", "mathrm") and re.search(r"[\d}] ?$", before)
    if (single and not unit) or inside.startswith("\\") or not re.search("[A-Za-z]", inside):
        return " " * bool(re.search(r"\\[A-Za-z]+$", before)) + inside
    return f'"{inside}"'


def _accent(match: re.Match) -> str:
    r"""\vec{a} is a, as \mathbf{a} is; \hat{i} is i; any other accent makes another letter."""
    accent, letter = match[1], match[2] or match[3]
    if accent == "vec" or (accent == "hat" and letter in ("i", "j", "k")):
        return letter + " " * letter.startswith("\\")
    return f"{letter}_{{{accent}}}"


def _cases(match: re.Match) -> str:
    """A system of equations: a list. With &, a function defined by cases: as it is."""
    return match[0] if "&" in match[1] else re.sub(r" ?\\\\ ?", ", ", match[1])


def _connected(match: re.Match) -> str:
    r"""Quoted words that end or begin with `and` or `or`: the others stay quoted."""
    words = match[1]
    last = re.fullmatch(r"(.*?)[ ,]*\b(and|or) *", words, re.DOTALL)
    first = re.fullmatch(r"[ ,]*(and|or)\b(.*)", words, re.DOTALL)
    if last:
        quoted = f'"{last[1]}"' if last[1].strip() else ""
        return quoted + _CONNECTIVES[last[2]]
    return f'{_CONNECTIVES[first[1]]}"{first[2]}"' if first else match[0]


def _open_ends(match: re.Match) -> str:
    """]1,2[ as (1,2)."""
    return ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]")


_ACCENTS = (
    r"\\(vec|hat|bar|tilde|dot|ddot) ?"
    r"(?:\{ ?([A-Za-z]|\\[A-Za-z]+) ?\}|([A-Za-z])(?![A-Za-z]))",
    _accent,
)
_SPELLING = [  # (what is written, one way to write it), applied in this order
    # Characters and blanks.
    (f"[{_SCRIPTS['^']}]+|[{_SCRIPTS['_']}]+", _script),
    (r"([√∛∜]) ?(\d+|[A-Za-z])?", _radical),
    (r'"', ""),
    (r"^\s*(\*\*?|`)(.*)\1\s*$", r"\2"),  # Markdown's bold and code
    (r"^\s*\\[(\[](.*)\\[)\]]\s*$", r"\1"),
    (r"^\s*\\(?:Rightarrow|implies|therefore)(?![A-Za-z])", ""),
    (r"\\(?:text)?color ?\{[^{}]*\}", ""),
    (r"\\left ?<", "("),
    (r"\\right ?>", ")"),
    (r":=", "="),
    (r"(?<=\d)(?:\{,\}|,\\!) ?(?=\d{3})", ""),  # thousands
    (r"\{,\}", ","),
    (r"\\!", ""),
    (r"(\\\\) ?\[[^\]]*\]", r"\1"),  # a row's end with its distance
    (r"\\(?:left|right) ?\.", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|q?quad)(?![A-Za-z])", " "),
    (r"\\[hm]?space ?\{[^{}]*\}", " "),
    (r"(?<!\\)\\[,;: ]|~|\s+", " "),
    (r"\\text ?\{ ?\\?\$ ?\}", r"\\$"),
    (r"^.*$", _dollars),
    (r"US ?\\\$", r"\\$"),
    (r"([-+]) ?\\\$", r"\\$\1"),
    (r"\\%", "%"),
    # Letters and words.
    (rf"\\frac ?\{{{_UNIT_TEXT}\}} ?\{{{_UNIT_TEXT}\}}", r"\\text{ \1\2/(\3\4)}"),
    (r"\\(math(?:bf|it|rm|sf|bb)|boldsymbol|bm) ?([A-Za-z])(?![A-Za-z])", r"\\\1{\2}"),
    (r"\\Bbb(?![A-Za-z])|\\(?=R(?:eals)?(?![A-Za-z]))", r"\\mathbb"),
    (r"\\mathbb ?\{?R(?:eals)?\}?", r"\\mathbb{R}"),
    (r"(?<=\.)(\d*)\\dot ?\{?(\d)\}?(\d*)\\dot ?\{?(\d)\}?", r"\1\\overline{\2\3\4}"),
    (r"(?<=\.)(\d*)\\(?:bar|dot|overline) ?\{?(\d+)\}?", r"\1\\overline{\2}"),
    (r"(?<=\.)(\d*)\((\d+)\)$", r"\1\\overline{\2}"),
    # 0.333..., 0.1212...
    (r"(?<=\.)(\d*?)(?:(\d)\2\2+|(\d\d+?)\3+) ?(?:\\[lc]?dots|\.\.\.) ?$", r"\1\\overline{\2\3}"),
    (r"\\[ij]math(?![A-Za-z])", lambda m: m[0][1]),
    (r"\\(?:rm|bf|it)(?![A-Za-z]) ?", ""),
    (r"\\(?:overrightarrow|vec) ?\{ ?([A-Z]{2}) ?\}", r"\1_{vec}"),
    (r"\\overrightarrow ?(?=\{)", r"\\vec"),
    (r"\\widehat ?(?=\{)", r"\\hat"),
    _ACCENTS,
    *[(_FONT + r"\{([^{}]*)\}", _font)] * 3,  # one in the other
    _ACCENTS,
    (_FONT + r"\{" + _IN_BRACES + r"\}", _font),
    (r'_\s*\{"\s*(\w*)\s*"\}', r"_{\1}"),
    (r'^"[^"]*(?:\b(?:is|are)|[=:]) *"', ""),  # the answer is
    (r"^ ?(?:[Tt]he )?(?:[Ff]inal )?[Aa]nswer(?: is)? ?[:=]? ?(?=\S)", ""),
    (r'"(?:[Nn]egative|[Mm]inus) *"(?= ?[\d\\$])', "-"),
    (r"^ ?\(?([A-H])\) +(?=[^ +\-/^])", r'"(\1)"'),  # the letter of a choice, before its text
    (r'^"\(?([A-H])\) *[.:]? *([^"]*)"', r'"(\1)"\2'),
    (r'^"([^"]*\d[^"]*|\([^"]\))"$', r"\1"),  # words stay quoted
    (r'"[Aa]ll real(?:s| numbers)"', r"\\mathbb{R}"),
    # Lists.
    (r'"([^"]*)"', _connected),
    (r"(?<=[\s\d)}\]\"])and(?=[\s\d(\\\"-])|\\wedge(?![A-Za-z])|\\&", r"\\land "),
    (r"(?<=[\s\d)}\]\"])or(?=[\s\d(\\\"-])|\\vee(?![A-Za-z])", r"\\lor "),
    (r"[ ,;]*(\\land|\\lor)(?![A-Za-z])[ ,]*", r"\1 "),
    (r" ?, +(?=\S)", ";"),
    (r"(?<=[\)\]\}]) ?U ?(?=[\(\[\\])", r"\\cup "),
    # One name for each command.
    (r"\{" + _IN_BRACES + r"\\over(?![A-Za-z])" + _IN_BRACES + r"\}", r"\\frac{\1}{\2}"),
    (r"^(.*)\\over(?![A-Za-z])(.*)$", r"\\frac{\1}{\2}"),
    (r"\{" + _IN_BRACES + r"\\choose(?![A-Za-z])" + _IN_BRACES + r"\}", r"\\binom{\1}{\2}"),
    (r"^(.*)\\choose(?![A-Za-z])(.*)$", r"\\binom{\1}{\2}"),
    (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\([lg]e)(?:q|qslant|qq)(?![A-Za-z])", r"\\\1 "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"\\neq(?![A-Za-z])| !=", r"\\ne "),  # 3!=6
    (r"\\(?:approxeq|simeq)(?![A-Za-z])", r"\\approx "),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\l(?:brace|angle)(?![A-Za-z])", lambda m: r"\{" if "brace" in m[0] else "("),
    (r"\\r(?:brace|angle)(?![A-Za-z])", lambda m: r"\}" if "brace" in m[0] else ")"),
    (r"\+/-|\+-(?=\d|\\sqrt)", r"\\pm "),
    # The set of all x with a property: the property.
    (r"^\\\{ ?[a-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?::|\||\\mid(?![a-z]))(.*)\\\}$", r"\1"),
    (r"\\varnothing|\\\{ ?\\\}", r"\\emptyset "),
    (r"\\setminus ?\{([^{}]*)\}", r"\\setminus\\{\1\\}"),
    # Matrices and systems.
    (r"\\cr(?![A-Za-z])", r"\\\\"),
    (
        r"[\(\[] ?\\begin ?\{array\} ?\{[^{}]*\}(.*?)\\end ?\{array\} ?[\)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (
        r"[\(\[] ?\\begin ?\{(?:small)?matrix\}(.*?)\\end ?\{(?:small)?matrix\} ?[\)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (r"\\(begin|end) ?\{(?:[bB]|psmall|bsmall)matrix\}", r"\\\1{pmatrix}"),
    (r"^\\begin ?\{(?:cases|aligned)\}(.*)\\end ?\{(?:cases|aligned)\}$", _cases),
    # Operators, functions, scripts.
    (r"\*\*", "^"),
    (r"\*", r"\\cdot "),
    # Of a complex number, in polar form.
    (
        r"(?<=[\d})]) ?(?:\\angle|\"?\\?cis\"?)(?![A-Za-z]) ?(\S.*)$",
        r"(\\cos(\1)+i\\sin(\1))",
    ),
    (rf"(?<![\\A-Za-z])(?:np\.)?({FUNCTIONS}|sqrt|pi)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"(\\sqrt(?:\[\d\])?) ?\(([^()]*)\)", r"\1{\2}"),
    (r"\^ ?\{ ?\\circ ?\}|\\degree(?![A-Za-z])", r"^\\circ "),
    (r"([\^_]) ?(-?\d+)", r"\1{\2}"),
    (rf"(\\sqrt(?: ?\[[^\]]*\])?) ?{_ARGUMENT}", r"\1{\2}"),
    (rf"\\frac ?{_ARGUMENT}", r"\\frac{\1}"),
    (rf"(\\frac ?{GROUP}) ?{_ARGUMENT}", r"\1{\2}"),
    (rf"\\binom ?{_ARGUMENT} ?{_ARGUMENT}", r"\\binom{\1}{\2}"),
    # The blanks that part nothing.
    (r"(?<![\d.,;])(\d{1,3}(?: \d{3})+)(?!\d)", lambda m: m[1].replace(" ", "")),
    (r" +", " "),
    (r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", ""),  # the other blanks part words, or numbers
    # Sets of numbers.
    (r"(?<![\w\)\}\]])\+(?=\\infty)", ""),
    (r"\\mathbb\{R\}", r"(-\\infty,\\infty)"),
    (r"(?<=[)\]}])(?:\\backslash|\\smallsetminus|-)(?=\\\{)", r"\\setminus "),
    (r"([\[\]])([^\[\](),;]+[,;][^\[\](),;]+)([\[\]])", _open_ends),
    # Ends.
    (r"(?<![\w\\}\]^])\{(-|[\w.]+)\}", r"\1"),
    (r"^\{([^{}]*,[^{}]*)\}$", r"\\{\1\\}"),
    (r"^(?:=|\\approx)|(?<!\.)\.$|[ ;:]+$", ""),
]
_SPELLING = [(re.compile(pattern, re.DOTALL), to) for pattern, to in _SPELLING]


@functools.lru_cache(maxsize=1024)
def spelled(answer: str) -> str:
    """The answer in one spelling, as the top of this file describes it."""
    answer = answer.translate(_CHARACTERS)
    for pattern, to in _SPELLING:
        answer = pattern.sub(to, answer)
    return answer


def plain_text(answer: str) -> str:
    """A spelled answer without quotes, and without blanks but those that part numbers."""
    answer = re.sub(r'(?<!\d) | (?!\d)|"', "", answer)
    return re.sub(r";(?!\d{3}(?!\d))", ",", answer)  # 12;144 is a list for sure, 12,144 is not


# --- numbers ------------------------------------------------------------------------------------

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_TIMES_TEN_TO = r"(?:e|E(?!\+)|(?:\\times|\\cdot) ?10\^\{)"
RATIONALS = [
    re.compile(rf"([+-]?)(?P<n>{_DECIMAL})(?:{_TIMES_TEN_TO}(?P<power>[+-]?\d{{1,3}})\}}?)?"),
    re.compile(r"([+-]?)(?P<n>1)0\^\{(?P<power>[+-]?\d{1,3})\}"),
    re.compile(
        r"([+-]?)(?P<whole>\d+)? ?"
        rf"(?:\\frac\{{(?P<n>[+-]?{_DECIMAL})\}}\{{(?P<d>[+-]?{_DECIMAL})\}})"
    ),
    re.compile(rf"([+-]?)(?:(?P<whole>\d+) )?(?P<n>{_DECIMAL})/(?P<d>{_DECIMAL})"),
    re.compile(r"([+-]?)(?P<n>\d*\.\d*)\\overline\{(?P<repeated>\d+)\}"),
]


@functools.lru_cache(maxsize=4096)
def rational(answer: str) -> Fraction | None:
    """The exact value of a spelled integer, decimal, fraction, mixed number or power of ten."""
    match = next(filter(None, (pattern.fullmatch(answer) for pattern in RATIONALS)), None)
    if not match or len(answer) > 2000:  # Python reads no integers of more than 4,300 digits
        return None
    found = {name: text.replace(",", "") for name, text in match.groupdict().items() if text}
    found = {name: f"0{text}" if text[0] == "." else text for name, text in found.items()}
    defaults = (("n", 0), ("d", 1), ("whole", 0))
    n, d, whole = (Fraction(found.get(name, default)) for name, default in defaults)
    if not d or (whole and not 0 < n < d):
        return None
    value = whole + n / d
    if "repeated" in found:
        place = Fraction(10) ** -len(found["n"].partition(".")[2])
        value += place * Fraction(int(found["repeated"]), 10 ** len(found["repeated"]) - 1)
    return (-1 if match[1] == "-" else 1) * value * Fraction(10) ** int(found.get("power", 0))


# --- brackets -----------------------------------------------------------------------------------

_BRACKETS = {
    "(": ")",
    "[": "]",
    "{": "}",
    r"\{": r"\}",
    r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
OPEN, CLOSE = {*_BRACKETS, r"\begin"}, {*_BRACKETS.values(), r"\end"}
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\\]", re.DOTALL)


def split(answer: str, *separators: str) -> list[str]:
    """The parts of a spelled answer between separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for match in TOKEN.finditer(answer):
        depth += (match[0] in OPEN) - (match[0] in CLOSE)
        if depth == 0 and match[0] in separators:
            parts.append(answer[start : match.start()])
            start = match.end()
    return [part.strip() for part in [*parts, answer[start:]]]


def bracketed(
    answer: str,
    opened: str = r"\(|\[|\\\{",
    closed: str = r"\)|\]|\\\}",
) -> tuple[str, str, str] | None:
    """(opening bracket, inside, closing bracket), where one pair holds the whole answer."""
    match = re.fullmatch(rf"({opened})(.*)({closed})", answer, re.DOTALL)
    depth = 1
    for token in TOKEN.findall(match[2]) if match else ():
        depth += (token in OPEN) - (token in CLOSE)
        if depth == 0:
            return None
    return match.groups() if match and depth == 1 else None
