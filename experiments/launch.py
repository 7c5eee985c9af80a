"""What every experiment shares: flags -> typed config, help, the compilation cache, errors in one line."""

from rlhf_jax import command

command.begin()  # the imports below take seconds, and Ctrl-C is one line from here on

# ruff: noqa: E402
import dataclasses
import difflib
import gc
import importlib.machinery
import importlib.util
import itertools
import os
import re
import shutil
import sys
import textwrap
import traceback
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax import fields, hosts, pipeline
from rlhf_jax.errors import InputError
from rlhf_jax.report.console import Reporter, Silent
from rlhf_jax.training import sharding

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, and :argument.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command continues a stopped run.")

SCRIPTS = {  # by task
    "summarize": "ppo_summarize.py",
    "write": "pg_tweets.py or pg_stories.py",
    "prompts": "rl.py",
    "arithmetic": "rl_arithmetic.py",
}
HELP = {"-h", "-?", "-help", "--help", "--helpshort", "--helpfull"}
RARELY = 200_000, 50, 100  # of gc: tracing makes many objects and few cycles, and collecting takes a tenth of its time
INDENT = 44  # columns of a field's name and value in the help


def launch(task, only=None, job=pipeline.run):
    """Runs job(config, workdir, reporter, only=..., given=...) for a config of that task."""

    def main():
        theirs = CONFIG.value.get("task")
        if theirs in SCRIPTS and theirs != task:
            script = f"experiments/{SCRIPTS[theirs]} runs this one"
            raise InputError(f"--config: expected a config whose task is {task}, got one for {theirs}; {script}")
        config, given = read_config()
        if config.deterministic:  # JAX reads it with the first device, in the next line
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
        hosts.start(config.hosts)
        sharding.devices()
        with Reporter() if hosts.first() else Silent() as reporter:
            job(config, WORKDIR.value, reporter, only=only, given=given)

    start(main, "config", "workdir")


def start(main, *required, optional=(), arguments=""):
    """Parses the flags, refuses to start without the required ones, and calls main(). Errors are one line.

    required, optional: which of --config and --workdir the command has. arguments: what it gets besides flags, if
    anything; then at least one is needed, and the call is main(list of them).
    """
    command.begin()
    gc.set_threshold(*RARELY)

    def run(argv):
        logging.set_verbosity(logging.FATAL)  # Orbax logs every file it touches; its errors are raised as well
        _keep_compiled()
        with command.errors(f"workdir: {WORKDIR.value}" if "workdir" in required else ""):
            main(*[argv[1:]] * bool(arguments))

    app.run(run, flags_parser=lambda argv: _parse(argv, required, (*required, *optional), arguments))


def _keep_compiled():
    """Compiled programs are kept, so a second start takes seconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rlhf_jax", "xla")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def read_config():
    """The config of the flags, and the names of the fields that are flags themselves."""
    config = configs.parse(CONFIG.value.to_dict())
    given = [name.replace('["', ".").replace('"]', "") for name in flags.FLAGS["config"].override_values]
    return config, {name for name, *_ in fields.leaves(config) if f"{name}.".startswith(tuple(f"{g}." for g in given))}


def _parse(argv, required, allowed, arguments):
    """The parser of flags for app.run."""
    flags.FLAGS["config"].parser = _ConfigFile()
    try:
        argv = [_field(_found(*pair)) for pair in itertools.pairwise(["", *argv])]
        sys.argv[:] = [arg for arg in argv if arg not in HELP]  # ml_collections reads sys.argv
        rest = flags.FLAGS(sys.argv)
        if len(sys.argv) < len(argv):
            print("\n".join(_help(allowed)))
            sys.exit()
        for name in required:
            if not flags.FLAGS[name].value:
                raise InputError(f"--{name}: expected, got none")
        for name in ("config", "workdir"):
            if name not in allowed and flags.FLAGS[name].present:
                raise InputError(f"--{name}: not a flag of this command")
            if len(values := _values(name)) > 1:
                raise InputError(f"--{name}: expected once, got {' and '.join(values)}")
        if rest[1:] and not arguments:
            raise InputError(f"{rest[1]}: expected only --flags")
        if arguments and not rest[1:]:
            raise InputError(f"{arguments}: expected at least one, got none")
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        command.leave(_message(error))


def _values(name):
    """The different values that are given for a flag, in order."""
    names, values = (f"--{name}", f"-{name}"), []
    for before, arg in itertools.pairwise(sys.argv):
        flag, _, value = (before, "", arg) if before in names else arg.partition("=")
        values += [value] if flag in names and value else []
    return list(dict.fromkeys(values))


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


class _ConfigFile(flags.ArgumentParser):
    """Reads a config file, and checks the names of the fields that are flags. Errors name the file and the line."""

    def parse(self, path):
        file, colon, argument = path.partition(":")
        if not Path(file).is_file():
            found = "a folder" if file and Path(file).is_dir() else "none"
            raise InputError(f"--config: {file or 'its value'}: expected a config file, found {found}")
        loader = importlib.machinery.SourceFileLoader("config_file", file)
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader("config_file", loader))
        sys.modules["config_file"] = module
        line = 1
        try:
            loader.exec_module(module)
            get_config = getattr(module, "get_config", None)
            if not callable(get_config):
                raise InputError(f"--config: {file}: expected a function get_config, found none")
            line = getattr(getattr(get_config, "__code__", None), "co_firstlineno", line)
            config = get_config(*[argument] * bool(colon))
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(f"--config: {_raised(error, file, line)}") from error
        if not isinstance(config, ConfigDict):
            got = type(config).__name__
            raise InputError(f"--config: {file}:{line}: expected get_config to return a ConfigDict, got {got}")
        config.lock()
        for arg in sys.argv:
            _check_name(arg, config)
        return config


def _raised(error, file, line):
    """What was raised and where in the file; at `line` where it is in none of its own."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).samefile(file):
        line, message = error.lineno, f"{type(error).__name__}: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{file}:{frames[-1].lineno if frames else line}: {message}"


