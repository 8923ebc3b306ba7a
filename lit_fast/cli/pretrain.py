"""`lit-fast pretrain`: train a language model on text, from files to a sample, in one command.

    lit-fast pretrain                                    # the standard library's source, preset by device
    lit-fast pretrain --data my_texts/ --preset gpt2-124m --trainer.max_steps 500
    lit-fast pretrain --config my.yaml --model.num_layers 6
    lit-fast pretrain --resume                           # after Ctrl-C or a crash, or to go further

Settings come, each over the one before, from the preset's YAML file (`lit_fast/cli/presets/`), with
`--resume` from the run's own `config.yaml`, from `--config`, and from the command line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_fast.errors import LitFastError, MisconfigurationException

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from lit_fast.cli.pretrain_monitor import PretrainMonitor
    from lit_fast.data.tokens import TokenData
    from lit_fast.models.language_model import LanguageModel
    from lit_fast.trainer import Trainer

PRESETS = Path(__file__).parent / "presets"
# What the run itself gives the Trainer.
OWN_TRAINER_OPTIONS = {"callbacks", "logger", "profiler", "default_root_dir", "plugins"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 for input that cannot be used, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(parse(argv), argv)
    except LitFastError as error:
        print(f"lit-fast pretrain: {error}", file=sys.stderr)
        return 2


def presets() -> list[str]:
    """Names of the presets: the YAML files beside this one."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def build_parser() -> ArgumentParser:
    """Every setting with its type; jsonargparse checks YAML and command line against it."""
    from jsonargparse import ArgumentParser

    from lit_fast.models import GPT, LanguageModel, Llama  # noqa: F401 (imported, they can be named without their path)
    from lit_fast.trainer import Trainer

    parser = ArgumentParser(prog="lit-fast pretrain", description="Pretrain a language model on text.")
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_argument("--preset", type=str, help=f"One of {', '.join(presets())}; tiny on a CPU, else gpt2-124m.")
    parser.add_argument(
        "--data", type=str, nargs="+", help="Text files or folders; default: Python's standard library."
    )
    parser.add_argument("--out", type=str | None, help="Folder for everything the run writes; default: runs/<preset>.")
    parser.add_argument("--resume", action="store_true", help="Go on from the newest checkpoint in --out.")
    parser.add_argument("--seed", type=int, default=1234, help="Seed of every random number.")
    parser.add_argument("--vocab_size", type=int, default=4096, help="Most tokens the byte-level BPE may learn.")
    parser.add_argument("--val_fraction", type=float, default=0.02, help="Share of the text that is held out.")
    parser.add_argument("--cache_dir", type=str | None, help="Default: LIT_FAST_CACHE, or ~/.cache/lit_fast.")
    parser.add_argument("--batch_size", type=int, default=8, help="Sequences a micro-batch.")
    parser.add_argument("--val_batch_size", type=int | None, help="Sequences a validation batch; default: batch_size.")
    parser.add_argument("--num_workers", type=int, default=0, help="Processes that load data.")
    parser.add_argument("--checkpoint_every", type=int, default=500, help="Optimizer steps between checkpoints.")
    parser.add_argument("--sample.prompt", type=str, default="", help="What the sample starts with.")
    parser.add_argument("--sample.tokens", type=int, default=200, help="Most tokens of the sample.")
    parser.add_argument("--sample.temperature", type=float, default=0.8, help="0 takes the likeliest token.")
    parser.add_argument("--sample.top_k", type=int | None, default=50, help="Tokens to sample from.")
    # The vocabulary decides the one, the Trainer's limits the other.
    parser.add_subclass_arguments(LanguageModel, "model", skip={"vocab_size", "total_steps"}, required=True)
    parser.add_class_arguments(Trainer, "trainer", skip=OWN_TRAINER_OPTIONS)
    return parser


