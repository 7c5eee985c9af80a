"""A stage that needs more memory than there is: what was requested, what there is, and the fields that need less."""

import contextlib
import os
import re
import resource

import jax

from rlhf_jax import command
from rlhf_jax import config as configs
from rlhf_jax.errors import OutOfMemory


@contextlib.contextmanager
def named(config, name):
    """Within it, a stage that needs more memory than there is raises OutOfMemory, in one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not command.out_of_memory(error):
            raise
        section = configs.section(config, name)
        part, model = getattr(config, section), config.model
        less = {
            f"{section}.microbatches": f"more than {part.microbatches}",
            f"{section}.batch": f"less than {part.batch}",
        }
        if hasattr(part, "lanes") and config.task != "write":
            less[f"{section}.lanes"] = f"less than {part.lanes or part.batch}"
        less |= {} if model.remat else {"model.remat": "true"}
        less |= {} if model.dtype == "bfloat16" else {"model.dtype": "bfloat16"}
        if (devices := jax.local_device_count()) > config.mesh.fsdp:
            less["mesh.fsdp"] = f"more than {config.mesh.fsdp}, at most {devices}"
        less["evaluation.batch"] = f"less than {config.evaluation.batch}"
        advice = ", ".join(f"--config.{field} ({value})" for field, value in less.items())
        raise OutOfMemory(
            f"{name}: out of memory: {_requested(error)}; {_available()}; less is needed with {advice}"
        ) from error


def _requested(error):
    """How much memory an error says was requested."""
    found = re.search(r"allocat\w* ([\d.]+) ?(\w+)", str(error))
    if not found:
        return " ".join(str(error).split()) or "more requested"
    number, unit = found.groups()
    return f"{float(number) / 2**30:.2f} GiB requested" if unit == "bytes" else f"{number} {unit} requested"


def _available():
    """The memory of a device; a CPU's is that of the machine, or what this process may have of it."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        limit = limit if allowed == resource.RLIM_INFINITY else min(limit, allowed)
    return f"{device.device_kind} has {limit / 2**30:.2f} GiB"
