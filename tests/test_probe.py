"""Probes: solvers against scikit-learn where it is hard, a cache that is whole or absent, bad input refused by name, and runs that fit beside fine-tuning's."""
import dataclasses
import os
import subprocess
import sys
import time
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from anatcxr.data.manifest import ChestXrays
from anatcxr.data.packing import pack
from anatcxr.data.table import ManifestError
from anatcxr.downstream.classify_config import FinetuneConfig
from anatcxr.downstream.classify_data import ClassifyError
from anatcxr.downstream.finetune import finetune
from anatcxr.downstream.linear import CS, ProbeError, choose_linear, fit_logistic, fit_sgd
from anatcxr.downstream.probe import cached_features, few_shot, knn_probe, knn_votes, linear_probe
from anatcxr.downstream.probe_run import ProbeConfig, probe, probe_main
from anatcxr.models.backbones import Preprocess, create_backbone
from anatcxr.train.record import export_encoder, read_record

SETTINGS = dict(task="binary", label_column="sex", normal_label="F", size=32, bootstrap=20, device="cpu", progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    return str(pack("phantom:120", tmp_path_factory.mktemp("data") / "store", size=37, workers=0))


@pytest.fixture
def config(store, tmp_path):
    return lambda **kw: ProbeConfig(**{**SETTINGS, "data": store, "out": str(tmp_path / "out"), "cache": str(tmp_path / "features"), **kw})


def loss(w, b, c, z, y) -> float:
    "What scikit-learn minimises."
    f = z @ w + b
    return c * (np.logaddexp(0, f) - y * f).sum() + .5 * (w ** 2).sum()


def hard(case: str):
    "Features and labels on which a solver may founder."
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 40))
    y = (x[:, 0] + .5 * rng.normal(size=300) > 0).astype(float)
    if case == "correlated": x = x @ (rng.normal(size=(40, 40)) * .7 ** np.arange(40)) + 100
    if case == "separable": y = (x[:, 0] > 0).astype(float)
    if case == "rare": y = (np.arange(300) < 4).astype(float)
    if case == "units": x = x * 10. ** np.linspace(-6, 6, 40)
    if case == "constant": x[:, 5:9] = 7.
    if case == "more features than rows": x, y = x[:30], y[:30]
    return x.astype(np.float32), y


@pytest.mark.parametrize("case", ["plain", "correlated", "separable", "rare", "units", "constant", "more features than rows"])
def test_logistic_regression_ends_where_scikit_learn_does(case):
    x, y = hard(case)
    models = fit_logistic(x, y)
    scaler = StandardScaler().fit(x.astype(np.float64))
    z = scaler.transform(x.astype(np.float64))
    for k, c in enumerate(CS):
        sk = LogisticRegression(C=c, max_iter=20000, tol=1e-8).fit(z, y)
        w, b = models.weight[k, :, 0].numpy() * scaler.scale_, models.bias[k, 0].item() + models.weight[k, :, 0].numpy() @ scaler.mean_
        assert loss(w, b, c, z, y) <= loss(sk.coef_[0], sk.intercept_[0], c, z, y) * (1 + 1e-6)
        assert np.abs(w - sk.coef_[0]).max() <= 2e-3 * np.abs(sk.coef_[0]).max()


def test_a_label_is_fitted_as_if_it_were_alone():
    "Unknown rows of one label and the presence of others change nothing."
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 30)).astype(np.float32), rng.integers(0, 2, (400, 3)).astype(np.float32)
    y[rng.random((400, 3)) < .4] = np.nan
    together, alone = fit_logistic(x, y, standardise=False), fit_logistic(x, y[:, 1], standardise=False)
    known = np.isfinite(y[:, 1])
    for other in (alone, fit_logistic(x[known], y[known, 1], standardise=False)):
        np.testing.assert_allclose(together.weight[:, :, 1], other.weight[:, :, 0], atol=2e-5)
        np.testing.assert_allclose(together.bias[:, 1], other.bias[:, 0], atol=2e-5)


def test_ten_thousand_vectors_take_seconds():
    "The time of the processor, which a busy machine does not change much: five seconds on two cores are ten of them."
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(768, 768)))[0]
    z = rng.normal(size=(10_000, 768)) * .9 ** np.arange(768)
    x, y = (z @ turn).astype(np.float32), (z[:, 0] + rng.logistic(size=10_000) > 0).astype(float)
    start = time.process_time()
    chosen = choose_linear(fit_logistic(x[:9000], y[:9000]), x[9000:], y[9000:])
    assert time.process_time() - start < 10 and chosen.weight.shape == (1, 768, 1)


