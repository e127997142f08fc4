"""torch's MNIST example, github.com/pytorch/examples (BSD 3-Clause), on images of noise.

As it is there, but for the data, an ``optim`` that is given, and losses that are returned.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim.lr_scheduler import StepLR

__all__ = ["main"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


def train(model: Net, train_loader: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    model.train()
    for data, target in train_loader:
        optimizer.zero_grad()
        output = model(data)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test(model: Net, test_loader: Any) -> float:
    model.eval()
    test_loss = 0.0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += F.nll_loss(output, target, reduction="sum").item()
    return test_loss / len(test_loader.dataset)


def images(count: int) -> torch.utils.data.TensorDataset:
    """Noise that is brighter in a row of each digit's own."""
    targets = torch.arange(count) % 10
    data = torch.randn(count, 1, 28, 28)
    data[torch.arange(count), 0, 2 * targets + 4] += 2.0
    return torch.utils.data.TensorDataset(data, targets)


def main(optim: Any) -> tuple[list[float], list[float]]:
    """Train with the optimizers of a module; return the losses of training and of testing."""
    torch.manual_seed(1)
    train_loader = torch.utils.data.DataLoader(images(160), batch_size=16)
    test_loader = torch.utils.data.DataLoader(images(40), batch_size=40)

    model = Net()
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)

    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    losses, tested = [], []
    for _ in range(2):
        losses += train(model, train_loader, optimizer)
        tested.append(test(model, test_loader))
        scheduler.step()
    return losses, tested
