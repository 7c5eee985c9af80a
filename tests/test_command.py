"""Signals at any moment of a command, and errors in one line. Programs here import nothing that takes time."""

import ast
import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_jax import command
from rlhf_jax.errors import InputError, OutOfMemory

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM]

BEGIN = """
import hashlib, os, signal, sys, time
from rlhf_jax import command
sys.argv[0] = "some/where/train.py"
command.begin()
def ready():
    os.write(1, b"ready")
def busy():
    "Minutes in which no Python code runs in the main thread, and no signal interrupts."
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
TAKEN_OVER = """
noted = []
command.taken_over = True
for number in command.SIGNALS:
    signal.signal(number, lambda *_: noted.append(1) or os.write(1, b"noted"))
"""


@contextlib.contextmanager
def started(code, stdout=subprocess.PIPE):
    line, buffered = [sys.executable, "-c", BEGIN + code], os.environ | {"PYTHONUNBUFFERED": ""}
    with subprocess.Popen(line, cwd=ROOT, env=buffered, stdout=stdout, stderr=subprocess.PIPE, bufsize=0) as process:
        try:
            yield process
        finally:
            process.kill()


def read(process, words):
    """What the program has written, up to these words."""
    got = b""
    while not got.endswith(words):
        assert select.select([process.stdout], [], [], 20)[0], "it hangs"
        byte = process.stdout.read(1)
        assert byte, process.stderr.read().decode()  # it has ended
        got += byte
    return got


def ended(process):
    """(exit code, error output)."""
    return process.wait(10), process.stderr.read().decode()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("code", ["ready(); time.sleep(60)", "busy()"], ids=["Python", "C"])
def test_a_signal_ends_the_program_at_once_in_one_line(number, code):
    with started(code) as process:
        read(process, b"ready")
        process.send_signal(number)
        assert ended(process) == (3, f"train.py: stopped by {number.name}\n")


@pytest.mark.parametrize("code", ["ready(); [time.sleep(0.1) for _ in range(600)]", "busy()"], ids=["Python", "C"])
def test_a_first_signal_may_be_taken_over_a_second_may_not(code):
    with started(TAKEN_OVER + code) as process:
        read(process, b"ready")
        process.send_signal(signal.SIGTERM)
        if "sleep" in code:
            read(process, b"noted")
        else:
            time.sleep(0.2)  # for the thread to read the first
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert ended(process) == (3, "train.py: stopped by SIGINT\n")


def test_two_signals_at_once_are_one_line():
    with started("ready(); time.sleep(60)") as process:
        read(process, b"ready")
        for number in SIGNALS:
            process.send_signal(number)
        code, said = ended(process)
        assert code == 3 and said.count("\n") == 1 and said.startswith("train.py: stopped by SIG")


def test_a_stop_in_a_destructor_is_not_reported():
    """Python cannot raise there; training looks again after its step."""
    code = """
class Stopped(BaseException):
    exit_code = 3
class Falls:
    def __init__(self, error):
        self.error = error
    def __del__(self):
        raise self.error
Falls(Stopped("not reported"))
Falls(ValueError("reported"))
os.write(1, b"ready")
"""
    with started(code) as process:
        read(process, b"ready")
        code, said = ended(process)
        assert code == 0 and "ValueError: reported" in said and "Stopped" not in said


def test_the_cursor_is_shown_again_on_a_terminal():
    ours, theirs = pty.openpty()
    with started("ready(); time.sleep(60)", stdout=theirs) as process:
        os.close(theirs)
        got = os.read(ours, 5)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # a terminal that nobody has open any more
            while part := os.read(ours, 99):
                got += part
        assert ended(process)[0] == 3 and got.removeprefix(b"ready").startswith(b"\x1b[?25h")
    os.close(ours)


def test_children_leave_ctrl_c_to_their_parent_and_end_with_it():
    """Those of a reward with a process pool: a terminal sends Ctrl-C to all of them."""
    code = """
import multiprocessing
def work(pipe):
    signal.raise_signal(signal.SIGINT)
    pipe.send_bytes(b"still here")
    time.sleep(60)
