"""The scripts for clusters: their syntax, and after which exit codes they start again."""

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
