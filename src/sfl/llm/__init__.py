"""Federated fine-tuning of causal language models; with adapters, they alone travel."""
