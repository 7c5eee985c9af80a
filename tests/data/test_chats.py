"""Rows that are conversations: the shapes of the hub, and what is wrong with a row."""

import json

import numpy as np
import pytest

from rlhf_jax.data import batches, chats, sources
from rlhf_jax.tasks.prompts import Given
from tests import support
from tests.text.test_chat import TOKENIZER, templated

SYSTEM = {"role": "system", "content": "s"}
ASK = {"role": "user", "content": "ab?"}
GOOD, BAD = ({"role": "assistant", "content": content} for content in ("cd", "ab"))
OURS = {"prompt": "s\n\nab?", "conversation": [SYSTEM, ASK]}
SHAPES = {
    "sft": [{"messages": [SYSTEM, ASK, GOOD]}, {"prompt": [SYSTEM, ASK], "label": [GOOD]}],
    "preferences": [
        {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        {"prompt": [SYSTEM], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    ],
    "prompts": [{"prompt": [SYSTEM, ASK]}, {"messages": [SYSTEM, ASK]}],
}
ANSWERS = {"sft": {"label": "cd"}, "preferences": {"chosen": "cd", "rejected": "ab"}, "prompts": {}}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in SHAPES.items() for row in rows])
def test_every_shape_of_the_hub_is_one_of_ours(kind, row):
    ours = chats.row(row, sources.COLUMNS[kind])
    assert {name: value for name, value in ours.items() if name != "messages"} == OURS | ANSWERS[kind]


def test_an_answered_conversation_is_a_prompt_with_its_answer():
    assert chats.row({"messages": [ASK, GOOD], "id": 3}, ("prompt",)) == {
        "messages": [ASK, GOOD], "id": 3, "prompt": "ab?", "conversation": [ASK], "label": "cd",
    }  # fmt: skip


def test_fields_without_a_value_are_left_out_and_others_are_the_templates():
    message = ASK | {"name": None, "mood": "calm"}
    assert chats.row({"prompt": [message]}, ("prompt",))["conversation"] == [ASK | {"mood": "calm"}]


def test_texts_stay_and_cannot_pose_as_conversations():
    row = {"prompt": "a", "messages": [ASK], "conversation": [ASK]}
    assert chats.row(row, ("prompt",)) == {"prompt": "a", "messages": [ASK]}


PAIR = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (
            {"prompt": "a", "label": [GOOD]},
            ("prompt", "label"),
            "prompt: expected a conversation, as label is, got text",
        ),
        (
            {"prompt": [ASK], "label": "cd"},
            ("prompt", "label"),
            "label: expected a conversation, as prompt is, got text",
        ),
        (
            {"prompt": [ASK], "label": None},
            ("prompt", "label"),
            "label: expected a conversation, as prompt is, got None",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            PAIR,
            "chosen: expected a conversation, as there is no column 'prompt', got",
        ),
        ({"messages": "ab"}, ("prompt", "label"), "messages: expected a list of messages, got 'ab'"),
        ({"messages": []}, ("prompt", "label"), "messages: expected a list of messages, got []"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            ("prompt",),
            "messages: expected messages with texts role and co",
        ),
        (
            {"messages": [ASK, ASK | {"content": 3}]},
            ("prompt",),
            "messages: expected messages with texts role and content",
        ),
        (
            {"prompt": ["ab"]},
            ("prompt",),
            "prompt: expected messages with texts role and content, got str in message 1",
        ),
        (
            {"prompt": [ASK, GOOD]},
            ("prompt",),
            "prompt: expected a conversation to answer, got one that ends with the assi",
        ),
        (
            {"prompt": [ASK], "label": [ASK | {"content": "x"}]},
            ("prompt", "label"),
            "label: expected a conversation that en",
        ),
        ({"messages": [GOOD]}, ("prompt", "label"), "expected a message before the assistant's turn, got none"),
        (
            {"chosen": [ASK, GOOD], "rejected": [SYSTEM, BAD]},
            PAIR,
            "rejected: expected the messages of chosen before the",
        ),
        (
            {"prompt": [ASK | {"content": "\ud800"}]},
            ("prompt",),
            "prompt: expected text, got half of a surrogate pair in",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row, columns, message):
    found = support.error(chats.row, row, columns)
    assert found.startswith(message) and len(found) < 250


