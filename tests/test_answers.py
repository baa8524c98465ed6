"""What `number` and `math` take for equal: policies, kinds of faults, random answers."""
# ruff: noqa: RUF001 (ambiguous characters are the point)

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rewards import Grader, answers
from rewards.__main__ import grade_line
from rewards.answers import grade_answer, grade_math, grade_number, read_reference
from rewards.units import quantity

from helpers import grade_one

pytest.importorskip("math_verify")
CASES = Path(__file__).parent / "cases" / "answers.jsonl"
ROWS = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
GRADERS = {"math": grade_math, "number": grade_number}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['reference']} | {row['text'][7:-1]}")
def test_verdicts_that_were_once_wrong_are_right(row):
    assert GRADERS[row["grader"]](row["text"], row["reference"])[0] == row["score"]


# --- kind by kind -------------------------------------------------------------------------------


def check(kind: int) -> None:
    """Every pair of a kind in cases/kinds.txt has the verdict that its section is headed with."""
    text = (CASES.parent / "kinds.txt").read_text(encoding="utf-8")
    sections = re.split("^== ", text, flags=re.M)
    tested = []
    for section in sections[1:]:
        head, *pairs = section.strip().splitlines()
        number, grader, verdict = head.split(":")[0].split()
        for pair in pairs if int(number) == kind else ():
            gold, answer = pair.split(" | ")
            score, reason = GRADERS[grader](rf"so \boxed{{{answer}}}.", gold)
            assert score == (verdict == "right"), (pair, reason)
            tested.append(verdict)
    assert min(tested.count("right"), tested.count("wrong")) >= 2


def test_kind_1_blanks_and_separators_tell_a_list_from_a_number():
    check(1)


def test_kind_2_units_are_equal_as_products_of_powers():
    check(2)


def test_kind_3_scale_words_are_factors_and_other_words_no_units():
    check(3)


def test_kind_4_lists_keep_their_names_and_and_or():
    check(4)


def test_kind_5_a_number_of_json_is_read_as_that_number():
    check(5)
    for reference, answer, score in (
        (1e16, "10^{16}", 1),
        (1e16, "1e16", 1),
        (1e16, "e+16", 0),
        (1e16, "10^{15}", 0),
        (1.5e-7, r"1.5\times10^{-7}", 1),
        (2.5e20, "250000000000000000000", 1),
        (0.1, r"\frac{1}{10}", 1),
        (142.0, "142", 1),
        (10**30, "10^{30}", 1),
        ({"answer": 1e16}, "10^{16}", 1),
        ({"answer": 1e16}, "e+16", 0),
    ):
        for grader in GRADERS:
            text = rf"\boxed{{{answer}}}"
            assert grade_one(grader, text, reference).score == score, (reference, answer)
            line = json.dumps({"text": text, "reference": reference}).encode()
            assert grade_line(Grader(), grader, line).score == score, (reference, answer)


def test_kind_6_a_comma_before_and_or_or_leaves_no_empty_place():
    check(6)


def test_kind_7_short_words_behind_a_number_are_units():
    check(7)


def test_kind_8_identities_hold_where_both_sides_are_defined():
    check(8)


def test_kind_9_upright_and_bold_letters_are_the_letters():
    check(9)


def test_kind_10_ordinary_notation_is_read():
    check(10)


def test_kind_11_every_plus_minus_goes_both_ways():
    check(11)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 18", 1),
        ("She makes 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", 1),
        ("#### 18\n \n", 1),
        ("#### 18\nThis answers it.", 0),
        ("#### 18 eggs\nShe eats 3.", 0),
        ("#### 18) The rest\n\nThe rest is 15.", 0),
        ("#### 18 - the first sum\nSo #### 18", 1),
        ("#### 7\nNo:\n#### 18", 1),
        ("#### $18.00", 1),
        ("#### **18**", 1),
        ("#### 18 dollars.", 1),
        ("so #### 18", 1),
        ("#### Answer: 18", 1),
        ("#### 18\r\n", 1),
        (r"\boxed{18}, not #### 7", 1),
        (r"\boxed{7}, not #### 18", 0),
        ("#### 18\n#### 7", 0),
        ("####\n18", 0),
        ("####", 0),
        ("#### ", 0),
        ("A: 18", 0),
        ("#### Step 18: the end", 0),
        ("#### 18. Conclusion", 0),
    ],
)
@pytest.mark.parametrize("grader", GRADERS)
def test_kind_12_without_a_box_the_answer_stands_behind_hashes_in_the_last_line(text, score, grader):
    assert GRADERS[grader](text, "18")[0] == score


