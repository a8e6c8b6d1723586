"""`python -m itune_ray`."""

from itune_ray.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
