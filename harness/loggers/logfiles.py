"""What W&B's and TensorBoard's own files hold, so that a run that goes on logs no step twice and
none too few.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def wandb_steps(folder: Path, run_id: str) -> set[int]:
    """The steps whose history is on disk in a W&B run's `.wandb` files, what a kill cut short left
    out.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    steps = set()
    for file in folder.glob(f"*run-*/run-{run_id}.wandb"):
        for data in wandb_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("history"):
                steps.add(int(record.history.step.num))
    return steps


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: 7 bytes of header, then LevelDB's log format with its blocks
    of 32 KiB.
    """
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if left < 7:
            place += left
            continue
        part = content[place + 7 : place + 7 + length]
        if kind not in (1, 2, 3, 4) or len(part) < length:
            return
        place += 7 + length
        record += part
        # 1 is a whole record; 2, 3 and 4 are the first, a middle and the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def event_steps(folder: Path) -> set[int]:
    """The steps that TensorBoard shows of a folder's event files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    steps: set[int] = set()
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for data in event_records(file.read_bytes()):
            event = Event.FromString(data)
            if event.HasField("summary"):
                steps.add(int(event.step))
            elif event.session_log.status == SessionLog.START:
                steps = {step for step in steps if step < event.step}
    return steps


def event_records(content: bytes) -> Iterator[bytes]:
    """The records of an event file: each a length of 8 bytes, a checksum of 4, the record, a
    checksum of 4.
    """
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        record = content[place + 12 : place + 12 + length]
        if len(record) < length:
            return
        yield record
        place += length + 16
