"""The math graders: what counts as equal, what must not, what must not hurt; and the workers that do the comparing."""
# ruff: noqa: RUF001 (ambiguous characters are the point)

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import rewards.answers
import rewards.worker
from rewards import Grader, RewardConfig, Verdict, grade_boxed
from rewards.answers import grade_answer, grade_number, last_box

pytest.importorskip("math_verify")
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("BENCHMARK_DATA", ROOT.parent / "shared" / "data"))

# One pair a line: gold, answer. Each is graded once, by the workers; then asked about one by one.
EQUAL = r"""
1/2 | 0.5
\frac{1}{2} | \frac12
\frac12 | \dfrac{1}{2}
0.5 | \tfrac{1}{2}
-\frac12 | \frac{-1}2
\frac{1}{2} | \frac{2}{4}
0.5 | 50\%
2\sqrt3 | \sqrt{12}
\frac{\sqrt2}{2} | \frac1{\sqrt2}
\sqrt{2}/2 | \frac{\sqrt{2}}{2}
\sqrt{5+2\sqrt{6}} | \sqrt{2}+\sqrt{3}
\frac{1}{1+\sqrt2} | \sqrt2-1
1{,}234 | 1,234
1,234 | 1234
10\,000 | 10000
1000000 | 1 000 000
1,000,000 | 10^6
004 | 4
3.0 | 3
5. | 5
.5 | 0.50
5 | +5
0 | -0
90^\circ | 90
75^\circ | 75\text{ degrees}
\$12.50 | 12.5
12.50 | $12.50
5 | 5\,\text{cm}
5\text{ cm} | 5 cm
5\text{ cm} | 5\text{ centimeters}
25\pi | 25\pi\text{ cm}^2
42 | 42 \text{ apples}
18 | 18 dollars
\frac74 | 1\frac34
1\frac34 | 1 3/4
-1\frac{1}{2} | -1.5
5 | x=5
x=5 | 5
2 | x=\frac42=2
\sqrt{2} | \sqrt{2} \approx 1.414
(x+1)^2 | x^2+2x+1
\frac{n(n+1)}{2} | \frac{n^2+n}{2}
\binom{2n}{n} | \frac{(2n)!}{(n!)^2}
\lfloor n/2 \rfloor | \left\lfloor \frac{n}{2} \right\rfloor
e^{2x} | (e^x)^2
\tan x | \frac{\sin x}{\cos x}
\frac{1}{2} | \sin 30^\circ
\log_2 8 | 3
\frac13 | 0.\overline{3}
f(x)=2x | 2x
y=-2x | 2x+y=0
5x-7y+11z+4=0 | 10x-14y+22z+8=0
\{1,2,3\} | \{3,1,2\}
1,2,3 | 3,2,1
\{1,2\} | 2,1
3,4 | 4\text{ or }3
a=3,b=4 | b=4 \text{ and } a=3
x=1,x=2 | 1,2
(0,1),(2,3) | (2,3),(0,1)
\pm2 | 2,-2
1\pm\sqrt{19} | x=1-\sqrt{19} \text{ or } x=1+\sqrt{19}
\{1\pm\sqrt{5},-2\} | \{-2, 1+\sqrt5, 1-\sqrt5\}
(1,2) | \left(1.0, \frac42\right)
(x,y)=(1,2) | (1,2)
[2,5) | \left[2,5\right)
(-\infty,2)\cup(3,\infty) | (3,+\infty)\cup(-\infty,2)
(-\infty,2)\cup(3,\infty) | x<2 \text{ or } x>3
[1,2] | 1\leq x\leq 2
[1,2] | x \in [1,2]
x \ge 2 | 2 \leqslant x
(-\infty,\infty) | \mathbb{R}
\emptyset | \varnothing
\begin{pmatrix}1/2\\2\end{pmatrix} | \begin{bmatrix}0.5\\2\\\end{bmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \left(\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right)
3+4i | 4i+3
2E+1 | 1+2E
(A) | A
(A) | \text{A}
A | \text{(A)}
B | \textbf{B}
\text{Monday} | monday
even | \text{even}
1010_2 | 1010_{2}
4210_{5} | 4210
1.2\times10^5 | 120000
6.02\times10^{23} | 6.02e23
2^{100} | 1267650600228229401496703205376
720 | 6!
1:2 | 1 : 2
−3 | -3
π | \pi
½ | 0.5
12 | １２
2√13 | 2\sqrt{13}
25\% | 25%
17.5\% | 17.5
12\sqrt2 | 3(4)\sqrt2
x^{10} | x^10
2\pi | 2*pi
12 | \boxed{12}
5 | \text{Area} = 5
5 | \text{The answer is } 5
(2,\infty) | \{x \mid x > 2\}
(2,\infty) | \{x \in \mathbb{R} : x > 2\}
\frac{x-1}{2} | f^{-1}(x) = \frac{x}{2}-\frac12
0.3 | P(X=2) = \frac{3}{10}
60 | \angle ABC = 60^\circ
5 | \overline{AB}=5
12:30 | 12:30\text{ PM}
0.001 | 10^{-3}
y^{\prime}+r y=0 | 2y'+2ry=0
\frac{d x}{d t}=k x-a | \dfrac{dx}{dt} + a = kx
\lambda_{\text{red}}/\sqrt{2} | \frac{\sqrt2}{2}\lambda_{red}
np.arcsin(10/13) | \arcsin\frac{10}{13}
\text{no solution} | No solution
"""
DIFFERENT = r"""
(1,2) | (2,1)
(1,2) | \{1,2\}
(1,2) | 1,2
(1,2) | [1,2]
[2,5] | [2,5)
[2,5) | [2,5]
(2,\infty) | x\ge2
x>2 | x<2
x>2 | y>2
(-\infty,2)\cup(3,\infty) | (-\infty,2),(3,\infty)
(1,2)\cup(3,4) | (1,2)\cap(3,4)
1234 | (1,234)
12 | 1 2
12 | 1,2
\frac34 | 1\frac34
1\frac34 | 3/4
3\frac12 | 3\cdot\frac12
\frac13 | 0.333333
\pi | 3.14
\pi | 3.141592653589793
\frac{\pi}{2} | 1.5708
\sqrt2 | 1.41421356237
1000000 | 1000050
0.5 | 50
50 | 0.5
50 | 5000
8\% | 0.8
1/2^{99} | 1/2^{98}
2^{100} | 2^{101}
10^{100} | 10^{100}+1
10^{-30} | 0
e^{\pi\sqrt{163}} | 262537412640768744
\sqrt{2} | \sqrt{2}+10^{-60}
1010_2 | 1010_3
1010_2 | 10
x+1 | y+1
RC | rc
a | A
P' | P
y'' | y'
\frac{dx}{dt}=x | x=0
\frac{dx}{dt}=kx | \frac{dy}{dt}=kx
A^T | A
2E+1 | 20
2\gamma+1 | 3
\lfloor x\rfloor | x
x | |x|
\log 2 | \ln 2
3\sin 1 | 3\sin 1^\circ
2 | \pm2
\pm2 | 2
7 | 5,6,7,8
7 | 5 or 7
7 | 5=7
7 | 5=7=7
7 | \text{not } 7
5 | 2x=5
7 | x=5=7
7 | 7 8
7 | 7x
7 | 77
-3 | --3
-3 | 3
12:00 | 1:00
1:2 | \frac12
odd | even
\text{ab} | \text{ba}
A | A, B
x=5 | y=5
y=-2x | x=-2y
3x-y+13=0 | 3x+4y+14=0
x+y=1 | 1=1
f(x)=x+1 | g(x)=x+1
5\text{ cm} | 5\text{ m}
10\text{ km/h} | 10\text{ m/s}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{vmatrix}1&2\\3&4\end{vmatrix}
\infty | -\infty
1/0 | 1/0+1
4 | 4/0
21 | ‮12
7 | \text{}
4 | \frac{4}{
"""
BOXES = r"""
7 | \boxed{5} no wait, \boxed{7} | 1
5 | \boxed{5} no wait, \boxed{7} | 0
7 | <think>perhaps \boxed{5}</think> so $\boxed{7}$, which answers it. | 1
7 | \boxed{\boxed{7}} | 1
7 | \boxed {7} | 1
7 | the set {x: } \boxed{7} | 1
7 | \boxed{7 | 0
7 | \boxed{{7} | 0
7 | \boxed{} | 0
7 | \boxed{5 \boxed{7}} | 0
7 |  | 0
7 | the answer is 7 | 0
7 | \boxed 7 | 0
7 | \fbox{7} | 0
\{1,2\} | \boxed{\{2,1\}} | 1
"""
DIGITS = "9" * 10_000
HARMFUL = [
    *("9**9**9", "9^{9^{9}}", r"5^{(5^{(5^{(5^5)})}-4)}", "(10^9)!", "99999999!", "((10!)!)!", r"10^{10^{10}}"),
    *(r"\binom{10^8}{5\cdot10^7}", r"\sum_{k=1}^{10^9} k", r"\int_0^1 \frac{\sin(x^x)}{\ln(1+e^{x^3})}\,dx"),
    *("(a+b+c+d+h+f)^{60}", r"\sqrt{1+\sqrt{2+\sqrt{3+\sqrt{5+\sqrt{7+\sqrt{11+\sin(\cos(\tan(1)))}}}}}}"),
    *(r"\frac{1}{" * 300 + "1" + "}" * 300, r"\sqrt{" * 400 + "2" + "}" * 400, "{" * 3000 + "8" + "}" * 3000),
    *("(" * 3000 + "8" + ")" * 3000, "x+" * 5000 + "x", DIGITS, "1," * 20_000 + "1", "$" * 5000, r"\pm" * 100),
    *("1," * 240 + "2", "-" * 400 + "3", "x^{" * 9 + "x" + "}" * 9, "cm" * 240, "a " * 240, "!" * 400, "x^{10000000}"),
]
INJECTED = ['__import__("os").system("touch FILE")', 'open("FILE","w")', r'[open("FILE","w"),\pi]', "lambda x: x"]
INJECTED += ["().__class__.__bases__[0].__subclasses__()", "exec(\"open('FILE','w')\")", r"\input{/etc/passwd}"]
INJECTED += ["{0.__class__}", "%s%s%n", 'Symbol("x")', "7\0", "\\write18{touch FILE}"]


