"""Segmentation: smp's network from our weights, losses and Dice against their formulas, a killed run resumed to the same predictions."""
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch

from anatcxr.data.manifest import ChestXrays
from anatcxr.data.packing import pack
from anatcxr.downstream.masked import MaskedXrays, MaskError, apply_warp, sample_warp
from anatcxr.downstream.segment import predicted_masks, segment
from anatcxr.downstream.segment_settings import SEGMENT_PRESETS, SegmentConfig
from anatcxr.downstream.segmenter import Segmenter, load_segmenter, mask_loss, remap_swin_keys
from anatcxr.models.backbones import create_backbone
from anatcxr.train.config import ConfigError
from anatcxr.train.record import load_checkpoint, read_metrics, read_record

smp = pytest.importorskip("segmentation_models_pytorch", reason="needs the extra 'segment'")
SWIN = "swin_tiny_patch4_window7_224"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMES = {"images_per_s", "wait"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(pack("phantom:60", tmp_path_factory.mktemp("data") / "store", size=64, workers=0))


@pytest.fixture
def cfg(store, tmp_path) -> SegmentConfig:
    return SegmentConfig(data=store, size=64, backbone="micro_vit", channels=16, drop_path=.2, steps=40, batch_size=6, eval_every=7, save_every=5, log_every=1,
                         keep_masks=True, bootstrap=50, device="cpu", out=str(tmp_path / "run"), progress=False)


def random_images(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_swin_gives_equal_features_under_both_names():
    ours = create_backbone(SWIN, 224).eval()
    theirs = smp.UPerNet(f"tu-{SWIN}", encoder_weights=None, decoder_channels=16, img_size=224).eval().encoder
    assert not set(ours.state_dict()) & {k for k in theirs.state_dict() if "layers" in k}
    theirs.load_state_dict(remap_swin_keys(ours.state_dict()))
    x = random_images(224)
    maps = ours.model.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, theirs(x)[2:], strict=True))
    other = create_backbone(SWIN, 224).eval()
    there = {k for k in other.state_dict() if not k.startswith("model.norm.")}
    back = remap_swin_keys(theirs.state_dict(), "backbone")
    assert set(back) == there
    other.load_state_dict(back, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(maps, other.model.forward_intermediates(x, intermediates_only=True), strict=True))


@torch.no_grad()
def test_segmenter_is_smps_upernet():
    ours = Segmenter(create_backbone(SWIN, 64), channels=16).eval()
    theirs = smp.UPerNet(f"tu-{SWIN}", encoder_weights=None, decoder_channels=16, img_size=64).eval()
    theirs.load_state_dict(remap_swin_keys(ours.state_dict()))
    assert torch.equal(ours(random_images(64)), theirs(random_images(64)))


@pytest.mark.parametrize("name, parameters", [("peac", 86.74e6), ("afire", 85.80e6 + (32 * 32 - 14 * 14) * 768)])
def test_presets_build_at_full_size(name, parameters):
    "Shapes alone, without computing; the encoder's size is that of the published one, with a longer position code at 512 px."
    c = SegmentConfig.preset(name)
    net = Segmenter(create_backbone(c.backbone, c.size, drop_path=c.drop_path), c.head, c.channels, c.aux > 0).to("meta")
    logits, second = net(torch.zeros(2, 1, c.size, c.size, device="meta"), aux=True)
    assert logits.shape == (2, 1, c.size, c.size) and (second is not None) == (c.aux > 0)
    assert sum(p.numel() for p in net.encoder.parameters()) == pytest.approx(parameters, rel=.001)


def test_presets_are_settings():
    assert {*SEGMENT_PRESETS} == {"peac", "afire", "smoke", "small"}
    peac = SegmentConfig.preset("peac", data="x")
    assert (peac.size, peac.epochs, peac.batch_size, peac.patience, peac.loss, peac.rotate) == (448, 500, 20, 100, "dice_bce", 10)
    assert peac.lr == pytest.approx(1e-3 * 20 / 512)
    afire = SegmentConfig.preset("afire")
    assert (afire.size, afire.steps, afire.loss, afire.layer_decay, afire.flip, afire.p_warp) == (512, 160_000, "focal_dice", .65, .5, 0)
    with pytest.raises(ConfigError, match="at least two images"): replace(peac, batch_size=1)


