"""Making rows with models: recipes, the workers that run them, and the stage that drives them through a pool."""