def test_solvers_do_not_know_torchs_generator():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 8)).astype(np.float32), np.arange(90) % 2
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found.append((fit_sgd(x, y, epochs=3, batch_size=32).weight, fit_logistic(x, y).weight, torch.tensor(few_shot(x, y, x, np.arange(90), draws=2))))
        assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_shots_of_a_patient_are_one_and_do_not_depend_on_the_order_of_rows():
    rng = np.random.default_rng(0)
    x, y, who, ids = rng.normal(size=(60, 8)).astype(np.float32), np.arange(60) % 2, np.arange(60) // 4, torch.arange(60) * 7 + 1
    a = few_shot(x, y, x[:9], who, shots=6, draws=3, ids=ids)
    p = rng.permutation(60)
    np.testing.assert_allclose(few_shot(x[p], y[p], x[:9], who[p], shots=6, draws=3, ids=ids[p]), a, atol=1e-5)
    with pytest.raises(ProbeError, match="column 0, label 1: 15 training patients for 16 shots"): few_shot(x, y, x, who, shots=16)


# ---------------------------------------------------------------- bad input

def test_bad_input_is_refused_by_name():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)).astype(np.float32), np.arange(80) % 2
    broken = np.where(np.arange(80)[:, None] == 33, np.nan, x)
    for f in (lambda: linear_probe(broken, y, x, y), lambda: knn_probe(x, y, broken, y), lambda: knn_votes(broken, y, x), lambda: fit_sgd(broken, y),
              lambda: fit_logistic(broken, y), lambda: few_shot(x, y, broken, np.arange(80))):
        with pytest.raises(ProbeError, match="features of row 33 are not finite"): f()
    for f in (linear_probe, knn_probe):
        with pytest.raises(ProbeError, match="2 patients are in both train and test"): f(x[:60], y[:60], x[60:], y[60:], np.arange(60), np.arange(58, 78))
        assert np.isnan(f(x[:60], y[:60], x[60:], y[60:] * 0).auc)
    with pytest.raises(ProbeError, match="column 0 has 0 positive of 80 known rows"): fit_logistic(x, y * 0)
    with pytest.raises(ProbeError, match="labels hold"): fit_logistic(x, y * 2)
    gaps = np.where(np.arange(80) < 70, np.nan, y)
    with pytest.raises(ProbeError, match="k is 20; expected 1 to 10"): knn_votes(x, gaps, x, k=20)


def findings(store, folder: Path, **columns) -> str:
    "The films as files, with a table of findings."
    films = ChestXrays(store)
    t = films.table[["id", "patient", "split", "sex", "label"]]
    for k, x in enumerate(films.batch(range(len(t)))[0]): Image.fromarray((x[0] * 255).round().byte().numpy()).save(folder / f"{k}.png")
    t.assign(file=[f"{k}.png" for k in range(len(t))], **{k: f(t) for k, f in columns.items()}).to_csv(folder / "findings.csv", index=False)
    return str(folder / "findings.csv")


@pytest.mark.parametrize("solver", ["lbfgs", "sgd", "knn", "few_shot"])
def test_a_class_that_the_test_split_lacks_has_no_number(config, store, tmp_path, solver):
    data = findings(store, tmp_path, y_Man=lambda t: (t.sex == "M").astype(float), y_Rare=lambda t: ((t.sex == "F") & (t.split != "test")).astype(float))
    r = read_record(probe(config(data=data, task="multilabel", label_column="label", normal_label="normal", solver=solver, draws=3)).record)
    assert [r.metrics[f"test/auroc/Rare{e}"] for e in ("", "/low", "/high")] == [None] * 3
    assert 0 < r.metrics["test/auroc/Man/low"] <= r.metrics["test/auroc"] == r.metrics["test/auroc/Man"]
    assert "undefined in test" in " ".join(r.flags["notes"]) and "Rare" in " ".join(r.flags["notes"])


def test_a_binary_test_split_of_one_class_has_no_number(config, store, tmp_path):
    data = findings(store, tmp_path, kind=lambda t: np.where((t.split == "test") | (t.sex == "F"), "well", "ill"))
    for solver in ("lbfgs", "few_shot"):
        r = read_record(probe(config(data=data, label_column="kind", normal_label="well", solver=solver, draws=2, out=str(tmp_path / solver))).record)
        assert r.metrics["test/auroc"] is None and r.metrics["test/accuracy"] is not None and r.flags["notes"]


def test_a_class_that_training_lacks_is_an_error(config, store, tmp_path):
    data = findings(store, tmp_path, kind=lambda t: np.where(t.split == "test", "ill", "well"))
    with pytest.raises(ClassifyError, match="0 positive among"): probe(config(data=data, label_column="kind", normal_label="well"))
    assert not (tmp_path / "out").exists()


def test_leaks_are_refused(config, store, tmp_path):
    data = findings(store, tmp_path)
    t = pd.read_csv(data)
    t.loc[[t.index[t.split == "train"][0], t.index[t.split == "test"][0]], "patient"] = "twice"
    t.to_csv(data, index=False)
    with pytest.raises(ManifestError, match="more than one split: twice"): probe(config(data=data))
    assert probe(config(data=data, allow_leaks=True)).record.exists()


