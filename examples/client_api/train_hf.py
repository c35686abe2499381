"""The same task with Hugging Face's Trainer: the trainer is patched, the rest is as it was."""

import tempfile

import numpy as np
import torch
from digits import Net, site_data
from transformers import Trainer, TrainingArguments

import sfl.client.huggingface as flare


class Digits(torch.nn.Module):
    """Classifies digits; says loss and logits as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels=None):
        """Loss and scores."""
        scores = self.net(x)
        return {"loss": torch.nn.functional.cross_entropy(scores, labels), "logits": scores}


def accuracy(predictions):
    """The share that is right."""
    return {"accuracy": float(np.mean(predictions.predictions.argmax(1) == predictions.label_ids))}


def rows(x, labels):
    """One dict an example."""
    return [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]


if __name__ == "__main__":
    flare.init()
    x, y, x_test, y_test = site_data(flare.get_site_name())
    options = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=Digits(),
        args=options,
        train_dataset=rows(x, y),
        eval_dataset=rows(x_test, y_test),
        compute_metrics=accuracy,
    )

    flare.patch(trainer)
    while flare.is_running():
        trainer.evaluate()
        if flare.is_train():
            trainer.train()
