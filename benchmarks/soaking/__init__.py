"""The parts of benchmarks/soak.py: a long training under faults that are drawn at random, beside the same
training without any.

`faults` lists what is done to the run; `attempt` is one start of it, from the launcher to the end of its last
process; `disk` and `clock` are the disk and the clock that the faults disturb; `vitals` watches memory, files
and threads; `comparison` holds the two runs against each other; `report` writes what was seen.
"""
