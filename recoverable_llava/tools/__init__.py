"""Tools around the model: combining checkpoints, asking, drawing, the command line. Never part of a Hub repo."""
