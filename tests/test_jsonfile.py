"""What others may have written, or damaged."""

import json
import os

import pytest

from rlhf_jax import jsonfile
from tests.support import error


def nested(levels, kind="[]"):
    first, last = (kind[0], kind[1]) if kind == "[]" else ('{"a":', "}")
    return first * (levels - 1) + kind + last * (levels - 1)


@pytest.mark.parametrize("kind", ["[]", "{}"])
@pytest.mark.parametrize("levels", [101, 900, 100_000])  # 900: Python's own limit would not notice
def test_levels_are_limited(kind, levels):
    assert jsonfile.parse(nested(100, kind)) == json.loads(nested(100, kind))
    with pytest.raises(ValueError, match="^more than 100 levels deep$"):
        jsonfile.parse(nested(levels, kind))


@pytest.mark.parametrize("text", ["3", "null", '"a"', "[]", "[[], {}, [1, [2]]]", '{"a": {"b": [{}]}}', "NaN"])
def test_what_json_reads_is_read(text):
    assert repr(jsonfile.parse(text)) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1,\n}', "Illegal trailing comma before end of object|Expecting property name .*, line 2"),
        (b"[]", "got list"),
        (b"3", "got int"),
        (b"\xff\xfe{", "not UTF-8: byte 0"),
        (b"[" * 9_999, "more than 100 levels deep"),
    ],
)
def test_a_damaged_file_is_named_with_its_remedy(content, why, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: expected a thing \(({why})\); mend it$"):
        jsonfile.read(path, "a thing", "; mend it")


def test_what_is_no_file_is_named(tmp_path):
    for name, why in (("none", "No such file or directory"), ("", "Is a directory")):
        assert error(jsonfile.read, tmp_path / name).endswith(f": expected a JSON object ({why})")
    os.mkfifo(tmp_path / "pipe")
    assert error(jsonfile.read, tmp_path / "pipe").endswith("(expected a file, got a pipe or a device)")


def test_a_byte_order_mark_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"a": "\ufeff"}', encoding="utf-8")
    assert jsonfile.read(tmp_path / "a.json") == {"a": "\ufeff"}
