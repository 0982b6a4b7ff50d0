"""Run exported models without torch: see docs/export.md."""
