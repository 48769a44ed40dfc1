"""Data sets of anybody's folders: images and label maps found by patterns, and label maps of any coding."""
