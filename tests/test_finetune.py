"""Fine-tuning: a killed run goes on as if nothing had happened, two processes do what one does, presets are the code bases', gaps in labels cost nothing."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from anatcxr.data.loader import Loader
from anatcxr.data.manifest import ChestXrays
from anatcxr.data.packing import pack
from anatcxr.downstream.augment import apply_augment, sample_augment
from anatcxr.downstream.classifier import Classifier, class_loss, starting_encoder
from anatcxr.downstream.classify_config import FINETUNE_PRESETS, FinetuneConfig
from anatcxr.downstream.classify_data import classify_data
from anatcxr.downstream.finetune import finetune, finetune_main
from anatcxr.train.config import PretrainPEAC
from anatcxr.train.pretrain import addressed_torch, pretrain
from anatcxr.train.record import load_checkpoint, load_encoder, read_metrics, read_record, state_hash

STEPS = 24
SETTINGS = dict(task="binary", label_column="sex", normal_label="F", size=32, batch_size=8, steps=STEPS, epochs="None", eval_every=4, save_every=5, log_every=1,
                bootstrap=20, drop_path=.1, device="cpu")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
TIMES = {"images_per_s", "wait"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return pack("phantom:90", tmp_path_factory.mktemp("data") / "store", size=37, workers=0)


def command(out: Path, *launcher: str, **settings) -> list[str]:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**SETTINGS, "out": out, **settings}.items()]
    return [sys.executable, *launcher, "-m", "anatcxr.downstream.finetune", *(["--"] if launcher else []), "smoke", "--no-progress", *flags]


def run(*args, **kw):
    done = subprocess.run(command(*args, **kw), env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def config(out: Path, **settings) -> FinetuneConfig:
    return FinetuneConfig.preset("smoke", **{**SETTINGS, "out": str(out), "progress": False, **settings})


def lines(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


def kill_when(out: Path, step: int, **settings):
    """Start a run and kill it, without warning, once it has logged `step`."""
    with open(out / "stderr.txt", "w") as log:
        p = subprocess.Popen(command(out, **settings), env=ENV, stdout=log, stderr=log)
        try:
            limit = time.monotonic() + 240
            while time.monotonic() < limit and p.poll() is None:
                rows = read_metrics(out / "metrics.jsonl")
                if rows and rows[-1]["step"] >= step: break
                time.sleep(.005)
            assert p.poll() is None, (out / "stderr.txt").read_text()[-3000:]
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(out, data=store)
    return out


def test_killed_twice_and_resumed(store, whole, tmp_path):
    kill_when(tmp_path, 2, data=store)   # before the first checkpoint
    kill_when(tmp_path, 11, data=store)  # in mid-epoch, between two validations
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert 0 < saved["step"] < STEPS and not (tmp_path / "record.json").exists()
    run(tmp_path, data=store)
    ends = [load_checkpoint(folder / "checkpoint.pt") for folder in (whole, tmp_path)]
    for part in ("method", "optimizer"): assert state_hash(ends[0][part]) == state_hash(ends[1][part])
    assert state_hash(ends[0]["state"]["best"]) == state_hash(ends[1]["state"]["best"])
    assert lines(whole) == lines(tmp_path)
    assert read_record(whole).weights_hash == read_record(tmp_path).weights_hash
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "predictions.parquet") for folder in (whole, tmp_path)), check_exact=True)


def test_two_processes_compute_what_one_does(store, tmp_path):
    settings = dict(data=store, drop_path=0., steps=8, patience=5)  # drop-path draws per process
    one = finetune(config(tmp_path / "one", **{**settings, "data": str(store)}))
    run(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", **settings)
    two = lines(tmp_path / "two")
    assert len(two) == 8
    for a, b in zip(one.history.to_dict("records"), two):
        for key in ("loss", "grad_norm", *(k for k in b if k.startswith("val/"))): assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-4), (key, a["step"])
    there = pd.read_parquet(tmp_path / "two/predictions.parquet")
    assert there.id.tolist() == one.predictions.id.tolist()
    np.testing.assert_allclose(there.p_M, one.predictions.p_M, atol=2e-3)


def test_workers_change_nothing(store, tmp_path):
    runs = [finetune(config(tmp_path / str(w), data=str(store), steps=6, workers=w)) for w in (0, 1)]
    pd.testing.assert_frame_equal(runs[0].predictions, runs[1].predictions, check_exact=True)


# protocols.md, sections 2 and 4: optimiser, highest lr, lowest lr, decay, warm-up, length, batch, clip, side, normalisation, augmentation, test
PROTOCOLS = {
    "peac": ("adamw", 5e-4 * 32 / 512, 5e-6 * 32 / 512, .05, ("epochs", 20, 150), 32, 5, 448, (.5056, .252), "crop flip rotate 7", "ten_crop logits", ("auroc", 20), .1),
    "peac_224": ("adamw", 5e-4 * 128 / 512, 5e-6 * 128 / 512, .05, ("epochs", 20, 150), 128, 5, 224, (.5056, .252), "crop flip rotate 7", "ten_crop logits", ("auroc", 20), .1),
    "benchmark": ("sgd", .01, 0, 0, ("epochs", 0, 200), 64, None, 224, ((.485, .456, .406), (.229, .224, .225)), "crop flip rotate 7", "ten_crop probabilities", ("loss", 10), 0),
    "refers": ("sgd", 3e-2, 0, 0, ("steps", 500, 10_000), 512, None, 384, ((.485, .456, .406), (.229, .224, .225)), "crop flip", "none", ("auroc", None), 0),
    "afire": ("sgd", 3e-3, 0, 0, ("steps", 5000, 200_000), 96, None, 224, (.4978, .2449), "crop flip", "none", ("auroc", None), 0),
    "afire_10": ("sgd", 3e-3, 0, 0, ("steps", 500, 30_000), 96, None, 224, (.4978, .2449), "crop flip", "none", ("auroc", None), 0),
    "afire_1": ("sgd", 8.5e-3, 0, 0, ("steps", 50, 2000), 96, None, 224, (.4978, .2449), "crop flip", "none", ("auroc", None), 0),
}


def test_every_preset_of_a_code_base_is_in_the_table():
    assert {*PROTOCOLS, "smoke", "small"} == {*FINETUNE_PRESETS}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_presets_agree_with_the_protocols(name):
    from anatcxr.downstream.classify_config import NORMALISATIONS
    c = FinetuneConfig.preset(name)
    kind, lr, low, decay, (unit, rise, length), batch, clip, size, norm, views, test, (select, patience), drop_path = PROTOCOLS[name]
    assert (c.optimiser, c.peak_lr(), c.min_lr, c.weight_decay, c.batch_size) == (kind, pytest.approx(lr), pytest.approx(low), decay, batch)
    assert getattr(c, unit) == length and (c.warmup * length if c.warmup < 1 else c.warmup) == pytest.approx(rise)
    assert (c.clip, c.size, c.select, c.patience, c.drop_path) == (clip, size, select, patience, drop_path) and c.momentum == .9
    assert NORMALISATIONS[c.norm] == norm
    assert (c.crop_scale, c.flip, c.rotate) == ((.08, 1.), .5, 7. if "rotate" in views else 0.)
    assert (f"{c.tta} {c.average}" if c.tta == "ten_crop" else c.tta) == test
    assert c.scale == "full" and c.percent == {"afire_10": 10, "afire_1": 1}.get(name, 100)


@pytest.fixture
def gaps(store, tmp_path) -> Path:
    """A table of files with three findings: complete, with gaps, and known in two training rows only."""
    films = ChestXrays(store)
    t, rng = films.table[["id", "patient", "split", "sex"]], np.random.default_rng(0)
    for k, x in enumerate(films.batch(range(len(t)))[0]): Image.fromarray((x[0] * 255).round().byte().numpy()).save(tmp_path / f"{k}.png")
    train = np.flatnonzero(t.split == "train")[:2]
    rare = np.full(len(t), np.nan)
    rare[train] = 0, 1
    t = t.assign(file=[f"{k}.png" for k in range(len(t))], y_Man=(t.sex == "M").astype(float), y_Half=np.where(rng.random(len(t)) < .5, np.nan, rng.integers(0, 2, len(t))), y_Rare=rare)
    t.to_csv(tmp_path / "gaps.csv", index=False)
    return tmp_path / "gaps.csv"


def test_unknown_labels_take_no_part(gaps, tmp_path):
    c = config(tmp_path / "run", data=str(gaps), task="multilabel", label_column="label", normal_label="normal", steps=3, drop_path=0., clip=None, average="logits")
    got = finetune(c)
    data = classify_data(c, 37)
    assert data.names == ("Man", "Half", "Rare") and np.isnan(data.y).mean() > .4
    with addressed_torch(c.seed, 0, "weights"): encoder, preprocess = starting_encoder(c)
    with addressed_torch(c.seed, 0, "head"): model = Classifier(encoder, preprocess, 3)
    images, ids = next(Loader(data.part("train"), c.batch_size, c.seed).epoch(0))
    y = torch.from_numpy(data.y)[[data.images.ids.tolist().index(i) for i in ids.tolist()]]
    logits = model.train()(apply_augment(images, sample_augment(c.seed, 0, ids, c.crop_scale, c.flip, c.rotate), 32))
    terms = [-(p.log() if t else (1 - p).log()) for p, t in zip(logits.sigmoid().flatten().tolist(), y.flatten().tolist()) if not np.isnan(t)
             for p in [torch.tensor(p)] for t in [bool(t)]]
    assert got.history.loss[0] == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)
    grad, = torch.autograd.grad(class_loss("multilabel", logits, y), logits)
    assert (grad[y.isnan()] == 0).all() and (grad[~y.isnan()] != 0).all()
    metrics = read_record(got.record).metrics
    assert metrics["test/auroc/Rare"] is None and metrics["test/auroc/Rare/low"] is None
    defined = [v for k, v in metrics.items() if k in ("test/auroc/Man", "test/auroc/Half") and v is not None]
    assert metrics["test/auroc"] == pytest.approx(np.mean(defined))
    assert any("Rare" in n for n in read_record(got.record).flags["notes"])
    assert got.predictions.y_Half.isna().any() and got.predictions.filter(like="p_").notna().all(axis=None)


def test_from_a_pretraining_run(tmp_path):
    films = pack("phantom:90", tmp_path / "films", size=96, workers=0)
    peac = pretrain(PretrainPEAC(data=str(films), out=str(tmp_path / "peac"), backbone="micro_vit", n=6, m=16, k=4, mlp_global="32-32-32", mlp_local="32-32-32", steps=2,
                                 batch_size=8, progress=False, device="cpu"))
    c = config(tmp_path / "run", data=str(films), init=str(peac.folder), size=None, steps=1, backbone=None)
    encoder, preprocess = starting_encoder(c)
    student, wanted = load_encoder(peac.folder / "encoder_student.safetensors")  # what PEAC's authors fine-tune
    assert state_hash(encoder.state_dict()) == state_hash(student.state_dict())
    assert (preprocess.size, preprocess.mean) == (64, wanted.mean)
    record = read_record(finetune(c).record)
    assert record.method == "peac" and record.flags["start_hash"] == state_hash(student.state_dict())
    bigger = finetune(config(tmp_path / "bigger", data=str(films), init=str(peac.folder), size=80, steps=1, backbone=None))
    assert bigger.model.encoder.grid == (5, 5)
    with pytest.raises(RuntimeError, match="first weights"):
        finetune(config(tmp_path / "run", data=str(films), init="scratch", size=None, steps=1, backbone="micro_vit"))


def test_the_command_says_what_is_wrong(gaps, tmp_path):
    wrong = dict(data=gaps, task="multilabel", label_column="label", normal_label="normal")
    with pytest.raises(SystemExit, match="ClassifyError: .*did you mean Half"): finetune_main(command(tmp_path / "x", **wrong, labels="Haif")[3:])
    with pytest.raises(SystemExit, match="there is no such|cannot be read|none.safetensors"): finetune_main(command(tmp_path / "x", **wrong, init="run:none.safetensors")[3:])
    t = pd.read_csv(gaps)
    t.loc[t.split == "test", "patient"] = t[t.split == "train"].patient.iloc[0]
    t.to_csv(gaps, index=False)
    with pytest.raises(SystemExit, match="patients in more than one split"): finetune_main(command(tmp_path / "x", **wrong)[3:])
    assert not (tmp_path / "x").exists()
