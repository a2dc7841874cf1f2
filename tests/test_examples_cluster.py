"""What the examples for clusters hand to laser is what laser takes, and their parts fit together."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from laserlm.cli import app

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples" / "cluster"


def parse(arguments: list[str]) -> dict[str, Any]:
    """Return the options of a command of laser as the command line reads them; exits where it does not."""
    command: Any = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        name, *arguments = arguments
        context = command.make_context("laser", [name], parent=context, resilient_parsing=True)
        command = command.commands[name]
    return command.make_context("laser", list(arguments), parent=context).params


def job() -> dict[str, Any]:
    claim, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    assert (claim["kind"], job["kind"]) == ("PersistentVolumeClaim", "RayJob")
    job["claim"] = claim["metadata"]["name"]
    return job


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_slurm_script_starts_ray_on_all_nodes_and_the_search_on_one(tmp_path: Path) -> None:
    for name, text in {"srun": 'printf "%s\\n" "$@"', "hostname": "echo 10.0.0.1 10.1.0.1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'PATH="{tmp_path}:{Path(sys.executable).parent}:$PATH"\n')
    slurm = {"SUBMIT_DIR": tmp_path, "JOB_NUM_NODES": 3, "GPUS_PER_NODE": "a100:4", "CPUS_PER_TASK": 32}
    settings = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    ran = subprocess.run(["bash", CLUSTER / "slurm.sh"], env=settings, capture_output=True, text=True, check=True)
    words = ran.stdout.splitlines()
    ray = words[words.index("symmetric-run") : words.index("--")]
    assert {name: ray[ray.index(name) + 1] for name in ("--address", "--min-nodes", "--num-cpus", "--num-gpus")} == {
        "--address": "10.0.0.1:6379",
        "--min-nodes": "3",
        "--num-cpus": "32",
        "--num-gpus": "4",
    }
    laser, *arguments = words[words.index("--") + 1 :]
    assert laser == "laser"
    options = parse(arguments)
    assert (options["executor"], options["address"]) == ("ray", "10.0.0.1:6379")
    assert (options["workers"], options["gpus_per_worker"], options["cpus_per_worker"]) == (12, 1, 8)


def test_ray_job_asks_for_what_its_pods_have() -> None:
    all_of_it = job()
    spec = all_of_it["spec"]
    laser, *arguments = shlex.split(spec["entrypoint"])
    assert laser == "laser"
    options = parse(arguments)
    assert (options["executor"], options["address"]) == ("ray", "auto")
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pods = [each["template"]["spec"] for each in (cluster["headGroupSpec"], group)]
    (has,) = (container["resources"]["limits"] for container in pods[1]["containers"])
    assert options["workers"] * options["gpus_per_worker"] == group["replicas"] * int(has["nvidia.com/gpu"])
    assert options["workers"] * options["cpus_per_worker"] <= group["replicas"] * int(has["cpu"])
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]] == [all_of_it["claim"]]
        (mount,) = container["volumeMounts"]
        assert all(each["value"].startswith(mount["mountPath"] + "/") for each in container["env"])


def test_image_has_the_ray_that_the_job_names() -> None:
    built = (CLUSTER / "Dockerfile").read_text()
    cluster = job()["spec"]["rayClusterSpec"]
    version = cluster["rayVersion"]
    assert f'"ray[default]=={version}"' in built
    assert f"ray=={version}\n" in (ROOT / "constraints.txt").read_text()
    image = re.search(r"-t (\S+)", built)
    assert image
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert {c["image"] for group in groups for c in group["template"]["spec"]["containers"]} == {image[1]}


def test_the_page_tells_commands_that_there_are() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    commands = [words[words.index("laser") + 1 :] for words in lines if "laser" in words]
    assert [arguments[0] for arguments in commands] == ["search", "report"]
    for arguments in commands:
        parse(arguments)
