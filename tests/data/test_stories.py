import re

import pytest

from rlhf_jax.data import hub, stories
from rlhf_jax.errors import InputError
from rlhf_jax.rewards import sentiment


def test_made_stories_have_three_sentences_and_end_well_or_badly():
    texts = [row["text"] for row in stories.made(300, 0)]
    assert all(len(re.findall(r"[.!]", text)) == 3 for text in texts)
    happy = [score > 0.05 for score in sentiment.compound(texts)]
    assert 0.3 < sum(happy) / len(happy) < 0.7


def test_a_seed_makes_the_same_stories_again_and_another_makes_others():
    assert stories.made(20, 3) == stories.made(20, 3) != stories.made(20, 4)


def test_stories_stand_between_separators(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One day.\nIt rained.\n<|endoftext|>\nTwo.<|endoftext|>\n\n")
    assert stories.read(path) == [{"text": "One day.\nIt rained."}, {"text": "Two."}]


def test_an_empty_story_is_named_or_skipped_and_counted(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("One.<|endoftext|> \n<|endoftext|>Three.")
    with pytest.raises(InputError) as caught:
        stories.read(path)
    assert str(caught.value) == f"{path}: story 2: expected text, got none"
    skipped = []
    assert [row["text"] for row in stories.read(path, skipped)] == ["One.", "Three."]
    assert len(skipped) == 1


@pytest.mark.parametrize("text", ["", "<|endoftext|>", " <|endoftext|> \n"])
def test_a_file_without_stories_is_named(tmp_path, text):
    path = tmp_path / "s.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="expected at least one story|story 1: expected text"):
        stories.read(path)


def test_the_hubs_stories(monkeypatch):
    monkeypatch.setattr(hub.tfds, "data_source", lambda name, split: [{"text": b"One."}, {"text": b""}])
    assert stories.download() == [{"text": "One."}]
