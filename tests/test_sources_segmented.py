"""Shenzhen, Montgomery, JSRT and SIIM-ACR: from the publisher's layout through the manifest into a packed store."""
import re
import shutil

import numpy as np
import pytest
import torch

import anatcxr.data.nlm  # noqa: F401  registers its adapters
import anatcxr.data.segmented  # noqa: F401
import official_segmented as official
from anatcxr.data.images import resize
from anatcxr.data.manifest import ChestXrays
from anatcxr.data.packing import pack, verify_store
from anatcxr.data.segmented import rle_decode, rle_encode
from anatcxr.data.sources import SOURCES, SourceError, make_manifest
from anatcxr.data.table import ManifestError, read_manifest


def prepare(name, src, dst, split="official", **options):
    "The table, and the data set packed at 32 pixels with masks and boxes."
    table = read_manifest(make_manifest(name, src, dst, split, partial=True, **options))
    pack(dst, dst / "store", 32, "squash", workers=0)
    assert verify_store(dst / "store") == len(table) and (dst / "store/quarantine.csv").read_text().count("\n") == 1
    return table, ChestXrays(dst / "store"), ChestXrays(dst)


def notes(dst): return " ".join(re.findall(r"- note \d+: (.*)", (dst / "card.md").read_text()))


def close(a, b, enough=.99): return np.corrcoef(np.asarray(a).ravel(), np.asarray(b).ravel())[0, 1] > enough


def dice(a, b): return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def without_row(path, k):
    "Remove the k-th line of a text."
    lines = path.read_bytes().replace(b"\r", b"\n").splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:k] + lines[k + 1:]))


def test_all_are_registered():
    for name in ("shenzhen", "montgomery", "jsrt", "siim"):
        card = SOURCES[name].card
        assert card.name == name and card.problems and "SRC" in card.download and {"official", "random"} <= {*card.splits}


# Shenzhen

def test_shenzhen(tmp_path):
    table, store, files = prepare("shenzhen", official.make_shenzhen(tmp_path / "src", masks=14), tmp_path / "dst")
    assert table.id.tolist() == [official.shenzhen_name(k) for k in range(20)]
    assert table.label.tolist() == ["normal", "tb"] * 10 and table.y_TB.tolist() == [0, 1] * 10
    assert list(zip(table.sex, table.age)) == [official.READ[k % 4] for k in range(20)]
    assert table.reading[1] == "PTB in the right upper field" and table["view"].isna().tolist() == [k % 4 == 2 for k in range(20)]
    assert table.patient.nunique() == 20 and table.split.value_counts().to_dict() == {"train": 14, "test": 4, "val": 2}
    assert "drawn by chance" in notes(tmp_path / "dst") and not list((tmp_path / "dst").glob("masks/*"))  # all masks fit as they are
    for k in range(20):
        p = official.person(k, "consolidation", 64)
        assert close(files[k]["image"], p.image) and store[k]["image"].shape == (1, 32, 32)
        assert ("lung" in store.masks(k)) == (k < 14)
        if k < 14: assert torch.equal(files.masks(k)["lung"], p.masks["lung_left"] | p.masks["lung_right"])
    assert (table.source.unique(), table.redistribution.unique()) == (["shenzhen"], ["research"])


def test_shenzhen_lists(tmp_path):
    lists = {"train": range(10), "valid": range(10, 14), "test": range(14, 18)}
    table, *_ = prepare("shenzhen", official.make_shenzhen(tmp_path / "src", lists=lists), tmp_path / "dst")
    assert dict(zip(table.id, table.split)) == {official.shenzhen_name(k): s for s, ks in zip(("train", "val", "test"), lists.values()) for k in ks}
    assert "left out, being in no list: CHNCXR_0019_0, CHNCXR_0020_1" in notes(tmp_path / "dst")
    chance = read_manifest(make_manifest("shenzhen", tmp_path / "src", tmp_path / "dst", "random", partial=True))
    assert len(chance) == 20


def test_shenzhen_without_masks(tmp_path):
    table, store, _ = prepare("shenzhen", official.make_shenzhen(tmp_path / "src", masks=0), tmp_path / "dst")
    assert "mask_lung" not in table and store.masks(0) == {} and "no lung masks" in notes(tmp_path / "dst")


