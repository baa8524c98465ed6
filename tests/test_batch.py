"""The object that flows through a step: its fields are declared once, and every operation goes over all of them."""

import dataclasses
import itertools

import pytest
import torch
from baselines.steps import line_ids, step_ids
from sample import SampleConfig, sample
from spro import AlgorithmConfig, Batch, per_row, per_step
from tasks.chain import chain_tokenizer

from helpers import EOS, PROMPTS, chat_tokenizer, keys, row_log_probs, rows_of, tiny_model


@pytest.fixture(scope="module")
def rollout():
    """Rows that stop at once, later and never, behind prompts of 1 to 7 tokens."""
    return sample(tiny_model(), PROMPTS, keys(6), SampleConfig(group_size=16, max_new_tokens=12, temperature=0.7))


def test_a_batch_is_frozen(rollout):
    for field in dataclasses.fields(rollout):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rollout, field.name, None)


def test_regrouping_keeps_the_content_of_every_row_and_trimming_cuts_common_padding(rollout):
    rows, log_probs, picked = rows_of(rollout), row_log_probs(rollout), [70, 3, 3, 41, 95, 0]
    index, all_rows = torch.tensor(picked), torch.arange(96)
    trimmed, nothing = rollout.select(index).trim(), rollout.select(index[:0]).trim()
    halves = [rollout.select(part).trim() for part in (all_rows[:16], all_rows[16:])]
    for result, expected in (
        (rollout.select(all_rows), range(96)),
        (rollout.select(torch.arange(10, 30)), range(10, 30)),
        (rollout.select(index), picked),
        (trimmed, picked),
        (nothing, []),
        (Batch.cat([trimmed, rollout.select(torch.arange(5, 7))]), [*picked, 5, 6]),
        (Batch.cat([halves[0], nothing, halves[1]]), range(96)),
    ):
        assert len(result) == len(expected) and rows_of(result) == [rows[i] for i in expected]
        assert all(x.equal(log_probs[i]) for x, i in zip(row_log_probs(result), expected, strict=True))
        assert result.attention_mask[:, -result.mask.shape[1] :].equal(result.mask)
        assert (result.sampler_log_probs.where(~result.mask, 0) == 0).all() and result.mask.dtype == torch.bool
    short = (rollout.mask.sum(1)[:16] < 12).nonzero()[:, 0]  # of the first prompt, which has 2 tokens
    cut, longest = rollout.select(short).trim(), int(rollout.mask.sum(1)[short].max())
    assert cut.tokens.shape[1] == 2 + longest and cut.mask.shape[1] == longest < 12


def test_given_texts_become_rows_that_end_with_the_stop_token():
    prompts, ids = [[1, EOS, 7], [1]], [7, 14, 8]
    rollout = Batch.from_texts(prompts, ["3+4", ""], chain_tokenizer())
    assert rows_of(rollout) == [(prompts[0], [*ids, EOS], "3+4", False), ([1], [EOS], "", False)]
    assert rollout.attention_mask.int().tolist() == [[1] * 7, [0, 0, 1, 1, 0, 0, 0]]


@dataclasses.dataclass(frozen=True)
class Widened(Batch):
    """A batch with a field more: one declaration each."""

    surprise: torch.Tensor | None = per_step()
    difficulty: torch.Tensor | None = per_row()


def test_a_new_field_is_one_declaration_and_one_assignment(rollout):
    """No operation can forget it: rows, columns, padding and devices are those of its layout."""
    known = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Batch)}
    surprise = -rollout.sampler_log_probs
    batch = Widened(**known, surprise=surprise, difficulty=torch.arange(96))
    rows = torch.tensor([70, 3, 41, 0])
    assert batch.select(rows).surprise.equal(surprise[rows]) and batch.select(rows).difficulty.tolist() == rows.tolist()
    short = batch.select((rollout.mask.sum(1) < 5).nonzero()[:, 0]).trim()
    assert short.surprise.shape == short.mask.shape and short.surprise.equal(-short.sampler_log_probs)
    joined = Widened.cat([short, batch])
    assert joined.surprise.equal(-joined.sampler_log_probs) and len(joined.difficulty) == len(joined)
    assert batch.to(torch.device("cpu")).surprise.equal(surprise)
    with pytest.raises(ValueError, match="same fields"):
        Widened.cat([short, dataclasses.replace(batch, surprise=None)])


