"""The agent of a spot node: it turns the cloud's notice of interruption into a Ray drain, while there is time.

`python -m itune_ray.spot --cloud aws` runs beside Ray on every spot node. Ray then places nothing more there, and the
ranks of a training save a checkpoint after the step they are in.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

POLL_S = 5.0
TIMEOUT_S = 2.0
METADATA = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}


def aws_notice(base: str) -> float | None:
    """Seconds until the instance is taken; None while no notice was given (EC2 instance metadata, version 2)."""
    token = _asked(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    said = _asked(f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if not said:
        return None
    action = json.loads(said)
    return _seconds_to(action["time"]) if action["action"] in ("terminate", "stop", "hibernate") else None


def gcp_notice(base: str) -> float | None:
    """The same for Compute Engine, which says only that it happens and gives 30 seconds."""
    said = _asked(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return 30.0 if said and said.strip().upper() == "TRUE" else None


def azure_notice(base: str) -> float | None:
    """The same for Azure's scheduled events."""
    said = _asked(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    events = json.loads(said)["Events"] if said else []
    times = [event.get("NotBefore") for event in events if event["EventType"] == "Preempt"]
    return min((_seconds_to(when) if when else 30.0 for when in times), default=None)


NOTICES: Mapping[str, Callable[[str], float | None]] = {"aws": aws_notice, "gcp": gcp_notice, "azure": azure_notice}


def drain(seconds: float) -> None:
    """Tell Ray that this node goes; raises `CalledProcessError` where Ray does not take it."""
    ray = shutil.which("ray") or f"{sys.prefix}/bin/ray"
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot interruption notice"]
    left = ["--deadline-remaining-seconds", str(max(1, int(seconds)))]
    subprocess.run([ray, "drain-node", *reason, *left], check=True, timeout=60)


def watch(
    notice: Callable[[], float | None],
    drained: Callable[[float], None] = drain,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Look until there is a notice, then drain, once; what cannot be asked or drained now is tried again."""
    while True:
        try:
            seconds = notice()
            if seconds is not None:
                print(f"spot: this node goes in {seconds:.0f} s; draining it", flush=True)
                drained(seconds)
                return
        except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as error:
            print(f"spot: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        pause(POLL_S)


def _asked(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What the metadata service says; None for 404, its way of saying that there is nothing to say."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _seconds_to(when: str) -> float:
    """Seconds from now to a time in ISO 8601 or, as Azure writes it, RFC 1123."""
    try:
        moment = datetime.datetime.fromisoformat(when)
    except ValueError:
        moment = datetime.datetime.strptime(when, "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()


def main() -> None:
    """Run the agent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloud", choices=NOTICES, required=True)
    cloud = parser.parse_args().cloud
    watch(lambda: NOTICES[cloud](METADATA[cloud]))


if __name__ == "__main__":
    main()
