"""Processes under ZeRO: the process group, models built and gathered, precision, weights in, and a watchdog
over all ranks."""