@pytest.mark.parametrize("spoil, says", [
    (lambda src: shutil.rmtree(src / "ChinaSet_AllFiles/ClinicalReadings"), r"- readings \(\*\*/ClinicalReadings/CHNCXR_\*\.txt\)\n- what to do: fetch ChinaSet_AllFiles\.zip"),
    (lambda src: (src / "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png").rename(src / "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_2.png"), "names that say no label: CHNCXR_0001_2"),
    (lambda src: shutil.copy(src / "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png", src / "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_1.png"), "numbers with both labels: CHNCXR_0001"),
    (lambda src: official.text(src / "lists/ShenzenCXR_test_data.txt", "CHNCXR_0015_0.png,1\n"), "labels that the names contradict: CHNCXR_0015_0.png"),
    (lambda src: official.text(src / "lists/ShenzenCXR_test_data.txt", "CHNCXR_0015_0.png,tb\n"), "labels that are no numbers"),
    (lambda src: official.text(src / "lists/ShenzenCXR_test_data.txt", "CHNCXR_0001_0.png,0\n"), "in more than one of them: CHNCXR_0001_0"),
    (lambda src: official.text(src / "lists/ShenzenCXR_test_data.txt", "CHNCXR_0015_0.png,0\nCHNCXR_0015_0.png,0\n"), "occur more than once"),
    (lambda src: official.text(src / "lists/ShenzenCXR_test_data.txt", "MCUCXR_0015_0.png,0\n"), "unknown images MCUCXR_0015_0"),
    (lambda src: (src / "lists/ShenzenCXR_valid_data.txt").unlink(), r"without ShenzenCXR_valid_data\.txt \(val\)"),
])
def test_shenzhen_refuses(tmp_path, spoil, says):
    spoil(official.make_shenzhen(tmp_path / "src", lists={"train": range(10), "valid": range(10, 14), "test": range(14, 20)}))
    with pytest.raises(ManifestError, match=says): make_manifest("shenzhen", tmp_path / "src", tmp_path / "dst", partial=True)
    assert not (tmp_path / "dst/manifest.csv").exists()


def test_shenzhen_counts(tmp_path):
    official.make_shenzhen(tmp_path / "src", masks=3)
    with pytest.raises(SourceError, match=r"normal: 10, expected 326\n- tuberculosis: 10, expected 336\n- readings: 20, expected 662\n- lung masks: 3, expected 566"):
        make_manifest("shenzhen", tmp_path / "src", tmp_path / "dst")


# Montgomery

@pytest.mark.parametrize("swap", [False, True])
def test_montgomery(tmp_path, swap):
    lists = {"train": range(12), "val": range(12, 15), "test": range(15, 20)}
    table, store, files = prepare("montgomery", official.make_montgomery(tmp_path / "src", swap=swap, lists=lists), tmp_path / "dst")
    assert table.split.value_counts().to_dict() == {"train": 12, "test": 5, "val": 3}
    assert table.age.tolist() == [20 + k for k in range(20)] and table.sex.tolist() == ["FM"[k % 3 > 1] for k in range(20)] and (table["view"] == "PA").all()
    assert f"leftMask lies on the {'left' if swap else 'right'} of the image in 9 of 9" in notes(tmp_path / "dst")
    for k in range(20):
        p, m = official.person(k, "consolidation", 64), files.masks(k)
        for side in ("left", "right"): assert torch.equal(m[f"lung_{side}"], p.masks[f"lung_{side}"])
        assert torch.equal(m["lung"], p.masks["lung_left"] | p.masks["lung_right"]) and {*store.masks(k)} == {"lung", "lung_left", "lung_right"}


def test_montgomery_goes_on_where_it_stopped(tmp_path):
    official.make_montgomery(tmp_path / "src", 8)
    run = lambda: make_manifest("montgomery", tmp_path / "src", tmp_path / "dst", partial=True, val=.25)
    run()
    drawn = sorted((tmp_path / "dst/masks").glob("*.png"))
    assert len(drawn) == 8
    before = [p.read_bytes() for p in drawn]
    drawn[3].unlink()
    times = [p.stat().st_mtime_ns for p in drawn if p.exists()]
    run()
    assert [p.read_bytes() for p in drawn] == before and [p.stat().st_mtime_ns for p in drawn if p != drawn[3]] == times
    assert not list((tmp_path / "dst/masks").glob(".*"))


