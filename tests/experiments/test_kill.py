"""A run that is killed again and again, wherever it is, ends as one that never was.

Five kills, each where it hurts; `--kills=50` makes it fifty, most of them at random moments. Half are of either job.
And one that gets a signal while it evaluates, and one of two processes, which ends as one process would.
"""

import glob
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.report import metrics
from rlhf_jax.training.checkpoint import FOLDERS, by_name
from tests.experiments.conftest import IMPORTS
from tests.support import logged, samples

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

# Imports once what takes seconds to import; runs the command lines it reads in forks, and sends one a signal in time.
KILLER = """
import glob, time
def seen(pattern, kind):
    there = {}
    for path in glob.glob(pattern):
        try: there[path] = 0 if kind == "new" else os.stat(path).st_size
        except OSError: pass
    return there
def forked(argv, log, env):
    if child := os.fork():
        return child
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    sys.argv, code = argv, 0
    try: runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error: code = error.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
for line in sys.stdin:
    argvs, logs, env, after, pattern, kind, count, number, which = json.loads(line)
    began, known = time.monotonic(), seen(pattern, kind)
    children = [forked(argv, log, env) for argv, log in zip(argvs, logs)]
    while not any(done := os.waitpid(children[which], os.WNOHANG)):
        now = seen(pattern, kind)
        count -= sum(known.get(path) != size for path, size in now.items())
        known = now
        if (pattern and count <= 0) or (after and time.monotonic() - began > after):
            os.kill(children[which], number)
            done = os.waitpid(children[which], 0)
            break
        time.sleep(0.0005)
    codes = [done[1] if child == children[which] else os.waitpid(child, 0)[1] for child in children]
    print(json.dumps([*map(os.waitstatus_to_exitcode, codes), time.monotonic() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def start():
    """start(argv, log, after=seconds, place=..., count=..., number=signal) -> (exit code, seconds).

    start.hosts(argv, log, ..., which=0) -> (exit codes, seconds) of two processes with two devices each; the signal
    goes to one of them, and the other one has the log `log.1`.
    """
    with subprocess.Popen(
        [sys.executable, "-c", IMPORTS + KILLER], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def started(argvs, logs, env, *, after=0, place=("", "new"), count=1, number=signal.SIGKILL, which=0):
            request = [argvs, logs, env, after, *place, count, number, which]
            print(json.dumps(request), file=process.stdin, flush=True)
            *codes, seconds = json.loads(process.stdout.readline())
            return codes, seconds

        def start(argv, log, **when):
            (code,), seconds = started([argv], [str(log)], {}, **when)
            return code, seconds

        def hosts(argv, log, more=((), ()), **when):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                where = f"--config.hosts.coordinator=localhost:{free.getsockname()[1]}"
            lines = [[*argv, where, "--config.hosts.count=2", f"--config.hosts.index={i}", *more[i]] for i in range(2)]
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
            return started(lines, [str(log), f"{log}.1"], {"XLA_FLAGS": flags, "NPROC": "8"}, **when)

        start.hosts = hosts
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


def close(ours, theirs, where=""):
    """Whether results agree to 1e-5 of each number plus 1e-6: KLs and gains are small differences of large numbers."""
    if isinstance(theirs, dict):
        machine = ("machine", "versions", "seconds")
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if not name.endswith(machine):
                close(ours[name], theirs[name], f"{where}/{name}")
    elif isinstance(theirs, list):
        for mine, yours in zip(ours, theirs, strict=True):
            close(mine, yours, where)
    elif isinstance(theirs, float):
        assert abs(ours - theirs) <= 1e-5 * abs(theirs) + 1e-6, (where, ours, theirs)
    else:
        assert ours == theirs, where


def said(log):
    """The lines of a process, without those of its collectives."""
    return [line for line in log.read_text().splitlines() if "[Gloo]" not in line]


@pytest.mark.parametrize("whole", [SUMMARIZE], ids=["summarize"], indirect=True)
def test_two_processes_do_what_one_does(whole, start, tmp_path):
    """Parameters are divided over both. Stopped by a signal to the silent one, one process alone goes on from there."""
    line, undisturbed, _ = whole
    run, log = tmp_path / "run", tmp_path / "log"
    line = [*line, f"--workdir={run}"]
    place = (f"{glob.escape(str(run))}/ppo/metrics.jsonl", "changed")
    stopped = {"place": place, "count": 4, "number": signal.SIGTERM, "which": 1}
    codes, _ = start.hosts([*line, "--config.mesh.fsdp=4"], log, **stopped)
    assert codes == [3, 3], log.read_text()
    (last,) = said(tmp_path / "log.1")
    assert last.startswith("ppo_summarize.py: stopped after step ") and last == said(log)[-1]
    stopped_after = int(last.split()[4])
    assert start(line, log)[0] == 0, log.read_text()
    assert f"ppo: goes on after step {stopped_after}" in said(log)  # its checkpoint is sound
    close(json.loads((run / "summary.json").read_text()), json.loads((undisturbed / "summary.json").read_text()))
    ours, theirs = ([row["ppo"]["completion"] for row in samples(folder, "ppo")] for folder in (run, undisturbed))
    assert ours == theirs
    ours, theirs = (
        {path.relative_to(folder) for path in folder.rglob("*.json*") if not {*FOLDERS} & {*path.parts}}
        for folder in (run, undisturbed)
    )
    assert ours == theirs


@pytest.mark.parametrize("whole", [SUMMARIZE], ids=["summarize"], indirect=True)
def test_hosts_that_differ_or_do_not_come_are_refused_in_one_line(whole, start, tmp_path):
    line, run, _ = whole
    line, log = [*line, f"--workdir={run}"], tmp_path / "log"
    codes, _ = start.hosts(line, log, more=((), ("--config.sft.lr=0.5",)))
    why = "hosts: sft.lr: expected 0.002, as host 0 has, got 0.5 on host 1"
    assert codes == [2, 2] and said(log)[-1] == f"ppo_summarize.py: host 1: {why}"
    assert said(tmp_path / "log.1") == [f"ppo_summarize.py: {why}"]
    where = ("--config.hosts.coordinator=localhost:9", "--config.hosts.count=2", "--config.hosts.index=1")
    assert start([*line, *where, "--config.hosts.wait=1"], tmp_path / "alone")[0] == 2
    what = "expected process 0 at localhost:9, waited 1 s (Connection refused)"
    assert said(tmp_path / "alone") == [f"ppo_summarize.py: hosts.coordinator: {what}"]
