"""Backbones of other libraries, each behind one mmseg backbone class."""
