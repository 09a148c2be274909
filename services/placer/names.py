"""Which routing keys lead to which versions beside their own: what the aliases say (ADR 0020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shared.aliases import NONE, Aliases, heaviest
from shared.names import ModelId, model_id


class Names:
    """As the registry last told of them. A direct exchange cannot divide: where an alias splits
    requests, producers' all go to the heaviest version."""

    def __init__(self) -> None:
        self._documents: dict[str, Aliases] = {}
        self._keys: dict[ModelId, frozenset[str]] = {}
        self._meant: set[ModelId] = set()

    def __repr__(self) -> str:
        return f"<Names of {len(self._documents)} models>"

    def take_in(self, documents: Mapping[str, Aliases]) -> set[str]:
        """Those of all models. Returns the models of which nothing was known before. Costs what
        has changed."""
        new = set(documents.keys() - self._documents.keys())
        for name in self._documents.keys() - documents.keys():
            self.take_one(name, NONE)
        for name, document in documents.items():
            if self._documents.get(name) is not document:
                self.take_one(name, document)
        return new

    def take_one(self, name: str, document: Aliases) -> None:
        before = self._documents.get(name)
        if before is not None:
            for version in before.versions():
                self._keys.pop(model_id(name, version), None)
                self._meant.discard(model_id(name, version))
        if not document.revision:
            self._documents.pop(name, None)
            return
        self._documents[name] = document
        keys: dict[ModelId, set[str]] = {}
        for alias, found in document.aliases.items():
            model = model_id(name, heaviest(found.split))
            keys.setdefault(model, set()).add(f"{name}/{alias}")
            self._meant.update(model_id(name, version) for version in found.split)
        self._keys.update({model: frozenset(found) for model, found in keys.items()})

    def keys(self, model: ModelId) -> frozenset[str]:
        """Routing keys that the version has by aliases."""
        return self._keys.get(model, frozenset())

    def ever(self, name: str) -> set[str]:
        """Routing keys that some version of the model has, or once had, by aliases."""
        document = self._documents.get(name, NONE)
        return {f"{name}/{alias}" for alias in (*document.aliases, *document.gone)}

    def mean(self, model: ModelId) -> bool:
        """Whether some alias sends requests to the version."""
        return model in self._meant

    def pending(self) -> Iterator[tuple[str, str, Aliases]]:
        """Model, alias and the model's document, of each change that waits."""
        for name, document in list(self._documents.items()):
            for alias, found in document.aliases.items():
                if found.pending is not None:
                    yield name, alias, document
