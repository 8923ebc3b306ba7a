"""`lit-fast info`: what was built, what was chosen on this machine, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# What each optional package is for; imported nowhere here, only looked up.
OPTIONAL = {
    "tensorboard": "TensorBoardLogger",
    "torchmetrics": "metric objects in self.log",
    "jsonargparse": "lit-fast pretrain, configuration files",
    "tokenizers": "lit-fast pretrain, the tokenizer",
    "matplotlib": "lit-fast pretrain, the loss curve",
    "nvidia-ml-py": "GPU telemetry",
    "triton": "Triton kernels",
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_facts() -> dict[str, Any]:
    import torch

    parallel = torch.__config__.parallel_info()
    facts: dict[str, Any] = {
        "version": torch.__version__,
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads or OMP_NUM_THREADS changes it)",
        "parallel backend": parallel.partition("ATen parallel backend: ")[2].partition("\n")[0],
    }
    if not torch.cuda.is_available():
        facts["CUDA devices"] = f"none (torch built for CUDA {torch.version.cuda})" if torch.version.cuda else "none"
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        facts[f"cuda:{index}"] = f"{device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}"
    return facts


def gpu_kernels() -> str:
    """Which kernels would step parameters on a GPU, and why, whether there is one or not."""
    import torch

    from lit_fast import ops

    kernels, why = ops.kernels_for(torch.device("cuda"))
    return f"{kernels or 'none'}: {why}"


def facts() -> dict[str, Any]:
    """Everything that `lit-fast info` prints, as one nested dict that JSON can hold."""
    import lit_fast
    from lit_fast import ops

    return {
        "lit_fast": {
            "version": lit_fast.__version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "core": {**ops.build_info(), "gpu_kernels": gpu_kernels()},
        "torch": torch_facts(),
        "optional packages": {name: f"{version(name) or 'not installed'} ({use})" for name, use in OPTIONAL.items()},
    }


def rows(group: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """Lines of `name value`, aligned; a nested dict stands below its name, further to the right."""
    width = max((len(str(name)) for name in group), default=0)
    out: list[str] = []
    for name, value in group.items():
        title = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            out += [f"{indent}{title}", *rows(value, indent + "  ")]
            continue
        out.append(f"{indent}{title:<{width}}  {text(value)}")
    return out


def text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lit-fast info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    options = parser.parse_args(argv)
    found = facts()
    if options.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    for title, group in found.items():
        print(title)
        print("\n".join(rows(group)))
    return 0
