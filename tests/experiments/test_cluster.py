"""The scripts for clusters: their syntax, and after which exit codes they start again."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "experiments" / "cluster"
HOPELESS = {0, 2, 4, 5}  # exit codes of rlhf_jax/errors.py after which another start would not help


@pytest.mark.parametrize("name", ["tpu.sh", "slurm.sh"])
def test_scripts_are_bash_and_start_again_unless_it_is_hopeless(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    codes = re.search(r"^ +([\d |]+)\)", (CLUSTER / name).read_text(), flags=re.MULTILINE)[1]
    assert set(map(int, codes.split("|"))) == HOPELESS


def test_the_job_of_kubernetes():
    service, job = yaml.safe_load_all((CLUSTER / "gke.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
    assert service["metadata"]["name"] == pod["subdomain"]  # by which the pods have names
    assert set(spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]) == HOPELESS - {0}


# Stands for gcloud: a slice is a folder `worker`, whose state is in the file `state`; gs://b is the folder `b`. The
# second look into the bucket fails.
GCLOUD = r"""#!/usr/bin/env bash
set -o pipefail && cd "$(dirname "$0")/.." && echo "$*" >> calls
case "$*" in
    *" describe "*) cat state ;;
    *" create "*) cp -r image worker && echo READY > state ;;
    *" delete "*) rm -r worker state ;;
    *" ssh "*) for arg; do [ "${arg#--command=}" = "$arg" ] || line=${arg#--command=}; done
        cd worker && HOME=$PWD setsid --wait bash -c "$line" ;;
    "storage ls "*) [ "$(grep -c "storage ls" calls)" != 2 ] || { echo "ERROR: no network" >&2 && exit 1; }
        [ -e "${3#gs://}" ] || { echo "ERROR: One or more URLs matched no objects." >&2 && exit 1; } ;;
    "storage rsync "*) exec 9> lock && { flock -n 9 || touch raced; } && sleep 0.2
        to=${!#} from=${@: -2:1} skip=nothing
        [ "${from#gs://}" = "$from" ] && from=worker/$from || from=${from#gs://}
        [ "${to#gs://}" = "$to" ] && to=worker/$to || to=${to#gs://}
        [[ "$*" != *--exclude=* ]] || skip=summary.json
        mkdir -p "$to" && tar -C "$from" --exclude="$skip" -c . | tar -C "$to" -x || exit 1
        [[ "$*" != *delete-unmatched* ]] || (cd "$to" && find . -type f) | while read -r file; do
            [ -e "$from/$file" ] || rm "$to/$file"
        done ;;
esac
"""
# The run: at its first start it takes a checkpoint, and the slice is preempted; then it goes on from there.
RUN = """#!/usr/bin/env bash
if [ -e runs/demo/sft/checkpoints/1 ]; then
    sleep 0.2 # a copy runs at the end
    rm runs/demo/sft/checkpoints/1 && touch runs/demo/sft/checkpoints/2 && echo done > runs/demo/sft/summary.json
else
    mkdir -p runs/demo/sft/checkpoints && touch runs/demo/sft/checkpoints/1
    while ! [ -e ../b/demo/sft/checkpoints/1 ]; do sleep 0.05; done
    rm -r runs && echo PREEMPTED > ../state && kill -9 0
fi
"""


def test_a_slice_of_one_worker_goes_on_from_its_copy_in_a_bucket(tmp_path):
    for name, text in {
        **dict.fromkeys(("bin/sudo", "bin/python3", "image/venv/bin/pip"), "#!/bin/sh\n"),
        "bin/gcloud": GCLOUD,
        "image/venv/bin/rlhf-jax": RUN,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    names = {"NAME": "n", "ZONE": "z", "TYPE": "v5litepod-4", "BUCKET": "gs://b/demo", "RUN": "runs/demo"}
    env = {**names, "EVERY": "0.1", "PAUSE": "0", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", CLUSTER / "tpu.sh", "rl"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tpu.sh: exit code 137, the slice is PREEMPTED; again in 0 s" in done.stderr
    assert "ERROR: no network\ntpu.sh: exit code 1, the slice is READY; again in 0 s" in done.stderr
    kept = sorted(str(path.relative_to(tmp_path / "b")) for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert kept == ["demo/sft/checkpoints/2", "demo/sft/summary.json"]
    assert not (tmp_path / "worker").exists() and not (tmp_path / "raced").exists()
    calls = (tmp_path / "calls").read_text()
    assert calls.count("--spot") == 2 and "mount" not in calls
