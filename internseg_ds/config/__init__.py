"""The experiment config and the DeepSpeed JSON: read, checked and filled in, before anything is built."""