def cases(block: str) -> list[list[str]]:
    """Columns; a bar within an answer has no blanks around it."""
    return [line.split(" | ") for line in block.strip("\n").splitlines()]


def graded(pairs, grader="math") -> list[Verdict]:
    """Verdicts of (reference, text) pairs."""
    return Grader().grade([(SimpleNamespace(reference=reference, grader=grader), text) for reference, text in pairs])


@pytest.fixture(scope="module")
def verdicts() -> dict:
    pairs = [(gold, rf"so \boxed{{{answer}}}.") for gold, answer in cases(EQUAL + DIFFERENT.strip("\n"))]
    return dict(zip(((g, t[10:-2]) for g, t in pairs), graded(pairs), strict=True))


@pytest.mark.parametrize(("gold", "answer"), cases(EQUAL))
def test_equal_answers_are_right(gold, answer, verdicts):
    assert verdicts[gold, answer].score == 1.0, verdicts[gold, answer]


@pytest.mark.parametrize(("gold", "answer"), cases(DIFFERENT))
def test_different_answers_are_wrong(gold, answer, verdicts):
    assert verdicts[gold, answer].score == 0.0, verdicts[gold, answer]


@pytest.mark.parametrize(("gold", "text", "score"), cases(BOXES))
@pytest.mark.parametrize("grader", ["number", "math"])
def test_the_last_closed_box_counts_and_nothing_else(gold, text, score, grader):
    if not (grader == "number" and "{1,2" in gold):
        assert graded([(gold, text)], grader)[0].score == float(score)
        assert grade_boxed(text, gold)[0] == float(last_box(text) is not None)


