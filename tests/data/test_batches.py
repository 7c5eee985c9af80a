import re

import numpy as np
import pytest
from tokenizers import processors

from rlhf_jax.data import batches, tldr
from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, char, library

HEADER = tldr.format_query("a", "b", "")
TOKENIZER = char.train(["abc ", HEADER])  # one id a character
A, B, C, SPACE = TOKENIZER.encode("abc ")
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id
NO_IDENTICAL = {"skipped_identical_pairs": 0}


def rows(*texts, columns=("prompt", "label")):
    return [dict(zip(columns, text, strict=True)) for text in texts]


def test_sft_by_hand():
    arrays, counts = batches.encode_sft(
        rows(("ab", "c"), ("abc", " a b\n")), TOKENIZER, prompt_length=4, response_length=6
    )
    expected = {
        "prompt_NP": [[PAD, PAD, A, B], [PAD, A, B, C]],
        "prompt_mask_NP": [[0, 0, 1, 1], [0, 1, 1, 1]],
        "index_N": [0, 1],
        "response_NR": [[SPACE, C, EOS, PAD, PAD, PAD], [SPACE, A, SPACE, B, EOS, PAD]],
        "response_mask_NR": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected
    assert {array.dtype.name for name, array in arrays.items() if "mask" in name} == {"bool"}
    assert {array.dtype.name for name, array in arrays.items() if "mask" not in name} == {"int32"}
    assert counts == {"rows": 2, "cut_prompts": 0, "skipped_prompts": 0, "skipped_labels": 0}


def test_pairs_by_hand():
    arrays, counts = batches.encode_pairs(
        rows(("a", "b", "bc"), columns=("prompt", "chosen", "rejected")), TOKENIZER, prompt_length=1, response_length=4
    )
    expected = {
        "prompt_NP": [[A]],
        "prompt_mask_NP": [[1]],
        "index_N": [0],
        "chosen_NR": [[SPACE, B, EOS, PAD]],
        "chosen_mask_NR": [[1, 1, 1, 0]],
        "rejected_NR": [[SPACE, B, C, EOS]],
        "rejected_mask_NR": [[1, 1, 1, 1]],
    }
    assert {name: array.tolist() for name, array in arrays.items()} == expected
    assert counts == {"rows": 1, "cut_prompts": 0, "skipped_prompts": 0, "skipped_labels": 0} | NO_IDENTICAL


def test_prompts_by_hand():
    arrays, counts = batches.encode_prompts(
        [{"prompt": "ab", "record": "of no matter"}, {"prompt": "c"}], TOKENIZER, prompt_length=2
    )
    expected = {"prompt_NP": [[A, B], [PAD, C]], "prompt_mask_NP": [[1, 1], [0, 1]], "index_N": [0, 1]}
    assert {name: array.tolist() for name, array in arrays.items()} == expected
    assert counts == {"rows": 2, "cut_prompts": 0, "skipped_prompts": 0}


def test_a_label_without_room_for_eos_is_skipped():
    # " ab" and EOS are 4 ids, " abc" and EOS 5
    arrays, counts = batches.encode_sft(
        rows(("a", "abc"), ("b", "ab"), ("c", "a")), TOKENIZER, prompt_length=1, response_length=4
    )
    assert counts == {"rows": 3, "cut_prompts": 0, "skipped_prompts": 0, "skipped_labels": 1}
    assert arrays["index_N"].tolist() == [1, 2]
    assert arrays["prompt_NP"].tolist() == [[B], [C]]
    assert arrays["response_NR"].tolist() == [[SPACE, A, B, EOS], [SPACE, A, EOS, PAD]]


def test_a_pair_is_skipped_if_either_is_too_long():
    columns = ("prompt", "chosen", "rejected")
    texts = [("a", "abc", "a"), ("b", "a", "b"), ("c", "a", "abc"), ("a", "abc", "abc")]
    arrays, counts = batches.encode_pairs(rows(*texts, columns=columns), TOKENIZER, prompt_length=1, response_length=4)
    assert counts["skipped_labels"] == 3
    assert arrays["index_N"].tolist() == [1]


def test_a_long_post_is_cut_and_counted():
    arrays, counts = batches.encode_prompts(
        [{"prompt": tldr.format_query("a", "b", post)} for post in ("c\nc", "c")],
        TOKENIZER,
        prompt_length=len(HEADER) + 1,
    )
    assert counts == {"rows": 2, "cut_prompts": 1, "skipped_prompts": 0}
    assert [TOKENIZER.decode(ids) for ids in arrays["prompt_NP"]] == [tldr.format_query("a", "b", "c")] * 2


LONG = [("a", "a"), ("abc", "b"), ("abcab", "ab"), ("ab", "abc")]  # prompts of 1, 3, 5 and 2 tokens


@pytest.mark.parametrize(
    ("cut", "prompts", "cut_prompts", "index"),
    [
        ("left", [[PAD, PAD, A], [A, B, C], [C, A, B], [PAD, A, B]], 1, [0, 1, 2, 3]),
        ("right", [[PAD, PAD, A], [A, B, C], [A, B, C], [PAD, A, B]], 1, [0, 1, 2, 3]),
        ("skip", [[PAD, PAD, A], [A, B, C], [PAD, A, B]], 0, [0, 1, 3]),
    ],
)
def test_what_happens_to_a_prompt_that_is_too_long(cut, prompts, cut_prompts, index):
    arrays, counts = batches.encode_prompts(rows(*LONG), TOKENIZER, prompt_length=3, cut=cut)
    assert arrays["prompt_NP"].tolist() == prompts
    assert arrays["prompt_mask_NP"].tolist() == [[id != PAD for id in ids] for ids in prompts]
    assert arrays["index_N"].tolist() == index and arrays["index_N"].dtype == np.int32
    assert counts == {"rows": 4, "cut_prompts": cut_prompts, "skipped_prompts": 4 - len(index)}


@pytest.mark.parametrize("cut", batches.CUTS)
def test_a_prompt_that_fits_is_left_alone(cut):
    for encode, lengths in ((batches.encode_prompts, {}), (batches.encode_sft, {"response_length": 5})):
        arrays, counts = encode(rows(*LONG), TOKENIZER, prompt_length=5, cut=cut, **lengths)
        assert arrays["prompt_NP"].tolist()[2] == [A, B, C, A, B] and len(arrays["index_N"]) == 4
        assert set(counts.values()) == {4, 0}


def test_an_answer_stays_with_its_prompt_where_rows_are_skipped():
    # Row 2's prompt is too long, row 3's label: what is left is rows 0 and 1, and each is counted once.
    arrays, counts = batches.encode_sft(rows(*LONG), TOKENIZER, prompt_length=3, response_length=4, cut="skip")
    assert arrays["index_N"].tolist() == [0, 1]
    assert arrays["prompt_NP"].tolist() == [[PAD, PAD, A], [A, B, C]]
    assert arrays["response_NR"].tolist() == [[SPACE, A, EOS, PAD], [SPACE, B, EOS, PAD]]
    assert counts == {"rows": 4, "cut_prompts": 0, "skipped_prompts": 1, "skipped_labels": 1}
    pairs = rows(("abc", "abc", "a"), ("a", "b", "c"), columns=("prompt", "chosen", "rejected"))
    arrays, counts = batches.encode_pairs(pairs, TOKENIZER, prompt_length=2, response_length=4, cut="skip")
    assert {name: array.tolist() for name, array in arrays.items() if "mask" not in name} == {
        "prompt_NP": [[PAD, A]],
        "index_N": [1],
        "chosen_NR": [[SPACE, B, EOS, PAD]],
        "rejected_NR": [[SPACE, C, EOS, PAD]],
    }
    assert counts == {"rows": 2, "cut_prompts": 0, "skipped_prompts": 1, "skipped_labels": 0} | NO_IDENTICAL


@pytest.mark.parametrize(("encode", "more"), [(batches.encode_sft, {}), (batches.encode_pairs, NO_IDENTICAL)])
@pytest.mark.parametrize(("cut", "ids"), [("left", [C, A]), ("right", [A, B])])
def test_prompts_with_answers_are_cut_the_same_way(encode, more, cut, ids):
    pairs = [{"prompt": "abca", "label": "a", "chosen": "a", "rejected": "b"}]
    arrays, counts = encode(pairs, TOKENIZER, prompt_length=2, response_length=3, cut=cut)
    assert arrays["prompt_NP"].tolist() == [ids]
    assert counts == {"rows": 1, "cut_prompts": 1, "skipped_prompts": 0, "skipped_labels": 0} | more


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("error", "data.sft: row 3: prompt: expected at most 3 tokens, got 5"),
        ("newline", "data.sft: row 3: prompt: expected at most 3 tokens or a post to cut"),
        ("middle", "cut: expected one of left, right, newline, skip, error; got 'middle'"),
    ],
)
def test_a_long_prompt_that_may_not_be_cut_is_an_error(cut, message):
    with pytest.raises(InputError, match=f"^{message}"):
        batches.encode_sft(rows(*LONG), TOKENIZER, prompt_length=3, response_length=5, cut=cut)


