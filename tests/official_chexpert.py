"""CheXpert and MIMIC-CXR-JPG in their publishers' layouts, of phantoms: the same folders, names, headers and blanks."""
from pathlib import Path

import pandas as pd
from PIL import Image

from anatcxr.data.phantom import phantom
from anatcxr.data.rng import name_id

CHEXPERT_HEADER = ("Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,"
                   "Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices")
MIMIC_HEADER = ("subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,No Finding,"
                "Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices")
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FINDINGS = (None, "effusion", "consolidation", None, "cardiomegaly", "pneumothorax")
NAMES = {None: "No Finding", "effusion": "Pleural Effusion", "consolidation": "Consolidation", "cardiomegaly": "Cardiomegaly", "pneumothorax": "Pneumothorax"}
CHEXPERT_TRAIN, CHEXPERT_VALID, CHEXPERT_TEST = range(1, 31), range(64541, 64547), range(64741, 64746)


def save(key: int, path: Path, finding: str | None = None, film: int = 0):
    "A phantom as JPEG."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((phantom(key, 48, film, finding).image[0] * 255).byte().numpy()).save(path, quality=95)


def answers(k: int, certain: bool = False) -> dict[str, float]:
    "What is said of patient k: the finding drawn, something uncertain in those that have one, devices in each fifth, something denied in each."
    finding = FINDINGS[k % len(FINDINGS)]
    said = {NAMES[finding]: 1.} | ({"Support Devices": 1.} if k % 5 == 0 else {}) | {"Fracture": 0.}
    if finding and not certain: said |= {"Edema" if k % 2 else "Atelectasis": -1., "Pneumonia": -1.}
    return said


def views(k: int) -> list[tuple[int, int, str]]:  # study, view, kind
    "A frontal view; a lateral one of each fourth patient; a second study of each third."
    return [(1, 1, "frontal"), *([(1, 2, "lateral")] if k % 4 == 0 else []), *([(2, 1, "frontal")] if k % 3 == 0 else [])]


def chexpert_line(path: str, k: int, kind: str, certain: bool) -> str:
    said = answers(k, certain)
    labels = [str(said.get(n, 0. if certain else "")) for n in CHEXPERT_HEADER.split(",")[5:]]
    return ",".join([path, ("Male", "Female")[k % 2] if k != 7 else "Unknown", str(20 + k % 60), kind.title(), ("AP", "PA")[k % 2] if kind == "frontal" else "", *labels])


def make_chexpert(top: Path, batches: bool = False, test: bool = False):
    "CheXpert-v1.0-small, or CheXpert-v1.0 in batches, in which training images lie without a folder train; with CheXlocalize's val and test."
    name = "CheXpert-v1.0" if batches else "CheXpert-v1.0-small"
    for part, people in (("train", CHEXPERT_TRAIN), ("valid", CHEXPERT_VALID)):
        lines = [CHEXPERT_HEADER]
        for k in people:
            folder = top / name / part
            if batches: folder = top / ("CheXpert-v1.0 batch 1 (validate & csv)/valid" if part == "valid" else f"CheXpert-v1.0 batch {2 + k % 3} (train {1 + k % 3})")
            for study, view, kind in views(k):
                tail = f"patient{k:05d}/study{study}/view{view}_{kind}.jpg"
                save(k, folder / tail, FINDINGS[k % len(FINDINGS)], study + view)
                lines.append(chexpert_line(f"{name}/{part}/{tail}", k, kind, part == "valid"))
        (folder := top / ("CheXpert-v1.0 batch 1 (validate & csv)" if batches else name)).mkdir(exist_ok=True)
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")
    if test:
        lines = ["Path,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,"
                 "Pleural Other,Fracture,Support Devices"]
        for k in CHEXPERT_TEST:
            save(k, top / f"chexlocalize/CheXpert/test/patient{k}/study1/view1_frontal.jpg", FINDINGS[k % len(FINDINGS)])
            said = answers(k, certain=True)
            lines.append(f"test/patient{k}/study1/view1_frontal.jpg," + ",".join(f"{said.get(n, 0):g}" for n in lines[0].split(",")[1:]))
        (top / "chexlocalize/CheXpert/test_labels.csv").write_text("\n".join(lines) + "\n")
        save(64541, top / "chexlocalize/CheXpert/val/patient64541/study1/view1_frontal.jpg")  # its copy of the validation images


