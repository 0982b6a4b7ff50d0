"""Words and models fitted to images: vectors from few labels, what suits a folder without any, and self-training."""
