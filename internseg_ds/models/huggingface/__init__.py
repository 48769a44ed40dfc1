"""Segmentors in the form in which transformers loads them: its own classes, and code that a folder brings."""
