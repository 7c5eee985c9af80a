import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from rlhf_jax.report import plots


@pytest.fixture(scope="module", autouse=True)
def files(pictures):
    """Here pictures are drawn."""
    with pictures():
        yield


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


SFT = rows(sft__loss=lambda s: 5 / s, sft__eval_loss=lambda s: 6 / s, sft__eval_gold=lambda s: s / 100)
REWARD = rows(
    reward__loss=lambda s: 0.7 / s, reward__accuracy=lambda s: 1 - 0.5 / s, reward__eval_accuracy=lambda s: 0.75,
    reward__eval_loss=lambda s: 0.4, reward__margin=lambda s: s / 50,
)  # fmt: skip
PPO = rows(
    ppo__score=lambda s: s / 40, ppo__eval_score=lambda s: s / 50, ppo__gold=lambda s: 0.5 + s * (120 - s) / 2e4,
    ppo__kl=lambda s: s / 8, ppo__kl_exact=lambda s: s / 8.1, ppo__kl_k3=lambda s: s / 7.9,
    ppo__length=lambda s: 12,
)  # fmt: skip


def test_supervised_plots_training_and_held_out_loss(tmp_path):
    figure = plots.supervised(SFT, tmp_path / "plots" / "sft.png")
    curves = plotted(figure)
    assert curves.keys() == {"loss", "eval_loss", "eval_gold"}
    np.testing.assert_array_equal(curves["eval_loss"], [[20, 40, 60, 80], [6 / 20, 6 / 40, 6 / 60, 6 / 80]])
    assert figure.axes[0].get_xlabel() == "training step" and "nats per token" in figure.axes[0].get_ylabel()
    assert [line.get_marker() for line in figure.axes[0].lines] == ["None", "None", "o"]
    assert "held out 0.075" in texts(figure)
    assert is_picture(tmp_path / "plots" / "sft.png")


def test_what_was_not_measured_is_left_out(tmp_path):
    some = [{"step": 1, "time": 0.1, "sft/loss": 2.0, "sft/eval_loss": np.nan}, {"step": 2, "time": 0.2}]
    figure = plots.supervised(some, tmp_path / "sft.png")
    assert plotted(figure).keys() == {"loss"} and len(figure.axes) == 1
    assert texts(figure) == ["2"]  # a curve alone in its panel needs no name


def test_reward_is_plotted_with_a_coin_flip(tmp_path):
    figure = plots.reward(REWARD, tmp_path / "reward.png")
    assert plotted(figure).keys() == {"loss", "eval_loss", "accuracy", "eval_accuracy", "margin"}
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
    assert figures.keys() == {"score", "gold", "kl", "length", "over_optimization", "ppo"}  # the rest is of other runs
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


def drawn(panel, rows):
    """The axes of one panel, without a file."""
    axes = Figure().add_subplot()
    plots._panel(axes, panel, rows, "iteration")
    return axes


def at(*values, name="explained_variance"):
    return [{"step": step, "time": step, name: value} for step, value in enumerate(values)]


def test_a_value_that_diverges_does_not_hide_the_others_and_the_cut_axis_says_so():
    axes = drawn(plots.RL["explained_variance"], at(-80.0, 0.2, np.nan, 0.9))
    low, high = axes.get_ylim()
    assert low == -1 and 0.9 < high <= 1.01
    assert axes.get_ylabel().endswith("(axis cut, values to \N{MINUS SIGN}80)")
    assert "cut" not in drawn(plots.RL["explained_variance"], at(0.2, 0.9)).get_ylabel()
    low, high = (axes := drawn(plots.RL["explained_variance"], at(-80.0, -3.0))).get_ylim()
    assert low < -80 and high > -3 and "cut" not in axes.get_ylabel()  # without other values, they are shown


def test_a_point_between_gaps_is_seen():
    line = drawn(plots.RL["kl_coef"], at(1.0, 2.0, np.nan, 3.0, np.nan, name="kl_coef")).lines[0]
    assert line.get_marker() == "o" and line.get_markevery() == [3]


def test_the_learning_rate_is_plotted_as_it_is():
    values = np.linspace(0, 1, 200) ** 2
    axes = drawn(plots.LR, at(*values, name="lr"))
    assert len(axes.lines) == 1 and axes.lines[0].get_ydata().tolist() == values.tolist()
    assert [text.get_text() for text in axes.texts] == ["1"]


