"""Services that show runs: TensorBoard, Weights & Biases, MLflow; one file each."""
