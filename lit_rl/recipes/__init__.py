"""Recipes: YAML files that `--config NAME` finds; the first line says what each is."""
