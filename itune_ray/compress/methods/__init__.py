"""How a model is made smaller, one file each."""
