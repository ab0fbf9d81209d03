"""The feature cache: complete and sound or made again, whatever interrupts its writers or shares its folder."""

import dataclasses
import errno
import io
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import training.feature_cache
from errors import UserError
from model.model import MMultiModal
from training.data import build_datasets, read_split
from training.feature_cache import PixelLoader, cached_features


@pytest.fixture
def run(configure, tmp_path):
    """(model, photos, config) with an empty cache folder."""
    config = configure(data={"cache_features": True, "feature_cache": str(tmp_path / "features")})
    photos, _, _ = read_split(config)
    return MMultiModal.from_config(config, "cpu"), list(photos.values()), config


def cache_file(config):
    [file] = Path(config.data.feature_cache).iterdir()
    return file


def expected_features(model, photos):
    pixels = torch.cat([PixelLoader(model.processor)(photo) for photo in photos])
    return model.encode_image(pixels).to(torch.bfloat16)[:, None]  # each photo is one crop


def no_encoding(*_):
    raise AssertionError("photos are encoded again")


def test_features_are_made_once_and_read_again(run, monkeypatch, capsys):
    model, photos, config = run
    generator = torch.get_rng_state()
    loader = cached_features(model, photos, config)
    assert torch.equal(generator, torch.get_rng_state())
    assert cache_file(config) == loader.file
    monkeypatch.setattr(training.feature_cache, "_encoded", no_encoding)
    capsys.readouterr()
    again = cached_features(model, photos, config)
    assert torch.equal(torch.stack([again(photo) for photo in photos]), expected_features(model, photos))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["zeros", "bit", "cut", "end", "old"])
def test_a_damaged_file_is_made_again(run, capsys, damage):
    model, photos, config = run
    file = cached_features(model, photos, config).file
    content = bytearray(file.read_bytes())
    sound = bytes(content)
    if damage == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif damage == "bit":
        content[1000] ^= 4
    elif damage == "end":
        content[-1] ^= 1
    else:
        del content[-1 if damage == "cut" else -(4 * len(photos) + len(training.feature_cache.END)) :]
    file.write_bytes(content)
    loader = cached_features(model, photos, config)
    assert file.read_bytes() == sound
    assert torch.equal(loader(photos[2]), expected_features(model, photos)[2])
    error = capsys.readouterr().err
    assert f"{file}: " in error
    assert "all photos are encoded again" in error


def test_damage_during_the_run_is_a_sentence(run):
    model, photos, config = run
    loader = cached_features(model, photos, config)
    content = bytearray(loader.file.read_bytes())
    content[6 * loader.crop_bytes - 1] ^= 1
    loader.file.write_bytes(content)
    assert torch.equal(loader(photos[4]), expected_features(model, photos)[4])
    with pytest.raises(UserError, match=r"the features of .*5\.png are damaged: delete the file and start again"):
        loader(photos[5])
    loader.file.write_bytes(content[:100])
    with pytest.raises(UserError, match=r"0\.png are damaged"):
        loader(photos[0])
    loader.file.unlink()
    with pytest.raises(UserError, match="No such file"):
        loader(photos[0])


def test_a_writer_that_is_overtaken_takes_the_other_file(run, monkeypatch):
    """The second run begins and ends while the first is encoding."""
    model, photos, config = run
    encoded = training.feature_cache._encoded
    overtaken = []

    def slow(*arguments):
        if not overtaken:
            overtaken.append(True)
            overtaken.append(cached_features(model, photos, config).file.stat().st_mtime_ns)
        yield from encoded(*arguments)

    monkeypatch.setattr(training.feature_cache, "_encoded", slow)
    loader = cached_features(model, photos, config)
    assert cache_file(config).stat().st_mtime_ns == overtaken[1]
    assert torch.equal(loader(photos[1]), expected_features(model, photos)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="the processes are forked, to share the model")
