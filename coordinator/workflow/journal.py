"""What happened to calls, as it is written down until what was learned of it is.

Profiles are large and change with every call; events are small. So a store gets all events,
now and then a profile, and forgets the events that all profiles contain. A core that starts
again takes the profiles over and goes through the events since.
"""

from __future__ import annotations

import msgspec

from coordinator.workflow.prediction import RunKey


class Began(msgspec.Struct, frozen=True, gc=False, tag="b", array_like=True):
    """``Profiles.observe_start``. Times in seconds of the learner's clock."""

    tenant: str
    workflow: str
    run: str
    call: str
    agent: str
    prompt_tokens: int
    block_hashes: bytes
    at_s: float
    parent: str = ""
    final: bool = False


class Over(msgspec.Struct, frozen=True, gc=False, tag="e", array_like=True):
    """``Profiles.observe_end``."""

    tenant: str
    workflow: str
    call: str
    output_tokens: int
    at_s: float
    completed: bool = True


class RunOver(msgspec.Struct, frozen=True, gc=False, tag="r", array_like=True):
    """``Profiles.end_run``."""

    tenant: str
    workflow: str
    run: str
    at_s: float
    completed: bool = True

    @property
    def key(self) -> RunKey:
        """Which run."""
        return RunKey(self.tenant, self.workflow, self.run)


Event = Began | Over | RunOver

encode_events = msgspec.msgpack.Encoder().encode
decode_events = msgspec.msgpack.Decoder(list[Event]).decode
