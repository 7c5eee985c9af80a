"""What `import rlhf_jax` gives."""

import importlib.metadata
from pathlib import Path

import pytest

import rlhf_jax


def test_it_has_its_names():
    assert {"load", "__version__"} <= {*dir(rlhf_jax)} and callable(rlhf_jax.load)
    with pytest.raises(AttributeError, match="^module 'rlhf_jax' has no attribute 'laod'$"):
        rlhf_jax.laod  # noqa: B018


def test_its_version_is_the_installed_one(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"rlhf_jax": "1.2"}.__getitem__)
    assert rlhf_jax.__version__ == "1.2"


def test_a_clone_that_is_not_installed_has_no_version(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert rlhf_jax.__version__ == "0+unknown"


def test_the_configs_are_in_it():
    """By a link, which installations follow."""
    folders = Path(rlhf_jax.__file__).parent / "configs", Path(__file__).parents[1] / "configs"
    inside, outside = ({path.name: path.read_bytes() for path in folder.glob("*.py")} for folder in folders)
    assert inside == outside != {}
