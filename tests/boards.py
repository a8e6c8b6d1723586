"""The dashboards and alerts of the project, as tests read them."""

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
BOARDS = [json.loads(board.read_text()) for board in sorted((ROOT / "dashboards").glob("*.json"))]
PANELS = [
    (board["title"], panel["title"], target["expr"])
    for board in BOARDS
    for panel in board["panels"]
    for target in panel["targets"]
]
"""(board, panel, PromQL expression)"""
ALERTS = [
    (rule["alert"], rule["expr"])
    for group in yaml.safe_load((ROOT / "dashboards" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
"""(alert, PromQL expression)"""
