"""The inspector: its numbers against loops over the dump, its page in a real browser, its text without power."""

import copy
import json
import math
import random
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from infra.dumps import token_texts
from infra.errors import BadInput
from tasks.chain import chain_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tools import inspector
from transformers import PreTrainedTokenizerFast

import chaos
from browser import Browser
from conftest import finished
from helpers import chat_tokenizer

BETA, G = 0.1, 3
HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\x1b]0;hit\x07\u202e"
VIEWS = ["advantage", "outcome", "msa", "cpr", "log_ratio"]


def terms(siblings: list[dict]) -> list[dict[str, list[float]]]:
    """Eq. 11 to 13 for one group in plain Python, from nothing but log-probs and rewards."""
    rewards = [line["reward"] for line in siblings]
    mean = sum(rewards) / G
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (G - 1))
    ratios = [[p - q for p, q in zip(s["log_prob"], s["ref_log_prob"], strict=True)] for s in siblings]
    cpr = [[BETA * sum(row[: t + 1]) for t in range(len(row))] for row in ratios]
    values = []
    for reward, ratio, sums in zip(rewards, ratios, cpr, strict=True):
        alive = [[other[t] for other in cpr if t < len(other)] for t in range(len(sums))]
        msa = [s - sum(others) / len(others) for s, others in zip(sums, alive, strict=True)]
        outcome = [(reward - mean) / (std + 1e-6) if std else 0.0] * len(sums)
        advantage = [a + b for a, b in zip(outcome, msa, strict=True)]
        values.append(dict(zip(VIEWS, (advantage, outcome, msa, sums, ratio), strict=True)))
    return values


def rollout() -> list[dict]:
    """Four groups of three: one that was not kept, one of equal rewards, two mixed; lengths differ."""
    draw, lines = random.Random(0), []
    for group, rewards in enumerate([[1, 1, 1], [0.5, 0.5, 0.5], [1, 0.8, 0.9], [0, 1, 0.3]]):
        for reward in rewards:
            texts = [draw.choice([" a", "b", "\n", "=", HOSTILE]) for _ in range(draw.randint(3, 9))]
            line = {"prompt": f"q{group} {HOSTILE}", "reference": HOSTILE, "text": "", "verdict": reward}
            line |= {"reward": reward, "reason": HOSTILE, "truncated": group == 1, "group": group, "token_text": texts}
            if group:
                numbers = {name: [-draw.expovariate(1) for _ in texts] for name in ("log_prob", "ref_log_prob")}
                line |= numbers | {"entropy": [draw.random() for _ in texts]}
            lines.append(line)
    for start in range(G, len(lines), G):
        for line, values in zip(lines[start : start + G], terms(lines[start : start + G]), strict=True):
            line["advantage"] = values["advantage"]
    return lines


LINES = rollout()


def without(line: dict, key: str) -> dict:
    return {name: value for name, value in line.items() if name != key}


def run_of(folder, lines=LINES, step=3, **algorithm):
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    config = {"run_dir": str(folder), "sample": {"group_size": G}}
    config["algorithm"] = {"advantage": "spro", "beta": BETA, **algorithm}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples" / f"step_{step:06d}.jsonl").write_text(text)
    return folder


def look(folder, *options) -> None:
    inspector.show(inspector.parser().parse_args([str(folder), *map(str, options)]))


def page_of(folder, *options) -> dict:
    """What the page of a run holds."""
    look(folder, "--html", folder / "page.html", *options)
    text = (folder / "page.html").read_text()
    return json.loads(text.split('<script id="data" type="application/json">')[1].split("</script>")[0])


def test_every_number_on_the_page_is_that_of_a_loop_over_the_dump(tmp_path):
    page = page_of(run_of(tmp_path))
    assert page["check"].startswith("✓") and [*page["views"]] == VIEWS
    assert [group["group"] for group in page["groups"]] == [3, 1, 2]  # the largest spread of rewards comes first
    for group in page["groups"]:
        siblings = [line for line in LINES if line["group"] == group["group"]]
        for line, expected, shown in zip(siblings, terms(siblings), group["responses"], strict=True):
            expected |= {name: line[name] for name in ("log_prob", "ref_log_prob", "entropy")}
            assert shown["values"].keys() == expected.keys()
            for name, values in expected.items():
                assert shown["values"][name] == pytest.approx(values, rel=6e-4, abs=1e-12), name


def scale_of(group: int, view: str) -> float:
    values = [v for line in terms([s for s in LINES if s["group"] == group]) for v in line[view]]
    return sorted(map(abs, values))[int(0.98 * (len(values) - 1))]


