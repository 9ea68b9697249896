"""A killed run, resumed, ends with the bits of an uninterrupted one; two processes compute what one does."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anatcxr.train.config import PretrainAFiRe, PretrainPEAC
from anatcxr.train.pretrain import main, pretrain
from anatcxr.train.record import load_checkpoint, read_metrics, read_record, state_hash

STEPS, EPOCH = 30, 8  # 64 images in batches of 8
SETTINGS = dict(data="phantom:64", backbone="micro_vit", n=6, m=16, k=4, mlp_global="64-64-64", mlp_local="32-32-32",
                steps=STEPS, batch_size=8, save_every=5, log_every=1, device="cpu")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
TIMES = {"images_per_s", "wait"}


AFIRE = dict(data="phantom:64", backbone="micro_vit", size=64, K=32, head_hidden=32, head_dim=16, dec_depth=1, dec_dim=32, dec_heads=4,
             batch_size=8, lr=1e-3, freeze_last=1, steps=6, save_every=6, log_every=1, device="cpu")


def command(out: Path, *launcher: str, method: str = "peac", **settings) -> list[str]:
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in {**(SETTINGS if method == "peac" else AFIRE), "out": out, **settings}.items()]
    # the lone -- keeps torchrun from taking --n for one of its own options
    dashes = ["--"] if launcher else []
    return [sys.executable, *launcher, "-m", "anatcxr.train.pretrain", *dashes, method, "--no-progress", *flags]


def run(*args, **kw):
    done = subprocess.run(command(*args, **kw), env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def lines(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


def kill_when(out: Path, step: int):
    """Start a run and kill it, without warning, once it has logged `step`."""
    with open(out / "stderr.txt", "w") as log:
        p = subprocess.Popen(command(out), env=ENV, stdout=log, stderr=log)
        try:
            limit = time.monotonic() + 240
            while time.monotonic() < limit and p.poll() is None:
                rows = read_metrics(out / "metrics.jsonl")
                if rows and rows[-1]["step"] >= step: break
                time.sleep(.01)
            assert p.poll() is None, (out / "stderr.txt").read_text()[-3000:]
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()


def test_killed_twice_and_resumed(whole, tmp_path):
    kill_when(tmp_path, 2)   # before the first checkpoint
    kill_when(tmp_path, 12)  # in mid-epoch
    saved = load_checkpoint(tmp_path / "checkpoint.pt")
    assert 0 < saved["step"] < STEPS and saved["step"] % EPOCH
    assert not (tmp_path / "record.json").exists()
    run(tmp_path)
    ends = [load_checkpoint(folder / "checkpoint.pt") for folder in (whole, tmp_path)]
    for part in ("method", "optimizer"):
        assert state_hash(ends[0][part]) == state_hash(ends[1][part])
    assert lines(whole) == lines(tmp_path)
    assert read_record(whole).weights_hash == read_record(tmp_path).weights_hash
    exports = [(folder / "encoder_teacher.safetensors").read_bytes() for folder in (whole, tmp_path)]
    assert exports[0] == exports[1]


def test_truncated_checkpoint_stops_the_command_and_stays(whole, tmp_path):
    half = (whole / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(half[:len(half) // 2])
    with pytest.raises(SystemExit, match="CheckpointError: .*resume=False"):
        main(command(tmp_path)[3:])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_start_over_clears_what_the_old_run_left(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "encoder_gone.safetensors").write_bytes(b"of the old run")
    (out / "nonfinite-step0000003-rank0.pt").write_bytes(b"of the old run")
    pretrain(PretrainPEAC.from_params(**{**SETTINGS, "steps": 6, "out": str(out), "resume": False, "progress": False}))
    assert not [*out.glob("nonfinite-*")] and not (out / "encoder_gone.safetensors").exists()
    assert read_record(out).settings["steps"] == 6 and len(lines(out)) == 6
    assert (out / "encoder_teacher.safetensors").read_bytes() != (whole / "encoder_teacher.safetensors").read_bytes()


@pytest.mark.parametrize("method, recipe, settings", [
    ("peac", PretrainPEAC, dict(SETTINGS, steps=6, save_every=6, drop_path=0.)),  # drop-path draws per process
    ("afire", PretrainAFiRe, AFIRE),  # Sinkhorn, prototypes, denominators and the category loss over both processes
    ("afire", PretrainAFiRe, dict(AFIRE, variant="released")),
])
def test_two_processes_compute_what_one_does(method, recipe, settings, tmp_path):
    one = pretrain(recipe.from_params(**{**settings, "out": str(tmp_path / "one"), "progress": False}))
    run(tmp_path / "two", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", method=method, **settings)
    two = lines(tmp_path / "two")
    assert len(two) == 6
    for a, b in zip(one.history.to_dict("records"), two):
        for key in [k for k in a if k.startswith("loss")] + ["grad_norm"]:
            close = dict(abs=1e-5) if a["step"] == 1 and key != "grad_norm" else dict(rel=2e-3, abs=1e-5)  # sums in another order drift apart
            assert a[key] == pytest.approx(b[key], **close), (key, a["step"])
    ends = [load_checkpoint(tmp_path / n / "checkpoint.pt")["method"] for n in ("one", "two")]
    for name in [k for k in ends[0] if k == "prototypes.C"]:
        assert (ends[0][name] - ends[1][name]).abs().max() < 2e-3
