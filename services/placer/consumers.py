"""Which workers consume which model's queue, and where they are full: as they report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.placer.core.news import News
from shared.control import ModelReport
from shared.names import ModelId


class Consumers:
    """Laws: a model has an entry in `by_model` exactly while somebody consumes it."""

    def __init__(self) -> None:
        self.by_model: dict[ModelId, list[str]] = {}
        self._full: dict[str, set[ModelId]] = {}

    def __repr__(self) -> str:
        return f"<Consumers of {len(self.by_model)} models>"

    def take(self, worker: str, news: News) -> None:
        """What a worker's new report tells."""
        full = self._full.get(worker, set[ModelId]())
        for was, told in news.changed:
            if was is None or was.bound != told.bound:
                self._note(worker, told.model, bound=told.bound)
            if told.bound and told.saturated:
                full.add(told.model)
            else:
                full.discard(told.model)
        for gone in news.gone:
            self._note(worker, gone.model, bound=False)
            full.discard(gone.model)
        if full:
            self._full[worker] = full
        else:
            self._full.pop(worker, None)

    def lose(self, worker: str, reported: Mapping[ModelId, ModelReport]) -> None:
        """The worker, which reported these, is gone."""
        for model in reported:
            self._note(worker, model, bound=False)
        self._full.pop(worker, None)

    def saturated(self) -> set[ModelId]:
        """Models of which some worker has taken all that it may at once."""
        full: Iterable[set[ModelId]] = self._full.values()
        return {model for models in full for model in models}

    def _note(self, worker: str, model: ModelId, *, bound: bool) -> None:
        consumers = self.by_model.setdefault(model, [])
        if bound and worker not in consumers:
            consumers.append(worker)
        elif not bound and worker in consumers:
            consumers.remove(worker)
        if not consumers:
            del self.by_model[model]
