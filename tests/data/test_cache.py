import pytest

from rlhf_jax.data import cache
from rlhf_jax.errors import InputError


def never():
    raise AssertionError("made again")


@pytest.mark.parametrize("count", [0, 1, cache.CHUNK, 2 * cache.CHUNK + 1])
def test_records_are_made_once_and_read_in_order(tmp_path, count):
    made = [str(number).encode() for number in range(count)]
    path = tmp_path / "new" / "rows.array_record"
    assert list(cache.records(path, lambda: iter(made))) == made
    assert list(cache.records(path, never)) == made


def test_nothing_is_left_of_records_that_could_not_be_made(tmp_path):
    def made():
        yield b"one"
        raise InputError("no more")

    path = tmp_path / "rows.array_record"
    with pytest.raises(InputError, match="no more"):
        list(cache.records(path, made))
    assert list(tmp_path.iterdir()) == []
    assert list(cache.records(path, lambda: [b"two"])) == [b"two"]


def test_what_another_process_is_writing_is_not_read(tmp_path):
    path = tmp_path / "rows.array_record"

    def made():
        assert not path.exists()
        yield b"mine"

    assert list(cache.records(path, made)) == [b"mine"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "rows.array_record"
    path.write_bytes(b"half")
    with pytest.raises(InputError, match=f"^{path}: expected a whole array_record file .*; remove it"):
        list(cache.records(path, never))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"^data.cache: cannot write {tmp_path}/file/rows"):
        list(cache.records(tmp_path / "file" / "rows", lambda: []))


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "rlhf_jax" / "data"