def _check_name(arg, config):
    """Refuses --config.FIELD=... of a field that is not there."""
    flag = re.match(r"--?(?:no)?config\.([^=]*)", arg)
    for name in flag[1].replace('["', ".").replace('"]', "").split(".") if flag else ():
        known = list(config) if isinstance(config, ConfigDict) else []
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise InputError(f"{arg}: no such field.{hint}")
        config = config[name]
    if flag and isinstance(config, ConfigDict):
        raise InputError(
            f"{arg}: a section; expected one of its fields, such as --config.{flag[1]}.{next(iter(config))}="
        )


def _message(error):
    """The error of a flag in one line."""
    error = error.__context__ if isinstance(error.__context__, InputError) else error
    text = str(error.args[0] if error.args else error)
    name = error.flagname.lower() if isinstance(error, flags.UnrecognizedFlagError) else ""
    if name in flags.FLAGS or name.startswith("config."):
        text = f"Unknown command line flag '{error.flagname}'. Did you mean: {name} ?"
    return text


def _help(allowed):
    """The lines of --help: what the script does, its flags, and the fields of the config where one is given."""
    yield (sys.modules["__main__"].__doc__ or "").strip()
    yield "\nFlags:"
    own = flags.FLAGS.flags_by_module_dict()
    for flag in [*own.get("launch", ()), *own.get(sys.argv[0], ())]:
        if flag.name.startswith("config."):
            continue
        if flag.name in ("config", "workdir") and flag.name not in allowed:
            continue
        default = "" if flag.default in (None, "") else f" Default: {flag.default}."
        yield from _entry(f"--{flag.name}", f"{' '.join(flag.help.split())}{default}")
    if "config" in allowed and not CONFIG.value:
        yield "\nWith --config=FILE, --help lists every field of the config, with its value in that file."
    elif "config" in allowed:
        yield f"\nFields of {flags.FLAGS['config'].config_filename}: flag and value, type, meaning"
        yield from _fields(read_config()[0])


def _fields(config, path=""):
    """The fields of a section of the config, then its own sections."""
    said = fields.comments(type(config))
    for name, field, value in fields.leaves(config):
        if "." not in name:
            kind = "|".join(field.metadata.get("choices", (field.type.__name__,)))
            shown = str(value).lower() if isinstance(value, bool) else value
            yield from _entry(f"--config.{path}{name}={shown}", f"{kind}. {said.get(field.name, '')}")
    for name, section in vars(config).items():
        if dataclasses.is_dataclass(section):
            yield f"\n{path}{name}: {type(section).__doc__.splitlines()[0]}"
            yield from _fields(section, f"{path}{name}.")


def _entry(head, text):
    """A flag, and what is said of it beside it."""
    width = max(min(shutil.get_terminal_size((120, 24)).columns, 120), 2 * INDENT)
    lines = textwrap.wrap(text, width - INDENT - 2)
    first = f"  {head:{INDENT - 2}}" if len(head) <= INDENT - 4 else f"  {head}\n{' ' * INDENT}"
    return [f"{first}{lines[0]}".rstrip() if lines else first.rstrip(), *(" " * INDENT + line for line in lines[1:])]
