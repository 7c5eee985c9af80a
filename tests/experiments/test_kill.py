"""A run that is killed again and again, wherever it is, ends as one that never was.

Five kills, each where it hurts; `--kills=50` makes it fifty, most of them at random moments. Half are of either job.
And one that is asked to stop while it evaluates.
"""

import glob
import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.report import metrics
from rlhf_jax.training.checkpoint import by_name
from tests.experiments.conftest import IMPORTS
from tests.support import logged

ROOT = Path(__file__).parents[2]
FIELDS = {"data.made": 100, "data.length": 10, "evaluation.prompts": 8, "evaluation.batch": 8, "evaluation.samples": 0}
# Here and in the tests of the two commands schedules are constant, so that the programs are the same for any steps.
FIELDS |= {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_size": 8}
FIELDS |= {"policy_gradient.kl_target": 2.0, "policy_gradient.kl_horizon": 50, "alarms.freeze": False}
for stage in "pretrain", "sft", "policy_gradient":
    FIELDS |= {f"{stage}.steps": 9, f"{stage}.batch": 4, f"{stage}.eval_every": 2, f"{stage}.save_every": 3}
    FIELDS[f"{stage}.schedule"] = "constant"
TWEETS = ["experiments/pg_tweets.py", "--config=configs/pg_tweets.py"]
TWEETS += [f"--config.{field}={value}" for field, value in FIELDS.items()]

SIZES = {"data.prompt_length": 48, "evaluation.prompts": 8, "evaluation.batch": 8, "evaluation.samples": 0}
SIZES |= {f"data.world_{kind}": 40 for kind in ("sft", "preferences", "prompts")} | {"data.world_held_out": 8}
SIZES |= {"model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_size": 8}
SIZES |= {"ppo.kl_target": 2.0, "ppo.kl_horizon": 50}
for stage in "sft", "reward", "ppo":
    SIZES |= {f"{stage}.steps": 9, f"{stage}.batch": 4, f"{stage}.eval_every": 2, f"{stage}.save_every": 3}
    SIZES[f"{stage}.schedule"] = "constant"
SUMMARIZE = ["experiments/ppo_summarize.py", "--config=configs/ppo_summarize.py"]
SUMMARIZE += [f"--config.{field}={value}" for field, value in SIZES.items()]

# Where it hurts: (files to watch, in the workdir; how many new ones or how many changes; which).
IN_A_SAVE = ("*/checkpoints/*tmp*", "new")
AFTER_A_SAVE = ("*/checkpoints/*[0-9]", "new")
BETWEEN_STAGES = ("*/summary.json", "new")
IN_A_RESULT = ("*/result/*", "new")
WRITING_METRICS = ("*/metrics.jsonl", "changed")
PLACES = (IN_A_SAVE, WRITING_METRICS, BETWEEN_STAGES, AFTER_A_SAVE, IN_A_RESULT)

# Imports once what takes seconds to import; runs each command line it reads in a fork, and sends it a signal in time.
KILLER = """
import glob, time
def seen(pattern, kind):
    there = {}
    for path in glob.glob(pattern):
        try: there[path] = 0 if kind == "new" else os.stat(path).st_size
        except OSError: pass
    return there
for line in sys.stdin:
    argv, log, after, pattern, kind, count, number = json.loads(line)
    began, known = time.monotonic(), seen(pattern, kind)
    if not (child := os.fork()):
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv, code = argv, 0
        try: runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as error: code = error.code or 0
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        now = seen(pattern, kind)
        count -= sum(known.get(path) != size for path, size in now.items())
        known = now
        if (pattern and count <= 0) or (after and time.monotonic() - began > after):
            os.kill(child, number)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.0005)
    print(json.dumps([os.waitstatus_to_exitcode(done[1]), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def start():
    """start(argv, log, after=seconds, place=..., count=..., number=signal) -> (exit code, seconds)."""
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS + KILLER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def start(argv, log, *, after=0, place=("", "new"), count=1, number=signal.SIGKILL):
            print(json.dumps([argv, str(log), after, *place, count, number]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield start


# Counts the evaluations, of 8 texts, in a file beside it, and gives the signal the time to come within one.
VOWELS = """
import pathlib, time

def vowels(texts):
    if len(texts) == 8:
        with open(pathlib.Path(__file__).with_name("evaluations"), "a") as file:
            file.write("x")
        time.sleep(0.05)
    return [sum(c in "aeiou" for c in t) / 10 for t in texts]
"""


@pytest.fixture(scope="module", params=[TWEETS, SUMMARIZE], ids=["tweets", "summarize"])
def whole(request, start, tmp_path_factory):
    """(command line, workdir, seconds) of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.py").write_text(VOWELS)
    own = {"data.cache": folder / "cache"} if request.param is SUMMARIZE else {"reward": f"{folder}/mine.py:vowels"}
    line = [*request.param, *(f"--config.{field}={value}" for field, value in own.items())]
    code, seconds = start([*line, f"--workdir={folder / 'run'}"], folder / "log")
    assert code == 0, (folder / "log").read_text()
    return line, folder / "run", seconds


def left(workdir):
    """All that a run leaves for good, without what the clock says."""
    stages = sorted(path.parent.name for path in workdir.glob("*/summary.json"))
    found = {}
    for path in sorted(workdir.rglob("summary.json")):
        summary = json.loads(path.read_text())
        kept = {name: value for name, value in summary.items() if not name.endswith("seconds")}
        found[str(path.relative_to(workdir))] = kept
    for stage in stages:
        found[f"{stage} metrics"] = logged(workdir, stage)
        found[f"{stage} samples"] = (workdir / stage / "samples.jsonl").read_text()
        found[f"{stage} checkpoints"] = sorted(path.name for path in (workdir / stage / "checkpoints").iterdir())
    return found


def assert_same_arrays(ours, theirs):
    for stage in sorted(path.parent.name for path in theirs.glob("*/summary.json")):
        for step in (None, 9):
            a, b = (by_name(checkpoint.load(folder / stage, step)) for folder in (ours, theirs))
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{stage} {step} {name}")


def test_killed_at_any_moment_it_loses_nothing(whole, start, tmp_path, request):
    """After each kill the same command is started again; a run that ends is compared, and the next begins."""
    line, undisturbed, seconds = whole
    mine = TWEETS[0] in line
    kills, limit = 0, (request.config.getoption("--kills") + mine) // 2
    chance = random.Random(7)
    places = itertools.chain(PLACES[:3] if mine else PLACES[3:], itertools.repeat(None))
    for attempt in itertools.count():
        workdir = tmp_path / str(attempt)
        killed_here = 0
        while True:
            log = tmp_path / f"{attempt}.log"
            if kills == limit:
                when = {}
            elif place := next(places):
                watched = (glob.escape(str(workdir)) + "/" + place[0], place[1])
                when = {"place": watched, "count": chance.randint(1, 3)}
            else:
                when = {"after": chance.uniform(0.3, 1) * seconds}
            code, _ = start([*line, f"--workdir={workdir}"], log, **when)
            if code != -9:
                break
            kills, killed_here = kills + 1, killed_here + 1
        assert code == 0, log.read_text()[-2000:]
        assert "damaged" not in log.read_text()
        assert left(workdir) == left(undisturbed)
        assert_same_arrays(workdir, undisturbed)
        if kills >= limit:
            assert killed_here or attempt
            return


@pytest.mark.parametrize("whole", [TWEETS], ids=["tweets"], indirect=True)
def test_stopped_while_it_evaluates_it_loses_nothing(whole, start, tmp_path):
    """At the first of a stage, and at the same again where the run goes on; the best checkpoint is kept.

    Pretraining has 6 evaluations, fine-tuning as many; policy gradient begins with one of the policy before it.
    """
    line, undisturbed, _ = whole
    place = (glob.escape(str(undisturbed.parent)) + "/evaluations", "changed")
    stopped = {"place": place, "number": signal.SIGTERM}
    log, line = tmp_path / "log", [*line, f"--workdir={tmp_path / 'run'}"]
    for stage, count in ("pretrain", 2), ("rl", 13), ("rl", 2):
        assert start(line, log, count=count, **stopped)[0] == 3, log.read_text()
        assert len(metrics.read(tmp_path / "run" / stage / "metrics.jsonl")) == 3
    assert log.read_text().count("stopped after step 2 of 9; the same command goes on from there") == 3
    assert start(line, log)[0] == 0, log.read_text()
    assert "damaged" not in log.read_text()
    assert left(tmp_path / "run") == left(undisturbed)
    assert_same_arrays(tmp_path / "run", undisturbed)
