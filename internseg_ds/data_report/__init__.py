"""The data doctor: all images and label maps of an experiment looked at, one page about them, and a config that
mends what is wrong."""
