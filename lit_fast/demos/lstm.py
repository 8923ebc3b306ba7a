"""A small recurrent language model that carries its state from batch to batch, by Lightning's names.

Shapes: B batch, T tokens of a block, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lit_fast.demos.transformer import WIKITEXT2_WORDS, WikiText2
from lit_fast.module import LightningModule

Hidden = tuple[Tensor, Tensor]  # output and cell state, each (layers, B, hidden)


class SimpleLSTM(nn.Module):
    """Embedding, `nlayers` of LSTM, and a linear decoder; `forward` gives log-probabilities (B * T, V) and the state.

    Example:
        >>> model = SimpleLSTM(vocab_size=11, ninp=8, nhid=8, nlayers=2)
        >>> output, hidden = model(torch.zeros(3, 5, dtype=torch.long), model.init_hidden(3))
        >>> output.shape, hidden[0].shape
        (torch.Size([15, 11]), torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        vocab_size: int = WIKITEXT2_WORDS,
        ninp: int = 512,
        nhid: int = 512,
        nlayers: int = 4,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        # In Lightning's order, so that one seed gives the same weights
        self.vocab_size = vocab_size
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocab_size, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout, batch_first=True)
        self.decoder = nn.Linear(nhid, vocab_size)
        self.nlayers = nlayers
        self.nhid = nhid
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, input: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        decoded = self.decoder(self.drop(output)).view(-1, self.vocab_size)
        return F.log_softmax(decoded, dim=1), hidden

    def init_hidden(self, batch_size: int) -> Hidden:
        """A state of zeros for `batch_size` texts."""
        zeros = next(self.parameters()).new_zeros(self.nlayers, batch_size, self.nhid)
        return zeros, zeros.clone()


class SequenceSampler(Sampler[list[int]]):
    """Batches in which row r continues row r of the batch before: the data in `batch_size` columns, read side by side.

    Example:
        >>> list(SequenceSampler(range(7), batch_size=3))
        [[0, 2, 4], [1, 3, 5]]
    """

    def __init__(self, dataset: Sized, batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.chunk_size = len(dataset) // batch_size

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.chunk_size * self.batch_size
        for start in range(self.chunk_size):
            yield list(range(start, whole, self.chunk_size))

    def __len__(self) -> int:
        return self.chunk_size


class LightningLSTM(LightningModule):
    """`SimpleLSTM` trained by truncated backpropagation through time: the state goes on from batch to batch.

    Args:
        vocab_size: words it knows; at least `WikiText2().vocab_size`.
    """

    def __init__(self, vocab_size: int = WIKITEXT2_WORDS) -> None:
        super().__init__()
        self.model = SimpleLSTM(vocab_size=vocab_size)
        self.hidden: Hidden | None = None

    def on_train_epoch_end(self) -> None:
        self.hidden = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        hidden = self.model.init_hidden(len(inputs)) if self.hidden is None else self.hidden
        output, self.hidden = self.model(inputs, (hidden[0].detach(), hidden[1].detach()))
        loss = F.nll_loss(output, target.view(-1))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def train_dataloader(self) -> Any:
        dataset = WikiText2()
        return DataLoader(dataset, batch_sampler=SequenceSampler(dataset, batch_size=20))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=20.0)
