"""A small transformer language model and a text to train it on, by Lightning's names.

Shapes: B batch, T tokens of a block, V words of the vocabulary.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_fast.module import LightningModule

WIKITEXT2_WORDS = 33_278  # the vocabulary of WikiText-2, the default size of the models here


class Transformer(nn.Module):
    """An encoder and a decoder of `nlayers` each over word embeddings; `forward` gives log-probabilities (B * T, V).

    Args:
        vocab_size: V.
        ninp: width of embeddings and layers.
        nhead: attention heads.
        nhid: hidden width of the feed-forward parts.
        nlayers: layers of the encoder, and of the decoder.
        dropout: probability of dropping an activation.

    Example:
        >>> model = Transformer(vocab_size=11)
        >>> tokens = torch.zeros(2, 5, dtype=torch.long)
        >>> model(tokens, tokens).shape
        torch.Size([10, 11])
    """

    def __init__(
        self,
        vocab_size: int = WIKITEXT2_WORDS,
        ninp: int = 200,
        nhead: int = 2,
        nhid: int = 200,
        nlayers: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        # In Lightning's order, so that one seed gives the same weights
        self.pos_encoder = PositionalEncoding(ninp, dropout)
        self.embedding = nn.Embedding(vocab_size, ninp)
        self.transformer = nn.Transformer(
            ninp, nhead, nlayers, nlayers, dim_feedforward=nhid, dropout=dropout, batch_first=True
        )
        self.decoder = nn.Linear(ninp, vocab_size)
        self.ninp = ninp
        self.vocab_size = vocab_size

    def generate_square_subsequent_mask(self, size: int) -> Tensor:
        """(size, size): -inf above the diagonal, where a position would see what follows it, 0 elsewhere."""
        return torch.full((size, size), -math.inf).triu(1)

    def forward(self, inputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """`inputs` and `target` are token numbers (B, T); `mask` is added to the decoder's attention (T, T)."""
        if mask is None:
            mask = self.generate_square_subsequent_mask(inputs.shape[1]).to(inputs.device)
        scale = math.sqrt(self.ninp)
        source = self.pos_encoder(self.embedding(inputs) * scale)
        shifted = self.pos_encoder(self.embedding(target) * scale)
        hidden = self.transformer(source, shifted, tgt_mask=mask)
        return F.log_softmax(self.decoder(hidden), dim=-1).view(-1, self.vocab_size)


class PositionalEncoding(nn.Module):
    """Adds the sinusoid of one position, T, to every embedding, and drops some.

    Lightning's demo indexes the table so that all T positions get the vector of position T; this one does the same,
    because the two must train alike. A model meant for more than a demo would add row t to token t.

    Source of the sinusoids: Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, dim: int, dropout: float = 0.1, max_len: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dim = dim
        self.max_len = max_len
        self.pe: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.pe is None:
            self.pe = self._table(x.device)
        output: Tensor = self.dropout(x + self.pe[:, x.shape[1]])
        return output

    def _table(self, device: torch.device) -> Tensor:
        """(1, max_len, dim)"""
        position = torch.arange(self.max_len, dtype=torch.float, device=device).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, self.dim, 2, device=device).float() * (-math.log(10000.0) / self.dim))
        table = torch.zeros(self.max_len, self.dim, device=device)
        table[:, 0::2] = torch.sin(position * frequency)
        table[:, 1::2] = torch.cos(position * frequency)
        return table.unsqueeze(0)


class Dictionary:
    """Numbers for words, in the order in which they were first seen."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


def tokenize(text: str) -> tuple[Tensor, Dictionary]:
    """The words of `text` as numbers, 1-D int64, with "<eos>" at the end of each line, and the numbering."""
    dictionary = Dictionary()
    ids = [dictionary.add_word(word) for line in text.splitlines() for word in (*line.split(), "<eos>")]
    return torch.tensor(ids, dtype=torch.int64), dictionary


class WikiText2(Dataset[tuple[Tensor, Tensor]]):
    """Blocks of a text: sample i is (tokens, the tokens one further on), both (block_size,) int64.

    Nothing is downloaded. The file `data_dir/wikitext-2.txt` is read where it exists (Lightning's demo leaves
    WikiText-2 there); elsewhere the text is the Python language's own help pages, which come with Python: tens of
    thousands of words of English and code, enough to watch a loss fall, not to compare with published numbers.

    Args:
        data_dir: where the file may lie.
        block_size: tokens of a sample.
        download: accepted and ignored.
    """

    def __init__(self, data_dir: Path | str = Path("./data"), block_size: int = 35, download: bool = True) -> None:
        self.path = Path(data_dir) / "wikitext-2.txt"
        self.data, self.dictionary = tokenize(self.path.read_text("utf-8") if self.path.exists() else python_help())
        self.block_size = block_size

    @property
    def vocab_size(self) -> int:
        return len(self.dictionary)

    def __len__(self) -> int:
        return len(self.data) // self.block_size - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        end = start + self.block_size
        return self.data[start:end], self.data[start + 1 : end + 1]


def python_help() -> str:
    """What `help()` knows about Python's topics, one after the other by name."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class LightningTransformer(LightningModule):
    """`Transformer` with its loss, SGD, and `WikiText2` to train on.

    Args:
        vocab_size: words it knows; at least `WikiText2().vocab_size`.
    """

    def __init__(self, vocab_size: int = WIKITEXT2_WORDS) -> None:
        super().__init__()
        self.model = Transformer(vocab_size=vocab_size)

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        output: Tensor = self.model(inputs, target)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return F.nll_loss(self(inputs, target), target.view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(WikiText2())
