"The adapters of MedMNIST and their downloader, against a server on this machine."
import hashlib
import json
import pickle
import re
import shutil
import threading
import time
import tracemalloc
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from anatcxr.data import medmnist
from anatcxr.data.manifest import ChestXrays
from anatcxr.data.medmnist import CHESTMNIST, DownloadError, download
from anatcxr.data.packing import pack
from anatcxr.data.sources import SOURCES, SourceError, make_manifest
from anatcxr.data.table import read_manifest
from official_medmnist import CHEST, SPLITS, file_name, make_chestmnist, make_pneumoniamnist, write

BODY = np.random.default_rng(0).bytes(2_500_000)
MD5 = "md5:" + hashlib.md5(BODY).hexdigest()


class Publisher(BaseHTTPRequestHandler):
    "The path's first word says how to behave; `server.files` has the files, `server.asked` what was asked for."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        kind = re.match(r"/(\w*)", self.path)[1]
        body, start = self.server.files.get(self.path, BODY), int((self.headers["Range"] or "bytes=0-")[6:-1])
        if kind == "absent": return self.send_error(404)
        if kind == "busy": return self.send_error(503)
        if kind == "away": return self.answer(302, {"Location": self.server.away, "Content-Length": "0"})
        if kind == "silent": time.sleep(1.5); return
        if kind == "garbage": self.wfile.write(b"what?\r\n\r\n"); self.close_connection = True; return
        if kind == "chunked":
            self.answer(200, {"Transfer-Encoding": "chunked"})
            for i in range(0, len(body), 1 << 19): piece = body[i:i + (1 << 19)]; self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if "whole" in self.path: self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True
            return
        if kind == "norange": start = 0
        if start >= len(body): return self.send_error(416)
        ranged = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.answer(206 if start else 200, {"Content-Length": str(len(body) - start)} | ranged)
        if kind == "stalls": self.wfile.write(body[:1000]); time.sleep(1.5); self.close_connection = True; return
        end = start + (len(body) - start) // 2 if kind == "cut" else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = kind == "cut"

    def answer(self, code, headers):
        self.send_response(code)
        for k, v in headers.items(): self.send_header(k, v)
        self.end_headers()

    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Publisher)
    s.daemon_threads, s.asked, s.files = True, [], {}
    s.url = f"http://127.0.0.1:{s.server_port}"
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .01}, daemon=True)
    thread.start()
    yield s
    s.shutdown(); s.server_close(); thread.join()


def left(folder):
    "What is there, apart from locks."
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


# the downloader

@pytest.mark.parametrize("kind", ["whole", "norange", "chunked/whole"])
@pytest.mark.parametrize("checksum", [MD5, "sha256:" + hashlib.sha256(BODY).hexdigest(), ""])
def test_a_whole_file(server, tmp_path, kind, checksum):
    path = download(f"{server.url}/{kind}", tmp_path / "new/a.npz", checksum)
    assert path.read_bytes() == BODY and left(path.parent) == ["a.npz"]
    assert download(f"{server.url}/{kind}", path, checksum) == path and len(server.asked) == 1  # nobody is asked again


def test_interrupted_and_resumed(server, tmp_path):
    "Each call gets half of what is missing; the last one the rest, and no byte twice."
    for n in (1_250_000, 1_875_000):
        with pytest.raises(DownloadError, match=f"broke after {n} of 2500000 bytes"): download(f"{server.url}/cut", tmp_path / "a", MD5)
        assert left(tmp_path) == [".a.part"] and (tmp_path / ".a.part").read_bytes() == BODY[:n]
    assert download(f"{server.url}/whole", tmp_path / "a", MD5).read_bytes() == BODY
    assert [r for _, r in server.asked] == [None, "bytes=1250000-", "bytes=1875000-"] and left(tmp_path) == ["a"]


