"""`python -m itune_ray`."""

from itune_ray.cli import command

if __name__ == "__main__":
    command()