context = multiprocessing.get_context("fork")
ours, theirs = context.Pipe()
child = context.Process(target=work, args=(theirs,))
child.start()
assert ours.recv_bytes() == b"still here"
os.write(1, f"{child.pid} ready".encode())
time.sleep(60)
"""
    with started(code) as process:
        said = read(process, b"ready")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 3
        child = Path("/proc", said.split()[0].decode(), "stat")
        for _ in range(100):
            if not child.exists() or child.read_text().split()[2] == "Z":  # it has ended, if nobody has looked yet
                return
            time.sleep(0.05)
        os.kill(int(child.parent.name), signal.SIGKILL)
        pytest.fail("the child is still there")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_still_imports_is_stopped_in_one_line(number):
    """As soon as the first lines of the command have run; then JAX takes a second to import."""
    with subprocess.Popen(
        [sys.executable, "experiments/plan.py"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        status = Path(f"/proc/{process.pid}/status")
        caught = 1 << (signal.SIGTERM - 1)  # Python itself catches SIGINT
        while not caught & int(status.read_text().split("SigCgt:")[1].split()[0], 16):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (3, "", f"plan.py: stopped by {number.name}\n")


COMMANDS = sorted((ROOT / "experiments").glob("*.py"))
MODULES = [
    path for path in sorted((ROOT / "rlhf_jax").rglob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")
]
LIGHT = {"contextlib", "errno", "os", "signal", "sys", "threading", "json", "pathlib", "dataclasses", "argparse"}
LIGHT |= {"secrets"}


@pytest.mark.parametrize("path", [*COMMANDS, *MODULES], ids=lambda path: path.name)
def test_every_command_begins_before_it_imports_what_takes_time(path):
    heavy, begun = [], False
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        begun |= "command.begin()" in ast.unparse(node) or ast.unparse(node).startswith("from launch import ")
        if isinstance(node, ast.Import | ast.ImportFrom) and not begun:
            names = [alias.name for alias in node.names]
            light = {"rlhf_jax.command"} | LIGHT
            full = names if isinstance(node, ast.Import) else [node.module, f"{node.module}.{names[0]}"]
            heavy += [] if light & set(full) else full
    assert begun and not heavy


def test_the_module_imports_nothing_that_takes_time():
    code = "import sys; before = set(sys.modules); import rlhf_jax.command; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {"rlhf_jax", "rlhf_jax.command", "rlhf_jax.errors"}
    assert {name.split(".")[0] for name in done.stdout.split()} <= sys.stdlib_module_names | {"rlhf_jax"}
    assert {name for name in done.stdout.split() if name.startswith("rlhf_jax")} == ours


# Errors


class OutOfDeviceMemory(RuntimeError):
    """As JAX raises it."""


@pytest.fixture
def line(monkeypatch, capfd):
    """line(error, place) -> (exit code, what is written) of a command that raises the error."""
    monkeypatch.setattr(sys, "argv", ["some/where/train.py"])

    def line(error, place=""):
        monkeypatch.setattr(command, "_said", False)
        with pytest.raises(SystemExit) as left, command.errors(place):
            raise error
        return left.value.code, capfd.readouterr().err

    return line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("sft.lr: expected\n  more"), 2, "sft.lr: expected more"),
        (OutOfMemory("sft: out of memory: 3 GiB"), 5, "sft: out of memory: 3 GiB"),
        (MemoryError("Unable to allocate 2 TiB"), 5, "out of memory: Unable to allocate 2 TiB"),
        (OutOfDeviceMemory("RESOURCE_EXHAUSTED: Out"), 5, "out of memory: RESOURCE_EXHAUSTED: Out"),
        (OSError(28, "No space left", "runs/x"), 2, "workdir: runs/x: No space left"),
        (OSError(28, "No space left"), 2, "workdir: runs: No space left"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_one_line_and_an_exit_code(error, code, said, line):
    assert line(error, "workdir: runs") == (code, f"train.py: {said}\n")


def test_a_fault_of_ours_is_no_line():
    with pytest.raises(ZeroDivisionError), command.errors():
        raise ZeroDivisionError


def test_a_number_that_is_not_finite_has_a_code_of_its_own(line):
    from rlhf_jax.training import guard

    assert line(guard.NonFinite("sft step 3")) == (4, "train.py: sft step 3\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("KeyboardInterrupt", "stopped by SIGINT"),
        ("BrokenPipeError(32, 'Broken pipe')", "stopped, as nothing reads its output any more"),
        ("Stopped('stopped after step 3')", "stopped after step 3"),
    ],
)
def test_a_stop_is_one_line_whatever_python_would_say_at_the_end(error, said):
    """And the last thing that the program does: a pool of processes may complain, and JAX takes its time."""
    code = f"""
import atexit
atexit.register(print, "cleaning up", file=sys.stderr)
class Stopped(BaseException):
    exit_code = 3
print("output")
with command.errors():
    raise {error}
"""
    with started(code) as process:
        assert ended(process) == (3, f"train.py: {said}\n") and process.stdout.read() == b"output\n"


def test_a_pipe_that_nobody_reads_is_one_line():
    with started("with command.errors():\n    while True:\n        print('x' * 9999, flush=True)") as process:
        process.stdout.close()
        assert ended(process) == (3, "train.py: stopped, as nothing reads its output any more\n")


def test_a_full_disk_under_the_output_is_one_line():
    with open("/dev/full", "w") as full, started("with command.errors():\n    print('x' * 99999)", full) as process:
        assert ended(process) == (2, "train.py: standard output: No space left on device\n")
    code = "print('not written yet')\nwith command.errors():\n    raise command.InputError('bad')"
    with open("/dev/full", "w") as full, started(code, full) as process:
        assert ended(process) == (2, "train.py: bad\n")


def test_the_last_line_is_written_once(monkeypatch, capfd):
    """Whichever thread comes first."""
    monkeypatch.setattr(command, "_said", False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    command._say("stopped"), command._say("stopped again")
    assert capfd.readouterr().err == "train.py: stopped\n"


def test_arguments_that_cannot_be_are_an_input_error():
    parser = command.parser(prog="python -m rlhf_jax.some")
    parser.add_argument("folder")
    with pytest.raises(InputError, match="the following arguments are required: folder; see python -m rlhf_jax.some"):
        parser.parse_args([])