def test_the_kept_policy_has_a_ring_around_its_dot():
    """The last evaluation is that policy's, which is of step 10."""
    some = [{"step": step, "time": 0, "eval_reward": step / 10} for step in (0, 10, 20)]
    some.append({"step": 20, "time": 0, "eval_reward": 1.0, "eval_best_step": 10.0})
    axes = drawn(plots.RL["reward"], some)
    ring, dots = axes.lines
    assert (ring.get_xdata(), ring.get_ydata()) == ([10], [1]) and ring.get_markerfacecolor() == "none"
    assert dots.get_xdata().tolist() == [0, 10, 20] and dots.get_zorder() > ring.get_zorder()
    assert [text.get_text() for text in axes.texts] == ["1"]


def test_a_reward_of_several_parts_has_a_panel_of_them():
    some = [{"step": 1, "time": 0, "reward": 3.0, "reward_brief": 1.0, "reward_ci95": 1, "reward_brief_ci95": 1,
             "reward_a_very_long_name_of_a_part": 2.0, "eval_reward_brief": 0.0}]  # fmt: skip
    panel = plots._components(some)
    assert [curve.name for curve in panel.curves] == ["reward_brief", "reward_a_very_long_name_of_a_part"]
    assert [text.get_text() for text in drawn(panel, some).texts] == ["brief 1", "a_ver..._part 2"]
    assert not plots._components(at(1.0, name="reward")).curves


def test_the_parts_of_a_path_say_which_way_it_goes():
    """A hollow circle at the first of 9 points, a full one at the last, arrows at a quarter, half, three quarters."""
    points_N3 = np.array([[kl, kl / 2, 1 - kl] for kl in (0.01, 1, 2, 3, 2, 1, 2, 3, 4)])
    axes = Figure().add_subplot()
    plots._twins(axes, points_N3, over_kl=True)
    *_, start, end = axes.lines
    assert (start.get_xdata(), start.get_markerfacecolor()) == ([0.01], "white")
    assert (end.get_xdata(), end.get_markerfacecolor()) == ([4], plots.BLUE)
    arrows = [(text.xyann[0], text.xy[0]) for text in axes.texts]
    assert arrows == [(2, 3), (2, 1), (2, 3)]
    assert len(axes.get_xticks()) > 2 and "first iteration" in axes.get_xlabel()


def test_titles_name_the_run_and_its_task(tmp_path):
    figure = plots.supervised(SFT[:2], tmp_path / "a.png", title="demo: sft on summarize")
    assert figure.get_suptitle() == "demo: sft on summarize"
    figure = plots.reward(REWARD[:2], tmp_path / "b.png", title=f"{'x' * 200}: reward on summarize")
    assert len(figure.get_suptitle()) < 110 and figure.get_suptitle().endswith("reward on summarize")
    win_rate = (0.5, (0.1, 0.9))
    figure = plots.before_after([0.5], [0.5], tmp_path / "c.png", name="score", win_rate=win_rate, title="demo")
    assert figure.get_suptitle().startswith("demo\nWin rate of PPO over SFT: 50%")


def test_pipeline_is_the_run_in_four_panels(tmp_path):
    figure = plots.pipeline({"sft": SFT, "reward": REWARD, "ppo": PPO}, tmp_path / "run.png", "A run")
    assert [axes.get_title("left") for axes in figure.axes if axes.get_title("left")] == [
        "Fine-tuning loss", "Reward model accuracy", "Learned and gold score", "KL from the reference",
    ]  # fmt: skip
    assert {"loss", "accuracy", "score", "gold", "kl"} <= plotted(figure).keys()
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
    assert plotted(figure).keys() >= {"loss", "reward", "kl", "distinct2", "repeat_rate"}
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
    assert texts(figure) == ["SFT 0.525", "PPO 0.7"]
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
    """Nothing has changed in it yet: every value is 0."""
    names = {curve.name for panel in plots.RL.values() for curve in panel.curves}
    some = [{"step": 0, "time": 0.0} | dict.fromkeys(sorted(names), 0.0)]
    panels = {name: drawn(panel, some) for name, panel in plots.RL.items()}
    assert names <= {line.get_label() for axes in panels.values() for line in axes.lines}
    assert [line.get_marker() for line in panels["entropy"].lines] == ["None", "o"]  # one point needs a marker
    heights = sorted(label.xy[1] for label in panels["kl"].texts)
    assert min(np.diff(heights)) > 0.07  # three zeros, three labels
    assert plots.rl([row | {"ppo/score": 0, "ppo/gold": 0, "ppo/kl": 0} for row in at(0.0)], tmp_path, "ppo")


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


