"""examples/launch: the scripts, first with stand-ins for SLURM's and torch's programs, then on a
cluster if there is one.

examples/launch/try/cluster.sh starts a cluster of two pretended nodes.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.processes import TORCHRUN, free_port
from support.runs import tiny_run
from support.states import differences, read_state
from torch.distributed.run import get_args_parser

from fastgn.checkpoint import find_checkpoint
from fastgn.config import Config
from fastgn.config.cli import parse_config
from fastgn.metrics import read_rows

LAUNCH = ROOT / "examples" / "launch"
SLURM = ("slurm_one_node", "slurm_nodes", "slurm_requeue")
SCRIPTS = (*SLURM, "torchrun_hosts")
JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_JOB_NUM_NODES": "2"}
JOB |= {"SLURM_CPUS_PER_TASK": "12"}
RANK = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
RANK |= {"SLURM_NTASKS_PER_NODE": "8"}

PRINT = 'printf "%s\\n" "${0##*/}" "$@"'
RECORD = 'printf "%s\\n" "${0##*/} $*" >> calls; '
STAND_INS = {
    "torchrun": PRINT,
    "python": f"{PRINT}; env | grep -E '^(RANK|LOCAL_RANK|(LOCAL_)?WORLD_SIZE|MASTER_.*)=' | sort",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": f'if [ "$1" = show ]; then echo "${{3/\\[*/}}1"; else {RECORD} fi',
    "scancel": RECORD,
}
"""Program -> bash that takes its place. It prints or records its arguments."""


def environment(folder: Path) -> dict[str, str]:
    """Returns environment variables for a script that runs in the folder.

    The folder receives the environment `.venv` that the scripts activate. Its Python is ours.
    """
    (folder / ".venv" / "bin").mkdir(parents=True)
    programs = Path(sys.executable).parent
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}


def stand_in(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """Returns environment variables under which these programs are replaced by bash."""
    env = environment(folder)
    for name, code in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    return env | {"PATH": f"{folder}:{env['PATH']}"} | JOB | RANK


def dry_run(script: str, folder: Path, *args: str) -> list[str]:
    """Returns the program that a script starts and its arguments, without starting it."""
    done = subprocess.run(
        [LAUNCH / f"{script}.sh", *args],
        env=stand_in(folder, STAND_INS),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


def trained_by(words: list[str]) -> Config:
    """Returns the options of the command `... -m fastgn.train FLAGS --resume auto`.

    words: the command, after which environment variables may follow.
    """
    flags = words[words.index("fastgn.train") + 1 :]
    end = flags.index("--resume")
    assert flags[end + 1] == "auto"
    return parse_config(flags[:end])


# ------------------------------------------------------------------------------------------- always


def test_the_readme_is_short_and_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    assert all(p.name in text for p in LAUNCH.rglob("*.*") if p.name != "README.md")


@pytest.mark.parametrize("file", sorted(LAUNCH.rglob("*.sh")), ids=lambda p: p.stem)
def test_bash_reads_the_script(file: Path) -> None:
    done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(file, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC1091", file], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_with_flags_that_exist(script: str, tmp_path: Path) -> None:
    cfg = trained_by(dry_run(script, tmp_path))
    assert cfg.run.output == "runs/robust" and cfg.architecture.model == "swin_b"


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_replace_the_flags(script: str, tmp_path: Path) -> None:
    cfg = trained_by(dry_run(script, tmp_path, "--model", "swin_t", "--output", "a b"))
    assert (cfg.architecture.model, cfg.run.output) == ("swin_t", "a b")


@pytest.mark.parametrize(
    ("script", "nodes", "endpoint"),
    [
        ("slurm_one_node", "1:1", ""),
        ("slurm_nodes", "2", "host1:20123"),
        ("torchrun_hosts", "2", "host1:29500"),
    ],
)
def test_torchrun_accepts_its_flags(script: str, nodes: str, endpoint: str, tmp_path: Path) -> None:
    program, *args = dry_run(script, tmp_path)
    assert program == "torchrun"
    given = get_args_parser().parse_args(args)
    assert (given.nnodes, given.rdzv_endpoint) == (nodes, endpoint)
    assert given.nproc_per_node == "8" and given.max_restarts == 3
    assert given.standalone == (script == "slurm_one_node")
    assert given.module and given.training_script == "fastgn.train"


def test_srun_gives_ranks_what_torchrun_would(tmp_path: Path) -> None:
    words = dry_run("slurm_requeue", tmp_path)
    assert words[:3] == ["python", "-m", "fastgn.train"]
    assert sorted(words[-6:]) == [
        *("LOCAL_RANK=1", "LOCAL_WORLD_SIZE=8", "MASTER_ADDR=host1", "MASTER_PORT=20123"),
        *("RANK=9", "WORLD_SIZE=16"),
    ]


@pytest.mark.parametrize("status", [0, 1])
def test_the_time_limit_puts_the_job_back(status: int, tmp_path: Path) -> None:
    """Whatever became of the ranks, because there is an earlier checkpoint."""
    code = f'trap "sleep 0.3; echo saved >> calls; exit {status}" TERM; echo "$$" > pid.tmp'
    code += "; mv pid.tmp pid; while true; do sleep 0.05; done"
    programs = {**STAND_INS, "python": code, "scancel": RECORD + 'kill -TERM "$(cat pid)"'}
    process = subprocess.Popen(
        [LAUNCH / "slurm_requeue.sh"], env=stand_in(tmp_path, programs), cwd=tmp_path
    )
    try:
        wait_until(lambda: (tmp_path / "pid").exists(), 20)
        process.send_signal(signal.SIGUSR1)
        process.wait(400)
    finally:
        process.kill()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["scancel --signal=TERM 123", "saved", "scontrol requeue 123"]


@pytest.mark.parametrize("status", [0, 2])
def test_a_job_that_ends_by_itself_is_not_put_back(status: int, tmp_path: Path) -> None:
    env = stand_in(tmp_path, {**STAND_INS, "python": f"exit {status}"})
    done = subprocess.run([LAUNCH / "slurm_requeue.sh"], env=env, cwd=tmp_path)
    assert done.returncode == status and not (tmp_path / "calls").exists()


def wait_until(condition: Any, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --------------------------------------------------------------------------------------- Kubernetes


def parse_manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "trainjob.yaml").read_text())


def objects(**fields: Any) -> dict[str, Any]:
    """Returns a form for a list of objects that have names."""
    return {"*": {"name": str, **fields}}


POD = {
    "terminationGracePeriodSeconds": int,
    "containers": objects(volumeMounts=objects(mountPath=str, readOnly=bool)),
    "volumes": objects(persistentVolumeClaim={"claimName": str}, emptyDir={"medium": str}),
}
FORM = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "suspend": bool,
        "runtimeRef": {"name": str},
        "trainer": {
            "image": str,
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"requests": {}, "limits": {}},
            "command": {"*": str},
            "args": {"*": str},
            "env": objects(value=str),
        },
        "runtimePatches": {
            "*": {
                "manager": str,
                "trainingRuntimeSpec": {
                    "template": {
                        "spec": {
                            "replicatedJobs": objects(
                                template={"spec": {"template": {"spec": POD}}}
                            )
                        }
                    }
                },
            }
        },
    },
}
"""The fields of a TrainJob that the manifest uses, with their types.

