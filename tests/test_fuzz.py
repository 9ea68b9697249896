"""2,000 damaged files, always the same: each is refused with an `ImageError`, or read as what its bytes say; nothing else may happen."""
import io
import json
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="needs pydicom: pip install 'anatcxr[dicom]'")

import pydicom.encaps  # noqa: E402
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402

from anatcxr.data.dicom import dicom_header  # noqa: E402
from anatcxr.data.images import ImageError, read_image  # noqa: E402
from anatcxr.data.phantom import phantom  # noqa: E402
from anatcxr.data.table import shared_data  # noqa: E402

SIDE = 128
PHANTOM_FILES = {"png8.png": 200, "png16.png": 200, "jpeg.jpg": 200,
                 "native.dcm": 100, "table.dcm": 100, "rle.dcm": 70, "jpeg2000.dcm": 70, "lossless.dcm": 30, "jpegls.dcm": 30}
REAL_FILES = {"nih_00000001_000_mono2_implicitVR.dcm": 250, "barre_CR-MONO1-10-chest_no_preamble.dcm": 250,
              "rsna_mono2_jpegbaseline.dcm": 250, "rsna_FAKE_mono1_tag_only.dcm": 250}
assert sum((PHANTOM_FILES | REAL_FILES).values()) == 2000
LIMIT = 30  # seconds without a sign of life, for one file


# The sources: small, whole, in the encodings of real ones

def jpeg_of(a: np.ndarray) -> bytes:
    Image.fromarray(a).save(f := io.BytesIO(), "JPEG", quality=90)
    return f.getvalue()


def make_film(path: Path, stored: np.ndarray, bits: int, **elements) -> Path:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID, ds.ViewPosition = uid.ComputedRadiographyImageStorage, "1.2.3", "p1", "PA"
    ds.Modality, ds.SamplesPerPixel, ds.PhotometricInterpretation = "CR", 1, "MONOCHROME2"
    ds.Rows, ds.Columns, ds.BitsAllocated = *stored.shape, 8 * stored.itemsize
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, 0
    ds.add_new("PixelData", "OW", stored.tobytes())
    for k, v in elements.items(): setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)
    return path


def compress_film(path: Path, source: Path, syntax: uid.UID, stream: bytes) -> None:
    ds = pydicom.dcmread(source)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = syntax, pydicom.encaps.encapsulate([stream])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path)


def gdcm_stream(source: Path, kind: str) -> bytes:
    import gdcm
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(source.with_suffix(".encoded")))
    assert writer.Write()
    return pydicom.encaps.get_frame(pydicom.dcmread(source.with_suffix(".encoded")).PixelData, 0, number_of_frames=1)


def make_phantom_files(folder: Path) -> None:
    x = phantom(3, SIDE).image[0].numpy()
    u8, u12, u16 = (np.round(x * (2 ** b - 1)).astype(np.uint8 if b == 8 else np.uint16) for b in (8, 12, 16))
    Image.fromarray(u8).save(folder / "png8.png")
    Image.fromarray(u16).save(folder / "png16.png")
    (folder / "jpeg.jpg").write_bytes(jpeg_of(u8))
    source = make_film(folder / "native.dcm", u12, 12, WindowCenter=2000, WindowWidth=4000, RescaleSlope=1, RescaleIntercept=-24,
                       PixelPaddingValue=0)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [1024, 512, 10])
    item.add_new("LUTData", "OW", np.arange(1024, dtype="<u2").tobytes())
    make_film(folder / "table.dcm", u12, 12, VOILUTSequence=[item])
    ds = pydicom.dcmread(source)
    ds.compress(uid.RLELossless)
    ds.save_as(folder / "rle.dcm")
    Image.fromarray(u12).save(f := io.BytesIO(), "JPEG2000", no_jp2=True, irreversible=False)
    compress_film(folder / "jpeg2000.dcm", source, uid.JPEG2000Lossless, f.getvalue())
    compress_film(folder / "lossless.dcm", source, uid.JPEGLosslessSV1, gdcm_stream(source, "JPEGLosslessProcess14_1"))
    compress_film(folder / "jpegls.dcm", source, uid.JPEGLSLossless, gdcm_stream(source, "JPEGLSLossless"))


