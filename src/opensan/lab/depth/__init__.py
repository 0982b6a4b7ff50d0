"""Train a SAN whose words are distances, and read depth from it: `opensan lab depth`."""