def test_interrupted_by_the_user(server, tmp_path, monkeypatch):
    pieces = medmnist._pieces
    def two(*args):
        for i, p in enumerate(pieces(*args)):
            if i == 2: raise KeyboardInterrupt
            yield p
    monkeypatch.setattr(medmnist, "_pieces", two)
    with pytest.raises(KeyboardInterrupt): download(f"{server.url}/whole", tmp_path / "a", MD5)
    monkeypatch.undo()
    assert (tmp_path / ".a.part").stat().st_size == 2 << 20
    assert download(f"{server.url}/whole", tmp_path / "a", MD5).read_bytes() == BODY
    assert server.asked[1][1] == f"bytes={2 << 20}-"


@pytest.mark.parametrize("part", [BODY[:1000], BODY, BODY + b"more", b"x" * len(BODY)], ids=["begun", "whole", "longer", "other"])
@pytest.mark.parametrize("kind", ["whole", "norange"])
def test_whatever_part_is_there(server, tmp_path, kind, part):
    "A part that is the whole file is not asked for again; one that is longer than the file begins anew."
    (tmp_path / ".a.part").write_bytes(part)
    assert download(f"{server.url}/{kind}", tmp_path / "a", MD5).read_bytes() == BODY
    assert left(tmp_path) == ["a"] and bool(server.asked) == (part != BODY)


def test_a_part_of_another_file_is_found_out(server, tmp_path):
    (tmp_path / ".a.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="it was deleted"): download(f"{server.url}/whole", tmp_path / "a", MD5)
    assert left(tmp_path) == []
    assert download(f"{server.url}/whole", tmp_path / "a", MD5).read_bytes() == BODY


def test_without_a_checksum_nothing_is_resumed(server, tmp_path):
    with pytest.raises(DownloadError, match="broke after"): download(f"{server.url}/cut", tmp_path / "a")
    assert download(f"{server.url}/whole", tmp_path / "a").read_bytes() == BODY
    assert [r for _, r in server.asked] == [None, None]


def test_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match=f"what came has {MD5}, expected md5:00; it was deleted"): download(f"{server.url}/whole", tmp_path / "a", "md5:00")
    assert left(tmp_path) == []
    (tmp_path / "mine").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="move it away"): download(f"{server.url}/whole", tmp_path / "mine", MD5)
    assert (tmp_path / "mine").read_bytes() == b"mine" and len(server.asked) == 1


@pytest.mark.parametrize("kind, says", [("absent", "the server answers 404 Not Found"), ("busy", "answers 503"), ("garbage", "cannot be reached"),
                                        ("silent", "timed out"), ("stalls", "the line broke"), ("chunked/half", "the line broke")])
def test_what_a_server_may_do(server, tmp_path, kind, says):
    with pytest.raises(DownloadError, match=says) as e: download(f"{server.url}/{kind}", tmp_path / "a", MD5, timeout=.5)
    assert isinstance(e.value, SourceError) and isinstance(e.value, ValueError)
    for part in (f"{server.url}/{kind}", str(tmp_path / "a"), "fetch it by hand", "--data phantom"): assert part in str(e.value)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
    assert not (tmp_path / "a").exists()


def test_no_server_at_all(server, tmp_path):
    server.shutdown(); server.server_close()
    with pytest.raises(DownloadError, match="the network cannot be reached") as e: download(f"{server.url}/whole", tmp_path / "a", MD5)
    assert e.value.url == f"{server.url}/whole" and e.value.path == tmp_path / "a" and left(tmp_path) == []
    with pytest.raises(DownloadError, match="the network cannot be reached"): download("https://no-such-host.invalid/a", tmp_path / "a", MD5, timeout=5)


@pytest.mark.parametrize("url", ["http://medmnist.com/a", "ftp://medmnist.com/a", "file:///etc/hostname", "http://localhost.example.com/a", "a.npz"])
def test_https_only(tmp_path, url):
    with pytest.raises(DownloadError, match="expected an https address"): download(url, tmp_path / "a")


