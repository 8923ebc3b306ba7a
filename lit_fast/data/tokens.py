"""Text to tokens: files -> byte-level BPE -> a memory-mapped token file, cached.

    text files -> Tokenizer (trained on them)
               -> <cache>/tokens/<fingerprint>/{tokenizer.json,train.bin,val.bin,header.json}

A cache folder appears under its final name by one rename, after everything in it is written, so a folder
that exists is whole. Its name is a fingerprint of the inputs: files (name, size, modification time),
vocabulary size, held-out share, and the versions of the format and of `tokenizers`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sysconfig
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_fast.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1
# Bytes of text that the vocabulary is learned from at most; more changes a 50k vocabulary little and costs
# minutes.
BPE_SAMPLE_BYTES = 64 << 20
ENCODE_BATCH_BYTES = 4 << 20
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class TextFile:
    """One file of text: where it lies, and the name that it is sorted, split and fingerprinted by."""

    path: Path
    name: str
    size: int
    modified_ns: int


def cache_root() -> Path:
    """Folder of everything that lit_fast caches: `LIT_FAST_CACHE`, or `~/.cache/lit_fast`."""
    return Path(os.environ.get("LIT_FAST_CACHE") or Path.home() / ".cache" / "lit_fast")


def standard_library_files() -> list[TextFile]:
    """The running interpreter's standard library as text: every `*.py`, without site-packages and its test
    suites.

    About 12 MB in CPython 3.11 (32 MB with the test suites; `--data` on that folder takes those too).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    source = (file for file in _walk(root, SKIPPED_FOLDERS | TEST_FOLDERS) if file.path.suffix == ".py")
    files = [file for file in source if file.size and _is_text(file.path)]
    if not files:
        raise DataError(
            f"No Python source was found in the standard library's folder {root} (is it zipped or stripped?)."
            " Name text of your own: --data FILE_OR_FOLDER."
        )
    return files


def find_text_files(paths: Sequence[str | Path]) -> list[TextFile]:
    """Every non-empty UTF-8 text file in `paths` (files, or folders searched recursively), sorted by name.

    Hidden files and folders, `__pycache__` and site-packages are passed over in folders; so is what is not
    UTF-8 text.

    Raises:
        DataError: a path does not exist, a file named itself is not text, or a path holds no text at all; the
            message says what was found there.
    """
    files: dict[Path, TextFile] = {}
    for given in paths:
        root = Path(given).expanduser()
        if not root.exists():
            raise DataError(f"--data {given}: there is no such file or folder.")
        candidates = list(_walk(root, SKIPPED_FOLDERS)) if root.is_dir() else [_text_file(root, root.name)]
        text = [file for file in candidates if file.size and _is_text(file.path)]
        if not text:
            raise DataError(
                f"--data {given}: no text there. {_describe(candidates)} Give UTF-8 text files or folders of them."
            )
        files.update((file.path.resolve(), file) for file in text)
    return sorted(files.values(), key=lambda file: (file.name, str(file.path)))


@dataclass(frozen=True)
class TokenData:
    """A cached, tokenized text: its folder and header. Made by `prepare_tokens`.

    `header` holds `vocab_size`, `dtype`, and for `train` and `val` the counts `tokens`, `bytes`, `documents`.
    """

    folder: Path
    header: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Number of token ids in use; a model may have more rows (padded to a multiple of 64)."""
        return int(self.header["vocab_size"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` that made these tokens; `encode(text).ids` and `decode(ids)`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @property
    def end_of_text(self) -> int:
        """Id of the token that separates documents; it stands for no bytes."""
        return int(self.header["end_of_text"])

    def tokens(self, split: str) -> npt.NDArray[Any]:
        """All tokens of "train" or "val": a read-only memory map, shape (tokens,), uint16 or uint32."""
        return _map_tokens(self.folder / f"{split}.bin", self.header["dtype"])

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Length in bytes of every token, shape (vocab_size,): one character stands for a byte."""
        import numpy as np

        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self.tokenizer.get_vocab().items():
            lengths[index] = 0 if token == END_OF_TEXT else len(token)
        return lengths

    def dataset(self, split: str, block_size: int) -> TokenDataset:
        """Windows of `block_size + 1` tokens of "train" or "val"."""
        return TokenDataset(self.folder / f"{split}.bin", self.header["dtype"], block_size)

    def dataloader(self, split: str, block_size: int, batch_size: int, num_workers: int = 0) -> DataLoader[Tensor]:
        """Batches (batch_size, block_size + 1) int64; "train" is shuffled and drops a last, shorter batch."""
        dataset = self.dataset(split, block_size)
        train = split == "train"
        if train and len(dataset) < batch_size:
            raise DataError(
                f"{len(dataset)} windows of {block_size} tokens are less than a batch of {batch_size}: give "
                "more text, or a smaller --batch_size or --model.block_size."
            )
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=train,
            drop_last=train,
            num_workers=num_workers,
            collate_fn=keep_batch,  # type: ignore[arg-type]
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )


