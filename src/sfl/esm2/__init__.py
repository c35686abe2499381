"""Federated masked-language-model fine-tuning of ESM2 protein models."""
