"""Recipes: TOML files and the models they are read into."""
