"""Anomaly detection: scores against loops and scikit-learn, a killed run resumed, two processes, the released file, presets, leaks."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score, roc_curve

from anatcxr.data.manifest import ChestXrays, unit
from anatcxr.data.packing import pack
from anatcxr.data.rng import address, permutation
from anatcxr.downstream.anomaly import anomaly, anomaly_main
from anatcxr.downstream.anomaly_baselines import read_images
from anatcxr.downstream.anomaly_config import ANOMALY_METHODS, ANOMALY_PRESETS, AnomalyConfig, anomaly_scores_of
from anatcxr.downstream.anomaly_scores import self_masked_error
from anatcxr.downstream.anomaly_tune import AFiReStart, TuneAFiRe, afire_settings
from anatcxr.methods.afire import AFiReConfig
from anatcxr.models.checkpoints import ReleasedDecoder
from anatcxr.train.config import ConfigError, PretrainAFiRe
from anatcxr.train.pretrain import addressed_torch, pretrain
from anatcxr.train.record import load_checkpoint, read_metrics, read_record, state_hash
from test_checkpoints import SHAPES

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
AFIRE = dict(backbone="micro_vit", size=64, K=32, head_hidden=32, head_dim=16, dec_depth=1, dec_dim=32, dec_heads=4, scale_lr=False, lr=1e-3)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(pack("phantom:120", tmp_path_factory.mktemp("data") / "store", size=64, rule="squash", workers=0))


@pytest.fixture(scope="module")
def afire(store, tmp_path_factory):
    "A pretraining run."
    out = tmp_path_factory.mktemp("afire") / "run"
    return pretrain(PretrainAFiRe.from_params(**AFIRE, data=store, rows="split == 'train'", steps=8, batch_size=8, out=str(out), progress=False, device="cpu"))


def config(store: str, out: Path, **settings) -> AnomalyConfig:
    return AnomalyConfig.from_params(**dict(data=store, out=str(out), bootstrap=20, batch_size=8, steps=12, save_every=4, log_every=1, progress=False, device="cpu") | settings)


def command(c: AnomalyConfig, *launcher: str) -> list[str]:
    flags = [f"--{f.name.replace('_', '-')}={getattr(c, f.name)}" for f in fields(c) if f.type not in ("bool", bool) and getattr(c, f.name) is not None]
    return [sys.executable, *launcher, "-m", "anatcxr.downstream.anomaly", *(["--"] if launcher else []), "smoke", "--no-progress", *flags]


def run(c: AnomalyConfig, *launcher: str):
    done = subprocess.run(command(c, *launcher), env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_numbers_of_a_record_are_those_of_its_predictions(store, afire, tmp_path):
    got = anomaly(config(store, tmp_path / "run", steps=0, init=f"run:{afire.folder}"))
    m, p = read_record(got.record).metrics, got.predictions
    t, v = p[p.split == "test"], p[p.split == "val"]
    names = [*anomaly_scores_of("afire"), "control_brightness", "control_deviation", "control_untrained"]
    assert [*p.columns[:4]] == ["id", "patient", "split", "y"] and {*p.columns[4:]} == {*names} and {*p.split} == {"val", "test"} and len(names) == 24
    for n in names:
        assert m[f"test/auroc/{n}"] == pytest.approx(roc_auc_score(t.y, t[n])) and m[f"test/ap/{n}"] == pytest.approx(average_precision_score(t.y, t[n]))
        cuts = np.append(roc_curve(t.y, t[n], drop_intermediate=False)[2], np.inf)
        assert m[f"test/acc@oracle/{n}"] == pytest.approx(max(accuracy_score(t.y, t[n] >= c) for c in cuts))  # SQUID's search
        found = t[n] >= np.quantile(v[n][v.y == 0], .95)
        assert m[f"test/acc@normal/{n}"] == pytest.approx(accuracy_score(t.y, found)) and m[f"test/f1_macro@normal/{n}"] == pytest.approx(f1_score(t.y, found, average="macro"))
        best = max(accuracy_score(v.y, v[n] >= c) for c in [*v[n], np.inf])
        chosen = next(c for c in [np.inf, *sorted(v[n], reverse=True)] if accuracy_score(v.y, v[n] >= c) == best)
        assert m[f"test/f1@val/{n}"] == pytest.approx(f1_score(t.y, t[n] >= chosen)) and m[f"test/acc@val/{n}"] == pytest.approx(accuracy_score(t.y, t[n] >= chosen))
    assert m["test/f1@val"] == m["test/f1@val/self_masked_mean"]


@torch.no_grad()
def test_self_masked_restoration_is_its_loop(store, afire):
    m, data = afire.method, ChestXrays(store)
    images, ids = data.batch(range(3))
    x = m.preprocess.normalise(images)
    tokens, target = m.encoder().tokens(x), m.target(x)
    for share, groups in ((.25, 4), (.1, 10)):
        expected = torch.zeros(3, 16)
        for turn in range(2):
            place = permutation(address(7, turn, ids, "masked tokens"), 16)
            for i in range(3):
                for g in range(groups):
                    mine = [j for j in range(16) if place[i, j] * groups // 16 == g]
                    mask = torch.zeros(1, 16, dtype=torch.bool)
                    mask[0, mine] = True
                    restored = m.decoder(tokens[i:i + 1], mask)[0]
                    for j in mine: expected[i, j] += ((restored[j] - target[i, j]) ** 2).mean() / 2
        assert (self_masked_error(m.decoder, tokens, target, ids, share, 2, 7) - expected).abs().max() < 1e-5
        assert (read_images(m, images, ids, share, 2, 7).maps["self_masked"] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["afire", "knn", "autoencoder"])
def test_what_is_there_is_not_done_again(store, tmp_path, method):
    c = config(store, tmp_path / "run", method=method, steps=0, size=64, untrained=False)
    first = anomaly(c)
    written = first.record.stat().st_mtime_ns
    again = anomaly(c)
    assert again.record.stat().st_mtime_ns == written and again.predictions.equals(first.predictions)
    assert anomaly(config(store, tmp_path / "run", method=method, steps=0, size=64, untrained=False, seed=1)).record.stat().st_mtime_ns > written


def test_scores_depend_on_neither_batches_nor_workers(store, afire, tmp_path):
    one, two = (anomaly(config(store, tmp_path / n, steps=0, init=f"run:{afire.folder}", untrained=False, **kw)).predictions for n, kw in (("a", {}), ("b", dict(eval_batch=7, workers=1))))
    scores = one.columns[4:]
    assert np.allclose(one[scores], two[scores], rtol=1e-3, atol=1e-5)


def test_training_goes_on_from_the_runs_weights(store, afire, tmp_path):
    c = config(store, tmp_path / "run", init=f"run:{afire.folder}", steps=3, lr=1e-12)
    got, seen = None, []
    got = anomaly(c, on_step=lambda step, method: seen.append(step))
    assert seen == [1, 2, 3] and got.method.prototypes.updates == 8 + 3
    for a, b in zip(got.method.student.parameters(), afire.method.student.parameters()): assert (a - b).abs().max() < 1e-6
    assert read_record(got.folder / "train").method == "afire-tuned" and read_record(got.record).flags["start_hash"] == state_hash(afire.method.state_dict())
    used = ChestXrays(store, rows="split == 'train' and label == 'normal'")
    assert read_record(got.folder / "train").data_hash == used.fingerprint  # normal training images, and no others
    other = pretrain(PretrainAFiRe.from_params(**AFIRE, data=store, steps=2, batch_size=8, seed=1, out=str(tmp_path / "other"), progress=False, device="cpu"))
    with pytest.raises(RuntimeError, match="start is"): anomaly(config(store, tmp_path / "run", init=f"run:{other.folder}", steps=3, lr=1e-12))


@pytest.mark.parametrize("method", ["afire", "anatpaste"])
def test_killed_and_resumed(store, tmp_path, method):
    whole, cut = (config(store, tmp_path / n, method=method, backbone=None, size=64, lr=1e-4, steps=24, untrained=False) for n in ("whole", "cut"))
    run(whole)
    with open(tmp_path / "stderr.txt", "w") as log:
        p = subprocess.Popen(command(cut), env=ENV, stdout=log, stderr=log)
        try:
            limit, log_file = time.monotonic() + 240, tmp_path / "cut/train/metrics.jsonl"
            while time.monotonic() < limit and p.poll() is None and not (log_file.exists() and (rows := read_metrics(log_file)) and rows[-1]["step"] >= 6): time.sleep(.01)
            assert p.poll() is None, (tmp_path / "stderr.txt").read_text()[-3000:]
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()
    assert not (tmp_path / "cut/record.json").exists() and load_checkpoint(tmp_path / "cut/train/checkpoint.pt")["step"] < 24
    run(cut)
    a, b = (read_record(tmp_path / n) for n in ("whole", "cut"))
    assert a.weights_hash == b.weights_hash and a.metrics == b.metrics and a.data_hash == b.data_hash
    assert pd.read_parquet(tmp_path / "whole/predictions.parquet").equals(pd.read_parquet(tmp_path / "cut/predictions.parquet"))


def test_two_processes_score_what_one_does(store, afire, tmp_path):
    one, two = (config(store, tmp_path / n, init=f"run:{afire.folder}", steps=3, untrained=False) for n in ("one", "two"))
    a = anomaly(one).predictions
    run(two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    b = pd.read_parquet(tmp_path / "two/predictions.parquet")
    assert a.id.equals(b.id)
    for n in ("self_masked_mean", "restoration_mean", "prototype_mean", "kde"): assert np.abs(a[n] - b[n]).max() < .02 * np.abs(a[n]).max(), n


def test_the_released_file_begins_a_method(tmp_path):
    "Encoders, head and decoder at their real size, one number to a tensor; an image goes through."
    number = lambda shapes: {k: torch.full((), .01 * (i % 7 + 1)).expand(s) for i, (k, s) in enumerate(shapes.items())}
    student, teacher = (number(SHAPES[f"afire_vit_b_16_{who}"]) for who in ("student", "teacher"))
    student["decoder.pos_embed"] = torch.cat([torch.zeros(1, 1, 512), ReleasedDecoder().pos_embed], 1)
    student["head.last_layers.5.weight_v"] = torch.full((), .5).expand(256, 256)
    torch.save({who: {f"module.{k}": v for k, v in s.items()} for who, s in (("student", student), ("teacher", teacher))}, tmp_path / "afire.pth")
    init = f"afire={tmp_path / 'afire.pth'}"
    method = AFiReStart(**afire_settings(init), init=init).build().eval()
    assert (method.cfg.backbone, method.cfg.channels, method.preprocess.rule) == ("vit_base_patch16_224", 3, "squash")
    model = method.encoder("teacher").model
    assert torch.equal(model.blocks[11].mlp.fc2.weight, teacher["encoder.blocks.11.mlp.fc2.weight"]) and torch.equal(method.student.head.last_layer[5], student["head.last_layers.5.weight_v"])
    assert torch.equal(method.student.head.mlp[4].bias, student["head.mlp.4.bias"]) and torch.equal(method.decoder.decoder.head.weight, student["decoder.image_pred.weight"])
    with torch.no_grad():
        tokens = method.encoder().tokens(torch.zeros(1, 3, 224, 224))
        assert method.decoder(tokens, torch.zeros(1, 196, dtype=torch.bool)).shape == (1, 196, 768)
    assert method.decoder.token.requires_grad


def test_presets_are_the_protocols():
    assert {*ANOMALY_PRESETS} == {"smoke", "afire", "anatpaste", "cutpaste", "knn", "padim"}
    c = AnomalyConfig.preset("afire", data="x")
    assert (c.batch_size, c.loop().peak_lr(), c.min_lr, c.weight_decay, c.weight_decay_end, c.clip, c.clip_by, c.optimiser) == (64, 5e-4 * 64 / 256, 1e-6, .04, .4, 3., "tensor", "adamw")
    for name in ("anatpaste", "cutpaste"):
        c = AnomalyConfig.preset(name, data="x")
        assert (c.backbone, c.size, c.optimiser, c.lr, c.momentum, c.weight_decay, c.batch_size, c.steps, c.jitter, c.head_layers, c.bandwidth) == (
            "resnet18", 256, "sgd", .03, .9, 3e-5, 64, 65_536, .1, 1, 1.)
        assert c.score is None and ANOMALY_METHODS[name] == "kde"
    assert ANOMALY_METHODS["afire"] == "self_masked_mean"  # named before anything was measured
    tune = TuneAFiRe(**afire_settings("scratch"))
    assert (tune.METHOD, tune.size, tune.backbone, tune.ema_base) == (AFiReStart, 224, "vit_base_patch16_224", None) and tune.method_settings()["ema_base"] == .99
    with pytest.raises(ConfigError, match="2 problem"): AnomalyConfig(share=0., top=2.)


def test_the_command_says_what_is_wrong(store, tmp_path):
    films = ChestXrays(store)
    from PIL import Image
    for k, x in enumerate(films.batch(range(12))[0]): Image.fromarray((x[0] * 255).byte().numpy()).save(tmp_path / f"{k}.png")
    t = films.table[:12][["id", "patient", "label"]].assign(file=[f"{k}.png" for k in range(12)], split=["train"] * 6 + ["test"] * 6)
    t["label"] = ["normal"] * 9 + ["nodule"] * 3
    t.to_csv(tmp_path / "films.csv", index=False)
    args = ["knn", "--data", str(tmp_path / "films.csv"), "--init", "scratch", "--backbone", "micro_vit", "--size", "64", "--bootstrap", "5", "--no-progress", "--device", "cpu", "--out", str(tmp_path / "out")]
    anomaly_main(args)
    m = read_record(tmp_path / "out").metrics  # no validation images: only the oracle can be had
    assert m["test/acc@val"] is None and m["test/acc@normal"] is None and m["test/acc@oracle"] is not None and m["test/auroc"] is not None
    t.assign(patient=["p"] + t.patient.tolist()[1:-1] + ["p"]).to_csv(tmp_path / "films.csv", index=False)
    with pytest.raises(SystemExit, match="patients in more than one split: p"): anomaly_main(args)
    t.assign(label="normal").to_csv(tmp_path / "films.csv", index=False)
    with pytest.raises(SystemExit, match="AnomalyError: .*fewer than two abnormal test"): anomaly_main(args)
