"""Is my own model split right? A U-Net beside one device, under three strategies.

    python examples/verify_your_model.py                  # pp2, tp2, dp2/zero3
    python examples/verify_your_model.py dp3              # those of your choice

Nothing in the model knows of ranks, and it need not be importable: functions of this script are
carried to the ranks. Exit status 1 if a strategy computes something else than one device.
"""

import sys

import torch
from torch import nn

import shoal


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Images [n, 3, H, W] to a class for each pixel, [n, 5, H, W]; H and W even twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = twice(3, width), twice(width, 2 * width)
        self.bottom = twice(2 * width, 4 * width)
        self.rise2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = twice(4 * width, 2 * width)
        self.rise1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = twice(2 * width, width)
        self.head = nn.Conv2d(width, 5, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = self.down1(images)
        second = self.down2(self.pool(first))
        x = self.rise2(self.bottom(self.pool(second)))
        x = self.rise1(self.up2(torch.cat([x, second], dim=1)))
        return self.head(self.up1(torch.cat([x, first], dim=1)))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step: any data will do, of sizes that do not divide too."""
    examples = (10, 7, 5)[step % 3]
    return torch.randn(examples, 3, 16, 16), torch.randint(5, (examples, 16, 16))


def main(strategies: list[str]) -> int:
    different = 0
    for strategy in strategies:
        certificate = shoal.verify(
            model_fn=UNet,
            batch_fn=batch,
            loss_fn=nn.functional.cross_entropy,
            strategy=strategy,
            optimizer="adamw",
        )
        print(f"{strategy}: {certificate.text()}\n", flush=True)
        different += certificate.refused is None and not certificate.ok
    return 1 if different else 0


sys.exit(main(sys.argv[1:] or ["pp2", "tp2", "dp2/zero3"]))
