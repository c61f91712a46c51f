"""Pretrained models in Flax NNX, read from local files, and figures that they must reproduce."""