class TokenDataset(Dataset[Tensor]):
    """Non-overlapping windows of a token file: item i is tokens [i * block_size, (i + 1) * block_size], both
    included.

    An item is (block_size + 1,) int64: inputs are its first, targets its last `block_size` tokens. A whole
    batch is one gather (`__getitems__`, which DataLoader calls where it exists); use it with
    `collate_fn=keep_batch`.

    Raises:
        DataError: the file holds less than one window.
    """

    def __init__(self, path: str | Path, dtype: str, block_size: int) -> None:
        import numpy as np

        self.path, self.dtype, self.block_size = Path(path), dtype, block_size
        self._tokens = _map_tokens(self.path, dtype)
        self._window = np.arange(block_size + 1)
        if len(self) < 1:
            raise DataError(
                f"{self.path.stem}: {len(self._tokens)} tokens are less than one window of {block_size} + 1: "
                "give more text, or a smaller --model.block_size."
            )

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Windows `indices` as one tensor (len(indices), block_size + 1), int64."""
        import numpy as np

        starts = np.asarray(indices, dtype=np.int64) * self.block_size
        return torch.from_numpy(self._tokens[starts[:, None] + self._window].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memmap is a copy of the whole file; a worker process maps it again instead.
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = _map_tokens(self.path, self.dtype)


def keep_batch(batch: Tensor) -> Tensor:
    """Collate function for a dataset whose `__getitems__` returns the batch already."""
    return batch


def prepare_tokens(
    paths: Sequence[str | Path] | None = None,
    *,
    vocab_size: int = 4096,
    val_fraction: float = 0.02,
    cache_dir: str | Path | None = None,
) -> TokenData:
    """Tokenize text once; afterwards open what is cached.

    A byte-level BPE is learned from the training text. Whole files, in an order given by the hash of their
    names, are held out as "val" while they fit into `val_fraction` of the bytes; where none fits, the largest
    file's tail.

    Args:
        paths: text files or folders; None is the standard library's source (`standard_library_files`).
        vocab_size: most tokens the vocabulary may have (at least 257: every byte, and the end of text).
        val_fraction: share of the bytes that is held out, in (0, 0.5].
        cache_dir: instead of `cache_root()`.

    Raises:
        DataError: no text, too little of it, or a damaged cache folder.

    Example:
        >>> data = prepare_tokens(["README.md"], vocab_size=300, val_fraction=0.2)  # doctest: +SKIP
        >>> data.tokenizer.decode(data.tokens("val")[:8].tolist())                  # doctest: +SKIP
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size={vocab_size}: it must be at least 257 (256 bytes and {END_OF_TEXT}).")
    if not 0 < val_fraction <= 0.5:
        raise DataError(f"val_fraction={val_fraction}: it must be in (0, 0.5].")
    files = standard_library_files() if paths is None else find_text_files(paths)
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    folder = root / "tokens" / _fingerprint(files, vocab_size, val_fraction)
    if not folder.exists():
        _build(folder, files, vocab_size, val_fraction)
    return _open(folder)