def test_redirects_do_not_leave_https(server, tmp_path):
    server.away = f"{server.url}/whole"
    assert download(f"{server.url}/away", tmp_path / "a", MD5).read_bytes() == BODY
    for away in ("http://medmnist.com/a", "ftp://medmnist.com/a", "file:///etc/hostname"):
        server.away = away
        with pytest.raises(DownloadError, match=r"which is not https|answers 302"): download(f"{server.url}/away", tmp_path / "b", MD5)
    redirects, request = medmnist._Redirects(), medmnist.urllib.request.Request("https://zenodo.org/a", headers={"Range": "bytes=5-"})
    with pytest.raises(medmnist.urllib.error.URLError, match="not https"): redirects.redirect_request(request, None, 302, "", {}, "http://localhost/a")
    assert redirects.redirect_request(request, None, 302, "", {}, "https://files.zenodo.org/a").get_header("Range") == "bytes=5-"


def test_a_full_disk_and_an_unknown_checksum(server, tmp_path, monkeypatch):
    monkeypatch.setattr(medmnist.shutil, "disk_usage", lambda p: namedtuple("U", "free")(1 << 20))
    with pytest.raises(DownloadError, match="needs 2 MiB, 1 MiB are free"): download(f"{server.url}/whole", tmp_path / "a", MD5)
    with pytest.raises(SourceError, match="another algorithm of hashlib"): download(f"{server.url}/whole", tmp_path / "a", "crc32:0")
    assert len(server.asked) == 1