def shrink_real_file(source: Path, out: Path) -> None:
    "The same elements in the same encoding, with every eighth pixel (every third of the small one)."
    ds = pydicom.dcmread(source, force=True)
    if bare := "TransferSyntaxUID" not in ds.file_meta: ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    step = ds.Rows // SIDE
    small = np.ascontiguousarray(ds.pixel_array[::step, ::step])
    ds.Rows, ds.Columns = small.shape
    compressed = ds.file_meta.TransferSyntaxUID.is_encapsulated
    ds.PixelData = pydicom.encaps.encapsulate([jpeg_of(small)]) if compressed else small.tobytes()
    if not bare: return ds.save_as(out)
    del ds.file_meta
    ds.preamble = None
    pydicom.dcmwrite(out, ds, implicit_vr=True, little_endian=True, enforce_file_format=False)


# Damage: cut off, bytes changed anywhere, or the format's own parts changed

def truncate(rng, data: bytes) -> bytes:
    return data[:rng.integers(len(data))]


def flip(rng, data: bytes) -> bytes:
    data = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 9)): data[at] = rng.integers(256)
    return bytes(data)


def mangle_elements(rng, data: bytes) -> bytes:
    "One or two DICOM elements: their value, length, value representation or number; or one is removed or doubled."
    numbers = (0, 1, 2, 3, 7, 8, 10, 12, 16, 32, 64, 127, 128, 129, 255, 256, 512, 1024, 4096, 65535)
    texts = (b"-1", b"0", b"1e9", b"nan", b"MONOCHROME1", b"RGB", b"1.2.840.10008.1.2.4.90", b"\xff\xff")
    for _ in range(rng.integers(1, 3)):
        try: ds = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True)
        except Exception: return data  # the first change was enough
        raw = [e for part in (ds.file_meta, ds) for e in part._dict.values() if isinstance(e, pydicom.dataelem.RawDataElement)]
        if not raw: return data
        e = raw[rng.integers(len(raw))]
        long = not e.is_implicit_VR and e.VR in ("OB", "OW", "SQ", "UN", "UT")
        start, end = e.value_tell - (12 if long else 8), e.value_tell + min(e.length, len(data))
        head, value, rest = data[start:e.value_tell], data[e.value_tell:end], data[end:]
        what = rng.integers(7)
        if what == 0 and value: value = flip(rng, value)
        elif what == 1: value = value[:2] if len(value) != 2 else struct.pack("<H", numbers[rng.integers(len(numbers))])
        elif what == 2: head = head[:4] + flip(rng, head[4:])
        elif what == 3: head = flip(rng, head[:4]) + head[4:]
        elif what == 4: head, value = b"", b""
        elif what == 5: rest = head + value + rest
        elif value: value = rng.choice(texts)[:len(value)].ljust(len(value))
        data = data[:start] + head + value + rest
    return data


def mangle_chunks(rng, data: bytes) -> bytes:
    "A PNG chunk gets another name, content (with its right checksum) or length; or is removed, doubled or moved."
    chunks, at = [], 8
    while at < len(data):
        n = int.from_bytes(data[at:at + 4])
        chunks.append([n, data[at + 4:at + 8], data[at + 8:at + 8 + n]])
        at += 12 + n
    i, what = rng.integers(len(chunks)), rng.integers(6)
    if what == 0: chunks[i][1] = flip(rng, chunks[i][1])
    elif what == 1 and chunks[i][2]: chunks[i][2] = flip(rng, chunks[i][2])
    elif what == 2: chunks[i][0] = int(rng.integers(1 << 32))
    elif what == 3: del chunks[i]
    elif what == 4: chunks.insert(i, list(chunks[i]))
    else: chunks.insert(rng.integers(len(chunks)), chunks.pop(i))
    return data[:8] + b"".join(struct.pack(">I", n) + k + d + struct.pack(">I", zlib.crc32(k + d)) for n, k, d in chunks)


