"""A finished run that the commands read."""

import json

import pytest

from tests.support import linked, write_rows

LABELS = ["sad", "a bus", "Sam ran", "bees", "a hat", "red"]
SFT = [{"prompt": f"{label} at sea", "label": label} for label in LABELS * 2]
PAIRS = [{"prompt": row["prompt"], "chosen": row["label"], "rejected": "hm"} for row in SFT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workdir):
    """The finished run, with rows of its own in files; half of their prompts are held out."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = linked(workdir, folder)
    config["data"] |= {"source": "files", "held_out": 0.5, "prompt_length": 16, "cut": "left"}
    for kind, rows in (("sft", SFT), ("preferences", PAIRS)):
        config["data"][kind] = str(write_rows(folder / f"{kind}.jsonl", rows))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