def test_two_processes_fill_one_cache_at_the_same_time(run):
    model, photos, config = run
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()

    def fill():
        barrier.wait()
        loader = cached_features(model, photos, config)
        results.put([loader(photo).float().sum().item() for photo in photos])

    writers = [context.Process(target=fill) for _ in range(2)]
    for writer in writers:
        writer.start()
    sums = [results.get(timeout=60) for _ in writers]
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sums[0] == sums[1] == [item.float().sum().item() for item in expected_features(model, photos)]
    assert cache_file(config).suffix == ".bf16"


class FullDisk(io.FileIO):
    """A file that takes some bytes and then no more."""

    def write(self, data):
        if self.tell() + len(data) > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(run, monkeypatch):
    model, photos, config = run
    monkeypatch.setattr(training.feature_cache, "open", FullDisk, raising=False)
    with pytest.raises(UserError, match=r"\.bf16: No space left on device; 'data.feature_cache' must be .* MiB that"):
        cached_features(model, photos, config)
    folder = training.feature_cache.resolve_path(config.data.feature_cache)
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(training.feature_cache, "_encoded", no_encoding)  # it is known before
    with pytest.raises(UserError, match="No space left on device"):
        cached_features(model, photos, config)


def test_a_wrong_folder_is_a_sentence(configure, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", "long" * 100):
        config = configure(data={"cache_features": True, "feature_cache": str(tmp_path / name)})
        photos, _, _ = read_split(config)
        with pytest.raises(UserError, match="'data.feature_cache' must be a folder that can be written to"):
            cached_features(MMultiModal.from_config(config, "cpu"), list(photos.values()), config)


def test_leftovers_of_killed_runs_go_and_those_of_live_ones_stay(run):
    model, photos, config = run
    file = cached_features(model, photos, config).file
    old, new = file.with_name(f"{file.name}.1-a.tmp"), file.with_name(f"{file.name}.2-b.tmp")
    other = file.with_name("0123456789abcdef.bf16.1-c.tmp")  # of data that have changed since
    for temporary in (old, new, other):
        temporary.write_bytes(b"part")
    for temporary in (old, other):
        os.utime(temporary, (0, 0))
    file.unlink()
    cached_features(model.train(), photos, config)
    assert sorted(file.parent.iterdir()) == [file, new]
    assert not model.training  # else a dropout in the encoder would be in the features


def test_a_broken_photo_is_named(run, tmp_path):
    model, photos, config = run
    (tmp_path / "empty.png").write_bytes(b"")
    photos[3] = dataclasses.replace(photos[3], path=tmp_path / "empty.png")
    with pytest.raises(UserError, match=r"empty\.png: the file is empty"):
        cached_features(model, photos, config)


def test_a_dry_run_encodes_nothing_and_uses_what_is_there(run, monkeypatch):
    model, _, config = run
    with monkeypatch.context() as patch:
        patch.setattr(training.feature_cache, "_encoded", no_encoding)
        train, _ = build_datasets(config, model, *read_split(config), encode=False)
    assert next(iter(train[0].photos.values())).ndim == 4  # pixels
    build_datasets(config, model, *read_split(config))
    train, val = build_datasets(config, model, *read_split(config), encode=False)
    assert next(iter(train[0].photos.values())).ndim == 3  # features
    assert len(val) == 0


def test_text_alone_needs_no_features(run):
    model, _, config = run
    cached_features(model, [], config)
    assert cached_features(model, [], config, encode=False) is not None


def test_an_encoder_that_was_trained_before_has_features_of_its_own(configure, tmp_path):
    """`train.init_from` brings its weights, and a learning rate of 0 leaves them as they are."""
    parts = {"projector": {"lr": 1e-2}, "vision": {"mode": "full", "lr": 0}}
    config = configure(data={"cache_features": True, "feature_cache": str(tmp_path / "features")}, parts=parts)
    photos = list(read_split(config)[0].values())
    model = MMultiModal.from_config(config, "cpu")
    first = cached_features(model, photos, config)
    assert cached_features(model, photos, config).file == first.file
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(2)
    second = cached_features(model, photos, config)
    assert second.file != first.file
    assert torch.equal(torch.stack([second(photo) for photo in photos]), expected_features(model, photos))
