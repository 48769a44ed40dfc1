"""What can be refused before a run takes any accelerator memory: config, data, model and weights that do not
fit each other."""