def _open(folder: Path) -> TokenData:
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        width = {"uint16": 2, "uint32": 4}[header["dtype"]]
        whole = all((folder / f"{s}.bin").stat().st_size == width * header[s]["tokens"] for s in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole or not (folder / "tokenizer.json").exists():
        raise DataError(f"The token cache {folder} is damaged: delete that folder, and it is made again.")
    return TokenData(folder, header)


def _build(folder: Path, files: list[TextFile], vocab_size: int, val_fraction: float) -> None:
    import numpy as np

    train, val = _split(files, val_fraction)
    tokenizer = _learn_vocabulary(train, vocab_size)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    header: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": end_of_text,
        "dtype": dtype,
    }
    partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    try:
        tokenizer.save(str(partial / "tokenizer.json"))
        for split, documents in (("train", train), ("val", val)):
            counts = {"tokens": 0, "bytes": 0, "documents": len(documents)}
            with open(partial / f"{split}.bin", "wb") as out:
                for batch in _batches(documents):
                    for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                        ids = np.array([*encoding.ids, end_of_text], dtype=dtype)
                        out.write(ids.tobytes())
                        counts["tokens"] += len(ids)
                    counts["bytes"] += sum(len(text.encode()) for text in batch)
                out.flush()
                os.fsync(out.fileno())
            header[split] = counts
        (partial / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished the same folder first: its content is the same.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _learn_vocabulary(documents: list[_Document], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )

    def sample() -> Iterator[list[str]]:
        taken = 0
        for batch in _batches(documents):
            yield batch
            taken += sum(map(len, batch))
            if taken >= BPE_SAMPLE_BYTES:
                return

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


@dataclass(frozen=True)
class _Document:
    """A file, or the byte range [start, stop) of one whose tail is held out."""

    path: Path
    start: int = 0
    stop: int | None = None

    def read(self) -> str:
        return self.path.read_bytes()[self.start : self.stop].decode("utf-8")


def _split(files: list[TextFile], val_fraction: float) -> tuple[list[_Document], list[_Document]]:
    budget = val_fraction * sum(file.size for file in files)
    held_out: set[Path] = set()
    for file in sorted(files, key=lambda file: hashlib.blake2b(file.name.encode()).digest()):
        if file.size <= budget:
            budget -= file.size
            held_out.add(file.path)
    train = [_Document(file.path) for file in files if file.path not in held_out]
    val = [_Document(file.path) for file in files if file.path in held_out]
    if not val:
        largest = max(files, key=lambda file: file.size).path
        content = largest.read_bytes()
        cut = content.rfind(b"\n", 0, int(len(content) * (1 - val_fraction))) + 1
        if not 0 < cut < len(content):
            raise DataError(f"{largest}: {len(content)} bytes without a line end cannot be split; give more text.")
        train = [_Document(largest, 0, cut) if d.path == largest else d for d in train]
        val = [_Document(largest, cut)]
    return train, val


def _batches(documents: list[_Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.read())
        size += len(batch[-1])
        if size >= ENCODE_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _fingerprint(files: list[TextFile], vocab_size: int, val_fraction: float) -> str:
    import tokenizers

    described = [[str(file.path.resolve()), file.name, file.size, file.modified_ns] for file in files]
    inputs = [FORMAT_VERSION, tokenizers.__version__, vocab_size, val_fraction, described]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[TextFile]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped and not name.startswith("."))
        for name in sorted(names):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield _text_file(path, path.relative_to(root).as_posix())


def _text_file(path: Path, name: str) -> TextFile:
    status = path.stat()
    return TextFile(path, name, status.st_size, status.st_mtime_ns)


def _is_text(path: Path) -> bool:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _describe(candidates: list[TextFile]) -> str:
    if not candidates:
        return "The folder holds no files."
    kinds = Counter("empty" if not file.size else file.path.suffix or "without a suffix" for file in candidates)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    return f"Found {len(candidates)} file(s): {listed}; none is UTF-8 text."


def _map_tokens(path: Path, dtype: str) -> npt.NDArray[Any]:
    import numpy as np

    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
