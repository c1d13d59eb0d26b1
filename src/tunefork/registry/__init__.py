"""Artefacts on disk: adapters in the PEFT format, models as Hugging Face folders, run folders."""
