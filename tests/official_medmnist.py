"MedMNIST's files, made of phantoms: names, arrays, order of the members and types as the publisher has them."
from pathlib import Path

import numpy as np

from anatcxr.data.images import resize
from anatcxr.data.phantom import phantom

CHEST = ("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax", "consolidation", "edema",
         "emphysema", "fibrosis", "pleural", "hernia")  # as the publisher spells them
SHOWN = (None, "effusion", "cardiomegaly", "nodule", "pneumothorax", "consolidation")  # what phantoms can show
SPLITS = ("train", "val", "test")


def file_name(name: str, size: int) -> str:
    return f"{name}.npz" if size == 28 else f"{name}_{size}.npz"


def picture(key: int, size: int, finding: str | None) -> np.ndarray:  # (S,S) uint8
    x = phantom(key, max(size, 64), finding=finding).image
    return (resize(x, size)[0] * 255).round().byte().numpy()


def write(path: Path, arrays: dict[str, np.ndarray], compressed: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    order = [f"{s}_images" for s in SPLITS] + [f"{s}_labels" for s in SPLITS]
    (np.savez_compressed if compressed else np.savez)(path, **{k: arrays[k] for k in order if k in arrays})
    return path


def make_chestmnist(top: Path, size: int = 28, parts=(12, 5, 7), seed: int = 0) -> tuple[dict[str, np.ndarray], list[str]]:
    "ChestMNIST below `top`; its arrays, and what each phantom shows. Every fourth image is given a second label, as many have."
    arrays, shown, key = {}, [], seed
    for s, n in zip(SPLITS, parts):
        findings = [SHOWN[k % len(SHOWN)] for k in range(key, key + n)]
        y = np.array([[c == f for c in CHEST] for f in findings], np.uint8)
        y[3::4, CHEST.index("hernia")] = 1
        arrays |= {f"{s}_images": np.stack([picture(k, size, f) for k, f in enumerate(findings, key)]), f"{s}_labels": y}
        shown += ["|".join([*([f.capitalize()] if f else []), *(["Hernia"] if j % 4 == 3 else [])]) or "normal" for j, f in enumerate(findings)]
        key += n
    write(top / file_name("chestmnist", size), arrays)
    return arrays, shown


def make_pneumoniamnist(top: Path, size: int = 28, parts=(12, 5, 7), seed: int = 0) -> tuple[dict[str, np.ndarray], list[str]]:
    "PneumoniaMNIST below `top`; its arrays, and the class of each phantom."
    arrays, shown, key = {}, [], seed
    for s, n in zip(SPLITS, parts):
        sick = [k % 3 > 0 for k in range(key, key + n)]
        arrays |= {f"{s}_images": np.stack([picture(k, size, "consolidation" if v else None) for k, v in enumerate(sick, key)]),
                   f"{s}_labels": np.array(sick, np.uint8)[:, None]}
        shown += ["pneumonia" if v else "normal" for v in sick]
        key += n
    write(top / file_name("pneumoniamnist", size), arrays)
    return arrays, shown