@pytest.mark.parametrize("gold", ["7", "(a+b)^2"])
def test_answers_that_could_hang_a_computer_algebra_system_are_wrong_in_bounded_time(gold):
    texts = [rf"\boxed{{{answer}}}" for answer in HARMFUL] + [r"\boxed{" * 10_000, "\\" * 100_000]
    for text, verdict in zip(texts, graded([(gold, text) for text in texts]), strict=True):
        assert verdict.score == 0.0, (text[:80], verdict)
        assert verdict.seconds < rewards.worker.VERDICT_SECONDS + 10, text[
            :80
        ]  # 10: a worker's start on a busy machine


@pytest.mark.parametrize("template", [r"\boxed{%s}", "%s", r"$\boxed{%s}$ %s"])
def test_code_in_an_answer_is_never_run(template, tmp_path):
    texts = [template.replace("%s", code.replace("FILE", str(tmp_path / "pwned"))) for code in INJECTED]
    assert {v.score for v in graded([("7", text) for text in texts]) + graded([(r"\pi", t) for t in texts])} == {0.0}
    assert not any(tmp_path.iterdir())


# --- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "answer", "score"),
    [
        ({"answer": "$69$,$84$", "multiple": True}, "84, 69", 1),
        ({"answer": "$100,200$", "multiple": True}, "200,100", 1),
        ({"answer": "$100,200$", "multiple": True}, "100200", 0),
        ({"answer": "100,200"}, "100200", 1),
        ({"answer": "4.2", "tolerance": 0.1, "unit": "%"}, r"4.29\%", 1),
        ({"answer": "4.2", "tolerance": 0.1}, "4.31", 0),
        ({"answer": r"\sqrt{2}", "tolerance": 0.01}, "1.414", 1),
        ({"answer": r"\sqrt{2}", "tolerance": 0.001}, "1.41", 0),
        ({"answer": "8", "unit": "min"}, r"8\text{ minutes}", 1),
        ({"answer": "8", "unit": "minutes"}, r"8\text{ hours}", 0),
        ({"answer": "166", "unit": "$cm^2$"}, r"166 \text{ cm}^{2}", 1),
        (r"It is $\frac{1}{2}$, so $\boxed{0.5}$.", r"\frac12", 1),
        ("3 + 4 = <<3+4=7>>7\n#### 7", "7", 1),
        (142.0, "142", 1),
    ],
)
def test_a_reference_is_read_as_it_is_published(reference, answer, score):
    assert graded([(reference, rf"\boxed{{{answer}}}")])[0].score == score


