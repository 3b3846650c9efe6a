"""What an encoder is worth: its representations, measured by neighbours, by a linear classifier, by fine-tuning."""
