"""Prepare, check and read labelled data sets, and augment them for training."""
