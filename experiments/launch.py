"""What every experiment shares: flags -> typed config, the compilation cache, errors in one line."""

import itertools
import os
import re
import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter
from rlhf_jax.training import guard, loop

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and :argument.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command continues a stopped run.")

BAD_INPUT, STOPPED, NOT_FINITE = 2, 3, 4  # exit codes


def launch(task, only=None, job=pipeline.run):
    """Runs job(config, workdir, reporter, stop, only) for a config of that task.

    Errors are one line. Exit codes: 2 for bad input, 3 for a stop by a signal, 4 for a number that is not finite.
    """
    app.run(lambda _: _run(task, only, job), flags_parser=parser("config", "workdir"))


def parser(*required):
    """A parser of flags for app.run, which refuses to start without the required ones. Errors are one line."""

    def parse(argv):
        try:
            argv = [_field(_found(*pair)) for pair in itertools.pairwise(["", *argv])]
            sys.argv[:] = argv  # ml_collections reads sys.argv
            rest = flags.FLAGS(argv)
            for name in required:
                if not flags.FLAGS[name].value:
                    raise InputError(f"--{name}: expected, got none")
            if rest[1:]:
                raise InputError(f"{rest[1]}: expected only --flags")
            if CONFIG.value:
                CONFIG.value.to_dict()  # a config that could not be loaded raises only when it is read
            return rest
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            leave(_message(error, argv))

    return parse


def _field(arg):
    """The flag as ml_collections can read it: `reward` is a section, whose `kind` is meant; `from` is a keyword."""
    arg = re.sub(r"^(--?config\.reward)(=|$)", r"\1.kind\2", arg)
    return re.sub(r"^(--?config\.\w+)\.from(=|$)", r'\1["from"]\2', arg)


def _found(before, arg):
    """Replaces NAME in --config=NAME:argument by the path of rlhf_jax/configs/NAME.py; other arguments stay."""
    flag, equals, value = (before, "", arg) if before in ("--config", "-config") else arg.partition("=")
    name, colon, argument = value.partition(":")
    if flag not in ("--config", "-config") or not name or "/" in name or name.endswith(".py") or Path(name).exists():
        return arg
    files = {path.stem: path for path in Path(rlhf_jax.__file__).parent.glob("configs/*.py")}
    if name not in files:
        raise InputError(f"--config: expected a file or one of {', '.join(sorted(files))}, got {name}")
    return f"{flag if equals else ''}{equals}{files[name]}{colon}{argument}"


def _message(error, argv):
    """The error of a flag in one line; ml_collections has several, sometimes with a traceback."""
    text = str(error.args[0] if error.args else error).strip()
    if isinstance(error, AttributeError | KeyError):  # \'lrr\'\nDid you mean "lr" instead of "lrr"?
        field, *hint = text.replace("\\n", "\n").replace("\\'", "'").strip("\"'").split("\n")
        flag = next((arg for arg in argv if arg.split("=")[0].endswith(field.strip("'"))), "--config")
        return " ".join([f"{flag}: no such field.", *hint])
    if "\n" in text:
        text = f"--config: {text.splitlines()[-1].strip()}"
    return text.replace(f"{InputError.__module__}.{InputError.__name__}: ", "")


def keep_compiled():
    """Keeps compiled programs, so that a second start takes seconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf_jax", "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _run(task, only, job):
    keep_compiled()
    logging.set_verbosity(logging.FATAL)  # Orbax logs every file it touches; its errors are raised as well
    try:
        with loop.stop_signal() as stop, stop.at_once(), Reporter() as reporter:
            config = configs.parse(CONFIG.value.to_dict())
            if config.task != task:
                raise InputError(f"--config: expected a config whose task is {task}, got one for {config.task}")
            if config.deterministic:  # JAX reads it with the first device, in the next line
                os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
            job(config, WORKDIR.value, reporter, stop, only)
    except InputError as error:
        leave(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        leave(f"workdir: {error.filename or WORKDIR.value}: {error.strerror or error}")
    except loop.Stopped as error:
        leave(error, STOPPED)
    except guard.NonFinite as error:
        leave(error, NOT_FINITE)


def leave(message, code=BAD_INPUT):
    """Prints one line and ends the program with the exit code."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)
