"""The training: engine, loop, checkpoints and their resume, requests to stop, steps and images that fail."""
