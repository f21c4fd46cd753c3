"""Federated LoRA fine-tuning under record-level differential privacy, as a Flower app."""

__version__ = "0.1.0"