@pytest.mark.parametrize("view", VIEWS)
def test_without_colours_figures_stand_below_the_tokens_from_which_they_hold(view, tmp_path, capsys, monkeypatch):
    """Ten cells a token, four in a line: each figure has room, and the token above it is found by its column."""
    monkeypatch.setenv("COLUMNS", "45")
    lines = copy.deepcopy(LINES)
    for line in lines:
        line["token_text"] = [f"number{t:03} " for t in range(len(line["token_text"]))]
    look(run_of(tmp_path, lines), "--group", 2, "--view", view)
    apart, (_, *responses) = scale_of(2, view) / 4, capsys.readouterr().out.split("\n\n")
    for response, values in zip(responses, terms(LINES[6:9]), strict=True):
        found, above = {}, ""
        for row in response.splitlines():
            if "number" not in row:
                places = [(match.start(), float(match[0])) for match in re.finditer(r"(?<= )[-+][\d.e+-]+", row)]
                found |= {int(above[column + 6 : column + 9]): figure for column, figure in places if above}
            above = row if "number" in row else ""
        expected, last = {}, math.inf
        for t, value in enumerate(values[view]):
            if abs(value - last) >= apart:
                expected[t] = last = value
        assert found == {t: pytest.approx(value, rel=0.06) for t, value in expected.items()}


