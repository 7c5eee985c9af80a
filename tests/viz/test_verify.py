"""The proof of a trace: that of the package holds, and every identity that is breached on purpose is named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from rlhf_jax.viz import __main__ as command
from rlhf_jax.viz import export, pack, trace
from rlhf_jax.viz.verify import IDENTITIES, prove, verify
from tests.support import Recorder, error

DEMO = trace.Trace(export.demo_folder())
ITER = DEMO.names("ppo", "iter")[-1]


@pytest.fixture(scope="module")
def files():
    """{kind of file: a file of the trace in the package}"""
    names = {"iter": ITER, "probes": DEMO.names("ppo", "eval")[-1], "end": DEMO.names("ppo", "end")[0]}
    for stage in ("sft", "reward"):
        names |= {f"{stage} {kind}": DEMO.names(stage, kind)[-1] for kind in ("iter", "eval")}
    return {key: DEMO.read(name) for key, name in names.items()}


def changed(file, name, index=0, by=0.01):
    """The file with another number in an array, or among its logged numbers."""
    if name not in file.arrays:
        return dataclasses.replace(file, numbers=file.numbers | {name: file.numbers[name] + by})
    array = np.array(file.arrays[name])
    array.reshape(-1)[index] += np.array(by).astype(array.dtype)
    return dataclasses.replace(file, arrays=file.arrays | {name: array})


def breaches(file):
    """{identity: its breach} of those that do not hold."""
    return {each.identity: each.breach for each in prove([file], DEMO.manifest) if each.breach}


def test_the_trace_in_the_package_is_proved():
    results = verify(export.demo_folder())
    assert {each.identity: each.breach for each in results if each.breach} == {}
    assert IDENTITIES.keys() - {each.identity for each in results} == {
        "baseline",
        "group",
        "pair loss",
        "KL loss",
    }  # not PPO's
    assert sum(each.numbers for each in results) > 100_000
    assert sum(path.stat().st_size for path in export.demo_folder().iterdir()) < 3_000_000
    assert DEMO.manifest["command"] == "make demo" and "machine" not in DEMO.manifest


@pytest.mark.parametrize(
    ("identity", "kind", "array", "by"),
    [
        ("prompt", "iter", "rollout.prompt_mask_BP", 1),
        ("response", "iter", "rollout.eos_B", 1),
        ("target", "iter", "look.position_R", 1),
        ("logprob", "iter", "look.policy_logit_BR", 0.01),
        ("likeliest", "iter", "look.policy_top_logp_BR", -9.0),
        ("range", "iter", "rollout.logp_BR", 90.0),
        ("kl", "iter", "ppo/kl_k3", 0.01),
        ("score", "iter", "rollout.score_B", 0.01),
        ("rewards", "iter", "rollout.rewards_BR", 0.01),
        ("gae", "iter", "rollout.values_BR", 0.01),
        ("returns", "iter", "rollout.returns_BR", 0.01),
        ("whitening", "iter", "rollout.advantages_BR", 0.01),
        ("permutation", "iter", "update.rows_B", 1),
        ("ratio", "iter", "update.logp_BR", 0.01),
        ("first ratio", "iter", "update.ratio_BR", 0.01),
        ("policy loss", "iter", "update.policy_loss_BR", 0.01),
        ("value loss", "iter", "update.value_square_BR", 0.01),
        ("minibatch", "iter", "minibatch.ratio_square", 0.01),
        ("clip fraction", "iter", "minibatch.clip_fraction", 0.01),
        ("approx KL", "iter", "minibatch.approx_kl", 0.01),
        ("logged", "iter", "ppo/value_loss", 0.01),
        ("cross-entropy", "sft iter", "sft/loss", 0.01),
        ("cross-entropy", "sft eval", "held_out.nats_N", 1.0),
        ("preference", "reward iter", "update.chosen_B", 1.0),
        ("preference", "reward eval", "reward/eval_accuracy", 0.01),
        ("evaluation", "probes", "ppo/eval_gold", 0.01),
        ("kl", "probes", "probes.logp_NR", 0.01),
    ],
)
def test_a_breach_is_named(identity, kind, array, by, files):
    """With file, array and both values."""
    found = breaches(changed(files[kind], array, by=by))
    assert identity in found
    assert found[identity].startswith(f"{files[kind].name}: ")
    assert "recorded " in found[identity] and "recomputed " in found[identity]


def test_any_of_several_eos_ends_a_response(files):
    """As Llama 3's and Qwen's: the manifest names them."""
    file, tokenizer = files["iter"], DEMO.manifest["tokenizer"]
    row = np.flatnonzero(file["rollout.eos_B"])[0]
    other = np.array(file["rollout.response_BR"])
    other[row, file["rollout.mask_BR"][row].sum() - 1] = tokenizer["vocab_size"] - 3
    file = dataclasses.replace(file, arrays=file.arrays | {"rollout.response_BR": other})
    for ends, holds in (([tokenizer["eos_id"]], False), ([tokenizer["eos_id"], tokenizer["vocab_size"] - 3], True)):
        manifest = DEMO.manifest | {"tokenizer": tokenizer | {"eos_ids": ends}}
        found = {each.identity: each.breach for each in prove([file], manifest)}
        assert (not found["response"]) == holds


def test_a_breach_names_the_index(files):
    file = files["iter"]
    rows, columns = file["rollout.rewards_BR"].shape
    index = np.flatnonzero(file["rollout.mask_BR"])[40]
    found = breaches(changed(file, "rollout.rewards_BR", index))["rewards"]
    assert f"rollout.rewards_BR[{index // columns}, {index % columns}]: rewards: recorded " in found


def test_what_is_outside_the_response_must_be_zero(files):
    file = files["iter"]
    outside = int(np.flatnonzero(file["rollout.mask_BR"] == 0)[0])
    assert "masked" in breaches(changed(file, "rollout.logp_BR", outside))


def test_nan_is_a_breach(files):
    assert "rewards" in breaches(changed(files["iter"], "rollout.rewards_BR", by=np.nan))


def test_a_gain_that_the_samples_do_not_have(files):
    file = files["end"]
    summary = file.more["summary"] | {"ppo/gold_gain": file.more["summary"]["ppo/gold_gain"] + 0.01}
    assert "gain" in breaches(dataclasses.replace(file, more=file.more | {"summary": summary}))


# Files


@pytest.fixture
def copy(tmp_path):
    """A copy of the trace in the package, as a workdir has it."""
    shutil.copytree(export.demo_folder(), tmp_path / "trace")
    return tmp_path


def rewrite(workdir, file):
    """Writes a changed file with its own sha256, as a trainer with a fault would have."""
    found = trace.Trace(workdir)
    data = trace.encode(file)
    manifest = found.manifest | {"files": found.manifest["files"] | {file.name: trace.about(file, data)}}
    trace.write(found.folder, {file.name: data}, manifest)


def test_a_file_is_read_as_it_was_written():
    file = DEMO.read(ITER)
    assert (export.demo_folder() / ITER).read_bytes() == trace.encode(file)


def test_the_command(copy, files):
    reporter = Recorder()
    reporter.table = lambda header, rows: reporter.tables.append(rows)
    assert command.main(["verify", str(copy)], reporter) == 0 and reporter.notes == []
    rewrite(copy, changed(files["iter"], "rollout.rewards_BR"))
    assert command.main(["verify", str(copy)], reporter) == 1
    assert reporter.notes[0].startswith(f"breach: {ITER}: rollout.rewards_BR[0, 0]: rewards: recorded ")
    assert {row[-1] for row in reporter.tables[-1]} == {"ok", "BREACH"}


def test_a_damaged_file_is_named(copy):
    path = copy / "trace" / ITER
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    assert error(verify, copy).startswith(f"{path}: damaged: sha256 ")
    path.unlink()
    assert error(verify, copy).startswith(f"{path}: expected a file of the trace")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "expected a trace of schema version 1, got 2"),
        ({"files": []}, "expected the field files"),
        (None, "expected JSON"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(change, words, copy):
    path = copy / "trace" / "manifest.json"
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    assert words in error(verify, copy)


def test_a_workdir_without_a_trace(tmp_path):
    assert error(verify, tmp_path).endswith("; --config.trace.every=10 records one")


def test_a_packed_trace_is_proved(copy, tmp_path):
    out = pack.pack(copy, tmp_path / "small", "make demo")
    assert not [each.breach for each in verify(out) if each.breach]
    assert {path.name for path in out.iterdir()} == {path.name for path in export.demo_folder().iterdir()}