def written(folder, kind, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.Config(source="files", held_out=0.5, **{kind: str(path)})


def asking(i):
    return [{"role": "user", "content": f"{i}?"}]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_file_that_mixes_chat_and_text_is_refused_by_the_row(swapped, tmp_path):
    rows = [{"prompt": asking(i), "label": [GOOD]} for i in range(3)] + [{"prompt": "a", "label": "b"}]
    config = written(tmp_path, "sft", rows[::-1] if swapped else rows)
    got, line = ("conversation", 2) if swapped else ("text", 4)
    expected = {"text": "conversation", "conversation": "text"}[got]
    message = f"data.sft: {config.sft}:{line}: expected a {expected}, as in the first row, got a {got}"
    assert support.error(sources.load, "sft", config, 1) == message


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_come_from_files(suffix, tmp_path):
    path = support.write_rows(tmp_path / f"rows{suffix}", [{"messages": [*asking(i), GOOD]} for i in range(6)])
    config = sources.Config(source="files", held_out=0.5, sft=path)
    (train, held_out), _ = sources.load("sft", config, seed=1)
    rows = sorted(train + held_out, key=lambda row: row["prompt"])
    assert [row["conversation"] for row in rows] == [asking(i) for i in range(6)]
    assert {row["label"] for row in rows} == {"cd"}
    (train, _), _ = sources.load("prompts", config, seed=1)  # those of the SFT rows
    assert train[0]["conversation"][0]["content"] == train[0]["prompt"]


ROWS = [
    {"prompt": f"{i}?", "conversation": asking(i), "label": "cd", "chosen": "cd", "rejected": "ab"} for i in range(2)
]


def test_the_loss_is_on_the_assistants_turn():
    arrays, _ = batches.encode_sft(ROWS, TOKENIZER, prompt_length=60, response_length=4)
    answer = [*TOKENIZER.encode("cd"), TOKENIZER.eos_id]
    assert arrays["response_NR"][0].tolist() == [*answer, TOKENIZER.pad_id]
    assert arrays["response_mask_NR"].sum(axis=1).tolist() == [3, 3]
    text = TOKENIZER.codec.decode(
        arrays["prompt_NP"][1][arrays["prompt_mask_NP"][1]].tolist(), skip_special_tokens=False
    )
    assert text == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    pairs, _ = batches.encode_pairs(ROWS, TOKENIZER, prompt_length=60, response_length=4)
    np.testing.assert_array_equal(pairs["chosen_NR"], arrays["response_NR"])


def test_without_a_template_of_its_own_a_conversation_is_its_contents():
    arrays, _ = batches.encode_sft(ROWS, templated("none"), prompt_length=8, response_length=6)
    plain, _ = batches.encode_sft(
        [{"prompt": row["prompt"], "label": row["label"]} for row in ROWS],
        TOKENIZER,
        prompt_length=8,
        response_length=6,
    )
    for name, array in plain.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_row_whose_template_fails_is_named_or_skipped(tmp_path):
    picky = templated(
        "{% if '1' in messages[0].content %}{{ raise_exception('no 1') }}{% endif %}" + TOKENIZER.template
    )
    sizes = {"prompt_length": 60, "response_length": 4}
    message = "data.sft: row 2: prompt: the chat template raised TemplateError: no 1"
    assert support.error(batches.encode_sft, ROWS, picky, **sizes) == message
    notes = []
    arrays, _ = batches.encode_sft(ROWS, picky, skip_bad=True, notes=notes, **sizes)
    assert arrays["index_N"].tolist() == [0]
    assert notes == ["data.sft: 1 rows skipped; the first: row 2: prompt: the chat template raised TemplateError: no 1"]
    config = written(tmp_path, "sft", [{"messages": [*asking(1), GOOD]}] * 9 + [{"messages": [*asking(2), GOOD]}])
    rows = sum(sources.load("sft", config, 3)[0], [])
    named = [row for row in rows if row["prompt"] == "1?"][:1]
    assert support.error(batches.encode_sft, named, picky, **sizes).startswith(
        f"data.sft: {config.sft}:1: prompt: the cha"
    )


def test_a_conversation_that_is_too_long_has_no_post_to_cut():
    expected = "data.sft: row 1: prompt: expected at most 9 tokens, got "
    found = support.error(batches.encode_sft, ROWS, TOKENIZER, prompt_length=9, response_length=4)
    assert found.startswith(expected) and found.endswith("; a conversation has no post to cut (data.cut)")
    arrays, _ = batches.encode_prompts(ROWS, TOKENIZER, prompt_length=9, cut="left")
    assert arrays["prompt_NP"][0].tolist() == batches.chat.prompt(TOKENIZER, asking(0))[-9:]


def test_rows_of_a_notebook_may_be_conversations():
    task = Given({"sft": [{"messages": [*asking(i), GOOD]} for i in range(8)]}, 60, 4, held_out=0.5)
    train, held_out, _ = task.arrays("sft", TOKENIZER)
    assert len(train["index_N"]) + len(held_out["index_N"]) == 8 and train["response_mask_NR"].sum(axis=1).max() == 3
