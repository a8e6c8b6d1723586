"""A driver process of its own: `python drivers.py JOB.json OUTPUT`; and recipes that break things."""

import asyncio
import json
import os
import sys
from pathlib import Path

from itune_ray.config.generate import GenerateJob
from itune_ray.data.artifact import RunStore
from itune_ray.data.ledger import Outcome
from itune_ray.engine.host import EngineHost
from itune_ray.generate.recipes.respond import Respond
from itune_ray.generate.run import run
from itune_ray.observe.progress import Progress


class CrashOnce(Respond):
    """`respond`, whose worker process dies in the middle of a block, the first time only, after some seconds."""

    def __init__(self, flag: str, after: float = 0.0):
        from itune_ray.config.recipes import RespondConfig

        super().__init__(RespondConfig())
        self._flag, self._after = Path(flag), after

    async def __call__(self, row, llm) -> list[Outcome]:
        if row.position == 50 and not self._flag.exists():
            await asyncio.sleep(self._after)
            self._flag.touch()
            os._exit(1)
        return await super().__call__(row, llm)


def generate(job: GenerateJob, output: str, engines: EngineHost):
    """Run the job; the artifact."""
    with Progress(quiet=True) as progress:
        return run(job, RunStore(output, job.name), "generate", engines, progress)


if __name__ == "__main__":
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    host = EngineHost()
    try:
        generate(GenerateJob(**json.loads(Path(sys.argv[1]).read_text())), sys.argv[2], host)
    finally:
        host.close()
