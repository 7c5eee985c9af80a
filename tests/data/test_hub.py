import pytest

from rlhf_jax.data import hub
from rlhf_jax.errors import InputError


def fail(error):
    def data_source(name, split):
        raise error

    return data_source


def test_the_name_that_tfds_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(hub.tfds, "data_source", lambda name, split: asked.append((name, split)) or [])
    assert hub.read("who/what", "train", ("text",)) == []
    assert asked == [("huggingface:who/what", "train")]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("No module named 'datasets'"), "needs the package `datasets` (No module named 'datasets')"),
        (ConnectionError("no\nnetwork"), "cannot read who/what from the hub (ConnectionError: no network)"),
    ],
)
def test_what_is_missing_is_one_line(monkeypatch, error, told):
    monkeypatch.setattr(hub.tfds, "data_source", fail(error))
    with pytest.raises(InputError) as caught:
        hub.read("who/what", "train", ("text",))
    assert str(caught.value).startswith("data.source: ") and str(caught.value).endswith(told)


def test_a_set_of_other_columns_is_named(monkeypatch):
    monkeypatch.setattr(hub.tfds, "data_source", lambda name, split: [{"story": b"x"}])
    with pytest.raises(InputError, match="data.source: who/what: expected a column 'text', there is story"):
        hub.read("who/what", "train", ("text",))
