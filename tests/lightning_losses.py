"""The same programs under Lightning or under lit_fast: every loss and the final weights, to the last bit, as JSON.

    python tests/lightning_losses.py lightning --out tests/goldens/losses_lightning_2_6_6.json
    python tests/lightning_losses.py lit_fast adamw

A record holds the losses as the hexadecimal digits of their bits, one after the other, and the SHA-256 of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import platform
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCHES, STEPS = 25, 200
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def data() -> Any:
    """Images of 8 x 8 in one channel, and a number for each: 25 batches of 8."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCHES * 8, 1, 8, 8, generator=generator)
    dataset = torch.utils.data.TensorDataset(images, images.flatten(1).sum(1).tanh())
    return torch.utils.data.DataLoader(dataset, batch_size=8)


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 16),
        nn.Tanh(),
        nn.Linear(16, 1),
    )


class Cases:
    """Each method is one program: it returns a module and the Trainer's options. `L` is either package."""

    def __init__(self, L: Any) -> None:
        self.L = L

    def module(self, configure: Any, **methods: Any) -> Any:
        def init(self: Any) -> None:
            super(kind, self).__init__()
            self.net, self.losses = network(), []

        def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
            loss = (self.net(batch[0]).squeeze(-1) - batch[1]).square().mean()
            self.losses.append(loss.item())
            self.log("loss", loss)
            return loss

        def configure_optimizers(self: Any) -> Any:
            return configure(self.parameters())

        own = {"__init__": init, "training_step": training_step, "configure_optimizers": configure_optimizers}
        kind = type("Model", (self.L.LightningModule,), {**own, **methods})
        return kind()

    def sgd(self) -> Any:
        return self.module(lambda p: torch.optim.SGD(p, lr=0.05)), {}

    def sgd_nesterov(self) -> Any:
        return self.module(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)), {}

    def adamw(self) -> Any:
        return self.module(lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True)), {}

    def adam(self) -> Any:
        return self.module(lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-2, fused=True)), {}

    def rmsprop(self) -> Any:
        return self.module(lambda p: torch.optim.RMSprop(p, lr=1e-3)), {}

    def lbfgs(self) -> Any:
        return self.module(lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=3, history_size=4)), {}

    def accumulate(self) -> Any:
        return self.module(lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True)), {"accumulate_grad_batches": 5}

    def clip_norm(self) -> Any:
        return self.module(lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True)), {"gradient_clip_val": 0.5}

    def clip_value(self) -> Any:
        options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
        return self.module(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)), options

    def clip_norm_accumulate(self) -> Any:
        options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 5}
        return self.module(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)), options

    def one_cycle(self) -> Any:
        def configure(parameters: Any) -> Any:
            optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        return self.module(configure), {}

    def plateau(self) -> Any:
        def configure(parameters: Any) -> Any:
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            plateau = {"scheduler": scheduler, "monitor": "loss", "interval": "step", "frequency": 5}
            return {"optimizer": optimizer, "lr_scheduler": plateau}

        return self.module(configure), {}

    def double(self) -> Any:
        return self.module(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)), {"precision": "64-true"}

    def float16(self) -> Any:
        """float16 with a scaled loss; the first batches of each epoch overflow at the first scale."""
        plugins = importlib.import_module(
            "lightning.pytorch.plugins" if self.L.__name__.startswith("lightning") else "lit_fast.precision"
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=20)
        plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler)
        return self.module(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)), {"plugins": plugin}

    def gan(self) -> Any:
        """Two optimizers in manual optimization, toggled, one of them stepped every other batch and clipped."""

        def configure_optimizers(self: Any) -> Any:
            first = torch.optim.AdamW(self.net[:4].parameters(), lr=3e-3, fused=True)
            second = torch.optim.SGD(self.net[4:].parameters(), lr=0.02, momentum=0.9)
            return [first, second], [torch.optim.lr_scheduler.StepLR(second, 50, 0.5)]

        def training_step(self: Any, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            for index, optimizer in enumerate((first, second)):
                self.toggle_optimizer(optimizer)
                loss = (self.net(batch[0]).squeeze(-1) - batch[1]).square().mean()
                self.losses.append(loss.item())
                optimizer.zero_grad()
                self.manual_backward(loss)
                if index == 0:
                    self.clip_gradients(optimizer, 0.5, "norm")
                if index == 1 or batch_idx % 2:
                    optimizer.step()
                self.untoggle_optimizer(optimizer)
            self.lr_schedulers().step()

        automatic = property(lambda self: False)
        return self.module(
            None,
            configure_optimizers=configure_optimizers,
            training_step=training_step,
            automatic_optimization=automatic,
        ), {"max_epochs": STEPS // BATCHES}


NAMES = [name for name in vars(Cases) if name[0] != "_" and name != "module"]


def run(package: str, name: str) -> dict[str, str]:
    """One program under `package` ("lightning.pytorch" or "lit_fast"), on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    L = importlib.import_module(package)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, options = getattr(Cases(L), name)()
            options.setdefault("max_epochs", STEPS // BATCHES)
            L.Trainer(**QUIET, **options).fit(model, data())
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    kind = ">d" if name == "double" else ">f"
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    losses = b"".join(struct.pack(kind, loss) for loss in model.losses)
    return {"losses": losses.hex(), "weights": digest.hexdigest()}


def floats(record: dict[str, str], name: str) -> list[float]:
    kind = ">d" if name == "double" else ">f"
    return [value for (value,) in struct.iter_unpack(kind, bytes.fromhex(record["losses"]))]


def machine() -> dict[str, str]:
    """What bits depend on: torch's version and the vector instructions that its kernels were chosen for."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__.split("+")[0], "capability": capability, "architecture": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("lightning", "lit_fast"))
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--out")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    package = "lightning.pytorch" if given.framework == "lightning" else "lit_fast"
    records = {"machine": machine(), "records": {name: run(package, name) for name in given.names}}
    text = json.dumps(records, indent=1)
    if given.out:
        Path(given.out).write_text(text + "\n")
    else:
        sys.stdout.write(text + os.linesep)


if __name__ == "__main__":
    main()