def test_two_at_once_download_once(server, tmp_path):
    res = []
    threads = [threading.Thread(target=lambda: res.append(download(f"{server.url}/whole", tmp_path / "a", MD5))) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(res) == 3 and len(server.asked) == 1 and (tmp_path / "a").read_bytes() == BODY


# the adapters

MAKE = {"chestmnist": make_chestmnist, "pneumoniamnist": make_pneumoniamnist}


@pytest.mark.parametrize("size", [28, 64, 128, 224])
@pytest.mark.parametrize("name", MAKE)
def test_all_the_way_to_a_store(tmp_path, name, size):
    parts = (12, 5, 7) if size < 128 else (3, 2, 2)
    arrays, shown = MAKE[name](tmp_path / "src/deep/er", size, parts)
    table = read_manifest(make_manifest(name, tmp_path / "src", tmp_path / "m", partial=True, pixels=size))
    images, y = (np.concatenate([arrays[f"{s}_{what}"] for s in SPLITS]) for what in ("images", "labels"))
    assert table.label.tolist() == shown and table.split.tolist() == [s for s, n in zip(SPLITS, parts) for _ in range(n)]
    assert (table.filter(regex="^y_").to_numpy() == y).all() and table.id.is_unique and table.patient.nunique() == len(table)
    assert (table.redistribution == "ok").all() and table.id[parts[0]] == "val:000000"
    for f, x in zip(table.file, images):
        with Image.open(f) as im: assert (im.format, im.mode) == ("PNG", "L") and (np.asarray(im) == x).all()
    data = ChestXrays(pack(tmp_path / "m", tmp_path / "store", 32, workers=0))
    assert data.table.label.tolist() == shown and len(data) == len(images)
    assert (data.table.view == "AP").all() if name == "pneumoniamnist" else data.table.view.isna().all()
    same = ChestXrays(tmp_path / "m", size).batch([0, len(data) - 1])[0]
    assert ((same[:, 0] * 255).round().byte().numpy() == images[[0, -1]]).all()


def test_columns_are_those_of_chestxray14(tmp_path):
    "The publisher's fourteen, in his order, under the names that NIH gave them."
    make_chestmnist(tmp_path)
    table = read_manifest(make_manifest("chestmnist", tmp_path, tmp_path / "m", partial=True, pixels=28))
    columns = [c.removeprefix("y_").lower() for c in table if c.startswith("y_")]
    assert [c.removesuffix("_thickening") for c in columns] == list(CHEST)
    assert "Effusion|Hernia" in CHESTMNIST.labels[2] + "|" + CHESTMNIST.labels[13]
    card = json.loads((tmp_path / "m/card.json").read_text())
    assert card["facts"]["files with the published md5"] == "0 of 1" and card["facts"]["train images"] == "12 of 78468"


def test_counts_are_checked(tmp_path):
    make_chestmnist(tmp_path); make_pneumoniamnist(tmp_path)
    with pytest.raises(SourceError) as e: make_manifest("pneumoniamnist", tmp_path, tmp_path / "m", pixels=28)
    for what in ("train images: 12, expected 4708", "val images: 5, expected 524", "test images: 7, expected 624", "files with the published md5: 0, expected 1",
                 "train and val normal: 6, expected 1349", "train and val pneumonia: 11, expected 3883", "test normal: 2, expected 234"):
        assert what in str(e.value)
    with pytest.raises(SourceError, match="train images: 12, expected 78468"): make_manifest("chestmnist", tmp_path, tmp_path / "m", pixels=28)


def test_more_than_published_is_refused(tmp_path, monkeypatch):
    make_pneumoniamnist(tmp_path)
    monkeypatch.setitem(medmnist._COUNTS, "pneumoniamnist", {"train": 11, "val": 524, "test": 624})
    with pytest.raises(SourceError, match="train images: 12, expected 11"): make_manifest("pneumoniamnist", tmp_path, tmp_path / "m", partial=True, pixels=28)


def test_the_whole_data_set_passes_as_such(tmp_path, monkeypatch):
    "With the published counts and sums no partial=True is needed, and the card says nothing of a part."
    make_pneumoniamnist(tmp_path)
    monkeypatch.setitem(medmnist._COUNTS, "pneumoniamnist", {"train": 12, "val": 5, "test": 7})
    monkeypatch.setattr(medmnist, "_SOURCE_COUNTS", {"train and val normal": 6, "train and val pneumonia": 11, "test normal": 2, "test pneumonia": 5})
    monkeypatch.setitem(medmnist._MD5, "pneumoniamnist.npz", hashlib.md5((tmp_path / "pneumoniamnist.npz").read_bytes()).hexdigest())
    make_manifest("pneumoniamnist", tmp_path, tmp_path / "m", pixels=28)
    assert "partial" not in json.loads((tmp_path / "m/card.json").read_text())["facts"]


def test_it_downloads_what_is_not_there(server, tmp_path, monkeypatch):
    "Into the source folder, under the publisher's name; the address and sum are those of the size."
    make_pneumoniamnist(tmp_path / "made", 64)
    body = (tmp_path / "made/pneumoniamnist_64.npz").read_bytes()
    server.files["/files/pneumoniamnist_64.npz?download=1"] = body
    monkeypatch.setattr(medmnist, "_RECORD", server.url)
    with pytest.raises(DownloadError, match="it was deleted"): make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=64)
    monkeypatch.setitem(medmnist._MD5, "pneumoniamnist_64.npz", hashlib.md5(body).hexdigest())
    assert len(read_manifest(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=64))) == 24
    assert left(tmp_path / "src") == ["pneumoniamnist_64.npz"] and len(server.asked) == 2
    make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=64)
    assert len(server.asked) == 2


def test_without_network_it_says_what_to_do(server, tmp_path, monkeypatch):
    server.shutdown(); server.server_close()
    monkeypatch.setattr(medmnist, "_RECORD", server.url)
    with pytest.raises(DownloadError) as e: make_manifest("chestmnist", tmp_path / "src", tmp_path / "m")
    assert str(tmp_path / "src/chestmnist_224.npz") in str(e.value) and not (tmp_path / "m/manifest.csv").exists()
    with pytest.raises(SourceError, match=r"chestmnist_64\.npz"): make_manifest("chestmnist", tmp_path / "src", tmp_path / "m", pixels=64, download=False)
    with pytest.raises(SourceError, match="no such folder"): make_manifest("chestmnist", tmp_path / "none", tmp_path / "m", download=False)
    with pytest.raises(SourceError, match="expected official"): make_manifest("chestmnist", tmp_path / "src", tmp_path / "m", split="random")
    for size in (96, "224", None):
        with pytest.raises(SourceError, match="expected 28, 64, 128 or 224"): make_manifest("chestmnist", tmp_path / "src", tmp_path / "m", pixels=size)


