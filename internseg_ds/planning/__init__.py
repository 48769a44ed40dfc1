"""What a run will cost: memory, FLOPs, collectives and time, by arithmetic on a model on the meta device.

Takes no accelerator."""
