"""mindseed grows a language model from a seed: raw text in, a model you can chat with out."""

__version__ = "0.1.0"
