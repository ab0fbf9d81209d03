"""Shards at an address give the records, the pixels and the run of the same shards on the disk."""

import json
import socket
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import process_image
from config import Data
from dataset.entries import photo_path
from dataset.records import read_records, write_records
from errors import UserError
from paths import address, resolve_path, shown_path
from tests.dataset.range_server import serve
from tests.dataset.test_shards import DIALOGUE, pack, picture
from tests.tiny import tiny_config
from training import due, loop
from training.loop import Trainer
from visual import web
from visual.photo import load_image, photo_size
from visual.shard import Member, member_of, without_place
from visual.web import WebError

pytest.importorskip("aiohttp")  # fsspec asks web servers with it


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of the folder `shards`, with its address."""
    monkeypatch.setattr(web, "WAITS", (0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "shards"
    folder.mkdir()
    first = {"a/0.png": picture(0), "a/0.json": DIALOGUE, "1.png": picture(1), "1.txt": "一只猫".encode()}
    pack(folder / "part-0.tar", first)
    pack(folder / "part-1.tar", {"2.png": picture(2), "2.json": {"caption": ["A dog.", "A small dog."]}})
    with serve(folder) as running:
        yield running


def prepare(annotations, images, **data):
    source = {"name": "packed", "format": "webdataset", "annotations": str(annotations), "images": str(images)}
    return process_image.process_sources(Data(sources=[source], **data))


@pytest.mark.parametrize("annotations", ["{url}", "{url}/", "{url}/part-{{0..1}}.tar"])
def test_records_are_those_of_the_disk(server, annotations):
    image_map, captions, [report] = prepare(annotations.format(url=server.url), server.url, check_images="open")
    local_map, local_captions, _ = prepare(server.folder, server.folder)
    assert (captions, [*image_map]) == (local_captions, [*local_map])
    assert (report.kept, report.photos) == (3, 3)
    for photo, local in zip(image_map.values(), local_map.values(), strict=True):
        assert photo["path"] == local["path"].replace(str(server.folder), server.url)
        assert load_image(photo["path"]).tobytes() == load_image(local["path"]).tobytes()


def test_a_photo_is_one_request_of_its_own_bytes(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    server.asked.clear()
    load_image(path)
    member = member_of(path)
    assert server.asked == [("/shards/part-1.tar", f"bytes={member.start - 512}-{member.start + member.size - 1}")]


def pack_photos_of(workshop, server):
    """Make the photos of the workshop the server's only shard."""
    photos, _ = read_records(workshop / "image_map.json", workshop / "captions.json")
    rows = {}
    for ID, photo in photos.items():
        rows |= {f"{ID:03}.png": photo.path.read_bytes(), f"{ID:03}.json": DIALOGUE}
    pack(server.folder / "part-0.tar", rows)
    (server.folder / "part-1.tar").unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_is_that_of_the_disk(server, workshop, tmp_path, cached):
    """Written to the record files and read again, with a worker process: the same weights, bit for bit."""
    pack_photos_of(workshop, server)
    weights = []
    for name, place in (("disk", server.folder), ("web", server.url)):
        image_map, captions, _ = prepare(place, place)
        data = {"image_map": str(tmp_path / f"{name}_map.json"), "captions": str(tmp_path / f"{name}.json")}
        write_records(image_map, captions, Path(data["image_map"]), Path(data["captions"]))
        data |= {"cache_features": cached, "feature_cache": str(tmp_path / f"features {name}")}
        train = {"max_steps": 2, "workers": 1, "output_dir": str(tmp_path / f"run {name}")}
        checkpoint = Trainer(tiny_config(workshop, data=data, train=train)).run()
        weights.append((checkpoint / "feature_proj.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_network_that_goes_ends_the_run_with_a_checkpoint(server, workshop, tmp_path, monkeypatch):
    """No photo is left out for it, and the run goes on from there when the network is back."""
    pack_photos_of(workshop, server)
    image_map, captions, _ = prepare(server.url, server.url)
    data = {"image_map": str(tmp_path / "map.json"), "captions": str(tmp_path / "captions.json")}
    write_records(image_map, captions, Path(data["image_map"]), Path(data["captions"]))

    def trainer(name, resume=None):
        train = {"max_steps": 4, "workers": 0, "micro_batch": 1, "output_dir": str(tmp_path / name)}
        return Trainer(tiny_config(workshop, data=data, train=train), resume)

    whole = trainer("whole").run()
    broken = trainer("parts")

    def after_step(run, *others):
        due.after_step(run, *others)
        server.answering = run.progress.step < 2

    monkeypatch.setattr(loop, "after_step", after_step)
    with pytest.raises(UserError, match=r"part-0\.tar cannot be fetched \(503.*\): check the address and the network"):
        broken.run()
    assert (broken.progress.step, broken.progress.unreadable) == (2, [])
    server.answering = True
    monkeypatch.undo()
    resumed = trainer("parts", "auto").run()
    name = "feature_proj.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_shard_that_changed_is_said(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    before = web.web_state(f"{server.url}/part-1.tar")
    pack(server.folder / "part-1.tar", {"0.txt": b"x" * 20_000, "2.png": picture(2)})
    web.web_state.cache_clear()
    assert web.web_state(f"{server.url}/part-1.tar") != before
    with pytest.raises(UserError, match=r"part-1\.tar/2\.png@.* run process_image\.py again"):
        load_image(path)
    (server.folder / "part-1.tar").unlink()
    with pytest.raises(UserError, match=r"^shard not found: http://127\.0\.0\.1:\d+/shards/part-1\.tar$"):
        load_image(path)


def test_a_server_that_fails_is_asked_again(server):
    image_map, _, _ = prepare(server.url, server.url)
    path = image_map["shards/part-1.tar/2.png"]["path"]
    server.failures = 2
    whole = load_image(path).tobytes()
    assert whole == load_image(path.replace(server.url, str(server.folder))).tobytes()
    server.failures = 3
    with pytest.raises(WebError, match=r"part-1\.tar cannot be fetched \(503.*\): check the address and the network"):
        load_image(path)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_preparing_asks_again_too(server, after):
    """Whatever request it is that fails: for the size of a shard, or for a part of it."""
    for number in range(4):  # several parts
        pack(
            server.folder / f"part-{number + 2}.tar", {"1.png": noise(number), "1.txt": b"noise", "2.txt": b"no photo"}
        )
    local, _, _ = prepare(server.folder, server.folder)
    asked = 0

    def fail_now_and_then(handler):
        nonlocal asked
        asked += 1
        return asked % 4 == after and not handler.send_error(503)

    server.handler.refused = fail_now_and_then
    image_map, _, _ = prepare(f"{server.url}/part-{{0..5}}.tar", server.url)
    assert [*image_map] == [*local]
    assert asked > 15


def noise(number):
    return np.random.default_rng(number).bytes(int(2.5 * web.READ_AHEAD))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (503, r"part-0\.tar cannot be fetched \(503.*\): check the address and the network"),
        (403, r"part-0\.tar: the server refuses it \(403.*\): check the address and your rights"),
        (404, r"shard not found: .*part-0\.tar"),
    ],
)
def test_a_server_that_gives_nothing(server, status, message):
    server.answering, server.status = False, status
    with pytest.raises(UserError, match=message) as caught:
        prepare(f"{server.url}/part-0.tar", server.url)
    assert isinstance(caught.value, WebError) == (status != 404)  # there is no such shard, and that is sure
    with pytest.raises(UserError, match=message):
        web.web_state(f"{server.url}/part-0.tar")