@pytest.mark.parametrize("kind", ["dice_bce", "focal_dice"])
def test_losses_are_their_formulas(kind):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(3, 1, 5, 7)) * 3, rng.random((3, 1, 5, 7)) < .3
    p = 1 / (1 + np.exp(-z))
    right = np.where(y, p, 1 - p)
    expected = {"dice": 1 - 2 * p[y].sum() / (p.sum() + y.sum())}
    expected |= {"bce": -np.log(right).mean()} if kind == "dice_bce" else {"focal": -2 * ((1 - right) ** 2 * np.log(right)).mean()}
    found = mask_loss(torch.tensor(z, dtype=torch.float32), torch.tensor(y), kind)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, rel=1e-5)
    empty = mask_loss(torch.tensor(z, dtype=torch.float32), torch.tensor(y & False), kind)
    assert empty["dice"] == 0 and sum(empty.values()) > 0


def test_a_view_moves_image_and_mask_alike(store):
    images, ids, masks = MaskedXrays(ChestXrays(store), "lung").batch(range(20))
    views = sample_warp(0, 3, ids, p_warp=1, rotate=10, flip=.5, p_light=0)
    as_image, moved = apply_warp(masks.float(), masks, views)
    assert ((as_image > .5) == moved).float().mean() > .99
    assert (moved != masks).float().mean() > .02
    alone = apply_warp(images[4:5], masks[4:5], sample_warp(0, 3, ids[4:5], p_warp=1, rotate=10, flip=.5, p_light=0))[1]
    assert torch.equal(alone, moved[4:5])  # whoever else is in the batch


def start(cfg: SegmentConfig, log) -> subprocess.Popen:
    code = f"from anatcxr.downstream.segment import *\nfrom anatcxr.downstream.segment_settings import *\nsegment(SegmentConfig(**{asdict(cfg)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], env=ENV, stdout=log, stderr=log)


def run(cfg: SegmentConfig, folder):
    with open(folder / "stderr.txt", "w") as log: assert start(cfg, log).wait(300) == 0, (folder / "stderr.txt").read_text()[-3000:]


def kill_at(cfg: SegmentConfig, step: int, folder):
    "Start a run and kill it, without warning, once it has logged `step`."
    metrics, limit = folder / "run/metrics.jsonl", time.monotonic() + 240
    with open(folder / "stderr.txt", "w") as log:
        p = start(cfg, log)
        try:
            while time.monotonic() < limit and p.poll() is None and not any(r["step"] >= step for r in read_metrics(metrics)): time.sleep(.01)
            assert p.poll() is None, (folder / "stderr.txt").read_text()[-3000:]
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()


def test_killed_and_resumed_gives_the_same_predictions(cfg, tmp_path):
    whole = replace(cfg, out=str(tmp_path / "whole"))
    run(whole, tmp_path)
    kill_at(cfg, 12, tmp_path)
    saved = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert 10 <= saved["step"] < 40 and saved["best"]["step"] >= 7 and not (tmp_path / "run/record.json").exists()
    run(cfg, tmp_path)
    cases = [pd.read_parquet(tmp_path / n / "predictions.parquet") for n in ("whole", "run")]
    pd.testing.assert_frame_equal(*cases, check_exact=True)
    masks = [predicted_masks(tmp_path / n) for n in ("whole", "run")]
    assert masks[0].keys() == masks[1].keys() == set(cases[0].id) and all(np.array_equal(masks[0][k], masks[1][k]) for k in masks[0])
    assert read_record(tmp_path / "whole").weights_hash == read_record(tmp_path / "run").weights_hash
    lines = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("whole", "run")]
    assert lines[0] == lines[1] and len(lines[0]) == 40


