"""The adapters of ChestX-ray14 and of the RSNA challenge, on small copies of the publishers' layouts."""
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anatcxr.data.manifest import ChestXrays
from anatcxr.data.nih import NIH, find_nih
from anatcxr.data.rsna import RSNA, find_rsna
from anatcxr.data.packing import pack
from anatcxr.data.sources import SOURCES, SourceError, make_manifest
from anatcxr.data.splits import label_column, read_list
from anatcxr.data.table import ManifestError, read_manifest
from official_nih import make_nih, make_rsna, write_list

Y = [label_column(n) for n in NIH.labels]


@pytest.fixture
def nih(tmp_path):
    return tmp_path / "src", make_nih(tmp_path / "src")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def manifest(name, src, allow_leaks=False, **options):
    dst = src.parent / f"made-{len(list(src.parent.iterdir()))}"
    return read_manifest(make_manifest(name, src, dst, partial=True, **options), allow_leaks), dst


def notes(dst): return [line for line in (dst / "card.md").read_text().splitlines() if line.startswith("- note")]


def test_registered():
    assert SOURCES["nih"].find is find_nih and SOURCES["rsna"].find is find_rsna


def test_nih_says_what_was_drawn(nih, tmp_path):
    src, drawn = nih
    table, dst = manifest("nih", src)
    both = drawn.merge(table, left_on="key", right_on="id", suffixes=("_d", ""), validate="1:1")
    assert len(both) == len(drawn) == len(table)
    assert (both.patient == "nih:" + both.patient_d).all() and (both.age == both.age_d).all() and (both.sex == both.sex_d).all() and (both["view"] == both.view_d).all()
    assert (both.orig_width == both.width).all() and (both.orig_height == both.height).all()
    assert (both.redistribution == "ok").all()
    for labels, text, y in zip(both.labels, both.label, both[Y].to_numpy()):
        assert text == ("|".join(n for n in NIH.labels if n in labels) or "normal")
        assert {n for n, v in zip(NIH.labels, y) if v == 1} == labels and set(y) <= {0., 1.}
    assert ((both.split == "test") == both.test).all() and {"train", "val", "test"} == set(both.split)
    assert any("drawn from train_val_list.txt" in n for n in notes(dst))

    store = pack(dst, tmp_path / "store", 32, workers=0)
    data, files = ChestXrays(store), ChestXrays(dst)
    assert len(data) == len(drawn) and not (store / "quarantine.csv").read_text().count("\n") > 1
    boxes = drawn.attrs["boxes"].groupby("key")
    for i, key in enumerate(data.table.id):
        labels, xyxy = data.boxes(i)
        assert labels == (boxes.get_group(key).label.tolist() if key in boxes.groups else [])
        if labels:
            np.testing.assert_allclose(files.boxes(i)[1], boxes.get_group(key).file_box.tolist(), atol=1e-3)
            np.testing.assert_allclose(xyxy, np.array(boxes.get_group(key).file_box.tolist()) / 2, atol=1e-3)
    assert sum(len(data.boxes(i)[0]) for i in range(len(data))) == len(drawn.attrs["boxes"]) > 4


def test_nih_at_full_size_boxes_are_the_publishers(tmp_path):
    make_nih(tmp_path / "src", people=3, size=1024)
    _, dst = manifest("nih", tmp_path / "src")
    raw = pd.read_csv(tmp_path / "src/BBox_List_2017.csv").iloc[:, 2:6].to_numpy()
    assert len(raw) and not any("scaled" in n for n in notes(dst))
    np.testing.assert_allclose(pd.read_csv(dst / "boxes.csv")[["x", "y", "w", "h"]], raw)


@pytest.mark.parametrize("options", [dict(flat=True), dict(edition="2017_v2020"), dict(sex="Sex")])
def test_nih_in_other_layouts(tmp_path, options):
    drawn = make_nih(tmp_path / "src/CXR8", **options)
    assert len(manifest("nih", tmp_path / "src")[0]) == len(drawn)