@pytest.mark.parametrize("change, says", [
    ({"val_images": None, "test_labels": None}, "without val_images, test_labels; found"),
    ({"val_labels": np.full((5, 14), 2, np.uint8)}, r"val_labels cannot be read \(uint8 \(5, 14\), expected 0 and 1 in 14 columns"),
    ({"val_labels": np.full((5, 14), np.nan)}, "expected 0 and 1"),
    ({"val_labels": np.zeros((5, 1), np.uint8)}, "expected 0 and 1 in 14 columns"),
    ({"val_labels": np.zeros(5, np.uint8)}, "expected 0 and 1 in 14 columns"),
    ({"val_labels": np.zeros((4, 14), np.uint8)}, r"val_images cannot be read \(uint8 \(5, 28, 28\), expected uint8 \(4, 28, 28\)"),
    ({"val_labels": np.array([["x"] * 14] * 5)}, "val_labels cannot be read"),
    ({"val_labels": np.array([[None] * 14] * 5)}, "Object arrays cannot be loaded"),
    ({"train_images": np.zeros((12, 28, 28))}, "float64"),
    ({"train_images": np.zeros((12, 28, 28, 3), np.uint8)}, r"uint8 \(12, 28, 28, 3\)"),
    ({"train_images": np.asfortranarray(np.zeros((12, 28, 28), np.uint8))}, "train_images cannot be read"),
    ({"train_images": np.zeros((12, 32, 32), np.uint8)}, r"uint8 \(12, 32, 32\), expected uint8 \(12, 28, 28\)")],
    ids=lambda v: "" if isinstance(v, str) else "+".join(v))
def test_wrong_arrays_are_named(tmp_path, change, says):
    arrays, _ = make_chestmnist(tmp_path)
    write(tmp_path / "chestmnist.npz", {k: v for k, v in (arrays | change).items() if v is not None})
    with pytest.raises(SourceError, match=says): make_manifest("chestmnist", tmp_path, tmp_path / "m", partial=True, pixels=28)
    assert not (tmp_path / "m/manifest.csv").exists()


@pytest.mark.parametrize("compressed", [True, False])
def test_damage_is_refused_or_harmless(tmp_path, compressed):
    "The file cut off or with a byte changed, all along it: a `SourceError`, or the same images and labels as before."
    arrays, shown = make_pneumoniamnist(tmp_path / "good", parts=(3, 2, 2))
    raw = write(tmp_path / "src/pneumoniamnist.npz", arrays, compressed).read_bytes()
    images, refused, rng = np.concatenate([arrays[f"{s}_images"] for s in SPLITS]), 0, np.random.default_rng(0)
    spoilt = [raw[:n] for n in range(0, len(raw), len(raw) // 40)]
    spoilt += [raw[:i] + bytes([raw[i] ^ int(rng.integers(1, 256))]) + raw[i + 1:] for i in rng.integers(0, len(raw), 150)]
    for k, data in enumerate(spoilt):
        (tmp_path / "src/pneumoniamnist.npz").write_bytes(data)
        try: table = read_manifest(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / f"m{k}", partial=True, pixels=28))
        except SourceError: refused += 1; continue
        assert table.label.tolist() == shown
        for f, x in zip(table.file, images): assert (np.asarray(Image.open(f)) == x).all()
    assert refused > 150 if compressed else refused > 100


def test_killed_and_called_again(tmp_path, monkeypatch):
    "Whole files stay as they are, those that are missing or empty are written, nothing half-written is taken for a file."
    arrays, _ = make_pneumoniamnist(tmp_path / "src")
    save, n = Image.Image.save, 0
    def dies(self, f, *args, **kw):
        nonlocal n
        n += 1
        if n == 6: f.write_bytes(b"half"); raise KeyboardInterrupt
        save(self, f, *args, **kw)
    monkeypatch.setattr(Image.Image, "save", dies)
    with pytest.raises(KeyboardInterrupt): make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=28)
    monkeypatch.undo()
    folder = next((tmp_path / "m/images").iterdir()) / "train"
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.png")}
    assert sorted(before) == [f"{i:06d}.png" for i in range(5)] and not (tmp_path / "m/manifest.csv").exists()
    (folder / "000002.png").write_bytes(b"")
    table = read_manifest(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=28))
    assert [n for n, t in before.items() if (folder / n).stat().st_mtime_ns != t] == ["000002.png"]
    for f, x in zip(table.file, np.concatenate([arrays[f"{s}_images"] for s in SPLITS])): assert (np.asarray(Image.open(f)) == x).all()
    assert not list(folder.glob(".*"))


