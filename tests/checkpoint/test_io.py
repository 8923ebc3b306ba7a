"""Checkpoint files: whole or not there, whatever kills the writer; damage and code are named."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import socket
import subprocess
import sys
import warnings
from io import BytesIO

import new_process
import pytest
import torch

from lit_fast.checkpoint import io, temporaries
from lit_fast.errors import CheckpointError


def _payload(step: int = 1, numel: int = 100) -> dict[str, object]:
    return {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": collections.OrderedDict(weight=torch.full((numel,), float(step)), bias=torch.zeros(3)),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "path": None}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "hyper_parameters": {"lr": 1e-3, "names": ["a", "b"], "flags": {1, 2}, "big": 1 << 100, "raw": b"x"},
    }


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _temporaries(directory: pathlib.Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.endswith(".lit-tmp"))


def _run(script: str, *arguments: object, timeout: float = 120.0) -> dict[str, object]:
    """What a new process says that runs `script`: one JSON object in its last line."""
    return json.loads(new_process.output_of(script, *arguments, timeout=timeout).splitlines()[-1])


def test_round_trip_loads_with_weights_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a" / "b" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        io.save(_payload(), path)
    assert _same(io.load(path), _payload())
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_reads_what_torch_and_its_old_formats_wrote(tmp_path: pathlib.Path) -> None:
    torch.save(_payload(), tmp_path / "zip.ckpt")
    torch.save(_payload(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_payload(), tmp_path / "unchecked.ckpt")
        io.save(_payload(), tmp_path / "ours.ckpt")
        assert torch.serialization.get_crc32_options() is False, "save must leave the user's option as it was"
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("zip", "old", "unchecked", "ours"):
        assert _same(io.load(tmp_path / f"{name}.ckpt"), _payload()), name
    _flip(tmp_path / "ours.ckpt", _offset_of_weights(tmp_path / "ours.ckpt"))
    with pytest.raises(CheckpointError, match="checksum"):
        io.load(tmp_path / "ours.ckpt")


def test_what_the_trainer_never_wrote_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*missing\.ckpt"):
        io.load(tmp_path / "missing.ckpt")
    with pytest.raises(CheckpointError, match="directory"):
        io.load(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(CheckpointError, match="sharded"):
        io.load(tmp_path)
    contents = {b"": "is empty", b"hello, world": "is not a checkpoint", b"\x80\x02": "EOFError"}
    for content, reason in contents.items():
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"x\.ckpt.*{reason}"):
            io.load(tmp_path / "x.ckpt")
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dict"):
        io.load(tmp_path / "tensor.ckpt")
    with pytest.raises(CheckpointError, match="remote"):
        io.load("s3://bucket/x.ckpt")
    with pytest.raises(CheckpointError, match="file name"):
        io.save({}, "")
    with pytest.raises(CheckpointError, match="directory"):
        io.save({}, tmp_path)


def test_every_truncation_is_seen(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    io.save(_payload(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.ckpt"):
            io.load(path)


def _flip(path: pathlib.Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def _offset_of_weights(path: pathlib.Path) -> int:
    return path.read_bytes().index(torch.full((100,), 1.0).numpy().tobytes())


def test_a_flipped_bit_in_a_tensor_is_seen_where_torch_sees_none(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    io.save(_payload(), path)
    _flip(path, _offset_of_weights(path))
    assert not _same(torch.load(path), _payload()), "torch checks records now: this module's reason has gone"
    with pytest.raises(CheckpointError, match=r"damaged: record .*data/0.*checksum"):
        io.load(path)


def test_no_flipped_bit_anywhere_changes_what_is_loaded(tmp_path: pathlib.Path) -> None:
    """Every 3rd byte, so headers, padding, pickle, tensors and the index: an error, or the same payload."""
    path = tmp_path / "a.ckpt"
    io.save(_payload(), path)
    whole = path.read_bytes()
    seen = 0
    for offset in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        try:
            assert _same(io.load(path), _payload()), f"byte {offset} of {len(whole)} changed the payload unseen"
        except CheckpointError:
            seen += 1
    assert seen > len(whole) // 3 // 4


class _Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 3",)


def test_pickled_code_is_refused_and_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": _Shell()}, path)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt.*pickled code: (posix|nt)\.system.*add_safe_globals"):
        io.load(path)
    torch.save({"x": _Shell()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt.*(posix|nt)\.system.*weights_only=False"):
        io.load(path)


class _Settings:
    def __init__(self) -> None:
        self.width = 3


def test_a_foreign_class_is_said_at_save_and_loads_only_when_asked(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    with pytest.warns(UserWarning, match=r"a\.ckpt.*_Settings.*weights_only=False"):
        io.save({"hyper_parameters": {"settings": _Settings()}}, path)
    with pytest.raises(CheckpointError, match="_Settings"):
        io.load(path)
    assert io.load(path, weights_only=False)["hyper_parameters"]["settings"].width == 3
    with torch.serialization.safe_globals([_Settings]):
        assert io.load(path)["hyper_parameters"]["settings"].width == 3


def test_what_cannot_be_pickled_is_named_and_the_old_file_stays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.ckpt"
    io.save(_payload(1), path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*'hyper_parameters'.*before is whole"):
        io.save({**_payload(2), "hyper_parameters": {"f": lambda: 0}}, path)
    assert _same(io.load(path), _payload(1))
    assert _temporaries(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), OSError(5, "I/O")])
def test_a_failure_at_any_point_keeps_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "a.ckpt"
    io.save(_payload(1), path)

    def fail(*_: object) -> None:
        raise error

    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(expected) as raised:
            io.save(_payload(2), path)
    if isinstance(error, OSError):
        assert "a.ckpt" in str(raised.value) and "before is whole" in str(raised.value)
        assert raised.value.__cause__ is error
    assert _same(io.load(path), _payload(1))
    assert _temporaries(tmp_path) == []


def test_a_link_is_replaced_not_followed(tmp_path: pathlib.Path) -> None:
    io.save(_payload(1), tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    io.save(_payload(2), tmp_path / "last.ckpt")
    assert _same(io.load(tmp_path / "epoch=1.ckpt"), _payload(1))
    assert _same(io.load(tmp_path / "last.ckpt"), _payload(2))


def test_stale_temporaries_are_swept_live_ones_are_not(tmp_path: pathlib.Path) -> None:
    host = socket.gethostname().replace(".", "-")[:64]
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], check=False, capture_output=True, text=True
    )
    stale = tmp_path / f".a.ckpt.{host}.{int(dead.stdout)}.00000000.lit-tmp"
    same_pid = tmp_path / f".a.ckpt.{host}.{os.getpid()}.00000001.lit-tmp"  # a container's pid 1, killed and restarted
    elsewhere = tmp_path / ".a.ckpt.another-host.7.00000002.lit-tmp"
    elsewhere_old = tmp_path / ".a.ckpt.another-host.7.00000003.lit-tmp"
    not_ours = tmp_path / ".a.ckpt.tmp"
    for file in (stale, same_pid, elsewhere, elsewhere_old, not_ours):
        file.write_bytes(b"half")
    os.utime(elsewhere_old, (0, 0))
    live, fd = temporaries.create_file(str(tmp_path), "b.ckpt")  # a save in progress, in another thread or process
    try:
        io.save(_payload(), tmp_path / "a.ckpt")
        assert _temporaries(tmp_path) == sorted([elsewhere.name, os.path.basename(live)])
        assert not_ours.exists()
    finally:
        os.close(fd)


_KILL = """
    import json, os, random, signal, sys, time
    import torch
    from lit_fast.checkpoint import io
    torch.set_num_threads(1)
    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    directory, random = os.path.dirname(path), random.Random(seed)
    numel = 1 << 20  # 4 MB: a write takes as long as the spread of the kills
    io.save({"step": 0, "w": torch.zeros(numel)}, path)
    mid_write, last = 0, 0
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            step = last
            while True:
                step += 1
                io.save({"step": step, "w": torch.full((numel,), float(step))}, path)
        time.sleep(random.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        mid_write += any(name.endswith(".lit-tmp") for name in os.listdir(directory))
        found = io.load(path)
        assert found["step"] >= last and bool((found["w"] == found["step"]).all()), found["step"]
        last = found["step"]
    io.save({"step": -1}, path)
    print(json.dumps({"mid_write": mid_write, "last": last, "left": os.listdir(directory)}))
"""


@pytest.mark.dist
@pytest.mark.parametrize("kills", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_sigkill_at_any_moment_leaves_a_whole_file(tmp_path: pathlib.Path, kills: int) -> None:
    result = _run(_KILL, tmp_path / "last.ckpt", kills, 7, timeout=60.0 + kills)
    assert result["left"] == ["last.ckpt"], "the next save sweeps what the killed ones left"
    assert result["mid_write"] > 0, "no kill fell into a write: the test proved nothing"


_FULL = """
    import json, os, resource, signal, sys
    import torch
    from lit_fast.checkpoint import io
    from lit_fast.errors import CheckpointError
    path, limit = sys.argv[1], int(sys.argv[2])
    io.save({"step": 1, "w": torch.ones(1000)}, path)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        io.save({"step": 2, "w": torch.ones(10_000_000)}, path)
    except CheckpointError as error:
        message = str(error)
    found = io.load(path)
    assert found["step"] == 1 and bool((found["w"] == 1).all())
    print(json.dumps({"message": message, "left": os.listdir(os.path.dirname(path))}))
"""


@pytest.mark.dist
def test_a_file_size_limit_leaves_the_previous_file_whole(tmp_path: pathlib.Path) -> None:
    result = _run(_FULL, tmp_path / "last.ckpt", 1_000_000)
    assert "last.ckpt" in result["message"] and "make room" in result["message"], result
    assert result["left"] == ["last.ckpt"]


@pytest.mark.dist
def test_a_full_disk_leaves_the_previous_file_whole(tmp_path: pathlib.Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if os.name != "posix" or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root; the file size limit above covers the same path")
    try:
        result = _run(_FULL, tmp_path / "last.ckpt", 0)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "No space left" in result["message"] and "are free" in result["message"], result
    assert result["left"] == ["last.ckpt"]


@pytest.mark.dist
def test_ctrl_c_inside_a_write_leaves_the_previous_file_whole(tmp_path: pathlib.Path) -> None:
    script = """
        import json, os, signal, sys, threading, torch
        from lit_fast.checkpoint import io
        path = sys.argv[1]
        io.save({"step": 1}, path)
        write, interrupted = os.write, 0
        def slow(fd, data):
            os.kill(os.getpid(), signal.SIGINT)
            return write(fd, data)
        os.write = slow
        try:
            io.save({"step": 2, "w": torch.ones(1000)}, path)
        except KeyboardInterrupt:
            interrupted = 1
        os.write = write
        print(json.dumps({"step": io.load(path)["step"], "interrupted": interrupted,
                          "left": os.listdir(os.path.dirname(path))}))
    """
    assert _run(script, tmp_path / "a.ckpt") == {"step": 1, "interrupted": 1, "left": ["a.ckpt"]}


def test_two_threads_may_save_in_one_directory(tmp_path: pathlib.Path) -> None:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: io.save(_payload(i), tmp_path / f"{i % 3}.ckpt"), range(24)))
    assert sorted(os.listdir(tmp_path)) == ["0.ckpt", "1.ckpt", "2.ckpt"]
    for i in range(3):
        step = io.load(tmp_path / f"{i}.ckpt")["global_step"]
        assert step % 3 == i and _same(io.load(tmp_path / f"{i}.ckpt"), _payload(step))


def test_open_files(tmp_path: pathlib.Path) -> None:
    io.save({"a": torch.arange(3)}, tmp_path / "a.ckpt")
    with open(tmp_path / "a.ckpt", "rb") as file:
        assert torch.equal(io.load(file)["a"], torch.arange(3)) and not file.closed
    whole = (tmp_path / "a.ckpt").read_bytes()
    assert torch.equal(io.load(BytesIO(whole))["a"], torch.arange(3))
    with pytest.raises(CheckpointError, match="'BytesIO'"):
        io.load(BytesIO(whole[:-30]))
    with pytest.raises(CheckpointError, match="'BytesIO' is empty"):
        io.load(BytesIO())
