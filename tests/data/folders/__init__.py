"""Tests of `internseg_ds/data/folders`."""