def test_images_of_another_archive_are_not_mixed_in(tmp_path):
    make_pneumoniamnist(tmp_path / "src")
    first = read_manifest(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=28))
    arrays, _ = make_pneumoniamnist(tmp_path / "src", seed=300)
    second = read_manifest(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True, pixels=28))
    assert not set(first.file) & set(second.file)
    assert (np.asarray(Image.open(second.file[0])) == arrays["train_images"][0]).all()


@pytest.mark.parametrize("compressed", [True, False])
def test_memory_does_not_grow_with_the_file(tmp_path, compressed):
    "60 MB of images, written to the archive and read from it a few at a time."
    arrays, _ = make_pneumoniamnist(tmp_path / "small", 224, (4, 1, 1))
    one, n = arrays["train_images"], 1200
    arrays["train_labels"] = np.tile(np.uint8([[0], [1]]), (n // 2, 1))
    (tmp_path / "src").mkdir()
    with zipfile.ZipFile(tmp_path / "src/pneumoniamnist_224.npz", "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED, compresslevel=1) as z:
        for k, v in arrays.items():
            with z.open(f"{k}.npy", "w") as f:
                if k != "train_images": np.lib.format.write_array(f, v); continue
                np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (n, 224, 224)})
                for _ in range(n // len(one)): f.write(one.tobytes())
    tracemalloc.start()
    try:
        labels = medmnist._labels(tmp_path / "src/pneumoniamnist_224.npz", "train_labels", 1)
        for k, block in enumerate(medmnist._image_blocks(tmp_path / "src/pneumoniamnist_224.npz", "train_images", n, 224)):
            assert (block == np.tile(one, (len(block) // 4, 1, 1))).all()
        if compressed: assert len(make_manifest("pneumoniamnist", tmp_path / "src", tmp_path / "m", partial=True).read_text().splitlines()) == n + 3
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert len(labels) == n and (k + 1) * 64 >= n and peak < 25e6, peak


def test_cards():
    for name in MAKE:
        card, options = SOURCES[name].card, SOURCES[name].options()
        assert options == {"pixels": 224, "download": True} and card.splits == ("official",) and card.redistribution == "ok"
        assert {file_name(name, s) for s in (28, 64, 128, 224)} == {k for k in medmnist._MD5 if k.startswith(name)}
        assert f"{name}_224.npz" in card.download and "zenodo.org/records/10519652" in card.download
    assert sum(medmnist._COUNTS["chestmnist"].values()) == 112_120 and sum(medmnist._COUNTS["pneumoniamnist"].values()) == 5_856
    assert sum(medmnist._SOURCE_COUNTS.values()) == 5_856 and all(re.fullmatch("[0-9a-f]{32}", m) for m in medmnist._MD5.values())
