"""Measuring: how many pixels of a labelled data set get the right word."""
