"""Sweeps, with a training that only leaves what a finished run leaves: what is trained is another file's test."""

import json
import runpy
import types

import pytest

from rlhf_jax import config as configs
from rlhf_jax.commands import sweep
from rlhf_jax.training.loop import Stopped
from tests.support import Recorder, changed, error, on_disk

CONFIG = configs.Config()


class Trains:
    """pipeline.run, without training: gold is best at kl_coef = .05. `kills`: the stages that a signal stops."""

    def __init__(self, kills=()):
        self.kills, self.calls, self.trained, self.taken = set(kills), 0, [], []

    def __call__(self, config, workdir, reporter):
        for name in configs.stages(config):
            path = workdir / name / "summary.json"
            section = getattr(config, configs.section(config, name))
            if getattr(section, "from_", ""):
                self.taken.append(name)
                continue
            if path.exists() and json.loads(path.read_text())[f"{name}/steps"] == section.steps:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "config.json").write_text("{}")
            self.calls += 1
            if self.calls in self.kills:
                raise Stopped("a signal")
            self.trained.append(f"{workdir.name} {name}")
            gold = 1 - abs(config.ppo.kl_coef - 0.05) + 0.001 * config.seed
            numbers = {"gold": gold, "score": 10 * config.ppo.kl_coef, "kl_exact": 1.0, "steps": config.ppo.steps}
            numbers |= {"steps": section.steps}
            path.write_text(json.dumps({"seconds": 1.0} | {f"{name}/{key}": value for key, value in numbers.items()}))


def ran(folder, text, train=None, config=CONFIG, **how):
    train, reporter = train or Trains(), Recorder()
    sweep.sweep(config, folder, sweep.assignments(text, how.pop("samples", 1)), reporter, train=train, **how)
    return train, reporter


def test_a_grid_is_every_combination():
    runs = sweep.assignments("ppo.kl_coef=.02,.05 seed=1:3 reward.kind=gold,learned")
    assert len(runs) == 12 and runs[1] == {"ppo.kl_coef": 0.02, "seed": 1, "reward.kind": "learned"}
    assert [run["seed"] for run in runs[::2]][:3] == [1, 2, 3]


def test_random_fields_are_drawn_alike_at_every_start():
    text = "ppo.lr=loguniform(1e-6,1e-4) ppo.clip=uniform(.1,.3) seed=1,2"
    runs = sweep.assignments(text, 50)
    assert runs == sweep.assignments(text, 50) and len(runs) == 100
    rates = [run["ppo.lr"] for run in runs[::2]]
    assert len(set(rates)) == 50 and all(1e-6 <= rate <= 1e-4 for rate in rates)
    assert 15 < sum(rate < 1e-5 for rate in rates) < 35  # half of the draws in half of the decades
    assert runs[0]["ppo.lr"] == runs[1]["ppo.lr"]  # the draw meets every seed


def test_a_file_gives_the_runs(tmp_path):
    path = tmp_path / "runs.py"
    path.write_text("def sweep():\n    return [{'seed': i, 'ppo.lr': 1e-5 * i} for i in (1, 2)]\n")
    assert sweep.assignments(str(path)) == [{"seed": 1, "ppo.lr": 1e-5}, {"seed": 2, "ppo.lr": 2e-5}]
    path.write_text("sweep = 3")
    assert "a function sweep()" in error(sweep.assignments, str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--sweep: expected FIELD=VALUES or a file, got none"),
        ("seed", "--sweep: expected FIELD=VALUES"),
        ("seed=3:1", "--sweep: seed: expected first:last, got 3:1"),
        ("seed=1,1", "--sweep: seed: expected each value once, got 1,1"),
        ("seed=1 seed=2", "--sweep: seed: expected once, got it twice"),
        ("ppo.lr=loguniform(0,1)", "--sweep: ppo.lr: expected uniform or loguniform(low,high) with low < high"),
        ("ppo.lr=normal(0,1)", "--sweep: ppo.lr: expected uniform or loguniform(low,high)"),
        ("none.py", "--sweep: none.py: expected a Python file"),
    ],
)
def test_a_sweep_that_cannot_be_read(text, message):
    assert error(sweep.assignments, text).startswith(message)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ({"ppo.kl_coeff": 1.0}, "--sweep: ppo.kl_coeff: no such field; did you mean ppo.kl_coef?"),
        ({"ppo": 1}, "--sweep: ppo: no such field"),
        ({"seed": "x"}, "seed: expected int, got 'x'"),
    ],
)
def test_a_field_that_is_not_there(assignment, message):
    assert error(sweep.changed, CONFIG, assignment).startswith(message)


