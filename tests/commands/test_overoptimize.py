"""The study of over-optimization on points made by hand; its runs and samples are those of other tests."""

import json

import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.commands import overoptimize
from rlhf_jax.commands.overoptimize import Settings
from rlhf_jax.evaluate import scaling
from tests.support import Recorder, changed, error

SETTINGS = Settings(kl_coefs="0,0.05", seeds=2, n=16, samples=64, prompts=40, pairs="100")
A, B = 0.9, 0.5  # of reinforcement learning
KL = [0.1, 0.5, 1, 2, 4, 8, 12]


@pytest.fixture
def studied(tmp_path, monkeypatch, pictures):
    """A study whose runs follow Gao's curve, and whose reward is gold and an error as large."""
    config = configs.Config()
    for coef in 0.0, 0.05:
        for seed in 0, 1:
            folder = overoptimize.place(tmp_path, coef) / "seeds" / str(seed) / "ppo"
            folder.mkdir(parents=True)
            rows = [{"step": 0, "time": 0, "ppo/eval_gold": 0.6, "ppo/eval_score": 0.1, "ppo/eval_kl_exact": 0.0}]
            for i, kl in enumerate(KL if coef == 0 else KL[:4], 1):
                d = kl**0.5
                gain = d * (A - B * np.log(d))
                numbers = {"gold": 0.6 + gain, "score": 0.1 + 2 * d, "kl_exact": kl}
                rows.append({"step": i, "time": i} | {f"ppo/eval_{name}": value for name, value in numbers.items()})
                rows.append({"step": i, "time": i, "ppo/score": 9.0})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(0)
    gold_QO = rng.normal(0.6, 0.3, (40, 64))
    monkeypatch.setattr(overoptimize, "train", lambda *args: None)
    errors = {"best_of_n": 0.3, "best_of_n, 100 pairs": 3.0}
    rewards = {name: gold_QO + rng.normal(0, sd, gold_QO.shape) for name, sd in errors.items()}
    monkeypatch.setattr(overoptimize, "sample", lambda *args: (rewards, gold_QO))
    with pictures():
        return tmp_path, overoptimize.study(config, tmp_path, SETTINGS)


def test_the_points_of_runs_are_gains_over_the_first_policy(studied):
    points = overoptimize.of_runs(configs.Config(), studied[0], SETTINGS)
    np.testing.assert_allclose(points.kl[:7], KL)
    np.testing.assert_allclose(points.proxy[:7], 2 * np.sqrt(KL))
    assert np.bincount(points.group).tolist() == [7, 7, 4, 4]
    assert points.label[0] == "kl_coef 0, seed 0" and points.label[-1] == "kl_coef 0.05, seed 1"


def test_the_points_of_best_of_n_are_the_estimators(studied):
    rewards, gold_QO = overoptimize.sample()
    reward_QO = rewards["best_of_n"]
    points = overoptimize.best_of_n(reward_QO, gold_QO, 16)
    assert points.label[:4] == ["best of 2", "best of 4", "best of 8", "best of 16"]
    np.testing.assert_allclose(points.kl[:4], [np.log(n) - (n - 1) / n for n in (2, 4, 8, 16)])
    proxy, gold = scaling.best_of_n(reward_QO[1], gold_QO[1], 4)
    assert points.proxy[5] == pytest.approx(proxy - reward_QO[1].mean())
    assert points.gold[5] == pytest.approx(gold - gold_QO[1].mean())


def test_the_fits_are_those_of_the_curves(studied):
    folder, result = studied
    assert list(result) == ["best_of_n", "rl", "best_of_n, 100 pairs", "settings"]
    best, rl, worse = (result[name] for name in list(result)[:3])
    assert worse["points"][-1]["gold"] < 0.3 * best["points"][-1]["gold"]
    assert (rl["a"], rl["b"]) == pytest.approx((A, B))
    assert rl["peak"] == pytest.approx(np.exp(A / B - 1)) and rl["peak_ci95"] == pytest.approx((rl["peak"],) * 2)
    assert best["peak"] is None  # an error that does not depend on gold costs half of the gain, at every n
    assert [point["label"] for point in best["points"]] == ["best of 2", "best of 4", "best of 8", "best of 16"]
    assert all(0 < point["gold"] < point["proxy"] for point in best["points"])
    written = json.loads((folder / "overoptimization" / "summary.json").read_text())
    assert written == json.loads(json.dumps(result)) and written["settings"]["kl_coefs"] == "0,0.05"
    assert (folder / "overoptimization" / "over_optimization.png").stat().st_size > 10_000
    reporter = Recorder()
    overoptimize.show(result, reporter)
    (_, rows), = reporter.tables  # fmt: skip
    assert rows[0][:1] == ("best_of_n",) and rows[0][4] == "outside the data" and rows[1][4] == "2.23 to 2.23"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n": 128}, "n: expected at most samples = 64, got 128"),
        ({"kl_coefs": "0,x"}, "kl_coefs: expected different numbers of at least 0, with commas, got '0,x'"),
        ({"kl_coefs": "0,-1"}, "kl_coefs: expected different numbers"),
        ({"kl_coefs": "1,1.0"}, "kl_coefs: expected different numbers"),
        ({"seeds": 0}, "seeds: expected at least 1"),
        ({"pairs": "100,1.5"}, "pairs: expected different whole numbers of at least 1, with commas, or nothing"),
        ({"pairs": "0"}, "pairs: expected different whole numbers"),
        ({"pairs": "100,31"}, "pairs: expected at least reward.batch = 64, got 31"),
        ({"pairs": "7,7"}, "pairs: expected different whole numbers"),
    ],
)
def test_settings_that_cannot_be(changes, expected, tmp_path):
    settings = Settings(**{"samples": 64, "n": 16} | changes)
    assert error(overoptimize.study, configs.Config(), tmp_path / "run", settings).startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"reward": {"kind": "gold"}}, {"data": {"source": "files"}}, {"algorithm": "dpo"}])
def test_gold_must_be_known_and_the_reward_learned(changes, tmp_path):
    config = changed(configs.Config(), **changes)
    assert "expected a learned reward on the embedded world" in error(
        overoptimize.study, config, tmp_path / "run", Settings()
    )
    assert not (tmp_path / "run").exists()


def test_each_reward_model_has_its_pairs_and_each_run_its_coefficient(tmp_path, monkeypatch):
    """All of them on the fine-tuning of the study's own workdir; the runs on its reward model, too."""
    trained, runs = [], []

    class Stages:
        names = ("sft", "reward", "ppo")

        def __init__(self, config, workdir, _):
            self.config, self.path = config, workdir.path

        def finished(self, name):
            return name == "sft"

        def one(self, name, _):
            trained.append((self.path, name, self.config.data.world_preferences, self.config.sft.from_))

    monkeypatch.setattr(overoptimize.pipeline, "Stages", Stages)
    monkeypatch.setattr(overoptimize.pipeline, "run", lambda config, path, *_: runs.append((path, config)))
    overoptimize.train(configs.Config(), tmp_path, SETTINGS, Recorder())
    fewer = overoptimize.of_pairs(tmp_path, 100)
    assert trained == [(tmp_path, "reward", 8_000, ""), (fewer, "reward", 100, str(tmp_path))]
    for coef, (path, config) in zip((0.0, 0.05), runs, strict=True):
        assert path == overoptimize.place(tmp_path, coef)
        assert (config.ppo.kl_coef, config.seeds, config.data.world_preferences) == (coef, 2, 8_000)
        assert config.sft.from_ == config.reward.from_ == str(tmp_path)
