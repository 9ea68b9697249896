"""CheXpert and MIMIC-CXR-JPG from their publishers' layouts to a packed store, and what is refused."""
import numpy as np
import pandas as pd
import pytest

from anatcxr.data.chexpert import CHEXPERT_FIVE, CHEXPERT_LABELS, MIMIC_LABELS, UNCERTAIN_POLICIES, resolve_uncertain
from anatcxr.data.packing import pack
from anatcxr.data.sources import SOURCES, SourceError, make_manifest
from anatcxr.data.splits import label_column
from anatcxr.data.table import ManifestError, read_manifest
from official_chexpert import (CHEXPERT_HEADER, CHEXPERT_TEST, CHEXPERT_TRAIN, CHEXPERT_VALID, FINDINGS, FIVE, MIMIC_HEADER, MIMIC_SUBJECTS, NAMES, answers, make_chexpert,
                               make_lists, make_mimic, mimic_images, mimic_split, save, views)


@pytest.fixture(scope="module")
def chexpert(tmp_path_factory):
    make_chexpert(top := tmp_path_factory.mktemp("chexpert"), test=True)
    return top


@pytest.fixture(scope="module")
def mimic(tmp_path_factory):
    make_mimic(top := tmp_path_factory.mktemp("mimic"))
    return top


@pytest.fixture
def made(tmp_path):
    "The table of a data set, from its fixture."
    def make(name, src, allow_leaks=False, **options): return read_manifest(make_manifest(name, src, tmp_path / "out", partial=True, **options), allow_leaks)
    return make


def number(patient: str) -> int: return int(patient.split(":")[1].removeprefix("patient"))


def expected_label(k: int, certain: bool = False) -> str:
    said = [n for n in CHEXPERT_LABELS if answers(k, certain).get(n) == 1 and n != "No Finding"]
    return "normal" if FINDINGS[k % len(FINDINGS)] is None else "|".join(said)


def test_labels_are_those_of_the_headers():
    assert CHEXPERT_HEADER.split(",")[5:] == list(CHEXPERT_LABELS)
    assert MIMIC_HEADER.split(",")[2:] == list(MIMIC_LABELS)
    assert FIVE == CHEXPERT_FIVE


def test_chexpert_official(chexpert, made):
    t = made("chexpert", chexpert)
    assert len(t) == sum(len(views(k)) for k in (*CHEXPERT_TRAIN, *CHEXPERT_VALID))
    k = t.patient.map(number)
    assert ((t.split == "test") == (k > 64540)).all() and t[t.split != "test"].groupby("patient").split.nunique().max() == 1
    assert t[t.split == "val"].patient.nunique() == 3 and not t.id.str.contains("@").any()
    assert t.label.tolist() == [expected_label(i, i > 64540) for i in k]
    assert (t["view"] == np.where(t.id.str.endswith("lateral"), "LATERAL", np.where(k % 2, "PA", "AP"))).all()
    assert t.sex.isna().tolist() == (k == 7).tolist() and (t.sex[k == 8] == "M").all() and (t.age == 20 + k % 60).all()
    for n in CHEXPERT_LABELS:
        y, raw = t[label_column(n)], pd.Series([answers(i, i > 64540).get(n, 0) for i in k])
        assert (y[raw != -1] == raw[raw != -1]).all()
        unsure = y[raw == -1]
        assert unsure[t.split == "val"].isna().all() and unsure[t.split == "train"].between(.55, .85).all()
        assert (t.uncertain.fillna("").str.split("|").map(lambda u: n in u) == (raw == -1)).all()
    assert t[label_column("Pneumonia")].where(t.uncertain.notna()).nunique() > 10  # drawn image by image


def test_chexpert_in_batches_is_the_same(chexpert, made, tmp_path):
    small = made("chexpert", chexpert)
    make_chexpert(tmp_path / "large", batches=True)
    large = made("chexpert", tmp_path / "large")
    pd.testing.assert_frame_equal(small.drop(columns="file"), large.drop(columns="file"))
    assert large.file.str.contains("batch").all()