@pytest.mark.parametrize("reference", [{"answr": "7"}, {"answer": "7", "points": 3}, {}])
def test_a_reference_that_cannot_be_read_is_a_fault_and_not_a_wrong_answer(reference):
    for grader in ("number", "math"):
        assert graded([(reference, r"\boxed{7}")], grader)[0].score is None


def written(value: Fraction, draw: random.Random) -> str:
    """One of the ways to write a rational number."""
    ways = [rf"\frac{{{value.numerator}}}{{{value.denominator}}}", f"{value.numerator}/{value.denominator}"]
    ways += [
        rf"\dfrac{{{2 * value.numerator}}}{{{2 * value.denominator}}}",
        rf"x = {value.numerator}/{value.denominator}",
    ]
    if abs(value) > 1 and value.denominator > 1:
        whole, part = divmod(abs(value), 1)
        ways += [rf"{'-' * (value < 0)}{whole}\frac{{{part.numerator}}}{{{part.denominator}}}"]
    if 10**6 % value.denominator == 0:
        ways += [f"{float(value):.6f}", rf"\${float(value):,.6f}", rf"{float(value) * 1000:.6f} \times 10^{{-3}}"]
    if value.denominator == 1:
        commas = f"{int(value):,}"
        ways += [commas, commas.replace(",", "{,}"), f"{value}.00", rf"{value}\text{{ dollars}}", f"{value} dollars"]
    return draw.choice(ways)


def test_number_agrees_with_fractions_however_they_are_written():
    draw = random.Random(0)
    for _ in range(3000):
        gold = Fraction(draw.randint(-3000, 3000), draw.choice([1, 1, 2, 3, 4, 7, 8, 25]))
        other = gold if draw.random() < 0.5 else gold + Fraction(draw.choice([-1, 1]), draw.choice([1, 3, 100]))
        reference, answer = written(gold, draw), written(other, draw)
        score, _ = grade_number(rf"thus \boxed{{{answer}}}", reference)
        assert score == (gold == other), (reference, answer)


@pytest.mark.parametrize("answer", [DIGITS, "1e999999999", "1e" + DIGITS, r"\frac{1}{0}", "0/0", "1/" + "0" * 300])
def test_number_takes_no_harm_from_what_is_no_number(answer):
    assert graded([("7", rf"\boxed{{{answer}}}")], "number")[0].score == 0.0


# --- benchmarks -----------------------------------------------------------------------------------------------------


def rows(path: str) -> list[dict]:
    file = DATA / path
    if not file.exists():
        pytest.skip(f"no {path} in {DATA} (set BENCHMARK_DATA)")
    return [json.loads(line) for line in file.read_text().splitlines()]