def test_kind_14_a_plain_number_is_not_left_to_be_evaluated():
    check(14)


# --- the table of policies ----------------------------------------------------------------------

POLICIES = {  # what stands left in the table of answers.py: (reference, text or answer, score)
    r"\boxed{7}": [
        ("7", r"\boxed{5} no, \boxed{7}", 1),
        ("5", r"\boxed{5} no, \boxed{7}", 0),
        ("7", r"<think>\boxed{7}</think> done", 1),
        ("7", r"\boxed{\boxed{7}}", 1),
        ("7", r"\boxed{7} and \boxed{8", 1),
    ],
    "#### 18": [("18", "so\n#### 18\n", 1), ("18", r"\boxed{7} #### 18", 0)],
    "#### 18 and more lines behind it": [("18", "#### 18\nThen 7 more.", 0), ("7", "#### 18\nThen 7\n#### 7", 1)],
    r"\boxed 7, \fbox{7}, no mark": [
        ("7", r"\boxed 7", 0),
        ("7", r"\fbox{7}", 0),
        ("7", "It is 7.", 0),
        ("7", r"\boxed{7", 0),
    ],
    r"2/4, 0.50, 1e2, 1\frac34": [
        ("1/2", "2/4", 1),
        (r"\frac12", "0.50", 1),
        ("100", "1e2", 1),
        ("7/4", r"1\frac34", 1),
        ("7/4", r"\frac34", 0),
    ],
    "1e16, a JSON number": [(1e16, "10^{16}", 1), (1e16, "e+16", 0), ("16+e", "e+16", 1)],
    "0.333333 against 1/3": [
        ("1/3", "0.333333", 0),
        ({"answer": "1/3", "tolerance": 0.01}, "0.333333", 1),
        ("1/3", r"0.\bar{3}", 1),
    ],
    "99^2-98^2 against 197": [
        ("197", "99^2-98^2", 0),
        ("30", "3!+4!", 0),
        ("720", "6!", 1),
        ("10", r"\binom52", 1),
        (r"\sqrt{5}", r"\frac{5}{\sqrt5}", 1),
    ],
    "2+3=5 against 5": [("5", "2+3=5", 1), ("5", "2+4=5", 0), ("6", "2+3=6", 0)],
    r"10\% against 10 or 0.1": [
        ("10", r"10\%", 1),
        ("0.1", r"10\%", 1),
        (r"10\%", r"10\text{ percent}", 1),
        (r"10\%", r"0.1\%", 0),
        ("1000", r"10\%", 0),
    ],
    r"90^\circ, 5\text{ cm}, \$5": [
        ("90", r"90^\circ", 1),
        (r"5\text{ cm}", "5", 1),
        ("5", r"\$5", 1),
        (r"5\text{ cm}", r"5\text{ m}", 0),
        (r"\$5", r"5\text{ cents}", 0),
    ],
    r"5\text{ cm} against 5\text{ cm}^2": [
        (r"5\text{ cm}^2", r"5\text{ cm}", 0),
        (r"5\text{ mph}", r"5\text{ miles per hour}", 1),
    ],
    r"5\text{ million} against 5": [
        ("5", r"5\text{ million}", 0),
        ("5000000", r"5\text{ million}", 1),
        ("24", r"2\text{ dozen}", 1),
        ("0.3", r"3\text{ tenths}", 1),
    ],
    r"5\text{ below zero} against 5": [("5", r"5\text{ below zero}", 0)],
    "60 mph, 18 dollars per day": [
        ("60", "60 mph", 1),
        ("18", "18 dollars per day", 1),
        ("7", "7x", 0),
        ("7", "7 xy", 0),
    ],
    r"2,3 against 3,2 or \{2,3\}": [
        ("3,2", "2,3", 1),
        (r"\{2,3\}", "3,2", 1),
        ("(2,3)", "(3,2)", 0),
        ("(2,3)", "2,3", 0),
        ("[2,3)", "[2,3]", 0),
    ],
    "1,234": [
        ("1234", "1,234", 1),
        ("1234", "(1,234)", 0),
        ({"answer": "1,234", "multiple": True}, "234,1", 1),
        ("100, 200", "200,100", 1),
    ],
    "12, 144": [
        ("12144", "12, 144", 0),
        ("144, 12", r"12,\ 144", 1),
        ("144, 12", "12; 144", 1),
        ("12, 144", "12144", 0),
    ],
    "1, 2, and 3": [("1,2,3", "1, 2, and 3", 1), ("1,2,3", "1,,2,3", 0), ("1,,3", "1,3", 0)],
    "x=5 against 5": [("5", "x=5", 1), ("x=5", "5", 1), ("x=5", "y=5", 0)],
    "x=1,y=2 against 2,1": [
        ("x=1,y=2", "2,1", 0),
        ("x=1,y=2", "1,2", 1),
        ("x=1,y=2", "y=2,x=1", 1),
    ],
    r"x>2 against (2,\infty)": [
        (r"(2,\infty)", "x>2", 1),
        ("x>2", r"[2,\infty)", 0),
        ("x>2", "y>2", 0),
    ],
    "x>2 and x<5 against 2<x<5": [
        ("2<x<5", "x>2 and x<5", 1),
        ("2<x<5", "x>2, x<5", 1),
        ("2<x<5", "x>2 or x<5", 0),
        (r"(-\infty,\infty)", "x>2 or x<5", 1),
        ("x<2 or x>5", "x<2, x>5", 1),
    ],
    r"|x|<2, \mathbb{R}\setminus\{3\}": [
        ("(-2,2)", "|x|<2", 1),
        (r"(-\infty,3)\cup(3,\infty)", r"\mathbb{R}\setminus\{3\}", 1),
        (r"\mathbb{R}\setminus\{3\}", r"x\ne3", 1),
    ],
    r"\pm\sqrt2\pm\sqrt3": [
        (r"\pm\sqrt2\pm\sqrt3", r"\sqrt2+\sqrt3, -\sqrt2-\sqrt3", 0),
        (r"a\pm b\mp c", "a+b-c, a-b+c", 1),
    ],
    "1:2 against 1/2": [(r"\frac12", "1:2", 0), ("1:2", "1 : 2", 1)],
    "101_2 against 5, or 101_3": [("5", "101_2", 0), ("101_3", "101_2", 0), ("101_2", "101", 1)],
    "Monday, (A)": [("Monday", r"\text{monday}", 1), ("A", "a", 0), ("(A)", "A", 1)],
    r"\textbf{(C) }12": [
        ("12", r"\textbf{(C) }12", 1),
        ("(C)", r"\textbf{(C) }12", 1),
        ("(B)", r"\textbf{(C) }12", 0),
        ("13", r"\textbf{(C) }12", 0),
    ],
    r"\text{R}, \mathbf{j}, \vec{a}": [
        ("R", r"\text{R}", 1),
        ("j", r"\mathbf{j}", 1),
        ("a", r"\vec{a}", 1),
        ("x", r"\bar{x}", 0),
        ("F", r"\mathcal{F}", 0),
    ],
    r"\sqrt{1/n} against 1/\sqrt{n}": [
        (r"1/\sqrt{n}", r"\sqrt{1/n}", 1),
        ("x", "|x|", 0),
        ("-2", r"\sqrt[3]{-8}", 1),
    ],
    r"\frac12 before a matrix": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\frac12\begin{pmatrix}1\\2\end{pmatrix}", 0),
    ],
}


