"""What cluster environments answer under made-up variables, from Lightning or from lit_fast, as JSON.

    python tests/lightning_environments.py lightning --out tests/goldens/environments_lightning_2_6_6.json

An error is recorded by the first standard class that it is of.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import tempfile
import warnings
from pathlib import Path
from typing import Any

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "9", "MASTER_ADDR": "first", "MASTER_PORT": "29500",
    "RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "8",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1234567", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NODELIST": "n[03-04]",
}  # fmt: skip
LSF = {
    "LSB_JOBID": "4711", "LSB_DJOB_RANKFILE": "RANKFILE",
    "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "1",
}  # fmt: skip
KUBEFLOW = {"MASTER_ADDR": "pod-0", "MASTER_PORT": "23456", "WORLD_SIZE": "3", "RANK": "2"}

CASES: dict[str, tuple[str, dict[str, str]]] = {
    "alone": ("", {}),
    "started by us": ("", {"MASTER_ADDR": "a", "MASTER_PORT": "8", "LOCAL_RANK": "1", "NODE_RANK": "1"}),
    "torchrun": ("", TORCHRUN),
    "torchrun without an address": (
        "TorchElasticEnvironment", {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"},
    ),
    "torchrun in slurm": ("", {**SLURM, **TORCHRUN}),
    "slurm": ("", SLURM),
    "slurm without a job number": ("", {name: SLURM[name] for name in SLURM if name != "SLURM_JOB_ID"}),
    "slurm, address given": ("", {**SLURM, "MASTER_ADDR": "elsewhere", "MASTER_PORT": "4000"}),
    "slurm, short job number": ("", {**SLURM, "SLURM_JOB_ID": "12"}),
    "slurm, ntasks only": ("", {"SLURM_NTASKS": "8", "SLURM_JOB_NAME": "train"}),
    "slurm, one task": ("", {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}),
    "slurm, interactive": ("", {**SLURM, "SLURM_JOB_NAME": "bash"}),
    "slurm, interactive, asked for": ("SLURMEnvironment", {**SLURM, "SLURM_JOB_NAME": "interactive"}),
    "slurm, no variables": ("SLURMEnvironment", {}),
    "lsf": ("", LSF),
    "lsf, port given": ("", {**LSF, "MASTER_PORT": "4000"}),
    "lsf, no rank file": ("LSFEnvironment", {"LSB_JOBID": "4711"}),
    "lsf, empty rank file": ("LSFEnvironment", {"LSB_JOBID": "4711", "LSB_DJOB_RANKFILE": ""}),
    "lsf, no sizes": ("LSFEnvironment", {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "RANKFILE"}),
    "kubeflow": ("KubeflowEnvironment", KUBEFLOW),
    "mpi without mpi4py": ("MPIEnvironment", {}),
}  # fmt: skip
NODE_LISTS = (
    "alpha,beta,gamma", "alpha beta gamma", "1.2.3.100", "n[5-9]", "n[05-09]", "n[7]", "n[7,9-11]", "n[7,9]-x[1-2]",
    "host[22-25,27],other", "host4-5,host[1-2]", "a-[1,3]-b",
)  # fmt: skip
SETTINGS = [(4, 2), (8, 1), (1, 3), (2, 2)]


def outcome(ask: Any) -> Any:
    try:
        return ask()
    except Exception as error:
        standard = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
        return f"raises {standard.__name__}"


def answers(environments: Any, kind: str) -> dict[str, Any]:
    if kind:
        made = outcome(getattr(environments, kind))
        if isinstance(made, str):
            return {"made": made}
    else:
        order = [f"{name}Environment" for name in ("TorchElastic", "SLURM", "LSF", "MPI")]
        found = next((name for name in order if getattr(environments, name).detect()), "LightningEnvironment")
        made = outcome(getattr(environments, found))
        if isinstance(made, str):
            return {"kind": found, "made": made}
    names = ("world_size", "global_rank", "local_rank", "node_rank")
    given: dict[str, Any] = {"kind": type(made).__name__, "external": made.creates_processes_externally}
    given |= {name: outcome(getattr(made, name)) for name in names}
    made.set_world_size(77)
    given["world_size after set_world_size(77)"] = outcome(made.world_size)
    given["main_address"] = outcome(lambda: made.main_address)
    port = outcome(lambda: made.main_port)
    given["main_port"] = port if type(made).__name__ != "LightningEnvironment" or "MASTER_PORT" in os.environ else "any"
    given |= {f"fits {devices} x {nodes}": outcome(lambda d=devices, n=nodes: made.validate_settings(d, n))
              for devices, nodes in SETTINGS}  # fmt: skip
    if hasattr(made, "job_id"):
        given |= {"job_id": made.job_id(), "job_name": made.job_name(), "signal": int(made.requeue_signal)}
        given["auto_requeue"] = made.auto_requeue
    return given


def record(package: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    home = "lightning.fabric.plugins.environments" if package == "lightning" else "lit_fast.strategies.environments"
    environments = importlib.import_module(home)
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder) / "ranks"
        ranks.write_text("\n".join(["launcher", "other", "other", socket.gethostname(), socket.gethostname()]))
        for name, (kind, variables) in CASES.items():
            os.environ.clear()
            os.environ.update(kept)
            os.environ.update({k: str(ranks) if v == "RANKFILE" else v for k, v in variables.items()})
            recorded[name] = answers(environments, kind)
    resolve = environments.SLURMEnvironment.resolve_root_node_address
    recorded["first nodes"] = {nodes: resolve(nodes) for nodes in NODE_LISTS}
    return recorded


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=["lightning", "lit_fast"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps(record(options.package), indent=1, sort_keys=True) + "\n")
