"""ConvMixer, the extractor of image features, and its pretraining by classification."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssd.embed.images import Images
from ssd.errors import Diverged, Interrupted, UserError, one_line
from ssd.metrics import finite
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint
from ssd.storage.files import difference

FEATURES, DEPTH, KERNEL, PATCH = 256, 8, 5, 2  # the paper's CIFAR network, 256 channels wide
WEIGHT_DECAY, MAX_NORM, WARM_UP = 0.01, 1.0, 0.2  # WARM_UP: share of the steps
PADDING = 4  # pixels by which a training image is shifted at most
STEPS_PER_UPDATE = 10
# Raise it when a change moves features or weights: files of another number are not resumed.
ALGORITHM = 1


def activated(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution, GELU, BatchNorm."""
    return nn.Sequential(convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels))


class Mixer(nn.Module):
    """One layer of ConvMixer: mixes places within a channel, then channels within a place."""

    def __init__(self, features: int, kernel: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(features, features, kernel, groups=features, padding="same")
        self.places = activated(depthwise)
        self.channels = activated(nn.Conv2d(features, features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(x + self.places(x))


class ConvMixer(nn.Module):
    """ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022) on uint8 images.

    Args:
        channels: of the images.
        classes: C.
        features: the paper's h.
        depth: its d.
        kernel: its k, in patches.
        patch: its p, in pixels.
    """

    mean: Tensor  # [channels, 1, 1], of the pretraining set, pixels in 0..1
    std: Tensor

    def __init__(
        self, channels: int, classes: int, features: int, depth: int, kernel: int, patch: int
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        patches = activated(nn.Conv2d(channels, features, patch, stride=patch))
        self.body = nn.Sequential(*patches, *(Mixer(features, kernel) for _ in range(depth)))
        self.classifier = nn.Linear(features, classes)

    def embed(self, images: Tensor) -> Tensor:
        """Features [B, features], fp32, of images [B, channels, H, W], uint8: no classifier."""
        x = (images.float() / 255 - self.mean) / self.std
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        return x.float().mean((2, 3))  # in fp32 under autocast too

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


@dataclass(frozen=True)
class Settings:
    """What the result of pretraining depends on, apart from the data."""

    epochs: int = 25
    batch_size: int = 512
    lr: float = 0.01  # its peak
    seed: int = 0


def statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [channels, 1, 1] of pixels [N, channels, H, W], uint8, / 255."""
    levels = torch.arange(256, dtype=torch.float64, device=pixels.device) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(1)]
    share = torch.stack(counts).double() / (pixels.numel() // pixels.shape[1])
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # A channel of one colour has no deviation to divide by.
    std = variance.sqrt().clamp(min=1 / 255)
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def augment(pixels: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shifted and mirrored images; black moves in at the border.

    Args:
        pixels: [B, channels, H, W] uint8.
        shifts: [B, 2] in 0..2 * PADDING, rows and columns; PADDING leaves an image where it is.
        flips: [B] bool.
    """
    height, width = pixels.shape[2:]
    padded = functional.pad(pixels, [PADDING] * 4)
    rows = shifts[:, :1] + torch.arange(height, device=pixels.device)
    columns = shifts[:, 1:] + torch.arange(width, device=pixels.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    batch = torch.arange(len(pixels), device=pixels.device)
    cut = padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


class Pretrainer:
    """Trains a ConvMixer to classify; the last checkpoint is the file of its weights.

    AdamW with clipped gradient norm; the learning rate rises to its peak and falls to 0 linearly.
    Images are shifted and mirrored at random. bf16 autocast on CUDA.

    Args:
        images: to train on.
        settings: of the training.
        device: to train on.
        path: of the checkpoint.
    """

    def __init__(
        self, images: Images, settings: Settings, device: torch.device, path: Path
    ) -> None:
        self.settings, self.device, self.path = settings, device, path
        shape = {
            "channels": images.pixels.shape[1],
            "classes": int(images.labels.max()) + 1,
            "features": FEATURES,
            "depth": DEPTH,
            "kernel": KERNEL,
            "patch": PATCH,
        }
        self.described = {"shape": shape, "pretraining": describe(images, settings)}
        self.flip = images.flip
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(settings.seed)
            self.model = ConvMixer(**shape)
        self.model.mean, self.model.std = statistics(images.pixels)
        self.model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY)
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.step = 0
        # Whole batches only: the statistics of BatchNorm suffer from a small last one.
        self.size = min(settings.batch_size, len(self.labels))
        self.steps = len(self.labels) // self.size
        self.total = self.steps * settings.epochs

    def restore(self) -> None:
        """Resumes from the checkpoint if there is one.

        Raises:
            UserError: it is damaged, or of another pretraining.
        """
        if not self.path.is_file():
            return
        tensors, state = read(self.path, self.device)
        if changed := difference(state, self.described):
            raise UserError(f"{self.path} is of another pretraining ({changed}); use another --out")
        self.model.load_state_dict(_part(tensors, "model"))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer").items():
            number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor
        if moments:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = state["step"]

    def save(self) -> None:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.step < self.total:
            for number, moments in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{key}": t for key, t in moments.items()}
        reached = {"step": self.step, "finished": self.step == self.total}
        save_checkpoint(self.path, tensors, self.described | reached)

    def run(
        self,
        every: float,
        watch: Callable[[str, int, int, bool], None] = lambda *progress: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> ConvMixer:
        """Trains to the end and returns the network.

        Args:
            every: seconds between checkpoints.
            watch: takes text, steps done, steps in all, and whether an epoch ends.
            stopped: whether to stop; asked at every step.

        Raises:
            Interrupted: it was stopped, and wrote a checkpoint.
            Diverged: loss or weights are not finite; a checkpoint is from before.
        """
        saved = time.perf_counter()
        for epoch in range(self.step // self.steps, self.settings.epochs):
            seen, loss, correct = 0, *torch.zeros(2, device=self.device).unbind()
            order, shifts, flips = self._draw(epoch)
            for index in range(self.step % self.steps, self.steps):
                batch = slice(index * self.size, (index + 1) * self.size)
                result = self._train(order[batch], shifts[batch], flips[batch])
                loss, correct, seen = loss + result[0], correct + result[1], seen + self.size
                self.step += 1
                last = index + 1 == self.steps
                stop, due = stopped(), time.perf_counter() - saved > every
                if last or stop or due:
                    self._require_finite(loss, epoch)
                if last or self.step % STEPS_PER_UPDATE == 0:
                    text = (
                        f"pretraining epoch {epoch + 1}/{self.settings.epochs}: "
                        f"loss {loss * self.size / seen:.3f}, accuracy {correct / seen:.3f}"
                    )
                    watch(text, self.step, self.total, last)
                if self.step == self.total or stop or due:
                    self.save()
                    saved = time.perf_counter()
                if stop and self.step < self.total:
                    raise Interrupted
        return self.model

    def _require_finite(self, loss: Tensor, epoch: int) -> None:
        """Diverged if the loss or the network is not finite; the host reads them."""
        floating = [t for t in self.model.state_dict().values() if t.is_floating_point()]
        what = "" if all(map(finite, floating)) else "a weight not finite"
        if not finite(loss):
            what = f"the loss {loss.item()}"
        if what:
            raise Diverged(
                f"pretraining diverged: --lr {self.settings.lr} makes {what} in epoch {epoch + 1}, "
                f"step {self.step}; use less, with another --out"
            )

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Order [N], shifts [N, 2] and flips [N] of an epoch, drawn from its number alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        count = len(self.labels)
        order = torch.randperm(count, generator=generator, device="cpu")
        shifts = torch.randint(2 * PADDING + 1, (count, 2), generator=generator, device="cpu")
        flips = (torch.rand(count, generator=generator, device="cpu") < 0.5) & self.flip
        return order.to(self.device), shifts.to(self.device), flips.to(self.device)

    def _train(self, order: Tensor, shifts: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
        """One step; the loss and the number of right answers, on the device."""
        rise = (self.step + 1) / (WARM_UP * self.total)
        fall = (self.total - self.step) / ((1 - WARM_UP) * self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(rise, fall, 1.0)
        self.model.train()
        labels = self.labels[order]
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(augment(self.pixels[order], shifts, flips))
        loss = functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def describe(images: Images, settings: Settings) -> dict[str, Any]:
    """What a pretraining depends on; JSON-able."""
    origin = {"data": images.name, "data_crc32": images.crc32, "algorithm": ALGORITHM}
    return origin | asdict(settings)


def read(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """load_checkpoint, with advice for a single file in place of a run's folder."""
    try:
        return load_checkpoint(path, device)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(
            f"{path} is damaged or was not written by python -m ssd.embed; use another"
        ) from error


def load_weights(path: Path, device: torch.device) -> tuple[ConvMixer, dict[str, Any]]:
    """The network that a Pretrainer trained, and what it was pretrained on.

    Raises:
        UserError: the file is damaged, of something else, or of an unfinished pretraining.
    """
    tensors, state = read(path, device)
    try:
        if not state["finished"]:
            raise UserError(
                f"--weights {path} is of an unfinished pretraining; --resume that first"
            )
        with torch.device("cpu"):
            model = ConvMixer(**state["shape"])
        model.load_state_dict(_part(tensors, "model"))
        pretraining = dict(state["pretraining"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"--weights {path} holds no ConvMixer of this version ({one_line(error)})"
        raise UserError(reason) from error
    return model.to(device).to(memory_format=torch.channels_last), pretraining


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
