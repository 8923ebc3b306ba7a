"""The state of every random generator that training draws from, loadable with `weights_only=True`.

`capture` and `restore` handle the process-wide generators: Python's `random`, numpy's, torch's CPU generator
and every CUDA device's. `capture_generator` and `restore_generator` handle one generator object of a user's
own. States are kept as tensors, integers, strings and lists of them: never as pickled objects.
"""

from __future__ import annotations

import array
import random
import sys
import warnings
from typing import Any

import torch

from lit_fast.errors import CheckpointError

State = dict[str, Any]


def capture(cuda: bool = True) -> State:
    """Copy the state of the process-wide generators.

    Args:
        cuda: Also copy every CUDA device's, if CUDA is initialised. Each copy waits for its device.

    Returns:
        `{"python": ..., "torch": uint8 tensor of 5,056 bytes, "numpy": ..., "cuda": [uint8 tensor, ...]}`;
        "numpy" only if anyone has imported numpy, "cuda" only if CUDA is in use.

    Example:
        >>> state = capture()
        >>> first = torch.rand(2)
        >>> restore(state)
        >>> bool((torch.rand(2) == first).all())
        True
    """
    state: State = {"python": _from_python(random.getstate()), "torch": torch.get_rng_state()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = _encode(numpy.random.get_state(legacy=False))
    if cuda and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: State) -> None:
    """Put the process-wide generators back to `state`.

    A kind that `state` does not hold is left as it is: it was not in use when the state was taken (or the
    checkpoint is Lightning's, which has none). A kind that it holds and this process does not have (numpy not
    installed, fewer CUDA devices) is skipped with a warning, for then the run goes on with other random
    numbers. numpy is imported if the state holds it.

    Raises:
        CheckpointError: A state is not what `capture` makes; generators before it are already restored.
    """
    try:
        if "python" in state:
            random.setstate(_to_python(state["python"]))
        if "numpy" in state:
            _restore_numpy(state["numpy"])
        if "torch" in state:
            torch.set_rng_state(state["torch"].cpu())
        if state.get("cuda"):
            _restore_cuda(state["cuda"])
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"the random state is not what lit_fast.checkpoint.rng.capture makes ({type(error).__name__}: "
            f"{error}); remove it from the checkpoint to go on with fresh random numbers"
        ) from error


def is_generator(value: object) -> bool:
    """Whether `value` is a random generator object that `capture_generator` can copy."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)  # has no state: it asks the operating system
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def capture_generator(generator: Any) -> Any:
    """Copy the state of a `torch.Generator`, `random.Random`, numpy `Generator` or `RandomState`."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return _from_python(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return _encode(generator.bit_generator.state)
    return _encode(generator.get_state(legacy=False))


def restore_generator(generator: Any, state: Any) -> None:
    """Put `generator` back to a state that `capture_generator` took from one of the same kind."""
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(state.cpu())
        elif isinstance(generator, random.Random):
            generator.setstate(_to_python(state))
        elif hasattr(generator, "bit_generator"):
            generator.bit_generator.state = _decode(state)
        else:
            generator.set_state(_decode(state))
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"the saved random state does not fit a {type(generator).__name__}: {error}; resume with the "
            "kind of generator that the run was started with"
        ) from error


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same, tensors compared by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def _from_python(state: tuple[Any, ...]) -> State:
    version, words, gauss = state
    # 624 words of the Mersenne Twister and the place in them
    return {"version": version, "words": _tensor_of(words), "gauss": gauss}


def _to_python(state: State) -> tuple[Any, ...]:
    return state["version"], tuple(state["words"].tolist()), state["gauss"]


def _tensor_of(words: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(array.array("q", words), dtype=torch.int64).clone()


def _encode(value: Any) -> Any:
    """numpy's nested dict of a generator's state; an array becomes `{"dtype", "values"}`."""
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if hasattr(value, "dtype") and value.ndim > 0:
        # the same 64 bits as a signed integer: uint64 tensors do not load everywhere
        return {"dtype": str(value.dtype), "values": torch.from_numpy(value.astype("uint64").view("int64"))}
    return value.item() if hasattr(value, "item") else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "values"}:
            return value["values"].numpy().view("uint64").astype(value["dtype"])
        return {key: _decode(item) for key, item in value.items()}
    return value


def _restore_numpy(state: State) -> None:
    try:
        import numpy
    except ImportError:
        warnings.warn("the checkpoint holds numpy's random state, and numpy is not installed here", stacklevel=3)
        return
    numpy.random.set_state(_decode(state))


def _restore_cuda(states: list[torch.Tensor]) -> None:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here < len(states):
        warnings.warn(
            f"the checkpoint holds the random states of {len(states)} CUDA device(s), and here are {here}: "
            "random numbers drawn on a missing device do not repeat",
            stacklevel=3,
        )
    for index in range(min(here, len(states))):
        torch.cuda.set_rng_state(states[index].cpu(), index)