def mangle_markers(rng, data: bytes) -> bytes:
    "A JPEG segment gets another marker, length or content; or is removed or doubled."
    at, segments = 2, []
    while data[at + 1] != 0xDA:
        segments.append((at, at + 2 + int.from_bytes(data[at + 2:at + 4])))
        at = segments[-1][1]
    segments.append((at, at + 2 + int.from_bytes(data[at + 2:at + 4])))
    start, end = segments[rng.integers(len(segments))]
    head, body, what = data[start:start + 4], data[start + 4:end], rng.integers(5)
    if what == 0: head = bytes([255, rng.integers(0xC0, 0x100)]) + head[2:]
    elif what == 1: head = head[:2] + rng.bytes(2)
    elif what == 2: body = flip(rng, body)
    return data[:start] + (b"" if what == 3 else (head + body) * (1 + (what == 4))) + data[end:]


def damage(name: str, data: bytes, k: int) -> tuple[str, bytes]:
    rng = np.random.default_rng([zlib.crc32(name.encode()), k])
    kind = ("truncated", "flipped", "mangled")[k % 3]
    if kind == "truncated": return kind, truncate(rng, data)
    if kind == "flipped": return kind, flip(rng, data)
    stream = data.find(b"\xff\xd8\xff")  # of a JPEG, alone or in a DICOM file
    if name.endswith(".png"): return kind, mangle_chunks(rng, data)
    if name.endswith(".jpg") or stream > 0 and k % 2: return kind, data[:stream] + mangle_markers(rng, data[stream:])
    return kind, mangle_elements(rng, data)


# The same bytes read in another way: other decoders, and the standard's formulas pixel by pixel

def decode_again(data: bytes) -> np.ndarray:
    import torch
    from torchvision.io import decode_image
    if data.startswith(b"\xff\xd8"): data += b"\xff\xd9"  # it wants an end mark even where every pixel is there
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0].numpy()


def unpack_bits(data: bytes) -> bytes:
    out, i = bytearray(), 0
    while i < len(data) - 1:
        n = data[i]
        if n < 128: out += data[i + 1:i + 2 + n]; i += 2 + n
        elif n > 128: out += data[i + 1:i + 2] * (257 - n); i += 2
        else: i += 1
    return bytes(out)


def decode_frame(ds) -> np.ndarray | None:  # (H,W) unsigned bits; None: nobody else here decodes it
    shape, word, syntax = (ds.Rows, ds.Columns), ds.BitsAllocated // 8, ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return np.frombuffer(ds.PixelData[:shape[0] * shape[1] * word], f"{'<' if syntax.is_little_endian else '>'}u{word}").reshape(shape)
    frame = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit): return decode_again(frame)
    if syntax in (uid.JPEG2000, uid.JPEG2000Lossless):
        import openjpeg
        return openjpeg.decode(frame).astype(f"u{word}")
    if syntax == uid.RLELossless:
        n, *starts = struct.unpack("<16I", frame[:64])
        ends = [*starts[1:n], len(frame)]
        planes = [np.frombuffer(unpack_bits(frame[a:b])[:shape[0] * shape[1]], np.uint8).reshape(shape) for a, b in zip(starts, ends)]
        return sum(p.astype(np.uint16) << 8 * (n - 1 - i) for i, p in enumerate(planes))


