import csv
import dataclasses
import json
from pathlib import Path

import httpx2
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax import config as configs
from rlhf_jax import stages
from rlhf_jax.data import sources
from rlhf_jax.data.tldr import format_query
from rlhf_jax.errors import InputError
from rlhf_jax.models import gpt2, hf
from rlhf_jax.report.console import Silent
from rlhf_jax.rewards import gold
from rlhf_jax.run import PURPOSES, Summarization
from rlhf_jax.text import bpe
from rlhf_jax.text import hf as text_hf

PARITY = Path(__file__).parent / "models" / "gpt2_parity" / "model.safetensors"


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The smallest world, by characters."""
    sizes = {"world_sft": 12, "world_preferences": 8, "world_prompts": 8, "world_held_out": 12}
    cache = str(tmp_path_factory.mktemp("world"))
    return configs.Config(
        text=configs.Text(kind="char"),
        data=sources.Config(**sizes, cache=cache, prompt_length=300, response_length=80),
        model=gpt2.Config(layers=1, heads=2, head_size=7, width=16, context=380),
    )


def changed(config, **sections):
    """changed(config, ppo={"steps": 3})"""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def error(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def on_disk(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The workdir


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model": {"width": 24}}, "model.width = 16, not 24"),
        ({"text": {"kind": "bpe"}}, "text.kind = 'char', not 'bpe'"),
        ({"sft": {"lr": 0.5}}, "sft.lr = 3e-06, not 0.5"),
    ],
)
def test_a_workdir_of_another_config_is_refused_and_left_alone(changes, difference, config, tmp_path):
    folder = Summarization(config, tmp_path).open("sft")
    before = on_disk(tmp_path)
    message = error(Summarization, changed(config, **changes), tmp_path)
    assert message == f"workdir: {folder}/config.json was made with {difference}; choose another --workdir"
    assert on_disk(tmp_path) == before


def test_another_seed_is_another_config(config, tmp_path):
    Summarization(config, tmp_path).open("sft")
    assert "was made with seed = 1, not 2;" in error(Summarization, dataclasses.replace(config, seed=2), tmp_path)


def test_a_stage_depends_on_what_comes_before_it_and_not_on_what_comes_after(config, tmp_path):
    Summarization(config, tmp_path).open("sft")
    other = changed(config, reward={"lr": 3.0}, ppo={"lr": 3.0})
    Summarization(other, tmp_path).open("reward")
    assert "/reward/config.json was made with reward.lr = 3.0, not" in error(Summarization, config, tmp_path)
    Summarization(changed(other, ppo={"lr": 4.0}), tmp_path).open("ppo")
    assert "/ppo/config.json was made with ppo.lr = 4.0, not 3.0;" in error(Summarization, other, tmp_path)
    longer = changed(other, ppo={"lr": 4.0}, reward={"steps": 3})
    assert "/ppo/config.json was made with reward.steps = " in error(Summarization, longer, tmp_path)


def test_the_same_config_may_go_on(config, tmp_path):
    before = on_disk(Summarization(config, tmp_path).open("sft"))
    assert on_disk(Summarization(config, tmp_path).open("sft")) == before


def test_an_impossible_config_is_refused_before_anything_is_written(config, tmp_path):
    assert error(Summarization, changed(config, ppo={"top_k": 5}), tmp_path / "run").startswith("ppo.top_k: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ask", [lambda run: run.open("sft"), lambda run: run.tokenizer], ids=["open", "tokenizer"])
def test_a_workdir_that_cannot_be_written_is_named(ask, config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = error(ask, Summarization(config, tmp_path / "file" / "run"))
    assert message.startswith(f"workdir: cannot write {tmp_path}/file/run/") and "Not a directory" in message
    assert on_disk(tmp_path) == {tmp_path / "file": b"in the way"}


def test_config_json_is_the_whole_config_and_the_stages_part_of_it(config, tmp_path):
    folder = Summarization(config, tmp_path).open("reward")
    assert configs.parse(json.loads((tmp_path / "config.json").read_text())) == config
    part = json.loads((folder / "config.json").read_text())
    assert part["reward"]["steps"] == config.reward.steps and "ppo" not in part


def test_what_an_unfinished_stage_would_give_is_not_there(config, tmp_path):
    run = Summarization(config, tmp_path)
    run.open("sft")
    assert not run.finished("sft")
    assert error(run.parameters, "sft", "policy", {}) == (
        f"workdir: expected a finished sft stage in {tmp_path}/sft; run it first"
    )


# The tokenizer


def test_the_tokenizer_is_made_once_and_kept(config, tmp_path, monkeypatch):
    run = Summarization(config, tmp_path)
    tokenizer = run.tokenizer
    run.open("sft")
    assert tokenizer.encode("TL;DR:") == [tokenizer.characters.index(character) for character in "TL;DR:"]
    monkeypatch.delattr(sources, "load")  # it is not made again
    assert Summarization(config, tmp_path).tokenizer == tokenizer


def test_a_tokenizer_of_another_config_is_not_taken(config, tmp_path):
    """A run that ended before its first stage began, at a bad row, has left its tokenizer and nothing else."""
    assert Summarization(config, tmp_path).tokenizer
    run = Summarization(changed(config, text={"kind": "bpe", "vocab_size": 300}), tmp_path)
    assert run.tokenizer.vocab_size == 300


def test_gpt2_needs_its_files(config, tmp_path):
    run = Summarization(changed(config, text={"kind": "gpt2"}), tmp_path)
    assert error(lambda: run.tokenizer) == ("text.path: expected a folder or a name on the hub, as gpt2, got none")


def test_gpt2_can_come_from_the_hub(config, tmp_path, hub_server):
    config = changed(config, text={"kind": "gpt2", "path": "who/what"})
    message = error(lambda: Summarization(config, tmp_path / "nothing").tokenizer)
    assert message.startswith("text.path: who/what: no such file or folder, and no such model on the hub")
    tokenizer = bpe.train(["one two", "one two"], 300)
    hub_server.add("who/what", {name: json.dumps(file) for name, file in text_hf.to_hf(tokenizer).items()})
    assert Summarization(config, tmp_path / "run").tokenizer == tokenizer


def test_a_vocabulary_too_small_is_named_by_its_field(config, tmp_path):
    small = changed(config, text={"kind": "bpe", "vocab_size": 100})
    assert error(lambda: Summarization(small, tmp_path).tokenizer).startswith("text.vocab_size: expected at least 258")


# The rows


def row(i):
    post = "x" * 400 if i % 5 == 0 else "one\ntwo"
    return {"prompt": format_query("s", f"title {i}", post), "label": f"ends , {i}", "chosen": "ends", "rejected": "or"}


ROWS = [row(i) for i in range(20)]


def write(path):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return str(path)
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
        else:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_rows_of_files(suffix, config, tmp_path):
    path = write(tmp_path / f"rows{suffix}")
    data = {"source": "files", "sft": path, "preferences": path, "held_out": 0.3}
    run = Summarization(changed(config, data=data), tmp_path / "run")
    for kind, columns in [("sft", ("prompt", "label")), ("preferences", ("prompt", "chosen", "rejected"))]:
        train, held_out = run.rows(kind)
        expected = [{column: row[column] for column in columns} for row in ROWS]
        assert sorted(train + held_out, key=str) == sorted(expected, key=str) and train and held_out
    assert run.rows("prompts") == run.rows("sft")  # the prompts of the SFT rows, where no others are given
    own = Summarization(changed(config, data=data | {"prompts": path}), tmp_path / "other")
    assert {tuple(row) for row in own.rows("prompts")[0]} == {("prompt",)}


@pytest.mark.parametrize("kind", ["sft", "preferences"])
def test_a_file_that_is_not_given_is_asked_for(kind, config, tmp_path):
    run = Summarization(changed(config, data={"source": "files"}), tmp_path)
    assert error(run.rows, kind) == (
        f"data.{kind}: expected a .jsonl, .csv or .parquet file (--config.data.{kind}=FILE), got none"
    )


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_what_had_to_be_cut_or_skipped_is_said(config, tmp_path):
    path = write(tmp_path / "rows.jsonl")
    data = {"source": "files", "sft": path, "held_out": 0.3, "response_length": 10}  # " ends , 9" and EOS
    reporter = Notes()
    run = Summarization(changed(config, data=data), tmp_path / "run", reporter)
    arrays = run.arrays("sft")
    notes, kept = [], []
    for side, rows in zip(("train", "held out"), run.rows("sft"), strict=True):
        cut = sum(len(row["prompt"]) > 300 for row in rows)
        skipped = sum(len(row["label"]) > len("ends , 9") for row in rows)
        notes.append(f"data.sft, {side}: {len(rows)} rows, {cut} cut prompts, {skipped} skipped labels")
        kept.append(len(rows) - skipped)
    assert reporter.notes == notes and sum(kept) == 10
    assert [len(side["index_N"]) for side in arrays] == kept


def test_bad_rows_are_named_or_skipped_and_told(config, tmp_path):
    path = write(tmp_path / "rows.jsonl")
    Path(path).write_text(Path(path).read_text() + json.dumps(ROWS[0] | {"label": " "}) + "\n")
    data, told = {"source": "files", "sft": path, "held_out": 0.3}, f"{path}:21: label: expected text, got an empty one"
    run = Summarization(changed(config, data=data), tmp_path / "run")
    assert error(run.rows, "sft") == f"data.sft: {told}"
    reporter = Notes()
    run = Summarization(changed(config, data=data | {"skip_bad": True}), tmp_path / "other", reporter)
    assert sum(map(len, run.rows("sft"))) == 20
    assert reporter.notes == [f"data.sft: 1 rows skipped; the first: {told}"]


def test_a_row_without_known_characters_is_named_as_it_is_in_its_file(config, tmp_path):
    sft, preferences = write(tmp_path / "rows.jsonl"), tmp_path / "pairs.jsonl"
    pairs = [row | {"rejected": "\u4e2d"} if i == 16 else row for i, row in enumerate(ROWS)]
    preferences.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = {"source": "files", "sft": sft, "preferences": str(preferences), "held_out": 0.3}
    run = Summarization(changed(config, data=data), tmp_path / "run")
    message = error(run.arrays, "preferences")
    assert f"{preferences}:17: rejected: " in message and "no known characters" in message


def test_pairs_may_be_longer_than_responses(config, tmp_path):
    """Else those that are would be skipped."""
    longer = changed(config, data={"response_length": 40, "pair_length": 75})
    run = Summarization(longer, tmp_path / "longer")
    widths = {side[name].shape[1] for side in run.arrays("preferences") for name in ("chosen_NR", "rejected_NR")}
    assert widths == {75} and run.arrays("prompts") and run.sampling(1.0).max_tokens == 40
    same = Summarization(changed(config, data={"response_length": 75}), tmp_path / "same")
    assert same.arrays("preferences")[0]["chosen_NR"].shape == run.arrays("preferences")[0]["chosen_NR"].shape


def test_policies_are_compared_on_the_first_held_out_rows_that_could_be_encoded(config, tmp_path):
    run = Summarization(changed(config, data={"response_length": 60}, evaluation={"prompts": 3}), tmp_path)
    held_out = run.arrays("sft")[1]
    assert held_out["index_N"].tolist()[:3] != [0, 1, 2]
    asked = run.asked("sft")
    assert len(asked) == 3
    for i, row in enumerate(asked):
        ids = held_out["prompt_NP"][i][held_out["prompt_mask_NP"][i]]
        assert run.tokenizer.decode(ids) == row["prompt"]
        assert run.decode(held_out["response_NR"][i : i + 1], held_out["response_mask_NR"][i : i + 1]) == [row["label"]]


def test_gold_is_of_rows_with_a_record(config, tmp_path):
    run = Summarization(config, tmp_path)
    rows = run.rows("sft")[0]
    texts = [row["label"] for row in rows]
    expected = [gold.score(row["record"], text) for row, text in zip(rows, texts, strict=True)]
    np.testing.assert_array_equal(run.judge(rows, texts)["gold"], expected)
    assert run.judge([{"prompt": "a"}], ["b"]) == {}


# The model


@pytest.mark.parametrize(("beyond", "fine"), [(-1, False), (0, True), (255, True), (256, False)])
def test_the_vocabulary_may_be_padded_a_little(beyond, fine, config, tmp_path):
    ids = Summarization(config, tmp_path).tokenizer.vocab_size
    run = Summarization(changed(config, model={"vocab_size": ids + beyond}), tmp_path)
    if fine:
        assert run.apply.policy.config.vocab_size == run.apply.scalar.config.vocab_size == ids + beyond
    else:
        expected = f"model.vocab_size: expected 0 or, for this tokenizer, {ids} to {ids + 255}, got {ids + beyond}"
        assert error(lambda: run.apply) == expected


def test_the_models_vocabulary_is_the_tokenizers(config, tmp_path):
    run = Summarization(config, tmp_path)
    assert run.apply.policy.config.vocab_size == run.tokenizer.vocab_size


def pretrained(config, tmp_path, characters, **model):
    """A run from the 97-token checkpoint, with a tokenizer of `characters` letters and three ids more."""
    letters = "".join(chr(0x4E00 + i) for i in range(characters))
    rows = [{"prompt": f"{letters}{i}", "label": letters} for i in range(10)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "files", "sft": str(tmp_path / "sft.jsonl"), "held_out": 0.3}
    data |= {"prompt_length": 16, "response_length": 16}
    sizes = {"layers": 2, "heads": 3, "head_size": 8, "width": 24, "context": 32, "init": str(PARITY)}
    return Summarization(changed(config, data=data, model=sizes | model), tmp_path / "run")


def test_pretrained_weights_with_ids_that_they_do_not_know(config, tmp_path):
    run = pretrained(config, tmp_path, characters=90, vocab_size=128)
    ids = run.tokenizer.vocab_size
    assert 97 < ids < 128
    params, arrays = run.policy_init(), hf.read(PARITY)
    embedding_VD, known_VD = params["wte"]["embedding"], arrays["transformer.wte.weight"]
    assert embedding_VD.shape == (128, 24)
    np.testing.assert_array_equal(embedding_VD[:97], known_VD)
    np.testing.assert_allclose(embedding_VD[97:], np.tile(known_VD.mean(axis=0), (31, 1)), rtol=1e-6)
    np.testing.assert_array_equal(params["h_1"]["mlp"]["fc"]["kernel"], arrays["transformer.h.1.mlp.c_fc.weight"])
    logits_V = run.apply.policy.logits(params, run.apply.policy.hidden(params, np.arange(5)[None], np.ones((1, 5))))[
        0, -1
    ]
    assert logits_V[97:].max() < logits_V[:97].max()  # ids that were never seen are not the most likely


WEIGHTS = {name: PARITY.with_name(name).read_bytes() for name in ("config.json", "model.safetensors")}


def test_pretrained_weights_can_come_from_the_hub(config, tmp_path, hub_server):
    """The revision that is asked for, and from then on without a look at the network."""
    commit = hub_server.add("who/what", WEIGHTS, revision="v1")
    hub_server.add("who/what", {"config.json": "{}", "model.safetensors": b""})
    expected = pretrained(config, tmp_path, characters=95).policy_init()
    for revision in "v1", commit:
        run = pretrained(config, tmp_path, characters=95, init=f"who/what@{revision}")
        jax.tree.map(np.testing.assert_array_equal, run.policy_init(), expected)
    asked = len(hub_server.asked)
    run = pretrained(config, tmp_path, characters=95, init="who/what@v1")
    assert run.policy_init() and len(hub_server.asked) == asked


def test_weights_that_cannot_be_downloaded_are_told_before_the_data_are_read(config, tmp_path, hub_server):
    """In one line: what to download and where to put it."""
    run = pretrained(config, tmp_path, characters=95, init="who/what@v1")
    Path(run.config.data.sft).unlink()
    hub_server.down = httpx2.ConnectError("no network")
    message = error(stages.summarize, run)
    assert message.startswith("model.init: who/what@v1: no such file or folder, not downloaded before, and the hub ")
    assert message.endswith(
        "download config.json and model.safetensors, or config.json and model.safetensors.index.json and "
        "model-*.safetensors of https://huggingface.co/who/what (v1) into a folder and give its path"
    )
    assert not (tmp_path / "run").exists()


def test_weights_that_are_a_pickle_are_not_taken(config, tmp_path, hub_server):
    hub_server.add("who/what", {"config.json": "{}", "pytorch_model.bin": b"never read"})
    message = error(pretrained(config, tmp_path, characters=95, init="who/what").policy_init)
    assert message.startswith("model.init: who/what: expected config.json and model.safetensors, or ")
    assert message.endswith("on the hub, there is config.json, pytorch_model.bin")
    assert not [path for path in hub_server.asked if path.endswith(".bin")]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").touch()
    message = error(pretrained(config, tmp_path, characters=95, init=str(tmp_path / "model")).policy_init)
    assert "loading a pickle can run any code" in message


def test_pretrained_weights_of_gpt_neox(config, tmp_path):
    """From a folder. Both tables of a token id get the rows that the checkpoint lacks."""
    sizes = {"heads": 2, "head_size": 16, "width": 32, "init": str(PARITY.parents[1] / "neox_parity")}
    sizes |= gpt2.NEOX | {"context": 32}
    run = pretrained(config, tmp_path, characters=90, **sizes)
    params = run.policy_init()
    for name in "wte", "unembed":
        table_VD = params[name]["embedding"]
        assert table_VD.shape == (run.tokenizer.vocab_size, 32)
        np.testing.assert_allclose(
            table_VD[97:], np.tile(table_VD[:97].mean(axis=0), (len(table_VD) - 97, 1)), rtol=1e-6
        )


def test_pretrained_weights_of_other_sizes_are_refused(config, tmp_path):
    run = pretrained(config, tmp_path, characters=90, heads=1, head_size=24)
    expected = f"{PARITY.with_name('config.json')}: expected model.heads = 3 (not 1), model.head_size = 8 (not 24)"
    assert error(run.policy_init) == f"model.init: {expected}"


def test_pretrained_weights_of_a_larger_vocabulary_are_refused(config, tmp_path):
    run = pretrained(config, tmp_path, characters=50)
    assert "97" in error(run.policy_init)


def test_random_weights_are_of_the_seed(config, tmp_path):
    first, again, other = (
        Summarization(dataclasses.replace(config, seed=seed), tmp_path / name).policy_init()
        for seed, name in [(1, "a"), (1, "b"), (2, "c")]
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["wte"]["embedding"] != other["wte"]["embedding"]).all()


def test_every_purpose_has_a_key_of_its_own(config, tmp_path):
    run = Summarization(config, tmp_path)
    keys = {tuple(jax.random.key_data(run.key(purpose)).tolist()) for purpose in PURPOSES}
    assert len(keys) == len(PURPOSES)


def test_responses_as_texts(config, tmp_path):
    run = Summarization(config, tmp_path)
    a, b, space = run.tokenizer.encode("ab ")
    eos, pad = run.tokenizer.eos_id, run.tokenizer.pad_id
    response_BR = jax.numpy.array([[space, a, b, eos, pad], [a, space, b, b, b]])
    assert run.decode(response_BR, jax.numpy.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])) == ["ab", "a b"]


# Rows on the device


ARRAYS = {"x_NP": np.arange(30, dtype=np.float32).reshape(10, 3), "index_N": np.arange(10)}


@pytest.mark.parametrize(
    ("size", "rows", "shapes"), [(4, None, [4, 4, 4]), (4, 7, [4, 4]), (5, None, [5, 5]), (99, 7, [7])]
)
def test_a_device_batch_at_a_time_is_as_one_big_batch(size, rows, shapes, config, tmp_path):
    """The last batch is filled up, which compiles nothing new, and cut off."""
    run = Summarization(changed(config, evaluation={"batch": size}), tmp_path)
    seen = []

    def function(batch):
        seen.append(len(batch["x_BP"]))
        return {"sum": batch["x_BP"].sum(axis=1), "pair": (batch["index_B"], 2 * batch["x_BP"])}

    ours = run.over(ARRAYS, function, rows)
    expected = {"sum": ARRAYS["x_NP"].sum(axis=1), "pair": (ARRAYS["index_N"], 2 * ARRAYS["x_NP"])}
    jax.tree.map(np.testing.assert_array_equal, ours, jax.tree.map(lambda x: x[:rows], expected))
    assert seen == shapes
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ours))
