import json

import pytest
import tokenizers

from rlhf_jax.errors import InputError
from rlhf_jax.text import bpe, files, hf
from tests import support

# EOS is in the middle: its id comes from the file. "h e" is ranked before "he l", so "hel" is one token, "el" none.
TOKENS = [*bpe.BYTES, "he", "<|endoftext|>", "hel", "Ġhel"]
MERGES = "#version: 0.2\nh e\nhe l\nĠ hel\n"


@pytest.fixture(params=files.NAMES)
def folder(tmp_path, request):
    vocabulary, merges = request.param
    (tmp_path / vocabulary).write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (tmp_path / merges).write_text(MERGES, encoding="utf-8")
    return tmp_path


def test_by_hand(folder):
    tokenizer = files.from_files(folder)
    h, e, el = (bpe.BYTES.index(letter) for letter in "hel")
    assert tokenizer.encode("hel hel eh") == [258, 259, bpe.BYTES.index("Ġ"), e, h]
    assert tokenizer.encode("ell") == [e, el, el]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (257, 260, 261)
    assert tokenizer.decode([260, 258, 259, 257, 260]) == "hel hel"


def test_the_name_of_eos_is_ordinary_text(folder):
    assert files.from_files(folder).encode("<|endoftext|>") == [bpe.BYTES.index(letter) for letter in "<|endoftext|>"]


def test_ids_not_the_order_in_the_file_decide(tmp_path):
    for name, tokens in [("a", TOKENS), ("b", reversed(TOKENS))]:
        ids = {token: TOKENS.index(token) for token in tokens}
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.json").write_text(json.dumps(ids))
        (tmp_path / name / "vocab.bpe").write_text(MERGES, encoding="utf-8")
    assert files.from_files(tmp_path / "a") == files.from_files(tmp_path / "b")


def test_missing_files_are_named(tmp_path):
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(
        InputError, match=f"{tmp_path}: .*tokenizer.json, or encoder.json and vocab.bpe, or vocab.json and merges.txt"
    ):
        files.from_files(tmp_path)


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ('{"a": 0', "encoder.json:1: expected JSON"),
        ("[]", "encoder.json: expected a JSON object of token -> id"),
        ('{"a": "0"}', "encoder.json: expected a JSON object of token -> id"),
        ('{"a": 0, "b": 2}', "encoder.json: expected each of the ids 0 to 1 once"),
        (
            '{"a": 0, "b": 1}',
            "encoder.json does not fit vocab.bpe: expected the 259 bytes, merges and .* got 2; others: ",
        ),
    ],
)
def test_a_bad_vocabulary_is_named(tmp_path, vocabulary, message):
    (tmp_path / "encoder.json").write_text(vocabulary)
    (tmp_path / "vocab.bpe").write_text(MERGES, encoding="utf-8")
    with pytest.raises(InputError, match=f"{tmp_path}/{message}"):
        files.from_files(tmp_path)


def test_missing_merges_are_detected(folder):
    merges = next(file for file in folder.iterdir() if file.suffix in (".bpe", ".txt"))
    merges.write_text("#version: 0.2\nh e\n")
    with pytest.raises(InputError, match=f"does not fit {merges.name}: expected the 258 .* got 260; others: hel, Ġhel"):
        files.from_files(folder)


def test_merges_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_bytes(b"h e\n\xff l\n")
    with pytest.raises(InputError, match="vocab.bpe: expected UTF-8, but byte 4 is not"):
        files.from_files(tmp_path)


def test_a_tokenizer_json_comes_first_and_may_be_named_itself(folder):
    wanted = bpe.train(["ab ab"], 300)
    hf.export(wanted, folder)
    assert files.from_files(folder) == files.from_files(folder / "tokenizer.json") == wanted


# What transformers writes beside a vocabulary


def beside(folder, **records):
    for name, record in records.items():
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


SPECIAL = {"pad_token": "[PAD]", "eos_token": {"content": "<|endoftext|>", "lstrip": False}}


@pytest.mark.parametrize(
    "records",
    [
        {"added_tokens": {"[PAD]": 260, "<user>": 261}, "special_tokens_map": SPECIAL},
        {"added_tokens": {"[PAD]": 260, "<user>": 261}, "tokenizer_config": SPECIAL},
        {
            "tokenizer_config": {
                "add_prefix_space": False,
                "added_tokens_decoder": {
                    "257": {"content": "<|endoftext|>", "special": True},
                    "260": {"content": "[PAD]", "special": True, "lstrip": True},
                    "261": {"content": "<user>", "special": False, "lstrip": False},
                },
            }
        },
    ],
)
def test_added_tokens_are_read(records, folder):
    """A special one is no text; another one is found whole."""
    tokenizer = files.from_files(beside(folder, **records))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (257, 260, 262)
    assert tokenizer.encode("hel<user> hel") == [258, 261, 259] and tokenizer.decode([258, 261, 259]) == "hel<user> hel"
    assert not {257, 260} & set(tokenizer.encode("[PAD]<|endoftext|>"))
    hf.export(tokenizer, folder / "again")
    assert files.from_files(folder / "again") == tokenizer


