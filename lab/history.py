"""What happened in a run, epoch by epoch."""
from dataclasses import dataclass, field
from pathlib import Path

from lab.files import read_csv, reading


@dataclass
class Epoch:
    """A row of history.csv. Losses are means over examples (cross entropy, no label smoothing)."""
    epoch: int
    learning_rate: float  # of the epoch's first step
    train_loss: float  # during the epoch, in training mode, on augmented images
    train_accuracy: float
    val_loss: float  # after it, in evaluation mode
    val_accuracy: float
    seconds: float  # training alone
    images_per_second: float


@dataclass
class History:
    """What happened, epoch by epoch."""
    epochs: list[Epoch] = field(default_factory=list)
    diverged: str = ''  # 'epoch 3, step 17' where the loss became NaN or infinite

    def __getitem__(self, column: str) -> list:
        """history['val_loss'] -> one value per epoch."""
        return [getattr(epoch, column) for epoch in self.epochs]

    @property
    def best(self) -> Epoch:
        """The epoch of highest validation accuracy; of equals, of lowest validation loss."""
        return max(self.epochs, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss))

    def stopped_early(self, patience: int | None) -> bool:
        """Whether the best epoch lies `patience` epochs back (Q2b); never for None."""
        return bool(self.epochs) and patience is not None and self.epochs[-1].epoch - self.best.epoch >= patience

    @classmethod
    def read(cls, path: Path) -> 'History':
        """Read history.csv. Raises DamagedFile."""
        with reading(path):
            return cls(read_csv(Epoch, path))
