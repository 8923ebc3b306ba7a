"""Every set of kernels for gradients in flat buckets; a fixture that tests import by its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lit_fast import flat, ops


@pytest.fixture(params=[*ops.build_info()["cpu_targets_supported"], "torch"], name="target")
def each_target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each set of kernels, and what stands in for them on a GPU that has none."""
    before = ops.build_info()["cpu_target"]
    if request.param == "torch":
        monkeypatch.setattr(flat, "_lacks_kernels", lambda _: True)
    else:
        ops.use_cpu_target(request.param)
    yield request.param
    ops.use_cpu_target(before)
