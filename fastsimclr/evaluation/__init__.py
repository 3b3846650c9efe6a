"""Evaluation of encoders: kNN, linear classification, fine-tuning, supervised training, and embeddings."""
