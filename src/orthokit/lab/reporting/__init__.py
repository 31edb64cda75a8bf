"""Comparisons in words, tables, figures and pages."""
