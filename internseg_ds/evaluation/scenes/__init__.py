"""Segmenting scenes: images of any size, read and written by windows, so that memory does not grow with them."""
