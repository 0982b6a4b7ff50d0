"""Exported models, run without torch: see docs/export.md."""
