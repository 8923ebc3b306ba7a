"""The base class, the lazy package, and callbacks made of functions."""

from __future__ import annotations

import pytest

import lit_fast.callbacks as callbacks
from lit_fast.callbacks import Callback, LambdaCallback
from lit_fast.callbacks.callback import HOOK_NAMES
from lit_fast.errors import MisconfigurationException
from lit_fast.hooks import HOOKS

# Lightning 2.6: the methods of its Callback
HOOKS_OF_LIGHTNING = set(
    """setup teardown on_fit_start on_fit_end on_sanity_check_start on_sanity_check_end on_exception
    on_train_start on_train_end on_validation_start on_validation_end
    on_test_start on_test_end on_predict_start on_predict_end
    on_train_epoch_start on_train_epoch_end on_validation_epoch_start on_validation_epoch_end
    on_test_epoch_start on_test_epoch_end on_predict_epoch_start on_predict_epoch_end
    on_train_batch_start on_train_batch_end on_validation_batch_start on_validation_batch_end
    on_test_batch_start on_test_batch_end on_predict_batch_start on_predict_batch_end
    on_before_backward on_after_backward on_before_optimizer_step on_before_zero_grad
    state_dict load_state_dict on_save_checkpoint on_load_checkpoint""".split()
)


def test_the_hooks_are_lightnings() -> None:
    assert set(HOOK_NAMES) == HOOKS_OF_LIGHTNING
    missing = {name for name, hook in HOOKS.items() if "c" in hook.owners} - set(HOOK_NAMES)
    assert not missing, f"rows of hooks.py that Callback does not have: {missing}"


def test_the_package_is_lazy_complete_and_sorted() -> None:
    assert callbacks.__all__ == sorted(callbacks.__all__) == sorted(callbacks._HOME)
    for name in callbacks.__all__:
        assert issubclass(getattr(callbacks, name), Callback)
    assert set(callbacks.__all__) <= set(dir(callbacks))
    with pytest.raises(AttributeError, match="Nothing"):
        _ = callbacks.Nothing


def test_live_hooks_are_those_that_class_or_instance_override() -> None:
    class Mine(Callback):
        def on_train_start(self, trainer: object, pl_module: object) -> None:
            pass

    class Derived(Mine):
        def on_fit_end(self, trainer: object, pl_module: object) -> None:
            pass

    assert Callback().live_hooks() == set()
    assert Mine().live_hooks() == {"on_train_start"}
    assert Derived().live_hooks(object()) == {"on_train_start", "on_fit_end"}
    patched = Mine()
    patched.on_test_end = lambda trainer, pl_module: None  # type: ignore[method-assign]
    assert patched.live_hooks() == {"on_train_start", "on_test_end"}


def test_reading_gradients_is_assumed_unless_a_class_says_otherwise() -> None:
    class Blind(Callback):
        reads_gradients = False

    class Unknown(Blind):
        pass

    assert (Callback.reads_gradients, Blind.reads_gradients, Unknown.reads_gradients) == (True, False, True)


def test_state_keys() -> None:
    class Mine(Callback):
        @property
        def state_key(self) -> str:
            return self._generate_state_key(what="loss", n=2)

    assert Mine().state_key.endswith("Mine{'what': 'loss', 'n': 2}")
    assert Callback().state_key == "Callback"


def test_lambda_callback_calls_what_it_was_given() -> None:
    seen = []
    callback = LambdaCallback(on_train_epoch_end=lambda trainer, module: seen.append((trainer, module)), setup=None)
    callback.on_train_epoch_end(1, 2)
    callback.on_train_end(1, 2)
    assert seen == [(1, 2)] and callback.live_hooks() == {"on_train_epoch_end"}
    with pytest.raises(MisconfigurationException, match=r"on_epoch.*on_train_epoch_end"):
        LambdaCallback(on_epoch=print)
