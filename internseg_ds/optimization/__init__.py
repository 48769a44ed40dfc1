"""What the optimizer needs: parameter groups, the optimizer itself, which elements each rank holds, their
average, and their state from a checkpoint."""
