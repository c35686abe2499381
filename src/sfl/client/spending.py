"""What a site's own training spends of each of its examples' privacy, in a ledger of the site's own."""

from __future__ import annotations

from pathlib import Path

from sfl.client.base import BaseFederatedClient
from sfl.core.task import EXAMPLE_EPSILON, SPENT
from sfl.errors import BudgetExhausted, LedgerError, UpdateError
from sfl.privacy.budget import PrivacyBudget
from sfl.privacy.ledger import PrivacyLedger, dataset_ledger
from sfl.types import Config, Metrics

__all__ = ["Spending"]


class Spending:
    """One site's ledger of example-level privacy.

    Args:
        budget: What each example may lose.
        site: The site's name; with ``budget.dataset`` the name of its data.
        folder: Where the ledger lies; ``None`` keeps it in memory.
    """

    def __init__(self, budget: PrivacyBudget, site: str, folder: Path | None) -> None:
        self.budget, self.site = budget, site
        self._path = folder / "ledger.jsonl" if folder is not None else None
        self._ledger: PrivacyLedger | None = None  # opened with the first task: what is wrong with it is then its reply

    def charge(self, client: BaseFederatedClient, config: Config) -> Metrics:
        """Spend what the coming training costs, before it begins; what was spent by then, as a figure.

        Raises:
            BudgetExhausted: If the budget does not allow it.
            LedgerError: If the ledger was edited, torn, or an older copy was put back.
            UpdateError: If the client does not say what it costs.
        """
        event = client.privacy_event(config)
        if event is None or event.unit != "example":
            raise UpdateError(
                f"{self.site}: a client must say by privacy_event what its training costs each example, got {event}. "
                "Define it, or leave the job's example_budget out."
            )
        try:
            if self._ledger is None or self._path is not None:  # another process may have done the site's last task
                self._ledger = self._opened()
            self._ledger.charge(int(config["round"]), event)
        except BudgetExhausted as error:
            raise BudgetExhausted(f"{self.site}: {SPENT}: {error}") from error
        except LedgerError as error:
            raise LedgerError(f"{self.site}: {error}") from error
        spent = self.budget.spent(self._ledger.events, self._ledger.earlier())
        return {EXAMPLE_EPSILON: max(guarantee.epsilon for guarantee in spent)}

    def _opened(self) -> PrivacyLedger:
        name = self.budget.dataset
        dataset = dataset_ledger(f"{name}.{self.site}") if name else None
        return PrivacyLedger(self._path, budget=self.budget.check, dataset=dataset)
