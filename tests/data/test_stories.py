import os
import re

import pytest

from rlhf_jax.data import corpus, files, stories
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import sentiment


def test_made_stories_have_three_sentences_and_end_well_or_badly():
    texts = [row["text"] for row in stories.made(300, 0)]
    assert all(len(re.findall(r"[.!]", text)) == 3 for text in texts)
    happy = [score > 0.05 for score in sentiment.compound(texts)]
    assert 0.3 < sum(happy) / len(happy) < 0.7


def test_a_seed_makes_the_same_stories_again_and_another_makes_others():
    assert stories.made(20, 3) == stories.made(20, 3) != stories.made(20, 4)


def read(path, skipped=None, **columns):
    return files.rows(stories.cells(path, corpus.Columns(**columns)), path, skipped, convert=stories.row)


def test_stories_stand_between_separators(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One day.\nIt rained.\n<|endoftext|>\nTwo.<|endoftext|>\n\n")
    assert read(path) == [{"text": "One day.\nIt rained."}, {"text": "Two."}]


def test_a_text_without_separators_is_no_stories(tmp_path):
    """One story could be neither learned from nor held out; a byte order mark is no part of the first."""
    path = tmp_path / "s.txt"
    path.write_text("One day it rained. " * 99)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: expected <|endoftext|> between the stories, got one text without it"
    path.write_text("\ufeffOne.<|endoftext|>")
    assert read(path) == [{"text": "One."}]


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "s.txt")
    with pytest.raises(InputError, match="s.txt: expected a file, got a pipe or a device"):
        read(tmp_path / "s.txt")


def test_an_empty_story_is_named_or_skipped_and_counted(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One.<|endoftext|> \n<|endoftext|>Three.")
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: story 2: text: expected text, got an empty one"
    skipped = []
    assert [row["text"] for row in read(path, skipped)] == ["One.", "Three."]
    assert len(skipped) == 1


@pytest.mark.parametrize("text", ["", "<|endoftext|>", " <|endoftext|> \n"])
def test_a_file_without_stories_is_named(tmp_path, text):
    path = tmp_path / "s.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="expected at least one row|story 1: text: expected text"):
        read(path)


def test_stories_can_be_a_column_of_a_table(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"story": " One.\\n", "id": 1}\n{"story": "Two."}\n')
    assert read(path, text="story") == [{"text": "One."}, {"text": "Two."}]


def test_a_story_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": 1}\n')
    with pytest.raises(InputError, match="s.jsonl:1: text: expected text, got int"):
        read(path)
