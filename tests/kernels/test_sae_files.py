"""Files of sparsify and SAELens: round trips here and, where they are installed, through them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssd_kernels.sae import BatchTopKSAE, TopKSAE
from ssd_kernels.sae_files import load, save

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(kind: type[TopKSAE] = TopKSAE, dtype: torch.dtype = torch.float32) -> TopKSAE:
    torch.manual_seed(0)
    sae = kind(6, 40, 5, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        if isinstance(sae, BatchTopKSAE):
            sae.threshold.uniform_(1, 3)
            sae.threshold.copy_(sae.threshold.to(dtype))
    return sae.eval()


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def dense(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    values, indices, *_ = sae.encode(x)
    return torch.zeros(*x.shape[:-1], sae.neurons, dtype=x.dtype).scatter(-1, indices, values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "format"), [(TopKSAE, "saelens"), (TopKSAE, "sparsify"), (BatchTopKSAE, "saelens")]
)
def test_round_trip(kind: type[TopKSAE], format: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = drawn(kind, dtype)
    save(sae, tmp_path / "new" / "folder", format=format)
    back = load(tmp_path / "new" / "folder", dead_after=7, auxk=2)
    assert (type(back), back.k, back.dead_after, back.auxk) == (kind, 5, 7, 2)
    assert not back.training
    x = torch.randn(9, 6).to(dtype)
    torch.testing.assert_close(back(x), sae(x), rtol=0, atol=0)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(back.get_parameter(name), parameter, rtol=0, atol=0)
    wide = load(tmp_path / "new" / "folder", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


def test_device_is_kept(device: str, tmp_path: Path) -> None:
    save(drawn().to(device), tmp_path)
    back = load(tmp_path, device=device)
    tensors = [*back.parameters(), *back.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert {tensor.device.type for tensor in load(tmp_path).parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsify_reads_and_writes_it(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    library = pytest.importorskip("sparsify", reason="eai-sparsify is not installed")
    sae = drawn(dtype=dtype)
    save(sae, tmp_path / "ours", format="sparsify")
    theirs = library.SparseCoder.load_from_disk(tmp_path / "ours")
    assert theirs.dtype == dtype
    x = torch.randn(9, 6).to(dtype)
    code = theirs.encode(x)
    values, order = code.top_acts.sort(descending=True)
    ours = sae.encode(x)
    torch.testing.assert_close(values, ours.values)
    if dtype == torch.float32:
        assert torch.equal(code.top_indices.gather(1, order), ours.indices)
    theirs.save_to_disk(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    torch.testing.assert_close(back(x), sae(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_saelens_reads_and_writes_it(
    kind: type[TopKSAE], dtype: torch.dtype, tmp_path: Path
) -> None:
    library = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    sae = drawn(kind, dtype)
    save(sae, tmp_path / "ours", model_name="a model")
    theirs = library.SAE.load_from_disk(tmp_path / "ours")
    assert theirs.cfg.architecture() == ("topk" if kind is TopKSAE else "jumprelu")
    assert (theirs.dtype, theirs.cfg.metadata.model_name) == (dtype, "a model")
    x = torch.randn(9, 6).to(dtype)
    code = theirs.encode(x)
    if kind is TopKSAE and dtype != torch.float32:  # near ties are chosen after rounding there
        torch.testing.assert_close(code.topk(5).values, sae.encode(x).values)
    else:
        torch.testing.assert_close(code, dense(sae, x))
    theirs.save_model(tmp_path / "theirs")
    back = load(tmp_path / "theirs")
    torch.testing.assert_close(back(x), sae(x), rtol=0, atol=0)


def test_what_saelens_does_besides_is_folded(tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens", reason="sae-lens is not installed")
    save(drawn(), tmp_path)
    changed(tmp_path, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    theirs = library.SAE.load_from_disk(tmp_path)
    x = torch.randn(9, 6)
    back = load(tmp_path)
    torch.testing.assert_close(dense(back, x), theirs.encode(x))
    torch.testing.assert_close(back(x).output, theirs(x))


def test_folded_weights_compute_the_same(tmp_path: Path) -> None:
    """The formulas of SAELens' two settings, without SAELens."""
    sae = drawn()
    save(sae, tmp_path)
    changed(tmp_path, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)
    x, norm = torch.randn(9, 6), sae.decoder.weight.norm(dim=1)
    scores = (x @ sae.encoder.weight.T + sae.encoder.bias) * norm
    top = scores.topk(5)
    code = torch.zeros_like(scores).scatter(1, top.indices, top.values.relu())
    back = load(tmp_path)
    torch.testing.assert_close(dense(back, x), code)
    output = (code / norm) @ sae.decoder.weight + sae.decoder.bias
    torch.testing.assert_close(back(x).output, output)


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        ("saelens", {"architecture": "gated"}, "architecture='gated'"),
        ("saelens", {"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ("saelens", {"d_in": 7}, "d_in=7"),
        ("saelens", {"k": 41}, "k=41"),
        ("sparsify", {"activation": "groupmax"}, "activation='groupmax'"),
        ("sparsify", {"transcode": True}, "transcode=True"),
    ],
)
def test_what_cannot_be_computed(
    format: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save(drawn(), tmp_path, format=format)
    changed(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    save(drawn(), tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "scaling_factor": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="scaling_factor"):
        load(tmp_path)
    save_file({**tensors, "b_enc": torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=r"b_enc \[3\], expected \[40\]"):
        load(tmp_path)
    save_file({**tensors, "W_enc": torch.ones(3)}, weights)
    with pytest.raises(ValueError, match=r"W_enc"):
        load(tmp_path)
    weights.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(ValueError, match=r"cfg\.json"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="must hold"):
        load(tmp_path)


def test_saving_refuses_before_it_writes(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match="format='pickle'"):
        save(drawn(), folder, format="pickle")
    with pytest.raises(ValueError, match="a BatchTopKSAE"):
        save(drawn(BatchTopKSAE), folder, format="sparsify")
    with pytest.raises(ValueError, match="model_name"):
        save(drawn(), folder, format="sparsify", model_name="x")
    shard = drawn()
    shard.neurons = 80  # as in ssd_kernels.parallel
    with pytest.raises(ValueError, match="40 of 80 neurons"):
        save(shard, folder)
    assert not folder.exists()


def test_safetensors_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save(drawn(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
