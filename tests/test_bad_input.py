"""One mistake a program: which error or warning answers it, and what that must mention.

`python tests/bad_input_programs.py lightning` shows what Lightning answers to the same programs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import bad_input_calls  # noqa: F401
import bad_input_modules  # noqa: F401
import pytest
import torch
from bad_input_programs import PROGRAMS, answer

import lit_fast.pytorch
from lit_fast import errors

NO_ERROR = ""

# program: (class of the error, what its message mentions), or (NO_ERROR, "").
ERRORS: dict[str, tuple[str, str]] = {
    "no_training_step": ("MisconfigurationException", r"Model defines no training_step\(self, batch, batch_idx\)"),
    "no_configure_optimizers": ("MisconfigurationException", r"no configure_optimizers\(self\).*torch.optim.AdamW"),
    "no_training_data": ("MisconfigurationException", r"Model has no train_dataloader.*fit\(model, train_dataloaders="),
    "training_data_is_no_iterable": ("DataTypeError", "training data is int.*DataLoader"),
    "validation_data_is_no_iterable": ("DataTypeError", "validation data is int.*DataLoader"),
    "train_dataloader_returns_nothing": ("DataTypeError", "training data is NoneType"),
    "a_module_of_torch": ("MisconfigurationTypeError", "Linear.*LightningModule.*lit-fast run"),
    "the_class_of_a_module": ("MisconfigurationTypeError", "type.*LightningModule"),
    "a_datamodule_and_loaders": ("MisconfigurationException", "datamodule and dataloaders"),
    "no_super_init": ("AttributeError", "Model"),
    "validate_without_a_step": ("MisconfigurationException", "validation_step"),
    "test_without_a_step": ("MisconfigurationException", "test_step"),
    "test_without_data": ("MisconfigurationException", r"Model has no test_dataloader.*test\(model, dataloaders="),
    "validate_without_a_model": ("MisconfigurationTypeError", r"trainer.validate\(model\)"),
    "predict_without_a_forward": ("MisconfigurationException", "predict_step.*forward"),
    "predict_step_is_none": ("MisconfigurationException", "predict_step.*forward"),
    "save_without_a_model": ("MisconfigurationException", "save_checkpoint needs a model"),
    "module_without_a_trainer": ("RuntimeError", "Model is not attached to a Trainer"),
    "best_before_any_checkpoint": ("MisconfigurationException", "best.*ModelCheckpoint"),
    "a_checkpoint_that_is_not_there": ("CheckpointNotFoundError", "nowhere.ckpt"),
    "training_epoch_end": ("RemovedHookError", r"training_epoch_end.*on_train_epoch_end\(self\)"),
    "validation_epoch_end": ("RemovedHookError", r"validation_epoch_end.*on_validation_epoch_end\(self\)"),
    "test_epoch_end": ("RemovedHookError", r"test_epoch_end.*on_test_epoch_end\(self\)"),
    "both_configure_models": ("MisconfigurationException", "configure_model and configure_sharded_model"),
    "training_step_of_no_arguments": ("TypeError", "takes 1 positional argument but 2"),
    "training_step_of_three_arguments": ("MisconfigurationException", "optimizer_idx.*automatic_optimization = False"),
    "training_step_returns_text": ("MisconfigurationException", "training_step returned str.*'loss'.*None"),
    "training_step_returns_a_number": ("MisconfigurationException", "training_step returned float"),
    "training_step_returns_a_dict_without_loss": ("MisconfigurationException", r"\['a'\].*'loss'"),
    "training_step_returns_a_vector": ("MisconfigurationException", r"shape \(2, 2\).*loss.mean\(\)"),
    "training_step_returns_no_graph": ("RuntimeError", "does not require grad"),
    "manual_step_returns_text": ("MisconfigurationException", "training_step returned str.*manual optimization"),
    "on_train_batch_start_of_one_argument": ("TypeError", "takes 2 positional arguments but 3"),
    "on_train_batch_end_with_an_old_argument": ("TypeError", "'dataloader_idx'"),
    "callback_hook_with_an_old_argument": ("TypeError", "'dataloader_idx'"),
    "optimizer_step_of_old": ("TypeError", "missing 3 required positional arguments"),
    "backward_of_old": ("TypeError", "'optimizer' and 'optimizer_idx'"),
    "setup_without_a_stage": ("TypeError", "takes 1 positional argument but 2"),
    "optimizer_step_without_its_closure": ("MisconfigurationException", r"optimizer_step.*closure=optimizer_closure"),
    "validation_step_of_no_arguments": ("TypeError", "takes 1 positional argument but 2"),
    "several_loaders_and_no_dataloader_idx": ("MisconfigurationException", "validation_step.*dataloader_idx=0"),
    "dataloader_idx_with_one_loader": ("MisconfigurationException", "validation_step.*dataloader_idx=0"),
    "a_property_where_a_hook_is": ("TypeError", "not callable"),
    "configure_optimizers_returns_text": ("MisconfigurationException", r"returned str.*\[optimizers\], \[schedulers\]"),
    "configure_optimizers_returns_a_dict_without_optimizer": ("MisconfigurationException", r"\['lr'\].*'optimizer'"),
    "two_optimizers_under_automatic_optimization": ("MisconfigurationException", "automatic_optimization = False"),
    "a_scheduler_dict_without_a_scheduler": ("MisconfigurationException", r"\['interval'\].*'scheduler'"),
    "a_scheduler_with_an_unknown_interval": ("MisconfigurationException", "'batch'.*'step' and 'epoch'"),
    "plateau_without_a_monitor": ("MisconfigurationException", "ReduceLROnPlateau.*'monitor'"),
    "plateau_whose_monitor_is_not_logged": ("MisconfigurationException", "ReduceLROnPlateau.*'nothing'.*'strict'"),
    "a_scheduler_of_another_optimizer": ("MisconfigurationException", "scheduler of an optimizer"),
    "manual_with_clipping": ("MisconfigurationException", "gradient_clip_val=1.0.*clip_gradients"),
    "manual_with_accumulation": ("MisconfigurationException", "accumulate_grad_batches=2.*manual"),
    "manual_backward_under_automatic_optimization": ("MisconfigurationException", "automatic_optimization = False"),
    "clipping_by_an_unknown_algorithm": ("MisconfigurationException", "'l2'.*'norm' and 'value'"),
    "log_in_configure_optimizers": ("MisconfigurationException", r"self.log\('a', ...\)"),
    "log_in_on_fit_start": ("MisconfigurationException", "on_fit_start.*self.logger.experiment"),
    "log_each_step_in_an_epoch_hook": ("MisconfigurationException", "on_step=True.*on_train_epoch_end"),
    "log_a_vector": ("ValueError", r"shape \(3,\).*value.mean\(\)"),
    "log_text": ("ValueError", "given str"),
    "log_a_dict": ("ValueError", "given dict.*log_dict"),
    "log_by_an_unknown_reduction": ("MisconfigurationException", "'median'.*max"),
    "log_a_name_that_is_no_text": ("TypeError", "int"),
    "log_nothing_at_all": ("MisconfigurationException", "on_step=False, on_epoch=False"),
    "log_with_other_options_the_second_time": ("MisconfigurationException", "twice in `training_step`.*on_epoch=False"),
    "early_stopping_on_what_is_not_logged": ("MissingMetricError", "EarlyStopping.*'nothing'.*strict=False"),
    "checkpoint_of_what_is_not_logged": ("MisconfigurationException", "ModelCheckpoint.*'nothing'.*self.log"),
    "a_callback_that_is_none": ("MisconfigurationException", "builtin_function_or_method.*derives from"),
    "the_class_of_a_callback": ("MisconfigurationException", "the class Callback, not an instance"),
    "two_callbacks_of_one_state_key": ("MisconfigurationException", "state_key 'Own'"),
    "two_progress_bars": ("MisconfigurationException", "RichProgressBar, RichProgressBar"),
    "a_progress_bar_that_is_switched_off": ("MisconfigurationException", "enable_progress_bar=False.*RichProgressBar"),
    "a_checkpoint_callback_that_is_switched_off": ("MisconfigurationException", "enable_checkpointing=False"),
    "configure_callbacks_returns_text": ("MisconfigurationException", "configure_callbacks returned str"),
    "a_generator_over_two_epochs": ("DataError", "generator.*no batch in epoch 1.*max_epochs=1"),
    "too_small_a_fraction": ("MisconfigurationException", "limit_train_batches=0.1.*0.333"),
    "a_fraction_of_data_without_length": ("MisconfigurationException", "limit_train_batches=0.5.*no length"),
    "validation_rarer_than_an_epoch": ("MisconfigurationException", "val_check_interval=10.*never validate"),
    "hyperparameters_of_module_and_datamodule_differ": ("MisconfigurationException", "'rate'.*logger=False"),
    "option_unknown": ("MisconfigurationTypeError", "'max_epoch'; did you mean max_epochs"),
    "option_devices_zero": ("MisconfigurationException", "devices=0.*no device"),
    "option_accelerator_unknown": ("MisconfigurationException", "'abacus'.*'auto', 'cpu'"),
    "option_strategy_unknown": ("MisconfigurationException", "'telepathy'.*unknown.*'auto'"),
    "option_precision_unknown": ("MisconfigurationException", "'int8'.*'32-true'"),
    "option_clip_value_is_text": ("MisconfigurationTypeError", "gradient_clip_val='1'"),
    "option_clip_algorithm_unknown": ("MisconfigurationException", "'l2'.*'norm' and 'value'"),
    "option_limit_out_of_range": ("MisconfigurationException", "limit_train_batches=1.5"),
    "option_limit_negative": ("MisconfigurationException", "limit_val_batches=-1"),
    "option_max_steps_below_minus_one": ("MisconfigurationException", "max_steps=-2"),
    "option_max_epochs_below_minus_one": ("MisconfigurationException", "max_epochs=-2"),
    "option_fast_dev_run_negative": ("MisconfigurationException", "fast_dev_run=-1"),
    "option_profiler_unknown": ("MisconfigurationException", "profiler='stopwatch'.*'step'"),
    "option_reload_negative": ("MisconfigurationException", "reload_dataloaders_every_n_epochs=-1"),
    "option_check_val_is_a_fraction": ("MisconfigurationException", "check_val_every_n_epoch=0.5"),
    "option_check_val_none_with_a_fraction": ("MisconfigurationException", "val_check_interval must be an int"),
    "option_max_time_unreadable": ("MisconfigurationException", "max_time='soon'.*DD:HH:MM:SS"),
    "option_barebones_with_a_logger": ("MisconfigurationException", "barebones=True, logger=True"),
    "option_num_nodes_zero": ("MisconfigurationException", "num_nodes=0"),
    "option_plugin_unknown": ("MisconfigurationException", "plugins=.*int"),
}  # fmt: skip

# program: (class of the warning, what its message mentions); the program itself runs.
WARNINGS: dict[str, tuple[str, str]] = {
    "configure_sharded_model": ("LightningDeprecationWarning", "configure_sharded_model.*configure_model"),
    "training_step_returns_none": ("UserWarning", "training_step returned None"),
    "configure_optimizers_returns_none": ("UserWarning", "no optimizer"),
    "a_scheduler_dict_with_an_unknown_key": ("RuntimeWarning", r"\['every'\].*frequency, interval"),
    "log_without_a_trainer": ("UserWarning", "not attached to a Trainer"),
    "a_loader_of_no_batches": ("UserWarning", "training data is empty.*drop_last"),
    "validation_data_and_no_step": ("UserWarning", r"no validation_step\(self, batch, batch_idx\)"),
    "a_validation_step_and_no_data": ("PossibleUserWarning", "no validation data.*val_dataloaders"),
    "logging_rarer_than_an_epoch": ("PossibleUserWarning", "3 batches.*log_every_n_steps=50"),
    "a_module_in_evaluation_mode": ("PossibleUserWarning", r"'layer'.*model.train\(\)"),
    "no_limit_on_epochs": ("PossibleUserWarning", "1000 epochs.*max_epochs=-1"),
    "transfer_hooks_in_module_and_datamodule": ("UserWarning", "Model and Data.*on_after_batch_transfer"),
    "shuffled_validation": ("PossibleUserWarning", "validation data is shuffled.*shuffle=False"),
    "option_deterministic_and_benchmark": ("UserWarning", "deterministic=True, benchmark=True"),
}

SILENT = {"max_epochs_reached_already"}


@pytest.fixture(autouse=True)
def torch_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_every_program_has_its_answer() -> None:
    assert set(PROGRAMS) == {*ERRORS, *WARNINGS, *SILENT}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    kind, mentions = ERRORS[name]
    error, text, _ = answer(PROGRAMS[name], lit_fast.pytorch)
    assert error == kind and re.search(mentions, text, re.S), f"{error}: {text}"


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(name: str) -> None:
    kind, mentions = WARNINGS[name]
    error, text, said = answer(PROGRAMS[name], lit_fast.pytorch)
    assert error == NO_ERROR, text
    assert any(category == kind and re.search(mentions, message, re.S) for category, message in said), said


@pytest.mark.parametrize("name", SILENT)
def test_nothing_to_say(name: str) -> None:
    assert answer(PROGRAMS[name], lit_fast.pytorch) == (NO_ERROR, "", [])


def test_errors_are_of_the_kinds_that_programs_for_lightning_catch() -> None:
    assert issubclass(errors.MisconfigurationTypeError, (errors.MisconfigurationException, TypeError))
    assert issubclass(errors.MisconfigurationTypeError, TypeError)
    assert issubclass(errors.RemovedHookError, NotImplementedError)
    assert issubclass(errors.DataTypeError, TypeError)
    assert issubclass(errors.LightningDeprecationWarning, DeprecationWarning)
