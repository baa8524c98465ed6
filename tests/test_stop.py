"""Stop strings against the slow way: decode every prefix of a response, look for the first that holds one."""

import dataclasses
import itertools
from functools import cache

import infra.config
import pytest
import torch
import train
import yaml
from infra import console
from infra.errors import BadInput
from model import batch_log_probs, load
from sample import SampleConfig, sample
from tasks.characters import character_tokenizer
from tasks.responses import EndOfResponse
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from helpers import chat_tokenizer, keys, rows_of, saved_chat_model, tiny_model

TEXTS = ["Question: 7 + 5\n\nAnswer: 12\n\n", "é, ü and ñ\n", "a\nb\n\nc 你好\n"] * 3
CONFIG = SampleConfig(group_size=12, max_new_tokens=14)


@cache
def decoded(tokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def slow_end(tokenizer, ids: list[int], strings: list[str], stop_ids) -> tuple[int, str] | None:
    """(length, text) of a response that ends within `ids`; None where it does not."""
    for n in range(1, len(ids) + 1):
        text = decoded(tokenizer, tuple(ids[:n]))
        places = [text.index(string) for string in strings if string in text]
        if places or ids[n - 1] in stop_ids:
            return n, text[: min(places)] if places else text
    return None


class Stand:
    """What EndOfResponse reads of a Policy."""

    device = torch.device("cpu")

    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size, self.stop_ids = tokenizer, len(tokenizer), [tokenizer.eos_token_id]


def byte_fallback_tokenizer():
    """As SentencePiece models are: words begin with a mark, and other characters are written byte by byte."""
    special = ["<unk>", "<s>", "</s>"]
    words = ["▁a", "▁", "b", ".", "\n", "▁.", "a\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


# For each kind of tokenizer: pieces of its vocabulary, all sequences of which are tried, and stop strings.
CASES = {
    "bytes": (
        chat_tokenizer(TEXTS),
        # Line ends, alone and in company; a letter; both bytes of é; a special token that ends nothing
        ["Ċ", "ĊĊ", "a", "Ã", "©", "<|endoftext|>"],
        [["\n\n"], ["é"], ["a\n", "\n\na"], ["éé", "\n"], ["aé\n"]],
    ),
    "bytes that a vocabulary falls back to": (
        byte_fallback_tokenizer(),
        ["▁a", "▁", "\n", "a\n", "<0xC3>", "<0xA9>", "<0x0A>"],
        [["\n\n"], ["é"], [" a"], [" "], ["éé", "\n a"]],
    ),
    "characters": (
        character_tokenizer("ab\n;"),
        ["a", "b", "\n", ";", "<unk>"],
        [["\n\n"], ["ab"], [";", "bab"], ["\n", ";\n", "a;\n"]],
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_response_ends_with_the_first_token_whose_text_so_far_holds_a_stop_string(kind):
    """All responses of four tokens."""
    tokenizer, pieces, lists = CASES[kind]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert tokenizer.unk_token_id not in ids or "<unk>" in pieces
    responses = list(itertools.product(ids, repeat=4))
    tokens = torch.tensor(responses)
    for strings in lists:
        end = EndOfResponse(Stand(tokenizer), strings, 0)
        ends = end.ends(tokens)
        ended = 0
        for response, found in zip(responses, ends.tolist(), strict=True):
            expected = slow_end(tokenizer, list(response), strings, [tokenizer.eos_token_id])
            length = found.index(True) + 1 if True in found else None
            assert length == (expected and expected[0]), (response, strings)
            if expected:
                assert end.text(list(response[:length])) == expected[1]
                ended += 1
        assert 0 < ended < len(responses)
        # A loop asks token by token, of some of the rows
        some = torch.arange(0, len(tokens), 7)
        steps = [end.ends(tokens[:, : n + 1], n, some) for n in range(tokens.shape[1])]
        assert torch.cat(steps, 1).equal(ends[some])


def test_a_character_that_began_far_before_is_not_overlooked():
    """A run of written-out bytes is a text only as a whole: one look at its last few would see nothing."""
    tokenizer = CASES["bytes that a vocabulary falls back to"][0]
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in ("你" * 30 + "。").encode()])
    end = EndOfResponse(Stand(tokenizer), ["。"], 0)
    assert end.ends(torch.tensor([ids]))[0].nonzero().flatten().tolist() == [len(ids) - 1]
    assert end.text(ids) == "你" * 30


def test_a_string_may_have_any_number_of_special_tokens_in_it():
    tokenizer = CASES["bytes"][0]
    line_end, special, eos = tokenizer.convert_tokens_to_ids(["Ċ", "<|endoftext|>", "<|im_end|>"])
    response = [line_end, *[special] * 30, line_end]
    end = EndOfResponse(Stand(tokenizer), ["\n\n"], 0)
    assert end.ends(torch.tensor([[*response, eos]]))[0].nonzero().flatten().tolist() == [31, 32]
    assert end.text(response) == ""


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load(saved_chat_model(tmp_path_factory.mktemp("stop") / "model", TEXTS))


def draw(policy, prompts, **changes):
    return sample(policy, prompts, keys(len(prompts)), dataclasses.replace(CONFIG, **changes))


def prompts_of(policy) -> list[list[int]]:
    return [policy.tokenizer(text).input_ids for text in ("Question: 7\n", "a", "b\n\nc\n")]


def strings_that_come_up(policy, unstopped) -> list[str]:
    """Texts of two characters from the middle of responses, of which the first token of none holds both."""
    texts = [text[4:6] for text in unstopped.texts if len(text) > 8 and "\N{REPLACEMENT CHARACTER}" not in text[4:6]]
    return list(dict.fromkeys(texts))[:12]


@pytest.mark.parametrize("decoding", ["plain", "fast"])
def test_every_way_of_decoding_ends_and_cuts_responses_as_the_slow_way_does(policy, decoding):
    prompts = prompts_of(policy)
    unstopped = draw(policy, prompts)
    strings = strings_that_come_up(policy, unstopped)
    stopped = draw(policy, prompts, stop=strings, decoding=decoding)
    kinds = set()
    for before, after in zip(rows_of(unstopped), rows_of(stopped), strict=True):
        expected = slow_end(policy.tokenizer, before[1], strings, policy.stop_ids)
        length, text = expected or (len(before[1]), policy.tokenizer.decode(before[1], skip_special_tokens=True))
        assert after == (before[0], before[1][:length], text, expected is None)
        kinds.add("cut short" if length < len(before[1]) else "truncated" if after[3] else "whole")
    assert kinds >= {"cut short", "truncated"}
    # What stands behind the end has no log-prob and no part in the loss
    assert (stopped.sampler_log_probs[~stopped.mask] == 0).all()
    assert (batch_log_probs(policy, stopped, 1.0, 10_000)[0] - stopped.sampler_log_probs).abs().max() < 1e-4


@pytest.mark.parametrize("decoding", ["plain", "fast"])
def test_nothing_is_decoded_behind_the_end_of_the_last_response(policy, decoding):
    passes = []
    handle = policy.model.register_forward_pre_hook(lambda *_: passes.append(1))
    stopped = draw(policy, prompts_of(policy), stop=[chr(i) for i in range(33, 128)], decoding=decoding)
    handle.remove()
    longest = int(stopped.mask.sum(1).max())
    assert not stopped.truncated.any() and stopped.mask.shape[1] == len(passes) == longest < CONFIG.max_new_tokens


def test_no_stop_string_changes_nothing_and_neither_does_one_that_never_comes(policy):
    prompts = prompts_of(policy)
    for decoding in ("plain", "fast"):
        nothing, never = (draw(policy, prompts, decoding=decoding, stop=stop) for stop in ([], ["never said"]))
        assert nothing.texts == never.texts and nothing.tokens.equal(never.tokens)
        assert nothing.sampler_log_probs.equal(never.sampler_log_probs) and nothing.truncated.equal(never.truncated)


def test_a_pad_that_is_a_stop_id_does_not_lengthen_a_response_that_a_string_ended():
    tokenizer = tiny_model().tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model(tokenizer)
    prompts = [tokenizer("3b+5?").input_ids]
    before, after = draw(model, prompts), draw(model, prompts, stop=["1", "2", "3"])
    for one, two in zip(rows_of(before), rows_of(after), strict=True):
        expected = slow_end(tokenizer, one[1], ["1", "2", "3"], model.stop_ids)
        assert two[1] == one[1][: expected[0] if expected else None] and two[3] == (expected is None)


@pytest.mark.parametrize("decoding", ["plain", "fast"])
def test_the_text_of_the_prompt_does_not_count(decoding):
    """Neither a string that it holds, nor one that it begins and the response goes on with."""
    model, prompt = tiny_model(), "3b+5?"
    prompts = [model.tokenizer(prompt).input_ids]
    unstopped = draw(model, prompts)
    strings = ["b+5?", *sorted({"?" + text[0] for text in unstopped.texts if text})]
    stopped = draw(model, prompts, stop=strings, decoding=decoding)
    for one, two in zip(rows_of(unstopped), rows_of(stopped), strict=True):
        expected = slow_end(model.tokenizer, one[1], strings, model.stop_ids)
        assert two[1] == one[1][: expected[0] if expected else None]
        assert any(string in prompt + two[2] for string in strings)
    assert stopped.mask.sum(1).max() > 4


# --- the knob -----------------------------------------------------------------------------------------------------


def config_of(*arguments):
    return infra.config.read_config(train.Config, ["configs/tiny.yaml", *arguments], None)


def test_a_list_of_texts_is_read_from_yaml_and_command_line_and_read_back(tmp_path):
    file = tmp_path / "few_shot.yaml"
    file.write_text('sample:\n  stop: ["\\n\\n", "Question:"]\n')
    from_file = infra.config.read_config(train.Config, [str(file)], None)
    typed = config_of('sample.stop=["\\n\\n", "Question:"]')  # in a shell: sample.stop='["\n\n", "Question:"]'
    assert from_file.sample.stop == typed.sample.stop == ["\n\n", "Question:"]
    assert config_of("sample.stop=[Problem, it's]").sample.stop == ["Problem", "it's"]
    assert config_of().sample.stop == [] and config_of("sample.stop=[]").sample.stop == []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(infra.config.to_dict(typed), sort_keys=False))
    saved = infra.config.saved_config(tmp_path)
    assert infra.config.saved_block(SampleConfig, saved, "sample").stop == ["\n\n", "Question:"]
    assert infra.config.changes(saved, typed) == ""
    assert "sample.stop" in infra.config.changes(saved, config_of())


@pytest.mark.parametrize(
    "value, words",
    [
        ("###", "sample.stop must be a list of texts, as in"),
        ("5", "sample.stop must be a list of texts, as in"),
        ("[5]", "sample.stop must be a list of texts, as in"),
        ("[Question:]", "sample.stop must be a list of texts, as in"),  # to YAML a key without a value
        ("null", "sample.stop must be a list of texts, as in"),
        ('[""]', "holds an empty text"),
        ("[\\n\\n]", "no line ends: write those in double quotes"),  # what a shell leaves of ["\n\n"]
        ("['\\n']", "no line ends: write those in double quotes"),
        ('["\\n\\n"', "cannot read the value"),
    ],
)
def test_what_is_no_list_of_texts_is_refused_in_one_line(value, words):
    with pytest.raises(BadInput) as error:
        config_of(f"sample.stop={value}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_start_of_a_run_names_the_strings():
    config = config_of('sample.stop=["\\n\\n"]')
    said = console.describe(config, tiny_model(), [], 0, None, {}, 1)
    assert r"stop <eos> [2] or at '\n\n', pad 0" in said
