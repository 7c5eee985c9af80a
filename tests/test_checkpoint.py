import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax import checkpoint
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training.checkpoint import Checkpoints, Config
from rlhf_jax.training.state import TrainState

NOTES = {"position": {"next_index": 7, "epoch": {"seed": 3}}, "row": {"loss": 1 / 3}}
# Not a number, the zeros, the smallest and the largest: what a cast or a text would lose.
ODD = np.array([0x7FC00001, 0x80000000, 0x00000000, 0x00000001, 0x7F7FFFFF, 0xFF800000], np.uint32).view(np.float32)


def state(seed=0):
    """Parameters of two types in a tree two deep; value and reward are None, as in a stage that does not have them."""
    key = jax.random.key(seed)
    policy = {"wte": {"embedding": jax.random.normal(key, (5, 3))}, "odd": jnp.array(ODD) * (1 if seed == 0 else 0)}
    optimizer = {"policy": {"count": jnp.int32(seed), "mu": jnp.full((2, 2), 1 / 3, jnp.bfloat16)}}
    return TrainState.create(
        jax.random.fold_in(key, 1), policy=policy, reference={"x": jnp.ones(4)}, optimizer=optimizer
    ).replace(step=jnp.int32(11), kl_coef=jnp.float32(0.1))


def assert_same_bits(ours, theirs):
    """Equal trees, types, placements and bits: typed keys by their data."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
        a, b = (
            np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in (a, b)
        )
        assert a.tobytes() == b.tobytes()


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state()) is None
        checkpoints.save(11, state(), NOTES)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state(seed=1))
    assert_same_bits(restored.tree, state())
    assert (restored.step, restored.notes, restored.damaged) == (11, NOTES, ())
    assert restored.tree.value is None and restored.tree.reward is None
    # the key is a key again
    assert jax.random.normal(restored.tree.step_key) == jax.random.normal(state().step_key)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, Config(last=2)) as checkpoints:
        for step in 3, 6, 9, 10:
            checkpoints.save(step, state().replace(step=jnp.int32(step)), {"next_index": step})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [9, 10]
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(state())
    assert (restored.step, restored.tree.step, restored.notes) == (10, 10, {"next_index": 10})


@pytest.mark.parametrize(("better", "kept"), [(max, [2, 4, 5]), (min, [3, 4, 5])])
def test_the_best_are_kept_too(better, kept, tmp_path):
    with Checkpoints(tmp_path, Config(last=2, best=1), ("score", better)) as checkpoints:
        for step, score in (1, 0.5), (2, 0.9), (3, 0.1), (4, None), (5, 0.6):
            checkpoints.save(step, {"x": jnp.ones(2)}, {}, {} if score is None else {"score": score})
        assert checkpoints.steps == kept


def test_which_evaluation_is_the_best(tmp_path):
    with Checkpoints(tmp_path, best=("score", max)) as checkpoints:
        assert checkpoints.is_best({"score": 0.5}) and not checkpoints.is_best({"loss": 0.5})
        checkpoints.save(1, {"x": jnp.ones(2)}, {}, {"score": 0.5})
        checkpoints.save(2, {"x": jnp.ones(2)}, {})
    with Checkpoints(tmp_path, best=("score", max)) as checkpoints:  # as a run that goes on
        assert checkpoints.is_best({"score": 0.6})
        assert not checkpoints.is_best({"score": 0.5}) and not checkpoints.is_best({"score": float("nan")})
    with Checkpoints(tmp_path, Config(best=0), best=("score", max)) as checkpoints:
        assert not checkpoints.is_best({"score": 0.6})


def test_a_step_that_is_there_is_saved_again(tmp_path):
    """A run that was killed between its last checkpoint and its summary."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, {})
        checkpoints.save(1, {"x": jnp.zeros(2)}, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"x": jnp.ones(2)}).tree["x"].tolist() == [0, 0]


def test_a_state_can_be_donated_right_after_it_was_saved(tmp_path):
    """The next step overwrites its buffers while the write is still under way."""
    learn = jax.jit(lambda policy: jax.tree.map(lambda x: 2 * x + 1, policy), donate_argnums=0)
    policy = {str(i): numbers for i, numbers in enumerate(jax.random.normal(jax.random.key(0), (4, 1_000_000)))}
    learn(jax.tree.map(jnp.copy, policy))  # compiled, so that nothing holds up the one that counts
    as_saved = jax.tree.map(jnp.copy, policy)  # on the device: a NumPy view of a buffer would keep it from donation
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, policy, {})
        after = learn(policy)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(after).tree, as_saved)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_leaving_waits_for_the_writes_under_way(error, tmp_path):
    try:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"x": jnp.ones(8_000_000)}, {})
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Damage