def test_nih_takes_the_later_edition(nih):
    src, drawn = nih
    text = (src / "Data_Entry_2017.csv").read_text()
    (src / "Data_Entry_2017_v2020.csv").write_text(text.replace("024Y", "77"))
    table, dst = manifest("nih", src)
    assert set(table.age[table.patient == "nih:00000004"]) == {77} and notes(dst)[0].endswith("findings from Data_Entry_2017_v2020.csv")


def test_nih_ages(nih):
    src, _ = nih
    for old, new in (("021Y", "414"), ("022Y", "018M"), ("023Y", "")): edit(src / "Data_Entry_2017.csv", old, new)
    table, dst = manifest("nih", src)
    age = table.groupby("patient").age.first()
    assert table.age.isna().sum() == 2 and age["nih:00000002"] == 1.5
    assert {"1 images with an age above 100 years, left out", "1 images without an age"} <= {n.split(": ", 1)[1] for n in notes(dst)}


def test_nih_random_split_is_by_patient_and_repeatable(nih):
    src, _ = nih
    a, b, c = (manifest("nih", src, split="random", val=.2, seed=s)[0] for s in (0, 0, 1))
    assert (a.split == b.split).all() and (a.split != c.split).any() and a.groupby("patient").split.nunique().max() == 1


def official_lists(src, drawn, val=("00000002", "00000005")):
    part = np.where(drawn.test, "test", np.where(drawn.patient.isin(val), "val", "train"))
    for s in ("train", "val", "test"): write_list(src / f"lists/Xray14_{s}_official.txt", drawn[part == s])
    return part


def test_nih_official_lists(nih):
    src, drawn = nih
    part = official_lists(src, drawn)
    table, dst = manifest("nih", src)
    assert table.set_index("id").split[drawn.key].tolist() == part.tolist()
    assert any(f"0 of {len(drawn)} label vectors" in n for n in notes(dst))
    card = (dst / "card.md").read_text()
    assert "- images of the val list: 5 of 11212" in card and "- patients of the val list: 2 of 3666" in card


def test_nih_official_lists_that_contradict(nih):
    src, drawn = nih
    official_lists(src, drawn)
    write_list(src / "lists/Xray14_val_official.txt", drawn[drawn.test])
    with pytest.raises(SourceError, match="in another part than in test_list.txt.*00000003_000.png"): manifest("nih", src)
    (src / "lists/Xray14_val_official.txt").unlink()
    with pytest.raises(SourceError, match="val .lists/Xray14_val_official.txt"): manifest("nih", src)


@pytest.mark.parametrize("prefix, pattern", [("", "NIH_{}.txt"), ("images_002/", "processed/{}.txt")])
def test_nih_released_lists(nih, prefix, pattern):
    src, drawn = nih
    n = len(drawn)
    for part, rows in {"train_list": range(n - 8), "val_list": range(n - 8, n - 4), "test_list": [*range(n - 4, n), 0]}.items():
        write_list(src / f"lists/{pattern.format(part)}", drawn.iloc[[*rows]], prefix, flip=(1, 2) if part == "train_list" else ())
    for p, rows in ((1, [3]), (10, [4, 5, 6])): write_list(src / f"lists/{pattern.format(f'train_{p}')}", drawn.iloc[rows], prefix)
    with pytest.raises(ManifestError, match="patients in more than one split: nih:00000001"): manifest("nih", src, split="released", lists=pattern)
    table, dst = manifest("nih", src, True, split="released", lists=pattern)
    assert len(table) == n + 1 and table.id[table.id.str.contains("@")].tolist() == ["00000001_000@test"]
    assert table.file.nunique() == n
    assert table.id[table.fraction_1].tolist() == [drawn.key[3]] and table.id[table.fraction_10].tolist() == drawn.key[4:7].tolist()
    assert any(f"2 of {n + 1} label vectors of the lists are not the publisher's (Pneumonia 2); these are the list's" in x for x in notes(dst))
    own, _ = manifest("nih", src, True, split="released", lists=pattern, labels="publisher")
    changed = table.y_Pneumonia != own.y_Pneumonia
    assert table.id[changed].tolist() == drawn.key[1:3].tolist() and table.label[changed].str.contains("Pneumonia").all() and not own.y_Pneumonia.any()
    assert (table.drop(columns=[*Y, "label", "file"]).fillna(0) == own.drop(columns=[*Y, "label", "file"]).fillna(0)).all(axis=None)
    write_list(src / f"lists/{pattern.format('train_1')}", drawn.iloc[[n - 1]], prefix)
    with pytest.raises(SourceError, match="not in the train list"): manifest("nih", src, split="released", lists=pattern)


