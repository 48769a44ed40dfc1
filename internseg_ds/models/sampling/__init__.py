"""Operators that sample feature maps bilinearly at fractional positions, and the deformable attention made of
one."""
