"""Going on from a checkpoint: which one, what differs from its run, and its values read into the model."""
