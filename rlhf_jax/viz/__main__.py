"""python -m rlhf_jax.viz COMMAND: traces at the command line.

verify WORKDIR              recompute every identity of a trace in float64; exit code 1 at a breach, 2 for bad input
replay WORKDIR --iter N     score the recorded tokens of an iteration again, with its checkpoint
export WORKDIR FOLDER       the page with this trace as static files
unipo WORKDIR FILE.json     the recorded iterations in UNIPO's JSON
pack WORKDIR FOLDER         a copy of a trace with fewer rows of text and fewer steps, for a package
"""

from rlhf_jax import command

if __name__ == "__main__":
    command.begin()  # the imports below take seconds

import logging
import sys

from rlhf_jax.report.console import Reporter
from rlhf_jax.viz import export, pack
from rlhf_jax.viz.replay import replay
from rlhf_jax.viz.verify import IDENTITIES, verify


def main(argv, reporter) -> int:
    """The command line: the exit code."""
    parser = command.parser(prog="python -m rlhf_jax.viz", description="The trace of a run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name, run, text, *names):
        parsed = commands.add_parser(name, help=text, description=text)
        parsed.add_argument("workdir", help="the folder of a run, or its folder `trace`")
        for each in names:
            parsed.add_argument(each)
        parsed.set_defaults(run=run)
        return parsed

    add("verify", _verify, "recompute every identity of a trace in float64")
    again = add("replay", _replay, "score the recorded tokens of an iteration again, with its checkpoint")
    again.add_argument("--iter", type=int, required=True, dest="iteration", help="a recorded iteration")
    add("export", _export, "write the page with this trace as static files, to a new folder", "out")
    add("unipo", _unipo, "write the recorded iterations in UNIPO's JSON, to a new file", "out")
    small = add("pack", _pack, "write a smaller copy of a trace, to a new folder", "out")
    small.add_argument("--command", default="", help="the command that made the run, for the manifest")
    args = parser.parse_args(argv)
    return args.run(args, reporter) or 0


def _verify(args, reporter):
    results = verify(args.workdir)
    header = ("identity", "what must hold", "numbers", "largest error", "")
    rows = [
        (each.identity, IDENTITIES[each.identity], str(each.numbers), f"{each.error:.1e}", _word(each.breach))
        for each in results
    ]
    reporter.table(header, rows)
    return _leave([each.breach for each in results], reporter)


def _replay(args, reporter):
    results = replay(args.workdir, args.iteration)
    rows = [(each.array, str(each.numbers), f"{each.error:.1e}", _word(each.where)) for each in results]
    reporter.table(("array", "numbers", "largest error", ""), rows)
    return _leave([each.where for each in results], reporter)


def _word(breach):
    return "BREACH" if breach else "ok"


def _leave(breaches, reporter):
    """Reports the first breach: the exit code."""
    for breach in filter(None, breaches):
        reporter.note(f"breach: {breach}")
        return 1
    return 0


def _export(args, reporter):
    reporter.note(f"written to {export.static(args.workdir, args.out)}; any web server can serve this folder")


def _unipo(args, reporter):
    reporter.note(f"written to {export.unipo(args.workdir, args.out)}")


def _pack(args, reporter):
    reporter.note(f"written to {pack.pack(args.workdir, args.out, args.command)}")


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's: its errors are raised as well
    with command.errors(), Reporter() as reporter:
        code = main(sys.argv[1:], reporter)
    sys.exit(code)
