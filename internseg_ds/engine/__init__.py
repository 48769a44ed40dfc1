"""The run: the experiment as read, the training loop, evaluation, saving and resuming, and the trackers that write what happened."""
