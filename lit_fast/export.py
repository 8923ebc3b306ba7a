"""A LightningModule out of training and into other formats: ONNX and TorchScript.

`torch.export.export(module, ...)` and `torch.compile(module)` need no help: a module is a plain torch module to them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lit_fast.errors import LightningDeprecationWarning, MisconfigurationException


class Exportable:
    """Gives a LightningModule its `to_onnx` and `to_torchscript`."""

    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **kwargs: Any) -> Any:
        """Export the module in evaluation mode with `torch.onnx.export`, which gets `kwargs`.

        Args:
            file_path: a path or an open file; None with torch's newer exporter returns the program alone.
            input_sample: what `forward` is given, a tuple for several arguments, a dict by name; by default
                `example_input_array`. The module's transfer hooks bring it to the module's device.

        Raises:
            MisconfigurationException: there is no sample.
            ModuleNotFoundError: onnx or onnxscript is missing (the extra "export" has them).

        Example::

            model.to_onnx("model.onnx", torch.randn(1, 64))
        """
        return _to_onnx(self, file_path, input_sample, kwargs)

    def to_torchscript(
        self, file_path: Any = None, method: str | None = "script", example_inputs: Any = None, **kwargs: Any
    ) -> Any:
        """The module in evaluation mode as a ScriptModule. Deprecated, as TorchScript is: use `torch.export.export`.

        Args:
            file_path: where to save it; it is only returned without.
            method: "script" compiles the source of `forward`, "trace" records one run of it.
            example_inputs: what to trace with; by default `example_input_array`.
            kwargs: for `torch.jit.script` or `torch.jit.trace`.

        Raises:
            MisconfigurationException: an unknown method, or nothing to trace with.
        """
        return _to_torchscript(self, file_path, method, example_inputs, kwargs)


def _to_onnx(module: Any, file_path: Any, input_sample: Any, options: dict[str, Any]) -> Any:
    """`torch.onnx.export` of the module in evaluation mode; what it returns.

    Raises:
        MisconfigurationException: there is neither an input sample nor an `example_input_array`.
        ModuleNotFoundError: onnx, or onnxscript, is not installed.
    """
    for name in ("onnx", "onnxscript") if options.get("dynamo", True) else ("onnx",):
        _require(name, module)
    sample = _on_device(module, _sample(module, input_sample, "to_onnx", "input_sample"))
    path = os.fspath(file_path) if isinstance(file_path, os.PathLike) else file_path
    if isinstance(sample, dict) and options.get("dynamo", True):
        sample, options = (), {"kwargs": sample, **options}
    with _apart(module), torch.no_grad():
        return torch.onnx.export(module, sample, path, **options)


def _to_torchscript(
    module: Any, file_path: Any, method: str | None, example_inputs: Any, options: dict[str, Any]
) -> Any:
    """The module in evaluation mode as a `torch.jit.ScriptModule`, saved to `file_path` where one is given.

    Raises:
        MisconfigurationException: `method` is unknown, or there is nothing to trace with.
    """
    warnings.warn(
        "TorchScript is deprecated in PyTorch, and so is to_torchscript: use torch.export.export(model, inputs).",
        LightningDeprecationWarning,
        stacklevel=3,
    )
    if method not in ("script", "trace"):
        raise MisconfigurationException(f"to_torchscript(method={method!r}): allowed are 'script' and 'trace'.")
    with _apart(module), torch.no_grad():
        if method == "script":
            scripted: Any = torch.jit.script(module, **options)
        else:
            if options.get("check_inputs") is not None:
                options = {**options, "check_inputs": _on_device(module, options["check_inputs"])}
            sample = _on_device(module, _sample(module, example_inputs, "to_torchscript", "example_inputs"))
            scripted = torch.jit.trace(module, example_inputs=sample, **options)  # type: ignore[no-untyped-call]
    if file_path is not None:
        torch.jit.save(scripted, os.fspath(file_path))
    return scripted


def _sample(module: Any, given: Any, method: str, name: str) -> Any:
    sample = module.example_input_array if given is None else given
    if sample is None:
        raise MisconfigurationException(
            f"{method} needs an input to run the module with: pass {name}=..., or set model.example_input_array."
        )
    return sample


def _on_device(module: Any, batch: Any) -> Any:
    """The batch as the module's own transfer hooks bring it to the module's device."""
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    return module.on_after_batch_transfer(batch, 0)


@contextmanager
def _apart(module: Any) -> Iterator[None]:
    """The module in evaluation mode and without its Trainer, which no exporter could follow; afterwards as before."""
    modes = {child: child.training for child in module.modules()}
    trainer = module._trainer
    module.trainer = None
    module.__dict__["_exporting"] = True  # whoever looks at `module.trainer` sees None
    module.eval()
    try:
        yield
    finally:
        del module.__dict__["_exporting"]
        module.trainer = trainer
        for child, training in modes.items():
            child.training = training


def _require(name: str, module: Any) -> None:
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise ModuleNotFoundError(
            f"{type(module).__name__}.to_onnx() needs {name}, which is not installed: pip install lit-fast[export].",
            name=name,
        )