def test_features_that_are_not_finite_stop_the_run(config, tmp_path, store):
    encoder = create_backbone("micro_vit", 32)
    with torch.no_grad(): encoder.model.norm.bias[3] = torch.nan
    export_encoder(tmp_path / "bad.safetensors", encoder, Preprocess(32), {"backbone": "micro_vit"})
    with pytest.raises(ProbeError, match=rf"row 0 \({ChestXrays(store).table.id[0]}\) are not finite"): probe(config(init=str(tmp_path / "bad.safetensors")))
    assert not (tmp_path / "out").exists() and not (tmp_path / "features").exists()


def test_an_interrupted_look_leaves_no_features(tmp_path, store):
    class Interrupted(ChestXrays):
        def batch(self, rows):
            if max(rows) > 60: raise KeyboardInterrupt
            return super().batch(rows)

    encoder, how = create_backbone("micro_vit", 32).eval(), Preprocess(32)
    with pytest.raises(KeyboardInterrupt): cached_features(tmp_path, encoder, how, Interrupted(store))
    assert not [*tmp_path.iterdir()]
    x, path, _ = cached_features(tmp_path, encoder, how, ChestXrays(store))
    assert len(x) == 120 and [p.name for p in tmp_path.iterdir()] == [path.name]
    (path / "about.json").unlink()
    with pytest.raises(ProbeError, match="delete this folder"): cached_features(tmp_path, encoder, how, ChestXrays(store))


# ---------------------------------------------------------------- the run

def test_command_line_runs_once_and_refuses_other_settings(config, store):
    cfg = config()
    flags = ["--no-progress", *(f"--{k.replace('_', '-')}={v}" for k, v in {**SETTINGS, "data": store, "out": cfg.out, "cache": cfg.cache}.items() if k != "progress")]
    done = subprocess.run([sys.executable, "-m", "anatcxr.downstream.probe_run", *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == f"{cfg.out}/record.json", done.stderr[-2000:]
    written = (Path(cfg.out) / "record.json").stat().st_mtime_ns
    run = probe(cfg)  # the settings of the command line, to the letter
    assert run.record.stat().st_mtime_ns == written and len(run.predictions)
    with pytest.raises(SystemExit, match="CheckpointError: .*solver is 'lbfgs' there, 'knn' here"): probe_main([*flags, "--solver=knn"])
    r = read_record(cfg.out)
    assert (r.kind, r.method, r.scale) == ("probe", "scratch", "smoke") and {"test/auroc/low", "test/f1@val/high", "val/threshold"} <= {*r.metrics}


def test_what_shares_folds_and_fractions_shares_features(config, tmp_path):
    for k, change in enumerate((dict(), dict(percent=25), dict(folds=3, fold=1), dict(label_column="label", normal_label="normal"), dict(solver="knn", k=5))):
        r = read_record(probe(config(out=str(tmp_path / str(k)), **change)).record)
        assert (r.images_per_s is None) == (k > 0)
    assert len([*(tmp_path / "features").iterdir()]) == 1
    probe(config(out=str(tmp_path / "block"), block=0))
    assert len([*(tmp_path / "features").iterdir()]) == 2


def test_a_probe_and_a_fine_tuning_belong_in_one_table(config, store, tmp_path):
    "The same first weights, rows, preprocessing and images have the same stamps, and what is named alike is of one type."
    shared = dict(SETTINGS, data=store, percent=50, resize=37, seed=3)
    tuned = finetune(FinetuneConfig(**shared, out=str(tmp_path / "tuned"), epochs=None, steps=2, warmup=0., batch_size=8, backbone="micro_vit"))
    a, b = read_record(tuned.record), read_record(probe(config(**shared)).record)
    for stamp in ("data_hash", "split_hash", "preprocessing_hash", "method"): assert getattr(a, stamp) == getattr(b, stamp), stamp
    assert a.flags["start_hash"] == b.flags["start_hash"] == b.weights_hash and a.flags["outputs"] == b.flags["outputs"]
    assert tuned.predictions.columns.tolist() == pd.read_parquet(tmp_path / "out/predictions.parquet").columns.tolist()
    types, theirs = typing.get_type_hints(ProbeConfig), typing.get_type_hints(FinetuneConfig)
    defaults, there = ({f.name: f.default for f in dataclasses.fields(c)} for c in (ProbeConfig, FinetuneConfig))
    alike = {*defaults} & {*there}
    assert len(alike) > 20 and {n for n in alike if types[n] != theirs[n]} == {"epochs", "select"}
    assert {n for n in alike if defaults[n] != there[n]} <= {"out", "epochs", "batch_size"}


def test_without_validation_rows(config, store, tmp_path):
    data = findings(store, tmp_path)
    t = pd.read_csv(data)
    t[t.split != "val"].to_csv(data, index=False)
    with pytest.raises(ClassifyError, match="no val rows"): probe(config(data=data))
    for k, change in enumerate((dict(select="last", cs=(.1,)), dict(select="last", solver="knn"), dict(solver="few_shot", draws=2))):
        m = read_record(probe(config(data=data, out=str(tmp_path / str(k)), **change)).record).metrics
        assert m["test/auroc"] is not None and m.get("test/f1@val") is None