def test_a_line_for_each_run_of_a_sweep(tmp_path):
    """The fields and the metric are columns; the values of a field stand in their order, the best run is drawn last."""
    points = {"lr": [(1e-3, 3.0), (1e-4, 1.0), (1e-5, 2.0)], "kind": [("a", 3.0), ("b", 1.0), ("b", 2.0)]}
    figure = plots.parallel(points, "gold", tmp_path / "sweep.png", title="three runs")
    runs = [list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata()) == 3]
    assert runs == [[0.5, 1, 0], [0, 1, 0.5], [1, 0, 1]]
    assert {"0.001", "a", "b", "1", "3"} <= set(texts(figure)) and is_picture(tmp_path / "sweep.png")


def test_eight_runs_are_named_once_beside_nothing(tmp_path):
    """Each panel has its axis in its title; the names stand under all panels, within the picture."""
    value_N, names = np.linspace(0, 1, 5), [f"a_workdir_with_a_long_name_{i}/online_dpo" for i in range(8)]
    arrays = {
        x: np.arange(5) * scale for x, scale in (("iterations", 10), ("samples", 2560), ("seconds", 7.5), ("kl", 0.2))
    }
    figure = plots.compare({name: arrays | {"value": value_N} for name in names}, tmp_path / "a.png", metric="gold")
    assert [axes.get_title("left") for axes in figure.axes] == [
        *("By iteration", "By completions", "By seconds", "By exact KL from the reference")
    ]
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    around = legend.get_window_extent(renderer)
    assert len(legend.get_texts()) == 8 and around.y0 >= 0 and around.x1 <= figure.bbox.width
    assert all(axes.get_tightbbox(renderer).y0 >= around.y1 for axes in figure.axes)
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == 8 and is_picture(tmp_path / "a.png")


def test_best_of_n_is_beside_the_runs_over_kl_alone(tmp_path):
    arrays = dict.fromkeys(("iterations", "samples", "seconds", "kl", "value"), np.arange(2.0))
    points = [np.array([[0, 0.1], [1, 0.7]]), np.empty((0, 2))]
    figure = plots.compare({"a": arrays}, tmp_path / "a.png", metric="reward", best_of_n=points)
    *others, over_kl = figure.axes
    assert [len(axes.lines) for axes in others] == [1, 1, 1]
    assert over_kl.lines[0].get_xydata().tolist() == [[0, 0.1], [1, 0.7]]
    assert [(text.get_text(), text.xy) for text in over_kl.texts] == [("best of n", (1, 0.7))]


def test_a_device_among_ever_more_is_a_line_for_each_scaling_and_mesh(tmp_path):
    """Quantities are rows, programs are columns; the collectives' axis alone is linear, as there may be none."""
    points = [
        {
            "scaling": kind,
            "mesh": mesh,
            "devices": devices,
            "programs": {
                name: {"flops": 1e12 / devices, "traffic": 1e9, "collectives": 0.0, "peak": 2**20}
                for name in plots.DIVIDED
            },
        }
        for kind in ("strong", "weak")
        for mesh in ("data", "fsdp")
        for devices in (1, 10, 1000)
    ]
    figure = plots.scaling(points, tmp_path / "scaling.png")
    assert len(figure.axes) == len(plots.SCALING) * len(plots.DIVIDED) and is_picture(tmp_path / "scaling.png")
    work, sent = figure.axes[0], figure.axes[6]
    assert [line.get_ydata().tolist() for line in work.lines] == [[1000, 100, 1]] * 4
    assert [text.get_text() for text in work.texts][:2] == ["strong, data 1", "strong, fsdp 1"]
    assert (work.get_yscale(), sent.get_yscale()) == ("log", "linear")
    assert sent.texts[0].get_text() == "strong, data 0"


def test_the_end_of_a_line_on_a_logarithmic_axis_is_labelled_at_its_height():
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(1, 10_000)
    plots._label_ends(axes, [(10, "a quarter", plots.BLUE), (0, "none", plots.BLUE)])
    assert [text.xy[1] for text in axes.texts] == pytest.approx([0.25, 0])
