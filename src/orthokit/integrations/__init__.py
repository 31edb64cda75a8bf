"""Adapters, one framework per file; a framework is imported in its own adapter only."""
