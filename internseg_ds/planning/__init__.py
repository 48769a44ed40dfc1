"""What a run will cost: pure arithmetic on a model on the meta device. Takes no accelerator and loads no DeepSpeed."""
