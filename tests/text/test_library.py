"""The oracle is the `tokenizers` library itself, on the same file."""

import functools
import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rlhf_jax.text import bpe, files, library
from tests import support

TEXTS = ["abab abab cd cd café café", "it's  it's    a 12 12 naïve naïve\n\n"] * 2
SPACES = [" " * count for count in range(5, 1, -1)]
SPM = library.SPACE
WORDS = r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as Llama 3's and Qwen's, shorter


def byte_level(normalizer=None, words=None):
    codec = tokenizers.Tokenizer(models.BPE(ignore_merges=words is not None))
    if normalizer:
        codec.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    codec.pre_tokenizer = (
        level if words is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), level])
    )
    codec.decoder = decoders.ByteLevel()
    return codec


def sentencepiece(kind):
    """Spaces are letters, and a character without a token is its bytes. All but Gemma's put a space before a text."""
    codec = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps = [decoders.Replace(SPM, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "mistral":
        codec.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "llama2":
        codec.normalizer = normalizers.Sequence([normalizers.Prepend(SPM), normalizers.Replace(" ", SPM)])
    if kind == "gemma":
        codec.normalizer = normalizers.Replace(" ", SPM)
    codec.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (kind != "gemma"))
    return codec


NFC = normalizers.NFC()
KINDS = {  # (the tokenizer, its special tokens, its EOS)
    "gpt2": (byte_level, ["<|endoftext|>"]),
    "neox": (lambda: byte_level(NFC), ["<|endoftext|>", "<|padding|>"]),
    "llama3": (lambda: byte_level(None, WORDS), ["<|eot_id|>", "<|begin_of_text|>"]),
    "qwen": (lambda: byte_level(NFC, WORDS), ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]),
    **{
        name: (functools.partial(sentencepiece, name), ["</s>", "<unk>", "<s>"])
        for name in ("llama2", "mistral", "gemma")
    },
}


@functools.cache
def made(kind):
    """A small tokenizer.json of this kind, made with the library alone, as text."""
    make, special = KINDS[kind]
    codec = make()
    if isinstance(codec.decoder, decoders.ByteLevel):
        trainer = trainers.BpeTrainer(
            vocab_size=290, special_tokens=special, initial_alphabet=bpe.BYTES, min_frequency=2, show_progress=False
        )
    else:
        own = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=own, min_frequency=2, show_progress=False)
    codec.train_from_iterator(TEXTS, trainer)
    if kind == "neox":
        codec.add_tokens([AddedToken(spaces, normalized=True) for spaces in SPACES])
    if kind == "gemma":
        codec.add_tokens([AddedToken(spaces.replace(" ", SPM), normalized=True) for spaces in SPACES])
    begin = special[-1]
    codec.post_processor = processors.TemplateProcessing(f"{begin} $A", None, [(begin, codec.token_to_id(begin))])
    record = json.loads(codec.to_str())
    byte = f"{'<'}0x"
    record["added_tokens"] = [token for token in record["added_tokens"] if not token["content"].startswith(byte)]
    return json.dumps(record)


@functools.cache
def oracle(kind):
    codec = tokenizers.Tokenizer.from_str(made(kind))
    codec.encode_special_tokens = True  # as ours: their names are text
    return codec


