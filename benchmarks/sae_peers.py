"""A training step of Top-K autoencoders: ours, and four libraries' where they are installed.

All begin with the same weights. What a library does instead of unit rows is left as it is: SAELens
multiplies by the decoder's norms (with sparse codes it does neither), overcomplete normalises the
dictionary in its forward pass and has no decoder bias.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from ssd.storage.provenance import installed
from ssd_kernels.sae import BatchTopKSAE, TopKSAE

AUXK = 1 / 32  # weight of the AuxK loss


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Peer:
    """An autoencoder in training.

    Args:
        loss: x [B, d] -> what its trainer minimises.
        reconstruct: x [B, d] -> x'.
        encoder_gradient: that of the encoder's weight, [R, d].
        project: takes the parallel part from the decoder's gradient.
        constrain: gives the decoder unit rows.
        biased: whether it has a decoder bias.
        rounded: whether it computes in 16 bits, whatever its dtype.
    """

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    reconstruct: Callable[[Tensor], Tensor]
    encoder_gradient: Callable[[], Tensor]
    project: Callable[[], object] = _nothing
    constrain: Callable[[], object] = _nothing
    biased: bool = True
    rounded: bool = False

    def gradients(self, x: Tensor) -> None:
        """Forward, losses, backward, and the decoder's gradient without its parallel part."""
        self.loss(x).backward()
        self.project()

    def step(self, x: Tensor) -> None:
        """A training step without the optimizer's, which is the same for all."""
        self.gradients(x)
        self.model.zero_grad()
        self.constrain()


Dead = Tensor | None  # [R] bool
Build = Callable[[TopKSAE, int, Dead], Peer]  # our weights, the batch size, dead neurons


def ours(sae: TopKSAE, _: int, dead: Dead) -> Peer:
    model = deepcopy(sae).train()
    if dead is not None:
        model.samples.fill_(model.dead_after)
        model.last_active.copy_(model.dead_after * ~dead)

    def loss(x: Tensor) -> Tensor:
        out = model(x)
        return out.fvu + AUXK * out.auxk

    return Peer(
        model,
        loss,
        lambda x: model(x).output,
        lambda: model.encoder.weight.grad,
        model.project_gradient,
        model.normalize_decoder,
    )


def sparsify(sae: TopKSAE, _: int, dead: Dead) -> Peer:
    weight = sae.encoder.weight
    if not weight.is_cuda:
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its decoder would launch a kernel on a CPU
    package = importlib.import_module("sparsify")
    settings = package.SparseCoderConfig(num_latents=sae.neurons, k=sae.k)
    model = package.SparseCoder(sae.in_features, settings, weight.device, weight.dtype)
    _copy(model, sae, W_dec="decoder.weight", b_dec="decoder.bias")

    def loss(x: Tensor) -> Tensor:
        out = model(x, dead_mask=dead)
        return out.fvu + AUXK * out.auxk_loss

    return Peer(
        model,
        loss,
        lambda x: model(x).sae_out,
        lambda: model.encoder.weight.grad,
        model.remove_gradient_parallel_to_decoder_directions,
        model.set_decoder_norm_to_unit_norm,
        rounded=weight.is_cuda,
    )


def saelens(sae: TopKSAE, _: int, dead: Dead, *, batch: bool = False, sparse: bool = False) -> Peer:
    package = importlib.import_module("sae_lens.saes")
    name = "BatchTopKTrainingSAE" if batch else "TopKTrainingSAE"
    weight = sae.encoder.weight
    settings = getattr(package, f"{name}Config")(
        d_in=sae.in_features,
        d_sae=sae.neurons,
        k=sae.k,
        aux_loss_coefficient=AUXK,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,  # torch 2.14 has no such backward of sparse codes
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
    )
    model = getattr(package, name)(settings)
    with torch.no_grad():
        model.W_enc.copy_(weight.T)
        model.b_enc.copy_(sae.encoder.bias)
        model.W_dec.copy_(sae.decoder.weight)
        model.b_dec.copy_(sae.decoder.bias)
    step_input = importlib.import_module("sae_lens.saes.sae").TrainStepInput

    def trained(x: Tensor) -> Any:
        given = {"dead_neuron_mask": dead, "n_training_steps": 0, "is_logging_step": False}
        return model.training_forward_pass(step_input(sae_in=x, coefficients={}, **given))

    return Peer(
        model,
        lambda x: trained(x).loss,
        lambda x: trained(x).sae_out,
        lambda: model.W_enc.grad.T,
    )


