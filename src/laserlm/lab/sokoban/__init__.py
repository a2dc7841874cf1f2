"""Sokoban on boards of ten by ten cells: levels, rules, an environment and an exact solver."""
