"""Conversations written as one text, as in HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al. 2022)."""

import re

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript_turns(text: str) -> list[tuple[str, str]]:
    """(role, content) of each turn, an open turn at the end left out; empty for a text that is no transcript."""
    before, *parts = SPEAKER.split(text)
    if before.strip() or "Human" not in parts[0::2]:
        return []
    turns = [(_ROLES[who], said.strip()) for who, said in zip(parts[0::2], parts[1::2], strict=True)]
    return turns if turns[-1][1] else turns[:-1]