def folder(path, kind, **records):
    """A folder with this tokenizer.json, and other files of these names."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(made(kind))
    for name, record in records.items():
        (path / f"{name}.json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    return {kind: files.from_files(folder(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


LETTERS = "abcdefi' \n\t12é\N{COMBINING ACUTE ACCENT}\N{COMBINING DIAERESIS}<|endoftext|>"
TEXT = st.text(st.sampled_from(LETTERS) | st.characters(codec="utf-8")) | st.text(LETTERS, min_size=20)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=40)
def test_ids_and_texts_are_the_librarys(kind, ours, text):
    ids = oracle(kind).encode(text, add_special_tokens=False).ids
    assert ours[kind].encode(text) == ids == ours[kind].encode_batch([text])[0]
    assert ours[kind].decode(ids) == oracle(kind).decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@example(text="ab     cd")
@settings(max_examples=40)
def test_the_bytes_of_the_tokens_are_the_text(kind, ours, text):
    tokenizer = ours[kind]
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode()
    if oracle(kind).normalizer:
        text = oracle(kind).normalizer.normalize_str(text).replace(SPM, " ")
    elif text and "Metaspace" in str(oracle(kind).pre_tokenizer):
        text = text.replace(SPM, " ")
        text = text if text.startswith(" ") else f" {text}"
    assert found == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_of_a_special_token_is_text_unless_a_template_wrote_it(kind, ours):
    tokenizer, special = ours[kind], KINDS[kind][1]
    for name in special:
        id = oracle(kind).token_to_id(name)
        assert id not in tokenizer.encode(f"a{name}b") and id in tokenizer.encode_special(f"a{name}b")
    assert tokenizer.encode_special("abab") == tokenizer.encode("abab")


@pytest.mark.parametrize("kind", KINDS)
def test_eos_and_pad_have_no_text(kind, ours):
    tokenizer = ours[kind]
    assert tokenizer.decode([tokenizer.eos_id, *tokenizer.encode("ab cd"), tokenizer.pad_id]).strip() == "ab cd"
    assert tokenizer.token_bytes(tokenizer.eos_id) == tokenizer.token_bytes(tokenizer.pad_id) == b""
    ids = oracle(kind).get_vocab()
    new = kind != "neox"  # which has a PAD
    assert tokenizer.vocab_size == len(ids) + new and tokenizer.pad_id == (len(ids) if new else ids["<|padding|>"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_after_a_prompt_has_the_ids_that_it_has_in_one_text(kind, ours):
    """Llama 2's normalizer puts a space before every text, so a completion must not bring another one."""
    prompt, completion = ours[kind].encode("abab"), ours[kind].encode(f"{ours[kind].space}cd")
    assert prompt + completion == ours[kind].encode("abab cd")
    assert ours[kind].space == ("" if kind == "llama2" else " ")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_begins_as_the_files_begin_a_text(kind, ours):
    """Their post-processor puts one special token before a text here; no other text gets it."""
    ids = oracle(kind).encode("abab cd").ids
    assert ids == ours[kind].begin + ours[kind].encode("abab cd") and len(ours[kind].begin) == 1


# EOS and PAD


def read(path, kind, wanted=None, **records):
    """(names of EOS, name of PAD, notes) of a folder with these files."""
    notes = []
    tokenizer = files.from_files(folder(path, kind, **records), **(wanted or {}), note=notes.append)
    names = [tokenizer.codec.id_to_token(id) for id in (*tokenizer.eos_ids, tokenizer.pad_id)]
    return names[:-1], names[-1], notes


def id_of(kind, name):
    return oracle(kind).token_to_id(name)


END = id_of("qwen", "<|im_end|>")
TEXT_END = id_of("qwen", "<|endoftext|>")
NEW = len(oracle("qwen").get_vocab())


@pytest.mark.parametrize(
    ("records", "wanted", "eos", "pad"),
    [
        # nothing names EOS: the first of the known names
        ({}, {}, ["<|endoftext|>"], "<|pad|>"),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, {}, ["<|im_end|>"], "<|pad|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, {}, ["<|im_end|>"], "<|pad|>"),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, {}, ["<|im_end|>"], "<|pad|>"),
        # a free special token that the files call PAD
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}},
            {},
            ["<|im_end|>"],
            "<|endoftext|>",
        ),
        # Qwen's: its own PAD ends a text too
        (
            {
                "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
                "generation_config": {"eos_token_id": [END, TEXT_END]},
            },
            {},
            ["<|im_end|>", "<|endoftext|>"],
            "<|pad|>",
        ),
        ({"generation_config": {"eos_token_id": END}, "config": {"eos_token_id": 0}}, {}, ["<|im_end|>"], "<|pad|>"),
        ({"config": {"eos_token_id": END}}, {}, ["<|im_end|>"], "<|pad|>"),
        ({"config": {"eos_token_id": 50256}}, {}, ["<|endoftext|>"], "<|pad|>"),  # transformers' default, no token here
        ({}, {"eos": "<|im_end|>, <|im_start|>"}, ["<|im_end|>", "<|im_start|>"], "<|pad|>"),
        ({}, {"pad": "<|im_start|>"}, ["<|endoftext|>"], "<|im_start|>"),
        ({}, {"pad": "<nothing>"}, ["<|endoftext|>"], "<nothing>"),
    ],
)
def test_eos_and_pad_are_those_of_the_files_or_of_the_config(records, wanted, eos, pad, tmp_path):
    found = read(tmp_path, "qwen", wanted, **records)
    assert found[:2] == (eos, pad)
    own = records.get("tokenizer_config", {}).get("pad_token") == pad
    assert found[2] == ([] if own else found[2][:1]) and all("\n" not in note and pad in note for note in found[2])