def parse(argv: list[str]) -> Namespace:
    """The settings of a run from `argv` and the files that it names.

    Raises:
        MisconfigurationException: an unknown preset, or nothing to resume.
        SystemExit: a setting that is unknown or of the wrong type (jsonargparse prints which).
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--config", "--out"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args(argv)

    chosen = _from_yaml(Path(early.config)) if early.config and Path(early.config).is_file() else {}
    out, preset = early.out or chosen.get("out"), early.preset or chosen.get("preset")
    layers: list[Path] = []
    if early.resume or chosen.get("resume"):
        out = out or f"runs/{preset or default_preset()}"
        saved = Path(out) / "config.yaml"
        if not saved.is_file():
            raise MisconfigurationException(f"--resume: there is no run in {out} ({saved} is missing). Give its --out.")
        preset = preset or _from_yaml(saved).get("preset")
        layers.append(saved)
    preset = preset or default_preset()
    if preset not in presets():
        raise MisconfigurationException(
            f"--preset {preset}: there is no such preset; there are {', '.join(presets())}."
        )
    layers.insert(0, PRESETS / f"{preset}.yaml")
    settings = build_parser().parse_args([*(f"--config={layer}" for layer in layers), *argv])
    settings.preset, settings.out = preset, out or f"runs/{preset}"
    return settings


def default_preset() -> str:
    """`tiny` where there is only a CPU, GPT-2 with 124M parameters on a GPU."""
    import torch

    return "gpt2-124m" if torch.cuda.is_available() else "tiny"


def run(settings: Namespace, argv: list[str]) -> int:
    """Tokenize, train, report."""
    from rich.console import Console

    from lit_fast import seed_everything
    from lit_fast.data.tokens import prepare_tokens

    console = Console(highlight=False)
    out = Path(settings.out)
    checkpoints = out / "checkpoints"
    seed_everything(settings.seed, verbose=False)
    started = time.perf_counter()
    data = prepare_tokens(
        settings.data,
        vocab_size=settings.vocab_size,
        val_fraction=settings.val_fraction,
        cache_dir=settings.cache_dir,
    )
    _describe_data(console, settings, data, time.perf_counter() - started)

    trainer_options = settings.trainer.as_dict()
    model = build_model(settings, data, trainer_options)
    block_size = model.block_size
    train = data.dataloader("train", block_size, settings.batch_size, settings.num_workers)
    val = data.dataloader("val", block_size, settings.val_batch_size or settings.batch_size)
    _open_folder(settings, out, console)
    trainer, monitor = build_trainer(settings, model, trainer_options, checkpoints)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{type(model).__name__}, {parameters:,} parameters, {block_size} tokens of context, "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOP a token; writing to {out}"
    )
    try:
        trainer.fit(model, train, val, ckpt_path="last" if settings.resume else None)
    except SystemExit as end:
        # The Trainer ends a script at Ctrl-C, after it has saved; SIGTERM goes on to end the process.
        if not isinstance(end.__cause__, KeyboardInterrupt):
            raise
        return _interrupted(console, monitor, argv)
    report(console, settings, data, model, trainer, monitor, val)
    return 0


def build_model(settings: Namespace, data: TokenData, trainer_options: dict[str, Any]) -> LanguageModel:
    """The model that the settings name; its vocabulary is padded to a multiple of 64 (fast matrix shapes)."""
    module, _, name = settings.model.class_path.rpartition(".")
    model_class = getattr(import_module(module), name)
    options = dict(settings.model.init_args.as_dict())
    steps = trainer_options["max_steps"]
    if steps == -1:
        epochs = trainer_options["max_epochs"]
        if not epochs or epochs < 0:
            raise MisconfigurationException("Nothing ends this run: give --trainer.max_steps or --trainer.max_epochs.")
        windows = len(data.dataset("train", options["block_size"])) // settings.batch_size
        steps = epochs * math.ceil(windows / trainer_options["accumulate_grad_batches"])
    rows = math.ceil(settings.vocab_size / 64) * 64
    model: LanguageModel = model_class(vocab_size=rows, total_steps=steps, **options)
    return model


def build_trainer(
    settings: Namespace, model: LanguageModel, options: dict[str, Any], checkpoints: Path
) -> tuple[Trainer, PretrainMonitor]:
    """A Trainer with checkpoints, a CSV log, the step profiler and the monitor."""
    from lit_fast.callbacks import ModelCheckpoint
    from lit_fast.cli.pretrain_monitor import PretrainMonitor
    from lit_fast.loggers import CSVLogger
    from lit_fast.profiler.step import StepProfiler
    from lit_fast.profiler.throughput import compute_dtype, get_available_flops
    from lit_fast.trainer import Trainer

    monitor = PretrainMonitor(
        checkpoint=checkpoints / "last.ckpt",
        every=options["log_every_n_steps"] or 50,
        flops_per_token=model.flops_per_token(),
    )
    # One file, replaced atomically; the monitor writes it at the last step, the Trainer at Ctrl-C.
    saver = ModelCheckpoint(
        dirpath=checkpoints,
        every_n_train_steps=settings.checkpoint_every,
        save_top_k=0,
        save_last=True,
        enable_version_counter=False,
    )
    trainer = Trainer(
        default_root_dir=str(checkpoints.parent),
        logger=CSVLogger(save_dir=str(checkpoints.parent), name="logs"),
        callbacks=[monitor, saver],
        profiler=StepProfiler(show=False),  # `report` shows it
        **options,
    )
    monitor.peak_flops = get_available_flops(trainer.config.device, compute_dtype(trainer.precision))
    return trainer, monitor


def report(
    console: Any,
    settings: Namespace,
    data: TokenData,
    model: LanguageModel,
    trainer: Trainer,
    monitor: PretrainMonitor,
    val: Any,
) -> None:
    """Print what the run came to: losses against the bigram's, a sample, files, and where the time went."""
    from lit_fast.cli.pretrain_monitor import draw_loss_curve, phase_table
    from lit_fast.models.bigram import Bigram, bits_per_byte

    phases, wall = trainer.profiler.phases(), trainer.profiler.wall
    if not monitor.val_curve or monitor.val_curve[-1][0] != trainer.global_step:
        results = trainer.validate(model, val, verbose=False)
        monitor.val_curve.append((trainer.global_step, results[0]["val_loss"]))
    val_loss = monitor.val_curve[-1][1]

    # The bigram is scored on exactly the tokens that validation predicted.
    windows = min(len(val.dataset), int(sum(trainer.num_val_batches)) * val.batch_size)
    tokens = data.tokens("val")[: windows * model.block_size + 1]
    num_bytes = int(data.token_bytes()[tokens[1:]].sum())
    bigram_loss = Bigram(data.tokens("train"), data.vocab_size).loss(tokens[:-1], tokens[1:])
    bits, bigram_bits = (bits_per_byte(loss, len(tokens) - 1, num_bytes) for loss in (val_loss, bigram_loss))

    curve = Path(settings.out) / "loss.png"
    draw_loss_curve(curve, monitor.train_curve, monitor.val_curve, bigram_loss)
    if trainer.global_step != trainer.max_steps:
        # The run ended with an epoch, not at max_steps, where the monitor has saved.
        trainer.save_checkpoint(monitor.checkpoint)

    console.rule("Sample")
    console.print(sample(settings, data, model), markup=False)
    console.rule("Where the time went")
    console.print(phase_table(phases, wall, trainer.global_step - monitor.first_step))
    console.rule("Result")
    training = wall - phases.get("validation", 0.0)
    console.print(
        f"initial loss     {float(monitor.first_loss or math.nan):.4f}  (ln of {model.vocab_size} tokens: "
        f"{math.log(model.vocab_size):.4f})\n"
        f"validation loss  {val_loss:.4f} nats a token "
        f"({len(tokens) - 1:,} held-out tokens, {num_bytes:,} bytes)\n"
        f"bits per byte    {bits:.4f}  (Kneser-Ney bigram over the same tokens: {bigram_bits:.4f})\n"
        f"speed            {monitor.tokens / training:,.0f} tokens/s "
        f"({monitor.tokens:,} tokens, validation left out)\n"
        f"checkpoint       {monitor.checkpoint}\n"
        f"loss curve       {curve}",
        soft_wrap=True,
    )