def test_chexpert_options(chexpert, made):
    whole = made("chexpert", chexpert, policy="zeros")
    frontal = made("chexpert", chexpert, policy="zeros", views="frontal")
    assert frontal.id.tolist() == whole.id[whole["view"] != "LATERAL"].tolist()
    mixed = made("chexpert", chexpert, policy={"Edema": "ones", "other": "zeros"}, val_policy="ones")
    train = mixed[mixed.split == "train"]
    assert (train.y_Edema == train.uncertain.fillna("").str.contains("Edema")).all() and (train.y_Pneumonia == 0).all()
    assert mixed.y_Pneumonia[(mixed.split == "val") & mixed.uncertain.notna()].eq(1).all()
    unknown = made("chexpert", chexpert, blank="unknown")
    assert unknown.y_Cardiomegaly[unknown.split == "train"].isin([1, np.nan]).all() and (unknown.y_Fracture == 0).all()
    strict = made("chexpert", chexpert, devices=False)
    assert strict.label[whole.label == "normal"].isin(["normal", "Support Devices"]).all() and strict.label.eq("Support Devices").any()
    mixed_up = made("chexpert", chexpert, split="random")
    assert mixed_up.groupby("patient").split.nunique().max() == 1 and set(mixed_up.split) == {"train", "val", "test"}
    pd.testing.assert_frame_equal(made("chexpert", chexpert, seed=3), made("chexpert", chexpert, seed=3))
    assert not made("chexpert", chexpert, seed=3).y_Pneumonia.equals(made("chexpert", chexpert).y_Pneumonia)


def test_chexpert_test_set(chexpert, made):
    t = made("chexpert", chexpert, test_set="test")
    k = t.patient.map(number)
    assert set(k[t.split == "test"]) == set(CHEXPERT_TEST) and set(k[t.split == "val"]) == set(CHEXPERT_VALID)
    tested = t[t.split == "test"]
    assert tested.y_Cardiomegaly.tolist() == [answers(i, True).get("Cardiomegaly", 0) for i in k[t.split == "test"]]
    assert tested.age.isna().all() and tested.label[k == 64745].tolist() == ["Pneumothorax|Support Devices"]


@pytest.mark.parametrize("fraction", [1, 10, 100])
def test_chexpert_released(chexpert, made, tmp_path, fraction):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/CheXpert-v1.0-small").symlink_to(chexpert / "CheXpert-v1.0-small")
    lists = make_lists(tmp_path / "src")
    with pytest.raises(ManifestError, match="patients in more than one split"): made("chexpert", tmp_path / "src", split="released", fraction=fraction)
    t = made("chexpert", tmp_path / "src", True, split="released", fraction=fraction, policy="ones")
    ids = {s: t.id[t.split == s].str.partition("@")[0].tolist() for s in ("train", "val", "test")}
    assert ids["val"] == lists["val_list"] and ids["test"] == lists["test_list"]
    assert ids["train"] == lists[f"train_{fraction}"] if fraction < 100 else not {*ids["train"]} & {*ids["val"]}
    shared = t.id[t.id.str.contains("@")].tolist()
    assert shared == ([lists["val_list"][0] + "@val"] if fraction == 10 else [])
    listed = t if fraction < 100 else t[t.split != "train"]
    edema = [answers(number(p), number(p) > 64540).get("Edema", 0) != 0 for p in listed.patient]
    assert listed.y_Edema.tolist() == [float(e) for e in edema] and t.y_Pneumonia.isna().all()
    card = (tmp_path / "out/card.md").read_text()
    assert "labels of the lists against a certain one of the publisher: 0" in card
    if fraction == 100: assert "no train_list.txt" in card and (t.y_Atelectasis[(t.split == "train") & t.uncertain.fillna("").str.contains("Atelectasis")] == 1).all()
    unsure = sum(e == 1 and answers(number(p))["Edema"] == -1 for e, p in zip(edema, listed.patient) if number(p) < 64541)
    assert unsure and f"Edema {unsure} of {unsure}" in card


