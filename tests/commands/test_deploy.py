"""The files of docs/deploy can be read by the tools for them, and their commands work."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import golden
from support.program import with_devices
from support.release import golden_folder

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
SBATCH = DEPLOY / "grok.sbatch"
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ARG", "USER", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions():
    """The instructions of the Dockerfile, each as its name and what follows it."""
    text = DEPLOY.joinpath("Dockerfile").read_text().replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return [tuple(line.split(maxsplit=1)) for line in lines if line and line[0] != "#"]


def test_dockerfile_copies_what_exists_and_its_shell_commands_can_be_read():
    assert {name for name, _ in instructions()} == INSTRUCTIONS
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            assert all(DEPLOY.parents[1].joinpath(source).exists() for source in sources), rest
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)


def test_slurm_script_can_be_read_and_asks_for_one_process_a_node():
    subprocess.run(["bash", "-n", SBATCH], check=True)
    options = [line.split()[1] for line in SBATCH.read_text().splitlines() if "#SBATCH" in line]
    assert "--ntasks-per-node=1" in options
    assert all(option.startswith("--") and "=" in option for option in options)


@pytest.fixture
def job():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(DEPLOY.joinpath("grok-job.yaml").read_text())
    return service, job


def container_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def test_kubernetes_job_has_as_many_pods_as_hosts_and_they_find_the_first(job):
    service, job = job
    spec = job["spec"]
    environment = {entry["name"]: entry["value"] for entry in container_of(job)["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["HOSTS"])
    first = f"{job['metadata']['name']}-0.{spec['template']['spec']['subdomain']}"
    assert environment["COORDINATOR"].split(":")[0] == first
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()


# --- the same commands as two processes -----------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return golden_folder(tmp_path / "golden")


@pytest.fixture
def environment(tmp_path):
    """Four devices per process, and `grokfetch` on the PATH."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/grokfetch", f'exec {shlex.quote(sys.executable)} -m grokfetch "$@"')
    return with_devices(4) | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o700)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def arguments(folder):
    tokens = " ".join(map(str, golden.prompt("p1")))
    asked = ("--tokens", tokens, "--max-tokens", "4", "--dtype", "float32")
    return [str(folder), *asked, "--mesh", "expert=2,model=4"]


WANTED = " ".join(map(str, golden.arrays()["f32/p1_tokens"][:4])) + "\n"

SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2
SLURM_PROCID=1 "$@" & other=$!
SLURM_PROCID=0 "$@"
wait $other
"""


@pytest.mark.slow
def test_slurm_script_runs_one_model_in_two_processes(folder, environment, tmp_path):
    program(tmp_path / "bin/srun", SRUN)
    program(tmp_path / "bin/scontrol", r'printf "127.0.0.1\nsecond\n"')
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", "PORT": str(free_port())}
    done = subprocess.run(
        ["bash", SBATCH, *arguments(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == WANTED


@pytest.mark.slow
def test_kubernetes_job_runs_one_model_in_two_processes(folder, environment, job):
    container = container_of(job[1])
    environment |= {entry["name"]: entry["value"] for entry in container["env"]}
    environment["COORDINATOR"] = f"127.0.0.1:{free_port()}"
    pods = [
        subprocess.Popen(
            [*container["command"], *arguments(folder)],
            env=environment | {"JOB_COMPLETION_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = [pod.communicate(timeout=200) for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], results
    assert [stdout for stdout, _ in results] == [WANTED, ""]