def make_lists(top: Path, train_list: bool = False) -> dict[str, list[str]]:  # list -> ids
    "AFiRe's lists: single images of train.csv to validate on, valid.csv to test on; Edema counts as positive where uncertain, all else as negative."
    images = {p: [f"{p}/patient{k:05d}/study{s}/view{v}_{kind}" for k in people for s, v, kind in views(k)] for p, people in (("train", CHEXPERT_TRAIN), ("valid", CHEXPERT_VALID))}
    val = images["train"][::7]
    rest = [i for i in images["train"] if i not in val]
    leak = next(i for i in rest if i.rpartition("/study")[0] in {v.rpartition("/study")[0] for v in val})  # another image of a patient in val
    lists = {"val_list": val, "test_list": images["valid"], "train_1": [leak, *rest[-2:]], "train_10": [*rest[::3], val[0]]} | ({"train_list": rest} if train_list else {})
    (top / "lists").mkdir(exist_ok=True)
    for name, ids in lists.items():
        lines = []
        for i in ids:
            said = answers(int(i.split("/")[1][7:]), i.startswith("valid"))
            lines.append(f"CheXpert-v1.0-small/{i}.jpg " + " ".join("1" if said.get(n) == 1 or (n == "Edema" and said.get(n) == -1) else "0" for n in FIVE))
        (top / f"lists/{name}.txt").write_text("\n".join(lines) + "\n")
    return {name: [i.partition("/")[2] for i in ids] for name, ids in lists.items()}


MIMIC_SUBJECTS = range(36)
MIMIC_VIEWS = ("PA", "AP", "LATERAL", "LL", "")


def mimic_images(k: int) -> list[tuple[str, str, str, str]]:  # dicom_id, subject_id, study_id, view
    "Two images of subject k, in one study."
    films = [("PA" if k % 2 else "AP"), MIMIC_VIEWS[2 + k % 3]]
    return [("-".join(f"{name_id(f'{k}/{film}/{j}') % 16**8:08x}" for j in range(5)), str(10000032 + 13 * k), str(50414267 + 17 * k), view) for film, view in enumerate(films)]


def mimic_split(k: int) -> str: return ("train", "train", "train", "train", "validate", "test")[k % 6]


def make_mimic(top: Path, zipped: bool = True, images: Path | None = None, suffix: str = ".jpg"):
    "MIMIC-CXR-JPG; subject 11 has no labels, NegBio calls the fourth subject normal that CheXpert's labeller finds something in."
    metadata = ["dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,"
                "ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"]
    split, chexpert, negbio = ["dicom_id,study_id,subject_id,split"], [MIMIC_HEADER], [MIMIC_HEADER]
    for k in MIMIC_SUBJECTS:
        for film, (dicom, subject, study, view) in enumerate(mimic_images(k)):
            path = (images or top / f"files/p{subject[:2]}/p{subject}/s{study}") / f"{dicom}{suffix}"
            save(k, path, FINDINGS[k % len(FINDINGS)], film)
            metadata.append(f"{dicom},{subject},{study},CHEST (PA AND LAT),{view},2544,3056,21800506,213014.531,CHEST (PA AND LAT),postero-anterior,Erect")
            split.append(f"{dicom},{study},{subject},{mimic_split(k)}")
        for table in (chexpert, negbio):
            said = {"No Finding": 1.} if table is negbio and k == 4 else answers(k)
            if k != 11: table.append(",".join([subject, study, *(str(said.get(n, "")) for n in MIMIC_HEADER.split(",")[2:])]))
    top.mkdir(parents=True, exist_ok=True)
    for name, lines in (("metadata", metadata), ("split", split), ("chexpert", chexpert), ("negbio", negbio)):
        path = top / f"mimic-cxr-2.0.0-{name}.csv{'.gz' if zipped else ''}"
        if zipped: pd.Series(lines).to_csv(path, index=False, header=False, quoting=3, sep="\t")
        else: path.write_text("\n".join(lines) + "\n")