def test_cases_and_record_follow_from_the_masks(cfg, tmp_path):
    cfg = replace(cfg, mask="finding", steps=8)  # normal phantoms have no such mask
    r = segment(cfg)
    data = MaskedXrays(ChestXrays(cfg.data), "finding")
    row, found = {i: k for k, i in enumerate(data.table.id)}, predicted_masks(r.folder)
    for case in r.cases.itertuples():
        t, f = data.masks([row[case.id]])[0, 0].numpy(), found[case.id]
        assert (case.both, case.found, case.true) == ((t & f).sum(), f.sum(), t.sum())
        assert case.dice == pytest.approx(2 * case.both / (case.found + case.true)) and case.iou == pytest.approx(case.both / (case.found + case.true - case.both))
    m, test = read_record(r.folder).metrics, r.cases[r.cases.split == "test"]
    assert m["test/dice"] == pytest.approx(test.dice.mean()) and m["test/pooled_dice"] == pytest.approx(2 * test.both.sum() / (test.found + test.true).sum())
    normal = ChestXrays(cfg.data).table.query("label == 'normal'").split.value_counts()
    assert {s: m[f"{s}/left_out"] for s in ("train", "val", "test")} == normal.to_dict()
    model, prepare = load_segmenter(r.folder)
    images, _, _ = data.batch([row[i] for i in test.id])
    with torch.no_grad(): again = model(prepare.normalise(images)) > 0
    assert sum((again[k, 0].numpy() != found[i]).sum() for k, i in enumerate(test.id)) <= 2  # other batches, other rounding
    r.record.unlink()  # as if killed before the last file
    once_more = segment(cfg, on_step=lambda *_: pytest.fail("trained on"))
    assert once_more.cases.equals(r.cases) and read_record(once_more.record).metrics == m


def test_nothing_where_nothing_is_counts_as_one(tmp_path):
    "Images without the organ: an empty mask that the table names is a case, a missing one is none."
    from PIL import Image
    for k in range(12):
        Image.fromarray(np.arange(k, k + 32 * 32).reshape(32, 32).astype(np.uint8)).save(tmp_path / f"{k}.png")
        mask = np.zeros((32, 32), np.uint8)
        if k == 11: mask[8:16, 8:16] = 255
        Image.fromarray(mask).save(tmp_path / f"m{k}.png")
    table = pd.DataFrame({"id": [f"i{k}" for k in range(12)], "file": [f"{k}.png" for k in range(12)], "split": ["train"] * 4 + ["val"] * 2 + ["test"] * 6,
                          "mask_organ": [None if k == 10 else f"m{k}.png" for k in range(12)]}).assign(patient=lambda t: t.id)
    table.to_csv(tmp_path / "t.csv", index=False)
    cfg = SegmentConfig(data=str(tmp_path / "t.csv"), mask="organ", size=32, backbone="micro_vit", head="linear", steps=1, warmup=0., lr=1e-9, batch_size=4, bootstrap=20,
                        out=str(tmp_path / "run"), progress=False, device="cpu")

    def nothing(step, model):
        with torch.no_grad():
            for p in model.segmentation_head.parameters(): p.zero_()
            model.segmentation_head[1].bias.fill_(-1.)

    r = segment(replace(cfg, select="last"), on_step=nothing)
    test, m = r.cases[r.cases.split == "test"].set_index("id"), read_record(r.folder).metrics
    assert test.found.sum() == 0 and test.dice.to_dict() == {"i6": 1, "i7": 1, "i8": 1, "i9": 1, "i11": 0}
    assert (m["test/cases"], m["test/empty"], m["test/empty_pairs"], m["test/left_out"]) == (5, 4, 4, 1)
    assert m["test/dice"] == .8 and m["test/pooled_dice"] == 0
    assert m["val/dice"] == 1 and m["val/pooled_dice"] is None  # no pixel at all
    with pytest.raises(MaskError, match="there are organ"): segment(replace(cfg, mask="lung", out=str(tmp_path / "no")))
    Image.new("L", (16, 32)).save(tmp_path / "m3.png")
    with pytest.raises(ValueError, match=r"m3.png: a mask of \(32, 16\) pixels for an image of \(32, 32\)"): segment(replace(cfg, out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()