def test_nih_boxes_follow_a_row_into_both_splits(nih):
    src, drawn = nih
    key = drawn.attrs["boxes"].key[0]
    for part, rows in {"train_list": drawn, "val_list": drawn[drawn.key == key], "test_list": drawn[:1]}.items(): write_list(src / f"lists/NIH_{part}.txt", rows)
    data = ChestXrays(manifest("nih", src, True, split="released")[1], allow_leaks=True)
    twice = [i for i, name in enumerate(data.table.id) if name.split("@")[0] == key]
    assert len(twice) == 2 and (data.boxes(twice[0])[1] == data.boxes(twice[1])[1]).all() and len(data.boxes(twice[0])[0]) == 2


@pytest.mark.parametrize("file, old, new, match", [
    ("Data_Entry_2017.csv", "Finding Labels", "Findings", "without column Finding Labels"),
    ("Data_Entry_2017.csv", "Patient Gender", "Who", "or Patient Sex"),
    ("Data_Entry_2017.csv", "Nodule", "Nodules", "Finding Labels other than.*_00..png .*Nodules"),
    ("Data_Entry_2017.csv", "00000002_001.png", "00000002_000.png", "more than once: 00000002_000.png"),
    ("Data_Entry_2017.csv", "00000002_001.png", "00000099_001.png", "Patient ID is not that of the image's name: 00000099_001.png"),
    ("Data_Entry_2017.csv", "00000002_001.png", "2_001.png", "not like 00000001_000.png: 2_001.png"),
    ("BBox_List_2017.csv", "Bbox [x", "left", "expected Image Index, Finding Label, Bbox"),
    ("BBox_List_2017.csv", "00000003_000.png", "00000333_000.png", "publisher's table lacks: 00000333_000"),
    ("BBox_List_2017.csv", "Pneumothorax", "Pneumo", "unknown findings: .* Pneumo"),
    ("test_list.txt", "00000003_000.png", "00000001_000.png", "none or both of .*: 00000001_000.png|none or both of .*00000001_000"),
    ("test_list.txt", "00000003_000.png", "00000003_000.png 0 1", "a name and 0 labels"),
])
def test_nih_refuses(nih, file, old, new, match):
    src, _ = nih
    edit(src / file, old, new)
    with pytest.raises(ManifestError, match=match): manifest("nih", src)


def test_nih_names_all_that_is_missing_and_counts(nih, tmp_path):
    src, drawn = nih
    with pytest.raises(SourceError, match=rf"images: {len(drawn)}, expected 112120(.|\n)*test_list.txt: \d+, expected 25596"): make_manifest("nih", src, tmp_path / "x")
    (src / "images_013").mkdir(); Image.new("L", (8, 8)).save(src / "images_013/stray.png")
    next(src.glob("images_001/images/*.png")).unlink()
    table, dst = manifest("nih", src)
    assert len(table) == len(drawn) - 1 and any("1 image files that the table does not name: stray.png" in n for n in notes(dst))
    (src / "images_014").mkdir(); (src / "images_014/stray.png").symlink_to(src / "images_013/stray.png")
    with pytest.raises(SourceError, match="more than once: stray.png"): manifest("nih", src)
    (src / "Data_Entry_2017.csv").unlink(); (src / "test_list.txt").unlink()
    with pytest.raises(SourceError, match=r"without:(.|\n)*table (.|\n)*test (.|\n)*fetch images_001"): manifest("nih", src)
    with pytest.raises(SourceError, match="expected 'list' or 'publisher'"): manifest("nih", src, labels="mine")


@pytest.fixture
def rsna(tmp_path):
    return tmp_path / "src", make_rsna(tmp_path / "src")


