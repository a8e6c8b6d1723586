"""Dialogues of several turns, every assistant turn the teacher's: replayed from human ones, or written with a
simulated user (methods D04)."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Literal

from itune_ray.config.recipes import DialogueConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import SPEAKERS, builtin_prompt, last_user_turn, refused, transcript
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError

Ended = Literal["turn_cap", "end_marker", "repeated", "empty_user", "user_truncated"]
"""Why a self-chat stopped."""
_NAMES = "|".join([*SPEAKERS.values(), "Human", "AI"])
ROLE = re.compile(rf"^[*#\s]*(?:{_NAMES})[*\s]*:", re.MULTILINE | re.IGNORECASE)
"""A line that begins with the name of a speaker."""
OWN_NAME = re.compile(r"\A[*#\s]*(?:User|Human)[*\s]*:[*\s]*", re.IGNORECASE)


class Dialogue(Chain):
    """Mode `replay`: each assistant turn t of a dialogue is y_t ~ M(x_1, y_1, ..., x_t), the human turns as they were
    and the earlier answers regenerated; a last user turn without an answer gets one.

    Mode `self_chat`: from the row's prompt on, M answers and a simulated user writes the next turn, until `turns`
    answers, the end marker, a user turn that was there before (up to case and spaces), or one that is empty or cut. The
    dialogue always ends in an answer. An answer that is empty or cut rejects the row.
    """

    name = "dialogue"

    def __init__(self, config: DialogueConfig):
        self._config = config
        self.prompts = {} if config.mode == "replay" else {"user": builtin_prompt(self.name, "user.jinja")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The dialogue of one row."""
        if self._config.mode == "replay":
            return await self._replay(row, calls)
        return await self._self_chat(row, calls)

    async def _replay(self, row: Record, calls: Calls) -> list[Outcome]:
        reason = unfit(row)
        if reason is not None:
            return refused(calls.draft, row, reason)
        chat: list[Message] = []
        for turn in row.messages:
            if turn["role"] != "assistant":
                chat.append(turn)
            else:
                await _answer(chat, calls)
        if chat[-1]["role"] == "user":
            await _answer(chat, calls)
        return [self._made(row, chat, calls, {})]

    async def _self_chat(self, row: Record, calls: Calls) -> list[Outcome]:
        if last_user_turn(row.prompt) is None:
            return refused(calls.draft, row, "no_prompt")
        chat = list(row.prompt)
        ended: Ended = "turn_cap"
        for number in range(1, self._config.turns + 1):
            await _answer(chat, calls)
            if number == self._config.turns:
                break
            said = await self._user_turn(row, chat, calls, number)
            if said.ended is not None:
                ended = said.ended
                break
            chat.append({"role": "user", "content": said.text})
        return [self._made(row, chat, calls, {"ended": ended})]

    async def _user_turn(self, row: Record, chat: list[Message], calls: Calls, number: int) -> "UserTurn":
        marker = self._config.end_marker
        asked = render(
            self.prompts["user"], goal=row.meta.get("goal"), conversation=transcript(chat), end_marker=marker
        )
        sampling = sampling_of(self._config.user_sampling)
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, "\nAssistant:"))
        (sample,) = await calls.samples(
            f"user/{number}", ({"role": "user", "content": asked.strip()},), of="user", sampling=sampling
        )
        said = [turn["content"] for turn in chat if turn["role"] == "user"]
        return read_user_turn(sample.text, said, marker, is_cut=sample.finish_reason == "length")

    def _made(self, row: Record, chat: list[Message], calls: Calls, facts: dict[str, str]) -> Outcome:
        about = {"mode": self._config.mode, "turns": sum(turn["role"] == "assistant" for turn in chat), **facts}
        meta = {**row.meta, self.name: about}
        return calls.accepted(messages=tuple(chat), finish_reason="stop", meta=meta)


async def _answer(chat: list[Message], calls: Calls) -> None:
    """Append the teacher's answer to the chat so far."""
    number = sum(turn["role"] == "assistant" for turn in chat)
    try:
        answer = await calls.ask(f"answer/{number}", tuple(chat))
    except EndedError as end:
        raise EndedError(str(end), raw=transcript(chat) if end.raw is None else end.raw, failed=end.failed) from None
    chat.append({"role": "assistant", "content": answer})


def unfit(row: Record) -> str | None:
    """Why a dialogue cannot be replayed, if so: its last prompt says nothing, or an answer follows no user turn."""
    turns = row.messages
    if last_user_turn(row.prompt) is None:
        return "no_prompt"
    roles = [turn["role"] for turn in turns]
    if any(role == "assistant" and (i == 0 or roles[i - 1] != "user") for i, role in enumerate(roles)):
        return "answer_without_question"
    return "no_prompt" if any(t["role"] == "user" and not t["content"].strip() for t in turns) else None


@dataclass(frozen=True)
class UserTurn:
    """What the simulated user said, or why the dialogue ends."""

    text: str = ""
    ended: Ended | None = None


def read_user_turn(reply: str, said: list[str], marker: str, *, is_cut: bool = False) -> UserTurn:
    """The user's next message from a simulator's reply.

    Args:
        reply: Its words. What it writes from a line on that begins with a speaker's name is not the user's.
        said: The user turns so far.
        marker: What ends the dialogue, wherever in the reply it stands.
        is_cut: Whether the reply was cut at `max_tokens`; one that goes on as another speaker was whole before.
    """
    text = OWN_NAME.sub("", reply)
    other = ROLE.search(text)
    text = text[: other.start()].strip() if other else text.strip()
    if marker in text:
        return UserTurn(ended="end_marker")
    if not text:
        return UserTurn(ended="empty_user")
    if is_cut and other is None:
        return UserTurn(ended="user_truncated")
    if _plain(text) in map(_plain, said):
        return UserTurn(ended="repeated")
    return UserTurn(text)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
