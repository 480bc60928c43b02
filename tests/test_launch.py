"""The files that start runs elsewhere: they parse, the commands in them are commands of ours, and a batch job that runs
out of time saves and queues itself again."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mindseed.train.deepspeed_json import deepspeed_config
from tests.test_house import ROOT, check_command, code_lines

yaml = pytest.importorskip("yaml")
CONFIGS = ROOT / "configs"
SCRIPTS = sorted((CONFIGS / "slurm").glob("*.sbatch"))
YAMLS = sorted(CONFIGS.glob("*/*.yaml"))


def joined(text: str) -> list[str]:
    """Lines, with those that a backslash continues made one, and without the sign of a comment."""
    return [line.strip() for line in re.sub(r"\\\n\s*#?\s*", "", re.sub(r"^#\s?", "", text, flags=re.M)).splitlines()]


def ours(line: str) -> str | None:
    """What a launcher is to start of ours, without the shell's variables."""
    found = re.search(r"(?:-m|--module) mindseed ([a-z].*?)(?: &)?$", line)
    return found and re.sub(r'"?\$\w+"?', "1", found.group(1))


def commands() -> list[tuple[str, str]]:
    lines = [(file.name, line) for file in (*SCRIPTS, *YAMLS) for line in joined(file.read_text(encoding="utf-8"))]
    lines += [("LAUNCH.md", line) for line in code_lines(ROOT / "docs" / "LAUNCH.md")]
    return [(name, found) for name, line in lines if (found := ours(line))]


@pytest.mark.parametrize("name, line", commands())
def test_what_launchers_are_told_to_start_is_a_command(name, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(line)


def test_they_are_found():
    assert {name for name, _ in commands()} == {"LAUNCH.md", *(file.name for file in SCRIPTS), "one-node.yaml",
                                                "nodes.yaml"}


@pytest.mark.parametrize("file", ["job.yaml", "pytorchjob.yaml"])
def test_pods_start_a_command(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    *_, job = yaml.safe_load_all((CONFIGS / "kubernetes" / file).read_text(encoding="utf-8"))
    spec = job["spec"]
    template = spec["template"] if "template" in spec else spec["pytorchReplicaSpecs"]["Worker"]["template"]
    (container,) = template["spec"]["containers"]
    assert container["command"] == ["torchrun"]
    args = container["args"]
    check_command(" ".join(args[args.index("mindseed") + 1:]))
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}


def test_pods_of_the_job_know_each_other():
    service, job = yaml.safe_load_all((CONFIGS / "kubernetes" / "job.yaml").read_text(encoding="utf-8"))
    spec, name = job["spec"], job["metadata"]["name"]
    args = spec["template"]["spec"]["containers"][0]["args"]
    assert spec["completions"] == spec["parallelism"] and f"--nnodes={spec['completions']}" in args
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:29500" in args


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_yaml_is_read(file):
    assert all(isinstance(document, dict) for document in yaml.safe_load_all(file.read_text(encoding="utf-8")))


def test_accelerate_reads_its_files():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    for file in sorted((CONFIGS / "accelerate").glob("*.yaml")):
        read = config_args.load_config_from_file(str(file))
        assert read.num_processes == 8 * read.num_machines and str(read.distributed_type.value) == "MULTI_GPU"


@pytest.mark.parametrize("file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.name)
def test_settings_for_deepspeed_are_taken(file):
    assert deepspeed_config(zero=3, json=file)["zero_optimization"]["stage3_prefetch_bucket_size"] > 0


def test_hostfile_has_the_form_that_deepspeed_reads():
    lines = (CONFIGS / "deepspeed" / "hostfile").read_text().splitlines()
    assert lines and all(re.fullmatch(r"\S+ slots=\d+", line) for line in lines)


# ------------------------------------------------------------------------------------------------------- batch scripts

STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then echo node-a; echo node-b; else echo "scontrol $*"; fi\n',
    "torchrun": 'echo "torchrun $*"\nenv | grep "^OMP_NUM\\|^TORCH_\\|^SRUN"\n[[ -n $WAIT ]] || exit 0\n'
                'trap "echo saved; exit 1" TERM\necho ready\nwhile :; do sleep 0.05; done\n',
}


def started(script: Path, folder: Path, wait: str) -> tuple[subprocess.Popen, Path]:
    """The script as Slurm would start it, with stand-ins for what is not here."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    (folder / "bin").mkdir()
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "WAIT": wait, "SLURM_CPUS_PER_TASK": "64",
                   "SLURM_GPUS_ON_NODE": "8", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77",
                   "SLURM_JOB_NODELIST": "node-[a-b]"}
    out = folder / "out"
    with out.open("w") as file:
        return subprocess.Popen(["bash", str(script)], cwd=folder, env=environment, stdout=file,
                                stderr=subprocess.STDOUT), out


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_batch_scripts_start_torchrun(script, tmp_path):
    process, out = started(script, tmp_path, wait="")
    assert process.wait(60) == 0, out.read_text()
    text = out.read_text()
    assert "--nproc-per-node 8" in text and "OMP_NUM_THREADS=8" in text
    if script.name == "nodes.sbatch":
        assert "--nnodes 2" in text and "--rdzv-endpoint node-a:29500" in text and "--rdzv-id 77" in text
        assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text and "SRUN_CPUS_PER_TASK=64" in text


@needs_bash
def test_a_job_that_runs_out_of_time_saves_and_is_queued_again(tmp_path):
    process, out = started(CONFIGS / "slurm" / "nodes.sbatch", tmp_path, wait="yes")
    try:
        end = time.monotonic() + 60
        while "ready" not in out.read_text():
            assert process.poll() is None and time.monotonic() < end, out.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 0, out.read_text()
        assert re.search(r"saved\n.*scontrol requeue 77", out.read_text(), re.S)
    finally:
        process.kill()