def test_rsna_says_what_was_drawn(rsna, tmp_path):
    src, drawn = rsna
    table, dst = manifest("rsna", src, headers=True, val=.2, test=.2)
    drawn = drawn[drawn.part == "train"]
    both = drawn.merge(table, left_on="key", right_on="id", suffixes=("_d", ""), validate="1:1")
    assert len(both) == len(drawn) == len(table)
    assert (both.patient == "nih:" + both.patient_d).all() and (both.nih_id == both.nih_id_d).all()
    assert both.label.tolist() == [RSNA.labels[k].lower() for k in both.kind]
    assert (both[[label_column(n) for n in RSNA.labels]].to_numpy() == np.eye(3)[both.kind]).all()
    old = both.age_d > 100
    assert old.sum() == 1 and both.age[old].isna().all() and (both.age == both.age_d)[~old].all() and set(both["view"]) == {"PA", "AP"} and set(both.sex) == {"F", "M"}
    assert (both.redistribution != "ok").all() and {"train", "val", "test"} == set(both.split)
    assert any("lists RSNAPneumonia_{train,val,test}.txt are not there" in n for n in notes(dst))

    store = pack(dst, tmp_path / "store", 32, workers=0)  # through DICOM
    data = ChestXrays(store)
    assert len(data) == len(drawn)
    for i, key in enumerate(data.table.id):
        row = drawn[drawn.key == key].iloc[0]
        labels, xyxy = data.boxes(i)
        assert labels == ["Lung Opacity"] * (2 if row.kind == 2 else 0)
        if labels: np.testing.assert_allclose([*xyxy[0, :2], *xyxy[1, 2:]], np.array(row.box) / 2, atol=1e-3)


def test_rsna_without_the_mapping_says_so(tmp_path):
    drawn = make_rsna(tmp_path / "src", mapping=False)
    table, dst = manifest("rsna", tmp_path / "src")
    assert table.patient.nunique() == len(table) and any("patients leak unnoticed" in n for n in notes(dst)) and "nih_id" not in table
    assert table.age.isna().all() and drawn.patient[drawn.part == "train"].nunique() < len(table)


def test_rsna_official_lists_leak_once_patients_are_known(rsna):
    src, drawn = rsna
    rows = drawn[drawn.part == "train"].reset_index(drop=True)
    (src / "lists").mkdir()
    for k, s in enumerate(("train", "val", "test")):
        (src / f"lists/RSNAPneumonia_{s}.txt").write_text("".join(f"{r.key}.png {r.kind if r.Index else 2}\n" for r in rows.itertuples() if r.Index % 3 == k))
    with pytest.raises(ManifestError, match="patients in more than one split"): manifest("rsna", src)
    table, dst = manifest("rsna", src, True)
    assert (table.set_index("id").split[rows.key] == np.array(["train", "val", "test"])[rows.index % 3]).all()
    assert any(f"1 of {len(rows)} classes of the lists are not the challenge's" in n for n in notes(dst))
    assert (table.groupby("patient").split.nunique() > 1).sum() > 2
    (src / "pneumonia-challenge-dataset-mappings_2018.json").unlink()
    assert len(manifest("rsna", src)[0]) == len(rows)  # unnoticed
    (src / "lists/RSNAPneumonia_val.txt").unlink()
    with pytest.raises(SourceError, match="val .lists/RSNAPneumonia_val.txt"): manifest("rsna", src)


