"""Completing files of prompts: the same texts as the library's, whatever interrupts."""

import json

import pytest

import rlhf_jax
from rlhf_jax.commands import generate as command
from rlhf_jax.commands.generate import Settings, generate
from rlhf_jax.report.console import Silent
from tests import support

PROMPTS = ["TL/DR:", "Sam is sad. ", "POST: a"]
ROWS = [{"prompt": prompt, "number": i} for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workdir):
    """The finished run, whose prompts have at most 8 tokens and lose the first ones."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = support.linked(workdir, folder)
    config["data"] |= {"prompt_length": 8, "cut": "left"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_those_of_the_library(folder, tmp_path):
    model = rlhf_jax.load(folder)
    settings = Settings(seed=3, scores=True, logprobs=True)
    results = generate(folder, ROWS, settings, out=tmp_path / "out.jsonl")
    assert results == read(tmp_path / "out.jsonl")
    prompts = ["TL/DR:", "is sad. ", "POST: a"]  # as the policy reads them
    assert [row["completion"] for row in results] == model.generate(prompts, seed=3)
    assert [row["prompt"] for row in results] == PROMPTS and [row["number"] for row in results] == [0, 1, 2]
    assert [row["prompt_cut"] for row in results] == [False, True, False]
    for row, prompt in zip(results, prompts, strict=True):
        assert len(row["ids"]) == len(row["logprobs"]) and row["ended"] == (row["ids"][-1] == model.tokenizer.eos_id)
        ids = model.tokenizer.encode(prompt)
        assert row["score"] == pytest.approx(model.score_tokens([ids + row["ids"]])[0], abs=1e-4)


class Killed(Silent):
    """Ends the command when it reports for the nth time."""

    def __init__(self, after):
        self.after = after

    def update(self, step, metrics):
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


def test_an_interrupted_command_goes_on(folder, tmp_path):
    settings, out = Settings(n=2, seed=3, batch=2), tmp_path / "out.jsonl"
    whole = generate(folder, ROWS, settings)
    with pytest.raises(KeyboardInterrupt):
        generate(folder, ROWS, settings, out=out, reporter=Killed(2))
    assert read(out) == whole[:4]
    with out.open("a") as file:  # killed in the middle of a write
        file.write(json.dumps(whole[4]) + '\n{"prompt": "PO')
    assert generate(folder, ROWS, settings, out=out) == whole[5:]
    assert read(out) == whole
    assert generate(folder, ROWS, settings, out=out) == []


@pytest.mark.parametrize(
    ("rows", "settings", "what"),
    [
        (ROWS, Settings(seed=4), "settings.seed = 3"),
        (ROWS[:2], Settings(seed=3), "other prompts"),
    ],
)
def test_another_command_leaves_the_file_alone(rows, settings, what, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    generate(folder, ROWS, Settings(seed=3), out=out)
    before = out.read_bytes()
    assert support.error(generate, folder, rows, settings, out=out).endswith(
        f"out.jsonl was begun with {what}; choose another file"
    )
    assert out.read_bytes() == before


def test_what_cannot_be_done_is_named_before_anything_is_written(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    for rows, settings, message in [
        (ROWS, Settings(temperature=-1.0), "temperature: expected at least 0"),
        (ROWS, Settings(max_tokens=40), "max_tokens: expected at most 39, the context is 40"),
        ([{"prompt": "a", "score": 1}], Settings(), "prompts: expected rows without a column 'score', which is one"),
        (ROWS, Settings(stage="pppo"), "stage: expected sft or reward or ppo"),
        ([*ROWS, {"prompt": "\u20ac"}], Settings(), "prompts: row 4: prompt: text with no known characters"),
    ]:
        assert support.error(generate, folder, rows, settings, out=out).startswith(message)
    assert not out.exists()
    out.write_text("mine")
    assert support.error(generate, folder, ROWS, Settings(), out=out).endswith(
        "out.jsonl: expected a new file, or one that this command has begun"
    )
    assert out.read_text() == "mine"
    (tmp_path / "out.jsonl.made_of.json").write_text("[]")
    assert support.error(generate, folder, ROWS, Settings(), out=out).endswith("expected a JSON object (got list)")
    assert support.error(generate, folder, ROWS, Settings(), out=tmp_path / "no" / "out.jsonl").endswith(
        "No such file or directory"
    )


def test_prompts_of_a_file_or_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = support.write_rows(tmp_path / "prompts.jsonl", ROWS)
    assert command.rows_of(None, path) == ROWS and command.rows_of("", None) == [{"prompt": ""}]
    assert command.rows_of(None, "~/prompts.jsonl") == ROWS
    expected = "prompt: expected either --prompt=TEXT or --prompts=FILE"
    assert support.error(command.rows_of, None, None) == support.error(command.rows_of, "a", path) == expected
    assert support.error(command.rows_of, None, "no.jsonl").startswith("prompts: no.jsonl: ")