def golds(name: str) -> list[tuple]:
    """(reference, the answer in it) of every problem of a benchmark."""
    if name == "math500":
        (table,) = rows("math500/math_test_cleaned.json")
        return [(answer, answer) for answer in table["expected_answer"].values()]
    if name == "minerva":
        return [(row["solution"], last_box(row["solution"])) for row in rows("minerva_math/test.jsonl")]
    if name == "gsm8k":
        found = rows("gsm8k/train.jsonl") + rows("gsm8k/test.jsonl")
        return [(row["answer"], row["answer"].split("####")[1].strip()) for row in found]
    if name == "olympiadbench":
        return [
            (
                {
                    "answer": row["final_answer"][0],
                    "multiple": row["is_multiple_answer"],
                    "unit": row["unit"],
                    "tolerance": float(row["error"]) if row["error"] else None,
                },
                row["final_answer"][0],
            )
            for row in rows("olympiadbench/test.jsonl")
        ]
    return [(row["answer"], str(row["answer"])) for row in rows(f"{name}/aimo-validation-{name}.jsonl")]


BENCHMARKS = {"aime": 90, "amc": 83, "gsm8k": 8792, "math500": 500, "minerva": 272, "olympiadbench": 675}
NUMERIC = ("aime", "amc", "gsm8k")


def boxed(answer: str) -> str:
    return rf"Adding up, we find $\boxed{{{answer}}}$."


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_gold_answer_is_right_and_that_of_another_problem_wrong(name):
    problems, grader = golds(name), "number" if name in NUMERIC else "math"
    assert len(problems) == BENCHMARKS[name]
    own = graded([(reference, boxed(answer)) for reference, answer in problems], grader)
    assert [answer for (_, answer), verdict in zip(problems, own, strict=True) if verdict.score != 1.0] == []
    draw = random.Random(1)
    pairs = [(draw.choice(problems), draw.choice(problems)[1]) for _ in range(120)]
    others = graded([(reference, boxed(answer)) for (reference, _), answer in pairs], grader)
    right = {(gold, answer) for ((_, gold), answer), verdict in zip(pairs, others, strict=True) if verdict.score != 0.0}
    bare = [[re.sub(r"[\s$]|\.0\b|^[a-z]=|\\%", "", side) for side in pair] for pair in right]
    assert [pair for pair in bare if pair[0] != pair[1]] == []


def test_gsm8ks_own_solutions_are_right_as_they_are_written_and_wrong_with_a_word_behind_them():
    solutions = [reference for reference, _ in golds("gsm8k")]
    assert all(grade_number(text, text)[0] == 1.0 for text in solutions)
    assert not any(grade_number(f"{text}\nSo", text)[0] for text in solutions)


def rewritten(answer: str, draw: random.Random) -> str:
    """Another way to write an answer: three of the rules that apply to it, drawn."""
    rules = [
        lambda a: a.replace(r"\frac", draw.choice([r"\dfrac", r"\tfrac"])),
        lambda a: re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", a),
        lambda a: re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", a),
        lambda a: re.sub(r"([-+=,])", r" \1\\, ", a) if r"\text" not in a else a,
        lambda a: a.replace("(", r"\left(").replace(")", r"\right)") if "[" not in a else a,
        lambda a: re.sub(r"^(-?\d+)$", r"\1.0", a),
        lambda a: re.sub(r"^(-?\d+\.\d+)$", r"\g<1>00", a),
        lambda a: re.sub(r"^(\d{1,3})(\d{3})$", r"\1{,}\2", a),
        lambda a: re.sub(r"^([\d.]+)$", r"\1\\text{ units}", a),
        lambda a: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", a),
        lambda a: rf"\{{{', '.join(reversed(a[2:-2].split(',')))}\}}" if re.fullmatch(r"\\\{[^{}]*\\\}", a) else a,
        lambda a: (
            ", ".join(reversed(a.split(","))) if re.fullmatch(r"[-\d, ]+", a) and not re.search(r",\d{3}", a) else a
        ),
        lambda a: a.replace("pmatrix", "bmatrix"),
        lambda a: f" {a}\r\n.",
    ]
    answer = answer.replace("$", "").strip()
    applicable = [rule for rule in rules if rule(answer) != answer]
    for rule in draw.sample(applicable, min(3, len(applicable))):
        answer = rule(answer)
    return answer


# LaTeX that the parser does not know, and prose are compared by their spelling alone.
NO_EXPRESSION = r"dot\{|\\odot|where"


