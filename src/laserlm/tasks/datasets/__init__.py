"""The data sets: one file for each, which turns its rows into examples."""
