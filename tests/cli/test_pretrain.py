"""`lit-fast pretrain` from text to report, resumed, interrupted, and given what it cannot use."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
from new_process import NewProcess

from lit_fast.cli.pretrain import main, parse, presets
from lit_fast.cli.pretrain_monitor import phase_rows
from lit_fast.errors import MisconfigurationException
from lit_fast.models import GPT, LanguageModel, Llama

SMALL = [
    "--preset=tiny",
    "--vocab_size=300",
    "--val_fraction=0.1",
    "--batch_size=4",
    "--checkpoint_every=4",
    "--model.block_size=16",
    "--model.num_layers=1",
    "--model.num_heads=2",
    "--model.embedding_dim=16",
    "--sample.tokens=8",
    "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def text(tmp_path, monkeypatch, request):
    """A folder of text, with the cache and the working directory in a place of the test's own."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(12):
        lines = (f"def function_{index}_{line}(value):\n    return value * {line} + {index}\n" for line in range(40))
        (folder / f"module{index}.py").write_text("".join(lines))
    return folder


def checkpoint(path):
    return torch.load(path, weights_only=True)


def test_trains_and_reports(text, tmp_path, capsys):
    assert main([*SMALL, f"--data={text}", "--trainer.max_steps=8", "--out=run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "initial loss",
        "validation loss",
        "bits per byte",
        "Kneser-Ney bigram",
        "tokens/s",
        "Sample",
    ):
        assert part in said
    assert "last.ckpt" in said
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 8
    monitor = saved["callbacks"]["PretrainMonitor"]
    assert [step for step, _ in monitor["val_curve"]] == [4]  # saved at the last step, before its validation
    rows = re.findall(r"│ ([a-z][^│]*?) +│ +(-?[\d.]+) │", said)
    assert [name for name, _ in rows][:5] == ["setup", "data", "forward", "backward", "optimizer"]
    assert rows[-1][0] == "total (wall)"
    # Every number is rounded to a thousandth of a second.
    assert sum(float(s) for _, s in rows[:-1]) == pytest.approx(float(rows[-1][1]), abs=0.0005 * len(rows))


def test_resumed_run_equals_an_uninterrupted_one(text, tmp_path):
    # A constant learning rate after the warm-up: the schedule does not depend on where a run is to end.
    constant = [*SMALL, f"--data={text}", "--model.warmup_steps=2", "--model.min_learning_rate_ratio=1"]
    assert main([*constant, "--trainer.max_steps=12", "--out=whole"]) == 0
    assert main([*constant, "--trainer.max_steps=6", "--out=parts"]) == 0
    assert main(["--resume", "--trainer.max_steps=12", "--out=parts"]) == 0
    whole, parts = (checkpoint(tmp_path / out / "checkpoints" / "last.ckpt") for out in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 12
    assert all(torch.equal(whole["state_dict"][name], parts["state_dict"][name]) for name in whole["state_dict"])
    curves = [saved["callbacks"]["PretrainMonitor"]["train_curve"] for saved in (whole, parts)]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [1, 2, 4, 6, 8, 10, 12]


def test_resume_goes_on_with_the_settings_of_the_run(text, tmp_path, capsys):
    assert main([*SMALL, f"--data={text}", "--trainer.max_steps=5", "--out=run"]) == 0
    capsys.readouterr()
    assert main(["--resume", "--out=run", "--trainer.max_steps=9"]) == 0
    assert "moved to" not in capsys.readouterr().out
    saved = checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 9
    assert saved["callbacks"]["PretrainMonitor"]["train_curve"][0][0] == 1
    assert not (tmp_path / "run-1").exists()


def test_an_earlier_run_is_moved_aside(text, tmp_path, capsys):
    arguments = [*SMALL, f"--data={text}", "--trainer.max_steps=2", "--out=run"]
    assert main(arguments) == main(arguments) == 0
    assert "moved to run-1" in capsys.readouterr().out
    for name in ("run", "run-1"):
        assert checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_epochs_end_a_run_too(text, tmp_path):
    arguments = ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    assert main([*SMALL, f"--data={text}", *arguments, "--out=run"]) == 0
    assert checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_ctrl_c_saves_and_says_how_to_resume(text, tmp_path):
    arguments = [*SMALL, f"--data={text}", "--trainer.max_steps=1000000", "--out=run"]
    program = "import sys; from lit_fast.cli.pretrain import main; sys.exit(main(sys.argv[1:]))"
    process = NewProcess(program, *arguments)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() and time.monotonic() < until:
            assert process.poll() is None, process.wait().stderr
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    assert process.returncode == 130, process.stderr
    assert re.search(r"Go on with: lit-fast pretrain .*--out=run --resume", process.stdout + process.stderr)
    stopped = checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert stopped >= 4
    assert main(["--resume", "--out=run", f"--trainer.max_steps={stopped + 3}"]) == 0
    assert checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == stopped + 3


def test_yaml_file_and_command_line_each_win_over_the_one_before(text, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "preset: llama-1b\nseed: 7\nbatch_size: 3\nmodel:\n  init_args:\n    num_layers: 2\n"
    )
    settings = parse(["--config=my.yaml", "--batch_size=5", "--trainer.precision=32-true"])
    assert (settings.preset, settings.seed, settings.batch_size) == ("llama-1b", 7, 5)
    assert settings.model.class_path == "lit_fast.models.Llama"
    assert (settings.model.init_args.num_layers, settings.model.init_args.embedding_dim) == (2, 2048)
    assert (settings.trainer.precision, settings.trainer.accumulate_grad_batches) == ("32-true", 4)
    assert settings.out == "runs/llama-1b"


@pytest.mark.parametrize("preset", presets())
def test_every_preset_describes_a_model(preset):
    settings = parse([f"--preset={preset}"])
    model_class = {"lit_fast.models.GPT": GPT, "lit_fast.models.Llama": Llama}[settings.model.class_path]
    with torch.device("meta"):
        model: LanguageModel = model_class(
            vocab_size=-(-settings.vocab_size // 64) * 64,
            total_steps=settings.trainer.max_steps,
            **settings.model.init_args,
        )
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    low, high = {
        "tiny": (0.2, 5),
        "gpt2-124m": (124, 125),
        "gpt2-350m": (350, 360),
        "llama-1b": (1000, 1200),
    }[preset]
    assert low < millions < high
    assert settings.model.init_args.warmup_steps < settings.trainer.max_steps
    assert settings.trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data=nowhere"], "nowhere: there is no such file"),
        (["--preset=giant"], "giant: there is no such preset; there are gpt2-124m"),
        (["--resume", "--out=empty"], "there is no run in empty"),
        (["--trainer.max_steps=-1"], "Nothing ends this run"),
        (["--trainer.gradient_clip_val=-x"], "gradient_clip_val"),
        (["--model.num_heads=3"], "num_heads=3"),
        (["--model.block_size=4096"], "a smaller --batch_size or --model.block_size"),
    ],
)
def test_what_cannot_be_used_is_said_before_any_work(text, tmp_path, capsys, arguments, said):
    given = [] if any(argument.startswith("--data") for argument in arguments) else [f"--data={text}"]
    with pytest.raises(SystemExit, match="2") as ended:
        raise SystemExit(main([*SMALL, *given, *arguments]))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_run_is_our_kind_of_error(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"config\.yaml is missing"):
        parse(["--resume", f"--out={tmp_path}"])


def test_phases_of_one_name_share_a_row_and_the_rest_is_unexplained():
    rows = phase_rows({"hooks": 1.0, "logging": 0.5, "forward": 2.0, "new": 0.25}, wall=4.0)
    assert rows == [("forward", 2.0), ("hooks and logging", 1.5), ("new", 0.25), ("unexplained", 0.25)]