def test_rsna_released_lists(rsna):
    src, drawn = rsna
    drawn = drawn.assign(split=np.where(drawn.part == "test", "test", np.where(drawn.patient > "00000009", "val", "train")))
    (src / "lists").mkdir()
    for s, rows in drawn.groupby("split"):  # each line ends with a blank, as published
        (src / f"lists/RSNA_{s}_list.txt").write_text("".join(f"stage_2_{r.part}_images/{r.key}.dcm {int(r.kind == 2)} \n" for r in rows.itertuples()))
    table, dst = manifest("rsna", src, split="released")
    both = drawn.merge(table, left_on="key", right_on="id", suffixes=("_d", ""), validate="1:1")
    assert len(table) == len(drawn) and (both.split == both.split_d).all() and (both.y_Lung_Opacity == (both.kind == 2)).all()
    tests = both[both.split == "test"]
    assert len(tests) == 4 and (tests.y_Normal.isna() == (tests.kind != 2)).all() and tests.label.map(lambda v: v == "lung opacity").tolist() == (tests.kind == 2).tolist()
    assert all("stage_2_test_images" in f for f in tests.file) and not pd.read_csv(dst / "boxes.csv").id.isin(tests.id).any()
    assert any("4 films are in no table of the challenge" in n for n in notes(dst)) and any("0 of 18 label vectors" in n for n in notes(dst))
    edit(src / "lists/RSNA_val_list.txt", "stage_2_train_images/", "stage_2_train_images/0")
    with pytest.raises(SourceError, match="challenge's tables lack: stage_2_train_images/0"): manifest("rsna", src, split="released")


@pytest.mark.parametrize("file, old, new, match", [
    ("stage_2_detailed_class_info.csv", ",class", ",kind", "without column class"),
    ("stage_2_detailed_class_info.csv", ",Normal", ",Healthy", "classes other than Normal.* Healthy"),
    ("stage_2_detailed_class_info.csv", ",Normal", ",Lung Opacity", "Target is not 1 where the class is Lung Opacity and 0 elsewhere"),
    ("stage_2_train_labels.csv", ",,,,,0", ",,,,,", "0 elsewhere"),
    ("stage_2_train_labels.csv", ",,,,,0", ",1,2,3,4,0", "not a box with an area exactly where Target is 1"),
    ("stage_2_train_labels.csv", "00000000-", "99999999-", "in only one of this table"),
    ("pneumonia-challenge-dataset-mappings_2018.json", '"img_id"', '"image"', "expected objects with subset_img_id and img_id"),
    ("pneumonia-challenge-dataset-mappings_2018.json", "[", "", "expected objects"),
    ("pneumonia-challenge-dataset-mappings_2018.json", '"00000001_000.png"', '"none.png"', "films without a name of ChestX-ray14: 00000000-"),
])
def test_rsna_refuses(rsna, file, old, new, match):
    src, _ = rsna
    edit(src / file, old, new)
    with pytest.raises(ManifestError, match=match): manifest("rsna", src)


def test_rsna_names_all_that_is_missing_and_counts(rsna, tmp_path):
    src, drawn = rsna
    with pytest.raises(SourceError, match=r"images: 18, expected 26684(.|\n)*Lung Opacity: \d+, expected 6012"): make_manifest("rsna", src, tmp_path / "x")
    (src / f"stage_2_train_images/{drawn.key[0]}.dcm").unlink()
    assert len(manifest("rsna", src)[0]) == 17
    (src / "stage_2_test_images").rename(src / "tests"); (src / "stage_2_train_labels.csv").unlink()
    with pytest.raises(SourceError, match=r"labels (.|\n)*test images (.|\n)*fetch the challenge's files"): manifest("rsna", src, split="released")


def test_rsna_a_damaged_film_is_quarantined(rsna, tmp_path):
    src, drawn = rsna
    path = src / f"stage_2_train_images/{drawn.key[1]}.dcm"
    path.write_bytes(path.read_bytes()[:-400])
    _, dst = manifest("rsna", src)
    store = pack(dst, tmp_path / "store", 32, workers=0)
    assert len(ChestXrays(store)) == 17 and drawn.key[1] in (store / "quarantine.csv").read_text()


def test_label_order_is_that_of_the_published_lines(tmp_path):
    (tmp_path / "list.txt").write_text("00000001_000.png 0 1 0 0 0 0 0 0 0 0 0 0 0 0\n00000003_000.png 0 0 0 0 0 0 0 0 0 0 0 0 0 1\n00000011_006.png 1 0 1 0 0 0 0 0 0 0 0 0 0 0\n")
    y = read_list(tmp_path / "list.txt", NIH.labels).set_index("name") == 1
    assert [y.columns[v].tolist() for v in y.to_numpy()] == [["y_Cardiomegaly"], ["y_Hernia"], ["y_Atelectasis", "y_Effusion"]]
