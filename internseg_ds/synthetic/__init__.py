"""Made-up scenes with their label maps, and a data set of them, to try and test without a download."""
