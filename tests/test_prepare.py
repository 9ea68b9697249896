"""Preparing a data set as a user does it: scripts and command agree with the registry, and a kill in the middle costs nothing."""
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anatcxr.cli import command_line
from anatcxr.data.prepare import SOURCES, prepare
from notebooks import ROOT


def run(*args, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    "600 small grey images in two classes, three of each person; two of them damaged."
    top, rng = tmp_path_factory.mktemp("films"), np.random.default_rng(0)
    for k in range(600):
        (folder := top / ("normal", "sick")[k // 3 % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (150, 130), dtype=np.uint8)).save(folder / f"person{k // 3}-{k}.png")
    for k in (5, 400): (top / ("normal", "sick")[k // 3 % 2] / f"person{k // 3}-{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return top


def command(films: Path, dst: Path, *more) -> list:
    return [ROOT / "data_scripts/folder.py", "--src", films, "--dst", dst, "--size", "96", "--set", r"patient=(person\d+)-", *more]


def content(store: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.iterdir()}


def test_every_data_set_has_a_script():
    scripts = {p.stem: p.read_text() for p in (ROOT / "data_scripts").glob("*.py")}
    assert scripts.keys() == SOURCES.keys()
    for name, text in scripts.items(): assert f'["prepare", "{name}", *sys.argv[1:]]' in text


def test_options_do_not_hide_settings():
    "An adapter's option and a setting of `prepare` with one name could not both be given."
    settings = set(inspect.signature(prepare).parameters) - {"options"}
    assert not {name: both for name, s in SOURCES.items() if (both := settings & s.options().keys())}


def test_killed_three_times_and_resumed_gives_the_same_bytes(films, tmp_path):
    whole = run(*command(films, tmp_path / "whole", "--workers", "0"))
    assert whole.returncode == 0, whole.stderr
    assert "2 left out, see quarantine.csv" in whole.stdout and "600 images of 200 patients" in whole.stdout
    staging, kills = tmp_path / "cut/.store-96-squash.packing", []
    journal = staging / "part-1-of-1.jsonl"
    for lines in (1, 1, 2):  # of the journal; there are three, of 256 rows or fewer
        worker = subprocess.Popen([sys.executable, *map(str, command(films, tmp_path / "cut", "--workers", "2"))], cwd=ROOT,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while worker.poll() is None and time.monotonic() < deadline:
            if journal.is_file() and journal.read_bytes().count(b"\n") >= lines: break
            time.sleep(.002)
        worker.kill()  # the parent alone: its own workers have to end with it, or they would keep the lock
        worker.wait()
        if staging.is_dir(): kills.append([json.loads(line)["end"] for line in journal.read_bytes().split(b"\n")[:-1]][-1])
    assert kills and kills[0] < 600 and not (tmp_path / "cut/store-96-squash").exists(), kills
    again = run(*command(films, tmp_path / "cut", "--workers", "1"))
    assert again.returncode == 0, again.stderr
    assert content(tmp_path / "cut/store-96-squash") == content(tmp_path / "whole/store-96-squash")
    assert not staging.exists()


def test_shards_at_the_same_time_give_the_same_bytes(films, tmp_path):
    assert run(*command(films, tmp_path / "one")).returncode == 0
    run(*command(films, tmp_path / "many", "--dry-run"))
    tasks = [subprocess.Popen([sys.executable, *map(str, command(films, tmp_path / "many", "--shard", f"{i}/3", "--workers", "0"))], cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in (1, 2, 3)]
    said = [t.communicate(timeout=300) for t in tasks]
    assert [t.returncode for t in tasks] == [0, 0, 0], said
    assert any("store: " in out for out, _ in said), said
    assert content(tmp_path / "many/store-96-squash") == content(tmp_path / "one/store-96-squash")


@pytest.mark.parametrize("args, part", [
    (["nhi"], "no such data set; there are"),
    (["kermany"], "fetch ChestXRay2017.zip"),
    (["folder", "--shard", "3"], "expected i/n"),
    (["folder", "--set", "patients=x"], "Did you mean 'patient'?"),
    (["folder", "--split", "released"], "expected official or random"),
])
def test_what_cannot_be_prepared_is_one_line(args, part, films, tmp_path):
    with pytest.raises(SystemExit) as e: command_line(["prepare", *args, "--src", str(films), "--dst", str(tmp_path / "x")])
    assert part in str(e.value) and "\n" not in str(e.value)


def test_audit_fails_on_a_leak_and_passes_without(films, tmp_path, capsys):
    rows = [f"{p.stem},{p},{p.stem.split('-')[0]},{('train', 'test')[int(p.stem.split('-')[1]) // 3 % 2]},{p.parent.name}"
            for p in sorted(films.rglob("*.png")) if p.stat().st_size > 100][:60]
    (tmp_path / "sound.csv").write_text("\n".join(["id,file,patient,split,label", *rows]))
    (tmp_path / "leaking.csv").write_text("\n".join(["id,file,patient,split,label", *rows, rows[0].replace("train", "test").replace("person", "again", 1)]))
    command_line(["audit", str(tmp_path / "sound.csv"), "--out", str(tmp_path / "findings.csv")])
    assert "sound.csv: 60 images" in capsys.readouterr().out and (tmp_path / "findings.csv").is_file()
    with pytest.raises(SystemExit) as e: command_line(["audit", str(tmp_path / "leaking.csv")])
    assert e.value.code == 1 and "leak: " in capsys.readouterr().out
