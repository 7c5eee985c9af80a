"""The page as files, and a run in UNIPO's schema."""

import json

import numpy as np

from rlhf_jax.viz import export, trace
from tests.support import error

DEMO = trace.Trace(export.demo_folder())


def test_static_files_are_the_page_and_the_trace(tmp_path):
    index = export.static(export.demo_folder(), tmp_path / "out")
    assert index.read_text().startswith("<!doctype html>\n<html data-static ")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"app.js", "style.css", "math.js", "trace/manifest.json"} <= names and "playground.js" not in names
    message = error(export.static, export.demo_folder(), tmp_path / "out")
    assert message == f"export: expected a new or an empty folder, got {tmp_path / 'out'}"
    assert "records one" in error(export.static, tmp_path, tmp_path / "new")


def test_the_page_has_no_numbers_of_its_own():
    """No random number, no array of data, no address of another machine, no markup made from text."""
    for path in export.static_folder().glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for word in ("Math.random", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "https:"):
            assert word not in text, (path.name, word)


def test_a_run_in_the_schema_of_unipo(tmp_path):
    path = export.unipo(export.demo_folder(), tmp_path / "run.json")
    log = json.loads(path.read_text())
    file = DEMO.read(DEMO.names("ppo", "iter")[0])
    assert log["header"]["algorithm"] == "ppo" and log["header"]["hparams"]["clip_eps"] == file.more["config"]["clip"]
    epochs = file["update.rows_B"].shape[0]
    assert len(log["entries"]) == len(DEMO.names("ppo", "iter")) * epochs
    assert [entry["is_first_step_after_rollout_phase"] for entry in log["entries"][:epochs]] == [
        True,
        *[False] * (epochs - 1),
    ]
    first = log["entries"][0]
    assert {"policy_objective", "reward"} <= first["metrics"].keys()
    response, row = first["prompts"][0]["responses"][0], file["look.rows_B"][0]
    n = int(file["rollout.mask_BR"][row].sum())
    tokens = response["tokens"]
    assert {len(series) for series in tokens.values()} == {n} == {response["response_length"]}
    assert tokens["ids"] == file["rollout.response_BR"][row][:n].tolist()
    np.testing.assert_allclose(tokens["old_log_probs"], file["rollout.logp_BR"][row][:n])
    np.testing.assert_allclose(tokens["log_probs"], tokens["old_log_probs"], atol=1e-4)  # the first pass
    ratio = np.exp(np.subtract(tokens["log_probs"], tokens["old_log_probs"]))
    advantages, clip = np.array(tokens["advantages"]), file.more["config"]["clip"]
    objective = np.minimum(advantages * ratio, advantages * np.clip(ratio, 1 - clip, 1 + clip))
    np.testing.assert_allclose(tokens["token_objective"], objective, atol=1e-5)
    assert error(export.unipo, export.demo_folder(), path).endswith("exists")
