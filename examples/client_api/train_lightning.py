"""The same network with PyTorch Lightning: the trainer is patched, the rest is as it was."""

import lightning.pytorch as pl
import torch
from digits import Net, site_data
from torch.utils.data import DataLoader, TensorDataset

import sfl.client.lightning as flare


class Digits(pl.LightningModule):
    """Classifies digits."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, _):
        """One step."""
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, _):
        """Loss and accuracy."""
        x, y = batch
        scores = self.net(x)
        self.log("loss", torch.nn.functional.cross_entropy(scores, y))
        self.log("accuracy", (scores.argmax(1) == y).float().mean())

    def configure_optimizers(self):
        """Plain momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    flare.init()
    x, y, x_test, y_test = site_data(flare.get_site_name())
    train = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    held_out = DataLoader(TensorDataset(x_test, y_test), batch_size=len(x_test))
    model = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)

    flare.patch(trainer)
    while flare.is_running():
        trainer.validate(model, held_out, verbose=False)
        if flare.is_train():
            trainer.fit(model, train)
