"""Are the objects beside the blocks as they were written, do they belong together, and is none missing?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.documents import Damaged, decode, text_is_sealed
from pipeline.fitting.job import facts_path, weights_path
from pipeline.storage import Storage

_TEXTS = {"config.yaml": b"name: ", "report.html": b"<!doctype html"}
"""What a text begins with."""
_PIECE = 16 * 2**20
Found = tuple[str, str, str]
"""(kind, path, detail) of one thing that is wrong."""


class Results:
    """The objects of a run that are not blocks, read once."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.paths = {entry.path: entry.size for entry in storage.list()}
        """Size of every object by path."""
        self.wrong: list[Found] = []
        self.run, self.plan = self._document("run.json"), self._document("plan.json")
        for path, begins in _TEXTS.items():
            text = storage.read(path) if path in self.paths else None
            if text is not None and not (text_is_sealed(text) and text.startswith(begins)):
                self.wrong.append(("damaged", path, "it was changed after it was written"))
        self.starts = self._starts()
        self.evaluation = self._document("evaluation.json")
        self.radius = self._document("radius.json")
        self.deformation = self._document("deformation/deformation.json")
        self._document("deformation/nearer.json")
        for start in range(self.starts):
            self._files(f"map/start={start}/map.json", f"map/start={start}/")
            self._weights(start)
        self._files("evaluation.json", "")
        self.wrong += self._gaps()

    @property
    def sampled(self) -> bool:
        """Whether sampling was finished once, so that every planned block has to be there."""
        return any(path in self.paths for path in ("radius.json", "evaluation.json", "report.html"))

    def _document(self, path: str) -> Any:
        """Return a JSON object, None if it is missing or damaged."""
        if path not in self.paths:
            return None
        try:
            return decode(self.storage.read(path), path=path)
        except Damaged as error:
            if not any(where == path for _, where, _ in self.wrong):
                self.wrong.append(("damaged", path, str(error)))
            return None

    def _starts(self) -> int:
        """Number of MAP estimates: as planned, or as many as there are."""
        if self.plan is not None:
            return int(self.plan["starts"])
        return len({path.split("/")[1] for path in self.paths if path.startswith("map/")})

    def _files(self, document: str, folder: str) -> None:
        """Compare the files that a document names with the digests that it has of them."""
        value = self._document(document)
        for name, digest in (value or {}).get("files", {}).items():
            self._digest(folder + name, digest, document)

    def _weights(self, start: int) -> None:
        facts = self._document(facts_path(start))
        if facts is not None:
            self._digest(weights_path(start), facts["weights_sha256"], facts_path(start))

    def _digest(self, path: str, digest: str, document: str) -> None:
        if path not in self.paths:
            self.wrong.append(("gap", path, f"it is missing, {document} names it; the next run makes it again"))
        elif _sha256(self.storage, path) != digest:
            self.wrong.append(("damaged", path, f"its sha256 is not the one in {document}"))

    def _gaps(self) -> Iterator[Found]:
        """Yield objects that are missing although what is made from them is there."""
        order = ["run.json", "config.yaml", *(f"map/start={start}/map.json" for start in range(self.starts))]
        order += ["plan.json", "radius.json"]
        if self._has_deformation():
            order += [*(facts_path(start) for start in range(self.starts)), "deformation/deformation.json"]
        order += ["evaluation.json", "report.html"]
        there = [place for place, path in enumerate(order) if path in self.paths]
        blocks = any(path.startswith("walks/") for path in self.paths)
        last = max([*there, order.index("plan.json") + 1 if blocks else 0], default=0)
        for path in order[:last]:
            if path not in self.paths:
                yield "gap", path, "it is missing; the next run makes it again"

    def _has_deformation(self) -> bool:
        """Whether the run has a deformation stage, as far as its configuration can be read."""
        if any(path.startswith("deformation/") for path in self.paths):
            return True
        try:
            config = yaml.safe_load(self.storage.read("config.yaml"))
            return config["deformation"]["kind"] != "none"
        except (FileNotFoundError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
            return False

    def stale(self, digest: str) -> Iterator[Found]:
        """Yield results that were made from other blocks than those whose digest is given, or from other results."""
        recorded = {
            "radius.json": (self.radius or {}).get("blocks"),
            "evaluation.json": (self.evaluation or {}).get("blocks"),
            "deformation/deformation.json": (self.deformation or {}).get("trained_on"),
        }
        for path, found in recorded.items():
            if found not in (None, digest):
                yield "stale", path, "made from other blocks than those that are there now"
        used = (self.evaluation or {}).get("deformation", self.deformation)
        if self.deformation is not None and used != self.deformation:
            yield "stale", "evaluation.json", "made from another deformation than the one that is there now"


def _sha256(storage: Storage, path: str) -> str:
    total = hashlib.sha256()
    with storage.open_input(path) as file:
        while piece := file.read(_PIECE):
            total.update(piece)
    return total.hexdigest()
