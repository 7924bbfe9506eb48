"""SSD as a plugin for the strategies of Avalanche (pip install avalanche-lib).

    python examples/avalanche_ssd.py

trains a network on the bundled digits, two classes an experience, without the plugin and with it.
"""

import torch
from avalanche.benchmarks import CLExperience, CLScenario, class_incremental_benchmark
from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ssd.data import default_root, load
from ssd.distillation import Distiller
from ssd_kernels.nn import TopK


class SSDPlugin(SupervisedPlugin):
    """Puts the loss of a Distiller in place of the strategy's criterion.

    The teacher runs on each batch, so batches may be augmented or hold replayed samples.

    Args:
        distiller: of the strategy's model.
    """

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.distiller = distiller

    def before_training_exp(self, strategy, **kwargs) -> None:
        self.distiller.begin_task(strategy.dataloader)

    def before_backward(self, strategy, **kwargs) -> None:
        loss = self.distiller.loss(strategy.mb_output, strategy.mb_y, x=strategy.mb_x)
        strategy.loss += loss - strategy.criterion()  # what other plugins add stays

    def after_training_exp(self, strategy, **kwargs) -> None:
        labels = torch.as_tensor(list(strategy.experience.dataset.targets))
        self.distiller.end_task(strategy.dataloader, labels)


def digits() -> CLScenario:
    """Five experiences of two classes."""
    data = load("mnist-5k", default_root())
    parts = {"train": (data.x_train, data.y_train), "test": (data.x_test, data.y_test)}
    return class_incremental_benchmark(
        {name: labelled(*pair) for name, pair in parts.items()},
        class_order=list(range(10)),
        num_experiences=5,
    )


def labelled(x: Tensor, y: Tensor) -> AvalancheDataset:
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    return as_classification_dataset(data)


def train(stream: CLScenario, distil: bool) -> Tensor:
    """Accuracy [T, T], after experience t on the classes of experience i."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1000), TopK(10), nn.Linear(1000, 10))
    distiller = Distiller(model, alpha=0.5, temperature=2.0, hidden_loss="mse")
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=32,
        train_epochs=3,
        plugins=[SSDPlugin(distiller)] if distil else [],
        evaluator=None,
    )
    rows = []
    for experience in stream.train_stream:
        strategy.train(experience)
        rows.append([accuracy(model, own) for own in stream.test_stream])
    return torch.tensor(rows)


@torch.no_grad()
def accuracy(model: nn.Module, experience: CLExperience) -> float:
    x, y = zip(*((x, y) for x, y, *_ in experience.dataset), strict=True)
    return (model(torch.stack(x)).argmax(1) == torch.tensor(y)).float().mean().item()


if __name__ == "__main__":
    for distil in (False, True):
        matrix = train(digits(), distil)
        forgetting = (matrix.diag() - matrix[-1])[:-1].mean()
        shown = f"mean accuracy {matrix[-1].mean():.3f}, forgetting {forgetting:.3f}"
        print(f"{'SSD' if distil else 'without'}: {shown}")
