"""Recipes: their schema, how they are composed and checked, and what every key and metric means."""