# Of Orbax's tasks, whose event loop is gone when they end.
NOISE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in 1, 2:
            checkpoints.save(
                step, {"policy": {"x": jnp.arange(50_000.0) * step}, "step": jnp.int32(step)}, {"at": step}
            )
    return folder


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step):
    path = largest(step)
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(step):
    path = largest(step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_the_notes(step):
    path = step / "data" / "metadata"
    path.write_text(path.read_text().replace('"at": 2', '"at": 1'))


def lose_an_array(step):
    """All that says that there was one."""
    path = step / "state" / "_METADATA"
    told = json.loads(path.read_text())
    told["tree_metadata"] = {name: leaf for name, leaf in told["tree_metadata"].items() if "policy" not in name}
    path.write_text(json.dumps(told))
    shutil.rmtree(step / "state" / "ocdbt.process_0")


DAMAGES = [
    truncate,
    flip_a_bit,
    edit_the_notes,
    lose_an_array,
    lambda step: largest(step).unlink(),
    lambda step: (step / "data" / "metadata").write_text("{"),
    lambda step: shutil.rmtree(step / "state"),
]


@NOISE
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(damage, two, tmp_path, capfd):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    damage(folder / "2")
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore({"policy": {"x": jnp.zeros(50_000)}, "step": jnp.int32(0)})
        assert (restored.step, restored.notes) == (1, {"at": 1})
        assert restored.tree["policy"]["x"].tolist() == list(range(50_000))
        (told,) = restored.damaged
        assert told.startswith(f"{folder}/2: damaged (") and "\n" not in told
        place = checkpoints.put_aside(2)
        assert checkpoints.steps == [1] and place == tmp_path / "damaged" / "2-0" and any(place.iterdir())
        checkpoints.save(2, {"policy": {"x": jnp.ones(50_000)}, "step": jnp.int32(2)}, {"at": 2})
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore({"policy": {"x": jnp.zeros(50_000)}, "step": jnp.int32(0)}).step == 2
    with pytest.raises(InputError, match="damaged"):
        shutil.rmtree(folder / "1")
        shutil.rmtree(folder / "2")
        shutil.copytree(place, folder / "2")
        checkpoint.load(folder)
    assert capfd.readouterr().err == ""


@NOISE
def test_where_all_are_damaged_each_is_named(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    for step in "1", "2":
        flip_a_bit(folder / step)
    with Checkpoints(folder) as checkpoints, pytest.raises(InputError, match="no undamaged checkpoint: .*/2.*; .*/1: "):
        checkpoints.restore({"policy": {"x": jnp.zeros(50_000)}, "step": jnp.int32(0)})


@NOISE
def test_a_state_of_other_shapes_is_not_read_as_if_it_fitted(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "checkpoints")
    with Checkpoints(folder) as checkpoints, pytest.raises(InputError, match="no undamaged checkpoint"):
        checkpoints.restore({"policy": {"x": jnp.zeros(40_000)}, "step": jnp.int32(0)})


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "x") as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(100)}, {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=399))
        with pytest.raises(InputError, match="expected room for 400 bytes, there are 399"):
            checkpoints.save(2, {"x": jnp.ones(100)}, {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=400))
        checkpoints.save(3, {"x": jnp.ones(100)}, {})
    with Checkpoints(tmp_path / "x") as checkpoints:
        assert checkpoints.steps == [1, 3]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Checkpoints(tmp_path / "file" / "checkpoints")


# From outside a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a run leaves it: two stages, one of them with a result."""
    folder = tmp_path_factory.mktemp("run")
    for name, step in ("sft/checkpoints", 4), ("sft/checkpoints", 6), ("sft/result", 6), ("ppo/checkpoints", 5):
        with Checkpoints(folder / name, best=("loss", min)) as checkpoints:
            tree = {"policy": {"wte": jnp.full((3, 2), step, jnp.float32)}}
            tree |= {} if "result" in name else {"step": jnp.int32(step), "value": None}
            checkpoints.save(step, tree, {}, {"loss": 0.5})
    return folder


