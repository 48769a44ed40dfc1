"""Files of weights, without an engine: reading every kind, fitting them to a model, merging ZeRO shards.
Loads no DeepSpeed."""
