"""Text to tokens: what counts as text, the split, the cache, and windows over the token file."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lit_fast.data import tokens as tokens_module
from lit_fast.data.tokens import (
    TokenDataset,
    find_text_files,
    keep_batch,
    prepare_tokens,
    standard_library_files,
)
from lit_fast.errors import DataError

LINE = "The quick brown fox, number {0}, jumps over {1} lazy dogs — naïvely.\n"


def make_text(folder, files: int = 10, lines: int = 60):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        text = "".join(LINE.format(index * lines + line, line % 7) for line in range(lines))
        (folder / f"part{index}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def text(tmp_path):
    return make_text(tmp_path / "text")


@pytest.fixture
def data(text, tmp_path):
    return prepare_tokens([text], vocab_size=400, val_fraction=0.2, cache_dir=tmp_path / "cache")


def test_decoding_gives_every_byte_back(data, text):
    written = {path.read_text(encoding="utf-8") for path in text.iterdir()}
    read = set()
    for split in ("train", "val"):
        documents = np.split(data.tokens(split), np.flatnonzero(data.tokens(split) == data.end_of_text) + 1)
        assert len(documents.pop()) == 0  # the last document is closed, too
        read |= {data.tokenizer.decode(document[:-1].tolist()) for document in documents}
    assert read == written


def test_counts_and_token_bytes_add_up(data, text):
    lengths = data.token_bytes()
    for split in ("train", "val"):
        counted = data.header[split]
        assert len(data.tokens(split)) == counted["tokens"]
        assert lengths[data.tokens(split)].sum() == counted["bytes"]
    assert data.header["train"]["bytes"] + data.header["val"]["bytes"] == sum(p.stat().st_size for p in text.iterdir())
    assert data.tokens("train").dtype == np.uint16
    assert data.vocab_size <= 400


def test_whole_files_are_held_out_within_their_share(data, text):
    total = sum(path.stat().st_size for path in text.iterdir())
    assert 0 < data.header["val"]["bytes"] <= 0.2 * total
    assert data.header["train"]["documents"] + data.header["val"]["documents"] == 10


def test_tail_is_held_out_where_there_is_one_file(tmp_path):
    only = make_text(tmp_path / "one", files=1) / "part0.txt"
    data = prepare_tokens([only], vocab_size=300, val_fraction=0.1, cache_dir=tmp_path / "cache")
    parts = [data.tokenizer.decode(data.tokens(split)[:-1].tolist()) for split in ("train", "val")]
    assert "".join(parts) == only.read_text(encoding="utf-8")
    assert parts[0].endswith("\n")


def test_second_call_opens_the_cache(data, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_build", lambda *_: pytest.fail("the cache was built again"))
    again = prepare_tokens([text], vocab_size=400, val_fraction=0.2, cache_dir=tmp_path / "cache")
    assert again == data


def test_a_changed_file_or_option_is_another_cache(data, text, tmp_path):
    (text / "part0.txt").write_text("something else entirely, and rather shorter\n" * 20)
    changed = prepare_tokens([text], vocab_size=400, val_fraction=0.2, cache_dir=tmp_path / "cache")
    smaller = prepare_tokens([text], vocab_size=300, val_fraction=0.2, cache_dir=tmp_path / "cache")
    assert len({data.folder, changed.folder, smaller.folder}) == 3


def test_the_same_text_gives_the_same_tokens(data, text, tmp_path):
    again = prepare_tokens([text], vocab_size=400, val_fraction=0.2, cache_dir=tmp_path / "other")
    assert again.folder != data.folder
    for name in ("train.bin", "val.bin", "tokenizer.json", "header.json"):
        assert (again.folder / name).read_bytes() == (data.folder / name).read_bytes()


def test_a_build_that_dies_leaves_no_cache(text, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        prepare_tokens([text], vocab_size=300, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_damaged_cache_is_named(data, text, tmp_path):
    with open(data.folder / "train.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=f"{data.folder} is damaged: delete"):
        prepare_tokens([text], vocab_size=400, val_fraction=0.2, cache_dir=tmp_path / "cache")


def test_cache_folder_from_the_environment(text, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_FAST_CACHE", str(tmp_path / "named"))
    data = prepare_tokens([text], vocab_size=300)
    assert data.folder.parent == tmp_path / "named" / "tokens"
    assert json.loads((data.folder / "header.json").read_text()) == data.header


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare_tokens([tmp_path / "nowhere"])


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    for name, content in (
        ("a.png", b"\x89PNG\0\xff"),
        ("b.png", b"\x89PNG\0"),
        ("c.bin", b"\xff\xfe"),
        ("d.txt", b""),
    ):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"Found 4 file\(s\): 2 \.png, 1 \.bin, 1 empty; none is UTF-8 text"):
        prepare_tokens([tmp_path])
    with pytest.raises(DataError, match=r"Found 1 file\(s\): 1 \.png"):
        prepare_tokens([tmp_path / "a.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        prepare_tokens([tmp_path / "empty"])


def test_what_is_not_text_is_passed_over_beside_text(text):
    (text / "image.png").write_bytes(b"\x89PNG\0")
    (text / ".git").mkdir()
    (text / ".git" / "config").write_text("[core]\n")
    names = [file.name for file in find_text_files([text, text / "part3.txt"])]
    assert names == sorted(f"part{index}.txt" for index in range(10))


@pytest.mark.parametrize(("option", "value"), [("vocab_size", 256), ("val_fraction", 0.0), ("val_fraction", 0.6)])
def test_options_out_of_range(text, option, value):
    with pytest.raises(DataError, match=option):
        prepare_tokens([text], **{option: value})


def test_one_line_that_cannot_be_split(tmp_path):
    (tmp_path / "line.txt").write_text("no line end")
    with pytest.raises(DataError, match="cannot be split"):
        prepare_tokens([tmp_path / "line.txt"], cache_dir=tmp_path / "cache")


def test_standard_library_is_source_without_tests():
    names = [file.name for file in standard_library_files()]
    assert "argparse.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any(part in ("test", "tests", "site-packages") for name in names for part in name.split("/"))


def test_windows_cover_the_file_and_overlap_by_one_token(data):
    dataset, file = data.dataset("train", 16), data.tokens("train")
    assert len(dataset) == (len(file) - 1) // 16
    for index in (0, 1, len(dataset) - 1, -1):
        place = index % len(dataset) * 16
        assert dataset[index].tolist() == file[place : place + 17].tolist()
    assert dataset[0].dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_a_batch_is_one_gather_of_its_items(data):
    dataset = data.dataset("train", 16)
    batch = dataset.__getitems__([3, 0, 7])
    assert torch.equal(batch, torch.stack([dataset[3], dataset[0], dataset[7]]))
    loader = DataLoader(dataset, batch_size=4, collate_fn=keep_batch)
    assert torch.equal(next(iter(loader)), dataset.__getitems__([0, 1, 2, 3]))


def test_a_pickled_dataset_maps_the_file_again(data):
    dataset = data.dataset("val", 16)
    content = pickle.dumps(dataset)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content)[1], dataset[1])


def test_loaders_shuffle_training_only(data):
    train, val = data.dataloader("train", 16, 4), data.dataloader("val", 16, 4)
    torch.manual_seed(0)
    shuffled = torch.cat(list(train))
    assert shuffled.shape == (len(train.dataset) // 4 * 4, 17)
    assert not torch.equal(shuffled, train.dataset.__getitems__(range(len(shuffled))))
    assert torch.equal(torch.cat(list(val)), val.dataset.__getitems__(range(len(val.dataset))))


def test_too_little_text_for_a_window_or_a_batch(data):
    with pytest.raises(DataError, match="less than one window of 100000"):
        data.dataset("train", 100_000)
    with pytest.raises(DataError, match="less than a batch of 100000"):
        data.dataloader("train", 16, 100_000)
    assert isinstance(data.dataset("train", 16), TokenDataset)