def test_a_value_out_of_its_range_stops_the_sweep_before_its_first_run(tmp_path):
    train = Trains()
    with pytest.raises(ValueError, match="ppo.kl_coef: expected at least 0"):
        ran(tmp_path / "kl", "ppo.kl_coef=.1,-1", train)
    assert train.calls == 0 and not (tmp_path / "kl").exists()


def test_the_table_has_intervals_over_seeds_and_the_best_is_a_config(tmp_path):
    _, reporter = ran(tmp_path / "kl", "ppo.kl_coef=.02,.05,.1 seed=1:3")
    table = json.loads((tmp_path / "kl" / "table.json").read_text())
    assert table["metric"] == "gold" and [row["fields"]["ppo.kl_coef"] for row in table["rows"]] == [0.05, 0.02, 0.1]
    # seeds add .001, .002, .003: s = .001, Student's factor of three values 4.303 / sqrt(3)
    assert table["rows"][0]["mean"] == pytest.approx(1.002) and table["rows"][0]["runs"] == 3
    assert table["rows"][0]["ci95"] == pytest.approx(0.001 * 4.3027 / 3**0.5, rel=1e-4)
    best = runpy.run_path(str(tmp_path / "kl" / "best.py"))["get_config"]()
    assert configs.parse(best.to_dict()) == sweep.changed(CONFIG, {"ppo.kl_coef": 0.05})
    assert (tmp_path / "kl" / "plots" / "sweep.png").exists() and len(reporter.tables) == 1


def test_a_hold_out_judge_is_shared_with_its_reward_model(tmp_path):
    config = changed(CONFIG, reward={"holdout_judge": True})
    train, _ = ran(tmp_path, "ppo.kl_coef=.02,.05", config=config)
    assert train.trained == ["000 sft", "000 reward", "000 judge", "000 ppo", "001 ppo"]
    assert train.taken == ["sft", "reward", "judge"]


def test_finished_stages_are_shared(tmp_path):
    """Two values of kl_coef and two seeds: fine-tuning and reward model once a seed."""
    train, _ = ran(tmp_path / "kl", "ppo.kl_coef=.02,.05 seed=1,2")
    assert [name for name in train.trained if "ppo" not in name] == ["000 sft", "000 reward", "001 sft", "001 reward"]
    assert train.taken == ["sft", "reward"] * 2 and len(train.trained) == 8


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    text, names = "ppo.kl_coef=.02,.05,.1 seed=1:3", ("table.json", "best.py")
    ran(tmp_path / "once" / "kl", text)
    train = Trains(kills={2, 5, 6, 9, 13})
    for _ in range(5):
        with pytest.raises(Stopped):
            ran(tmp_path / "killed" / "kl", text, train)
    ran(tmp_path / "killed" / "kl", text, train)
    files = [{name: (tmp_path / kind / "kl" / name).read_text() for name in names} for kind in ("once", "killed")]
    assert files[0] == files[1]


def test_runs_of_a_job_array(tmp_path):
    train = Trains()
    for index in 2, 0:
        _, reporter = ran(tmp_path / "kl", "ppo.kl_coef=.02,.05,.1", train, index=index)
    assert "2 of 3 runs are finished" in reporter.notes and sum("ppo" in name for name in train.trained) == 2
    assert len(json.loads((tmp_path / "kl" / "table.json").read_text())["rows"]) == 2
    assert error(ran, tmp_path / "kl", "ppo.kl_coef=.02,.05,.1", train, index=3) == "--index: expected 0 to 2, got 3"


CONSTANT = changed(CONFIG, ppo={"schedule": "constant", "steps": 90})


def test_rounds_of_halving_by_hand():
    assert sweep.rounds(9, 90, 3) == [(9, 10), (3, 30), (1, 90)]
    assert sweep.rounds(5, 100, 2) == [(5, 13), (3, 25), (2, 50), (1, 100)]
    assert sweep.rounds(1, 7, 3) == [(1, 7)]