@pytest.mark.parametrize("spoil, says", [
    (lambda src: shutil.rmtree(src / "MontgomerySet/ManualMask/rightMask"), "- right masks"),
    (lambda src: official.save(src / "MontgomerySet/ManualMask/leftMask/MCUCXR_0002_1.png", np.eye(64, 32, dtype=bool)), r"a mask of \(64, 32\) pixels for an image of \(64, 64\)"),
    (lambda src: [(src / f"MontgomerySet/ManualMask/leftMask/{official.montgomery_name(k)}.png").write_bytes((src / f"MontgomerySet/ManualMask/rightMask/{official.montgomery_name(k)}.png").read_bytes())
                  for k in range(0, 8, 2)] + [(src / f"MontgomerySet/ManualMask/rightMask/{official.montgomery_name(k)}.png").write_bytes(
                      (src / f"MontgomerySet/ManualMask/leftMask/{official.montgomery_name(1)}.png").read_bytes()) for k in range(0, 8, 2)], "do not lie on one side"),
])
def test_montgomery_refuses(tmp_path, spoil, says):
    spoil(official.make_montgomery(tmp_path / "src", 8))
    with pytest.raises(SourceError, match=says): make_manifest("montgomery", tmp_path / "src", tmp_path / "dst", partial=True, val=.25)


# JSRT

def check_jsrt(table, store, files, size):
    for i, name in enumerate(table.id):
        k = int(name[-3:]) - 1
        p, m = official.person(k, "nodule", size), files.masks(i)
        assert close(resize(files[i]["image"], size, "squash"), p.image)
        for organ in official.ORGANS.values(): assert dice(shrunk(m[organ], size), p.masks[organ]) > .98
        assert torch.equal(m["lung"], m["lung_left"] | m["lung_right"]) and torch.equal(m["clavicle"], m["clavicle_left"] | m["clavicle_right"])
        labels, boxes = files.boxes(i)
        assert labels == (["nodule"] if p.box else []) == store.boxes(i)[0]
        if p.box:
            scale, (x0, y0, x1, y1) = len(m["lung"]) / size, p.box
            assert (boxes[0].view(2, 2).mean(0) / scale - torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2])).abs().max() < .1
            assert abs(float(boxes[0, 2] - boxes[0, 0]) / scale - (x1 - x0)) < .5  # the diameter is in whole mm
        assert {*store.masks(i)} == {*official.ORGANS.values(), "lung", "clavicle"}


