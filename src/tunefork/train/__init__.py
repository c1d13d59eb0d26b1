"""One training loop for LoRA, QLoRA and full fine-tuning."""
