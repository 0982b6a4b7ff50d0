"""Words fitted to images: vectors from few labels, and what suits a folder without any."""