def test_the_table_of_policies_is_tested_line_by_line():
    rows = re.findall(r"^    (\S.*?)(?:  +(?=\S)|$)", answers.__doc__, re.M)
    assert rows == list(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_policy(policy):
    for reference, answer, score in POLICIES[policy]:
        marked = "boxed" in answer or "####" in answer or policy.endswith("no mark")
        text = answer if marked else rf"\boxed{{{answer}}}"
        assert grade_math(text, reference)[0] == score, (reference, text)


# --- random answers -----------------------------------------------------------------------------

FUZZ = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PIECES = st.sampled_from(
    [
        *"0123456789abexyzRmsJ+-*/^_=<>()[]{}|,;:.!%$&~ \n'\"#",
        *(
            r"\frac",
            r"\sqrt",
            r"\pi",
            r"\pm",
            r"\mp",
            r"\infty",
            r"\cup",
            r"\setminus",
            r"\in",
            r"\le",
        ),
        *(r"\ne", r"\{", r"\}", r"\,", r"\!", r"\\", r"\%", r"\$", r"\text{ cm}", r"\text{ and }"),
        *(
            r"\mathbb{R}",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            r"\overline{3}",
            r"\dot{3}",
            r"\angle",
        ),
        *(r"\over", r"\choose", r"\left", r"\right", r"^\circ", r"\approx", r"\vec", r"\mathrm{e}"),
        *(" and ", " or ", "million", " dollars per day", "####"),
        *("√", "½", "²", "∞", "１", "é"),
    ]
)
SCRIBBLE = st.lists(PIECES, max_size=60).map("".join)


def readable(reference) -> bool:
    try:
        return bool(read_reference(reference))
    except ValueError:
        return False


GOLD = SCRIBBLE.filter(readable)


def number(gold: str, answer: str) -> float:
    """The verdict of `number`, where equal spelling is not enough."""
    return grade_answer(rf"\boxed{{{answer}}}", gold, symbolic=False, literal=False)[0]


@FUZZ
@given(GOLD, SCRIBBLE)
def test_no_answer_raises_or_takes_over_a_second(gold, answer):
    for text in (answer, rf"\boxed{{{answer}}}", f"#### {answer}"):
        start = time.perf_counter()
        score, reason = grade_number(text, gold)
        assert time.perf_counter() - start < 1
        assert score in (0.0, 1.0) and reason


@settings(FUZZ, max_examples=60)
@given(GOLD, SCRIBBLE)
def test_math_has_a_verdict_on_any_answer(gold, answer):
    assert grade_one("math", rf"\boxed{{{answer}}}", gold).score is not None


@pytest.mark.parametrize(
    "piece",
    [
        *("{", "(1,", "1,", r"\pm", '"a', "a and ", "cm ", "^{2}", r"\text{a ", "$1", "=x"),
        *("1,000", r"\frac{", r"{\over", "x<", r"\cup(1,2)", "0.3", "||", "..."),
        *("a_{", " ", "\\\\", "2 "),
    ],
)
def test_a_piece_over_and_over_takes_no_second(piece):
    answer = (piece * 500)[:500]
    start = time.perf_counter()
    grade_number(rf"#### {answer}", answer + "1")
    assert time.perf_counter() - start < 1


# Answers that mean something, each with what it means.
UNITS = ["cm", "m", "cm^2", "m/s", "km/h", "kg/m^3", "hours", "apples", "dollars per day"]
NAMES = ["x", "y", "n", r"\theta", "f(x)", "a_1"]
rationals = st.fractions(min_value=-2000, max_value=2000, max_denominator=40)


def written(value: Fraction) -> st.SearchStrategy[str]:
    """Ways to write a number."""
    ways = [
        f"{value.numerator}/{value.denominator}",
        rf"\frac{{{value.numerator}}}{{{value.denominator}}}",
    ]
    if value.denominator == 1:
        ways += [
            str(value),
            f"{int(value):,}",
            f"{int(value):,}".replace(",", r"{,}"),
            f"{value}.0",
        ]
    return st.sampled_from(ways)


@st.composite
def numbers(draw) -> tuple[str, Fraction]:
    value = draw(rationals)
    return draw(written(value)), value


@st.composite
def meanings(draw) -> tuple[str, object]:
    """(answer, what it means), of several kinds."""
    kinds = ["number", "unit", "name", "list", "assignment", "point", "interval"]
    kind = draw(st.sampled_from(kinds))
    (first, x), (second, y) = draw(numbers()), draw(numbers())
    if kind == "number":
        return first, x
    if kind == "unit":
        unit = draw(st.sampled_from(UNITS))
        return rf"{first}\text{{ {unit}}}", (x, "unit", unit)
    if kind == "name":
        name = draw(st.sampled_from(NAMES))
        return f"{name} = {first}", (x, "name", name)
    if kind == "list":
        joint = draw(st.sampled_from([", ", r"\text{ and }", "; ", r",\text{ or }"]))
        return first + joint + second, frozenset([(x, 1), (y, 2 if x == y else 1)])
    if kind == "assignment":
        pairs = [f"x={first}", f"y={second}"]
        joint = draw(st.sampled_from([", ", r" \text{ and } "]))
        return joint.join(draw(st.permutations(pairs))), ("x", x, "y", y)
    if kind == "point":
        return rf"\{{({first}, {second})\}}", ("point", x, y)
    low, high = sorted([(x, first), (y, second)])
    assume(low[0] < high[0])
    ways = [
        f"[{low[1]}, {high[1]})",
        f"{low[1]} \\le x < {high[1]}",
        f"x \\ge {low[1]}, x < {high[1]}",
    ]
    return draw(st.sampled_from(ways)), ("interval", low[0], high[0])


@FUZZ
@given(meanings())
def test_an_answer_equals_itself_though_spelling_does_not_count(meaning):
    assert number(meaning[0], meaning[0]) == 1.0


@FUZZ
@given(meanings(), meanings())
def test_equality_is_symmetric(one, other):
    assert number(one[0], other[0]) == number(other[0], one[0])


@FUZZ
@given(rationals, rationals, st.sampled_from(UNITS), st.sampled_from(UNITS), st.data())
def test_no_exchange_of_units_makes_a_wrong_answer_right(right, wrong, unit, other, data):
    gold, answer = (data.draw(written(value)) for value in (right, wrong))
    with_unit = rf"{gold}\text{{ {unit}}}"
    assert number(with_unit, rf"{answer}\text{{ {other}}}") == (right == wrong and unit == other)
    assert number(gold, rf"{answer}\text{{ {other}}}") == (right == wrong)
    assert number(with_unit, answer) == (right == wrong)


@FUZZ
@given(rationals, rationals, st.permutations(NAMES), st.data())
def test_no_exchange_of_names_makes_a_wrong_answer_right(x, y, names, data):
    first, second = (data.draw(written(value)) for value in (x, y))
    name, other, third = names[:3]
    gold = f"{name}={first}, {other}={second}"
    assert number(gold, f"{other}={second}, {name}={first}") == 1.0
    assert number(gold, f"{name}={second}, {other}={first}") == (x == y)
    assert number(gold, f"{name}={first}, {third}={second}") == 0.0
    assert number(f"{name}={first}", f"{other}={first}") == 0.0


@given(st.sampled_from(UNITS), st.integers(2, 10**6))
@FUZZ
def test_a_unit_is_read_whole(unit, value):
    for text in (rf"{value}\text{{ {unit}}}", rf"{value:,}\,\mathrm{{{unit}}}"):
        found, powers = quantity(answers.spelled(text))
        assert answers.rational(found) == value and powers.powers
