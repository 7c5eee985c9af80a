"""A smaller copy of a trace, for a package: every iteration of the policy, the last steps of the stages before it."""

import dataclasses
from pathlib import Path

from rlhf_jax.errors import InputError
from rlhf_jax.viz import trace
from rlhf_jax.viz.trace import Trace


def pack(source, out, command="") -> Path:
    """Writes the copy to a new folder, which it returns. `command` made the run.

    Numbers stay as they were recorded, so the copy still verifies. Left out are: training steps of earlier stages but
    the first and the last; texts of their evaluations but the last; what the manifest says of the machine.
    """
    found, out = Trace(source), Path(out).expanduser()
    if out.exists():
        raise InputError(f"pack: expected a new folder, {out} exists")
    manifest = {name: value for name, value in found.manifest.items() if name not in ("files", "machine")}
    manifest |= {"command": command} if command else {}
    manifest["files"] = {}
    files = {}
    for stage, about in found.manifest["stages"].items():
        learned = about["algorithm"] in ("supervised", "preference")
        for kind in trace.KINDS:
            names = found.names(stage, kind)
            kept = [names[0], names[-1]] if learned and kind == "iter" else names
            for name in dict.fromkeys(kept):
                file = found.read(name)
                if learned and kind == "eval" and name != names[-1]:
                    file = dataclasses.replace(file, samples=[])
                files[name] = trace.encode(file)
                manifest["files"][name] = trace.about(file, files[name])
    trace.write(out, files, manifest)
    return out
