"""The built-in world: tiny instructions with exact answers, and two tiny models that learned it. Knows no stage."""