def test_a_pad_that_is_eos_is_replaced_and_said_so(tmp_path):
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    _, _, notes = read(tmp_path, "qwen", tokenizer_config=settings)
    assert notes == [f"text: PAD is <|pad|>, a new token, id {NEW}; <|im_end|> ends a text"]


@pytest.mark.parametrize("name", library.PADS)
def test_a_special_token_with_a_name_of_pad_is_used(name, tmp_path):
    codec = tokenizers.Tokenizer.from_str(made("gpt2"))
    codec.add_special_tokens([name])
    (tmp_path / "tokenizer.json").write_text(codec.to_str())
    tokenizer = files.from_files(tmp_path)
    assert tokenizer.pad_id == codec.token_to_id(name) == tokenizer.vocab_size - 1


def test_a_name_of_pad_that_is_no_special_token_is_not_pad(tmp_path):
    codec = tokenizers.Tokenizer.from_str(made("gpt2"))
    codec.add_tokens([library.PADS[0]])
    (tmp_path / "tokenizer.json").write_text(codec.to_str())
    tokenizer = files.from_files(tmp_path)
    assert tokenizer.encode(library.PADS[0]) == [codec.token_to_id(library.PADS[0])] != [tokenizer.pad_id]


def test_unk_is_no_pad(tmp_path):
    assert read(tmp_path, "llama2", tokenizer_config={"pad_token": "<unk>"})[1] == "<|pad|>"  # a text can have it


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"eos": "<|end|>,<|x|>"}, "text.eos: expected tokens of FILE, got '<|end|>', '<|x|>'"),
        ({"pad": "<|endoftext|>"}, "text.pad: expected a token other than EOS, got '<|endoftext|>', with which FILE "),
    ],
)
def test_a_wrong_name_in_the_config_is_refused(wanted, message, tmp_path):
    found = support.error(files.from_files, folder(tmp_path, "qwen"), **wanted)
    assert found.startswith(message.replace("FILE", f"{tmp_path}/tokenizer.json"))


# Files that are refused


def changed(path, change):
    record = json.loads(made("gpt2"))
    change(record)
    (path / "tokenizer.json").write_text(json.dumps(record))
    return path


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    codec = byte_level()
    codec.train_from_iterator(TEXTS, trainers.BpeTrainer(initial_alphabet=bpe.BYTES, show_progress=False))
    (tmp_path / "tokenizer.json").write_text(codec.to_str())
    found = support.error(files.from_files, tmp_path)
    assert found.startswith(f"{tmp_path}/tokenizer.json: expected a token that ends a text (EOS), as tokenizer_config")
    assert found.endswith("; give its name with --config.text.eos=NAME")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["model"].update(dropout=0.1), "model.dropout: expected none or 0, as encoding must not"),
        (lambda record: record["model"].update(type="Other"), "expected a tokenizer.json that the library `tokenizers"),
        (
            lambda record: record["model"].update(merges=[["a", "nothing"]]),
            "expected a tokenizer.json that the library",
        ),
        (lambda record: record.clear(), "expected a tokenizer.json that the library `tokenizers` reads ("),
        (
            lambda record: record["added_tokens"].append(record["added_tokens"][0] | {"content": "<x>", "id": 900}),
            "added_tokens: '<x>': expected id 900, the library gives 281",
        ),
    ],
)
def test_what_the_library_does_not_read_as_it_is_is_refused(change, message, tmp_path):
    found = support.error(files.from_files, changed(tmp_path, change))
    assert found.startswith(f"{tmp_path}/tokenizer.json: {message}") and len(found) < 300


def test_a_setting_that_changes_the_pre_tokenizer_is_refused(tmp_path):
    found = support.error(read, tmp_path, "gpt2", tokenizer_config={"add_prefix_space": True})
    assert found.endswith("pre_tokenizer.add_prefix_space: expected that of tokenizer_config.json, True, got False")


# SmolLM2's own


def test_golden_ids_of_smollm2():
    golden = json.loads(support.shared("goldens/smollm2.json").read_text())
    notes = []
    tokenizer = files.from_files(support.shared("../models/smollm2-135m"), note=notes.append)
    assert [tokenizer.encode(row["text"]) for row in golden["rows"]] == [row["ids"] for row in golden["rows"]]
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((2,), 49152, 49153)
    assert notes == ["text: PAD is <|pad|>, a new token, id 49152; <|im_end|> ends a text"]
