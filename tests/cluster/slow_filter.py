"""A user's filter that takes its time, and says that it works."""

import time


class Slow:
    """Keeps everything."""

    def __init__(self, log: str, seconds: float):
        self._log, self._seconds = log, seconds

    def keep(self, record) -> bool:
        time.sleep(self._seconds)
        with open(self._log, "a") as log:
            log.write(f"{record.key}\n")
        return True