def test_no_server(monkeypatch):
    monkeypatch.setattr(web, "WAITS", (0,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/part-0.tar"
    with pytest.raises(WebError, match=r"part-0\.tar cannot be fetched \(.*\): check the address and the network"):
        prepare(url, url.rpartition("/")[0])
    with pytest.raises(WebError, match="cannot be fetched"):
        load_image(f"{url}/0.png@512+100")


def test_a_server_that_falls_silent(server, monkeypatch):
    image_map, _, _ = prepare(server.url, server.url)
    monkeypatch.setattr(web, "SILENT", 0.2)
    server.silent = 1
    with pytest.raises(WebError, match=r"cannot be fetched \(.*[Tt]imeout.*\): check the address and the network"):
        load_image(image_map["shards/part-1.tar/2.png"]["path"])


def test_what_is_wrong_with_a_photo_names_its_address(server):
    pack(server.folder / "part-1.tar", {"2.png": b"no photo", "2.txt": b"cat"})
    _, _, [report] = prepare(server.url, server.url, check_images="open")
    [(part, *_)] = report.rejected
    assert part.file == f"{server.url}/part-1.tar"
    [example] = report.dropped["photo cannot be decoded"]["examples"]
    assert f"{server.url}/part-1.tar/2.png@" in str(example)


def test_tiles_need_the_shards_on_a_disk(server):
    image_map, _, _ = prepare(server.url, server.url)
    with pytest.raises(WebError, match=r"2\.png@.*'visual\.tiles' needs the size of each photo .*: copy them, or set"):
        photo_size(image_map["shards/part-1.tar/2.png"]["path"])


def test_training_with_tiles_says_so_before_it_reads(workshop, tmp_path):
    source = {"name": "web", "format": "webdataset", "annotations": "https://host/x", "images": "https://host/x"}
    config = tiny_config(workshop, data={"sources": [source]}, train={"output_dir": str(tmp_path / "run")})
    config.visual.tiles, config.visual.image_tokens = 4, None
    with pytest.raises(UserError, match=r"^'visual\.tiles' needs the size of each photo .*: copy them, or set visual"):
        Trainer(config)


class HubFile(AbstractBufferedFile):
    """As `huggingface_hub` opens files: no ranges but by `open`, which reads ahead unless told otherwise."""

    asked: ClassVar[list] = []

    def _fetch_range(self, start, end):
        self.asked.append((start, end))
        return bytes(end - start)


class HubFiles(AbstractFileSystem):
    protocol = "hub-like"

    def _open(self, path, mode="rb", **options):
        return HubFile(self, path, mode, **options)


def test_stores_without_ranges_of_their_own_give_no_more_than_the_bytes():
    fsspec.register_implementation("hub-like", HubFiles)
    assert web.read_range("hub-like://a/part-0.tar", 1000, 3000) == bytes(2000)
    assert HubFile.asked == [(1000, 3000)]


def test_addresses_that_cannot_be_read(server):
    with pytest.raises(UserError, match=r"shard not found: .*part-2\.tar"):
        prepare(f"{server.url}/part-{{0..2}}.tar", server.url)
    with pytest.raises(UserError, match=r"lists no file that ends in \.tar: name the shards as '…/part-\{"):
        prepare(f"{server.url}/none", f"{server.url}/none")
    with pytest.raises(UserError, match=r"\{2\.\.1\} is no range"):
        prepare(f"{server.url}/part-{{2..1}}.tar", server.url)
    with pytest.raises(UserError, match=r"tar\?key=1: addresses with '\?' or '#' are not read"):
        prepare(f"{server.url}/part-0.tar?key=1", f"{server.url}/part-0.tar?key=1")
    with pytest.raises(UserError, match="give http://.*/shards as 'images'"):
        prepare(f"{server.url}/part-0.tar", server.folder)
    with pytest.raises(UserError, match=r"needs a package that is missing: Install s3fs"):
        prepare("s3://bucket/part-0.tar", "s3://bucket")
    with pytest.raises(UserError, match=r"cannot be read \(Protocol not known: nothing"):
        prepare("nothing://bucket/part-0.tar", "nothing://bucket")
    whole = (server.folder / "part-0.tar").read_bytes()
    (server.folder / "part-0.tar").write_bytes(whole[:700])
    with pytest.raises(UserError, match=r"part-0\.tar: damaged, or not an uncompressed tar file"):
        prepare(server.url, server.url)
    (server.folder / "part-0.tar").write_bytes(whole)


def test_a_server_without_ranges_is_said(server):
    image_map, _, _ = prepare(server.url, server.url)
    server.gives_ranges = False
    with pytest.raises(WebError, match=r"part-0\.tar cannot be read \(.*\): .*the server must give ranges of bytes"):
        load_image(image_map["shards/part-0.tar/1.png"]["path"])
    pack(server.folder / "part-1.tar", {"2.png": noise(0), "2.txt": b"noise", "3.png": picture(3), "3.txt": b"cat"})
    with pytest.raises(WebError, match=r"part-1\.tar cannot be read .*the server must give ranges of bytes"):
        prepare(server.url, server.url)


@pytest.mark.parametrize("name", ["annotations", "images"])
def test_only_shards_are_read_from_the_web(tmp_path, name):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"image": "0.png", "question": "?", "answer": "!"}), encoding="utf-8"
    )
    source = {"name": "s", "format": "jsonl", "annotations": str(tmp_path / "rows.jsonl"), "images": str(tmp_path)}
    with pytest.raises(UserError, match=rf"'data\.sources\.0\.{name}': https://host/x is an address: only shards"):
        process_image.process_sources(Data(sources=[source | {name: "https://host/x"}]))


def test_photos_at_an_address_have_their_texts_there(tmp_path):
    with pytest.raises(UserError, match=r"'data\.sources\.0\.images': https://host/x .* name it as 'annotations' too"):
        prepare(tmp_path, "https://host/x")


def test_what_an_address_is():
    for path in ("c:/photos/a.jpg", "/a/b.jpg", "a:b/c.jpg", "photos/http:/x.jpg", "HTTP://x"):
        assert address(path) is None
    assert address("file:///a/b.tar") is None
    for path in ("https://host/a b/c.tar", Path("https://host/a b/c.tar")):
        assert address(path) == "https://host/a b/c.tar"
        assert shown_path(path) == address(photo_path(str(path))) == "https://host/a b/c.tar"
    assert photo_path("a/b.jpg") == resolve_path("a/b.jpg")
    path = "hf://datasets/x/y/p.tar/1.png@512+7"
    assert member_of(path) == member_of(Path(path)) == Member("hf://datasets/x/y/p.tar", "1.png", 512, 7)
    assert without_place(path) == "hf://datasets/x/y/p.tar/1.png"