@pytest.mark.parametrize("name", ["math500", "minerva", "olympiadbench"])
def test_gold_answers_in_other_words_are_right_though_spelling_does_not_count(name):
    draw = random.Random(2)
    problems = [(r, a) for r, a in draw.sample(golds(name), 150) if not re.search(NO_EXPRESSION, a)]
    wrong = []
    for reference, answer in problems:
        words = re.fullmatch(r"\(?[A-Za-z]+\)?", answer)  # have nothing but their spelling
        other = rewritten(answer, draw)
        score, _ = grade_answer(boxed(other), reference, symbolic=True, literal=bool(words))
        wrong += [(answer, other)] * (score != 1.0)
    assert len(wrong) <= 0.02 * len(problems), wrong


def perturbed(answer: str, draw: random.Random) -> list[str]:
    """Wrong answers that look right: another digit, another sign, members exchanged, an end closed or opened."""
    places = [match.start() for match in re.finditer(r"\d", answer)]
    found = []
    if places:
        at = draw.choice(places)
        found.append(answer[:at] + draw.choice([d for d in "123456789" if d != answer[at]]) + answer[at + 1 :])
    if re.fullmatch(r"\$?-?(\d*[1-9]\d*|\\frac\{\d+\}\{\d+\})\$?", answer):
        found.append(answer.replace("-", "") if "-" in answer else "-" + answer.replace("$", ""))
    pair = re.fullmatch(r"\$?([(\[])([^(),\[\]]+),([^(),\[\]]+)([)\]])\$?", answer)
    if pair and pair[2].strip() != pair[3].strip():
        found.append(f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}")
        found.append(f"{'(['[pair[1] == '(']}{pair[2]},{pair[3]}{pair[4]}")
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_perturbed_gold_answer_is_right(name):
    draw, problems = random.Random(3), golds(name)
    pairs = [(r, p) for r, answer in draw.sample(problems, min(150, len(problems))) for p in perturbed(answer, draw)]
    pairs = [(r, p) for r, p in pairs if not (isinstance(r, dict) and r["tolerance"])]
    assert len(pairs) >= 80
    assert [
        pair for pair, v in zip(pairs, graded([(r, boxed(p)) for r, p in pairs]), strict=True) if v.score != 0.0
    ] == []


# --- workers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(monkeypatch):
    """(gold, text) whose comparison never ends: in a worker, `math` waits where the text says so."""
    script = "import time, rewards.worker\nmath = rewards.worker.grade_math\ndef slow(text, reference):\n"
    script += "    time.sleep(600 if 'forever' in text else 0)\n    return math(text, reference)\n"
    script += "rewards.worker.JUDGES['math'] = slow\nrewards.worker.serve()\n"
    started = subprocess.Popen

    def popen(command, **more):
        return started([command[0], "-c", script], **more)

    for worker in list(rewards.worker._workers):
        worker.close()
    monkeypatch.setattr(subprocess, "Popen", popen)
    yield ("7", r"forever \boxed{7}")
    for worker in list(rewards.worker._workers):
        worker.close()


def test_one_endless_answer_is_wrong_and_delays_the_others_by_no_more_than_its_limit(endless):
    pairs = [("7", rf"\boxed{{{i % 10}}}") for i in range(200)]
    graded(pairs)
    start = time.monotonic()
    verdicts = graded([*pairs[:77], endless, *pairs[77:]])
    assert (
        time.monotonic() - start < rewards.worker.VERDICT_SECONDS + 30
    )  # 30: the next worker's start on a busy machine
    assert verdicts[77].score == 0.0 and "took longer than 2 s" in verdicts[77].reason
    assert [v.score for v in verdicts[:77] + verdicts[78:]] == [float(i % 10 == 7) for i in range(200)]


def test_a_worker_that_was_killed_is_replaced_and_no_verdict_lost():
    assert graded([("7", r"\boxed{7}")] * 4)[0].score == 1.0
    for worker in list(rewards.worker._workers):
        os.kill(worker.process.pid, signal.SIGKILL)
    assert [v.score for v in graded([("7", r"\boxed{7}"), ("7", r"\boxed{8}")] * 20)] == [1.0, 0.0] * 20


def test_a_worker_that_cannot_start_is_a_fault_and_not_a_wrong_answer(monkeypatch):
    for worker in list(rewards.worker._workers):
        worker.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (verdict,) = graded([("7", r"\boxed{7}")])
    assert verdict.score is None and "could not start" in verdict.reason