def test_a_batch_can_be_made_of_what_an_estimator_reads_alone():
    x = torch.zeros(4, 3)
    batch = Batch(rewards=torch.zeros(4), log_probs=x, ref_log_probs=x, mask=x == 0, group_size=2)
    assert (
        len(batch) == 4
        and batch.tokens is None
        and set(batch.layouts()) == {"rewards", "log_probs", "ref_log_probs", "mask"}
    )
    assert len(batch.select(torch.tensor([1, 0]))) == 2


def test_trimming_keeps_a_column_of_each_kind_and_what_is_tight_as_it_is(rollout):
    nobody = dataclasses.replace(rollout, mask=torch.zeros_like(rollout.mask)).select(torch.arange(2)).trim()
    assert nobody.mask.shape == (2, 1)
    tight = rollout.select(torch.tensor([5])).trim()
    assert tight.trim() is tight


TEXTS = ["one\n\ntwo two\nthree", "\n\none", "no line ends", "crlf\r\nend\r\n", "é\n√ two\n\n\nlast\n", ""]


def test_a_token_belongs_to_the_line_that_stands_before_it():
    """The text before a token tells its line, however line ends and tokens cut each other."""
    kinds = set()
    for vocabulary, end in itertools.product((300, 400), ("\n", "\n\n", "\r\n", "o\n", "w")):
        tokenizer = chat_tokenizer(TEXTS * 50, vocabulary)
        rollout = Batch.from_texts([[1]] * len(TEXTS), TEXTS, tokenizer)
        padding = ~rollout.attention_mask
        dirty = dataclasses.replace(rollout, tokens=rollout.tokens.masked_fill(padding, tokenizer(end).input_ids[0]))
        tokens = rollout.tokens[:, rollout.prompt_length :]
        for row, mask, ids in zip(tokens, rollout.mask, line_ids(dirty, tokenizer, end), strict=True):
            line = seen = 0
            pieces = [tokenizer.decode([token]) for token in row[mask].tolist()]
            for i, number in enumerate(ids[mask].tolist()):
                assert number == line
                count = "".join(pieces[: i + 1]).count(end)
                if count > seen:
                    kinds.add("whole" if pieces[i] == end else "with more" if end in pieces[i] else "over several")
                    kinds |= {"several in one"} if count > seen + 1 else set()
                    seen, line = count, line + 1
    assert kinds == {"whole", "with more", "over several", "several in one"}


def test_a_step_may_be_so_many_tokens():
    rollout = Batch.from_texts([[1], [1]], ["b1+2=4;#0", "#7"], chain_tokenizer())
    ids = step_ids(rollout, chain_tokenizer(), AlgorithmConfig(step_tokens=4, line_end=";"))
    assert [row[live].tolist() for row, live in zip(ids, rollout.mask, strict=True)] == [
        [0] * 4 + [1] * 4 + [2] * 2,
        [0] * 3,
    ]
    by_line = step_ids(rollout, chain_tokenizer(), AlgorithmConfig(line_end=";"))
    assert by_line[0].tolist() == [0] * 7 + [1] * 3


def test_the_chain_tasks_lines_end_with_semicolons():
    rollout = Batch.from_texts([[1], [1]], ["b1+2=4;c4*5=0;#0", "#7"], chain_tokenizer())
    ids = line_ids(rollout, chain_tokenizer(), ";")
    assert ids[0].tolist() == [0] * 7 + [1] * 7 + [2] * 3 and ids[1][rollout.mask[1]].tolist() == [0] * 3
    nothing = rollout.select(torch.arange(0)).trim()
    assert line_ids(nothing, chain_tokenizer(), ";").shape == (0, 1)