def shrunk(mask, size): return mask[len(mask) // size // 2::len(mask) // size, len(mask) // size // 2::len(mask) // size]


def test_jsrt_raw(tmp_path):
    table, store, files = prepare("jsrt", official.make_jsrt(tmp_path / "src", 6), tmp_path / "dst", val=.5)
    check_jsrt(table, store, files, 128)
    assert "lungs are brighter than the heart in all of 6 films looked at: inverted" in notes(tmp_path / "dst")
    film = files[0]["image"]
    assert film.shape == (1, 2048, 2048) and len(film.unique()) > 256  # 12 bits are kept


@pytest.mark.parametrize("bright", [False, True])
def test_jsrt_png(tmp_path, bright):
    src = official.make_jsrt(tmp_path / "src", form="png", bright=bright)
    table, store, files = prepare("jsrt", src, tmp_path / "dst", val=.5)
    check_jsrt(table, store, files, 128)
    assert len([*(tmp_path / "dst/images").glob("*.png")]) == (0 if bright else 8)
    rows = table.set_index("id")
    assert rows.label.to_dict() == {official.jsrt_name(k): ("normal", "nodule")[k % 2] for k in range(8)}
    assert rows.loc["JPCLN002"].isna().age and rows.loc["JPCLN004"].age == 43 and rows.loc["JPCLN004"].sex == "F"
    assert rows.condition.dropna().to_dict() == {"JPCLN002": "malignant", "JPCLN004": "benign", "JPCLN006": "malignant", "JPCLN008": "benign"}
    assert rows.y_Malignant.dropna().to_dict() == {"JPCLN002": 1, "JPCLN004": 0, "JPCLN006": 1, "JPCLN008": 0}
    assert rows.reading["JPCLN002"] == "r.upper lobe lung cancer (adenocarcinoma)"
    assert {i for i, s in rows.split.items() if s == "test"} == {official.jsrt_name(k) for k in range(4, 8)}  # the second fold
    assert {*rows.split} == {"train", "val", "test"} and "fold 1 of SCR" in notes(tmp_path / "dst")


def test_jsrt_lists(tmp_path):
    lists = {"train": range(5), "val": range(5, 6), "test": range(6, 8)}
    table, *_ = prepare("jsrt", official.make_jsrt(tmp_path / "src", form="png", lists=lists), tmp_path / "dst")
    assert dict(zip(table.id, table.split)) == {official.jsrt_name(k): s for s, ks in lists.items() for k in ks}
    random = read_manifest(make_manifest("jsrt", tmp_path / "src", tmp_path / "dst", "random", partial=True, val=.25, test=.25))
    assert random.split.value_counts().to_dict() == {"train": 4, "val": 2, "test": 2}


def test_jsrt_output_inside_the_download(tmp_path):
    "What an earlier call has written is no film of the publisher."
    src = official.make_jsrt(tmp_path / "src", form="png")
    first, again = (read_manifest(make_manifest("jsrt", src, src / "made", partial=True, val=.5)) for _ in range(2))
    assert first.equals(again)


def test_jsrt_other_size_draws_anew(tmp_path):
    "Masks of an earlier call in another size are not reused."
    for form in ("png", "IMG"):
        shutil.rmtree(tmp_path / "src", ignore_errors=True)
        make_manifest("jsrt", official.make_jsrt(tmp_path / "src", 6, form=form), tmp_path / "dst", partial=True, val=.5)
    assert {tuple(ChestXrays(tmp_path / "dst").masks(i)["heart"].shape) for i in range(6)} == {(2048, 2048)}


@pytest.mark.parametrize("spoil, says", [
    (lambda src: shutil.rmtree(src / "Clinical_Information"), r"- nodules \(.*\n- others \(.*\n- what to do: fetch the films"),
    (lambda src: [shutil.rmtree(p) for p in src.glob("**/heart")], r"- heart \(\*\*/heart/JPC\*\)"),
    (lambda src: without_row(src / "Clinical_Information/CLNDAT_EN.txt", 0), "without the films JPCLN002"),
    (lambda src: official.text(src / "Clinical_Information/CNNDAT_EN.TXT", "JPCNN001.IMG 40 male non-nodule\r" * 2), "more than once: JPCNN001"),
    (lambda src: official.text(src / "Clinical_Information/CNNDAT_EN.TXT", "JPCNN001.IMG old male non-nodule\r"), "age is no number: old of JPCNN001"),
    (lambda src: official.text(src / "Clinical_Information/CNNDAT_EN.TXT", "<html>\r"), "not as published, for instance '<html>'"),
    (lambda src: shutil.copy(src / "All247images/JPCNN001.png", src / "JPCNN001.png"), "the same film twice"),
    (lambda src: official.save(src / "All247images/JPCNN001.png", 255 - np.asarray(official.Image.open(src / "All247images/JPCNN001.png"))), "polarity: .* 7 of 8 films"),
    (lambda src: (src / "scratch/fold1/masks/heart/JPCNN001.gif").write_bytes(b"GIF89a"), "damaged, or no GIF"),
    (lambda src: official.text(src / "lists/train.txt", "JPCLN002\n"), r"without val\.txt \(val\), test\.txt \(test\)"),
])
def test_jsrt_refuses(tmp_path, spoil, says):
    spoil(official.make_jsrt(tmp_path / "src", form="png"))
    with pytest.raises(SourceError, match=says): make_manifest("jsrt", tmp_path / "src", tmp_path / "dst", partial=True, val=.5)


def test_jsrt_refuses_other_raw_files(tmp_path):
    src = official.make_jsrt(tmp_path / "src", 2)
    film = src / "All247images/JPCNN001.IMG"
    raw = film.read_bytes()
    for data, says in ((raw[:-2], "8388606 bytes, expected 8388608"), (np.frombuffer(raw, ">u2").astype("<u2").tobytes(), "big-endian")):
        film.write_bytes(data)
        with pytest.raises(SourceError, match=says): make_manifest("jsrt", src, tmp_path / "dst", partial=True)


# SIIM-ACR

def test_siim(tmp_path):
    table, store, files = prepare("siim", official.make_siim(tmp_path / "src"), tmp_path / "dst", side=64, headers=True, val=.2)
    assert sorted(table.id) == sorted(map(official.siim_name, range(20))) and "1 DICOM files without a row" in notes(tmp_path / "dst")
    for i, name in enumerate(table.id):
        k = int(name.split(".")[-1])
        assert table.label[i] == ("no pneumothorax", "pneumothorax")[k % 2] and table.y_Pneumothorax[i] == k % 2
        assert table.patient[i] == f"siim:who{k // 2}" and table.sex[i] == "FM"[k // 2 % 2] and table["view"][i] == ("PA", "AP")[k % 2]
        assert np.isnan(table.age[i]) if k == 0 else table.age[i] == 20 + k
        assert np.array_equal(files.masks(i)["pneumothorax"].numpy(), official.siim_mask(k, 64))
        assert close(files[i]["image"], official.person(k, "pneumothorax", 64).image) and "pneumothorax" in store.masks(i)
    assert len([*(tmp_path / "dst/masks").glob("*.png")]) == 11  # ten and the empty one
    assert "10 for 20 images" in notes(tmp_path / "dst") and "1 ages above 120" in notes(tmp_path / "dst")
    alone = read_manifest(make_manifest("siim", tmp_path / "src", tmp_path / "dst", "random", partial=True, side=64))
    assert alone.patient.nunique() == 20 and "its own patient" in notes(tmp_path / "dst")


LISTS = {"train": range(12), "val": range(10, 16), "test": (11, 14, *range(16, 20)), "train_10": (3, 11), "train_1": (3,)}


def test_siim_released_leaks(tmp_path):
    src = official.make_siim(tmp_path / "src", lists=LISTS)
    leaky = make_manifest("siim", src, tmp_path / "leaky", "released", partial=True, side=64)
    with pytest.raises(ManifestError, match="patients in more than one split"): read_manifest(leaky)
    with pytest.raises(ManifestError, match="patients in more than one split"): pack(leaky, tmp_path / "no", 32, "squash", workers=0)
    table = read_manifest(leaky, allow_leaks=True)
    number = table.id.str.partition("@")[0].str.split(".").str[-1].astype(int)
    assert {s: sorted(number[table.split == s]) for s in ("train", "val", "test")} == {s: sorted(LISTS[s]) for s in ("train", "val", "test")}
    assert {(k, i.partition("@")[2]) for k, i in zip(number, table.id) if "@" in i} == {(10, "val"), (11, "val"), (11, "test"), (14, "test")}
    assert sorted(number[table.fraction_10]) == [3, 11] and sorted(number[table.fraction_1]) == [3] and (table.split[table.fraction_10] == "train").all()
    pack(leaky, tmp_path / "store", 32, "squash", workers=0, allow_leaks=True)
    with pytest.raises(ManifestError, match="more than one split"): ChestXrays(tmp_path / "store")
    store, files = (ChestXrays(p, allow_leaks=True) for p in (tmp_path / "store", tmp_path / "leaky"))
    for i in range(len(files)): assert np.array_equal(files.masks(i)["pneumothorax"].numpy(), official.siim_mask(number[i], 64))
    card = (tmp_path / "leaky/card.md").read_text()
    assert "images in train and val: 2 of 478" in card and "images in train and test: 1 of 494" in card and "images in val and test: 2 of 124" in card and "images in train_10 and test: 1 of 49" in card


def test_siim_dedup(tmp_path):
    src = official.make_siim(tmp_path / "src", lists=LISTS)
    table, *_ = prepare("siim", src, tmp_path / "dst", "released", side=64, dedup=True)
    number = table.id.str.split(".").str[-1].astype(int)
    assert {s: sorted(number[table.split == s]) for s in ("train", "val", "test")} == {"train": [*range(10)], "val": [10, 12, 13, 15], "test": [11, 14, 16, 17, 18, 19]}
    assert "2 rows left train" in notes(tmp_path / "dst") and "2 rows left val" in notes(tmp_path / "dst") and sorted(number[table.fraction_10]) == [3]


def test_siim_second_stage(tmp_path):
    table, *_ = prepare("siim", official.make_siim(tmp_path / "src", name="stage_2_train.csv"), tmp_path / "dst", side=64, rle="stage_2_train.csv")
    assert len(table) == 20
    with pytest.raises(SourceError, match="images: 20, expected 12047\n- pneumothorax: 10, expected 2669"): make_manifest("siim", tmp_path / "src", tmp_path / "dst", side=64, rle="stage_2_train.csv")


@pytest.mark.parametrize("old, new, says", [
    ("EncodedPixels", "Pixels", "without column EncodedPixels"),
    (" -1\n", "\n", "empty cells in rows 2"),
    (" -1\n", " 5\n", rf"{re.escape(official.siim_name(0))}: run lengths: 1 numbers, expected pairs"),
    (" -1\n", " 5 four\n", "expected whole numbers"),
    (" -1\n", f" {64 * 64 - 1} 2\n", "within 64 x 64"),
])
def test_siim_refuses_spoilt_runs(tmp_path, old, new, says):
    official.make_siim(tmp_path / "src", 6)
    (path := tmp_path / "src/siim/train-rle.csv").write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SourceError, match=says): make_manifest("siim", tmp_path / "src", tmp_path / "dst", partial=True, side=64, val=.34, test=.34)
    assert not (tmp_path / "dst/manifest.csv").exists()


@pytest.mark.parametrize("spoil, options, says", [
    (lambda src: (src / "siim/train-rle.csv").unlink(), {}, r"- run lengths \(\*\*/train-rle\.csv\)"),
    (lambda src: shutil.rmtree(src / "lists"), {"split": "released"}, r"without train\.txt, val\.txt, test\.txt; fetch"),
    (lambda src: (src / "lists/val.txt").unlink(), {"split": "released"}, r"without val\.txt \(val\)"),
    (lambda src: official.text(src / "lists/val.txt", "1.2.3\n"), {"split": "released"}, r"does not have: 1\.2\.3"),
    (lambda src: official.text(src / "lists/val.txt", f"{official.siim_name(3)}\n" * 2), {"split": "released"}, "more than once"),
    (lambda src: shutil.copytree(src / "siim/dicom-images-train/1.2.0", src / "again"), {}, f"more than once: {re.escape(official.siim_name(0))}"),
    (lambda src: None, {"dedup": True}, "only for split='released'"),
    (lambda src: None, {"rle": "train.csv"}, r"expected train-rle\.csv or stage_2_train\.csv"),
])
def test_siim_refuses(tmp_path, spoil, options, says):
    spoil(official.make_siim(tmp_path / "src", lists=LISTS))
    with pytest.raises(ManifestError, match=says): make_manifest("siim", tmp_path / "src", tmp_path / "dst", **{"partial": True, "side": 64} | options)


def test_siim_missing_images_are_counted(tmp_path):
    official.make_siim(tmp_path / "src", lists=LISTS)
    shutil.rmtree(tmp_path / "src/siim/dicom-images-train/1.2.11")
    table = read_manifest(make_manifest("siim", tmp_path / "src", tmp_path / "dst", "released", partial=True, side=64), allow_leaks=True)
    assert not table.id.str.startswith(official.siim_name(11)).any() and "images: 19 of 10675" in (tmp_path / "dst/card.md").read_text()


# run lengths

def test_run_lengths_against_pixel_by_pixel():
    rng = np.random.default_rng(0)
    for k in range(60):
        h, w = rng.integers(1, 30, 2)
        mask = rng.random((h, w)) < rng.random()
        if k < 3: mask[:] = k % 2
        text = rle_encode(mask)
        assert text == official.run_lengths(mask)
        assert np.array_equal(rle_decode(text, h, w), mask) and np.array_equal(rle_decode(f"  {text} ", h, w), mask)


def test_run_lengths_of_the_challenge():
    "The published example of a run that moves to the next column: 23 pixels, 996 further on 33."
    mask = rle_decode("387620 23 996 33 986 43")
    assert mask.shape == (1024, 1024) and mask.sum() == 23 + 33 + 43
    columns, (start, row) = np.flatnonzero(mask.any(0)), divmod(387620, 1024)
    assert columns.tolist() == [start, start + 1, start + 2] and np.flatnonzero(mask[:, start]).tolist() == [*range(row, row + 23)]
    assert np.flatnonzero(mask[:, start + 1])[0] == row + 23 + 996 - 1024


@pytest.mark.parametrize("text", ["", "3", "1 2 3", "0 0", "-1 2", "1 -2", "1.0 2", "x y", "0 10", "9 1", "4294967296 1", "18446744073709551616 1"])
def test_run_lengths_malformed(text):
    with pytest.raises(SourceError, match="run lengths"): rle_decode(text, 3, 3)