def test_chexpert_refusals(chexpert, tmp_path):
    def refused(match, name="chexpert", src=tmp_path / "src", partial=True, **options):
        with pytest.raises(SourceError, match=match): make_manifest(name, src, tmp_path / "out", partial=partial, **options)

    def edit(name, old, new):
        text = (path := tmp_path / "src/CheXpert-v1.0-small" / name).read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return lambda: path.write_text(text)

    refused("no such folder", src=tmp_path / "none")
    refused(r"train images in the table: \d+, expected 223414(.|\n)*valid positive for Edema: 0, expected 45", src=chexpert, partial=False)
    refused("val_list(.|\n)*test_list", src=chexpert, split="released")
    refused("Edema=twos", src=chexpert, policy={"Edema": "twos", "other": "zeros"})
    refused("views='side'", src=chexpert, views="side")
    make_chexpert(tmp_path / "src")
    refused("test_labels", test_set="test")
    for name, old, new, match in (("train.csv", ",Edema", ",Oedema", "without column Edema"), ("train.csv", "-1.0", "maybe", "'maybe' of CheXpert-v1.0-small/train"),
                                  ("train.csv", "-1.0", "2.0", "expected one of 1, 0, -1"), ("train.csv", "patient00003/study2", "patient00003/study1", "more than once: patient00003/study1"),
                                  ("valid.csv", "patient64542/study1/view1_frontal", "64542", "not of the form"), ("train.csv", "Female", "female", "Sex female"), ("train.csv", ",24,", ",old,", "'old'")):
        undo = edit(name, old, new)
        refused(match)
        undo()
    save(1, tmp_path / "src/copy/patient00001/study1/view1_frontal.jpg")
    refused("more than once: patient00001/study1/view1_frontal")
    (tmp_path / "src/copy/patient00001/study1/view1_frontal.jpg").rename(tmp_path / "src/copy/patient00001/study1/view9_frontal.jpg")
    (tmp_path / "src/CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg").unlink()
    table = read_manifest(make_manifest("chexpert", tmp_path / "src", tmp_path / "out", partial=True))
    card = (tmp_path / "out/card.md").read_text()
    assert f"images on disk: {len(table)} of {len(table) + 1}" in card and "do not name: patient00001/study1/view9_frontal" in card
    make_lists(tmp_path / "src")
    (tmp_path / "src/lists/test_list.txt").write_text("CheXpert-v1.0-small/valid/patient00099/study1/view1_frontal.jpg 0 0 0 0 0\n")
    refused("do not have(.|\n)*patient00099", split="released", fraction=1)


def test_mimic_official(mimic, made, tmp_path):
    t = made("mimic", mimic)
    of = {dicom: (k, subject, study, view) for k in MIMIC_SUBJECTS for dicom, subject, study, view in mimic_images(k)}
    assert {*t.id} == {*of}
    k = t.id.map(lambda i: of[i][0])
    assert t.patient.tolist() == [f"mimic:{of[i][1]}" for i in t.id] and t.study.astype(str).tolist() == [of[i][2] for i in t.id]
    assert t.split.tolist() == [mimic_split(i).replace("validate", "val") for i in k]
    assert t["view"].fillna("").tolist() == [of[i][3].replace("LL", "LATERAL") for i in t.id] and (t.orig_width == 3056).all() and (t.orig_height == 2544).all()
    labelled = t[k != 11]
    assert labelled.label.tolist() == ["|".join(sorted(expected_label(i).split("|"))) for i in k[k != 11]]
    assert t[k == 11].filter(like="y_").isna().all(axis=None) and t.label[k == 11].isna().all()
    assert (labelled.y_Pleural_Effusion == [answers(i).get("Pleural Effusion", 0) for i in k[k != 11]]).all()
    store = pack(tmp_path / "out", tmp_path / "store", 32, workers=0)
    packed = read_manifest(store)
    assert len(packed) == len(t) and packed.y_Edema.equals(t.y_Edema)


