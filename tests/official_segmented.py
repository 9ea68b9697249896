"""Shenzhen, Montgomery, JSRT and SIIM-ACR as their publishers lay them out, drawn from phantoms."""
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from anatcxr.data.phantom import phantom

ORGANS = {"left lung": "lung_left", "right lung": "lung_right", "heart": "heart", "left clavicle": "clavicle_left", "right clavicle": "clavicle_right"}


def save(path: Path, x: np.ndarray, **options):
    "PNG or GIF, by the name; bool is written as one bit."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(x)).save(path, **options)


def text(path: Path, data: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode())


def grey(x) -> np.ndarray:  # (1,S,S) float -> (S,S) uint8
    return np.round(x[0].numpy() * 255).astype(np.uint8)


def person(k: int, kind: str | None, size: int):
    "Phantom k; every second one has the finding."
    return phantom(k, size, finding=kind if k % 2 else None)


def shenzhen_name(k: int) -> str: return f"CHNCXR_{k + 1:04d}_{k % 2}"


READINGS = ("male 45yrs\r\nnormal\r\n", "female  63yrs\r\nPTB in the right  upper field \t\r\n", "Male, 3months\nnormal", "femal 32yrs\r\nleft PTB\r\n")
READ = (("M", 45), ("F", 63), ("M", .25), ("F", 32))  # what the lines above say


def make_shenzhen(top: Path, n: int = 20, size: int = 64, masks: int | None = None, lists: dict[str, range] | None = None) -> Path:
    for k in range(n):
        p = person(k, "consolidation", size)
        indexed = Image.fromarray(np.stack([grey(p.image)] * 3, -1)).quantize(256)  # the publisher's are palette images
        (folder := top / "ChinaSet_AllFiles/CXR_png").mkdir(parents=True, exist_ok=True)
        indexed.save(folder / f"{shenzhen_name(k)}.png")
        text(top / f"ChinaSet_AllFiles/ClinicalReadings/{shenzhen_name(k)}.txt", READINGS[k % 4])
        if k < (n if masks is None else masks): save(top / f"mask/{shenzhen_name(k)}_mask.png", (p.masks["lung_left"] | p.masks["lung_right"]).numpy().astype(np.uint8) * 255)
    text(top / "ChinaSet_AllFiles/CXR_png/Thumbs.db", "not an image")
    for part, ks in (lists or {}).items(): text(top / f"lists/ShenzenCXR_{part}_data.txt", "".join(f"{shenzhen_name(k)}.png,{k % 2}\n" for k in ks))
    return top


def montgomery_name(k: int) -> str: return f"MCUCXR_{k + 1:04d}_{k % 2}"


def make_montgomery(top: Path, n: int = 20, size: int = 64, swap: bool = False, lists: dict[str, range] | None = None) -> Path:
    for k in range(n):
        p, name = person(k, "consolidation", size), montgomery_name(k)
        save(top / f"MontgomerySet/CXR_png/{name}.png", grey(p.image))
        text(top / f"MontgomerySet/ClinicalReadings/{name}.txt", f"Patient's Sex: {'FM'[k % 3 > 1]} \nPatient's Age: {20 + k:03d}Y\n{('normal', 'cavitary lesion, right apex')[k % 2]}\n")
        for folder, side in (("left", "right"), ("right", "left")) if swap else (("left", "left"), ("right", "right")):
            save(top / f"MontgomerySet/ManualMask/{folder}Mask/{name}.png", p.masks[f"lung_{side}"])
    for part, ks in (lists or {}).items(): text(top / f"lists/{part}.txt", "\n".join(f"{montgomery_name(k)}.png" for k in ks))  # no newline at the end
    return top


def jsrt_name(k: int) -> str: return f"JPC{'LN' if k % 2 else 'NN'}{k + 1:03d}"