def test_skipping_leaves_a_row():
    with pytest.raises(InputError, match="^data.prompts: expected prompts of at most 2 tokens, but no row has that$"):
        batches.encode_prompts(rows(*LONG[1:3]), TOKENIZER, prompt_length=2, cut="skip")
    expected = "^data.sft: expected label of less than 4 tokens, but no row whose prompt fits has that$"
    with pytest.raises(InputError, match=expected):
        batches.encode_sft(rows(*LONG[2:]), TOKENIZER, prompt_length=3, response_length=4, cut="skip")


def test_every_row_keeps_its_place_when_they_are_tokenized_in_chunks(monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", 2)
    arrays, _ = batches.encode_prompts([{"prompt": text} for text in "abcab"], TOKENIZER, prompt_length=1)
    assert arrays["prompt_NP"].tolist() == [[A], [B], [C], [A], [B]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "data.sft: expected at least one row, got none"),
        ([("a", "abc"), ("b", "abcabc")], "data.sft: expected label of less than 4 tokens, but no row has that"),
        (
            [("a", "a"), ("b", "a"), ("aaaa", "a")],
            "data.sft: row 3: prompt: expected at most 3 tokens or a post to cut",
        ),
        ([("a", "a"), ("b", "a"), ("xyz", "a")], "data.sft: row 3: prompt: text with no known characters"),
        ([("a", "a"), ("b", "a"), ("c", "xyz")], "data.sft: row 3: label: text with no known characters"),
    ],
)
def test_an_error_names_the_source_and_the_row(texts, message, monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", 2)
    with pytest.raises(InputError, match=f"^{message}"):
        batches.encode_sft(rows(*texts), TOKENIZER, prompt_length=3, response_length=4)


PAIR = ("prompt", "chosen", "rejected")


def test_pairs_of_the_same_tokens_teach_nothing():
    """Also where they differ in space around them, or in characters that are all unknown."""
    texts = [("a", "b", "b"), ("b", "b", " b\n"), ("c", "a", "b"), ("a", "bx", "by"), ("b", "abcabc", "abcabc")]
    arrays, counts = batches.encode_pairs(rows(*texts, columns=PAIR), TOKENIZER, prompt_length=1, response_length=4)
    assert (arrays["index_N"].tolist(), len(arrays["prompt_NP"]), len(arrays["rejected_mask_NR"])) == ([2], 1, 1)
    assert counts["skipped_identical_pairs"] == 3 and counts["skipped_labels"] == 1
    with pytest.raises(InputError, match="^here: expected chosen and rejected that differ, got the same tokens in all"):
        batches.encode_pairs(
            rows(*texts[:2], columns=PAIR), TOKENIZER, prompt_length=1, response_length=4, source="here"
        )


@pytest.mark.parametrize(
    ("encode", "columns", "texts", "index", "first"),
    [
        (batches.encode_prompts, ("prompt",), [("a",), ("x",), ("b",), ("yy",)], [0, 2], "row 2: prompt"),
        (batches.encode_sft, ("prompt", "label"), [("x", "y"), ("a", "x"), ("b", "c")], [2], "row 1: prompt"),
        (batches.encode_pairs, PAIR, [("a", "b", "c"), ("a", "y", "x"), ("a", "b", "x")], [0], "row 2: chosen"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 9])
def test_a_row_without_a_known_character_is_left_out_and_counted_once(
    chunk, encode, columns, texts, index, first, monkeypatch
):
    monkeypatch.setattr(batches, "CHUNK", chunk)
    lengths = {"prompt_length": 2} | ({} if len(columns) == 1 else {"response_length": 4})
    notes = []
    arrays, counts = encode(
        rows(*texts, columns=columns), TOKENIZER, **lengths, source="here", skip_bad=True, notes=notes
    )
    assert arrays["index_N"].tolist() == index
    assert all(len(array) == len(index) for array in arrays.values())
    assert {name for name, count in counts.items() if count} == {"rows"}
    assert len(notes) == 1 and notes[0].startswith(f"here: 2 rows skipped; the first: {first}: text with no known char")
    with pytest.raises(InputError, match=f"^here: {first}: text with no known characters"):
        encode(rows(*texts, columns=columns), TOKENIZER, **lengths, source="here")


def test_rows_that_are_all_bad_are_an_error():
    with pytest.raises(
        InputError, match="^here: row 1: prompt: text with no known .*; and no other of the 2 prompts can"
    ):
        batches.encode_prompts(
            [{"prompt": "x"}, {"prompt": "y"}], TOKENIZER, prompt_length=2, source="here", skip_bad=True
        )
    with pytest.raises(InputError, match="label of less than 4 tokens, but .* cannot be encoded: here: row 1: label: "):
        batches.encode_sft(
            rows(("a", "x")), TOKENIZER, prompt_length=2, response_length=4, source="here", skip_bad=True
        )


@pytest.mark.parametrize("cut", ["left", "right", "skip"])
def test_prompts_that_are_mostly_too_long_are_noted_with_the_length_that_holds_most(cut):
    """Of 20 prompts of 1 to 20 tokens, 95% have at most 19."""
    texts = [{"prompt": "a" * (i + 1)} for i in range(20)]
    for length, noted in ((10, False), (9, True)):
        notes = []
        batches.encode_prompts(texts, TOKENIZER, prompt_length=length, cut=cut, source="here", notes=notes)
        expected = "here: 11 of 20 prompts have more than 9 tokens; a prompt_length of 19 would hold 95% of them"
        assert notes == [expected] * noted


def arrays_of(n):
    return {"prompt_NP": np.arange(n)[:, None] * 10, "index_N": np.arange(n)}


def index(batch):
    return batch["index_B"].tolist()


def order(n, *, steps, **options):
    """index_B of the first steps."""
    at = batches.batch_at(arrays_of(n), **options)
    return [index(at(step)) for step in range(steps)]


def test_a_batch_is_the_same_rows_of_every_array():
    at = batches.batch_at(arrays_of(10), batch=4, seed=0)
    for batch in map(at, range(20)):
        assert batch.keys() == {"prompt_BP", "index_B"}
        assert batch["prompt_BP"].tolist() == [[10 * i] for i in index(batch)]


def test_the_batches_by_hand():
    # 10 rows in batches of 4: an epoch is the first 8 of a permutation, drawn from the seed and the epoch
    for epoch, pair in enumerate(zip(*[iter(order(10, steps=12, batch=4, seed=3))] * 2, strict=True)):
        permutation = np.random.default_rng((3, epoch)).permutation(10).tolist()
        assert pair == (permutation[:4], permutation[4:8])


def test_an_epoch_has_every_row_at_most_once_and_drops_the_rest():
    # 10 rows in batches of 4: two batches, two rows left over
    epochs = np.reshape(order(10, steps=100, batch=4, seed=0), (50, 8))
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50
    assert set(epochs.flat) == set(range(10))  # not always the same two


def test_every_row_is_as_likely_in_every_place():
    # 2,000 epochs of 4 rows: each row is first 500 times, give or take 5 standard deviations of 19
    first = [rows[0] for rows in order(4, steps=2_000, batch=4, seed=0)]
    assert np.all(np.abs(np.bincount(first) - 500) < 100)


def test_the_seed_decides_the_order():
    one, two = (order(10, steps=12, batch=5, seed=seed) for seed in (1, 2))
    assert one == order(10, steps=12, batch=5, seed=1)
    assert one != two
    assert one[2:] != two[:-2]  # a seed is not the one before it, an epoch late


def test_a_step_needs_none_of_the_steps_before_it():
    in_order = order(10, steps=9, batch=4, seed=3)
    at = batches.batch_at(arrays_of(10), batch=4, seed=3)
    for step in (7, 0, 8, 7, 3, 2):
        assert index(at(step)) == in_order[step]


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_has_at_least_one_row_and_no_more_than_there_are(batch):
    with pytest.raises(InputError, match=f"batch: expected 1 to 10, the number of rows, got {batch}"):
        batches.batch_at(arrays_of(10), batch=batch, seed=0)
    assert sorted(*order(10, steps=1, batch=10, seed=0)) == list(range(10))


PROMPTS = [{"prompt": str(i // 2), "label": str(i)} for i in range(2_000)]  # each prompt twice


def test_split_has_every_row_once_and_no_prompt_on_both_sides():
    train, held_out = batches.split(PROMPTS, 0.1, seed=0)
    assert sorted(train + held_out, key=lambda row: int(row["label"])) == PROMPTS
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)
    # 1,000 prompts at .1: 100, give or take 4 standard deviations of 9.5
    assert abs(len(held_out) / 2 - 100) < 38


def test_split_is_decided_by_the_prompt_and_the_seed_not_by_the_file():
    _, held_out = batches.split(PROMPTS, 0.1, seed=0)
    _, of_another_file = batches.split(PROMPTS[1_500::-1], 0.1, seed=0)
    assert of_another_file == [row for row in reversed(held_out) if int(row["label"]) <= 1_500]
    assert batches.split(PROMPTS, 0.1, seed=1)[1] != held_out


@pytest.mark.parametrize("fraction", [-0.1, 0, 1, 2])
def test_split_leaves_rows_on_each_side(fraction):
    expected = re.escape(f"to hold out ({fraction} of all), got 2000 rows")
    with pytest.raises(InputError, match=f"{expected}.*: none is {'held out' if fraction < 1 else 'left'}"):
        batches.split(PROMPTS, fraction, seed=0)


QUERY = tldr.format_query("a", "b", "12345")


@pytest.mark.parametrize(
    ("cut", "text", "limit", "kept"),
    [
        ("left", "012345", 3, "45"),
        ("right", "012345", 3, "01"),
        ("newline", QUERY, len(QUERY) - 2, tldr.format_query("a", "b", "12")),
    ],
)
def test_bos_stands_before_every_prompt_and_stays_where_it_is_cut(cut, text, limit, kept):
    """As Llama's tokenizers put it before a text; completions have none. A token is a byte here."""
    codec = bpe.train([], 258).codec
    codec.add_special_tokens(["<s>"])
    bos = codec.token_to_id("<s>")
    codec.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    tokenizer = library.of_codec(codec, [bpe.EOS], "<|pad|>")
    sizes = {"prompt_length": limit, "response_length": 3, "cut": cut}
    arrays, counts = batches.encode_sft([{"prompt": text, "label": "1"}], tokenizer, **sizes)
    assert arrays["prompt_NP"].tolist() == [[bos, *tokenizer.encode(kept)]] and counts["cut_prompts"] == 1
    assert arrays["response_NR"].tolist() == [[*tokenizer.encode(" 1"), tokenizer.eos_id]]