def test_an_added_token_is_plain_text_unless_it_is_said_to_be_special(folder):
    tokenizer = files.from_files(beside(folder, added_tokens={"[PAD]": 260}))
    assert tokenizer.encode("[PAD]") == [260] and tokenizer.pad_id == 261


def test_a_special_token_may_be_in_the_vocabulary(tmp_path):
    ids = {token: i for i, token in enumerate([*TOKENS, "[PAD]"])}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text(MERGES, encoding="utf-8")
    tokenizer = files.from_files(beside(tmp_path, special_tokens_map={"pad_token": "[PAD]"}))
    assert tokenizer.pad_id == 260 == tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"added_tokens": {"<a>": 270}}, "added_tokens: '<a>': expected id 270, the library gives 260"),
        ({"added_tokens": {"he": 3}}, "added_tokens: 'he': expected id 3, the library gives 256"),
        ({"added_tokens": {"<a>": "260"}}, "/added_tokens.json: expected an object of token -> id, got another value"),
        ({"added_tokens": ["<a>"]}, "/added_tokens.json: expected a JSON object (got list)"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<a>"]}}, "/tokenizer_config.json: added_tokens_decoder: "),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "added_tokens_decoder: expected"),
    ],
)
def test_what_is_not_read_right_is_refused_in_one_short_line(records, message, folder):
    found = support.error(files.from_files, beside(folder, **records))
    assert message in found and len(found) < 250


def test_a_tokenizer_json_must_have_the_added_tokens(tmp_path):
    hf.export(bpe.train(["ab ab"], 300), tmp_path)
    tokenizer = files.from_files(tmp_path)
    files.from_files(beside(tmp_path, added_tokens={"<|pad|>": tokenizer.pad_id}))
    beside(tmp_path, added_tokens={"<|pad|>": tokenizer.pad_id} | {f"<{i}>": 900 + i for i in range(7)})
    expected = (
        "expected the added tokens of added_tokens.json with their ids: '<0>', '<1>', '<2>', '<3>', '<4>' and 2 more"
    )
    found = support.error(files.from_files, tmp_path)
    assert found.startswith(
        f"{tmp_path}/tokenizer.json: expected the added tokens of added_tokens.json"
    ) and found.endswith(expected.split(" with ")[1])


def check(tokenizer, rows):
    """All ways to encode and decode agree with the rows, and so does the tokenizers library with what we export."""
    wrong = [i for i, row in enumerate(rows) if tokenizer.encode(row["text"]) != row["ids"]]
    assert wrong == []
    assert tokenizer.encode_batch([row["text"] for row in rows]) == [row["ids"] for row in rows]
    assert [i for i, row in enumerate(rows) if tokenizer.decode(row["ids"]) != row["text"]] == []
    there = tokenizers.Tokenizer.from_str(json.dumps(hf.to_hf(tokenizer)["tokenizer.json"]))
    assert [i for i, row in enumerate(rows) if there.encode(row["text"]).ids != row["ids"]] == []


def test_golden_ids_of_a_part_of_the_vocabulary(tmp_path):
    """GPT-2's own ids. Of its merges the first 300 and all that these texts need, so its ids are numbered anew here."""
    golden = support.golden("gpt2_bpe_ids.json")
    ids = {token: i for i, token in enumerate(golden["ids"])}
    (tmp_path / "encoder.json").write_text(json.dumps(ids))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(golden["merges"]) + "\n", encoding="utf-8")
    new_ids = {old: ids[token] for token, old in golden["ids"].items()}
    rows = [{"text": row["text"], "ids": [new_ids[i] for i in row["ids"]]} for row in golden["rows"]]
    check(files.from_files(tmp_path), rows)


def test_golden_ids_of_the_whole_vocabulary():
    """On real posts and tweets, which are not ours to publish."""
    golden = support.shared("goldens/gpt2_bpe_ids.json")
    tokenizer = files.from_files(support.shared("gpt2_bpe"))
    check(tokenizer, json.loads(golden.read_text()))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (50256, 50257, 50258)
