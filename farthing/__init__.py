"""Farthing: a self-hosted, OpenAI-compatible inference server that prices every token."""

__version__ = "0.1.0"
