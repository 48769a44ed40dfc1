"""Operators of our models in terms of torch's own, for programs that leave Python."""
