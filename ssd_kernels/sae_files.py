"""Autoencoders in the files of sparsify and SAELens: cfg.json and weights as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ssd_kernels.sae import BatchTopKSAE, TopKSAE

SETTINGS = "cfg.json"
WEIGHTS = {"sparsify": "sae.safetensors", "saelens": "sae_weights.safetensors"}
# Our name of each parameter -> that of the format; SAELens' W_enc is [d, R].
NAMES = {
    "sparsify": {
        "encoder.weight": "encoder.weight",
        "encoder.bias": "encoder.bias",
        "decoder.weight": "W_dec",
        "decoder.bias": "b_dec",
    },
    "saelens": {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "decoder.weight": "W_dec",
        "decoder.bias": "b_dec",
    },
}
# What these modules compute, as each format says it: the first value is the one that is written,
# a setting that is absent has it, too.
COMPUTED: dict[str, dict[str, tuple[Any, ...]]] = {
    "sparsify": {
        "activation": ("topk",),
        "skip_connection": (False,),
        "transcode": (False,),
        "normalize_decoder": (True, False),
        "multi_topk": (False, True),
    },
    "saelens": {
        "architecture": ("topk", "jumprelu"),
        # A scale that is the mean of the training data is in the saved weights already.
        "normalize_activations": ("none", "expected_average_only_in"),
        "reshape_activations": ("none",),
        "apply_b_dec_to_input": (True, False),
        "rescale_acts_by_decoder_norm": (False, True),
    },
}


def save(sae: TopKSAE, folder: str | Path, *, format: str = "saelens", **metadata: Any) -> None:
    """Writes an autoencoder for another library.

    A BatchTopKSAE becomes the JumpReLU network that it is in eval mode. The buffers of training
    are left out; state_dict has them.

    Args:
        sae: of any device and dtype.
        folder: made if it is not there; files of the same names in it are replaced.
        format: "saelens" or "sparsify".
        metadata: of SAELens' files, for instance model_name and hook_name.

    Raises:
        ValueError: the format is unknown or has no place for this, before any file is touched.
    """
    if format not in WEIGHTS:
        raise ValueError(f"save: format={format!r} is not one of {', '.join(WEIGHTS)}")
    if format == "sparsify" and (metadata or isinstance(sae, BatchTopKSAE)):
        lacking = f"metadata {sorted(metadata)}" if metadata else "a BatchTopKSAE"
        raise ValueError(f"save: sparsify's files cannot hold {lacking}; use format='saelens'")
    if len(sae.encoder.weight) != sae.neurons:
        raise ValueError(
            f"save: this process holds {len(sae.encoder.weight)} of {sae.neurons} neurons; gather "
            "the rows of all into a TopKSAE"
        )
    state = {name: p.detach().cpu() for name, p in sae.named_parameters()}
    settings: dict[str, Any] = {name: values[0] for name, values in COMPUTED[format].items()}
    settings |= {"d_in": sae.in_features, "k": sae.k}
    if format == "sparsify":
        settings["num_latents"] = sae.neurons
    else:
        state["encoder.weight"] = state["encoder.weight"].T
        dtype = str(sae.encoder.weight.dtype).removeprefix("torch.")
        settings |= {"d_sae": sae.neurons, "dtype": dtype, "device": "cpu"}
        settings["metadata"] = {"sae_lens_version": "6.0.0", **metadata}  # of the format
        if isinstance(sae, BatchTopKSAE):
            state["threshold"] = sae.threshold.to(sae.encoder.weight.dtype).cpu()
            settings["architecture"] = "jumprelu"
            settings["metadata"]["k"] = settings.pop("k")
    names = NAMES[format]
    tensors = {names.get(name, name): tensor.contiguous() for name, tensor in state.items()}
    files, folder = _safetensors(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.save_file(tensors, folder / WEIGHTS[format])
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **training: Any,
) -> TopKSAE:
    """Reads an autoencoder that sparsify, SAELens (architectures topk and jumprelu) or save wrote.

    Args:
        folder: that holds cfg.json and the weights.
        device: of the parameters; None: the CPU.
        dtype: of the parameters; None: the file's.
        training: dead_after and auxk of TopKSAE.

    Returns:
        A TopKSAE, or for jumprelu a BatchTopKSAE, in eval mode. A decoder bias that SAELens does
        not subtract, and activations that it multiplies by the decoder's norms, are folded into
        the weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds what these modules cannot compute.
    """
    folder = Path(folder)
    there = [name for name, file in WEIGHTS.items() if (folder / file).is_file()]
    if len(there) != 1 or not (folder / SETTINGS).is_file():
        known = " or ".join(WEIGHTS.values())
        raise FileNotFoundError(f"load: {folder} must hold {SETTINGS} and either {known}")
    (format,) = there
    settings = _settings(folder / SETTINGS, format)
    jumps = settings.get("architecture") == "jumprelu"
    state = _state(folder / WEIGHTS[format], format, jumps)
    d, k = settings.get("d_in"), (settings.get("metadata") or {} if jumps else settings).get("k")
    weight = state["encoder.weight"]
    if d != weight.shape[1]:
        raise ValueError(f"load: {folder} has weights of d={weight.shape[1]}, but d_in={d}")
    kind: Any = BatchTopKSAE if jumps else TopKSAE
    device = "cpu" if device is None else device
    sae = kind(d, len(weight), k, device=device, dtype=dtype or weight.dtype, **training)
    if settings.get("rescale_acts_by_decoder_norm"):
        norm = state["decoder.weight"].norm(dim=1)
        state["encoder.weight"] = weight * norm[:, None]
        state["encoder.bias"] = state["encoder.bias"] * norm
        state["decoder.weight"] = state["decoder.weight"] / norm[:, None]
    if settings.get("apply_b_dec_to_input") is False:
        shift = state["encoder.weight"] @ state["decoder.bias"]
        state["encoder.bias"] = state["encoder.bias"] + shift
    with torch.no_grad():
        for name, target in [*sae.named_parameters(), *sae.named_buffers()]:
            if name in state:
                target.copy_(state[name])
    return sae.eval()


def _settings(path: Path, format: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load: {path} is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"load: {path} holds {settings!r}, not settings by name")
    for name, values in COMPUTED[format].items():
        if (found := settings.get(name, values[0])) not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"load: {path} has {name}={found!r}; only {known} is supported")
    return settings


def _state(path: Path, format: str, jumps: bool) -> dict[str, Tensor]:
    """The tensors of a file under our names, of the shapes that they must have."""
    try:
        found = _safetensors().load_file(path)
    except Exception as error:  # safetensors raises its own class for a damaged file
        raise ValueError(f"load: {path} is damaged: {error}") from None
    names = dict(NAMES[format])
    if jumps:
        names["threshold"] = "threshold"
    if set(found) != set(names.values()):
        raise ValueError(f"load: {path} has {sorted(found)}, not {sorted(names.values())}")
    encoder = found[names["encoder.weight"]]
    if encoder.dim() != 2:
        raise ValueError(
            f"load: {path} has {names['encoder.weight']} {list(encoder.shape)}, expected a matrix"
        )
    neurons, width = encoder.shape if format == "sparsify" else encoder.shape[::-1]
    shapes = {
        names["decoder.weight"]: (neurons, width),
        names["decoder.bias"]: (width,),
        names["encoder.weight"]: encoder.shape,
    }
    for name, tensor in found.items():
        if tensor.shape != (expected := shapes.get(name, (neurons,))):
            raise ValueError(
                f"load: {path} has {name} {list(tensor.shape)}, expected {list(expected)}"
            )
    state = {ours: found[theirs] for ours, theirs in names.items()}
    if format == "saelens":
        state["encoder.weight"] = encoder.T
    return state


def _safetensors() -> ModuleType:
    try:
        from safetensors import torch as files
    except ImportError as error:
        raise ImportError("sae_files needs safetensors: pip install safetensors") from error
    return files