def test_a_worker_sees_no_secrets_and_has_its_memory_bounded(monkeypatch):
    for worker in list(rewards.worker._workers):
        worker.close()
    monkeypatch.setenv("API_TOKEN", "secret")
    graded([("7", r"\boxed{7}")])
    (pid, *_) = [worker.process.pid for worker in rewards.worker._workers]
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(rf"Max address space +{2**30} ", limits) and re.search(r"Max core file size +0 ", limits)
    assert not re.search(r"torch|numpy|transformers", Path(f"/proc/{pid}/maps").read_text())


def test_workers_end_when_their_trainer_is_killed():
    script = "import rewards.worker, time\nfrom types import SimpleNamespace as P\n"
    script += "rewards.Grader().grade([(P(grader='math', reference='7'), '\\\\boxed{7}')])\n"
    script += "print(*[w.process.pid for w in rewards.worker._workers], flush=True)\ntime.sleep(600)"
    trainer = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [Path(f"/proc/{pid}") for pid in trainer.stdout.readline().split()]
    assert workers and all(worker.exists() for worker in workers)
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 30
    while any(w.exists() and "State:\tZ" not in (w / "status").read_text() for w in workers):
        assert time.monotonic() < end, "a worker lives on"
        time.sleep(0.05)


def test_graders_that_need_a_missing_package_say_so_at_the_start():
    script = "import importlib.util, sys\nfrom rewards import __main__ as script\nfind = importlib.util.find_spec\n"
    script += "importlib.util.find_spec = lambda name, *more: None if 'math_verify' in name else find(name, *more)\n"
    script += "sys.argv = ['rewards', sys.argv[1]]\nsys.exit(script.main())"
    for grader, code in (("math", 2), ("number", 0)):
        done = subprocess.run(
            [sys.executable, "-c", script, grader], cwd=ROOT, input="", capture_output=True, text=True
        )
        assert done.returncode == code and done.stdout == ""
        assert done.stderr.count("\n") == (code == 2) and ("pip install math-verify" in done.stderr) == (code == 2)


def test_the_script_answers_each_line_before_it_needs_the_next():
    command = [sys.executable, "-m", "rewards", "math"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        for reference, score in ((7, 1.0), ("8", 0.0), ({"answer": r"\frac{14}{2}"}, 1.0), ([7], None)):
            print(json.dumps({"text": r"\boxed{7}", "reference": reference}), file=script.stdin, flush=True)
            assert json.loads(script.stdout.readline())["score"] == score
        script.stdin.close()
        assert script.wait(timeout=60) == 0


# --- rewards --------------------------------------------------------------------------------------------------------


def test_shaped_rewards_add_bonuses_and_the_soft_overlong_penalty():
    def soft_punishment(length, longest, cache):  # DAPO, Eq. 13, case by case
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    texts = [r"\boxed{7}", r"\boxed{8}", "7", r"\boxed{7}", r"\boxed{7}", r"\boxed{7}"]
    answers = [(SimpleNamespace(reference="7", grader="number"), text) for text in texts]
    verdicts = Grader().grade(answers)
    verdicts[5] = Verdict(None, "fault")
    lengths = [60, 81, 90, 99, 100, 5]
    config = RewardConfig(bonus={"boxed": 0.1, "number": -0.5}, overlong_buffer=20)
    expected = [
        v.score + 0.1 * ("boxed" in text) - 0.5 * v.score + soft_punishment(length, 100, 20)
        for v, text, length in zip(verdicts[:5], texts, lengths, strict=False)
    ]
    shaped = Grader(config).shaped_rewards(answers, verdicts, lengths, 100)
    assert shaped[:5] == pytest.approx(expected) and math.isnan(shaped[5])
    assert [v.score for v in verdicts] == [1.0, 0.0, 0.0, 1.0, 1.0, None]  # accuracy is of these
    assert Grader().shaped_rewards(answers[:5], verdicts[:5], lengths[:5], 100) == [1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grader": "maths"}, "grader='maths' is not known"),
        ({"bonus": {"box": 0.1}}, "bonus='box' is not known"),
        ({"bonus": {"boxed": "much"}}, "the weight of boxed must be a number"),
        ({"bonus": {"boxed": math.inf}}, "the weight of boxed must be a number"),
        ({"overlong_buffer": -1}, "must be at least 0"),
    ],
)
def test_reward_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RewardConfig(**settings)
