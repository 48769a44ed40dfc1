"""The parts of benchmarks/on_one_gpu.py: what is measured on a GPU machine that can be had for minutes.

`jobs` lists what is measured, in the order of its worth; `supervisor` runs each job in a process of its own;
`visit` is what a job measures with; `results` the file that every figure goes to at once; `table` and
`report` read it. The other modules are the jobs.
"""
