"""Peers on the loop: a run that is interrupted ends with the bits of one that is not, two processes do what one does, the encoder is a start like any other."""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anatcxr.data.packing import pack
from anatcxr.downstream.classify_config import FinetuneConfig
from anatcxr.downstream.finetune import finetune
from anatcxr.methods.peer_settings import PEERS
from anatcxr.models.checkpoints import initial_encoder
from anatcxr.train.config import PRETRAIN
from anatcxr.train.pretrain import pretrain
from anatcxr.train.record import load_checkpoint, read_metrics, read_record, state_hash
from notebooks import ROOT

WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "lightly": raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
import anatcxr.train.config
from anatcxr.train.pretrain import main
main(["moco", "--data", "phantom:4", "--backbone", "micro_vit", "--size", "32", "--source", "36", "--steps", "1", "--batch-size", "4", "--out", sys.argv[1]])
"""


def test_without_lightly_the_command_says_what_to_install(tmp_path):
    "Modules and recipes are there, and everything but peers works."
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "PeerError: peers need the package lightly" in done.stderr and "pip install 'anatcxr[peers]'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "x").exists()


lightly = pytest.importorskip("lightly", reason="needs lightly: pip install 'anatcxr[peers]'")

STEPS = 10
SETTINGS = dict(backbone="micro_vit", size=32, source=36, hidden=32, dim=16, pred=8, bottleneck=8, queue=24, dec_depth=1, dec_dim=32, dec_heads=4, drop_path=.1,
                mask_cell=16, steps=STEPS, batch_size=8, save_every=4, log_every=1, lr=1e-3, device="cpu", progress=False)
TIMES = {"images_per_s", "wait"}
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return pack("phantom:32", tmp_path_factory.mktemp("data") / "store", size=36, workers=0)


def recipe(peer: str, store: Path, out: Path, **settings):
    return PRETRAIN[peer].from_params(**{**SETTINGS, "data": str(store), "out": str(out), **settings})


def lines(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("peer", PEERS)
def test_an_interrupted_run_ends_with_the_same_bits(peer, store, tmp_path):
    "Stopped in the second epoch, two steps after the last checkpoint: queue, centre and batch norms included."
    def stop(step, method):
        if step == 6: raise KeyboardInterrupt
    whole = pretrain(recipe(peer, store, tmp_path / "whole"))
    with contextlib.suppress(KeyboardInterrupt): pretrain(recipe(peer, store, tmp_path / "cut"), stop)
    assert load_checkpoint(tmp_path / "cut/checkpoint.pt")["step"] == 4 and not (tmp_path / "cut/record.json").exists()
    again = pretrain(recipe(peer, store, tmp_path / "cut"))
    ends = [load_checkpoint(r.folder / "checkpoint.pt") for r in (whole, again)]
    for part in ("method", "optimizer"): assert state_hash(ends[0][part]) == state_hash(ends[1][part])
    assert lines(whole.folder) == lines(again.folder) and len(lines(again.folder)) == STEPS
    assert all(torch.isfinite(v).all() for v in ends[0]["method"].values() if v.is_floating_point())
    for who in whole.method.encoders:
        name = f"encoder_{who}.safetensors"
        assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()
    if peer == "moco": assert ends[0]["method"]["criterion.memory_bank.bank_ptr"].item() == 8 * STEPS % 24
    if peer == "dino": assert ends[0]["method"]["criterion.center"].abs().max() > 0


@pytest.mark.parametrize("peer", ["moco", "dino", "mae", "simmim"])
def test_two_processes_compute_what_one_does(peer, store, tmp_path):
    "Queue and centre over both processes. SimSiam and Barlow Twins have batch norms, which are each process's own."
    settings = dict(drop_path=0., steps=6, save_every=6, freeze_last=0)  # drop-path draws per process
    one = pretrain(recipe(peer, store, tmp_path / "one", **settings))
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**SETTINGS, **settings, "data": store, "out": tmp_path / "two"}.items() if k != "progress"]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "anatcxr.train.pretrain", "--", peer, "--no-progress", *flags],
                          cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(lines(one.folder), lines(tmp_path / "two"), strict=True):
        for key in [k for k in a if k.startswith("loss")] + ["grad_norm"]: assert a[key] == pytest.approx(b[key], rel=2e-3, abs=1e-5), (key, a["step"])
    ends = [load_checkpoint(tmp_path / n / "checkpoint.pt")["method"] for n in ("one", "two")]
    if peer == "dino": assert (ends[0]["criterion.center"] - ends[1]["criterion.center"]).abs().max() < 2e-3
    if peer == "moco":  # the same keys; within a step, those of one process come after the other's
        keys = [e["criterion.memory_bank.bank"].view(3, 8, 16) for e in ends]
        assert max((a[:, None] - b[None]).norm(dim=-1).min(1).values.max() for a, b in zip(*keys)) < 2e-3


@pytest.mark.parametrize("peer, who", [("dino", "teacher"), ("moco", "student"), ("mae", "student")])
def test_an_encoder_of_a_peer_is_a_start(peer, who, store, tmp_path):
    "Taken is what its authors take; the record of what begins there does not say that it is a published weight."
    run = pretrain(recipe(peer, store, tmp_path / peer, steps=2))
    assert read_record(run.record).method == f"peer-{peer}" and read_record(run.record).environment["versions"]["lightly"]
    encoder, preprocess = initial_encoder(f"run:{run.folder}")
    x = preprocess.normalise(torch.rand(2, 1, 32, 32))
    with torch.no_grad():
        assert preprocess.size == 32 and torch.equal(encoder.tokens(x), run.method.encoder(who).eval().tokens(x))
        assert torch.equal(encoder.tokens(x), encoder.model.forward_features(x.expand(-1, 3, -1, -1))[:, 1:])
    after = finetune(FinetuneConfig.preset("smoke", data=str(pack("phantom:90", tmp_path / "films", size=37, workers=0)), out=str(tmp_path / "after"), init=str(run.folder), backbone=None, size=None,
                                           task="binary", label_column="sex", normal_label="F", steps=1, bootstrap=10, device="cpu", progress=False))
    assert read_record(after.record).method == f"peer-{peer}"


@pytest.mark.parametrize("peer, backbone", [("simsiam", "resnet10t"), ("moco", "resnet10t"), ("dino", "micro_swin"), ("simmim", "micro_swin")])
def test_other_backbones(peer, backbone, store, tmp_path):
    "A ResNet where views are compared, a Swin where there is no class token: weights move, statistics of batch norm are finite."
    size = dict(size=64, source=64) if backbone == "resnet10t" else dict(size=112, source=112)
    data = pack("phantom:16", tmp_path / "store", size=size["source"], workers=0)
    run = pretrain(recipe(peer, data, tmp_path / "run", backbone=backbone, steps=2, batch_size=8, **size))
    assert run.history.loss.notna().all()
    encoder, _ = initial_encoder(f"run:{run.folder}")
    assert encoder.tokens(torch.rand(2, 1, *[encoder.img_size] * 2)).isfinite().all()


def test_real_films_if_there_are_any(tmp_path):
    "The smallest run on packed radiographs, where the shared ones are there."
    from anatcxr.data.manifest import shared_data
    if shared_data() is None: pytest.skip("shared data absent")
    films = pack(shared_data() / "manifest.csv", tmp_path / "films", size=36, rule="squash", workers=0, masks=False, rows="source == 'kermany'", allow_leaks=True)
    run = pretrain(recipe("simsiam", films, tmp_path / "run", rule="squash", steps=3, limit=64, allow_leaks=True))
    assert run.history.loss.between(-1, 1).all()
