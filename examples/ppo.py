"""Proximal policy optimization balances a pole: the data is what the policy of the moment does.

python examples/ppo.py [--max_epochs N]

Schulman et al., Proximal Policy Optimization Algorithms (2017), arXiv:1707.06347. The cart and pole follow Barto,
Sutton and Anderson, Neuronlike adaptive elements that can solve difficult learning control problems (1983).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import lit_fast as L


class CartPole:
    """State: position (m), speed (m/s), angle (rad), angular speed (rad/s). Reward 1 a step of 0.02 s, 200 at most."""

    def reset(self) -> list[float]:
        self.steps = 0
        self.state = [random.uniform(-0.05, 0.05) for _ in range(4)]
        return self.state

    def step(self, action: int) -> tuple[list[float], bool]:
        x, speed, angle, turning = self.state
        sin, cos, force = math.sin(angle), math.cos(angle), 10.0 if action else -10.0
        # Cart 1 kg, pole 0.1 kg, half of the pole's length 0.5 m, gravity 9.8 m/s^2.
        push = (force + 0.05 * turning**2 * sin) / 1.1
        turn_faster = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        speed_up = push - 0.05 * turn_faster * cos / 1.1
        self.state = [x + 0.02 * speed, speed + 0.02 * speed_up, angle + 0.02 * turning, turning + 0.02 * turn_faster]
        self.steps += 1
        over = abs(self.state[0]) > 2.4 or abs(self.state[2]) > math.radians(12) or self.steps == 200
        return self.state, over


class Episodes(IterableDataset[tuple[Tensor, ...]]):
    """Plays `steps` steps with the policy of the moment, then yields them shuffled, `passes` times."""

    def __init__(self, agent: PPO, steps: int, passes: int) -> None:
        self.agent, self.steps, self.passes = agent, steps, passes

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        played = self.agent.play(self.steps)
        for _ in range(self.passes):
            random.shuffle(played)
            yield from played


class PPO(L.LightningModule):
    def __init__(
        self, discount: float = 0.99, trace: float = 0.95, clip: float = 0.2, learning_rate: float = 3e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
        self.value = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        self.world = CartPole()

    @torch.no_grad()
    def play(self, steps: int) -> list[tuple[Tensor, ...]]:
        played: list[tuple[Tensor, ...]] = []
        episode: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # state, action, log probability, value
        lengths: list[int] = []
        state = torch.tensor(self.world.reset())
        while len(played) < steps:
            choice = Categorical(logits=self.policy(state))
            action = choice.sample()
            episode.append((state, action, choice.log_prob(action), self.value(state)[0]))
            after, over = self.world.step(int(action))
            state = torch.tensor(after)
            if over:
                lengths.append(len(episode))
                advantage, value_after = 0.0, 0.0
                for seen, action, log_prob, value in reversed(episode):
                    surprise = 1.0 + self.hparams.discount * value_after - value.item()
                    advantage = surprise + self.hparams.discount * self.hparams.trace * advantage
                    value_after = value.item()
                    target = torch.tensor(advantage + value_after)
                    played.append((seen, action, log_prob, torch.tensor(advantage), target))
                episode, state = [], torch.tensor(self.world.reset())
        self.episode_length = sum(lengths) / len(lengths)
        return played

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        state, action, old_log_prob, advantage, target = batch
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        choice = Categorical(logits=self.policy(state))
        ratio = (choice.log_prob(action) - old_log_prob).exp()
        bounded = ratio.clamp(1 - self.hparams.clip, 1 + self.hparams.clip)
        policy_loss = -torch.min(ratio * advantage, bounded * advantage).mean()
        value_loss = F.smooth_l1_loss(self.value(state).squeeze(-1), target)
        self.log("episode_length", self.episode_length, on_step=False, on_epoch=True, prog_bar=True)
        return policy_loss + 0.5 * value_loss - 0.01 * choice.entropy().mean()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(Episodes(self, steps=1000, passes=4), batch_size=64)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams.learning_rate)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max_epochs", type=int, default=20)
    options = parser.parse_args(argv)

    L.seed_everything(1)
    trainer = L.Trainer(max_epochs=options.max_epochs, gradient_clip_val=0.5, logger=False, enable_checkpointing=False)
    trainer.fit(PPO())
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
