"""Combine proposals and their class probabilities to one label a pixel, without the K x H x W score tensor.

bands    bands of rows, and labels from any function that scores a band
resize   the official sequence of resizes as one matrix an axis, and its linear pieces
scores   class probabilities; scores of all words, or of a label map's own
bounds   the words that can win somewhere in a block of pixels
labels   the label map, by those bounds, or band by band where they decide nothing
"""