def sample(settings: Namespace, data: TokenData, model: LanguageModel) -> str:
    """Text that the model wrote after the prompt (after the start of a document where there is none)."""
    import torch

    prompt = [data.end_of_text, *data.tokenizer.encode(settings.sample.prompt).ids]
    tokens = torch.tensor([prompt], device=model.device)
    options = settings.sample
    written = model.generate(
        tokens,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        stop_token=data.end_of_text,
    )
    # Rows beyond the vocabulary only pad the matrix; nothing trains them up.
    ids = [token for token in written[0].tolist() if token < data.vocab_size]
    text: str = data.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _describe_data(console: Any, settings: Namespace, data: TokenData, seconds: float) -> None:
    train, val = data.header["train"], data.header["val"]
    source = "Python's standard library" if settings.data is None else ", ".join(settings.data)
    console.print(
        f"{source}: {train['tokens']:,} training tokens from {train['documents']:,} files, "
        f"{val['tokens']:,} held out from {val['documents']:,}; vocabulary {data.vocab_size:,}; "
        f"{seconds:.1f} s; {data.folder}",
        soft_wrap=True,
    )


def _open_folder(settings: Namespace, out: Path, console: Any) -> None:
    """Make the run's folder and write its settings; an earlier run in it is moved aside, not overwritten."""
    import yaml

    if (out / "config.yaml").exists() and not settings.resume:
        number = 1
        while (moved := out.with_name(f"{out.name}-{number}")).exists():
            number += 1
        out.rename(moved)
        console.print(f"{out} held an earlier run: moved to {moved} (--resume goes on with a run instead).")
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in settings.as_dict().items() if name not in ("config", "resume")}
    # Through JSON, tuples become lists, which YAML can write plainly.
    plain = yaml.safe_dump(json.loads(json.dumps(kept)), sort_keys=False)
    (out / "config.yaml").write_text(plain, encoding="utf-8")


def _interrupted(console: Any, monitor: PretrainMonitor, argv: list[str]) -> int:
    again = argv if "--resume" in argv else [*argv, "--resume"]
    saved = monitor.checkpoint if monitor.checkpoint.exists() else None
    if saved is None:
        console.print("Interrupted before the first step: there is nothing to resume.")
    else:
        console.print(f"Interrupted; saved {saved}\nGo on with: lit-fast pretrain {' '.join(again)}", soft_wrap=True)
    return 130


def _from_yaml(path: Path) -> dict[str, Any]:
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
