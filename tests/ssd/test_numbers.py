"""What results are kept by: the numbers of ALGORITHM, which a change of them has to raise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_resume import write_features

from ssd.config import Config
from ssd.data import class_order, load, split
from ssd.peers import learners
from ssd.peers.learners import entries, evaluate_stream
from ssd.runs import RunOptions, run
from ssd.storage import run_folder as folder
from ssd.storage.run_folder import FREQUENCY, METRICS

SMALL = Config(
    dataset="features",
    tasks=2,
    epochs=4,
    batch_size=32,
    neurons=48,
    k=4,
    anneal_samples=200,
    lr=0.5,
    temperature=2.0,
    alpha=0.5,
    lam=0.5,
    subnetwork=2.0,
    seed=1,
    ewc_coefficient=1e4,
    ewc_beta=0.5,
    mas_coefficient=5.0,
    si_coefficient=0.1,
    si_beta=0.5,
    l2_coefficient=0.1,
)
RAISE = "raise ALGORITHM in ssd/{0}.py, and put the new numbers here, if this change is meant"
RUNS = {
    "sdmlp": (1.39416, 0.0895833),
    "ssd": (0.698871, 0.0895833),
    "ssd+ewc+mas": (0.700133, 0.0895833),
    "topk-mlp+lwf+si": (1.32841, 0.0833333),
    "relu-mlp+l2": (0.506993, 0.573047),
}
PEERS = {
    "nearest class mean": 9.76602,
    "streaming LDA": 11.4342,
    "ridge probe": 6.27619,
    "FlyModel": 5.76628,
    "random ReLU + ridge": 6.36231,
    "RanPAC": 6.35295,
    "Fly-CL": 6.09384,
    "sparse code, Gaussian addresses": 5.77558,
    "sparse code beside the input": 5.93091,
    "control: ReLU beside the input": 6.86888,
}


@pytest.mark.parametrize("method", RUNS)
def test_numbers_of_runs(tmp_path: Path, method: str) -> None:
    """Last losses and mean activation, far beyond the rounding of another machine."""
    write_features(tmp_path / "f.npz", 160)
    data = load("features", tmp_path, tmp_path / "f.npz")
    config = Config(**{**SMALL.to_dict(), "method": method})
    run(config, data, tmp_path / "r", RunOptions(torch.device("cpu")))
    last = json.loads((tmp_path / "r" / METRICS).read_text().splitlines()[-1])
    found = last["loss"], float(np.load(tmp_path / "r" / FREQUENCY).mean())
    assert folder.ALGORITHM == 1
    assert found == pytest.approx(RUNS[method], rel=5e-4), RAISE.format("folder")


def test_numbers_of_peers(tmp_path: Path) -> None:
    write_features(tmp_path / "f.npz", 400, features=16)
    data = load("features", tmp_path, tmp_path / "f.npz")
    stream = split(data, 2, class_order(4, 1))
    found = {}
    for entry in entries(16, 40):
        learner = entry.make(16, 4, 40, 1, {**entry.early[0], **entry.late[0]})
        evaluate_stream(learner, stream)
        found[entry.name] = float(torch.softmax(learner.predict(data.x_test), 1).double().norm())
    assert learners.ALGORITHM == 1
    assert found == pytest.approx(PEERS, rel=5e-4), RAISE.format("peers")
