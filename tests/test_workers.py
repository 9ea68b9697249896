"""Several workers make the runs of one: through submitit's local executor, and through Slurm's commands, here played by three scripts."""
import os
from dataclasses import replace
from pathlib import Path

import pytest

from anatcxr.reproduce.plan import reproduce, start_workers
from anatcxr.reproduce.runs import run_tasks, task_folders
from anatcxr.reproduce.tables import TableConfig, table_plan
from anatcxr.train.record import read_record

CONFIG = TableConfig(data="phantom:150", pretrain_steps=2, steps=2)

# What submitit asks of a cluster: sbatch takes a script and answers with a number, srun runs a command, sacct knows how far jobs are.
COMMANDS = {
    "sbatch": """#!/bin/bash
cp "$1" "$CLUSTER/script.$$"
(SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=localhost bash "$CLUSTER/script.$$" && touch "$CLUSTER/ended.$$") &>"$CLUSTER/output.$$" &
echo "Submitted batch job $$"
""",
    "srun": """#!/bin/bash
while [[ $1 == -* ]]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
""",
    "sacct": """#!/bin/bash
echo "JobID|State|NodeList"
for job in "$CLUSTER"/script.*; do n=${job##*.}; [ -e "$CLUSTER/ended.$n" ] && s=COMPLETED || s=RUNNING; echo "$n|$s|localhost"; done
""",
}


def tasks():
    return [t for t in table_plan("afire", 1, CONFIG).tasks if t.name == "store" or "1-all" in t.name or "restoration-alone" in t.name]


def weights(out: Path) -> dict[str, str]:
    folders = task_folders(tasks(), out)
    return {n: read_record(f).weights_hash for n, f in folders.items() if n != "store"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, str]:
    "Weights of every run, made by one process."
    out = tmp_path_factory.mktemp("alone")
    run_tasks(tasks(), out, report=lambda s: None)
    return weights(out)


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    "A folder where the scripts of submitted jobs are kept."
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in COMMANDS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(folder))
    return folder


def test_local_workers_make_the_runs_of_one_process(alone, tmp_path):
    states = start_workers(tasks(), tmp_path, 2)
    assert len(states) == 2 and len(alone) == 4
    for s in states: assert set(s.state) <= {"done", "kept"} and len(s) == 5, s
    assert weights(tmp_path) == alone


def test_slurm_is_asked_by_the_same_command(alone, cluster, tmp_path):
    reproduce("afire-table1", replace(CONFIG, out=str(tmp_path / "out")), cluster="slurm", slurm=dict(slurm_partition="gpu"))
    scripts = [p.read_text() for p in cluster.glob("script.*")]
    assert len(scripts) == 1 and "#SBATCH --partition=gpu" in scripts[0]
    assert weights(tmp_path / "out" / "runs") == alone