def read_film_again(data: bytes) -> np.ndarray | None:
    ds = pydicom.dcmread(io.BytesIO(data), force=True)
    if not ds.file_meta.get("TransferSyntaxUID"): ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    if (raw := decode_frame(ds)) is None: return None
    bits, signed = ds.BitsStored, ds.PixelRepresentation == 1
    full = raw.astype(np.int64)
    stored = full & (1 << bits) - 1
    if signed: stored -= (stored >> bits - 1) << bits; full -= (full >> ds.BitsAllocated - 1) << ds.BitsAllocated
    pad = np.zeros(stored.shape, bool)
    if ds.get("PixelPaddingValue") is not None:
        v = ds.PixelPaddingValue
        v = [w for w in (v, v - 65536, v + 65536) if (-32768 <= w < 32768 if signed else 0 <= w < 65536)][0]
        pad = (stored == v) | (full == v)
    slope, intercept = (float(ds.get(k) if ds.get(k) is not None else d) for k, d in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    x = stored * slope + intercept
    if ds.get("VOILUTSequence"):
        item = ds.VOILUTSequence[0]
        n, first, depth = item.LUTDescriptor
        y = np.frombuffer(item.LUTData, "<u2")[np.clip(np.rint(x) - first, 0, (n or 65536) - 1).astype(int)] / (2 ** depth - 1)
    elif ds.get("WindowCenter") is not None:
        c, w = (float(np.ravel(ds[k].value)[0]) for k in ("WindowCenter", "WindowWidth"))
        y = ((x - (c - .5)) / (w - 1) + .5).clip(0, 1) if w > 1 else (x > c - .5).astype(float)
    else:
        ends = [v * slope + intercept for v in ((-1 << bits - 1, (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1))]
        if bits > 8: ends = x[~pad].min(), x[~pad].max()
        y = (x - min(ends)) / (max(ends) - min(ends))
    return np.where(pad, 0, 1 - y if ds.PhotometricInterpretation == "MONOCHROME1" else y)


def read_again(name: str, data: bytes) -> np.ndarray | None:
    if name.endswith(".dcm"): return read_film_again(data)
    a = decode_again(data)
    return a / np.iinfo(a.dtype).max


# One process reads, and writes a line before and after each file; another watches it

def same_meaning(a: Path, b: Path) -> bool:
    "Whether two films say the same about how their stored values become grey."
    def meaning(h): return h.photometric, h.bits, h.signed, h.rescale, h.windows, h.function, h.padding
    return meaning(dicom_header(a)) == meaning(dicom_header(b))


def stream_of(data: bytes) -> bytes:
    "What begins with the first mark of a JPEG stream; nothing where there is none."
    return data[max(0, data.find(b"\xff\xd8\xff")):] if b"\xff\xd8\xff" in data else b""


def judge(source: Path, path: Path, original: np.ndarray, data: bytes) -> str:
    try: x = read_image(path)
    except ImageError as e: return "refused" if e.reason and e.remedy and e.path == path else f"WRONG: incomplete error {e!r}"
    except Exception as e: return f"WRONG: {type(e).__name__}: {e}"
    if x.ndim != 3 or len(x) != 1 or not (x.min() >= 0 and x.max() <= 1): return f"WRONG: {tuple(x.shape)} from {x.min()} to {x.max()}"
    x = x[0].numpy()
    if x.shape == original.shape and np.array_equal(x, original): return "as before"
    try: again = read_again(path.name, data)
    except Exception as e: return f"WRONG: read, but not in another way ({type(e).__name__}: {e})"
    if again is not None and not (x.shape == again.shape and np.abs(x - again).max() < 2.5 / 255):
        by = np.abs(x - again).max() if x.shape == again.shape else (x.shape, again.shape)
        return f"WRONG: another reading differs, by {by}"
    if x.shape == original.shape and (path.suffix != ".dcm" or same_meaning(source, path)):
        # after damage within a JPEG stream all may be nonsense, the same to both decoders; still it is not inverted
        r, least = np.corrcoef(x.ravel(), original.ravel())[0, 1], -.5 if stream_of(data) != stream_of(source.read_bytes()) else 0
        if not r > least: return f"WRONG: polarity, correlation with the original {r:.2f}"
    return "as its bytes say" if again is not None else "the right way round"


def work(folder: Path, first: int) -> None:
    "Judge every file from number `first` on."
    warnings.simplefilter("ignore")
    originals = {}
    with (folder / "log").open("a", buffering=1) as log:
        for i, (name, k) in enumerate(json.loads((folder / "jobs").read_text())):
            if i < first: continue
            source = folder / name
            if name not in originals: originals[name] = source.read_bytes(), read_image(source)[0].numpy()
            data, original = originals[name]
            kind, bad = damage(name, data, k)
            path = folder / f"damaged{source.suffix}"
            path.write_bytes(bad)
            print(json.dumps([i, name, kind, "begun"]), file=log)
            print(json.dumps([i, name, kind, judge(source, path, original, bad)]), file=log)


def watch(folder: Path, jobs: list) -> list[list]:
    "Run the worker, again after each crash, until every file has an outcome."
    (folder / "jobs").write_text(json.dumps(jobs))
    log, done = folder / "log", []
    log.write_text("")
    while len(done) < len(jobs):
        with (folder / "stderr").open("w") as err:
            command, env = [sys.executable, __file__, str(folder), str(len(done))], {**os.environ, "OMP_NUM_THREADS": "1"}
            p = subprocess.Popen(command, stdout=err, stderr=err, env=env)
            try:
                size, since = -1, time.monotonic()
                while p.poll() is None and time.monotonic() - since < LIMIT:
                    if log.stat().st_size != size: size, since = log.stat().st_size, time.monotonic()
                    time.sleep(.02)
                end = "hang" if p.poll() is None else f"crash, exit {p.returncode}"
            finally:
                p.kill()
                p.wait()
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        done = [x for x in lines if x[3] != "begun"]
        if len(done) == len(jobs): break
        assert lines and lines[-1][3] == "begun", (folder / "stderr").read_text()[-3000:]
        with log.open("a") as f: print(json.dumps([*lines[-1][:3], f"WRONG: {end}"]), file=f)
        done.append([*lines[-1][:3], f"WRONG: {end}"])
    return done


def report(outcomes: list[list]) -> None:
    count = Counter((name, kind, what if what[0] != "W" else "WRONG") for _, name, kind, what in outcomes)
    for name in dict.fromkeys(o[1] for o in outcomes):
        for kind in ("truncated", "flipped", "mangled"):
            row = {what: n for (a, b, what), n in count.items() if (a, b) == (name, kind)}
            print(f"{name:42} {kind:10}", ", ".join(f"{n} {what}" for what, n in sorted(row.items())))


def check(folder: Path, files: dict[str, int]) -> None:
    start = time.monotonic()
    outcomes = watch(folder, [(name, k) for name, n in files.items() for k in range(n)])
    report(outcomes)
    print(f"{len(outcomes)} files in {time.monotonic() - start:.0f} s")
    assert [o[0] for o in outcomes] == list(range(sum(files.values())))
    assert not [o for o in outcomes if o[3].startswith("WRONG")]
    for name in files:  # neither refuses nor accepts everything
        some = {o[3] for o in outcomes if o[1] == name}
        assert "refused" in some and len(some) > 1, name


def test_damaged_phantoms(tmp_path):
    for name in ("gdcm", "openjpeg"): pytest.importorskip(name, reason=f"needs {name}: pip install 'anatcxr[dicom]'")
    make_phantom_files(tmp_path)
    check(tmp_path, PHANTOM_FILES)


def test_damaged_real_films(tmp_path):
    if shared_data() is None or not (shared_data() / "dicom").is_dir(): pytest.skip("no shared data with DICOM films here")
    for name in REAL_FILES: shrink_real_file(shared_data() / "dicom" / name, tmp_path / name)
    check(tmp_path, REAL_FILES)


if __name__ == "__main__": work(Path(sys.argv[1]), int(sys.argv[2]))
