"""Tests of the page that shows segmentations, in a real browser."""