def test_halving_ends_with_the_best_wherever_it_is_killed(tmp_path):
    """Four values by two seeds; by halves, 4 x 2, 2 x 2 and 1 x 2 runs have 23, 45 and 90 steps."""
    text, how = "ppo.kl_coef=.02,.05,.06,.1 seed=1,2", {"config": CONSTANT, "halving": 2}
    train = Trains()
    _, reporter = ran(tmp_path / "once" / "kl", text, train, **how)
    assert [name for name in train.trained if "ppo" in name] == [
        *(f"{i:03} ppo" for i in range(8)),
        *(f"{i:03} ppo" for i in (2, 3, 4, 5, 2, 3)),
    ]
    table = json.loads((tmp_path / "once" / "kl" / "table.json").read_text())
    assert [row["fields"] for row in table["rows"]] == [{"ppo.kl_coef": 0.05}] and table["rows"][0]["runs"] == 2
    assert "4 of 4 had 23 steps; gold keeps 2: ppo.kl_coef=0.05; ppo.kl_coef=0.06" in reporter.notes
    train = Trains(kills={3, 11, 13, 15})
    for _ in range(4):
        with pytest.raises(Stopped):
            ran(tmp_path / "killed" / "kl", text, train, **how)
    ran(tmp_path / "killed" / "kl", text, train, **how)
    names = ("table.json", "best.py", "halving.json")
    files = [{name: (tmp_path / kind / "kl" / name).read_text() for name in names} for kind in ("once", "killed")]
    assert files[0] == files[1]
    assert "--halving: expected 2, as" in error(ran, tmp_path / "once" / "kl", text, config=CONSTANT, halving=3)


@pytest.mark.parametrize(
    ("config", "how", "message"),
    [
        (CONFIG, {}, "--halving: expected ppo.schedule = constant, as runs get more steps, got linear"),
        (
            CONSTANT,
            {"index": 0},
            "--halving: expected no --index and --processes, as a round waits for all of its runs",
        ),
        (CONSTANT, {"halving": 1}, "--halving: expected 0, or at least 2, got 1"),
    ],
)
def test_halving_that_cannot_be(tmp_path, config, how, message):
    assert error(ran, tmp_path / "kl", "seed=1,2", config=config, **{"halving": 2, **how}) == message
    assert not (tmp_path / "kl").exists()


class Processes:
    """Runs of a sweep as processes that end at the second look; at_once: how many there were when each began."""

    def __init__(self, folder, code=0):
        self.folder, self.code, self.train, self.order, self.now, self.at_once = folder, code, Trains(), [], 0, []

    def __call__(self, index):
        self.order.append(index)
        self.now += 1
        self.at_once.append(self.now)
        polls = iter([None, self.code])

        def poll():
            code = next(polls)
            if code is not None:
                self.now -= 1
                made = [sweep.changed(CONFIG, run) for run in sweep.assignments(TEXT)]
                self.train(sweep._sharing(made, index, self.folder), sweep.place(self.folder, index), None)
            return code

        return types.SimpleNamespace(poll=poll)


TEXT = "ppo.kl_coef=.02,.05,.1 seed=1,2"


def test_processes_at_once_share_what_one_of_them_trains(tmp_path, monkeypatch):
    """Runs 0, 2, 4 have one seed, 1, 3, 5 the other: 2 to 5 begin when the stages that they need are there."""
    monkeypatch.setattr(sweep, "PAUSE", 0)
    start = Processes(tmp_path / "kl")
    ran(tmp_path / "kl", TEXT, processes=3, start=start)
    assert start.order == [0, 1, 2, 3, 4, 5] and start.train.taken == ["sft", "reward"] * 4
    assert start.at_once == [1, 2, 1, 2, 3, 1]  # the last one begins when three have ended
    assert len(json.loads((tmp_path / "kl" / "table.json").read_text())["rows"]) == 3
    message = error(ran, tmp_path / "bad", TEXT, processes=3, start=Processes(tmp_path / "bad", code=2))
    assert message.startswith("--sweep: 6 of 6 runs have failed; see ")


def test_another_sweep_in_the_folder_is_refused(tmp_path):
    ran(tmp_path / "kl", "ppo.kl_coef=.02,.05")
    before = on_disk(tmp_path)
    assert "has another sweep" in error(ran, tmp_path / "kl", "ppo.kl_coef=.02,.1")
    assert on_disk(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "expected a new folder" in error(ran, tmp_path / "other", "seed=1,2")


@pytest.mark.parametrize("metric", ["score", "reward_gain", "none"])
def test_the_training_reward_ranks_nothing(metric, tmp_path):
    message = error(ran, tmp_path / "kl", "ppo.kl_coef=.02,.05", metric=metric)
    assert message.startswith(
        "--metric: expected a number of the summary that is not the training reward (gold, kl_exact"
    )
    _, reporter = ran(tmp_path / "kl", "ppo.kl_coef=.02,.05", metric="kl_exact", least=True)
    assert reporter.tables[0][0][0] == "kl_exact"
