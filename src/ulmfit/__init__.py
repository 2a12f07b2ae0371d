"""ULMFiT: pre-train a language model once, fine-tune it on your text, classify with a few labels."""

__version__ = "0.1.0"