def test_a_terminal_shades_blue_above_0_and_orange_underlined_below(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    look(run_of(tmp_path), "--group", 3, "--view", "outcome")
    responses = capsys.readouterr().out.split("\n\n")[1:]
    for text, values in zip(responses, terms(LINES[9:12]), strict=True):
        below = values["outcome"][0] < 0
        assert ("\033[4;38;5;16;48;5;208m" if below else "\033[38;5;16;48;5;69m") in text or abs(
            values["outcome"][0]
        ) < 1
        assert ("\033[4;" in text) == below and ("\033[38;" in text) != below
    monkeypatch.setenv("NO_COLOR", "1")
    look(tmp_path)
    assert "\033" not in capsys.readouterr().out


def test_lines_keep_to_the_width_and_the_living_are_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = copy.deepcopy(LINES)
    for line in lines:
        line["token_text"] = ["wide漢字"[: 2 + i % 4] for i in range(len(line["token_text"]))]
    look(run_of(tmp_path, lines), "--group", 3)
    out = capsys.readouterr().out
    assert max(sum(1 + (c in "漢字") for c in line) for line in out.splitlines()) <= 40
    lengths = [len(line["token_text"]) for line in LINES[9:12]]
    ends = ", ".join(f"{sum(m >= n for m in lengths)} to token {n}" for n in sorted(set(lengths)))
    assert ends in re.sub(r"\s+", " ", out)


def test_a_group_that_was_not_kept_is_shown_without_shading_and_with_the_reason(tmp_path, capsys):
    look(run_of(tmp_path), "--group", 0)
    assert "did not keep this group" in re.sub(r"\s+", " ", capsys.readouterr().out)
    group = page_of(tmp_path, "--group", 0)["groups"][0]
    assert not group["kept"] and all("values" not in response for response in group["responses"])
    check = page_of(run_of(tmp_path / "none", LINES[:3]))["check"]
    assert check.startswith("⚠ no group of this step was kept")


@pytest.mark.parametrize("change", ["advantage", "beta", "estimator"])
def test_advantages_that_do_not_come_out_as_dumped_are_said_to(change, tmp_path, capsys):
    lines = copy.deepcopy(LINES)
    lines[-1]["advantage"][1] += 0.01 * (change == "advantage")
    algorithm = {"beta": {"beta": 0.2}, "estimator": {"advantage": "gone"}}.get(change, {})
    look(run_of(tmp_path, lines, **algorithm))
    assert "check     ⚠" in capsys.readouterr().out and page_of(tmp_path)["check"].startswith("⚠")


def test_rewards_shaped_for_training_are_those_compared_and_shown(tmp_path):
    lines = copy.deepcopy(LINES)
    for line in lines[9:]:
        line["reward"] = line["verdict"] - 0.25 * line["verdict"] ** 2
    for line, values in zip(lines[9:], terms(lines[9:]), strict=True):
        line["advantage"] = values["advantage"]
    page = page_of(run_of(tmp_path / "shaped", lines))
    assert page["check"].startswith("✓") and "0.75 as shaped" in page["groups"][0]["responses"][1]["verdict"]
    lines = [line | {"reward": line["verdict"]} for line in lines]
    assert page_of(run_of(tmp_path / "unshaped", lines))["check"].startswith("⚠")


def test_a_run_without_reference_has_no_step_term_to_show(tmp_path, capsys):
    lines = [{name: value for name, value in line.items() if name != "ref_log_prob"} for line in LINES]
    for start in range(G, len(lines), G):
        for line, values in zip(lines[start : start + G], terms(LINES[start : start + G]), strict=True):
            line["advantage"] = values["outcome"]
    page = page_of(run_of(tmp_path, lines, advantage="grpo"))
    assert [*page["views"]] == ["advantage", "outcome"] and "no reference" in page["absent"] and page["check"][0] == "✓"
    with pytest.raises(BadInput, match="no reference; choose advantage or outcome"):
        look(tmp_path, "--view", "msa")


def known(lines: list[dict]) -> list[dict]:
    """The lines of learned groups with two right steps, a wrong one and the rest, and with Monte-Carlo values."""
    out = copy.deepcopy(lines)
    for line in out:
        n = len(line["token_text"])
        if "advantage" in line:
            line |= {"step_label": [1, 1, 0, *[-1] * n][:n], "trace_id": [0, 1, 2, *[3] * n][:n]}
            line |= {"value_before": [0.25, *[0.5] * n][:n], "value_after": [0.5, *[0.125] * n][:n]}
    return out


def test_verified_steps_and_monte_carlo_values_are_views_where_they_are_dumped(tmp_path, capsys):
    page = page_of(run_of(tmp_path, known(LINES)))
    assert [*page["views"]] == [*VIEWS, "verified", "value_after", "value_gain"] and page["check"][0] == "✓"
    for line, response in zip(LINES[9:12], page["groups"][0]["responses"], strict=True):
        n = len(line["token_text"])
        assert response["values"]["verified"] == [1, 1, -1, *[0] * n][:n]
        assert response["values"]["value_after"] == [0.5, *[0.125] * n][:n]
        assert response["values"]["value_gain"] == [0.25, *[-0.375] * n][:n]
    look(tmp_path, "--view", "verified")
    assert re.search(r"view +verified: \+1 in a right step", capsys.readouterr().out)


@pytest.mark.parametrize(("view", "why"), [("verified", "does not verify its steps"), ("value_gain", "no Monte-Carlo")])
def test_a_view_that_is_not_dumped_is_refused_with_the_reason(view, why, tmp_path):
    with pytest.raises(BadInput, match=f"--view {view}: .*{why}.*; choose advantage or outcome or msa"):
        look(run_of(tmp_path), "--view", view)


def test_the_line_of_a_response_says_which_step_is_the_first_wrong_one(tmp_path):
    lines = known(LINES)
    for line in lines:
        line["token_text"] = ["3+5=8\n", "8-1=7\n", "9\x1b\n", *line["token_text"][3:]]
    lines[10]["step_label"] = [1, 1, 1, *lines[10]["step_label"][3:]]
    first, second, _ = page_of(run_of(tmp_path, lines))["groups"][0]["responses"]
    assert first["verdict"].endswith("tokens, 2 steps right, then ✗ 9\\x1b")
    assert second["verdict"].endswith("tokens, 3 steps right")


def test_a_value_that_is_not_finite_is_named_and_breaks_nothing(tmp_path, capsys):
    lines = copy.deepcopy(LINES)
    lines[9]["advantage"][0], lines[9]["log_prob"][2] = math.nan, -math.inf
    page = page_of(run_of(tmp_path, lines))
    values = page["groups"][0]["responses"][0]["values"]
    assert values["advantage"][0] is None and values["log_prob"][2] is None and page["check"].startswith("⚠")
    look(tmp_path)
    assert "+nan" in capsys.readouterr().out


def test_a_page_takes_further_groups_while_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(inspector, "PAGE_TOKENS", sum(len(line["token_text"]) for line in LINES[3:6] + LINES[9:12]))
    assert [group["group"] for group in page_of(run_of(tmp_path))["groups"]] == [3, 1]
    monkeypatch.setattr(inspector, "PAGE_TOKENS", 1)
    assert [group["group"] for group in page_of(tmp_path)["groups"]] == [3]


def broken(folder, text: str):
    file = run_of(folder) / "samples" / "step_000003.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], text, *lines[5:]]))


SHORT = json.dumps({**LINES[4], "entropy": [1.0]})
CASES = {
    "no run": (lambda f: f.mkdir(), [], "is not a run folder"),
    "no samples": (lambda f: shutil.rmtree(run_of(f) / "samples"), [], "holds no rollout yet"),
    "no such step": (lambda f: (run_of(f), run_of(f, step=12)), ["--step", 7], "step 7 was not dumped.* has 3, 12$"),
    "no such group": (run_of, ["--group", 9], r"step 3 has groups 0 to 3; kept: \[1, 2, 3\]"),
    "half a line": (lambda f: broken(f, '{"prompt": "x'), [], "step_000003.jsonl line 5 is broken"),
    "no object": (lambda f: broken(f, "17\n"), [], "line 5 is broken"),
    "a key is missing": (lambda f: broken(f, '{"prompt": "x"}\n'), [], "line 5 is broken: it has no 'reference'"),
    "a list is short": (lambda f: broken(f, SHORT + "\n"), [], "line 5 is broken: its lists .* differ in length"),
    "half a group": (lambda f: run_of(f, LINES[:-1]), [], "group 3 is not 3 whole responses"),
    "no reward": (lambda f: broken(f, json.dumps(LINES[4] | {"reward": None}) + "\n"), [], "its reward is no number"),
    "of an earlier version": (
        lambda f: broken(f, json.dumps(without(LINES[4], "token_text") | {"piece": ["Ġa"]}) + "\n"),
        [],
        "has no 'token_text'; dumps of an earlier version want the commit",
    ),
    "empty": (lambda f: run_of(f, []), [], "is empty"),
    "no folder for it": (run_of, ["--html", "/nowhere/page.html"], "/nowhere/page.html cannot be written"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_that_says_what_is_there(case, tmp_path):
    prepare, options, message = CASES[case]
    prepare(tmp_path / "run")
    with pytest.raises(BadInput, match=message) as error:
        look(tmp_path / "run", *options)
    assert "\n" not in str(error.value)


def test_what_a_model_wrote_cannot_command_the_terminal(tmp_path, capsys):
    look(run_of(tmp_path))
    out = capsys.readouterr().out
    assert not {c for c in out if not c.isprintable()} - {"\n"} and "\\x1b]0;hit\\x07\\u202e" in out


TEXT = "Ünïcode, 漢字\tand\n\n  🙂 {x}  42"


def sentencepiece(texts: list[str]):
    """A tokenizer as Llama 2 has it: a space is ▁, an unknown character its bytes, and the first space is dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, limit_alphabet=30, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "characters"])
def test_the_texts_of_a_dumps_tokens_join_to_the_response(kind):
    learned = ["and the text, and {x}", "Unicode and 42"] * 3
    tokenizers = {
        "byte-level": chat_tokenizer,
        "sentencepiece": sentencepiece,
        "characters": lambda _: chain_tokenizer(),
    }
    tokenizer = tokenizers[kind](learned)
    text = "b1+2=3;#3" if kind == "characters" else TEXT
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = token_texts(tokenizer)(ids)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert ("" in texts) == (kind != "characters")  # a byte that is a part of a character
    for t in range(len(ids)):  # cut anywhere
        joined = "".join(token_texts(tokenizer)(ids[:t]))
        assert text.startswith(joined.rstrip("\ufffd"))
        assert joined.startswith(tokenizer.decode(ids[:t]).rstrip("\ufffd"))


def test_a_character_belongs_to_the_token_that_completes_it():
    tokenizer = chat_tokenizer(["x"])
    space, *accent = tokenizer(" é").input_ids
    first, second, *_ = tokenizer("🙂").input_ids  # each token is a byte
    (letter,) = tokenizer("a").input_ids
    texts_of = token_texts(tokenizer)
    assert texts_of([space, *accent, tokenizer.eos_token_id]) == [" ", "", "é", "<|im_end|>"]
    assert texts_of([first, letter, second]) == ["", "\ufffda", "\ufffd"]  # bytes that are no character
    merged = chat_tokenizer([" 好 奥 妇"], vocabulary=3 + 256 + 2)  # a space and two bytes of three have become a token
    ids = merged(" 好").input_ids
    assert len(ids) == 2 and token_texts(merged)(ids) == [" ", "好"]
    assert inspector.shown({"token_text": ["", "é", "\x1b"]}) == ["◌", "é", "\\x1b"]


def test_a_run_is_inspected_from_the_command_line_without_its_model(tmp_path, warm):
    folder = tmp_path / "run"
    finished(
        folder, warm, "train.steps=2", "train.dump_every=1", "reward.overlong_buffer=10", "train.learning_rate=1e-2"
    )
    shutil.rmtree(folder / "model")
    script = [sys.executable, "-m", "tools.inspector", str(folder)]
    done = subprocess.run(script, cwd=chaos.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "step 2," in done.stdout and "check     ✓" in done.stdout, done.stderr
    assert "as shaped for training" in re.sub(r"\s+", " ", done.stdout)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no browser to look at the page with: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = run_of(tmp_path_factory.mktemp("page"))
    page_of(folder)
    return (folder / "page.html").as_uri()


def token(response: int, position: int) -> str:
    return f"article:nth-child({response}) .t:nth-child({position})"


def readout(browser) -> dict[str, str]:
    pairs = (
        "[...document.querySelectorAll('#readout dl div')].map(e => [e.children[0].innerText, e.children[1].innerText])"
    )
    return dict(browser.run(pairs))


def shades(browser) -> list[int]:
    """The sign of every token of the group as it is drawn: a line above, none, or a line below."""
    styles = "[...document.querySelectorAll('.t')].map(e => getComputedStyle(e))"
    edges = browser.run(f"{styles}.map(s => [s.borderTopColor, s.borderBottomColor, s.backgroundColor])")
    clear = "rgba(0, 0, 0, 0)"
    assert all((above == below == clear) == (background == clear) for above, below, background in edges)
    return [(above != clear) - (below != clear) for above, below, _ in edges]


def expected_shades(group: int, view: str) -> list[int]:
    values = [v for line in terms([s for s in LINES if s["group"] == group]) for v in line[view]]
    scale = scale_of(group, view)
    return [(v > 0.02 * scale) - (v < -0.02 * scale) for v in values]


def figures(group: int, response: int, position: int) -> dict[str, float]:
    values = terms([line for line in LINES if line["group"] == group])[response - 1]
    return {
        name: values[view][position - 1] for name, view in (("advantage", "advantage"), ("MSA", "msa"), ("CPR", "cpr"))
    }


def shown_figures(browser) -> dict[str, float]:
    return {name: float(readout(browser)[name].replace("\u2212", "-")) for name in ("advantage", "MSA", "CPR")}


def test_the_page_opens_from_disk_quietly_and_asks_the_network_for_nothing(browser, address):
    browser.look(1200, 800)
    browser.open(address)
    for view in reversed(VIEWS):
        browser.click(f"label:has([value={view}])")
        assert browser.run("location.hash").endswith(f"view={view}")
        assert shades(browser) == expected_shades(3, view)
    assert browser.complaints() == [] and browser.requests() == [address]


def test_the_first_wrong_step_is_underlined_in_every_view(browser, tmp_path):
    page_of(run_of(tmp_path, known(LINES)))
    browser.open((tmp_path / "page.html").as_uri())
    lines = (
        "[...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.t')]"
        ".map(t => getComputedStyle(t).textDecorationStyle == 'wavy'))"
    )
    for view in ("advantage", "verified"):
        browser.click(f"label:has([value={view}])")
        expected = [[t == 2 for t in range(len(line["token_text"]))] for line in LINES[9:12]]
        assert browser.run(lines) == expected
    assert browser.complaints() == []


def test_another_group_is_chosen_from_the_menu(browser, address):
    browser.open(address)
    browser.run("$('group').value = 2; $('group').dispatchEvent(new Event('change'))")
    assert shades(browser) == expected_shades(2, "advantage") and "q2" in browser.run("$('prompt').textContent")


def test_pointing_shows_a_tokens_values_and_a_click_keeps_them(browser, address):
    browser.look(1200, 800)
    browser.open(address)
    assert "Point at a token" in browser.run("readout.innerText")
    browser.point(token(2, 3))
    assert shown_figures(browser) == pytest.approx(figures(3, 2, 3), rel=6e-3)
    browser.point("h1")
    assert "Point at a token" in browser.run("readout.innerText")
    browser.click(token(2, 2))
    browser.point("h1")
    assert shown_figures(browser) == pytest.approx(figures(3, 2, 2), rel=6e-3)
    living = sum(len(line["token_text"]) >= 2 for line in LINES[9:12])
    assert readout(browser)["alive"] == f"{living} of 3" and readout(browser)["token"].startswith("2 of")
    assert browser.run("document.querySelectorAll('.here, .level').length") == living


def test_the_keyboard_reaches_views_and_tokens(browser, address):
    browser.open(address)
    for key in ("Tab", "Tab", "ArrowRight"):  # menu, views
        browser.press(key)
    assert shades(browser) == expected_shades(3, "outcome")
    for key in ("Tab", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp"):
        browser.press(key)
    assert shown_figures(browser) == pytest.approx(figures(3, 1, 2), rel=6e-3)


def test_on_a_phone_nothing_overflows_and_a_tap_shows_values(browser, address):
    browser.look(375, 700, phone=True)
    browser.open(address)
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    browser.tap(token(3, 2))
    assert shown_figures(browser) == pytest.approx(figures(3, 3, 2), rel=6e-3)
    assert browser.run("document.documentElement.scrollWidth") == 375
    assert browser.run("readout.getBoundingClientRect().height") <= 0.4 * 700
    browser.look(1200, 800)


def test_text_in_tokens_reads_as_text_with_its_spaces_and_line_ends_marked(browser, tmp_path):
    lines = copy.deepcopy(LINES)
    for line in lines:
        written = ["The", " num", "ber", ".", "\n", "\n", "I", "s", "  7"]
        line["token_text"] = written[: len(line["token_text"])]
    page_of(run_of(tmp_path, lines))
    browser.look(1200, 800)
    browser.open((tmp_path / "page.html").as_uri())
    row = max(range(3), key=lambda i: len(lines[9 + i]["token_text"])) + 1
    tokens = f"[...document.querySelectorAll('article:nth-child({row}) .t')]"
    texts = lines[8 + row]["token_text"]
    assert browser.run(f"{tokens}.map(t => t.textContent)") == texts and len(texts) > 7
    boxes = [box for box in browser.run(f"{tokens}.map(t => t.getClientRects()[0].toJSON())")]
    assert all(boxes[t + 1]["left"] == pytest.approx(boxes[t]["right"], abs=0.1) for t in (0, 1, 2, 3, 6))
    tops = [box["top"] for box in boxes]
    assert tops[0] == tops[4] < tops[5] < tops[6] == tops[7]
    browser.point(f"article:nth-child({row}) .t:nth-child(2) i")  # its space
    assert readout(browser)["token"].startswith("2 of")
    marks = browser.run(f"{tokens}.map(t => [...t.children].map(m => m.className))")
    assert marks == [["space" if c == " " else "end" for c in text if c in " \n"] for text in texts]
    look_of = "[e => getComputedStyle(e).backgroundImage, e => getComputedStyle(e, '::before').content]"
    drawn = browser.run(f"{look_of}.map((f, k) => f(document.querySelector(['.space', '.end'][k])))")
    assert "gradient" in drawn[0] and drawn[1] == '"↵"'


def test_an_address_leads_to_the_token_it_names_and_nonsense_to_the_start(browser, address):
    browser.open(address + "#group=2&view=cpr&response=3&token=2")
    assert shades(browser) == expected_shades(2, "cpr")
    assert shown_figures(browser) == pytest.approx(figures(2, 3, 2), rel=6e-3)
    browser.open(address + "#group=x&view=constructor&response=99&token=-1")
    assert shades(browser) == expected_shades(3, "advantage") and browser.complaints() == []


def test_what_a_model_wrote_is_inert_text(browser, address):
    browser.open(address)
    assert browser.run("document.body.innerText").count("<img src=x onerror=window.hit=1>") > 5
    assert browser.run("[document.images.length, document.scripts.length, typeof hit]") == [0, 2, "undefined"]
    attack = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1><script>hit=1</script>')"
    browser.run(attack)  # even where it was parsed, the page's policy keeps it from running
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof hit") == "undefined"
    refused = [e["params"] for e in browser.events if e.get("method") == "Network.loadingFailed"]
    assert [failure.get("blockedReason") for failure in refused] == ["csp"] and len(browser.requests()) == 2


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour.strip().lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * c for c in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_shade_in_light_and_dark(dark, browser, address):
    browser.look(1200, 800, dark=dark)
    browser.open(address)
    names = ["ink", "soft", "paper", "card", "plus", "minus", "plus-bar", "minus-bar"]
    values = f"{names}.map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n))"
    light = {name: luminance(value) for name, value in zip(names, browser.run(values), strict=True)}
    assert (light["paper"] < 0.1) == dark
    pairs = [("ink", ground) for ground in ("paper", "card", "plus", "minus")]
    pairs += [("soft", "paper"), ("plus-bar", "card"), ("minus-bar", "card")]
    for one, other in pairs:
        low, high = sorted((light[one], light[other]))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (one, other)
