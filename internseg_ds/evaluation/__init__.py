"""Using trained segmentors: scores, evaluation on test sets, predictions on image files, exported weights."""
