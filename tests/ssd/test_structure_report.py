"""The figures show what the measures say, for few and many tasks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from summaries import summary_of

from ssd import metrics
from ssd.errors import UserError
from ssd.figures import draw_coverage, draw_transfer, pairwise, write_structure_figures
from ssd.storage.run_folder import STRUCTURE, SUMMARY
from ssd.structure import Snapshot, StructureRecorder


def snapshots(tasks: int, seed: int = 0) -> list[Snapshot]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return [
        Snapshot(
            torch.randperm(30, generator=generator)[:4].sort().values,
            draw(4, 6).float(),
            draw(30) * (draw(30) > 0.3),
            10 * draw(),
            draw(),
        )
        for _ in range(tasks)
    ]


def finished(folder: Path, tasks: int, method: str = "ssd", seed: int = 0) -> dict:
    recorder = StructureRecorder(4)
    recorder.snapshots = snapshots(tasks, seed)
    folder.mkdir(exist_ok=True)
    recorder.save(folder / STRUCTURE)
    matrix = [[0.5] * tasks] * tasks
    summary = {**summary_of(matrix), "method": method, "structure": recorder.summary()}
    (folder / SUMMARY).write_text(json.dumps(summary))
    return summary


@pytest.mark.parametrize("tasks", [1, 2, 10, 50])
def test_figures_of_a_run(tmp_path: Path, tasks: int) -> None:
    finished(tmp_path, tasks)
    write_structure_figures(tmp_path)
    for name in ("structure_transfer", "structure_coverage"):
        assert plt.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.05  # something is drawn
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not plt.get_fignums()


def test_pairs_are_row_against_column() -> None:
    taken = snapshots(3)
    found = pairwise(taken)
    for row in range(3):
        for column in range(3):
            a, b = taken[row], taken[column]
            assert found["jaccard"][row, column] == metrics.jaccard(a.neurons, b.neurons)
            assert found["kl_bits"][row, column] == metrics.kl_divergence(a.frequency, b.frequency)
            assert found["address_cosine"][row, column] == metrics.address_cosine(
                a.addresses, b.addresses
            )
    assert not np.allclose(found["kl_bits"], found["kl_bits"].T)


@pytest.mark.parametrize("tasks", [3, 12])
def test_transfer_shows_the_three_matrices(tasks: int) -> None:
    taken = snapshots(tasks)
    figure = draw_transfer(taken)
    panels = [axes for axes in figure.axes if axes.images and axes.get_xlabel()]
    titles = ("Jaccard", "cosine", "KL")
    for axes, title, matrix in zip(panels, titles, pairwise(taken).values(), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
        assert axes.get_title().startswith(title)
        written = [text.get_text() for text in axes.texts]
        assert written == ([f"{v:.2f}" for v in matrix.flat] if tasks <= 10 else [])
    plt.close(figure)


def test_coverage_shows_the_measures(tmp_path: Path) -> None:
    summary = finished(tmp_path, 4)
    figure = draw_coverage(summary["structure"])
    for axes, name in zip(figure.axes, ("effective_rank", "used_fraction"), strict=True):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), summary["structure"][name])
        assert axes.get_ylim()[0] == 0
    plt.close(figure)


def test_summaries_without_structure(tmp_path: Path) -> None:
    summary = finished(tmp_path, 2)
    del summary["structure"]
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(UserError, match=rf"{SUMMARY} is damaged \(effective_rank is missing"):
        write_structure_figures(tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("values", [None, [0.5], [0.5, None], "0.5"])
def test_damaged_coverage(tmp_path: Path, values: object) -> None:
    summary = finished(tmp_path, 2)
    summary["structure"]["used_fraction"] = values
    (tmp_path / SUMMARY).write_text(json.dumps(summary))
    with pytest.raises(UserError, match=rf"{SUMMARY} is damaged"):
        write_structure_figures(tmp_path)


@pytest.mark.parametrize("name", ["neurons", "addresses", "frequency", "used_fraction"])
def test_a_record_of_fewer_tasks(tmp_path: Path, name: str) -> None:
    finished(tmp_path, 3)
    with np.load(tmp_path / STRUCTURE) as file:
        arrays = {key: file[key] for key in file.files}
    for bad in (arrays[name][:2], arrays[name][:0], arrays[name][0]):
        np.savez(tmp_path / STRUCTURE, **{**arrays, name: bad})
        with pytest.raises(UserError, match=rf"{STRUCTURE} is damaged"):
            write_structure_figures(tmp_path)


def test_a_run_without_its_record(tmp_path: Path) -> None:
    finished(tmp_path, 2)
    (tmp_path / STRUCTURE).unlink()
    with pytest.raises(UserError, match="is missing"):
        write_structure_figures(tmp_path)
    assert not list(tmp_path.glob("*.png"))
