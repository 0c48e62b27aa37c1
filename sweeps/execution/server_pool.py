"""Which pack server trains which trial. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from harness.config.schema import Recipe
from harness.records.run_dir import RunDir
from rltrain.distributed.placement import pack_key, shares_base, uses_gpus
from rltrain.tools.fit import runs_together
from sweeps.study.sizing import num_packs


class PackServers(Protocol):
    """Starts and ends pack servers, by name."""

    def start(self, name: str, run_dir: RunDir, slots: int) -> None:
        """Start a server for trials like this one."""

    def works(self, name: str) -> bool:
        """Return whether trials can train in a server."""

    def remove(self, name: str, run_dir: RunDir) -> None:
        """Remove a trial from its pack, if it is still in it."""

    def end(self, name: str) -> None:
        """End a server, if it is still running."""


@dataclass
class Host:
    """Resources for one pack server at a time.

    Attributes:
        server: the server that runs there.
        unused: whether the server has had no trial yet; it may still be starting.
        key: what its trials have in common; None: it is for one trial.
        trials: the numbers of the trials that train there.
    """

    server: str | None = None
    unused: bool = True
    key: object = None
    slots: int = 1
    trials: set[int] = field(default_factory=set)

    def has_slot(self, key: object) -> bool:
        """Return whether a trial with this key can start here."""
        fits = key is not None and self.key == key and len(self.trials) < self.slots
        return not self.trials or fits


class ServerPool:
    """Assigns trials to pack servers: trials that can share a base to one, others to their own."""

    def __init__(self, recipe: Recipe, servers: PackServers) -> None:
        """`recipe` is the sweep's."""
        self._recipe = recipe
        self._hosts = [Host() for _ in range(num_packs(recipe))]
        self._servers = servers
        self._slots = runs_together(recipe)
        # vLLM does not give all GPU memory back: on GPUs a server with one slot has one trial.
        self._reuses = self._slots > 1 or not uses_gpus(recipe)
        self._names = (f"pack{n}" for n in count())

    def prepare(self, run_dir: RunDir, count: int) -> None:
        """Start servers for the packs of `count` trials ahead: base and engine take a while.

        `run_dir` is the sweep's, whose recipe says what most of its trials share.
        """
        if self._slots > 1 and shares_base(self._recipe):
            for host in self._hosts[:count]:
                self._ensure_server(host, run_dir, pack_key(self._recipe))

    def admit(self, number: int, recipe: Recipe, run_dir: RunDir, *, alone: bool) -> str | None:
        """Assign a trial to a server and return its name; None while none has a free slot."""
        key = pack_key(recipe) if self._reuses and not alone and shares_base(recipe) else None
        hosts = [host for host in self._hosts if host.has_slot(key)]
        if not hosts:
            return None
        # The emptiest host, so that all work alike; of equals one that has a fitting server.
        host = min(hosts, key=lambda h: (len(h.trials), h.key is None or h.key != key))
        if not host.trials:
            self._ensure_server(host, run_dir, key)
        host.trials.add(number)
        return host.server

    def remove(self, number: int, run_dir: RunDir) -> bool:
        """Remove a trial that has ended; return whether its server has several slots."""
        host = next(host for host in self._hosts if number in host.trials)
        host.trials.remove(number)
        host.unused = False
        assert host.server is not None
        if self._servers.works(host.server):
            self._servers.remove(host.server, run_dir)
        else:
            host.key = None  # no trial joins, and the others in it will end as well
        return host.slots > 1

    @property
    def may_have_slot(self) -> bool:
        """Whether there may be a slot for a trial that was not asked for yet."""
        return any(
            not host.trials or (host.key is not None and len(host.trials) < host.slots)
            for host in self._hosts
        )

    def _ensure_server(self, host: Host, run_dir: RunDir, key: object) -> None:
        """Have a server on an empty host that the trial can train in, an old one or a new one."""
        if host.server is not None:
            fits = key is not None and host.key == key
            if fits and (host.unused or self._servers.works(host.server)):
                return
            self._servers.end(host.server)
        host.server, host.key, host.unused = next(self._names), key, True
        host.slots = 1 if key is None else self._slots
        self._servers.start(host.server, run_dir, host.slots)
