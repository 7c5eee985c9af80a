import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from rlhf_jax.report import plots


@pytest.fixture(scope="module", autouse=True)
def drawn(pictures):
    """Here pictures are drawn."""
    with pictures():
        yield


# Metrics of a first PPO iteration, in which nothing has changed yet.
FIRST = {f"ppo/{name}": 0.0 for name in plots.RL if name != "ess"}
FIRST |= {"ppo/ess_last": 0.0, "ppo/kl_k3": 0.0, "ppo/kl_exact": 0.0}


def rows(n=80, every=20, **curves):
    """n rows of {"stem__name": function of step}; the names with eval_ only at every `every`-th step."""
    return [
        {"step": step, "time": float(step)}
        | {
            name.replace("__", "/"): float(curve(step))
            for name, curve in curves.items()
            if "__eval_" not in name or step % every == 0
        }
        for step in range(1, n + 1)
    ]


def plotted(figure):
    """{metric name: (x, y)} of the curves in a figure."""
    return {
        line.get_label(): line.get_data()
        for axes in figure.axes
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def is_picture(path):
    height, width, _ = imread(path).shape
    return 300 < height < 3000 and 500 < width < 3000 and 5_000 < path.stat().st_size < 1_000_000


SFT = rows(sft__loss=lambda s: 5 / s, sft__eval_loss=lambda s: 6 / s, sft__gold=lambda s: s / 100)
REWARD = rows(
    reward__loss=lambda s: 0.7 / s, reward__accuracy=lambda s: 1 - 0.5 / s, reward__eval_accuracy=lambda s: 0.75,
    reward__eval_loss=lambda s: 0.4, reward__margin=lambda s: s / 50,
)  # fmt: skip
PPO = rows(
    ppo__score=lambda s: s / 40, ppo__eval_score=lambda s: s / 50, ppo__gold=lambda s: 0.5 + s * (120 - s) / 2e4,
    ppo__kl=lambda s: s / 8, ppo__kl_exact=lambda s: s / 8.1, ppo__kl_k3=lambda s: s / 7.9,
    ppo__clip_fraction=lambda s: 0.1, ppo__length=lambda s: 12, ppo__eos_rate=lambda s: 0.95,
    ppo__explained_variance=lambda s: 1 - 1 / s, ppo__policy_loss=lambda s: -0.01, ppo__value_loss=lambda s: 1 / s,
    ppo__approx_kl=lambda s: 0.001, ppo__entropy=lambda s: 1 / s,
)  # fmt: skip


def test_supervised_plots_training_and_held_out_loss(tmp_path):
    figure = plots.supervised(SFT, tmp_path / "plots" / "sft.png")
    curves = plotted(figure)
    assert curves.keys() == {"sft/loss", "sft/eval_loss", "sft/gold"}
    np.testing.assert_array_equal(curves["sft/eval_loss"], [[20, 40, 60, 80], [6 / 20, 6 / 40, 6 / 60, 6 / 80]])
    assert figure.axes[0].get_xlabel() == "training step" and "nats per token" in figure.axes[0].get_ylabel()
    assert [line.get_marker() for line in figure.axes[0].lines] == ["None", "None", "o"]
    assert "held out 0.075" in texts(figure)
    assert is_picture(tmp_path / "plots" / "sft.png")


def test_what_was_not_measured_is_left_out(tmp_path):
    some = [{"step": 1, "time": 0.1, "sft/loss": 2.0, "sft/eval_loss": np.nan}, {"step": 2, "time": 0.2}]
    figure = plots.supervised(some, tmp_path / "sft.png")
    assert plotted(figure).keys() == {"sft/loss"} and len(figure.axes) == 1
    assert texts(figure) == ["2"]  # a curve alone in its panel needs no name


def test_reward_is_plotted_with_a_coin_flip(tmp_path):
    figure = plots.reward(REWARD, tmp_path / "reward.png")
    metrics = {"loss", "eval_loss", "accuracy", "eval_accuracy", "margin"}
    assert plotted(figure).keys() == {f"reward/{name}" for name in metrics}
    levels = [axes.lines[0].get_ydata()[0] for axes in figure.axes[:2]]
    np.testing.assert_allclose(levels, [np.log(2), 0.5])
    assert texts(figure).count("coin flip") == 2 and is_picture(tmp_path / "reward.png")


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    """(figures, the folder of their files)."""
    folder = tmp_path_factory.mktemp("plots")
    return plots.rl(PPO, folder, "ppo"), folder


def test_rl_plots_a_dashboard_and_a_file_per_panel(ppo):
    figures, folder = ppo
    names = {name.removeprefix("ppo/") for name in PPO[19] if name.startswith("ppo/")}
    assert plotted(figures["ppo"]).keys() == names
    absent = {"reward", "distinct2", "repeat_rate", "ess"}  # of other runs
    assert figures.keys() == plots.RL.keys() - absent | {"over_optimization", "ppo"}
    assert {path.stem for path in folder.iterdir()} == figures.keys()
    assert all(is_picture(path) for path in folder.iterdir())
    assert plotted(figures["kl"]).keys() == {"kl", "kl_k3", "kl_exact"}


def test_rl_without_gold_has_no_gold_panels(tmp_path):
    some = [{name: row[name] for name in ("step", "time", "ppo/score", "ppo/kl")} for row in PPO]
    figures = plots.rl(some, tmp_path, "ppo")
    assert figures.keys() == {"score", "kl", "ppo"}


def test_over_optimization_has_score_and_gold_over_kl_on_two_axes(ppo):
    figure = ppo[0]["over_optimization"]
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("learned score", "gold score")
    curves = plotted(figure)
    inner = slice(2, -2)  # the running mean over 5 points is exact on a straight line, its ends aside
    np.testing.assert_allclose(curves["score"][0][inner], [row["ppo/kl"] for row in PPO][inner])
    np.testing.assert_allclose(curves["score"][1][inner], [row["ppo/score"] for row in PPO][inner])
    assert curves["score"][0][0] == pytest.approx((1 + 2 + 3) / 3 / 8)  # KL is smoothed along with the score
    # On a square root scale the middle of the axis is a quarter of the way in nats.
    low, middle, high = left.transData.transform([(0, 0), (2.5, 0), (10, 0)])[:, 0]
    assert middle - low == pytest.approx((high - low) / 2)


def test_a_value_that_diverges_does_not_hide_the_others(tmp_path):
    values = [-80.0, 0.2, 0.5, 0.9]
    some = [{"step": s, "time": s, "ppo/explained_variance": value} for s, value in enumerate(values)]
    low, high = plots.rl(some, tmp_path, "ppo")["explained_variance"].axes[0].get_ylim()
    assert low == -1 and 0.9 < high <= 1.01
    low, high = plots.rl(some[:1], tmp_path, "ppo")["explained_variance"].axes[0].get_ylim()
    assert low < -80 < high  # without other values, it is shown


def test_pipeline_is_the_run_in_four_panels(tmp_path):
    figure = plots.pipeline({"sft": SFT, "reward": REWARD, "ppo": PPO}, tmp_path / "run.png", "A run")
    assert [axes.get_title("left") for axes in figure.axes if axes.get_title("left")] == [
        "Fine-tuning loss", "Reward model accuracy", "Learned and gold score", "KL from the reference",
    ]  # fmt: skip
    assert {"sft/loss", "reward/accuracy", "score", "gold", "kl"} <= plotted(figure).keys()
    assert figure.get_suptitle() == "A run" and is_picture(tmp_path / "run.png")


def test_pipeline_without_gold_shows_the_score(tmp_path):
    some = [{"step": 1, "time": 0, "ppo/score": 0.5}, {"step": 2, "time": 0, "ppo/score": 0.7}]
    figure = plots.pipeline({"sft": [], "reward": [], "ppo": some}, tmp_path / "run.png", "A run")
    assert plotted(figure).keys() == {"score"}


def test_pipeline_of_a_reward_without_a_model_shows_what_it_cost(tmp_path):
    """Pretraining and fine-tuning; then the reward, KL and the diversity of the samples, with the bands of seeds."""
    some = rows(
        rl__reward=lambda s: s / 80, rl__reward_ci95=lambda s: 0.1, rl__kl=lambda s: s / 9, rl__distinct2=lambda s: 0.9,
        rl__repeat_rate=lambda s: 0.1, rl__eval_kl_exact=lambda s: s / 9, rl__eval_reward=lambda s: s / 80,
    )  # fmt: skip
    pretrain = rows(pretrain__loss=lambda s: 5 / s)
    figure = plots.pipeline({"pretrain": pretrain, "sft": SFT, "rl": some}, tmp_path / "run.png", "A run")
    assert plotted(figure).keys() >= {"pretrain/loss", "sft/loss", "reward", "kl", "distinct2", "repeat_rate"}
    curve = [(1, 0.2, 0.0), (2, 0.4, 0.2), (4, 0.6, 0.6)]
    figures = plots.rl(some, tmp_path, "rl", best_of_n=curve)
    assert plotted(figures["reward_over_kl"]).keys() == {"best of n", "policy", "kept"}
    assert len(figures["reward"].axes[0].collections) == 1  # the band


def test_before_after_shows_both_distributions_and_the_changes(tmp_path):
    before, after = [0.1, 0.5, 0.5, 1.0], [0.6, 0.5, 0.8, 0.9]
    figure = plots.before_after(before, after, tmp_path / "ba.png", name="gold score", win_rate=(0.625, (0.2, 0.9)))
    assert figure.get_suptitle() == "Win rate of PPO over SFT: 62% of 4 prompts (95% interval 20% to 90%)"
    distributions, changes = figure.axes
    assert plotted(figure).keys() == {"SFT", "PPO"}
    assert plotted(figure)["PPO"][1].tolist() == [1, 0.75, 0.5, 0.25, 0]  # all are >= 0.5, three of four are >= 0.6
    assert texts(figure) == ["SFT, mean 0.525", "PPO, mean 0.7"]
    assert "50% better, 25% worse" in changes.get_xlabel()
    better, worse = (patch.get_data().values for patch in changes.patches)
    np.testing.assert_allclose(better, [0.5, 0.3, 0, 0])
    np.testing.assert_allclose(worse, [0, 0, 0, -0.1])
    assert is_picture(tmp_path / "ba.png")


def test_no_rows_plot_nothing(tmp_path):
    assert plots.supervised([], tmp_path / "a.png") is None
    assert plots.reward([], tmp_path / "b.png") is None
    assert plots.rl([], tmp_path, "ppo") == {}
    assert plots.pipeline({"sft": [], "reward": [], "ppo": []}, tmp_path / "c.png", "A run") is None
    assert plots.before_after([], [], tmp_path / "d.png", name="score", win_rate=(0.5, (0, 1))) is None
    assert not list(tmp_path.iterdir())


def test_one_iteration_can_be_plotted(tmp_path):
    figures = plots.rl([{"step": 0, "time": 0.0, **FIRST}], tmp_path, "ppo")
    assert {name.removeprefix("ppo/") for name in FIRST} <= plotted(figures["ppo"]).keys()
    assert [line.get_marker() for line in figures["score"].axes[0].lines] == ["None", "o"]  # one point needs a marker
    heights = sorted(label.xy[1] for label in figures["kl"].axes[0].texts)
    assert min(np.diff(heights)) > 0.07  # three zeros, three labels
    plots.before_after([0.5], [0.5], tmp_path / "d.png", name="score", win_rate=(0.5, (0.1, 0.9)))


def test_matplotlib_is_left_as_it_was(tmp_path):
    before = {name: matplotlib.rcParams[name] for name in plots.STYLE}
    plots.supervised(SFT, tmp_path / "sft.png")
    assert {name: matplotlib.rcParams[name] for name in plots.STYLE} == before


def test_smooth_by_hand():
    assert plots.smooth(np.array([1.0, 2, 4])).tolist() == [1, 2, 4]  # too short to smooth
    values = np.zeros(79)  # half a window is 79 // 40 = 1, so a window is 3
    values[[0, 20]] = 3, 6
    smoothed = plots.smooth(values)
    assert smoothed[:3].tolist() == [1.5, 1, 0]  # (3 + 0) / 2 at the end, (3 + 0 + 0) / 3 beside it
    assert smoothed[18:23].tolist() == [0, 2, 2, 2, 0]
    values[[10, 11, 12]] = np.nan
    assert np.isnan(plots.smooth(values)).nonzero()[0].tolist() == [11]  # its neighbours have something to average


@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_spread_labels_keep_their_order_and_distance(heights):
    placed = plots.spread(heights, gap=0.1)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(placed[order]) > 0.1 - 1e-3).all()
    assert np.mean(placed) == pytest.approx(np.mean(heights))
    apart = heights == sorted(heights) and (np.diff(heights) >= 0.1).all()
    assert not apart or placed.tolist() == heights
