"""Mask2Former: a head that classifies masks instead of pixels."""
