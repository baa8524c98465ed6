"""Monte-Carlo values: against exact ones by enumeration, what is continued and with which luck, and whole runs."""

import dataclasses
import json
import math

import infra.config
import pytest
import sample as sampler
import torch
import train
from baselines import steps, values
from infra import console, memory, metrics, waiting
from infra.rng import Draw
from infra.sharding import decoder_layers
from rewards import Grader, RewardConfig, Verdict
from sample import SampleConfig, sample
from spro import AlgorithmConfig, Batch
from tasks.chain import chain_tokenizer
from tasks.problem import Problem
from tools import report

import chaos
from conftest import finished
from helpers import EOS, PROMPTS, any_model, keys, tiny_model
from test_ranks import assert_a_kill_in_step_4_changes_nothing, assert_alike, learned_rows

KEY = (0, int(Draw.CONTINUE), 3)
TOKENIZER = chain_tokenizer()  # one character, one token
TEXTS = ["b1+2=3;#3", "b1+2=3;c3*2=6;#6", "#7", "b1+2=4;#", "", "(b9*9=1)b9*9=1;", "b9*9=1;#", "b9*9=2;#1"]


def batch_of(texts=TEXTS, scores=None, group_size=4) -> Batch:
    """Responses as they are written, behind two prompts in turn by group, with these verdicts (right and wrong)."""
    prompts = [PROMPTS[1 + i // group_size % 2] for i in range(len(texts))]
    batch = Batch.from_texts(prompts, texts, TOKENIZER)
    scores = [float(i % 2) for i in range(len(texts))] if scores is None else scores
    problems = tuple(Problem("?", str(i // group_size), "chain") for i in range(len(texts)))
    verdicts = tuple(Verdict(score, "made up") for score in scores)
    return dataclasses.replace(batch, problems=problems, verdicts=verdicts, group_size=group_size)


def cut(batch: Batch, **algorithm) -> torch.Tensor:
    return steps.step_ids(batch, TOKENIZER, AlgorithmConfig(**algorithm))


class Scores:
    """A grader that scores a text by a function of it, and notes what it was asked."""

    def __init__(self, score):
        self.score, self.answers = score, []

    def grade(self, answers) -> list[Verdict]:
        self.answers += answers
        return [Verdict(self.score(text), "made up") for _, text in answers]

    @property
    def texts(self) -> list[str]:
        return [text for _, text in self.answers]


def estimated(policy, batch, ids, grader, continuations=3, key=KEY, **sampling):
    config = SampleConfig(**{"group_size": 4, "max_new_tokens": 30, **sampling})
    return values.continue_prefixes(policy, batch, ids, continuations, config, grader, key)


@pytest.fixture(scope="module")
def policy():
    return tiny_model()


@pytest.fixture
def nothing_new(monkeypatch):
    """A sampler that ends every prefix at once: what is graded is the prefix itself."""

    def end(policy, prompts, keys, config, group_size):
        prompts = [prompt for prompt in prompts for _ in range(group_size)]
        return Batch.from_texts(prompts, [""] * len(prompts), TOKENIZER)

    monkeypatch.setattr(values, "sample", end)


# --- against exact values -----------------------------------------------------------------------------------------

LIMIT = 2
STOPS = [EOS, *range(20, 30)]  # so that some responses end by themselves


def odd(text: str) -> float:
    return float(sum(map(ord, text)) % 2)


@torch.no_grad()
def exact_value(policy, prompt: list[int], begun: list[int]) -> float:
    """The chance that a response that begins so is odd, over all that can follow; in float64."""
    alive, ended = [(begun, 1.0)], 0.0
    for _ in range(LIMIT - len(begun)):
        rows = torch.tensor([prompt + response for response, _ in alive])
        p = policy.model(rows).logits[:, -1, : policy.vocab_size].double().softmax(-1).tolist()
        ways = [([*response, i], chance * q[i]) for (response, chance), q in zip(alive, p, strict=True)
                for i in range(len(q))]  # fmt: skip
        ended += sum(chance * odd(text_of(response)) for response, chance in ways if response[-1] in STOPS)
        alive = [(response, chance) for response, chance in ways if response[-1] not in STOPS]
    return ended + sum(chance * odd(text_of(response)) for response, chance in alive)


CHARACTERS = [TOKENIZER.decode([i], skip_special_tokens=True) for i in range(len(TOKENIZER))]


def text_of(ids: list[int]) -> str:
    return "".join(CHARACTERS[i] for i in ids)


@pytest.fixture(scope="module")
def sampled():
    """(a policy, its responses of at most two tokens, {(row, tokens begun): exact value of that prefix})."""
    policy = tiny_model()
    policy.stop_ids = STOPS
    config = SampleConfig(group_size=6, max_new_tokens=LIMIT)
    batch = sample(policy, [PROMPTS[1], PROMPTS[3]], keys(2), config)
    verdicts = tuple(Verdict(odd(text), "odd") for text in batch.texts)
    batch = dataclasses.replace(batch, problems=(Problem("?", "1", "chain"),) * len(batch), verdicts=verdicts)
    assert batch.truncated.any() and not batch.truncated.all()
    found, known = {}, {}
    for row in range(len(batch)):
        prompt = batch.tokens[row, : batch.prompt_length][batch.attention_mask[row, : batch.prompt_length]].tolist()
        response = batch.tokens[row, batch.prompt_length :][batch.mask[row]].tolist()
        for n in range(len(response)):
            place = (*prompt, -1, *response[:n])
            known[place] = known[place] if place in known else exact_value(policy, prompt, response[:n])
            found[row, n] = known[place]
    return policy, batch, found


def errors(sampled, continuations: int, seeds: int) -> list[tuple[float, list[float]]]:
    """(exact value, the errors of its estimates by each seed) of every prefix that is no certainty."""
    policy, batch, exact = sampled
    ids = cut(batch, step_tokens=1)
    drawn = [
        estimated(policy, batch, ids, Scores(odd), continuations, (seed, *KEY[1:]), max_new_tokens=LIMIT)[0]
        for seed in range(seeds)
    ]
    distinct = {value: place for place, value in exact.items() if 0.05 < value < 0.95}  # siblings share their prompt
    return [(value, [before[place].item() - value for before in drawn]) for value, place in distinct.items()]


def test_the_mean_of_many_estimates_is_the_exact_value_by_enumeration(sampled):
    found = errors(sampled, continuations=10, seeds=30)
    assert len(found) > 5
    for value, off in found:
        standard_error = math.sqrt(value * (1 - value) / (10 * 30))
        assert abs(sum(off) / 30) < 4 * standard_error, value


@pytest.mark.parametrize("continuations", [3, 27])
def test_the_error_falls_as_one_over_the_square_root_of_the_continuations(continuations, sampled):
    found = errors(sampled, continuations, seeds=20)
    ratios = [x * x * continuations / (value * (1 - value)) for value, off in found for x in off]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=4 * math.sqrt(2 / len(ratios)))


# --- what is continued --------------------------------------------------------------------------------------------


def slow_values(texts, verdicts, step_of, value) -> list[list[tuple[float, float]]]:
    """(before, after) of each token, the stop token included; step_of(text, t): the step of token t."""
    found = []
    for text, verdict in zip(texts, verdicts, strict=True):
        numbers = [step_of(text, t) for t in range(len(text) + 1)]
        row = []
        for number in numbers:
            first = numbers.index(number)
            behind = first + numbers.count(number)
            is_last = behind == len(numbers)
            row.append((value(text[:first]), verdict if is_last else value(text[:behind])))
        found.append(row)
    return found


@pytest.mark.parametrize("cutting", [{"line_end": ";"}, {"step_tokens": 4}, {"step_tokens": 1}, {"step_tokens": 99}])
def test_a_token_has_the_values_of_the_prefixes_at_which_its_step_begins_and_ends(cutting, policy, nothing_new):
    batch, grader = batch_of(), Scores(lambda text: len(text) / 32)
    before, after, _ = estimated(policy, batch, cut(batch, **cutting), grader)
    tokens = cutting.get("step_tokens")
    scores = [verdict.score for verdict in batch.verdicts]
    expected = slow_values(TEXTS, scores, lambda text, t: t // tokens if tokens else text[:t].count(";"), grader.score)
    for row, of_row in enumerate(expected):
        n = len(of_row)
        assert batch.mask[row].sum() == n and not before[row, n:].any() and not after[row, n:].any()
        assert list(zip(before[row, :n].tolist(), after[row, :n].tolist(), strict=True)) == of_row


def test_a_response_of_one_step_has_the_prompts_value_before_and_its_own_verdict_after(policy):
    texts = ["#3", "#4"]
    grader, batch = Scores(lambda text: 0.25), batch_of(texts, [0.0, 1.0], 2)
    before, after, counts = estimated(policy, batch, cut(batch, line_end=";"), grader)
    assert before.tolist() == [[0.25] * 3] * 2 and after.tolist() == [[0.0] * 3, [1.0] * 3]
    assert counts["values/continuations"] == 3  # of the prompt, which the siblings share


def test_siblings_that_begin_alike_share_the_estimate_and_other_groups_do_not(policy, nothing_new):
    batch, grader = batch_of(), Scores(lambda text: 0.5)
    _, _, counts = estimated(policy, batch, cut(batch, line_end=";"), grader, continuations=5)
    begun = {(i // 4, text[:n]) for i, text in enumerate(TEXTS) for n in range(len(text) + 1)
             if not n or text[n - 1] == ";"}  # fmt: skip
    assert counts["values/continuations"] == 5 * len(begun) == len(grader.answers)
    asked = [(int(problem.reference), text) for problem, text in grader.answers]
    assert set(asked) == begun and all(asked.count(place) == 5 for place in begun)
    assert counts["values/tokens"] == len(asked)  # the one that ends each


def test_prefix_and_continuation_are_one_response_within_the_limit(policy):
    batch, grader = batch_of(), Scores(lambda text: 0.5)
    _, _, counts = estimated(policy, batch, cut(batch, step_tokens=3), grader, max_new_tokens=17)
    begun = {(i // 4, text[:n]) for i, text in enumerate(TEXTS) for n in range(0, len(text) + 1, 3)}
    assert counts["values/continuations"] == 3 * len(begun) == len(grader.answers)
    for group, prefix in begun:
        texts = [text for problem, text in grader.answers if problem.reference == str(group)]
        assert sum(text.startswith(prefix) for text in texts) >= 3
    lengths = [len(text) for text in grader.texts]
    assert max(lengths) <= 17 and sum(length > 12 for length in lengths) > 5


def test_a_response_that_was_cut_at_the_limit_is_not_continued(policy):
    batch = batch_of(["b1+2=3;c"] * 2, [0.0, 1.0], 2)
    whole = batch.tokens[:, batch.prompt_length :].clone()
    mask = batch.mask.clone()
    mask[:, -1] = False  # no stop token
    attention_mask = torch.cat([batch.attention_mask[:, : batch.prompt_length], mask], 1)
    batch = dataclasses.replace(batch, mask=mask, attention_mask=attention_mask).trim()
    assert batch.mask.sum(1).tolist() == [8, 8] and whole.shape[1] == 9
    grader = Scores(lambda text: 0.25)
    _, after, counts = estimated(policy, batch, cut(batch, step_tokens=8), grader, max_new_tokens=8)
    assert after.tolist() == [[0.0] * 8, [1.0] * 8] and counts["values/continuations"] == 3  # of the prompt
    _, after, _ = estimated(policy, batch, cut(batch, step_tokens=7), grader, max_new_tokens=8)
    assert after[:, 7].tolist() == [0.0, 1.0] and all(len(text) <= 8 for text in grader.texts)


def test_a_stop_string_that_begins_in_the_prefix_ends_the_response(policy):
    batch, stop = batch_of(["b1+2=3;#3"] * 2, group_size=2), [f";{character}" for character in CHARACTERS if character]
    ids = cut(batch, line_end=";")
    without, grader = Scores(lambda text: 0.5), Scores(lambda text: 0.5)
    estimated(policy, batch, ids, without, 40)
    _, _, counts = estimated(policy, batch, ids, grader, 40, stop=stop)
    expected = []
    for text in without.texts:
        places = [text.find(string) for string in stop if string in text]
        expected.append(text[: min(places, default=None)])
    assert grader.texts == expected
    straddling = [text for text in grader.texts if text == "b1+2=3"]
    assert len(straddling) > 20 and counts["values/tokens"] < 1.1 * sum(map(len, grader.texts))


def test_a_verdict_that_failed_is_left_out_and_where_none_is_left_the_step_earns_nothing(policy, nothing_new):
    texts = ["b1+2=3;c3*2=6;d6-1=5;#5", "#1", "#2", "#3"]
    failing = {"b1+2=3;c3*2=6;"}

    def score(text):
        return None if text in failing else {"": 0.5}.get(text, 0.75)

    batch = batch_of(texts, [1.0, 0.0, 0.0, 0.0])
    before, after, counts = estimated(policy, batch, cut(batch, line_end=";"), Scores(score))
    assert [row[0] for row in before[0].split(7)[:4]] == [0.5, 0.75, 0.75, 0.75]
    assert [row[0] for row in after[0].split(7)[:4]] == [0.75, 0.75, 0.75, 1.0]
    assert counts["values/faults"] == 3
    failing |= {"", "b1+2=3;"}  # then the prompt is worth what its responses are
    before, after, counts = estimated(policy, batch, cut(batch, line_end=";"), Scores(score))
    assert [row[0] for row in before[0].split(7)[:4]] == [0.25, 0.25, 0.25, 0.75]
    assert counts["values/faults"] == 9

    calls = []

    def every_other(text):
        calls.append(text)
        return None if len(calls) % 2 else len(calls) / 10

    one = batch_of(["#1", "#2"], [0.0, 1.0], 2)
    before, _, counts = estimated(policy, one, cut(one, line_end=";"), Scores(every_other), 4)
    assert before[0, 0].item() == pytest.approx((0.2 + 0.4) / 2) and counts["values/faults"] == 2


def test_a_batch_of_no_responses_has_no_values(policy):
    batch = batch_of().select(torch.tensor([], dtype=torch.long))
    before, after, counts = estimated(policy, batch, cut(batch, step_tokens=2), Scores(odd))
    assert before.shape == after.shape == batch.mask.shape and not any(counts.values())


# --- luck, and which are continued together -----------------------------------------------------------------------


def luck_and_values(policy, batch, monkeypatch, key=KEY, **sampling):
    """({graded text begun: its keys}, before) of an estimate with lines as steps."""
    drawn, real = [], sampler.uniforms
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniforms", lambda keys, length: drawn.extend(keys) or real(keys, length))
        before, after, _ = estimated(policy, batch, cut(batch, line_end=";"), Scores(odd), key=key, **sampling)
    return drawn, before, after


def test_luck_is_a_function_of_seed_step_prefix_and_number_whatever_else_is_in_the_batch(policy, monkeypatch):
    batch = batch_of()
    whole, before, after = luck_and_values(policy, batch, monkeypatch)
    assert len(set(whole)) == len(whole) and all(key[:3] == KEY for key in whole)
    assert {key[-1] for key in whole} == {0, 1, 2}
    parts = []
    for rows, sampling in (([4, 5, 6, 7], {}), ([3, 1, 2, 0], {"batch_tokens": 40, "decoding": "plain"})):
        rows = torch.tensor(rows)
        part, its_before, its_after = luck_and_values(policy, batch.select(rows), monkeypatch, **sampling)
        parts += part
        assert its_before.equal(before[rows]) and its_after.equal(after[rows])
    assert sorted(parts) == sorted(whole)
    other, _, _ = luck_and_values(policy, batch, monkeypatch, key=(0, KEY[1], 4))
    assert not set(other) & set(whole)


def test_prefixes_that_differ_in_one_token_or_its_place_have_other_paths():
    rows = [[5], [5, 0], [0, 5], [5, 6], [6, 5], [5, 6, 0]]
    assert len({values.path_of(torch.tensor(row)) for row in rows}) == len(rows)
    ids = torch.arange(20)
    assert values.path_of(ids[3:9]) == values.path_of(torch.tensor([3, 4, 5, 6, 7, 8]))


@pytest.mark.parametrize("context", [math.inf, 60, 50])
def test_a_part_wastes_less_than_half_its_tokens_keeps_to_the_context_and_is_not_too_large(context, monkeypatch):
    monkeypatch.setattr(values, "AT_ONCE", 40)
    prefixes = [values.Prefix(i, n, torch.arange(10 + n), (0, n)) for i in range(3) for n in range(0, 40, 3)]
    parts = values.parts_of(prefixes, 4, 40, context)
    assert sorted(id(p) for part in parts for p in part) == sorted(map(id, prefixes))
    for part in parts:
        new = 40 - part[0].start
        assert len(part) <= 10
        assert all(new <= 2 * (40 - p.start) and new >= 40 - p.start for p in part)
        assert all(len(p.ids) + new <= context for p in part)


def test_a_model_with_a_table_of_positions_is_never_asked_beyond_it(tmp_path):
    policy = any_model("gpt2", tmp_path)  # 64 positions
    texts = ["b1+2=3;c3*2=6;d6-1=5;#5", "b1+2=3;c3*2=6;d6-1=4;#4"]
    batch = batch_of(texts, group_size=2)
    prompt = torch.full((2, 64 - 24 - 7), 9)
    tokens, there = torch.cat([prompt, batch.tokens], 1), torch.ones_like(prompt, dtype=torch.bool)
    attention_mask = torch.cat([there, batch.attention_mask], 1)
    batch = dataclasses.replace(batch, tokens=tokens, attention_mask=attention_mask)
    assert attention_mask.sum(1).tolist() == [64, 64]
    grader = Scores(odd)
    for decoding in ("fast", "plain"):
        estimated(policy, batch, cut(batch, step_tokens=5), grader, max_new_tokens=24, decoding=decoding)
    assert max(map(len, grader.texts)) <= 24


# --- what is said -------------------------------------------------------------------------------------------------


def config_with(**blocks) -> train.Config:
    return infra.config.build_config(train.Config, blocks, infra.config.all_keys(train.Config))


def test_the_start_of_a_run_says_how_often_prefixes_are_continued(policy):
    def said(**algorithm):
        config = config_with(algorithm=algorithm, values={"continuations": 8})
        return [line for line in console.describe(config, policy, [], 0, Grader(RewardConfig()), {}, 1).splitlines()]

    (line,) = [line for line in said(advantage="vine") if line.startswith("values")]
    assert line.startswith("values   8 continuations from the beginning of every line of every response")
    sizes = config_with()
    responses = sizes.train.prompts_per_step * sizes.sample.group_size
    assert line.endswith(f"at most {8 * responses:,} a step for every line that responses have")
    (line,) = [line for line in said(advantage="pav", step_tokens=16) if line.startswith("values")]
    stretches = math.ceil(sizes.sample.max_new_tokens / 16)
    assert "every stretch of 16 tokens" in line and line.endswith(f"at most {8 * responses * stretches:,} a step")
    assert not [line for line in said(advantage="grpo") if line.startswith("values")]


def test_a_terminal_is_told_which_part_of_the_values_is_under_way(policy, monkeypatch):
    monkeypatch.setattr(waiting, "now", waiting.Progress())
    batch, lines = batch_of(), []
    with metrics.timed({}, "time/values"):
        estimated(policy, batch, cut(batch, step_tokens=2), Scores(lambda text: lines.append(waiting.line()) or 0.5))
    assert any(line.startswith("values, part 2/") for line in lines)


def test_the_memory_plan_of_sampled_values_is_not_bounded_by_the_number_of_responses(policy, monkeypatch):
    sampled = {}
    for advantage in ("grpo", "vine"):
        config = config_with(algorithm={"advantage": advantage}, train={"prompts_per_step": 4})
        with monkeypatch.context() as patch:
            patch.setattr(memory, "memory_plan", lambda *arguments: sampled.update({advantage: arguments[5]}) or {})  # noqa: B023
            memory.dry_run_report(config, policy, decoder_layers(policy), PROMPTS, 16384)
    assert sampled["grpo"].sampled_tokens == 4 * 8 * (7 + 110) and sampled["vine"].sampled_tokens == 16384


def test_the_report_counts_the_tokens_of_continuations(tmp_path):
    rows = [{"step": i, "tokens_per_second": 40.0, "time/step": 2.0, "values/tokens": 100 * i} for i in (1, 2)]
    run = report.Run(tmp_path, {}, [{"step": 0}, *rows])
    x = report.FIGURES["accuracy-tokens"][2]
    assert report.along(run, x)[1:].tolist() == [80 + 100, 160 + 300]


def test_a_run_of_no_continuations_is_refused():
    with pytest.raises(infra.errors.BadInput, match="continuations=0 must be at least 1"):
        config_with(values={"continuations": 0})


# --- whole runs ---------------------------------------------------------------------------------------------------

VINE = ("algorithm.advantage=vine", "algorithm.line_end=;", "values.continuations=2", "train.steps=4")
VINE += ("train.dump_every=2", "train.save_every=2", "eval.every=4")


@pytest.fixture(scope="module")
def straight(warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vine") / "run"
    finished(folder, warm, *VINE)
    return folder


def test_dumped_advantages_are_differences_of_values_that_add_up_to_the_verdict(straight):
    rows = learned_rows(straight)
    assert rows and len({x for row in rows for x in row["advantage"]}) > 2
    for row in rows:
        first = [t for t, number in enumerate(row["step_id"]) if number not in row["step_id"][:t]]
        assert [row["token_text"][:t].count(";") for t in range(len(row["id"]))] == row["step_id"]
        differences = [b - a for a, b in zip(row["value_before"], row["value_after"], strict=True)]
        assert row["advantage"] == pytest.approx(differences)
        total = sum(row["advantage"][t] for t in first)
        assert total == pytest.approx(row["verdict"] - row["value_before"][0])
        assert row["value_after"][-1] == row["verdict"]
        assert {2 * value for value in row["value_before"]} <= {0, 1, 2}
    prompts = {(row["group"], row["value_before"][0]) for row in rows}
    assert len(prompts) == len({row["group"] for row in rows})  # one estimate for all siblings


def test_a_run_with_values_has_their_metrics_and_no_reference(straight):
    last = chaos.metrics(straight)[-1]
    assert last["values/continuations"] % 2 == 0 and last["values/tokens"] >= last["values/continuations"] > 0
    assert last["values/faults"] == 0 and last["advantage/step_abs"] > 0 == last["advantage/outcome_abs"]
    assert "kl/ref" not in last
    assert "time/values" in json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])


def test_two_processes_value_prefixes_as_one_does(straight, warm, tmp_path):
    finished(tmp_path / "two", warm, *VINE, ranks=2)
    assert_alike(chaos.metrics(straight), chaos.metrics(tmp_path / "two"))
    of_one, of_two = learned_rows(straight), learned_rows(tmp_path / "two")
    assert len(of_one) == len(of_two) > 0
    for row, other in zip(of_one, of_two, strict=True):
        assert all(row[name] == other[name] for name in ("text", "value_before", "value_after"))


@pytest.mark.parametrize("moment", ["generate", "update"])
def test_a_kill_and_a_resume_change_nothing(moment, straight, warm, tmp_path):
    n = 40 if moment == "generate" else 1  # beyond the 14 tokens of stage 1: a prefix is being continued
    assert_a_kill_in_step_4_changes_nothing(straight, tmp_path / "run", (warm, *VINE), moment, n)