def test_mimic_normal_images(mimic, made, tmp_path):
    whole = made("mimic", mimic)
    for options, here in (({}, whole.id.notna()), ({"views": "frontal"}, whole["view"].isin(["AP", "PA"])), ({"devices": False}, whole.y_Support_Devices != 1)):
        t = made("mimic", mimic, subset="normal", **options)
        assert t.id.tolist() == whole.id[here & (whole.label == "normal")].tolist()
    train = made("mimic", mimic, subset="normal_train")
    assert set(train.split) == {"train"} and len(train) == ((whole.label == "normal") & (whole.split == "train")).sum()
    n = (whole.label == "normal").sum()
    assert f"normal, any view, devices allowed: {n}, {len(train)} of them in train\n" in (tmp_path / "out/card.md").read_text()
    negbio = made("mimic", mimic, subset="normal", labeller="negbio")
    assert {*negbio.patient} - {*whole.patient[whole.label == "normal"]} == {f"mimic:{mimic_images(4)[0][1]}"}


def test_mimic_elsewhere(mimic, made, tmp_path):
    make_mimic(tmp_path / "tables", zipped=False, images=tmp_path / "png", suffix=".png")
    other = made("mimic", tmp_path / "tables", images=str(tmp_path / "png"))
    assert other.file.str.endswith(".png").all()
    pd.testing.assert_frame_equal(other.drop(columns="file"), made("mimic", mimic).drop(columns="file"))
    with pytest.raises(SourceError, match="none of the 72 images"): make_manifest("mimic", tmp_path / "tables", tmp_path / "no", partial=True)
    for p in sorted((tmp_path / "png").iterdir())[::2]: p.unlink()
    assert len(made("mimic", tmp_path / "tables", images="../png")) == 36
    assert "images on disk: 36 of 72" in (tmp_path / "out/card.md").read_text()


def test_mimic_refusals(mimic, tmp_path):
    make_mimic(tmp_path / "src", zipped=False)
    first = mimic_images(0)[0]
    for name, old, new, match in (("split", "train", "test", f"more than one split: {first[1]}"), ("split", "validate", "valid", "split valid; expected train, validate, test"),
                                  ("split", first[2], "51", "only one has these images"), ("split", first[0], mimic_images(1)[0][0], "dicom_id more than once"),
                                  ("metadata", ",2544,", ",tall,", "Rows 'tall'"), ("chexpert", "-1.0", "unsure", "'unsure' of"), ("chexpert", ",Edema", ",Oedema", "without column Edema")):
        text = (path := tmp_path / f"src/mimic-cxr-2.0.0-{name}.csv").read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(SourceError, match=match): make_manifest("mimic", tmp_path / "src", tmp_path / "out", partial=True)
        path.write_text(text)
    with pytest.raises(SourceError, match="images in the tables: 72, expected 377110"): make_manifest("mimic", mimic, tmp_path / "out")
    (tmp_path / "src/mimic-cxr-2.0.0-split.csv").unlink()
    with pytest.raises(SourceError, match="mimic-cxr-2.0.0-split"): make_manifest("mimic", tmp_path / "src", tmp_path / "out", partial=True)
    with pytest.raises(SourceError, match="labeller='cheXbert'"): make_manifest("mimic", mimic, tmp_path / "out", partial=True, labeller="cheXbert")


@pytest.mark.parametrize("policy", UNCERTAIN_POLICIES)
def test_policies_leave_nothing_uncertain(policy):
    rng = np.random.default_rng(1)
    values, ids = rng.choice([-1, 0, 1, np.nan], (500, 14)), np.array([f"i{k}" for k in range(500)])
    done = resolve_uncertain(values, policy, ids, CHEXPERT_LABELS, 4)
    low, high = UNCERTAIN_POLICIES[policy]
    unsure = values == -1
    assert np.array_equal(done[~unsure], values[~unsure], equal_nan=True) and not (done == -1).any()
    assert np.isnan(done[unsure]).all() if policy == "ignore" else ((done[unsure] >= low) & (done[unsure] <= high)).all()
    order = rng.permutation(500)
    assert np.array_equal(resolve_uncertain(values[order], policy, ids[order], CHEXPERT_LABELS, 4), done[order], equal_nan=True)
    assert np.array_equal(resolve_uncertain(values[:, 5:], policy, ids, CHEXPERT_LABELS[5:], 4), done[:, 5:], equal_nan=True)


def test_cards_say_what_may_be_shown():
    for name in ("chexpert", "mimic"): assert SOURCES[name].card.redistribution.startswith("no") and len(SOURCES[name].card.labels) == 14