def enlarge(x: np.ndarray, side: int) -> np.ndarray: return x.repeat(side // len(x), 0).repeat(side // len(x), 1)


def make_jsrt(top: Path, n: int = 8, size: int = 128, form: str = "IMG", bright: bool = False, lists: dict[str, range] | None = None) -> Path:
    "Raw films of 2048 points, or PNG in the size of the phantoms; masks as GIF of 1024. Fold 1 has the first half."
    cln, cnn, order = "", "", [*range(n)]
    for k in order:
        p, name = person(k, "nodule", size), jsrt_name(k)
        if form == "IMG":
            (top / "All247images").mkdir(parents=True, exist_ok=True)
            enlarge(np.round((1 - p.image[0].numpy()) * 4095).astype(">u2"), 2048).tofile(top / f"All247images/{name}.IMG")
        else: save(top / f"All247images/{name}.png", grey(p.image if bright else 1 - p.image))
        for organ, mask in ORGANS.items(): save(top / f"scratch/fold{1 + (k >= n // 2)}/masks/{organ}/{name}.gif", enlarge(p.masks[mask].numpy(), 1024))
        if name[3:5] == "NN": cnn += f"{name}.IMG {40 + k}  {('male', 'female')[k % 4 > 1]}    non-nodule\r"; continue
        (x0, y0, x1, y1), age = (v * 2048 / size for v in p.box), "?" if k == 1 else 40 + k
        cln += f"{name}.IMG\t{1 + k % 5}\t{round((x1 - x0) * .175)}\t{age}\t{('Male', 'Female')[k % 4 > 1]}\t{round((x0 + x1) / 2)}\t{round((y0 + y1) / 2)}\t"
        cln += f"{('malignant', 'benign')[k % 4 > 1]}\tr.upper lobe\t\tlung cancer\t(adenocarcinoma)\r"
    text(top / "Clinical_Information/CLNDAT_EN.txt", cln + "\r\r")
    text(top / "Clinical_Information/CNNDAT_EN.TXT", cnn)
    for part, ks in (lists or {}).items(): text(top / f"lists/{part}.txt", "".join(f"{jsrt_name(k)}\n" for k in ks))
    return top


def siim_name(k: int) -> str: return f"1.2.276.0.7230010.3.1.4.8323329.{1000 + k}.1517875160.{k}"


def run_lengths(mask: np.ndarray) -> str:
    "Column by column, each run from the end of the last, pixel by pixel as the challenge describes it."
    res, gap, run = [], 0, 0
    for on in mask.T.ravel().tolist():
        if on: run += 1
        elif run: res, gap, run = [*res, gap, run], 1, 0
        else: gap += 1
    return " ".join(map(str, [*res, gap, run] if run else res)) or "-1"


def siim_mask(k: int, size: int) -> np.ndarray:
    p = person(k, "pneumothorax", size)
    return p.finding_mask.numpy() if p.finding else np.zeros((size, size), bool)


def write_dicom(path: Path, x: np.ndarray, **elements):  # (H,W) uint8
    import pydicom
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.7", path.stem, "CR"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *x.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.add_new("PixelData", "OB", x.tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):  # ages without Y
        for k, v in elements.items(): setattr(ds, k, v)
        ds.save_as(path, enforce_file_format=True)


def make_siim(top: Path, n: int = 20, size: int = 64, lists: dict[str, range] | None = None, name: str = "train-rle.csv") -> Path:
    "Every fourth phantom's pneumothorax in two rows; one image that has no row."
    rows = ["ImageId, EncodedPixels" if name == "train-rle.csv" else "ImageId,EncodedPixels"]
    for k in range(n + 1):
        write_dicom(top / f"siim/dicom-images-train/1.2.{k}/1.3.{k}/{siim_name(k)}.dcm", grey(person(k, "pneumothorax", size).image), PatientID=f"who{k // 2}",
                    PatientSex="FM"[k // 2 % 2], PatientAge="413" if k == 0 else str(20 + k), ViewPosition=("PA", "AP")[k % 2])
        mask, stripes = siim_mask(k, size), np.arange(size)[:, None] // 3 % 2
        parts = [mask & (stripes == j) for j in (0, 1)] if k % 4 == 3 else [mask]
        if k < n: rows += [f"{siim_name(k)},{' ' * (name == 'train-rle.csv')}{run_lengths(m)}" for m in parts]
    text(top / f"siim/{name}", "\n".join(rows) + "\n")
    for part, ks in (lists or {}).items(): text(top / f"lists/{part}.txt", "".join(f"{siim_name(k)}\n" for k in ks))
    return top
