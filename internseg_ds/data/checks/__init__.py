"""Data sets and pipelines looked at before a run: what cannot be meant, and what is odd."""
