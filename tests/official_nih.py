"ChestX-ray14 and the RSNA challenge in their publishers' layouts, small, with phantoms for films."
import io
import json
import warnings
from pathlib import Path

import pandas as pd
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from anatcxr.data.nih import NIH
from anatcxr.data.rsna import RSNA
from anatcxr.data.phantom import phantom

ENTRY_HEAD = ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
              "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n")
BOX_HEAD = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
FINDINGS = {"effusion": "Effusion", "nodule": "Nodule", "consolidation": "Infiltration", "pneumothorax": "Pneumothorax", "cardiomegaly": "Cardiomegaly"}
EXTRA = {2: "Edema", 5: "Hernia"}  # of every seventh film a second finding, as a finding of phantoms is only one


def pixels(p) -> Image.Image: return Image.fromarray((p.image[0] * 255).round().byte().numpy())


def vector(labels: set[str]) -> str: return " ".join(str(int(n in labels)) for n in NIH.labels)


def make_nih(top: Path, people: int = 12, size: int = 64, edition: str = "2017", flat: bool = False, sex: str = "Gender") -> pd.DataFrame:
    "One to three films of each patient; every third patient is tested, and its films with a finding have boxes. Returns what was drawn."
    rows, boxes = [], []
    for k in range(1, people + 1):
        for j in range(1 + k // 2 % 3):
            name, kind, n = f"{k:08d}_{j:03d}.png", [None, *FINDINGS][(k + j) % 6], len(rows)
            folder = top / ("images" if flat else f"images_{1 + n % 12:03d}/images")
            folder.mkdir(parents=True, exist_ok=True)
            pixels(p := phantom(10 * k + j, size, finding=kind)).save(folder / name)
            labels = {FINDINGS[kind], *([EXTRA[n % 7]] if n % 7 in EXTRA else [])} if kind else set()
            rows.append({"name": name, "key": name[:-4], "patient": f"{k:08d}", "labels": labels, "age": 20 + k, "sex": "MF"[k % 2],
                         "view": ("PA", "AP")[j % 2], "test": k % 3 == 0, "width": 2000 + n, "height": 2500 - n})
            if kind and k % 3 == 0: boxes += [{"key": name[:-4], "label": FINDINGS[kind], "file_box": p.box}] * (1 if boxes else 2)  # the first film has two
    table, boxes = pd.DataFrame(rows), pd.DataFrame(boxes)
    lines = [f"{r.name},{'|'.join(sorted(r.labels)) or 'No Finding'},0,{int(r.patient)},{r.age:03d}Y,{r.sex},{r.view},{r.width},{r.height},0.143,0.143,\n"
             for r in table.itertuples()]
    (top / f"Data_Entry_{edition}.csv").write_text(ENTRY_HEAD.replace("Gender", sex) + "".join(lines))
    px = [[v * 1024 / size for v in (x0, y0, x1 - x0, y1 - y0)] for x0, y0, x1, y1 in boxes.file_box]
    (top / "BBox_List_2017.csv").write_text(BOX_HEAD + "".join(
        f"{k}.png,{'Infiltrate' if n == 'Infiltration' else n},{x},{y},{w},{h}\n" for k, n, (x, y, w, h) in zip(boxes.key, boxes.label, px)))
    (top / "train_val_list.txt").write_text("\n".join(table.name[~table.test]))  # the last line has no end, as published
    (top / "test_list.txt").write_text("\n".join(table.name[table.test]))
    table.attrs["boxes"] = boxes
    return table


def write_list(path: Path, table: pd.DataFrame, prefix: str = "", flip: tuple[int, ...] = ()):
    "Names and label vectors; Pneumonia is added to the rows whose place is in `flip`."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{prefix}{n} {vector(l | ({'Pneumonia'} if i in flip else set()))}\n" for i, (n, l) in enumerate(zip(table.name, table.labels))))


def write_dicom(path: Path, image: Image.Image, **elements):
    "8 bits, JPEG, MONOCHROME2, as the challenge has them."
    image.save(stream := io.BytesIO(), "JPEG", quality=95)
    ds, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = uid.JPEGBaseline8Bit, uid.SecondaryCaptureImageStorage, uid.generate_uid()
    ds.file_meta, ds.SOPClassUID, ds.SOPInstanceUID = meta, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PhotometricInterpretation, ds.Rows, ds.Columns = "CR", "MONOCHROME2", image.height, image.width
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 8, 8, 7, 0
    with warnings.catch_warnings(action="ignore"):  # of ages without a unit, which the challenge has
        for k, v in elements.items(): setattr(ds, k, v)
    ds.PixelData = encapsulate([stream.getvalue()])
    ds["PixelData"].is_undefined_length = True
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def make_rsna(top: Path, people: int = 12, size: int = 64, tests: int = 4, mapping: bool = True) -> pd.DataFrame:
    "One or two labelled films of each patient, and films of the challenge's test without labels. Returns what was drawn."
    rows = []
    for n, (k, j) in enumerate([(k, j) for k in range(1, people + 1) for j in range(1 + k % 2)] + [(people + 1 + t, 0) for t in range(tests)]):
        part = "test" if k > people else "train"
        kind = (k + j) % 3
        p = phantom(500 + 10 * k + j, size, finding=(None, "cardiomegaly", "consolidation")[kind])
        key = f"{n:08x}-0000-4000-8000-{k:012x}"
        age = "148" if n == 0 else str(20 + k)
        write_dicom(top / f"stage_2_{part}_images/{key}.dcm", pixels(p), PatientID=key, PatientAge=age, PatientSex="FM"[k % 2], ViewPosition=("PA", "AP")[j])
        rows.append({"key": key, "nih_id": f"{k:08d}_{j:03d}", "patient": f"{k:08d}", "kind": kind, "box": p.box if kind == 2 else None, "part": part, "age": int(age)})
    table = pd.DataFrame(rows)
    labels, classes = ["patientId,x,y,width,height,Target"], ["patientId,class"]
    for r in table[table.part == "train"].itertuples():
        x0, y0, x1, y1 = r.box or [0] * 4
        halves = [(x0, y0, x1 - x0, (y1 - y0) / 2), (x0, (y0 + y1) / 2, x1 - x0, (y1 - y0) / 2)]  # two boxes, and so two rows in both tables
        labels += [f"{r.key},{x},{y},{w},{h},1" for x, y, w, h in halves] if r.kind == 2 else [f"{r.key},,,,,0"]
        classes += [f"{r.key},{RSNA.labels[r.kind]}"] * (2 if r.kind == 2 else 1)
    (top / "stage_2_train_labels.csv").write_text("\n".join(labels) + "\n")
    (top / "stage_2_detailed_class_info.csv").write_text("\n".join(classes) + "\n")
    if mapping:
        found = [{"subset_img_id": r.key, "img_id": f"{r.nih_id}.png", "subset_group": r.part, "orig_labels": ["No Finding"]} for r in table.itertuples()]
        (top / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(found))
    return table