def test_two_lines_of_python(run):
    assert checkpoint.load(run / "sft")["policy"]["wte"].tolist() == [[6, 6]] * 3
    loaded = checkpoint.load(run / "sft", step=4)
    assert loaded["policy"]["wte"].tolist() == [[4, 4]] * 3 and loaded["step"] == 4
    assert checkpoint.load(run / "sft", step=6)["step"] == 6  # the state, not the result
    assert checkpoint.load(run / "ppo")["step"] == 5  # of a stage that is not done, its newest
    assert type(loaded["policy"]["wte"]) is np.ndarray


@pytest.mark.parametrize(
    ("path", "step", "told"),
    [
        ("sft", 5, "no checkpoint of step 5, there are 4, 6, 6"),
        ("nowhere", None, "there are none"),
        ("", None, "expected the folder of one stage"),
    ],
)
def test_what_is_not_there_is_named(path, step, told, run):
    with pytest.raises(InputError, match=told):
        checkpoint.load(run / path, step)


def command(*line):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_jax.checkpoint", *map(str, line)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    return done.returncode, done.stdout, done.stderr


def ask(capsys, *line):
    with Reporter() as reporter:
        checkpoint.main([str(part) for part in line], reporter)
    return capsys.readouterr().out


def test_a_reader_touches_nothing(run, capsys):
    """A save may be under way in the process that writes."""
    unfinished = run / "sft" / "checkpoints" / "8.orbax-checkpoint-tmp"
    unfinished.mkdir()
    checkpoint.load(run / "sft")
    checkpoint.load(run / "sft", step=4)
    for command in "list", "describe", "load":
        ask(capsys, command, run / "sft")
    assert unfinished.exists()
    unfinished.rmdir()


def test_a_damaged_one_is_told_in_the_list(run, tmp_path, capsys):
    folder = shutil.copytree(run / "sft", tmp_path / "sft")
    (folder / "checkpoints" / "4" / "state" / "_METADATA").write_text("{")
    *rows, told = ask(capsys, "list", folder).splitlines()
    assert [row.split()[1:3] for row in rows[1:]] == [["4", "damaged"], ["6", "2"], ["6", "1"]]
    assert told.startswith(f"{folder}/checkpoints/4: damaged (")
    with pytest.raises(InputError, match="/4: damaged"):
        ask(capsys, "describe", folder, "--step=4")


def test_the_list(run):
    code, out, err = command("list", run)
    assert code == 0 and err == ""
    rows = [line.split() for line in out.splitlines() if str(run) in line]
    assert [(row[0].removeprefix(f"{run}/"), row[1]) for row in rows] == [
        ("ppo/checkpoints", "5"), ("sft/checkpoints", "4"), ("sft/checkpoints", "6"), ("sft/result", "6"),
    ]  # fmt: skip


def test_the_description(run, capsys):
    out = ask(capsys, "describe", run / "sft", "--step=4")
    assert "2 arrays, evaluation 0.5" in out
    assert any(line.split() == ["policy/wte", "3x2", "float32"] for line in out.splitlines())
    assert "step" not in ask(capsys, "describe", run / "sft", "--step=4", "--part=policy").split("array")[-1]


def test_a_part_as_safetensors(run, tmp_path, capsys):
    file = tmp_path / "policy.safetensors"
    assert "1 arrays, 6 numbers" in ask(capsys, "load", run / "sft", "--part=policy", f"--out={file}")
    assert load_file(file)["policy/wte"].tolist() == [[6, 6]] * 3
    with pytest.raises(InputError, match="exists already"):
        ask(capsys, "load", run / "sft", f"--out={file}")
    with pytest.raises(InputError, match="has no pol, it has policy"):
        ask(capsys, "load", run / "sft", "--part=pol")


def test_bad_input_is_one_line(run):
    code, out, err = command("describe", run / "nowhere")
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"checkpoint.py: {run}/nowhere: expected the folder of a run or a stage")


def test_arguments_that_cannot_be_are_refused(run, tmp_path, capsys):
    for line, words in (
        (["load", run / "sft", f"--out={tmp_path}/no/x"], "--out: expected a file in a folder that exists, got"),
        (["describe", ""], "path: expected a folder, got none"),
        (["describe", run, "--step=x"], "argument --step: invalid int value: 'x'"),
        (["lst", run], "argument command: invalid choice: 'lst'"),
    ):
        with pytest.raises(InputError, match=words):
            ask(capsys, *line)
