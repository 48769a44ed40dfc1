"""Made-up scenes with their label maps, to try and test without a download."""