"*" stands for every item of a list, and {} for an object with any keys. The names are those of the
schema of Kubeflow Trainer 2.3, which `test_the_manifest_matches_kubeflows_schema` reads.
"""


def misfits(value: Any, form: Any, where: str = "") -> list[str]:
    """Returns the places at which a manifest does not have the form."""
    if isinstance(form, type):
        return [] if type(value) is form else [f"{where}: {value!r} is no {form.__name__}"]
    if "*" in form:
        if not isinstance(value, list):
            return [f"{where}: no list"]
        return [m for i, v in enumerate(value) for m in misfits(v, form["*"], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where}: no object"]
    if not form:
        return []
    unknown = [f"{where}.{key}: unknown" for key in value.keys() - form.keys()]
    known = value.keys() & form.keys()
    return unknown + [m for k in known for m in misfits(value[k], form[k], f"{where}.{k}")]


def violations(value: Any, schema: dict[str, Any], where: str = "") -> list[str]:
    """Returns the places at which a value violates a schema of a CustomResourceDefinition.

    A field that the schema does not have is one of them, because Kubernetes would drop it.
    """
    if schema.get("x-kubernetes-int-or-string") or "anyOf" in schema:
        fits = isinstance(value, (int, str)) and re.search(
            schema.get("pattern", ""), str(value).strip()
        )
        return [] if fits else [f"{where}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if type(value) is not kinds[schema["type"]]:
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = []
    size = len(value) if isinstance(value, (str, list)) else value
    upper = schema.get("maxLength", schema.get("maxItems", schema.get("maximum")))
    lower = schema.get("minLength", schema.get("minItems", schema.get("minimum")))
    if (upper is not None and size > upper) or (lower is not None and size < lower):
        found.append(f"{where}: too large or too small")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += violations(item, schema["items"], f"{where}[{i}]")
    if isinstance(value, dict):
        found += [
            f"{where}.{key}: missing" for key in schema.get("required", ()) if key not in value
        ]
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if inner is not None:
                found += violations(item, inner, f"{where}.{key}")
            elif where != ".metadata":  # whose fields are Kubernetes' own
                found.append(f"{where}.{key}: unknown")
    return found


def test_the_manifest_has_the_form_of_a_trainjob() -> None:
    job = parse_manifest()
    assert misfits(job, FORM) == []
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"])
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # the names of the runtime torch-distributed
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # Kubeflow refuses the variables that it sets itself
    (variable,) = job["spec"]["trainer"]["env"]
    assert int(variable["value"]) < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("trainer.numNode", 2, ".spec.trainer.numNode: unknown"),
        ("trainer.numNodes", "2", ".spec.trainer.numNodes: '2' is no int"),
        ("trainer.args", "--recipe", ".spec.trainer.args: no list"),
        ("trainer.env", [{"name": 1}], ".spec.trainer.env[0].name: 1 is no str"),
        ("podTemplateOverrides", [], ".spec.podTemplateOverrides: unknown"),
    ],
)
def test_a_misfit_is_found(path: str, value: object, said: str) -> None:
    job = parse_manifest()
    *parents, key = path.split(".")
    place = job["spec"]
    for parent in parents:
        place = place[parent]
    place[key] = value
    assert misfits(job, FORM) == [said]


def test_the_manifest_matches_kubeflows_schema() -> None:
    name = os.environ.get("TRAINJOB_CRD")
    if not name:
        pytest.skip(
            "TRAINJOB_CRD names no file: it should be trainer.kubeflow.org_trainjobs.yaml of "
            "https://github.com/kubeflow/trainer, folder manifests/base/crds"
        )
    definition = yaml.safe_load(Path(name).read_text())
    job = parse_manifest()
    version = {v["name"]: v for v in definition["spec"]["versions"]}["v1alpha1"]
    schema = version["schema"]["openAPIV3Schema"]
    assert violations(job, schema) == []
    job["spec"]["trainer"]["numNode"] = 2
    job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["ml"] = {}
    job["spec"]["trainer"]["numNodes"] = -1
    del job["spec"]["runtimeRef"]
    assert sorted(violations(job, schema)) == [
        ".spec.runtimePatches[0].trainingRuntimeSpec.ml: unknown",
        ".spec.runtimeRef: missing",
        ".spec.trainer.numNode: unknown",
        ".spec.trainer.numNodes: too large or too small",
    ]


def test_the_manifest_trains_with_flags_that_exist() -> None:
    trainer = parse_manifest()["spec"]["trainer"]
    program, *args = [*trainer["command"], *trainer["args"]]
    given = get_args_parser().parse_args(args)
    assert program == "torchrun" and given.module and given.training_script == "fastgn.train"
    cfg = trained_by(args)
    mounts = ("/data/", "/runs/")
    assert (cfg.dataset.data_dir or "").startswith(mounts) and cfg.run.output.startswith(mounts)


# ----------------------------------------------------------------------------------------- for real


def run_flags(folder: Path, *more: str) -> list[str]:
    """Returns flags of a run whose rows and weights are compared with those of another launch."""
    short = ("--batch-size", "24", "--epochs", "2", "--log-interval", "1", "--device", "cpu")
    return tiny_run(folder, *short, *more)


def check_run(folder: Path, reference: Path | None = None) -> None:
    """Checks that a run has ended, that its metrics have no gap, and that its weights are those of
    the reference."""
    assert (folder / "summary.json").exists()
    updates = [int(row["update"]) for row in read_rows(folder / "metrics.csv")]
    state = read_state(find_checkpoint(folder))
    assert updates == list(range(1, state["update"] + 1)) and state["ranks"] == 2
    if reference is not None:
        states = [state, read_state(find_checkpoint(reference))]
        keys = ("update", "ranks", "model", "ema", "optimizer")
        assert differences(*({k: state[k] for k in keys} for state in states)) == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of the same run by torchrun alone."""
    folder = tmp_path_factory.mktemp("reference")
    command = [*TORCHRUN, "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "fastgn.train", *run_flags(folder / "run")]
    subprocess.run(command, env=environment(folder), check=True, timeout=300)
    check_run(folder / "run")
    return folder / "run"


def wait_for_hosts(hosts: list[subprocess.Popen]) -> None:
    """Waits until the processes of two hosts have ended. Fails unless both have succeeded."""
    try:
        assert [host.wait(400) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()


@pytest.mark.slow
def test_two_hosts_train(reference: Path, tmp_path: Path) -> None:
    """As two torchruns on this machine."""
    env = environment(tmp_path) | {"FIRST_HOST": f"127.0.0.1:{free_port()}", "PROCESSES": "1"}
    command = [LAUNCH / "torchrun_hosts.sh", *run_flags(tmp_path / "run")]
    hosts = [subprocess.Popen(command, env=env, cwd=tmp_path) for _ in range(2)]
    wait_for_hosts(hosts)
    check_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_the_manifests_command_trains(reference: Path, tmp_path: Path) -> None:
    """With the variables that Kubeflow sets, and as two torchruns on this machine."""
    env = environment(tmp_path)
    env |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
    env["PET_MASTER_PORT"] = str(free_port())
    command = parse_manifest()["spec"]["trainer"]["command"]
    assert command[0] == "torchrun"
    command = [*TORCHRUN, *command[1:]]
    command += [*run_flags(tmp_path / "run"), "--resume", "auto"]
    hosts = [
        subprocess.Popen(command, env=env | {"PET_NODE_RANK": rank}, cwd=tmp_path)
        for rank in ("0", "1")
    ]
    wait_for_hosts(hosts)
    check_run(tmp_path / "run", reference)


# -------------------------------------------------------------------------------------------- SLURM


def has_cluster() -> bool:
    """Returns whether the cluster of examples/launch/try answers."""
    if not shutil.which("sbatch"):
        return False
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    return done.returncode == 0 and bool(re.search(r"^ClusterName +=+ try$", done.stdout, re.M))


@pytest.fixture(scope="module")
def cluster() -> None:
    if not has_cluster():
        pytest.skip("no SLURM of examples/launch/try/cluster.sh answers (see SLURM_CONF)")


SIZES = {
    "slurm_one_node": ("--gpus-per-node=2", "--cpus-per-task=2"),
    "slurm_nodes": ("--gpus-per-node=1", "--cpus-per-task=1"),
    "slurm_requeue": ("--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1"),
}
"""Options of sbatch for two processes, which are on two nodes where the script allows it."""


def submit(folder: Path, script: str, args: list[str], *options: str) -> str:
    """Submits a script that writes folder/log, and returns the number of its job."""
    command = ["sbatch", "--parsable", "--output", "log", *SIZES[script], *options]
    command += [str(LAUNCH / f"{script}.sh"), *args]
    return subprocess.check_output(command, env=environment(folder), cwd=folder, text=True).strip()


def describe_job(job: str) -> dict[str, str]:
    """Returns what SLURM knows of a job."""
    text = subprocess.check_output(["scontrol", "show", "job", job], text=True)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait_for_job(job: str, folder: Path, limit_s: float = 400) -> dict[str, str]:
    """Returns what SLURM knows of a job that has completed."""
    deadline = time.monotonic() + limit_s
    while (known := describe_job(job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        if time.monotonic() > deadline:
            subprocess.run(["scancel", job])
            pytest.fail(f"still {known['JobState']}: {(folder / 'log').read_text()}")
        time.sleep(0.5)
    assert known["JobState"] == "COMPLETED", (folder / "log").read_text()
    return known


@pytest.mark.parametrize("script", SLURM)
def test_sbatch_accepts_the_settings(script: str, cluster: None) -> None:
    command = ["sbatch", "--test-only", str(LAUNCH / f"{script}.sh")]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("script", SLURM)
def test_slurm_trains(script: str, cluster: None, reference: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, script, run_flags(tmp_path / "run"))
    known = wait_for_job(job, tmp_path)
    assert known["NumNodes"] == ("1" if script == "slurm_one_node" else "2")
    check_run(tmp_path / "run", reference)


def test_slurm_continues_after_the_signal(cluster: None, reference: Path, tmp_path: Path) -> None:
    """Which scancel sends here, so that it does not depend on the speed of the machine."""
    job = submit(tmp_path, "slurm_requeue", run_flags(tmp_path / "run"))
    wait_until(lambda: len(read_rows(tmp_path / "run" / "metrics.csv")) > 3, 200)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_until(lambda: describe_job(job)["Restarts"] == "1", 60)
    known = wait_for_job(job, tmp_path)
    assert known["Restarts"] == "1"
    assert re.search(r"^stopped at update (\d+)", (tmp_path / "log").read_text(), re.MULTILINE)
    check_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_slurm_continues_after_the_time_limit(
    cluster: None, reference: Path, tmp_path: Path
) -> None:
    """SLURM counts in minutes, and may send the signal up to a minute early."""
    rows = read_rows(reference / "metrics.csv")
    update_s = (float(rows[-1]["seconds"]) - float(rows[5]["seconds"])) / (len(rows) - 6)
    length = ("--epochs", "10000", "--max-updates", str(int(150 / update_s)))
    flags = run_flags(tmp_path / "run", *length)
    job = submit(tmp_path, "slurm_requeue", flags, "--time=2", "--signal=B:USR1@30")
    known = wait_for_job(job, tmp_path, 850)
    assert int(known["Restarts"]) >= 1
    check_run(tmp_path / "run")