def dictionary_learning(sae: TopKSAE, _: int, dead: Dead, *, batch: bool = False) -> Peer:
    trainers = importlib.import_module("dictionary_learning.trainers")
    helpers = importlib.import_module("dictionary_learning.trainers.trainer")
    weight = sae.encoder.weight
    trainer = (trainers.BatchTopKTrainer if batch else trainers.TopKTrainer)(
        steps=10_000,
        activation_dim=sae.in_features,
        dict_size=sae.neurons,
        k=sae.k,
        layer=0,
        lm_name="",
        device=str(weight.device),
    )
    model, sizes = trainer.ae.to(weight.dtype), (sae.in_features, sae.neurons)
    _copy(model, sae, b_dec="decoder.bias")
    with torch.no_grad():
        model.decoder.weight.copy_(sae.decoder.weight.T)
    if dead is not None:
        trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
    # A step after the first ones, when BatchTopK has a threshold; ours has none for Top-K.
    step = trainer.threshold_start_step + 1 if batch else 0

    def project() -> None:
        decoder = model.decoder.weight
        helpers.remove_gradient_parallel_to_decoder_directions(decoder, decoder.grad, *sizes)

    return Peer(
        model,
        lambda x: trainer.loss(x, step=step),
        lambda x: model.decode(model.encode(x, use_threshold=False)),
        lambda: model.encoder.weight.grad,
        project,
        lambda: helpers.set_decoder_norm_to_unit_norm(model.decoder.weight, *sizes),
    )


def overcomplete(sae: TopKSAE, rows: int, dead: Dead, *, batch: bool = False) -> Peer:
    if not hasattr(matplotlib.cm, "get_cmap"):  # gone since matplotlib 3.9, used by its import
        matplotlib.cm.get_cmap = matplotlib.colormaps.get_cmap
    package = importlib.import_module("overcomplete.sae")
    weight = sae.encoder.weight
    kind, k = (package.BatchTopKSAE, sae.k * rows) if batch else (package.TopKSAE, sae.k)
    model = kind(sae.in_features, sae.neurons, top_k=k, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        (linear,) = (m for m in model.encoder.modules() if isinstance(m, nn.Linear))
        linear.weight.copy_(weight)
        linear.bias.copy_(sae.encoder.bias)
        model.dictionary._weights.copy_(sae.decoder.weight)
    model.train()
    return Peer(
        model,
        lambda x: (x - model(x)[2]).square().mean(),
        lambda x: model(x)[2],
        lambda: linear.weight.grad,
        biased=False,
    )


def _copy(model: nn.Module, sae: TopKSAE, **names: str) -> None:
    """Copies our encoder and the parameters that are named, of the same shapes."""
    with torch.no_grad():
        model.encoder.weight.copy_(sae.encoder.weight)
        model.encoder.bias.copy_(sae.encoder.bias)
        for theirs, mine in names.items():
            model.get_parameter(theirs).copy_(sae.get_parameter(mine))


@dataclass(frozen=True)
class Library:
    """A library's autoencoder: its distribution on PyPI, and whether it has an AuxK loss."""

    package: str
    build: Build
    auxk: bool = True


# op -> our class, and name -> library
CLASSES: dict[str, type[TopKSAE]] = {"TopK": TopKSAE, "BatchTopK": BatchTopKSAE}
LIBRARIES: dict[str, dict[str, Library]] = {
    "TopK": {
        "sparsify": Library("eai-sparsify", sparsify),
        "SAELens": Library("sae-lens", saelens),
        "SAELens, sparse": Library("sae-lens", partial(saelens, sparse=True)),
        "dictionary_learning": Library("dictionary-learning", dictionary_learning),
        "overcomplete": Library("overcomplete", overcomplete, auxk=False),
    },
    "BatchTopK": {
        "SAELens": Library("sae-lens", partial(saelens, batch=True)),
        "dictionary_learning": Library(
            "dictionary-learning", partial(dictionary_learning, batch=True)
        ),
        "overcomplete": Library("overcomplete", partial(overcomplete, batch=True), auxk=False),
    },
}


def builders(op: str, dead: bool) -> tuple[dict[str, Build], list[str]]:
    """Name and version -> builder, ours first; and a line for each library that is left out."""
    found: dict[str, Build] = {"ours": ours}
    missing = []
    for name, library in LIBRARIES[op].items():
        version = installed(library.package)
        if not version:
            missing.append(f"{op}, {name}: {library.package} is not installed")
        elif dead and not library.auxk:
            missing.append(f"{op}, {name}: has no AuxK loss over dead neurons")
        else:
            first, *rest = name.split(",")
            found[",".join([f"{first} {version}", *rest])] = library.build
    return found, missing
