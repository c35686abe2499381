"""What the applications share: a pretrained model that is fine-tuned on records shared out among sites."""
