"""`EngineOptimizer`: an optimizer whose steps somebody else takes, as schedulers, callbacks and the Trainer see it."""

from __future__ import annotations

import pytest
import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.optim import adopt
from lit_fast.optim.closure import calls_closure_itself
from lit_fast.optim.engine import EngineOptimizer
from lit_fast.optim.lightning_optimizer import LightningOptimizer


def test_it_steps_by_the_engine_and_shares_the_rest() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    own = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(own, 0.1)
    called: list[str] = []
    engine = EngineOptimizer(own, lambda: called.append("step"), lambda: called.append("zero_grad"))
    assert engine.param_groups is own.param_groups and engine.state is own.state and engine.defaults is own.defaults
    assert engine.step(lambda: called.append("closure") or 7) == 7 and engine.step() is None
    engine.zero_grad()
    assert called == ["closure", "step", "step", "zero_grad"] and torch.equal(weight, torch.ones(3))
    own.step()
    schedule.step()
    assert engine.param_groups[0]["lr"] == pytest.approx(0.05) and engine.state_dict() == own.state_dict()
    engine.load_state_dict({**own.state_dict(), "param_groups": [{**own.state_dict()["param_groups"][0], "lr": 2.0}]})
    assert own.param_groups[0]["lr"] == 2.0
    with pytest.raises(MisconfigurationException, match=r"SGD.add_param_group: an engine .* takes the steps"):
        engine.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def test_nothing_of_ours_takes_its_step() -> None:
    own = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    engine = EngineOptimizer(own, lambda: None, lambda: None)
    adopted = adopt(engine)
    assert not adopted.compiled and adopted.reason.endswith("because EngineOptimizer has no compiled kernel")
    assert not calls_closure_itself(engine)  # forward and backward run before the engine's step, as before ours
    assert isinstance(LightningOptimizer(engine), EngineOptimizer)
