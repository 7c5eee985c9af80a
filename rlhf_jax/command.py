"""What every command has: Ctrl-C and SIGTERM in one line, from its first line to its last, and errors in one line.

    from rlhf_jax import command

    command.begin()  # before the imports that take seconds
    ...
    with command.errors():
        main()

It imports nothing that takes time.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from typing import Any

from rlhf_jax.errors import BAD_INPUT, OUT_OF_MEMORY, STOPPED, InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h\r\n"  # a progress bar hides it

taken_over = False  # whether training takes the first signal, to save its state (training/loop.py: stop_signal)
others: Any = None  # the other processes of a run on several hosts (hosts.py), which end together

_process = 0  # the process that has begun
_lock, _said = threading.RLock(), False  # the last line is written once, whichever thread ends the program


def begin():
    """From now on SIGINT and SIGTERM end the program at once, with one line and exit code STOPPED.

    Where the first one is `taken_over`, a second one does. A thread of its own waits for them, so that this works
    during a long compilation, too.
    """
    global _process
    processes = sys.modules.get("multiprocessing.process")
    if processes and processes.parent_process():  # a worker of a user's reward, which imports the command again
        return _begin_child()
    if _process == os.getpid():
        return
    if not _process:
        os.register_at_fork(after_in_child=_begin_child)
    _process = os.getpid()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in SIGNALS:
        signal.signal(number, _stop)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    sys.unraisablehook = _unraisable
    threading.Thread(target=_wait, args=(reading,), daemon=True).start()


def _unraisable(raised):
    """A stop that is raised where nothing can be, as in a destructor, is no news: it is raised again later."""
    if getattr(raised.exc_value, "exit_code", 0) != STOPPED:
        sys.__unraisablehook__(raised)


def _begin_child():
    """A child is stopped by its parent, which finishes its step first. Ctrl-C goes to both."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(reading):
    """Ends the program at a signal, unless it is the first one and taken over."""
    seen = 0
    while True:
        (number,) = os.read(reading, 1)
        if number in SIGNALS:
            seen += 1
            if seen > 1 or not taken_over:
                _stop(number)


def _stop(number, _=None):
    """The handler of the signals, in the main thread or in that of `_wait`, whichever comes first."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
    end(f"stopped by {signal.Signals(number).name}", STOPPED)


def end(message, code):
    """Ends the program with one line, and without Python's cleaning up: with that, other lines may follow."""
    _say(message)
    if others:
        others.ending(message, code)
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os._exit(code)  # no exception: it could be caught, or only be reported


@contextlib.contextmanager
def errors(place=""):
    """Inside it an error that a user can mend, or a stop, ends the program with one line and its exit code.

    place: what an error of the file system is about, where it does not name a file itself.
    """
    try:
        yield
    except BaseException as error:
        message, code = _explained(error, place)
        if others and not code and not isinstance(error, SystemExit):
            others.cause(error)
            traceback.print_exc()
            message, code = f"{type(error).__name__}: {error}", 1
        if not code:
            raise
        if code == STOPPED or others:
            _flush()
            end(message, code)
        leave(message, code)


def _explained(error, place):
    """(one line, exit code) of an exception; the code is 0 for one that is a fault of ours."""
    if code := getattr(error, "exit_code", 0):
        return error, code
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT", STOPPED
    if isinstance(error, BrokenPipeError):
        return "stopped, as nothing reads its output any more", STOPPED
    if out_of_memory(error):
        return f"out of memory: {error}", OUT_OF_MEMORY
    if isinstance(error, OSError):  # a full disk, a folder that cannot be written
        where = ": ".join(filter(None, (place.split(": ")[0], error.filename) if error.filename else (place,)))
        return f"{where or 'standard output'}: {error.strerror or error}", BAD_INPUT
    return error, 0


def parser(**options):
    """An argparse.ArgumentParser of these options, whose errors are an InputError."""
    import argparse  # not before the signals are handled

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise InputError(f"{message}; see {self.prog} --help")

    return Parser(**options)


def out_of_memory(error):
    """Whether an exception says that the host's or the device's memory is too small."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def leave(message, code=BAD_INPUT):
    """Writes one line to standard error and ends the program with the exit code."""
    _flush()
    _say(message)
    sys.exit(code)


def _flush():
    """Writes what is left of the output. Where it cannot be written, Python does not try again at the end."""
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(message):
    """Writes the program's last line, after its name."""
    global _said
    with _lock, contextlib.suppress(OSError):
        line, _said = "" if _said else f"{os.path.basename(sys.argv[0])}: {' '.join(str(message).split())}\n", True
        os.write(2, line.encode(errors="backslashreplace"))
